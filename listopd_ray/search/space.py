"""The same trials under Tune's own algorithms: grids, random draws, Optuna, ASHA, over any key.

<out>/<name>/trials/…      one run each
<out>/<name>/trials.jsonl  its values, what it reached, or the error that ended it
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import optuna
import rich
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from rich.table import Table
from tqdm import tqdm

from listopd_ray.config import Config, exact, run_directory, with_values
from listopd_ray.following import num_trials
from listopd_ray.job_config import SearchConfig
from listopd_ray.report import REPORT, close_with_report
from listopd_ray.search.tuning import PARSE_RATE, CollapseStopper, mark_stopped, run_tune
from listopd_ray.slots import Slots
from listopd_ray.tracking import progress_bar, read_jsonl, replace_file
from listopd_ray.types import ListopdError

LISTS = ("grid_search", "choice")
# With so many arguments.
RANGES = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2, "qrandint": 3}
# What trials share, or what the search sets itself.
FIXED = (
    *("name", "out", "cache", "device", "prediction", "tracking", "demo_seeds"),
    *("data", "task", "tokenizer", "student", "teacher", "teachers", "base", "warmstart_workers"),
    *("rollout", "scoring", "sync", "learner.dtype", "learner.num_cpus", "learner.num_gpus"),
)


class Trials:
    """The rows of trials.jsonl, those of earlier sittings included."""

    def __init__(self, file: Path, run: Config, keys: list[str], metric: str) -> None:
        self.bar: tqdm | None = None
        self._run = run
        self._file, self._keys, self._metric = file, keys, metric
        self._rows = {row["name"]: row for row in read_jsonl(file) if "error" not in row}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Best first; those that failed at the end."""
        return sorted(self._rows.values(), key=lambda row: -row.get(self._metric, -math.inf))

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self._rows.values() if "error" in row]

    @property
    def ended(self) -> list[dict[str, Any]]:
        """At their budget or stopped before, but not failed."""
        return [row for row in self._rows.values() if "error" not in row]

    def show(self, event: str, result: dict[str, Any]) -> None:
        """What `GiveBack` sees of a trial."""
        if event == "result":
            return
        values = {key: result["config"][key] for key in self._keys}
        name = ", ".join(f"{key} = {exact(value)}" for key, value in values.items())
        row = {"name": name, **values}
        if event == "error":
            row["error"] = result["error"]
            tqdm.write(f"{name}: failed: {result['error']}", file=sys.stderr)
        else:
            row |= {
                "updates": result["train/step"],
                "finished": bool(result.get("finished")),
                # A trial that was stopped has its rollouts alone.
                "parse_rate": result.get("parsed", result.get(PARSE_RATE, 0.0))
                / result.get("sampled", 1),
            }
            if row["finished"] or self._run.evaluation.every:  # else that of the warm start
                row[self._metric] = result[self._metric]
            if not row["finished"]:
                mark_stopped(self._run, result)
            end = f", stopped at update {row['updates']}" if _is_short(row, self._run) else ""
            tqdm.write(f"{name}: strict parse {row['parse_rate']:.3f}{end}", file=sys.stdout)
            sys.stdout.flush()
        self._rows[name] = row
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows.values())
        replace_file(self._file, "".join(lines))
        if self.bar is not None:
            self.bar.update()


def run_space(config: SearchConfig, run: Config, slots: Slots) -> None:
    """Run the trials of `search.space` that are missing, then show all."""
    search = config.search
    directory = run_directory(config)
    keys = sorted(search.space)
    trials = Trials(directory / "trials.jsonl", run, keys, search.metric)
    space = {key: _domain(key, spec) for key, spec in search.space.items()}
    options: dict[str, Any] = {"metric": search.metric, "mode": "max"}
    if search.asha:
        options["scheduler"] = ASHAScheduler(
            time_attr="train/step",
            grace_period=min(max(1, search.rung), config.num_steps),
            max_t=config.num_steps,
            stop_last_trials=False,  # they have their last evaluation before them
            reduction_factor=2,
        )
    if search.algorithm == "optuna":
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        done = [{key: row[key] for key in keys} for row in trials.ended]
        rewards = [row[search.metric] for row in trials.ended]
        options["num_samples"] = search.num_samples - len(done)
        known = dict(points_to_evaluate=done, evaluated_rewards=rewards) if done else {}
        metric = dict(metric=search.metric, mode="max")
        seed = config.seed + len(done)  # the draws of another sitting are others
        searcher: Any = OptunaSearch(space=space, seed=seed, **metric, **known)
        space = {}
    else:
        options["num_samples"] = search.num_samples
        searcher = BasicVariantGenerator(random_state=config.seed, max_concurrent=search.slots)
    if options["num_samples"] > 0:
        stopper = CollapseStopper(search, config.num_steps)
        # A grid begins at its first point again: what is finished comes back at once.
        ended = len(trials.ended) if search.algorithm == "optuna" else 0
        with progress_bar(config.name, num_trials(search), initial=ended, unit="trial") as bar:
            trials.bar = bar
            run_tune(
                run,
                slots.keeper,
                searcher=searcher,
                stopper=stopper,
                slots=search.slots,
                show=trials.show,
                space=space,
                **options,
            )
    rich.print(_table(config, trials.rows))
    print(f"search: {directory}")
    close_with_report([directory], directory / REPORT)
    if trials.failed:
        raise ListopdError(
            f"{len(trials.failed)} trials failed, the first ({trials.failed[0]['name']}): "
            f"{trials.failed[0]['error']}; the same command again repeats them"
        )


