"""`listopd study`: curves of strict parse over λ, with predictions locked before their trials.

    <out>/<name>/predictions/<curve>.json   the plan of a curve and what is predicted of it
    <out>/<name>/trials/<curve>-lam…-s…/    one run; its summary carries the prediction's SHA-256
    <out>/<name>/trials.jsonl               one line a trial: all that tables and figures rest on
    <out>/<name>/verdict.json, study.md, *.svg

The same command again continues: a trial is the unit.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from listopd_ray.baselines import run_baselines
from listopd_ray.calibrate import Measured, make_prediction, print_prediction, read_onset
from listopd_ray.cliff.calibration import FIRST_ID, scale_prediction
from listopd_ray.cliff.verdict import (
    CRITERION,
    budget_prediction,
    measure_onset,
    sha256,
    study_verdict,
)
from listopd_ray.cluster import ray_session
from listopd_ray.config import (
    Config,
    TrackingConfig,
    dump_config,
    load_config,
    run_directory,
    with_values,
)
from listopd_ray.job_config import CalibrateConfig, Curve, StudyConfig
from listopd_ray.report import REPORT, close_with_report
from listopd_ray.slots import Slots
from listopd_ray.splits import data_directory
from listopd_ray.study_report import write_report
from listopd_ray.tracking import check_unchanged, check_writable, progress_bar, replace_file
from listopd_ray.types import ListopdError
from listopd_ray.warmstart import warm_start

SET_BY_STUDY = ("name", "seed", "lam", "out", "prediction", "cliff.measure")
ROW = ("lam", "clip", "extrapolation", "num_steps", "seed", "mean_lam", "seconds")
ROW_OF_STUDENT = (
    "parse_rate",
    "parse_rate_interval",
    "ndcg_at_1",
    "ndcg_at_k",
    "ndcg_at_k_all",
    "num_prompts",
    "reasons",
)


def study_job(config: StudyConfig) -> None:
    """Run what is missing of every curve, then write verdict, table and figures."""
    study = config.study
    _check(config)
    directory = run_directory(config)
    (directory / "predictions").mkdir(parents=True, exist_ok=True)
    replace_file(directory / "config.yaml", dump_config(config))
    chosen = {n: c for n, c in study.curves.items() if n in study.only or not study.only}
    failed: list[tuple[str, str]] = []
    with ray_session():
        for config_of_seed in _distinct_inputs(config, chosen):
            for role in ("student", "teacher"):
                warm_start(config_of_seed, role)  # the slots will hold the CPUs
        with Slots(config, study.slots) as slots:
            predictor = Predictor(config, slots)
            for number, (name, curve) in enumerate(chosen.items(), start=1):
                if len(chosen) > 1:
                    print(f"{name}: curve {number} of {len(chosen)}", file=sys.stderr)
                failed += run_curve(config, name, curve, slots, predictor)
        report(config, list(_baselines(config)) if study.baselines else [])
    print(f"study: {directory}")
    close_with_report([directory], directory / REPORT)
    if failed:
        raise ListopdError(
            f"{len(failed)} trials failed, the first ({failed[0][0]}): {failed[0][1]}; "
            "the same command again repeats them"
        )


def report(config: StudyConfig, baselines: Sequence[dict[str, Any]] = ()) -> None:
    """Rows, verdict, tables and figures of all that is finished. A trial that several curves share
    has a row in each."""
    directory = run_directory(config)
    plans = {name: _known_plan(config, name) for name in config.study.curves}
    rows = [row for name in config.study.curves for row in read_rows(config, name)]
    rows += baselines
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(directory / "trials.jsonl", lines)
    begun = {name: plan for name, plan in plans.items() if any(r["curve"] == name for r in rows)}
    write_report(directory, study_verdict(directory, rows, begun), rows, config.study.compare)


def run_curve(
    config: StudyConfig, name: str, curve: Curve, slots: Slots, predictor: Predictor
) -> list[tuple[str, str]]:
    """Lock what is predicted, run and report what is missing; (trial, error) of those that fail."""
    plan = predictor.lock(name, curve)
    trials = list(_trials(config, name, curve, plan["lams"]))
    known = {} if _is_predicted(curve) else _finished_elsewhere(config, name)
    missing = []
    for trial in trials:
        if _finished(trial) is None and _identity(trial) not in known:
            missing.append(trial)
    missing.sort(key=lambda trial: trial.seed)  # a slot prepares once a seed
    failed = []
    bar = progress_bar(name, len(trials), initial=len(trials) - len(missing), unit="trial")
    for trial, summary in slots.run(missing):
        bar.update()
        if "error" in summary:
            failed.append((trial.name, summary["error"]))
            bar.write(f"{trial.name}: failed: {summary['error']}")
        else:
            parse_rate, seconds = summary["student"]["parse_rate"], summary["seconds"]
            bar.write(f"{trial.name}: strict parse {parse_rate:.3f}, {seconds:.0f} s")
    bar.close()
    if missing:
        report(config)
    return failed


class Predictor:
    """Writes the prediction file of a curve, once and before its first trial."""

    def __init__(self, config: StudyConfig, slots: Slots) -> None:
        self._config = config
        self._slots = slots
        self._measured: dict[str, list[Measured]] = {}

    def lock(self, name: str, curve: Curve) -> dict[str, Any]:
        """The plan of a curve: as locked, or locked now where something is predicted.

        Raises ListopdError where a trial came before its prediction, where a trial carries another
        one, and where the plan is not the one that was locked.
        """
        if not _is_predicted(curve):
            return _plan(self._config, curve, curve.lams)
        file = _prediction_file(self._config, name)
        trials = run_directory(self._config) / "trials"
        if not file.exists():
            begun = sorted(path.name for path in trials.glob(f"{name}-lam*"))
            if begun:
                raise ListopdError(f"{file}: refused: {begun[0]} was begun before it")
            prediction = self._predict(name, curve)
            elsewhere = _finished_elsewhere(self._config, name)
            for trial in _trials(self._config, name, curve, prediction["plan"]["lams"]):
                if earlier := elsewhere.get(_identity(trial)):
                    raise ListopdError(f"{file}: refused: {earlier.parent.name} is the same trial")
            replace_file(file, json.dumps(prediction, indent=2) + "\n")
        locked = json.loads(file.read_text(encoding="utf-8"))
        wanted = _plan(self._config, curve, curve.lams or locked["plan"]["lams"])
        changed = [key for key in wanted if wanted[key] != locked["plan"].get(key)]
        if changed:
            raise ListopdError(f"{file}: locked with another {', '.join(changed)}")
        digest = sha256(file)
        for summary_file in sorted(trials.glob(f"{name}-lam*/summary.json")):
            if json.loads(summary_file.read_text())["prediction_sha256"] != digest:
                raise ListopdError(f"{summary_file}: was run under another prediction than {file}")
        return locked["plan"]

    def _predict(self, name: str, curve: Curve) -> dict[str, Any]:
        first = next(_trials(self._config, name, curve, [1.0]))
        seeds = _seeds(self._config, curve)
        # What is measured depends on neither: curves share it.
        same = replace(first, name="measure", clip=2.0, num_steps=1, prediction=None)
        inputs = [replace(same, seed=seed) for seed in seeds]
        key = repr(inputs)
        if key not in self._measured:
            self._measured[key] = self._slots.measure(inputs)
        apriori = make_prediction(self._measured[key], first.clip)
        print(f"{name}:", end=" ")
        print_prediction({k: v for k, v in apriori.items() if k != "classes"})
        lams = curve.lams or grid(apriori["lambda_star"], curve)
        edges = ("lambda_star", "lambda_star_low", "lambda_star_high")
        escape = [apriori[key] for key in ("escape", "escape_low", "escape_high")]
        at_first = apriori["classes"].get(FIRST_ID, {})
        also = [
            {"kind": "escape", **dict(zip(edges, escape, strict=True))},
            {"kind": "first_id", **{edge: at_first.get(edge) for edge in edges}},
        ]
        if curve.calibrated_from:
            source = self._onset_of(curve.calibrated_from, first)
            if source["high"] is None or source["num_steps"] != first.num_steps:
                missing = dict.fromkeys(edges)
                why = f"{curve.calibrated_from} has no onset at {first.num_steps} updates"
                also.append({"kind": "calibrated", **missing, "not_testable": why})
            else:
                known = ("binding_class", "teacher_mass", "base_mass")
                source |= {key: apriori[key] for key in known}
                scaled = scale_prediction(source, first.clip)
                scaled["from"]["source"] = curve.calibrated_from
                also.append(scaled)
        if curve.budget_from:
            source = self._onset_of(curve.budget_from, first)
            for kind, star in (
                ("budget", apriori["lambda_star"]),
                ("budget_first_id", at_first.get("lambda_star")),
                ("budget_escape", apriori["escape"]),
            ):
                budget = budget_prediction(star, source, to_steps=first.num_steps, step=curve.step)
                also.append(budget | {"kind": kind})
        common = {"clip": first.clip, "num_steps": first.num_steps}
        return {
            **apriori,
            **common,
            "plan": _plan(self._config, curve, lams),
            "also": [{**prediction, **common} for prediction in also],
        }

    def _onset_of(self, name: str, trial: Config) -> dict[str, Any]:
        """That of a curve of this study, or of the file of another one."""
        if name not in self._config.study.curves:
            return _onset_in_file(name, trial)
        rows = read_rows(self._config, name)
        if not rows:
            raise ListopdError(f"study.curves.{name}: run it before the curve that it predicts")
        try:
            plan = _known_plan(self._config, name)
            onset = measure_onset(rows, plan["lams"], plan["seeds"])
        except ValueError as error:
            raise ListopdError(f"study.curves.{name}: no onset to predict from: {error}") from None
        return onset


def _onset_in_file(source: str, trial: Config) -> dict[str, Any]:
    """`source`: FILE or FILE:CURVE, of another study or search."""
    file, _, curve = source.partition(":")
    asked = CalibrateConfig(
        from_=file, from_curve=curve or None, clip=trial.clip, num_steps=trial.num_steps
    )
    return read_onset(asked)


def grid(lambda_star: float | None, curve: Curve) -> list[float]:
    """λ = 1 and `points` multiples of `step`, of which the first lies one to two below λ*."""
    if lambda_star is None:
        raise ListopdError("no λ* is predicted, so give the curve's lams")
    first = max(2, math.floor((lambda_star - 1) / curve.step))  # steps above 1, of the next point
    return [1.0] + [round(1 + (first - 1 + n) * curve.step, 6) for n in range(curve.points)]


def read_rows(config: StudyConfig, name: str) -> list[dict[str, Any]]:
    """One row a finished trial of a curve."""
    curve = config.study.curves[name]
    lams = _known_plan(config, name)["lams"]
    known = {} if _is_predicted(curve) else _finished_elsewhere(config, name)
    rows = []
    for trial in _trials(config, name, curve, lams):
        summary_file = _finished(trial) or known.get(_identity(trial))
        if summary_file is None:
            continue
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        student = {key: summary["student"][key] for key in ROW_OF_STUDENT}
        digest = {"prediction_sha256": summary["prediction_sha256"]}
        rows.append({"curve": name, **{key: summary[key] for key in ROW}, **student, **digest})
    return rows


def _trials(config: StudyConfig, name: str, curve: Curve, lams: list[float]) -> Iterator[Config]:
    """The runs of a curve. At λ = 1 every form of the update is the plain one."""
    shared = {
        "out": str(run_directory(config) / "trials"),
        "cliff.measure": True,
        "tracking.group": config.tracking.group or config.name,
        "tracking.job_type": "study",
        "prediction": str(_prediction_file(config, name)) if _is_predicted(curve) else None,
    }
    form = ("extrapolation", "delta", "governor")
    plain = {key: value for key, value in curve.set.items() if not key.startswith(form)}
    at_one, beyond = (with_values(config, shared | values) for values in (plain, curve.set))
    for seed in _seeds(config, curve):
        for lam in lams:
            trial = at_one if lam == 1.0 else beyond
            yield replace(trial, name=f"{name}-lam{lam:g}-s{seed}", seed=seed, lam=lam)


def _finished_elsewhere(config: StudyConfig, name: str) -> dict[str, Path]:
    """Summaries of the other curves' trials by identity: the same run is not repeated."""
    finished = {}
    for other, curve in config.study.curves.items():
        lams = _known_plan(config, other)["lams"]
        for trial in _trials(config, other, curve, lams) if other != name else ():
            if summary := _finished(trial):
                finished[_identity(trial)] = summary
    return finished


