"""Which sample went into which update: every one once, none that is unfit.

{"incarnation": 2, "from": 40}      a learner begins with the state after update 40: what
                                    others put into later updates is void
{"update": 41, "incarnation": 2, "samples": [{"version": 40, "attempt": 0, "ids": [["p7", 0], …]}],
 "dropped": [["p9", 1, "teacher"]]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from listopd_ray.roles.rollout import Generated
from listopd_ray.roles.teacher import Scored
from listopd_ray.tracking import append_rows, read_jsonl, truncate
from listopd_ray.types import ListopdError, ScoredRollout


class Ledger:
    """Kept in `file`, which only grows."""

    def __init__(self, file: Path) -> None:
        self._file = file
        truncate(file, lambda row: True)  # of what a crash cut short
        self._incarnation = max((row["incarnation"] for row in read_jsonl(file)), default=0)

    def begin(self, step: int) -> None:
        """A learner starts from the state after `step` updates."""
        self._incarnation += 1
        append_rows(self._file, [{"incarnation": self._incarnation, "from": step}])

    def commit(
        self, update: int, generated: Sequence[Generated], dropped: Sequence[tuple[str, int, str]]
    ) -> None:
        """The samples that were drawn for the `update` (from 1 on), which is done."""
        unfit = {(prompt, index) for prompt, index, _ in dropped}
        samples = []
        for part in generated:
            keys = [(r.prompt.id, r.sample_index) for r in part.rollouts]
            ids = [list(key) for key in keys if key not in unfit]
            version = part.rollouts[0].policy_version
            samples.append({"version": version, "attempt": part.attempt, "ids": ids})
        row = {"update": update, "incarnation": self._incarnation, "samples": samples}
        append_rows(self._file, [row | {"dropped": [list(key) for key in dropped]}])


def committed(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The row of each update that counts, of a ledger's rows.

    Raises ListopdError for an update that is missing or counts twice, for a sample that comes twice
    in one, and for a row of a learner that had been replaced.
    """
    updates: dict[int, dict[str, Any]] = {}
    incarnation = 0
    for row in rows:
        if "from" in row:
            if row["incarnation"] != incarnation + 1 or row["from"] > len(updates):
                raise ListopdError(f"ledger: learner {row['incarnation']} follows {incarnation}")
            incarnation = row["incarnation"]
            updates = {n: kept for n, kept in updates.items() if n <= row["from"]}
            continue
        if row["incarnation"] != incarnation:
            raise ListopdError(f"ledger: update {row['update']}: of a learner that was replaced")
        if row["update"] != len(updates) + 1:
            raise ListopdError(f"ledger: update {row['update']} follows {len(updates)}")
        ids = [tuple(key) for part in row["samples"] for key in part["ids"]]
        ids += [tuple(key[:2]) for key in row["dropped"]]
        if len(set(ids)) < len(ids):
            raise ListopdError(f"ledger: update {row['update']}: a sample comes twice")
        updates[row["update"]] = row
    return updates


def admit(
    generated: Sequence[Generated], scored: Sequence[Scored], version: int, max_staleness: int
) -> tuple[list[Scored], list[tuple[str, int, str]]]:
    """What may go into the next update of a learner at `version`; and what may not: (prompt id,
    sample index, reason)."""
    fit, dropped = list[Scored](), list[tuple[str, int, str]]()
    has_base = any(s.base_logprobs is not None for part in scored for s in part.rollouts)
    keys = [(r.prompt.id, r.sample_index) for part in generated for r in part.rollouts]
    returned = {
        (s.rollout.prompt.id, s.rollout.sample_index) for part in scored for s in part.rollouts
    }
    dropped += [(*key, "missing") for key in keys if key not in returned]
    for part in scored:
        reasons = [_unfit(s, version, max_staleness, has_base) for s in part.rollouts]
        if not any(reasons):
            fit.append(part)
            continue
        pairs = list(zip(part.rollouts, reasons, strict=True))
        kept = tuple(rollout for rollout, reason in pairs if reason is None)
        if kept:
            fit.append(replace(part, rollouts=kept))
        for scored_rollout, reason in pairs:
            rollout = scored_rollout.rollout
            if reason is not None:
                dropped.append((rollout.prompt.id, rollout.sample_index, reason))
    return fit, dropped


def _unfit(scored: ScoredRollout, version: int, max_staleness: int, has_base: bool) -> str | None:
    rollout = scored.rollout
    if not 0 <= version - rollout.policy_version <= max_staleness:
        return "version"
    columns: tuple[tuple[str, np.ndarray | None], ...] = (
        ("sampler", rollout.sampler_logprobs),
        ("teacher", scored.teacher_logprobs),
        ("teacher", scored.teacher_modal_logprobs),
    )
    if has_base:
        base = (scored.base_logprobs, scored.base_modal_logprobs)
        columns += tuple(("base", logprobs) for logprobs in base)
    for owner, logprobs in columns:
        if logprobs is None or len(logprobs) != len(rollout.token_ids):
            return owner
        if not np.isfinite(logprobs).all():
            return owner
    return None
