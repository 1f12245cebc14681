"""Whole jobs: what `listopd train` and `listopd evaluate` do around the main loop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import rich
from rich.table import Table

from listopd_ray import __version__
from listopd_ray.cluster import Cluster, launch, serve
from listopd_ray.config import Config, learner_scores_base, run_directory
from listopd_ray.evaluate import InChunks, chunk_size, evaluate
from listopd_ray.gauges import Gauges
from listopd_ray.handles import LearnerHandle, make_requests
from listopd_ray.models import end_ids, load_tokenizer, model_hash
from listopd_ray.prepare import Prepared, prepare, serving_arguments
from listopd_ray.report import REPORT, close_with_report
from listopd_ray.roles.rollout import Generated
from listopd_ray.slots import Lease
from listopd_ray.splits import data_directory, load_split
from listopd_ray.steering import check_prediction, read_prediction
from listopd_ray.supervision import LearnerLost
from listopd_ray.task.contract import TokenText
from listopd_ray.task.data import dataset_hash
from listopd_ray.teacher_pool import TeacherPool
from listopd_ray.timeline import traced
from listopd_ray.tracking import (
    Run,
    check_same,
    check_startable,
    check_unchanged,
    kept_json,
    progress_bar,
    read_json,
    read_jsonl,
)
from listopd_ray.train import Loop
from listopd_ray.types import ListopdError

TABLE_COLUMNS = {
    "parse_rate": "strict parse",
    "ndcg_at_1": "NDCG@1 of parsed",
    "ndcg_at_k_all": "NDCG@K, unparsed 0",
}


def train_job(config: Config) -> dict[str, Any]:
    """One run from data to exported student; returns its summary, at once if it is finished."""
    if summary_file(config).exists():
        summary = finished_summary(config)
    else:
        check_startable(config)  # before minutes go into warm starts
        if config.prediction:
            read_prediction(config)
        prepared = prepare(config)
        try:
            with launch(config, **prepared.cluster_arguments()) as cluster:
                summary = distill(config, prepared, cluster)
        except ListopdError:
            if (run_directory(config) / "metrics.jsonl").exists():  # one looks then most of all
                close_with_report([run_directory(config)], run_directory(config) / REPORT)
            raise
    print_table({config.name: [summary]})
    print(sync_line(config))
    print(f"run: {run_directory(config)}")
    close_with_report([run_directory(config)], run_directory(config) / REPORT)
    return summary


def sync_line(config: Config) -> str:
    """What a weight sync of the run has moved and taken: medians over its updates."""
    rows = read_jsonl(run_directory(config) / "metrics.jsonl")
    synced = [row for row in rows if {"sync/bytes", "time/sync_s"} <= row.keys()]
    if not synced:
        return f"weight sync by {config.sync.method}: not recorded"
    size, seconds = (median(r[name] for r in synced) for name in ("sync/bytes", "time/sync_s"))
    return f"weight sync by {config.sync.method}: {size / 1e6:.3g} MB in {1e3 * seconds:.3g} ms"


def finished_summary(config: Config) -> dict[str, Any]:
    """Of a run that is finished; raises ListopdError where it was another, or on other data."""
    check_unchanged(config)
    file = summary_file(config)
    summary = read_json(file, str(file))
    if not isinstance(summary, dict) or "hashes" not in summary:
        raise ListopdError(f"{file}: not what this writes")
    hashes = summary["hashes"]
    now = {"data": dataset_hash(data_directory(config))}
    for name, model in (("warm_start", config.student), ("teacher", config.teacher)):
        if model.path and model.warmstart.num_steps == 0:  # taken as it is
            now[name] = model_hash(model.path)
    now |= {f"teachers.{name}": model_hash(path) for name, path in config.teachers.items()}
    before = {name: hashes[name] for name in now if name in hashes}
    check_same(f"{run_directory(config)}: made from other data or models", before, now)
    return summary


def evaluate_job(model: str, config: Config) -> None:
    """`listopd evaluate`: one checkpoint on the held-out prompts, as a table and JSON."""
    result = evaluate_checkpoint(model, config)
    rows = {"sampled, T = 1": [result], "greedy": [result["greedy"]]}
    rich.print(results_table(f"{model} on {result['num_prompts']} held-out prompts", rows))
    print(json.dumps(result))


def evaluate_checkpoint(model: str, config: Config) -> dict[str, Any]:
    """`evaluate` with an engine of its own."""
    tokenizer = load_tokenizer(model)
    split = load_split(config, "eval", tokenizer)
    text = TokenText(tokenizer, end_ids(model, tokenizer))
    num_prompts = min(config.evaluation.num_prompts, len(split.prompts))
    with (
        serve(config, **serving_arguments(model, config, tokenizer, split)) as workers,
        progress_bar("evaluate", 2 * num_prompts, unit="output", delay=2.0) as bar,
    ):
        sampler = InChunks(workers, chunk_size(config), bar)
        result, _ = evaluate(sampler, split, text, num_prompts)
    return result


def distill(
    config: Config,
    prepared: Prepared,
    cluster: Cluster | Lease,
    report: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train one student on a running cluster and write its run directory; returns the summary.

    `report` is given the metrics of every update once they are written.
    """
    start = time.perf_counter()
    digest = None
    if config.prediction:
        check_prediction(config, prepared.hashes)
        digest = hashlib.sha256(Path(config.prediction).read_bytes()).hexdigest()
    hashes = prepared.hashes | ({"prediction": digest} if digest else {})
    reports = [report] if report else []
    with (
        Gauges(config) as gauges,
        Run(config, hashes, gauges.show, *reports) as run,
        closing(
            cluster.start_learner(config, prepared.student_path, prepared.canary_ids)
        ) as learner,
    ):
        workers = cluster.workers.with_seed(config.seed)
        has_base = not learner_scores_base(config)
        scorer = cluster.teacher.with_base(prepared.base_path if has_base else None)
        roles = workers, scorer, learner
        with traced(config, roles) as trace:
            # Each sample has a seed of its own: runs with the same warm start need not repeat it.
            sampling = [config.seed, dataclasses.asdict(config.rollout), config.learner.dtype]
            file = _evaluation_file(
                config, prepared, "warm_start", *sampling, config.evaluation.num_samples
            )
            results = Loop(config, prepared, *roles, run, cluster.faults, trace, file).run()
        teacher = teacher_evaluation(config, prepared, cluster.teacher)
        student = run.directory / "student"
        _export(learner, run, student)
        seconds = time.perf_counter() - start
        final = run.final_numbers(results["student"], seconds)
        summary = {
            "final": final,
            "warm_start": results["warm_start"],
            "teacher": teacher,
            "student": results["student"],
            "lam": config.lam,
            "mean_lam": final["lam"],
            "clip": config.clip if math.isfinite(config.clip) else None,  # JSON has no infinity
            "extrapolation": config.extrapolation,
            "num_steps": config.num_steps,
            "seed": config.seed,
            "seconds": seconds,
            "prediction_sha256": digest,
            "hashes": hashes | {"student": model_hash(student)},
            "version": __version__,
        }
        (student / "README.md").write_text(model_card(config, summary), encoding="utf-8")
        run.finish(summary)
    return summary


