"""The teacher actors as one, for the driver: which of them scores what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from listopd_ray.model_files import ModelFiles, model_files
from listopd_ray.roles.rollout import Generated, Request
from listopd_ray.roles.teacher import Scored
from listopd_ray.team import Team, Work
from listopd_ray.types import Rollout, ScoredRollout


@dataclass(frozen=True)
class Scoring:
    """A part that is being scored, perhaps in pieces by several actors."""

    pieces: list[tuple[Work, list[int]]]  # and which of the part's rollouts are in each
    num_rollouts: int


class TeacherPool:
    """The teacher actors as one: replicas of the default teacher, then of each further one."""

    def __init__(
        self, team: Team, names: Sequence[str | None], base: ModelFiles | None = None
    ) -> None:
        """`names`: of each actor's teacher; None: the default."""
        self._team = team
        self._names = list(names)
        self._base = base
        self._busy: list[tuple[Work, int]] = []  # with how many tokens; some are done by now

    def with_base(self, base_path: Path | None) -> TeacherPool:
        """The same actors, for a run with this base (None: none)."""
        return TeacherPool(self._team, self._names, model_files(base_path) if base_path else None)

    def members(self) -> list[tuple[str, Any]]:
        """As `Team.members`."""
        return self._team.members()

    def score(self, generated: Sequence[Generated]) -> list[Scoring]:
        """Start scoring each part by the teachers that its prompts name, on the actors with the
        fewest tokens to score; what is more than one actor's share is cut.

        Parts may come one call at a time, as they are sampled, and be fetched together.
        """
        routed = [_by_teacher(part.rollouts) for part in generated]
        totals: Counter[str | None] = Counter()
        for part, groups in zip(generated, routed, strict=True):
            for name, chosen in groups.items():
                totals[name] += sum(_num_tokens(part.rollouts[index]) for index in chosen)
        load = self._load()
        scorings = []
        for part, groups in zip(generated, routed, strict=True):
            pieces = []
            for name, chosen in groups.items():
                replicas = [index for index, own in enumerate(self._names) if own == name]
                lengths = [_num_tokens(part.rollouts[index]) for index in chosen]
                count = round(len(replicas) * sum(lengths) / totals[name])
                for low, high in pairwise(cuts(lengths, count)):
                    index = min(replicas, key=lambda replica: (load[replica], replica))
                    load[index] += sum(lengths[low:high])
                    work = self._start(index, part, chosen[low:high])
                    self._busy.append((work, sum(lengths[low:high])))
                    pieces.append((work, chosen[low:high]))
            scorings.append(Scoring(pieces, len(part.rollouts)))
        return scorings

    def fetch(self, scorings: Sequence[Scoring]) -> list[Scored]:
        """Wait for what `score` started, each part whole and in order; what an actor that died had
        not finished is made again."""
        pieces = [work for scoring in scorings for work, _ in scoring.pieces]
        results = iter(self._team.results(pieces))
        fetched = []
        for scoring in scorings:
            rollouts: dict[int, ScoredRollout] = {}
            seconds = 0.0
            for _, chosen in scoring.pieces:
                scored = next(results)
                rollouts.update(zip(chosen, scored.rollouts, strict=True))
                seconds = max(seconds, scored.seconds)
            ordered = tuple(rollouts[index] for index in range(scoring.num_rollouts))
            fetched.append(Scored(rollouts=ordered, seconds=seconds))
        return fetched

    def score_with(self, model_path: Path, generated: Sequence[Generated]) -> list[Scored]:
        """Scores by every actor with another checkpoint in the teacher's place."""
        model = model_files(model_path)

        def start(index: int, part: Generated) -> Work:
            return self._team.start(index, lambda a, _: a.score_with.remote(model, part))

        indices = range(len(self._team.actors))
        return self._team.results([start(index, part) for index in indices for part in generated])

    def generate(
        self, requests: list[Request], max_new_tokens: int, greedy: bool = False
    ) -> Generated:
        """Completions by the default teacher."""
        arguments = (requests, max_new_tokens, greedy)
        work = self._team.start(0, lambda a, _: a.generate.remote(*arguments))
        (generated,) = self._team.results([work])
        return generated

    def _start(self, index: int, part: Generated, chosen: list[int]) -> Work:
        piece, base = part, self._base
        if len(chosen) < len(part.rollouts):
            piece = replace(part, rollouts=tuple(part.rollouts[place] for place in chosen))
        return self._team.start(index, lambda a, _: a.score.remote(piece, base))

    def _load(self) -> list[int]:
        """Tokens that each actor has still to score."""
        if self._busy:
            done = self._team.ready([work for work, _ in self._busy], block=False)
            self._busy = [pair for n, pair in enumerate(self._busy) if n not in done]
        load = [0] * len(self._names)
        for work, num_tokens in self._busy:
            load[work.index] += num_tokens
        return load


def _by_teacher(rollouts: Sequence[Rollout]) -> dict[str | None, list[int]]:
    """Which of the rollouts each teacher scores."""
    groups: dict[str | None, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.prompt.teacher, []).append(index)
    return groups


def _num_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + len(rollout.token_ids)


def cuts(lengths: Sequence[int], count: int) -> list[int]:
    """Bounds of at most `count` runs of about as many tokens, none of them empty."""
    ends = np.cumsum(lengths)
    runs = (ends - np.array(lengths) / 2) * max(1, count) // ends[-1]  # by the middle of each
    return [0, *(np.flatnonzero(np.diff(runs)) + 1).tolist(), len(lengths)]
