"""Ray Tune around the whole loop: trainable, searcher, stopper, and what gives slots back.

A trial is a process without resources of its own: it leases a slot, runs the main loop in it and
reports every update. The slot is given back here, in the driver, whatever became of the process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from listopd_ray.config import Config, exact, run_directory, with_values
from listopd_ray.job_config import SearchSection
from listopd_ray.search.bracket import Bracket, Job
from listopd_ray.search.judgement import Outcome
from listopd_ray.slots import prepared_for
from listopd_ray.tracking import evaluation_metrics, read_json, read_jsonl, replace_file
from listopd_ray.types import ListopdError

PARSE_RATE = "contract/parse_rate"  # of the rollouts of an update
TO_THE_END = "full"  # key of a trial's values: it is not to be stopped
AGAIN = "again"  # key of a report: its update was reported, and spent, before


def trial_config(config: Config, values: dict[str, Any]) -> Config:
    """The run of a trial; `values` by dotted key. Equal values have equal names, which continue."""
    changes = {key: value for key, value in values.items() if key != TO_THE_END}
    parts = [f"{key.rpartition('.')[2]}{exact(value)}" for key, value in sorted(changes.items())]
    return with_values(config, changes | {"name": "-".join(parts)})


def distil_trial(values: dict[str, Any], *, config: Config, keeper: Any) -> None:
    """The trainable: one run with `values` in place of the configuration's, in a leased slot.

    Every update is a report with the metrics' own names and the last evaluation's; the last report
    has `finished`, and counts of the held-out evaluation. A trial that goes on reports first what
    it did before.
    """
    from listopd_ray.job import distill

    run = trial_config(config, values)
    summary_file = run_directory(run) / "summary.json"
    latest: dict[str, Any] = {}

    def report(metrics: dict[str, float]) -> None:
        latest.update(metrics)
        tune.report(dict(latest))

    def report_again(metrics: dict[str, float]) -> None:
        """An update of another sitting: the stopper has to see it as it would have."""
        latest.update(metrics)
        tune.report(latest | {AGAIN: True})

    if _stopped_file(run).exists() and TO_THE_END not in values:
        return report(read_json(_stopped_file(run), str(_stopped_file(run))))
    if not summary_file.exists():  # else it was finished when the driver died
        for row in read_jsonl(run_directory(run) / "metrics.jsonl"):  # of an interrupted trial
            report_again(row)
        prepared = prepared_for(run)
        holder = tune.get_context().get_trial_id()
        lease = ray.get(keeper.lease.remote(run, prepared.cluster_arguments(), holder))
        if not summary_file.exists():  # else a trial of the same values had the slot before
            distill(run, prepared, lease, report)
    summary = read_json(summary_file, str(summary_file))
    student = summary["student"]
    parsed, sampled = student["parse_rate"] * student["num_prompts"], student["num_prompts"]
    if not 0 <= parsed <= sampled:  # NaN too
        raise ListopdError(f"{summary_file}: strict parse is {student['parse_rate']}")
    counts = {"parsed": parsed, "sampled": sampled, "train/step": summary["num_steps"]}
    counts["finished"] = True
    report(evaluation_metrics(student) | counts)


def mark_stopped(config: Config, result: dict[str, Any]) -> None:
    """Another sitting is to take the trial with this last `result` as it is."""
    values = result["config"]
    metrics = {key: value for key, value in result.items() if "/" in key}
    file = _stopped_file(trial_config(config, values))
    replace_file(file, json.dumps(metrics) + "\n")


def _stopped_file(run: Config) -> Path:
    return run_directory(run) / "stopped.json"


class BracketSearcher(Searcher):
    """`Bracket` as a search algorithm of Tune."""

    def __init__(
        self, bracket: Bracket, search: SearchSection, num_rollouts: int, save: Callable[[], None]
    ) -> None:
        """`num_rollouts` of an update; `save` keeps the bracket's state."""
        super().__init__(metric="train/step", mode="max")  # Tune wants one that all reports have
        self._bracket = bracket
        self._slots = search.slots
        self._collapsed = search.collapsed
        self._num_rollouts = num_rollouts
        self._save = save
        self._live: dict[str, Job] = {}
        self._reported: dict[str, list[int]] = defaultdict(list)  # steps, by trial

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self._live) >= self._slots:
            return None
        job = self._bracket.next_job()
        if job is None:
            bracket = self._bracket
            assert self._live or bracket.done or bracket.given_up or bracket.blind
            return None if self._live else Searcher.FINISHED
        self._save()
        self._live[trial_id] = job
        return {"lam": job.lam, "seed": job.seed, TO_THE_END: job.full}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "finished" not in result and AGAIN not in result:
            self._reported[trial_id].append(int(result["train/step"]))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Trials are known by what they run, not by their ids: one that comes again counts once."""
        job = self._live.pop(trial_id, None)
        steps = self._reported.pop(trial_id, [])
        if job is None and result is not None:
            values = result["config"]
            job = Job(values["lam"], values["seed"], values[TO_THE_END])
        if job is None:
            return
        outcome = self._outcome(job, result, steps) if result and not error else None
        if outcome is None:
            self._bracket.fail(job.lam, job.seed, sum(step > 0 for step in steps))
        else:
            self._bracket.record(outcome)
        self._save()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for the pickles that Tune writes and nobody reads

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps(self._bracket.state()), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search continues from its own search.json")

    def _outcome(self, job: Job, result: dict[str, Any], steps: list[int]) -> Outcome | None:
        """None where the trial ended without counts that can be trusted."""
        if result.get("finished"):
            kind, parsed, sampled = "finished", result["parsed"], result["sampled"]
        else:
            kind, sampled = "collapsed", self._num_rollouts
            parsed = result.get(PARSE_RATE, math.nan) * sampled
            if not parsed < self._collapsed * sampled:
                return None  # something else than the stopper ended it
        if not 0 <= parsed <= sampled:  # NaN too
            return None
        return Outcome(
            lam=job.lam,
            seed=job.seed,
            kind=kind,  # type: ignore[arg-type]
            parsed=round(parsed),
            sampled=sampled,
            step=int(result["train/step"]),
            updates=sum(step > 0 for step in steps),
        )


class CollapseStopper(tune.Stopper):
    """Stops trials whose outputs have collapsed, but for those that are to run to their end."""

    def __init__(self, search: SearchSection, num_steps: int) -> None:
        self._search = search
        self._num_steps = num_steps
        self._last: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=search.patience))

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if PARSE_RATE not in result or result.get("finished"):
            return False
        last = self._last[trial_id]
        last.append(result[PARSE_RATE])
        is_low = len(last) == self._search.patience and max(last) < self._search.collapsed
        in_time = self._search.rung <= result["train/step"] < self._num_steps
        return is_low and in_time and not result["config"].get(TO_THE_END)

    def stop_all(self) -> bool:
        return False


class GiveBack(tune.Callback):
    """Gives a trial's slot back when it has ended, with the engines if the trial did not fail."""

    def __init__(self, keeper: Any, show: Callable[[str, dict[str, Any]], None]) -> None:
        """`show` takes "result", "complete" or "error" with a trial's last result."""
        self._keeper = keeper
        self._show = show

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as BracketSearcher

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._show("result", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ray.get(self._keeper.release.remote(trial.trial_id, sound=True))
        self._show("complete", {"config": trial.config} | trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ray.get(self._keeper.release.remote(trial.trial_id, sound=False))
        file = Path(trial.error_file or "")  # a traceback
        lines = file.read_text(encoding="utf-8").strip().splitlines() if file.is_file() else []
        why = lines[-1].partition(": ")[2] or lines[-1] if lines else "its process died"
        self._show("error", {"config": trial.config, "error": why})


def run_tune(
    config: Config,
    keeper: Any,
    *,
    searcher: Any,
    stopper: tune.Stopper,
    slots: int,
    show: Callable[[str, dict[str, Any]], None],
    space: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Trials of `config` as `searcher` asks for them, `slots` at once; `options` of TuneConfig."""
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths are the driver's
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the command: it can go on later
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which `verbose=0` does not silence
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # nor this: `show` says what fails
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # a run writes its own metrics
    here = f"node:{ray.util.get_node_ip_address()}"  # the slots may hold every CPU
    trainable = tune.with_parameters(distil_trial, config=config, keeper=keeper)
    scratch = Path(config.out).with_name("tune")
    shutil.rmtree(scratch, ignore_errors=True)  # of a driver that was killed
    try:
        tuner = tune.Tuner(
            # On the driver's machine, whose files it writes.
            tune.with_resources(trainable, tune.PlacementGroupFactory([{here: 0.001}])),
            param_space=space or {},
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=options.pop("num_samples", -1),
                max_concurrent_trials=slots,
                reuse_actors=True,
                **options,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(scratch.absolute()),
                stop=stopper,
                verbose=0,
                callbacks=[GiveBack(keeper, show)],
            ),
        )
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
