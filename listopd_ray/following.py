"""How far a run, a study or a search is, from what lies in its directory: nothing is written there.

It may run on another machine that shares the storage. A lock that is held tells that a process
writes here; where locks do not pass between machines, rows that come do. Rows carry no times of
day: files' modification times stand for them.
"""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from omegaconf import OmegaConf

from listopd_ray.config import Config, load_config
from listopd_ray.job_config import SearchConfig, SearchSection, StudyConfig
from listopd_ray.search.bracket import Bracket, bracket_of
from listopd_ray.tracking import read_json, read_jsonl
from listopd_ray.types import ListopdError

RECENT = 20  # updates whose seconds those to come are taken to need
CURVE = 200  # updates whose parse rate is kept
PATIENCE_S = 60.0  # without a row; more where five turns take longer
JOB_PATIENCE_S = 600.0  # without any change: between trials engines start

State = Literal["running", "silent", "interrupted", "stopped", "finished"]


class Rows:
    """A JSON lines file that grows, and is cut back at times; one line torn at its end waits."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._at = 0  # bytes read: whole lines
        self._last = b""  # the line that ends there
        self._count = 0

    def new(self) -> tuple[bool, list[dict[str, Any]]]:
        """Rows that have come since the last call; True before them: all from the beginning, since
        the line that was read last is not where it was."""
        if not self._file.exists():
            is_cut, self._at, self._last, self._count = self._at > 0, 0, b"", 0
            return is_cut, []
        with self._file.open("rb") as stream:
            stream.seek(self._at - len(self._last))
            is_cut = stream.read(len(self._last)) != self._last
            if is_cut:
                self._at, self._last, self._count = 0, b"", 0
                stream.seek(0)
            *whole, _ = stream.read().split(b"\n")
        rows = []
        for line in whole:
            self._count += 1
            self._last = line + b"\n"
            self._at += len(self._last)
            rows.append(self._row(line))
        return is_cut, rows

    def _row(self, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            int(row["train/step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ListopdError(f"{self._file}: line {self._count}: no row of metrics") from None
        return row


class RunView:
    """One run. `look` takes in what has changed since."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory
        self._clock = clock
        self._rows = Rows(directory / "metrics.jsonl")
        self.config = Config()
        self.begun = 0.0  # when this sitting was
        self.changed = 0.0  # when the last row came
        self.summary: dict[str, Any] | None = None
        self.events: list[dict[str, Any]] = []
        self.is_held = self._was_held = False
        self._anchor: tuple[float, float, int] | None = None
        self._forget()

    def _forget(self) -> None:
        self.metrics: dict[str, Any] = {}  # each with its newest value
        self.evaluated: int | None = None  # the update of the newest evaluation
        self.parse = deque[float](maxlen=CURVE)
        self._recent = deque[float](maxlen=RECENT)  # s of an update
        self._updates_s = 0.0
        self._evaluations = 0

    def look(self) -> None:
        file = self.directory / "config.yaml"
        is_first, begun = self._anchor is None, _changed(file)
        if begun != self.begun:
            self.config = load_config(Config, [str(file)])
        is_cut, rows = self._rows.new()
        if is_cut:
            self._forget()
        for row in rows:
            self._take(row)
        self.changed = max(_changed(self.directory / "metrics.jsonl"), begun)
        events = read_jsonl(self.directory / "events.jsonl")
        self.events = [event for event in events if isinstance(event, dict)]
        if is_cut or begun != self.begun:
            # Of a first look at a run that is older than its sitting nothing is known before now.
            is_whole = is_first and not self.restarts and not self._is_rolled_back()
            is_whole = is_whole and self._updates_s <= self.changed - begun
            now = (self.changed, self._updates_s, self._evaluations)
            self._anchor = (begun, 0.0, 0) if is_whole else now
        self.begun = begun
        self.is_held = is_held(self.directory)
        self._was_held = self._was_held or self.is_held
        summary = self.directory / "summary.json"
        self.summary = read_json(summary, str(summary)) if summary.exists() else None

    def _take(self, row: dict[str, Any]) -> None:
        self.metrics |= row
        if "contract/parse_rate" in row:
            self.parse.append(row["contract/parse_rate"])
        if "time/step_s" in row:
            self._recent.append(row["time/step_s"])
            self._updates_s += row["time/step_s"]
        if "eval/parse_rate" in row:
            self.evaluated = row["train/step"]
            self._evaluations += 1

    @property
    def step(self) -> int:
        return int(self.metrics.get("train/step", 0))

    @property
    def restarts(self) -> dict[str, int]:
        names = [name for name in self.metrics if name.startswith("fault/")]
        roles = {n: n.removeprefix("fault/").removesuffix("_restarts") for n in names}
        return {roles[n]: int(self.metrics[n]) for n in names if n.endswith("_restarts")}

    def _is_rolled_back(self) -> bool:
        return any(event.get("action") == "rollback" for event in self.events)

    @property
    def quiet_s(self) -> float:
        return max(0.0, self._clock() - self.changed)

    @property
    def elapsed_s(self) -> float:
        """Of this sitting."""
        end = self._clock() if self.state in ("running", "silent") else self.changed
        return max(0.0, end - self.begun)

    @property
    def evaluation_s(self) -> float:
        """What an evaluation has taken, with the checkpoints and the start: the wall-clock time
        since the sitting began that is in no update's `time/step_s`. 0 where that is not known."""
        if self._anchor is None:
            return 0.0
        since, updates_s, evaluations = self._anchor
        count = self._evaluations - evaluations
        other = self.changed - since - (self._updates_s - updates_s)
        return max(0.0, other) / count if count else 0.0

    @property
    def left_s(self) -> float | None:
        """Until the last update and evaluation; None before the first update."""
        if not self._recent:
            return None
        total, every = self.config.num_steps, self.config.evaluation.every
        evaluations = 1 if self.step < total else 0
        if every > 0:
            evaluations = -(-total // every) - self.step // every if self.step < total else 0
        left = (total - self.step) * fmean(self._recent) + evaluations * self.evaluation_s
        return max(0.0, left - self.quiet_s)

    @property
    def state(self) -> State:
        if self.summary is not None:
            return "finished"
        turn = (fmean(self._recent) if self._recent else 0.0) + self.evaluation_s
        is_quiet = self.quiet_s > max(PATIENCE_S, 5 * turn)
        if self.is_held:
            return "silent" if is_quiet else "running"
        # Without its lock it may still run elsewhere, but not where the lock was seen.
        return "interrupted" if is_quiet or self._was_held else "running"


class JobView:
    """A study or a search: its trials. `look` takes in what has changed since."""

    def __init__(
        self,
        directory: Path,
        config: StudyConfig | SearchConfig,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.config = config
        self._clock = clock
        self.summaries: dict[str, dict[str, Any]] = {}  # of the trials that are finished
        self._ended: dict[str, float] = {}  # when they were
        self.trials: dict[str, RunView] = {}  # the others
        self.states: dict[str, State] = {}  # of all trials
        self.total: int | None = None  # None: not known before its end
        self.done = 0
        self.bracket: Bracket | None = None
        self.predicted: float | None = None  # λ*
        self._collapsed: set[tuple[Any, int]] = set()  # (λ, seed)
        self._is_finished = self._is_held = False

    def look(self) -> None:
        for file in sorted(self.directory.glob("trials/*/config.yaml")):
            trial, name = file.parent, file.parent.name
            summary = trial / "summary.json"
            if name not in self.summaries and summary.exists():
                self.summaries[name] = _trial_summary(summary)
                self._ended[name] = _changed(summary)
                self.trials.pop(name, None)
            elif name not in self.summaries:
                self.trials.setdefault(name, RunView(trial, self._clock)).look()
        self._is_held = is_held(self.directory)
        if isinstance(self.config, StudyConfig):
            try:
                self._look_at_study(self.config)
            except (KeyError, TypeError, AttributeError):
                files = "trials.jsonl, predictions/"
                raise ListopdError(f"{self.directory}: {files}: not what a study writes") from None
        elif self.config.search.algorithm == "bracket":
            self._look_at_bracket(self.config)
        else:
            rows = read_jsonl(self.directory / "trials.jsonl")
            self.done = sum("error" not in row for row in rows)
            self.total = num_trials(self.config.search)
            self._is_finished = self.done >= self.total
        self.states = dict.fromkeys(self.summaries, "finished")
        self.states |= {name: self._state_of(trial) for name, trial in self.trials.items()}

    def _look_at_study(self, config: StudyConfig) -> None:
        study, rows = config.study, read_jsonl(self.directory / "trials.jsonl")
        reported = {(row["curve"], row["lam"], row["seed"]) for row in rows}
        own = {(n.rpartition("-lam")[0], s["lam"], s["seed"]) for n, s in self.summaries.items()}
        self.total = self.done = 0
        self._is_finished = not study.baselines or any(r["curve"] == "opd+grammar" for r in rows)
        for name, curve in study.curves.items():
            if study.only and name not in study.only:
                continue
            file = self.directory / "predictions" / f"{name}.json"
            plan = read_json(file, str(file))["plan"] if file.exists() else {}
            seeds = plan.get("seeds", study.seeds if curve.seeds is None else curve.seeds)
            count = len(plan.get("lams", curve.lams)) or 1 + curve.points
            self.total += count * len(seeds)
            self.done += sum(trial[0] == name for trial in reported | own)
            known = sum(trial[0] == name for trial in reported)
            self._is_finished = self._is_finished and known >= count * len(seeds)

    def _look_at_bracket(self, config: SearchConfig) -> None:
        self._is_finished = (self.directory / "bracket.json").exists()
        state_file, prediction_file = (
            self.directory / name for name in ("search.json", "prediction.json")
        )
        if not (state_file.exists() and prediction_file.exists()):
            return
        state = read_json(state_file, str(state_file))
        try:
            prediction = read_json(prediction_file, str(prediction_file))
            self.predicted = prediction["lambda_star"]
            self.bracket = bracket_of(config.search, prediction, state)
        except (KeyError, TypeError, AttributeError):
            raise ListopdError(f"{state_file}: not the state of a search") from None
        outcomes = self.bracket.outcomes.items()
        self._collapsed = {key for key, outcome in outcomes if outcome.kind == "collapsed"}
        self.done = len(outcomes)

    def _state_of(self, trial: RunView) -> State:
        is_over = (trial.config.lam, trial.config.seed) in self._collapsed
        is_over = is_over or (trial.directory / "stopped.json").exists()
        return "stopped" if is_over and not trial.is_held else trial.state

    def ended(self, name: str) -> float:
        """When a trial was last heard of."""
        return self._ended.get(name) or self.trials[name].changed

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.states.values())

    @property
    def state(self) -> State:
        if self._is_finished:
            return "finished"
        under_way: tuple[State, ...] = ("running", "silent")
        for state in under_way:
            if self.counts[state]:
                return state
        waits = self._is_held or self._clock() - self._changed() < JOB_PATIENCE_S
        return "running" if waits else "interrupted"

    @property
    def elapsed_s(self) -> float:
        """Of this sitting."""
        end = self._clock() if self.state in ("running", "silent") else self._changed()
        return max(0.0, end - _changed(self.directory / "config.yaml"))

    @property
    def left_s(self) -> float | None:
        """As long as the finished trials took, for those to come; None where it is not known."""
        seconds = [summary["seconds"] for summary in self.summaries.values()]
        if self.total is None or not seconds:
            return None
        running = [t.left_s for name, t in self.trials.items() if self.states[name] == "running"]
        missing = self.total - self.done - len(running)
        left = [fmean(seconds) if own is None else own for own in running]
        config = self.config
        slots = config.study.slots if isinstance(config, StudyConfig) else config.search.slots
        return (sum(left) + max(0, missing) * fmean(seconds)) / slots

    def _changed(self) -> float:
        files = [self.directory, *self.directory.iterdir(), *self.directory.glob("trials/*")]
        return max(map(_changed, files))


def open_view(directory: Path, clock: Callable[[], float] = time.time) -> RunView | JobView:
    """Raises ListopdError where there is neither a run nor a study nor a search."""
    if not directory.is_dir():
        raise ListopdError(f"{directory}: no such directory")
    file = directory / "config.yaml"
    if not file.exists():
        raise ListopdError(f"{directory}: not a run, a study or a search: no config.yaml")
    load_config(Config, [str(file)])  # whose errors are one line
    sections = OmegaConf.load(file)
    if "study" in sections:
        return JobView(directory, load_config(StudyConfig, [str(file)]), clock)
    if "search" in sections:
        return JobView(directory, load_config(SearchConfig, [str(file)]), clock)
    return RunView(directory, clock)


def _trial_summary(file: Path) -> dict[str, Any]:
    """What is shown of a finished trial."""
    summary = read_json(file, str(file))
    try:
        known = {key: summary[key] for key in ("lam", "seed", "num_steps", "seconds")}
        return known | {"parse_rate": summary["student"]["parse_rate"]}
    except (KeyError, TypeError):
        raise ListopdError(f"{file}: not what a run writes") from None


def num_trials(search: SearchSection) -> int:
    """Of a search over a space: every point of its grid `num_samples` times."""
    grids = [spec.get("grid_search", [None]) for spec in search.space.values()]
    return search.num_samples * math.prod(map(len, grids))


def is_held(directory: Path) -> bool:
    """Whether a process holds the lock of `directory`; one that wants it meanwhile tries again."""
    try:
        with (directory / ".lock").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _changed(file: Path) -> float:
    """s since the epoch; 0 where there is no file."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