def _finished(trial: Config) -> Path | None:
    """The trial's summary; raises ListopdError where it is of another configuration."""
    directory = run_directory(trial)
    if not (directory / "summary.json").exists():
        return None
    if _saved_identity(directory / "config.yaml") != _identity(trial):
        check_unchanged(trial)
    return directory / "summary.json"


@functools.cache
def _saved_identity(file: Path) -> str:
    return _identity(load_config(Config, [str(file)]))


def _known_plan(config: StudyConfig, name: str) -> dict[str, Any]:
    """`lams` and `seeds` as locked, or as configured; no `lams` before they are predicted."""
    file = _prediction_file(config, name)
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))["plan"]
    curve = config.study.curves[name]
    return {"lams": curve.lams, "seeds": _seeds(config, curve)}


def _baselines(config: StudyConfig) -> Iterator[dict[str, Any]]:
    """Rows of the seeds whose λ = 1 run is finished."""
    finished = _finished_elsewhere(config, "")
    for trial in _trials(config, "", Curve(), [1.0]):
        if summary := finished.get(_identity(trial)):
            directory = run_directory(config) / "baselines"
            yield from run_baselines(trial, summary.parent, directory)


def _identity(trial: Config) -> str:
    watched = replace(trial, tracking=TrackingConfig(), trace=False)  # or not: the same trial
    return repr(replace(watched, name="trial", prediction=None))


