"""Checkpoints of a run: `checkpoints/step-000040/`, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

HEALTHY = "healthy"  # the empty file that marks such a checkpoint


class Saves(Protocol):
    def save(self, directory: Path) -> None: ...

    def restore(self, directory: Path) -> None: ...


def save_checkpoint(
    root: Path, step: int, learner: Saves, state: dict[str, Any], *, keep: int, healthy: bool
) -> None:
    """Write learner and `state` (JSON) after `step` updates.

    Keeps the newest `keep`, and the newest healthy one to roll back to.
    """
    target = _path(root, step)
    partial = root / f"{target.name}.tmp"
    for remains in root.glob("step-*.tmp"):
        shutil.rmtree(remains)
    partial.mkdir(parents=True)
    learner.save(partial)
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2))
    if healthy:
        (partial / HEALTHY).touch()
    if target.exists():
        _remove(target)
    os.replace(partial, target)
    complete = _complete(root)
    healthy_ones = [path for path in complete if (path / HEALTHY).exists()]
    for old in complete[:-keep]:
        if old not in healthy_ones[-1:]:
            _remove(old)


def mark_healthy(root: Path, step: int) -> None:
    """The checkpoint after `step` updates, if there is one, is good to roll back to."""
    if _path(root, step).exists():
        (_path(root, step) / HEALTHY).touch()


def restore_latest(root: Path, learner: Saves) -> dict[str, Any] | None:
    """Put the newest checkpoint into `learner`; its state, or None where there is none."""
    complete = _complete(root)
    if not complete:
        return None
    learner.restore(complete[-1])
    return json.loads((complete[-1] / "state.json").read_text())


def drop_unhealthy(root: Path) -> None:
    """Remove the checkpoints after the newest healthy one; all stay where none is healthy."""
    complete = _complete(root)
    healthy = [path for path in complete if (path / HEALTHY).exists()]
    later = complete[complete.index(healthy[-1]) + 1 :] if healthy else []
    for path in reversed(later):  # the newest of those left is always one that was reached
        _remove(path)


def _remove(checkpoint: Path) -> None:
    """All at once, as `_complete` sees it."""
    remains = checkpoint.with_name(f"{checkpoint.name}.old.tmp")
    os.replace(checkpoint, remains)
    shutil.rmtree(remains)


def _path(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def _complete(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.suffix != ".tmp")
