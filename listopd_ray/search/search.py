"""`listopd search`: the interval of λ in which the output contract starts to break.

    <out>/<name>/prediction.json   where it starts: given, or measured before the first trial
    <out>/<name>/search.json       all that a restarted search needs
    <out>/<name>/trials/lam…-s…/   one run
    <out>/<name>/bracket.json, bracket.svg, student/

The same command again continues.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from listopd_ray.calibrate import make_prediction, print_prediction
from listopd_ray.cluster import ray_session
from listopd_ray.config import Config, dump_config, run_directory, with_values
from listopd_ray.job_config import SearchConfig
from listopd_ray.models import model_hash
from listopd_ray.report import REPORT, close_with_report
from listopd_ray.search.bracket import Bracket, bracket_of
from listopd_ray.search.judgement import Outcome
from listopd_ray.search.report import Display, draw_bracket, outcome_json
from listopd_ray.search.space import check_space, run_space, seeds_of_space
from listopd_ray.search.tuning import BracketSearcher, CollapseStopper, run_tune, trial_config
from listopd_ray.slots import Slots
from listopd_ray.splits import data_directory
from listopd_ray.steering import check_origin, read_prediction
from listopd_ray.task.data import dataset_hash
from listopd_ray.tracking import (
    check_unchanged,
    check_writable,
    lock_directory,
    read_json,
    replace_file,
)
from listopd_ray.types import ListopdError
from listopd_ray.warmstart import warm_start

MAX_PREDICTED = 1e6  # λ; more is no prediction
MAY_CHANGE = ("search.slots", "search.attempts", "search.num_samples")  # between sittings


def search_job(config: SearchConfig) -> None:
    """Search, or go on with it; then write the bracket, its figure and the recommended student."""
    begun = time.time()
    _check(config)
    directory = run_directory(config)
    if (directory / "config.yaml").exists():
        check_unchanged(config, but_for=MAY_CHANGE)
    run = with_values(
        config,
        {
            "out": str(directory / "trials"),
            "prediction": None,
            "tracking.group": config.tracking.group or config.name,
            "tracking.job_type": "search",
        },
    )
    with ray_session():
        hashes = _warm_starts(config, run)
        if config.prediction is not None and not (directory / "prediction.json").exists():
            # Warm starts of other seeds are near enough.
            check_origin(config, _given(config), hashes, names=("data", "teacher"))
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ListopdError(f"{directory}: cannot write: {error.strerror}") from None
        with lock_directory(directory), Slots(run, config.search.slots) as slots:
            replace_file(directory / "config.yaml", dump_config(config))
            state = _read_state(directory, hashes)
            if config.search.algorithm != "bracket":
                replace_file(directory / "search.json", json.dumps(state) + "\n")
                return run_space(config, run, slots)
            prediction = _prediction(config, run, slots)
            bracket = bracket_of(config.search, prediction, state)
            if not bracket.done:
                _run_trials(config, run, slots, bracket, prediction, state, begun)
    outcome = outcome_json(config, bracket, prediction, state)
    _take_student(run, bracket, directory / "student")
    draw_bracket(outcome, directory / "bracket.svg")
    replace_file(directory / "bracket.json", json.dumps(outcome, indent=2) + "\n")
    print_outcome(outcome, directory)
    close_with_report([directory], directory / REPORT)


def _run_trials(
    config: SearchConfig,
    run: Config,
    slots: Slots,
    bracket: Bracket,
    prediction: dict[str, Any],
    state: dict[str, Any],
    begun: float,
) -> None:
    """`begun`: when the command was, for the seconds that it has taken."""
    import ray

    file, before = run_directory(config) / "search.json", dict(state)

    def save() -> None:
        state.update(bracket.state())
        state["seconds"] = before["seconds"] + time.time() - begun
        replace_file(file, json.dumps(state, indent=1) + "\n")

    searcher = BracketSearcher(bracket, config.search, run.num_prompts * run.group_size, save)
    with Display(bracket, prediction, config) as display:
        run_tune(
            run,
            slots.keeper,
            searcher=searcher,
            stopper=CollapseStopper(config.search, config.num_steps),
            slots=config.search.slots,
            show=display.show,
        )
    for kind, values in ray.get(slots.keeper.seconds.remote()).items():
        state["slots"][kind] += values
    save()
    if bracket.blind:
        at_one = 2 * (bracket.floor or 0.0)
        raise ListopdError(
            f"strict parse at λ = 1 is {at_one:.4f}: half of that cannot be told from nothing or "
            "from all of it; train longer, or count more outputs (evaluation.num_prompts)"
        )
    if bracket.given_up:
        raise ListopdError(
            f"{display.last_error}; given up after {config.search.attempts} attempts: the same "
            "command again goes on"
        )


def _read_state(directory: Path, hashes: dict[str, Any]) -> dict[str, Any]:
    file = directory / "search.json"
    if not file.exists():
        slots: dict[str, list[float]] = {"built": [], "reused": []}
        empty = {"asked": [], "trials": [], "failed": [], "seconds": 0.0}
        return empty | {"slots": slots, "hashes": hashes}
    state = read_json(file, str(file))
    try:
        numbers = [*state["asked"], state["seconds"], *(n for row in state["failed"] for n in row)]
        numbers += [*state["slots"]["built"], *state["slots"]["reused"]]
        outcomes = [Outcome(**trial) for trial in state["trials"]]
        numbers += [n for o in outcomes for n in (o.lam, o.seed, o.step, o.updates)]
        intact = all(0 <= o.parsed <= o.sampled and o.sampled > 0 for o in outcomes)
        intact = intact and all(o.kind in ("finished", "collapsed") for o in outcomes)
        intact = intact and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        intact = intact and all(len(row) == 3 for row in state["failed"])
        begun_with = dict(state["hashes"])
    except (KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        raise ListopdError(f"{file}: not the state of a search; remove it to begin again")
    changed = [name for name in hashes if hashes[name] != begun_with.get(name)]
    if changed:
        raise ListopdError(f"{directory}: begun with another {', '.join(changed)}")
    return state


def _prediction(config: SearchConfig, run: Config, slots: Slots) -> dict[str, Any]:
    """As kept in the search's directory, else as given, else measured now on all seeds."""
    file = run_directory(config) / "prediction.json"
    if not file.exists():
        if config.prediction is not None:
            prediction = _given(config)
        else:
            measured = slots.measure(
                [
                    with_values(run, {"seed": seed, "cliff.measure": True, "name": "measure"})
                    for seed in config.search.seeds
                ]
            )
            prediction = make_prediction(measured, run.clip)
        replace_file(file, json.dumps(prediction, indent=2) + "\n")
    prediction = _start(read_json(file, str(file)), file)
    print_prediction(prediction)
    return prediction