def _distinct_inputs(config: StudyConfig, curves: dict[str, Curve]) -> Iterator[Config]:
    """A run of every seed and every model that the curves ask for."""
    seen = set()
    for name, curve in curves.items():
        for trial in _trials(config, name, curve, [1.0]):
            inputs = (trial.seed, trial.data, trial.task, trial.student, trial.teacher)
            key = repr((inputs, trial.teachers))
            if key not in seen:
                seen.add(key)
                yield trial


def _plan(config: StudyConfig, curve: Curve, lams: list[float]) -> dict[str, Any]:
    run = next(_trials(config, "plan", curve, [1.0]))
    return {
        "lams": lams,
        "step": curve.step,
        "seeds": _seeds(config, curve),
        "num_steps": run.num_steps,
        "samples_per_update": run.num_prompts * run.group_size,
        "evaluation_prompts": run.evaluation.num_prompts,
        "set": dict(curve.set),
        "criterion": CRITERION,
    }


def _seeds(config: StudyConfig, curve: Curve) -> list[int]:
    return curve.seeds if curve.seeds is not None else config.study.seeds


def _is_predicted(curve: Curve) -> bool:
    return curve.judge or not curve.lams


def _prediction_file(config: StudyConfig, name: str) -> Path:
    return run_directory(config) / "predictions" / f"{name}.json"


