"""Ray's record of what every actor did, for the trace of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import ray
from tqdm import tqdm

from listopd_ray.config import Config, run_directory
from listopd_ray.trace import Trace, write_trace
from listopd_ray.types import ListopdError, last_line


class Role(Protocol):
    def members(self) -> list[tuple[str, Any]]: ...


@contextmanager
def traced(config: Config, roles: Sequence[Role]) -> Iterator[Trace]:
    """With `config.trace` the block's trace is written to trace.json however the block ends: one
    of this sitting, in the place of any before. A trace that fails does not fail the run."""
    trace = Trace(config.trace)
    try:
        yield trace
    finally:
        if config.trace:
            actors = {a._actor_id.hex(): name for role in roles for name, a in role.members()}
            file = run_directory(config) / "trace.json"
            try:
                write_trace(file, config.name, trace, _timeline(), actors)
            except ListopdError as error:
                tqdm.write(f"{config.name}: no trace: {error}", file=sys.stderr)


def _timeline() -> list[dict[str, Any]]:
    """Of the whole cluster. Ray keeps the newest 100,000 tasks, and gets them from the actors once
    a second: what a killed one did last is missing."""
    try:
        return ray.timeline()
    except (RuntimeError, ray.exceptions.RayError) as error:  # it may ask the dashboard
        raise ListopdError(f"Ray's timeline: {last_line(error)}") from error
