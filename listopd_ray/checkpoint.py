"""Checkpoints of a run: `checkpoints/step-000040/`, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol


class Saves(Protocol):
    def save(self, directory: Path) -> None: ...

    def restore(self, directory: Path) -> None: ...


def save_checkpoint(
    root: Path, step: int, learner: Saves, state: dict[str, Any], *, keep: int, healthy: bool
) -> None:
    """Write learner and `state` (JSON) after `step` updates.

    Keeps the newest `keep`, and the newest healthy one to roll back to.
    """
    target = root / f"step-{step:06d}"
    partial = root / f"{target.name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    learner.save(partial)
    content = {"step": step, "healthy": healthy, **state}
    (partial / "state.json").write_text(json.dumps(content, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    complete = _complete(root)
    healthy_ones = [path for path in complete if _state(path)["healthy"]]
    for old in complete[:-keep]:
        if old not in healthy_ones[-1:]:
            shutil.rmtree(old)


def restore_latest(root: Path, learner: Saves) -> dict[str, Any] | None:
    """Put the newest checkpoint into `learner`; its state, or None where there is none."""
    complete = _complete(root)
    if not complete:
        return None
    learner.restore(complete[-1])
    return _state(complete[-1])


def drop_unhealthy(root: Path) -> None:
    """Remove the checkpoints after the newest healthy one; all stay where none is healthy."""
    complete = _complete(root)
    healthy = [path for path in complete if _state(path)["healthy"]]
    for path in complete[complete.index(healthy[-1]) + 1 :] if healthy else ():
        shutil.rmtree(path)


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def _complete(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.suffix != ".tmp")
