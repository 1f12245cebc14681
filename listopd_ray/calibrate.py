"""`listopd calibrate`: measure teacher and warm start before training, and predict λ*."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

from listopd_ray import __version__
from listopd_ray.cliff.calibration import (
    FIRST_ID,
    Masses,
    measure,
    pool,
    predict,
    scale_prediction,
)
from listopd_ray.cliff.verdict import ORIGIN
from listopd_ray.cluster import Cluster, launch
from listopd_ray.config import Config, run_directory, with_values
from listopd_ray.evaluate import judge_rollout
from listopd_ray.job import teacher_evaluation
from listopd_ray.job_config import CalibrateConfig
from listopd_ray.prepare import Prepared, prepare
from listopd_ray.task.metrics import evaluate_judged, evaluation_to_dict
from listopd_ray.tracking import check_writable, progress_bar, read_json, replace_file
from listopd_ray.types import ListopdError


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a prediction rests on, of one warm start."""

    masses: Masses
    warm_start: dict[str, Any]  # evaluations, as in a summary
    teacher: dict[str, Any]
    hashes: dict[str, str]


def calibrate_job(config: CalibrateConfig) -> dict[str, Any]:
    """Write `<out>/<name>/prediction.json` and show it."""
    file = run_directory(config) / "prediction.json"
    if file.exists():
        raise ListopdError(f"{file}: is there already; give another name=… or remove it")
    check_writable(file.parent)
    if config.from_:
        prediction = stamp(scale_prediction(read_onset(config), config.clip))
    else:
        plain = with_values(config, {"cliff.measure": True})
        prepared = prepare(plain)
        with launch(plain, **prepared.cluster_arguments()) as cluster:
            measured = measure_run(plain, prepared, cluster)
        prediction = make_prediction([measured], config.clip)
    keep_prediction(file, prediction)
    print(f"prediction: {file}")
    return prediction


def keep_prediction(file: Path, prediction: dict[str, Any]) -> None:
    """Write it, and show it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(prediction, indent=2) + "\n")
    print_prediction(prediction)


def measure_run(config: Config, prepared: Prepared, cluster: Cluster) -> Measured:
    """Sample the warm start on the held-out prompts and score that with teacher and base."""
    start = cluster.start_learner
    with (
        progress_bar("calibrate", 4, unit="phase") as bar,
        closing(start(config, prepared.student_path, prepared.canary_ids)) as learner,
    ):
        workers = cluster.workers.with_seed(config.seed)
        workers.load_weights(learner.publish_weights())
        bar.update()
        prompts = prepared.evaluation.prompts[: config.evaluation.num_prompts]
        generated = workers.fetch(workers.generate(prompts, "calibrate"))
        bar.update()
        teacher = cluster.teacher.with_base(prepared.base_path)
        scored = teacher.fetch(teacher.score(generated))
        bar.update()
        teacher_result = teacher_evaluation(config, prepared, cluster.teacher)
        bar.update()
    judged = [
        judge_rollout(rollout, prepared.text) for part in generated for rollout in part.rollouts
    ]
    return Measured(
        masses=measure([rollout for part in scored for rollout in part.rollouts]),
        warm_start=evaluation_to_dict(evaluate_judged(judged, prepared.evaluation.relevance)),
        teacher=teacher_result,
        hashes=prepared.hashes,
    )


def make_prediction(measured: list[Measured], clip: float) -> dict[str, Any]:
    """The a-priori prediction from one warm start, or from several (seeds) pooled."""
    prediction = predict(
        pool([m.masses for m in measured]),
        clip=clip,
        warm_start=_average([m.warm_start for m in measured]),
        teacher=measured[0].teacher,
    )
    hashes = {name: sorted({m.hashes[name] for m in measured}) for name in measured[0].hashes}
    return stamp(prediction | {"num_warm_starts": len(measured), "hashes": hashes})


def stamp(prediction: dict[str, Any]) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return prediction | {"time": now, "version": __version__}


def read_onset(config: CalibrateConfig) -> dict[str, Any]:
    """The measured onset in a search's bracket.json or a study's verdict.json, for as many updates
    as the run has."""
    assert config.from_ is not None
    file = Path(config.from_)
    if math.isinf(config.clip):
        raise ListopdError("clip: an onset gives no prediction for c = ∞")
    content = read_json(file, str(file))
    is_bracket = isinstance(content, dict) and "low" in content
    try:
        onsets = {"bracket": content} if is_bracket else _onsets_of_verdict(content)
    except (TypeError, KeyError, AttributeError):
        raise ListopdError(f"{file}: neither a bracket.json nor a verdict.json") from None
    asked = {"num_steps": config.num_steps, "clip": config.from_clip, "curve": config.from_curve}
    asked = {key: value for key, value in asked.items() if value is not None}
    onsets = {
        name: onset
        for name, onset in onsets.items()
        if onset.get("high") is not None
        and all((onset | {"curve": name}).get(key) == value for key, value in asked.items())
    }
    if not onsets:
        listed = ", ".join(f"{key} {value}" for key, value in asked.items())
        raise ListopdError(f"{file}: no onset measured with {listed}")
    for name, onset in onsets.items():
        low, high, clip = numbers = [onset.get(key, math.nan) for key in ("low", "high", "clip")]
        is_onset = all(isinstance(number, int | float) for number in numbers)
        if not is_onset or not (1 <= low < high < math.inf and 1 < clip < math.inf):
            raise ListopdError(f"{file}: {name}: no onset: low {low}, high {high}, clip {clip}")
    distances = {n: abs(math.log(o["clip"] / config.clip)) for n, o in onsets.items()}
    nearest = [name for name in onsets if distances[name] == min(distances.values())]
    if len(nearest) > 1:
        names = ", ".join(nearest)
        raise ListopdError(
            f"{file}: several onsets, give from_curve=… ({names}; a study: FILE:CURVE)"
        )
    return onsets[nearest[0]]


def _onsets_of_verdict(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Curve → its onset, with what its a-priori prediction rests on."""
    origins = {
        test["name"].removesuffix(" apriori"): {key: test[key] for key in ORIGIN if key in test}
        for test in content["tests"]
        if test["kind"] == "apriori"
    }
    return {name: origins.get(name, {}) | found for name, found in content["curves"].items()}