def _export(learner: LearnerHandle, run: Run, student: Path) -> None:
    """The trained student; a learner that dies comes back from the last checkpoint."""
    while True:
        try:
            return learner.export(student)
        except LearnerLost as error:
            learner.restart(error)
            run.restore(learner)


def teacher_evaluation(config: Config, prepared: Prepared, teacher: TeacherPool) -> dict[str, Any]:
    """The teacher on the held-out prompts, by its own actor; cached by content."""
    sampler = _TeacherSampler(teacher, prepared.max_new_tokens)
    data, text, num_prompts = prepared.evaluation, prepared.text, config.evaluation.num_prompts
    dtype = config.scoring.dtype or config.learner.dtype
    file = _evaluation_file(config, prepared, "teacher", config.scoring.backend, dtype)
    return kept_json(file, lambda: evaluate(sampler, data, text, num_prompts)[0])


def _evaluation_file(config: Config, prepared: Prepared, role: str, *depends_on: Any) -> Path:
    """Where the evaluation of a model in `prepared.hashes` is cached, by content."""
    key = [
        prepared.hashes[role],
        prepared.hashes["data"],
        config.evaluation.num_prompts,
        dataclasses.asdict(config.task),
        config.data.max_prompt_tokens,
        prepared.max_new_tokens,
        config.device,
        *depends_on,
    ]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return Path(config.cache) / "evaluation" / f"{name}.json"