def _given(config: SearchConfig) -> dict[str, Any]:
    """What the prediction file says of where to start."""
    file = Path(config.prediction or "")
    return _start(read_prediction(config), file)


def _start(content: Any, file: Path) -> dict[str, Any]:
    """The part of a prediction that a search uses; raises ListopdError where it makes no sense."""
    try:
        star = content["lambda_star"]
        sides = ("low", "high") if star is not None else ()
        edges = [content.get(f"lambda_star_{side}") for side in sides] or [None, None]
        low, high = (star if edge is None else edge for edge in edges)
        makes_sense = star is None or 1 <= low <= star <= high < MAX_PREDICTED
        masses = [content.get(f"{model}_mass") for model in ("teacher", "base")]
        makes_sense = makes_sense and all(mass is None or 0 <= mass <= 1 for mass in masses)
        hashes = {name: list(values) for name, values in content.get("hashes", {}).items()}
    except (KeyError, TypeError, AttributeError):
        makes_sense = False
    if not makes_sense:
        raise ListopdError(f"{file}: no prediction to start from: λ* lies in no interval above 1")
    return {
        "kind": str(content.get("kind", "given")),
        "clip": content["clip"],
        "lambda_star": star,
        "lambda_star_low": edges[0],
        "lambda_star_high": edges[1],
        "binding_class": str(content.get("binding_class", "")),
        "teacher_mass": masses[0],
        "base_mass": masses[1],
        "hashes": hashes,
    }


