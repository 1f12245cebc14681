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
    root: Path, step: int, learner: Saves, state: dict[str, Any], *, keep: int
) -> None:
    """Write learner and `state` (JSON) after `step` updates; keep the newest `keep`."""
    target = root / f"step-{step:06d}"
    partial = root / f"{target.name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    learner.save(partial)
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in _complete(root)[:-keep]:
        shutil.rmtree(old)


def restore_latest(root: Path, learner: Saves) -> dict[str, Any] | None:
    """Put the newest checkpoint into `learner`; its state, or None where there is none."""
    complete = _complete(root)
    if not complete:
        return None
    learner.restore(complete[-1])
    return json.loads((complete[-1] / "state.json").read_text())


def _complete(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.suffix != ".tmp")
