"""A run's directory: resolved config, metrics, samples, summary – and the same numbers in W&B."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from listopd_ray.checkpoint import Checkpoints, Saves, sync, writing
from listopd_ray.config import Config, dump_config, load_config, resolved, run_directory
from listopd_ray.types import ListopdError
from listopd_ray.wandb_run import WandbRun

STAGES = ("generate", "score", "learn", "sync")  # of an update: time/<stage>_s
TIMING = ("time/", "perf/", "fault/")  # the only metrics in which two equal runs may differ
# Keys that may differ from sitting to sitting: where a run runs, and what is watched of it.
MAY_DIFFER = re.compile(
    r"^(tracking\.|autoscaling_wait_s$|trace$|learner\.(num_ranks|sharding)$)"
    r"|\.(num_cpus|num_gpus)$|\.labels(\.|$)"
)
LOCK_WAIT_S = 20.0  # the actors of a driver that was killed live on for some seconds


def check_startable(config: Config) -> None:
    """Raises ListopdError where the run is finished or was begun with another configuration."""
    directory = run_directory(config)
    if (directory / "summary.json").exists():
        raise ListopdError(f"{directory}: this run is finished; give another name=… or remove it")
    if (directory / "config.yaml").exists():
        check_unchanged(config)
    check_writable(directory)
    path = config.checkpoint.path
    if path:
        Checkpoints(path, config.checkpoint.keep)
        if "://" not in path:
            check_writable(Path(path))


def check_writable(directory: Path) -> None:
    """Raises ListopdError where `directory` can be neither written to nor made."""
    parent = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ListopdError(f"{directory}: {parent} is not a directory that can be written to")


class Run:
    """Opens `<out>/<name>`, new or interrupted, and writes everything that belongs into it.

    `hashes` are those of data and models; all `reports` are given every row of metrics too.
    Raises ListopdError as `check_startable` does, where a continued run was begun on other data or
    models, and where the directory cannot be written.
    """

    def __init__(
        self,
        config: Config,
        hashes: dict[str, str],
        *reports: Callable[[dict[str, float]], None],
    ) -> None:
        check_startable(config)
        self._lock = ExitStack()
        self._reports = reports
        self.directory = run_directory(config)
        self._config = config
        self._owner = {**_identity(config), **hashes}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(lock_directory(self.directory))
            check_startable(config)  # whoever held the lock may have finished the run
            inputs = self.directory / "inputs.json"
            if inputs.exists():
                before = read_json(inputs, str(inputs))
                if not isinstance(before, dict):
                    raise ListopdError(f"{inputs}: not what this writes")
                check_same(f"{self.directory}: begun on other data or models", before, hashes)
            replace_file(inputs, json.dumps(hashes, indent=2) + "\n")
            replace_file(self.directory / "config.yaml", dump_config(config))
        except OSError as error:
            raise ListopdError(f"{self.directory}: cannot write: {error.strerror}") from None
        path = config.checkpoint.path
        root = f"{path.rstrip('/')}/{config.name}" if path else str(self.directory / "checkpoints")
        self._root, self._checkpoints = root, Checkpoints(root, config.checkpoint.keep)
        self._num_tokens = 0.0  # sampled for all updates so far
        is_sent = config.tracking.wandb
        self._wandb = WandbRun(config, self.directory, self._owner) if is_sent else None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if self._wandb is not None:
                self._wandb.close(0 if kind is None else 1)
        finally:
            self._lock.close()

    def restore(self, learner: Saves) -> dict[str, Any] | None:
        """State of the newest checkpoint, put into `learner`; what was logged later is cut, but for
        roll-backs."""
        state = self._checkpoints.restore(learner)
        if self._wandb is not None:
            self._wandb.forget_update()
        if state is not None:
            self._check_owner(state["run"])
        last_step = state["step"] if state else -1
        if state and state["unfinished"]:
            last_step -= 1  # its row is still to come
        for name in ("metrics.jsonl", "samples.jsonl"):
            truncate(self.directory / name, lambda row: row["train/step"] <= last_step)
        done = state["step"] if state else -1
        truncate(self.directory / "updates.jsonl", lambda row: row["train/step"] <= done)
        truncate(
            self.directory / "events.jsonl",
            lambda event: event["action"] == "rollback" or event["step"] <= last_step,
        )
        rows = read_jsonl(self.directory / "metrics.jsonl")
        self._num_tokens = sum(row.get("rollout/tokens", 0.0) for row in rows)
        if len(rows) != last_step + 1:
            raise ListopdError(
                f"{self.directory}: metrics.jsonl is not that of the checkpoint after update "
                f"{state['step'] if state else 0} in {self._root}"
            )
        return state

    def save(self, step: int, learner: Saves, state: dict[str, Any], **marks: Any) -> None:
        """As `Checkpoints.save`; what was logged so far is on the disk before."""
        for file in self.directory.glob("*.jsonl"):
            sync(str(file))
        self._checkpoints.save(step, learner, {**state, "run": self._owner}, **marks)

    def mark_healthy(self, step: int) -> None:
        """If there is a checkpoint after `step` updates."""
        self._checkpoints.mark_healthy(step)

    def _check_owner(self, before: dict[str, Any]) -> None:
        """Others may have written to `checkpoint.path` under the same name."""
        now = json.loads(json.dumps(self._owner))
        before = {key: value for key, value in before.items() if key in now}  # of older versions
        now = {key: value for key, value in now.items() if key in before}
        check_same(f"{self._root}: checkpoints of another run", before, now)

    def roll_back(self, learner: Saves) -> dict[str, Any]:
        """`restore` once a roll-back is recorded: from the newest checkpoint that was healthy."""
        state = self.restore(learner)
        assert state is not None  # the one before the first update is healthy
        if self._wandb is not None:
            self._wandb.roll_back(state["step"])
        return state

    def record(self, event: dict[str, Any]) -> str:
        """Write an alarm to events.jsonl and standard error; its action. Raises on `stop`.

        A roll-back removes the unhealthy checkpoints before it counts: a process that ends in
        between is resumed from the healthy one, and comes to the same alarm.
        """
        if event["action"] == "rollback":
            self._checkpoints.drop_unhealthy()
        file = self.directory / "events.jsonl"
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        replace_file(file, before + json.dumps(event, ensure_ascii=False) + "\n")
        line = f"{self._config.name}: update {event['step']}: alarm: {event['reason']}"
        if event["action"] == "stop":
            raise ListopdError(f"{line}; stopped at λ = {event['lam']:.3g}")
        tqdm.write(f"{line}; {event['action']}", file=sys.stderr)
        return event["action"]

    def num_rollbacks(self) -> int:
        """How many this run has behind it."""
        file = self.directory / "events.jsonl"
        return sum(event["action"] == "rollback" for event in read_jsonl(file))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics after `step` updates: a line of metrics.jsonl and a W&B row."""
        self._num_tokens += metrics.get("rollout/tokens", 0.0)
        row = {"train/step": step, "train/tokens": self._num_tokens, **metrics}
        append_rows(self.directory / "metrics.jsonl", [row])
        if self._wandb is not None:
            self._wandb.log(row)
        for report in self._reports:
            report(row)

    def keep_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Outputs of an evaluation."""
        append_rows(self.directory / "samples.jsonl", [{"train/step": step, **r} for r in rows])

    def keep_update(self, step: int, inspection: dict[str, Any]) -> None:
        """A closer look at an update: a line of updates.jsonl; tables and histograms in W&B."""
        row = {"train/step": step, **inspection}
        append_rows(self.directory / "updates.jsonl", [row])
        if self._wandb is not None:
            self._wandb.keep_update(row)

    def final_numbers(self, student: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What runs are sorted by, under one roof. λ is its mean over the updates; λ* is measured
        at the first of them, on samples of the warm start (None where no base was loaded, or where
        teacher and warm start give none)."""
        rows = read_jsonl(self.directory / "metrics.jsonl")
        lam = fmean(row["train/lam"] for row in rows if "train/lam" in row)
        star = next((row["cliff/lambda_star"] for row in rows if "cliff/lambda_star" in row), None)
        return {
            **{name: student[name] for name in ("parse_rate", "ndcg_at_1", "ndcg_at_k_all")},
            "lam": lam,
            "lambda_star": star,
            "lam_over_lambda_star": lam / star if star else None,
            "tokens": self._num_tokens,
            "seconds": seconds,
        }

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json: with it the run counts as finished."""
        replace_file(self.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
        if self._wandb is not None:
            self._wandb.finish(summary)


def kept_json(file: Path, make: Callable[[], Any]) -> Any:
    """The content of `file`; where it is not there it is made, and written first."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(make()))
    return json.loads(file.read_text(encoding="utf-8"))


