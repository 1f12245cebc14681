"""Where the time of a run goes: a trace that ui.perfetto.dev and chrome://tracing open.

Its rows are the driver, with the stages of the main loop, and every actor of the run, with the
calls that Ray has recorded of it. All times are by the machines' wall clocks, since Ray's are: rows
of machines whose clocks disagree are shifted against each other by as much.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from listopd_ray.tracking import replace_file

PROCESS = 1  # all rows belong to one
DRIVER_ROW = "driver"
ACTOR_ID_DIGITS = 32  # the end of a task's id, in hexadecimal, is its actor's
_NOTHING: AbstractContextManager[None] = nullcontext()


class Trace:
    """The driver's stages: events of the trace, in the order in which they ended."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self.begin_ns = time.time_ns()  # all times are counted from here
        self.stages: list[dict[str, Any]] = []

    def span(self, name: str, **details: Any) -> AbstractContextManager[None]:
        """A context manager: what the block takes, however it ends. Nested blocks are nested."""
        return self._record(name, details) if self._enabled else _NOTHING

    @contextmanager
    def _record(self, name: str, details: dict[str, Any]) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.stages.append(_block(DRIVER_ROW, name, start, self._now() - start, details))

    def _now(self) -> float:
        return (time.time_ns() - self.begin_ns) / 1e3


def write_trace(
    file: Path,
    run: str,
    trace: Trace,
    timeline: Sequence[Mapping[str, Any]],
    actors: Mapping[str, str],
) -> None:
    """`timeline`: what `ray.timeline` returns; `actors`: names of rows by the actors' ids."""
    blocks = [*trace.stages, *actor_blocks(timeline, actors, trace.begin_ns / 1e3)]
    blocks.sort(key=lambda block: (block["ts"], -block["dur"]))  # one before those in it
    rows = [DRIVER_ROW, *sorted({block["tid"] for block in blocks} - {DRIVER_ROW})]
    numbers = {row: number for number, row in enumerate(rows, start=1)}
    names = [_name("process_name", 0, name=run)]
    for row, number in numbers.items():
        names.append(_name("thread_name", number, name=row))
        names.append(_name("thread_sort_index", number, sort_index=number))
    events = [*names, *({**block, "tid": numbers[block["tid"]]} for block in blocks)]
    replace_file(file, json.dumps({"displayTimeUnit": "ms", "traceEvents": events}))


def actor_blocks(
    timeline: Sequence[Mapping[str, Any]], actors: Mapping[str, str], begin: float
) -> list[dict[str, Any]]:
    """What Ray recorded of these actors since `begin`: their calls, and the phases of each.

    A call says which task it is, and thereby which actor's; its phases only in which process.
    """
    rows: dict[str, str] = {}  # by process
    for event in timeline:
        actor = event["args"].get("task_id", "")[-ACTOR_ID_DIGITS:]
        if actor in actors:
            rows[event["tid"]] = actors[actor]
    return [
        _block(rows[e["tid"]], e["name"].removeprefix("task:"), e["ts"] - begin, e["dur"], {})
        for e in timeline
        if e["tid"] in rows and e["ts"] >= begin
    ]


def _block(
    row: str, name: str, start: float, duration: float, details: dict[str, Any]
) -> dict[str, Any]:
    """A complete event; times in µs, to the ns."""
    when = {"ts": round(start, 3), "dur": round(duration, 3)}
    return {"ph": "X", "pid": PROCESS, "tid": row, "name": name, **when, "args": details}


def _name(kind: str, number: int, **details: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": PROCESS, "tid": number, "name": kind, "args": details}