def _check(config: StudyConfig) -> None:
    study = config.study
    data_directory(config)
    check_writable(run_directory(config))
    if study.slots < 1:
        raise ListopdError(f"study.slots: must be ≥ 1, not {study.slots}")
    if not study.curves:
        raise ListopdError("study.curves: give at least one (see conf/study.yaml)")
    for key, names in (("only", study.only), ("compare", study.compare)):
        unknown = [name for name in names if name not in study.curves]
        if unknown:
            raise ListopdError(f"study.{key}: no curve '{unknown[0]}'")
    before: set[str] = set()
    for name, curve in study.curves.items():
        key = f"study.curves.{name}"
        if not re.fullmatch(r"[\w.-]+", name):
            raise ListopdError(f"{key}: a name has letters, digits, '.', '-' and '_' only")
        if curve.budget_from not in (None, *before):
            raise ListopdError(f"{key}: '{curve.budget_from}' is no earlier curve")
        if (source := curve.calibrated_from) in study.curves and source not in before:
            raise ListopdError(f"{key}: '{source}' is no earlier curve")
        if curve.lams and curve.judge and curve.lams[0] != 1.0:
            raise ListopdError(f"{key}.lams: must begin with 1, where the floor is taken")
        if curve.lams != sorted(set(curve.lams)) or not all(0 <= x < math.inf for x in curve.lams):
            raise ListopdError(f"{key}.lams: must be finite, ≥ 0 and rise")
        seeds = _seeds(config, curve)
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ListopdError(f"{key}.seeds: give at least one, each once and ≥ 0")
        if not_free := [name for name in SET_BY_STUDY if name in curve.set]:
            raise ListopdError(f"{key}.set: {not_free[0]} is set by the study itself")
        if not (curve.step > 0 and curve.points >= 1):
            raise ListopdError(f"{key}: step must be > 0 and points ≥ 1")
        trial = next(_trials(config, name, curve, [1.0]))  # the keys it sets
        is_locked = _prediction_file(config, name).exists()
        is_needed = (not study.only or name in study.only) and not is_locked
        if source is not None and source not in study.curves and is_needed:
            try:
                _onset_in_file(source, trial)
            except ListopdError as error:
                raise ListopdError(f"{key}.calibrated_from: {error}") from None
        before.add(name)