def _warm_starts(config: SearchConfig, run: Config) -> dict[str, Any]:
    """Makes what is not cached, before the slots hold the CPUs; hashes of models and data."""
    seeds = config.search.seeds
    if config.search.algorithm != "bracket":
        seeds = seeds_of_space(config)
    seeded = [with_values(run, {"seed": seed}) for seed in seeds]
    students = [model_hash(warm_start(config_of_seed, "student")) for config_of_seed in seeded]
    return {
        "data": dataset_hash(data_directory(config)),
        "teacher": model_hash(warm_start(run, "teacher")),
        "warm_start": sorted(set(students)),
    }


def _take_student(run: Config, bracket: Bracket, target: Path) -> None:
    seed = bracket.student_seed
    trial = trial_config(run, {"lam": bracket.recommended, "seed": seed})
    source, partial = run_directory(trial) / "student", target.with_name("student.tmp")
    if not source.is_dir():
        if target.is_dir():
            return  # taken before
        raise ListopdError(f"{source}: the recommended student is gone")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def print_outcome(outcome: dict[str, Any], directory: Path) -> None:
    low, high = outcome["low"], outcome["high"]
    if high is None:
        print(f"no λ was found to break: the largest that holds is {low:g}")
    else:
        print(
            f"onset in ({low:g}, {high:g}] after {outcome['num_steps']} updates at c = "
            f"{outcome['clip']:g}, confidence {outcome['confidence']:.3f} for these seeds"
        )
        if high - low > 1.001 * outcome["resolution"]:
            print("wider than the resolution: what lies between is too close to call")
    student = outcome["student"]
    print(
        f"recommended λ = {outcome['recommended']:g}: strict parse {student['parse_rate']:.3f} "
        f"(seed {student['seed']})"
    )
    if student["parse_rate"] < outcome["floor"]:
        print(f"warning: that is below the floor, {outcome['floor']:.3f}", file=sys.stderr)
    print(f"{outcome['updates']} updates in {outcome['seconds'] / 60:.0f} min")
    print(f"search: {directory}")


def _check(config: SearchConfig) -> None:
    search = config.search

    def require(holds: bool, key: str, rule: str) -> None:
        if not holds:
            raise ListopdError(f"search.{key}: {rule}")

    data_directory(config)
    check_writable(run_directory(config))
    warmstart = config.teacher.warmstart
    if warmstart.num_steps > 0 and warmstart.seed is None:
        raise ListopdError("teacher.warmstart.seed: give one: all trials share the teacher")
    require(search.slots >= 1, "slots", "must be ≥ 1")
    require(search.attempts >= 1, "attempts", "must be ≥ 1")
    require(search.patience >= 1, "patience", "must be ≥ 1")
    require(search.rung >= 0, "rung", "must be ≥ 0")
    distinct = len(set(search.seeds)) == len(search.seeds)
    valid = bool(search.seeds) and distinct
    require(valid, "seeds", "give at least one, each once")
    for seed in search.seeds:
        with_values(config, {"seed": seed})
    require(1e-4 <= search.resolution < math.inf, "resolution", "must be finite and ≥ 0.0001")
    wide = math.isfinite(search.max_lam) and search.max_lam >= 1 + search.resolution
    require(wide, "max_lam", "must be finite and at least 1 + search.resolution")
    require(0 < search.error < 0.5, "error", "must lie in (0, 0.5)")
    for key in ("collapsed", "margin"):
        require(0 <= getattr(search, key) < 1, key, "must lie in [0, 1)")
    require(search.num_samples >= 1, "num_samples", "must be ≥ 1")
    if search.algorithm != "bracket":
        require(config.prediction is None, "algorithm", "only bracket starts from a prediction")
        return check_space(config)
    require(not search.space, "space", "needs search.algorithm=grid or optuna")
    if not math.isfinite(config.clip):
        raise ListopdError("clip: a search needs a finite c")
    if config.prediction is not None:
        _given(config)
    # A trial's λ is what it says.
    constant = config.lam_schedule.kind == "constant" and not isinstance(config.lam, str)
    if config.governor.enabled or config.alarm.action != "warn" or not constant:
        raise ListopdError(
            "governor.enabled, alarm.action, lam_schedule, lam=auto: they move λ or end the trial, "
            "and the search is to judge the λ that it sets"
        )