class _TeacherSampler:
    """The teacher in the place of the rollout workers, for `evaluate`."""

    def __init__(self, teacher: TeacherPool, max_new_tokens: int) -> None:
        self._teacher = teacher
        self._max_new_tokens = max_new_tokens

    def generate(
        self, prompts: Any, tag: str, *, group_size: int = 1, greedy: bool = False
    ) -> list[Generated]:
        requests = make_requests(prompts, 0, tag, group_size)
        return [self._teacher.generate(requests, self._max_new_tokens, greedy)]

    def fetch(self, generated: list[Generated]) -> list[Generated]:
        return generated


def print_table(summaries: dict[str, list[dict[str, Any]]]) -> None:
    """Warm start, teacher and each run's student; means over the summaries (seeds) of a run.

    With one seed the interval is the evaluation's 95 %, with several the range over seeds.
    """
    first = next(iter(summaries.values()))
    rows = {
        "warm start": [s["warm_start"] for s in first],
        "teacher": [s["teacher"] for s in first],
    }
    for runs in summaries.values():
        bounded = ", bounded" if runs[0]["extrapolation"] == "bounded" else ""
        lams = "–".join(f"{lam:g}" for lam in sorted({run["lam"] for run in runs}))
        rows[f"λ = {lams}{bounded}"] = [run["student"] for run in runs]
    num_prompts = first[0]["student"]["num_prompts"]
    clip, num_seeds = first[0]["clip"] or math.inf, len(first)
    spread = "95 % interval" if num_seeds == 1 else f"mean [range] of {num_seeds} seeds"
    title = f"c = {clip:g}, {num_prompts} held-out prompts, T = 1, {spread}"
    rich.print(results_table(title, rows))


def results_table(title: str, rows: dict[str, list[dict[str, Any]]]) -> Table:
    """Evaluations by model; several of one model (seeds) are averaged."""
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for column in TABLE_COLUMNS.values():
        table.add_column(column, justify="right", no_wrap=True)
    for name, results in rows.items():
        table.add_row(name, *(_cell(results, column) for column in TABLE_COLUMNS))
    return table


def _cell(results: list[dict[str, Any]], column: str) -> str:
    values = [result[column] for result in results if result[column] is not None]
    if not values:
        return "–"  # nothing parsed
    if len(values) < len(results):
        return f"{sum(values) / len(values):.2f} ({len(values)} of {len(results)})"
    low, high = min(values), max(values)
    if len(results) == 1:
        low, high = results[0][f"{column}_interval"]
    return f"{sum(values) / len(values):.2f} [{low:.2f}, {high:.2f}]"


def model_card(config: Config, summary: dict[str, Any]) -> str:
    """The exported student's README: how it was made and how good it is."""
    models = [summary["warm_start"]], [summary["student"]]
    metrics = "\n".join(
        " | ".join(["", title, *(_cell(model, name) for model in models), ""]).strip()
        for name, title in TABLE_COLUMNS.items()
    )
    hashes = "\n".join(f"- {name}: `{value}`" for name, value in summary["hashes"].items())
    chat = "in the chat template" if config.task.chat_template else "without a chat template"
    adapter = (
        "; `adapter/` is what was added, for PEFT over the warm start" if config.lora.rank else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [on-policy-distillation, listwise-ranking]
---
# {config.name}

Ranks the items of a list and answers `{{"ranking": [3, 1, …]}}`, best first. Distilled on-policy
by listopd_ray {__version__}: λ = {config.lam} ({config.extrapolation}), c = {config.clip:g},
{config.num_steps} updates of {config.num_prompts * config.group_size} samples, seed {config.seed}.
Prompts are those of `listopd rank`, {chat}{adapter}.

| {summary["student"]["num_prompts"]} held-out prompts, T = 1 | warm start | this model |
|---|---|---|
{metrics}

Mean and 95 % interval.

SHA-256:
{hashes}
"""


def summary_file(config: Config) -> Path:
    return run_directory(config) / "summary.json"