def print_prediction(prediction: dict[str, Any]) -> None:
    """λ* in one line, the classes as a table, and what speaks against the prediction."""
    if "classes" in prediction:
        rich.print(_class_table(prediction))
    if prediction["lambda_star"] is not None:
        binding = prediction.get("binding_class")
        print(
            f"λ* = {prediction['lambda_star']:.3f} {_interval(prediction, 'lambda_star')} at c = "
            f"{prediction['clip']:g}, {prediction['kind']}" + (f", {binding}" if binding else "")
        )
    first = prediction.get("classes", {}).get(FIRST_ID, {})
    if first.get("lambda_star") is not None:
        print(f"λ* = {first['lambda_star']:.3f} {_interval(first, 'lambda_star')}, first id alone")
    if prediction.get("escape") is not None:
        print(f"escape = {prediction['escape']:.3f} {_interval(prediction, 'escape')}, first id")
    for reason in prediction.get("out_of_scope", []):
        print(f"out of scope: {reason}")


def _interval(prediction: dict[str, Any], key: str) -> str:
    """An edge that JSON has as null is infinite; without both there is no interval."""
    edges = (prediction[f"{key}_low"], prediction[f"{key}_high"])
    if edges == (None, None):
        return ""
    return "[{}, {}]".format(*("∞" if edge is None else f"{edge:.3f}" for edge in edges))


def _class_table(prediction: dict[str, Any]) -> Table:
    title = f"{prediction['num_outputs']} outputs on {prediction['num_prompts']} held-out prompts"
    table = Table(title=title)
    for column in ("class", "p (teacher)", "b (base)", "", "λ*", "clip exit", "runaway"):
        is_word = column in ("class", "")
        table.add_column(column, justify="left" if is_word else "right", no_wrap=is_word)
    for name, row in prediction["classes"].items():
        masses = [
            f"{row[key]:.3f} [{row[f'{key}_interval'][0]:.3f}, {row[f'{key}_interval'][1]:.3f}]"
            for key in ("teacher_mass", "base_mass")
        ]
        keys = ("lambda_star", "clip_exit", "runaway")
        thresholds = ["–" if row.get(key) is None else f"{row[key]:.3f}" for key in keys]
        table.add_row(name, *masses, row["kind"], *thresholds)
    return table


def _average(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of what `predict` looks at; the interval is the widest of the seeds'."""
    defined = [e for e in evaluations if e["ndcg_at_1"] is not None]
    bounds = [e["ndcg_at_1_interval"] for e in defined]
    return {
        "parse_rate": sum(e["parse_rate"] for e in evaluations) / len(evaluations),
        "ndcg_at_1": sum(e["ndcg_at_1"] for e in defined) / len(defined) if defined else None,
        "ndcg_at_1_interval": [min(low for low, _ in bounds), max(high for _, high in bounds)]
        if defined
        else [None, None],
    }