def check_space(config: SearchConfig) -> None:
    """Raises ListopdError for a key that trials share or that does not exist, and for a domain that
    is none."""
    search = config.search
    if not search.space:
        raise ListopdError(f"search.space: search.algorithm={search.algorithm} needs one")
    if config.evaluation.every == 0 and (search.asha or search.algorithm == "optuna"):
        raise ListopdError("evaluation.every: must be > 0: search.metric is of evaluations")
    seeds_of_space(config)
    for key, spec in search.space.items():
        if not isinstance(key, str):
            raise ListopdError(f"search.space.{key}: no key of the configuration")
        if key in FIXED or key.split(".")[0] in FIXED:
            raise ListopdError(f"search.space.{key}: trials share it")
        name, arguments = _parse(key, spec)
        if name == "grid_search" and search.algorithm == "optuna":
            raise ListopdError(f"search.space.{key}: optuna takes choice, not grid_search")
        # A range by its ends, and by a draw: of another type it may be.
        drawn = arguments if name in LISTS else [*arguments[:2], _domain(key, spec).sample()]
        for value in drawn:
            try:
                with_values(config, {key: value})
            except ListopdError as error:
                raise ListopdError(f"search.space.{key}: {error}") from None
    names = [next(iter(spec)) for spec in search.space.values()]
    if search.algorithm == "grid" and set(names) == {"grid_search"} and search.num_samples > 1:
        raise ListopdError("search.num_samples: a grid that is run again gives the same trials")


def seeds_of_space(config: SearchConfig) -> list[int]:
    """Those that a trial may have; raises ListopdError where they cannot be listed."""
    if "seed" not in config.search.space:
        return [config.seed]
    name, values = _parse("seed", config.search.space["seed"])
    if name not in LISTS:
        raise ListopdError("search.space.seed: give choice or grid_search: warm starts come first")
    return values


def _domain(key: str, spec: Any) -> Any:
    """{uniform: [1, 2]} → tune.uniform(1, 2); choice and grid_search take the list itself."""
    name, arguments = _parse(key, spec)
    return getattr(tune, name)(*([arguments] if name in LISTS else arguments))


def _parse(key: str, spec: Any) -> tuple[str, list[Any]]:
    """Name and arguments of a distribution; raises ListopdError where it is none."""
    known = (*LISTS, *RANGES)
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in known:
        raise ListopdError(
            f"search.space.{key}: give one of {', '.join(known)} with a list, not {spec}"
        )
    name, arguments = next(iter(spec.items()))
    if not isinstance(arguments, list) or not arguments:
        raise ListopdError(f"search.space.{key}.{name}: give a list, not {arguments}")
    if name in RANGES:
        numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in arguments)
        in_order = numbers and len(arguments) == RANGES[name] and arguments[0] < arguments[1]
        if not in_order or not all(step > 0 for step in arguments[2:]):
            what = "low, high" if RANGES[name] == 2 else "low, high and a step > 0"
            raise ListopdError(f"search.space.{key}.{name}: give {what}, not {arguments}")
        if name == "loguniform" and arguments[0] <= 0:
            raise ListopdError(f"search.space.{key}.{name}: must be > 0, not {arguments[0]}")
    elif any(value in arguments[:n] for n, value in enumerate(arguments)):
        raise ListopdError(f"search.space.{key}.{name}: give every value once")
    return name, arguments


def _is_short(row: dict[str, Any], config: Config) -> bool:
    """Ended before its budget; ASHA also stops trials at its very end."""
    return not row["finished"] and row["updates"] < config.num_steps


def _table(config: SearchConfig, rows: list[dict[str, Any]]) -> Table:
    metric = config.search.metric
    table = Table(title=f"{config.name}: {len(rows)} trials, best first")
    keys = sorted(config.search.space)
    for column in (*keys, metric):
        table.add_column(column.split("/")[-1].split(".")[-1], justify="right")
    for column in ("strict parse", "updates", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        values = [f"{row[key]:.3g}" if isinstance(row[key], float) else row[key] for key in keys]
        values = [str(value) for value in values]
        if "error" in row:
            table.add_row(*values, "", "", "", "failed")
            continue
        end = "stopped" if _is_short(row, config) else ""
        reached = f"{row[metric]:.3f}" if metric in row else "–"
        numbers = (reached, f"{row['parse_rate']:.3f}", f"{row['updates']}")
        table.add_row(*values, *numbers, end)
    return table