def progress_bar(
    what: str, total: int, initial: int = 0, unit: str = "update", delay: float = 0.0
) -> tqdm:
    """Units done, with rate and time left, once it has taken `delay` s; sparing with lines where
    nobody watches."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    options: dict[str, Any] = dict(initial=initial, unit=unit, unit_scale=unit == "B", delay=delay)
    options["nrows"] = 24  # tqdm hides a bar on a terminal that does not tell its height
    return tqdm(desc=what, total=total, mininterval=interval, **options)


def evaluation_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """The numbers of a summary object as metrics: `eval/parse_rate`, `eval/greedy/parse_rate`, …"""
    flat = {}
    for prefix, part in (("eval", evaluation), ("eval/greedy", evaluation["greedy"])):
        for name, value in part.items():
            if isinstance(value, float):
                flat[f"{prefix}/{name}"] = value
    return flat


def check_unchanged(config: Config, but_for: Sequence[str] = ()) -> None:
    """Raises ListopdError, with the keys, where the run was begun with another configuration; keys
    of `but_for` may differ."""
    file = run_directory(config) / "config.yaml"
    before, now = _identity(load_config(type(config), [str(file)])), _identity(config)
    before, now = ({k: v for k, v in flat.items() if k not in but_for} for flat in (before, now))
    check_same(f"{file.parent}: begun with another configuration", before, now)


def _identity(config: Config) -> dict[str, Any]:
    """Every key but those that may differ: a run may go on on another cluster, or be watched."""
    flat = flatten(resolved(config))
    return {key: value for key, value in flat.items() if not MAY_DIFFER.search(key)}


def check_same(what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ListopdError, begun with `what`, with the keys that differ or that one lacks."""
    none = "none"
    changed = [key for key in {**before, **now} if before.get(key, none) != now.get(key, none)]
    if changed:
        pairs = [f"{key} ({before.get(key, none)} → {now.get(key, none)})" for key in changed]
        raise ListopdError(f"{what}: {', '.join(pairs)}")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Held at most as long as the process lives; raises ListopdError where another one has it."""
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise ListopdError(f"{directory}: another process is writing here") from None
    try:
        yield
    finally:
        lock.release()


def append_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with writing(str(file)), file.open("a", encoding="utf-8") as stream:
        stream.writelines(map(_line, rows))


def truncate(file: Path, keeps: Callable[[Any], bool]) -> None:
    """Drop the rows that are not to be kept, and a last one that a crash cut short."""
    if file.exists():
        replace_file(file, "".join(_line(row) for row in read_jsonl(file) if keeps(row)))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_json(file: Path, what: str) -> Any:
    """The content of `file`; raises ListopdError, begun with `what`, where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ListopdError(f"{what}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ListopdError(f"{what}: not JSON") from None


def read_jsonl(file: Path) -> list[Any]:
    """Its rows, less one that a crash cut short; none where there is no file."""
    if not file.exists():
        return []
    try:
        *whole, _ = file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole]
    except OSError as error:
        raise ListopdError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ListopdError(f"{file}: not JSON lines") from None


def replace_file(file: Path, text: str) -> None:
    """Write `file` whole or not at all; raises ListopdError where that fails."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # trials may share a cache
    with writing(str(file)):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
