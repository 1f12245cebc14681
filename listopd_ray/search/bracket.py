"""Which λ and seed to run next, and the bracket so far: the search without Ray.

λ lies on the grid 1, 1 + resolution, 1 + 2·resolution, … or half-way, and is known here by its
place, in half steps from 1. The search asks for a few λ at a time and goes on when all of them are
decided, so that it takes the same course whatever order trials end in, and after a restart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from listopd_ray.cliff.calibration import FLOOR_SHARE
from listopd_ray.job_config import SearchSection
from listopd_ray.search.judgement import Outcome, Verdict, judge, rate

HALVES = 2  # places a step


@dataclass(frozen=True)
class Job:
    """A trial to run; `full`: to the full budget, even if it collapses."""

    lam: float
    seed: int
    full: bool


class Bracket:
    """Asks for trials with `next_job`, is told with `record` and `fail`; `done` in the end.

    `start` is the interval in which the onset is predicted. `state` continues an earlier search.
    """

    def __init__(
        self,
        *,
        start: tuple[float, float],
        seeds: Sequence[int],
        resolution: float,
        max_lam: float,
        error: float,
        margin: float,
        slots: int,
        attempts: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._seeds = tuple(seeds)
        self._resolution = resolution
        self._error = error
        self._margin = margin
        self._attempts = attempts
        # A verdict takes more than half of the seeds: slots beyond that go to another λ.
        self._lams_at_once = max(1, slots // (len(seeds) // 2 + 1))
        self._top = HALVES * math.floor((max_lam - 1) / resolution + 1e-9)
        low = HALVES * math.floor((start[0] - 1) / resolution + 1e-9)
        high = HALVES * math.ceil((start[1] - 1) / resolution - 1e-9)
        self._first_low = min(max(low, 0), self._top - HALVES)
        self._first_high = min(max(high, self._first_low + HALVES), self._top)
        self.asked: list[float] = list(state["asked"]) if state else []
        outcomes = [Outcome(**trial) for trial in state["trials"]] if state else []
        self.outcomes = {(o.lam, o.seed): o for o in outcomes}  # in the order they first ended
        failed = state["failed"] if state else []
        self._failed = Counter({(lam, seed): updates for lam, seed, updates in failed})
        self._failures: Counter[tuple[float, int]] = Counter()
        self._running: set[tuple[float, int]] = set()

    def state(self) -> dict[str, Any]:
        """All that a restarted search needs, as JSON."""
        trials = [asdict(outcome) for outcome in self.outcomes.values()]
        failed = [[*key, updates] for key, updates in self._failed.items()]
        return {"asked": self.asked, "trials": trials, "failed": failed}

    def next_job(self) -> Job | None:
        """A trial to start now. None: at an end, or to be asked again once a trial has ended."""
        job = None if self.given_up or self.blind else self._next_job()
        if job is not None:
            self._running.add((job.lam, job.seed))
        return job

    def record(self, outcome: Outcome) -> None:
        """What became of a trial. What it spent before is added; it has spent no less than it has
        behind it, some perhaps in a sitting of which no more is known."""
        key = (outcome.lam, outcome.seed)
        self._running.discard(key)
        before = self.outcomes.get(key)
        spent = outcome.updates + (before.updates if before is not None else 0)
        self.outcomes[key] = replace(outcome, updates=max(spent, outcome.step - self._failed[key]))

    def fail(self, lam: float, seed: int, updates: int = 0) -> None:
        """A trial ended without a result, after so many updates: it is asked for again."""
        self._running.discard((lam, seed))
        self._failures[lam, seed] += 1
        self._failed[lam, seed] += updates

    @property
    def given_up(self) -> bool:
        """Some trial has failed too often."""
        return any(count >= self._attempts for count in self._failures.values())

    @property
    def blind(self) -> bool:
        """So little parses at λ = 1, or so few outputs were counted, that half of it could be told
        neither from all of it nor from nothing."""
        floor = self._floor()
        for share in (0, 1) if floor else ():
            verdict = judge(
                [replace(o, parsed=share * o.parsed) for o in floor], floor, self._error
            )
            if verdict is None or not self.is_clear(verdict):
                return True
        return False

    @property
    def updates(self) -> int:
        """Spent by all trials, those that failed included."""
        return sum(self._failed.values()) + sum(o.updates for o in self.outcomes.values())

    @property
    def done(self) -> bool:
        """Bracket closed, its ends judged at the full budget, the student made."""
        return bool(self._floor()) and self._next_job() is None and not self._running

    @property
    def low(self) -> float:
        """The largest λ that holds; 1, where the floor is taken, holds by definition."""
        return self._lam(self._ends()[0])

    @property
    def high(self) -> float | None:
        """The smallest λ above `low` that breaks; None: none was found up to `max_lam`."""
        high = self._ends()[1]
        return None if high is None else self._lam(high)

    @property
    def floor(self) -> float | None:
        """Mean strict parse that has to be reached; None before it is measured."""
        floor = self._floor()
        return FLOOR_SHARE * sum(map(rate, floor)) / len(floor) if floor else None

    @property
    def recommended(self) -> float:
        """`low` less a share of its distance from 1."""
        return round(1 + (1 - self._margin) * (self.low - 1), 6)

    @property
    def student_seed(self) -> int:
        """Of the one run at the recommended λ: the seed that parses best at `low`."""
        at_low = {s: self.outcomes.get((self.low, s)) for s in self._seeds}
        return max(at_low, key=lambda s: rate(o) if (o := at_low[s]) else 0.0)

    @property
    def confidence(self) -> float | None:
        """Probability that neither end's verdict is wrong, for these seeds; None without `high`."""
        if self.high is None:
            return None
        ends = [self.verdict(lam) for lam in (self.low, self.high) if lam != 1.0]
        return max(0.0, 1 - sum(verdict.error for verdict in ends if verdict is not None))

    def is_clear(self, verdict: Verdict) -> bool:
        """Whether it may make its λ an end of the bracket."""
        return verdict.error <= self._error

    def verdict(self, lam: float) -> Verdict | None:
        """On a λ that was asked for; None: not decided yet."""
        floor = self._floor()
        if not floor:
            return None
        return judge([self.outcomes.get((lam, s)) for s in self._seeds], floor, self._error)

    def _next_job(self) -> Job | None:
        for seed in self._seeds:
            if self._is_free(1.0, seed, full=True):
                return Job(1.0, seed, full=True)
        undecided = [lam for lam in self.asked if self.verdict(lam) is None]
        if not self._floor():  # being measured: what is certain to be needed need not wait
            undecided = undecided or self._ask(self._first_places())
        elif not undecided:
            undecided = self._ask(self._next_places())
        if undecided:
            return self._job_of(undecided)
        return self._last_job()

    def _job_of(self, lams: Sequence[float]) -> Job | None:
        """The next trial of some undecided λ, seed by seed; none that may turn out superfluous."""
        short = [lam for lam in lams if self._num_running(lam) < self._least(lam, full=False)]
        for seed in self._seeds:
            for lam in short:
                if self._is_free(lam, seed, full=False):
                    return Job(lam, seed, full=False)
        # All seeds have run and yet it is too close to call: what was stopped is run to its end.
        pairs = [(lam, seed) for lam in short for seed in self._seeds]
        return next((Job(*pair, True) for pair in pairs if self._is_free(*pair, full=True)), None)

    def _last_job(self) -> Job | None:
        """The bracket is closed: what its upper end lacks at the full budget, then the student."""
        lam = self.high
        verdict = None if lam is None else self.verdict(lam)
        if lam is not None and verdict is not None and not verdict.full:
            if self._num_running(lam) >= self._least(lam, full=True):
                return None
            return next(Job(lam, s, True) for s in self._seeds if self._is_free(lam, s, full=True))
        if self._is_free(self.recommended, self.student_seed, full=True):
            return Job(self.recommended, self.student_seed, full=True)
        return None

    def _least(self, lam: float, *, full: bool) -> int:
        """How many trials a verdict on λ takes at the least, those that run included: if they all
        parse nothing, or all as at λ = 1."""
        floor = self._floor()
        if not floor:
            return len(self._seeds) // 2 + 1
        seen = [self.outcomes.get((lam, seed)) for seed in self._seeds]
        missing = [n for n, seed in enumerate(self._seeds) if not self._has_run(lam, seed, full)]
        for number in range(1, len(missing)):
            for share in (0, 1):
                guess = list(seen)
                for n in missing[:number]:
                    guess[n] = replace(floor[n], parsed=share * floor[n].parsed)
                verdict = judge(guess, floor, self._error)
                if verdict is not None and (verdict.full or not full):
                    return number
        return max(1, len(missing))

    def _num_running(self, lam: float) -> int:
        return sum(running == lam for running, _ in self._running)

    def _has_run(self, lam: float, seed: int, full: bool) -> bool:
        """To the end, if `full`."""
        outcome = self.outcomes.get((lam, seed))
        return outcome is not None and (outcome.kind == "finished" or not full)

    def _is_free(self, lam: float, seed: int, *, full: bool) -> bool:
        """Neither running nor run."""
        return not self._has_run(lam, seed, full) and (lam, seed) not in self._running

    def _ask(self, places: Sequence[int]) -> list[float]:
        lams = [self._lam(place) for place in places]
        self.asked += lams
        return lams

    def _first_places(self) -> list[int]:
        places = [self._first_low, self._first_high]
        return [place for place in places if place > 0][: self._lams_at_once]

    def _next_places(self) -> list[int]:
        """Where to look next: at the predicted interval's ends; beyond, in growing steps; then
        between what holds and what breaks. Beside what is too close to call. Empty: the bracket is
        closed."""
        judged = {self._place(lam) for lam in self.asked}
        low, high = self._ends()
        unclear = [p for p in judged if low < p < (high or math.inf)]
        if unclear:
            return self._beside(unclear, low, self._top + 1 if high is None else high)
        at_once = self._lams_at_once
        width = self._first_high - self._first_low
        if high is None:
            first = [p for p in (self._first_low, self._first_high) if p > low]
            widened = sum(place > self._first_high for place in judged)
            start = max(low, self._first_high)
            farther = [min(start + step, self._top) for step in _steps(width, widened, at_once)]
            return sorted({*first, *farther} - {low})[:at_once]
        if low == 0 and min(judged) == high:
            widened = sum(place < self._first_low for place in judged)
            farther = [high - step for step in _steps(width, widened, at_once)]
            if below := [place for place in farther if place > 0]:
                return sorted(below)
        steps = math.ceil((high - low) / HALVES)  # either end may lie half-way
        between = {steps * n // (at_once + 1) for n in range(1, at_once + 1)} - {0}
        return [low + HALVES * step for step in sorted(between)]

    def _beside(self, unclear: Sequence[int], low: int, high: int) -> list[int]:
        """Places nearer to `low` and to `high`, in steps that double while they are unclear too."""
        step = 2 ** (len(unclear) - 1)
        below = max(min(unclear) - step, (low + min(unclear)) // 2)
        above = min(max(unclear) + step, (high + max(unclear) + 1) // 2)
        return [place for place in (below, above) if low < place < high and place not in unclear]

    def _ends(self) -> tuple[int, int | None]:
        """Places of the largest λ that clearly holds, and of the smallest above that breaks."""
        verdicts = {self._place(lam): self.verdict(lam) for lam in self.asked}
        clear = {p: v.holds for p, v in verdicts.items() if v and self.is_clear(v)}
        low = max((place for place, holds in clear.items() if holds), default=0)
        broken = [place for place, holds in clear.items() if not holds and place > low]
        return low, min(broken, default=None)

    def _floor(self) -> list[Outcome]:
        """The trials at λ = 1, by seed; empty until all are finished."""
        keys = [(1.0, seed) for seed in self._seeds]
        return [self.outcomes[key] for key in keys] if self.outcomes.keys() >= set(keys) else []

    def _lam(self, place: int) -> float:
        return round(1 + place * self._resolution / HALVES, 6)

    def _place(self, lam: float) -> int:
        return round(HALVES * (lam - 1) / self._resolution)


def bracket_of(
    search: SearchSection, prediction: Mapping[str, Any], state: dict[str, Any]
) -> Bracket:
    """The search that starts from `prediction`, as far as it is in `state`."""
    star = prediction["lambda_star"]
    if star is None:
        star = 1.0  # nothing predicted: the search widens from there
    edges = [prediction.get(f"lambda_star_{side}") for side in ("low", "high")]
    low, high = (star if edge is None else edge for edge in edges)
    return Bracket(
        start=(low, high),
        seeds=search.seeds,
        resolution=search.resolution,
        max_lam=search.max_lam,
        error=search.error,
        margin=search.margin,
        slots=search.slots,
        attempts=search.attempts,
        state=state,
    )


def _steps(width: int, number: int, count: int) -> list[int]:
    """How far the next `count` λ lie from the last: steps that grow fourfold, `number` gone."""
    return [sum(width * 4 ** (number + m) for m in range(n)) for n in range(1, count + 1)]
