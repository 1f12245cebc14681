"""The verdict on one λ from parse counts: does the contract hold for these seeds?

The study's criterion: strict parse averaged over the seeds, against half of that at λ = 1 (the
floor). Seeds are looked at one after the other, and a seed that has not been seen may yet parse
anything from 0 to 1: once that cannot turn the sum, the others need not run. What is left is
the noise of counting, bounded by a normal approximation at every look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from listopd_ray.cliff.calibration import FLOOR_SHARE


@dataclass(frozen=True)
class Outcome:
    """What became of one trial."""

    lam: float
    seed: int
    # finished: at the full budget, on held-out prompts. collapsed: stopped early, on the rollouts
    # of the last update.
    kind: Literal["finished", "collapsed"]
    parsed: int  # outputs that parse strictly
    sampled: int  # of so many
    step: int  # updates completed
    updates: int  # updates spent, those that were repeated included


@dataclass(frozen=True)
class Verdict:
    """On one λ. `error`: probability that another draw of outputs from the same students says the
    opposite. `full`: rests on trials at the full budget alone."""

    holds: bool
    error: float
    num_seeds: int  # the first so many decided it
    full: bool


def judge(seen: Sequence[Outcome | None], floor: Sequence[Outcome], error: float) -> Verdict | None:
    """`seen` and `floor` (λ = 1, finished) by seed, in the same order; None: more has to be run.

    A collapsed trial may rule its λ out but never let it pass. The verdict depends on the seeds up
    to the one that decides, whatever else is there: trials may end in any order.
    """
    return _judge(seen, floor, error, with_collapsed=False) or _judge(
        seen, floor, error, with_collapsed=True
    )


def _judge(
    seen: Sequence[Outcome | None],
    floor: Sequence[Outcome],
    error: float,
    *,
    with_collapsed: bool,
) -> Verdict | None:
    num_seeds = len(floor)
    threshold = FLOOR_SHARE * sum(rate(outcome) for outcome in floor)
    variance = FLOOR_SHARE**2 * sum(_variance(outcome) for outcome in floor)
    lowest, highest = 0.0, float(num_seeds)  # what the parse rates can sum to
    full = True
    for number, outcome in enumerate(seen, start=1):
        if outcome is None:
            return None
        if outcome.kind == "finished":
            lowest += rate(outcome)
        if outcome.kind == "finished" or with_collapsed:
            highest += rate(outcome) - 1
            variance += _variance(outcome)
        full = full and (outcome.kind == "finished" or not with_collapsed)
        passing = NormalDist().cdf((threshold - lowest) / math.sqrt(variance))
        failing = NormalDist().cdf((highest - threshold) / math.sqrt(variance))
        if min(passing, failing) <= error / num_seeds:  # so many looks at most
            # Passing rests on finished trials: the others count as 0.
            holds = passing < failing
            least = min(1.0, num_seeds * min(passing, failing))
            return Verdict(holds, least, number, full or holds)
    if any(outcome is not None and outcome.kind == "collapsed" for outcome in seen):
        return None  # too close to call without them
    return Verdict(passing < failing, min(1.0, num_seeds * min(passing, failing)), num_seeds, True)


def rate(outcome: Outcome) -> float:
    return outcome.parsed / outcome.sampled


def _variance(outcome: Outcome) -> float:
    """Of the parse rate, with one success and one failure added: never 0."""
    share = (outcome.parsed + 1) / (outcome.sampled + 2)
    return share * (1 - share) / outcome.sampled


def closing(outcome: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """(low, high) ends of the bracket of a bracket.json before its first trial and after each, in
    the order they ended; the high one is above all λ as long as nothing breaks. A λ counts from the
    last of its trials on."""
    trials, star = outcome["trials"], outcome["prediction"]["lambda_star"]
    last = {trial["lam"]: number for number, trial in enumerate(trials, start=1)}
    verdicts = {row["lam"]: row["verdict"] for row in outcome["verdicts"]}
    top = max([trial["lam"] for trial in trials] + [star or 1.0]) + outcome["resolution"]
    lows, highs = list[float](), list[float]()
    for number in range(len(trials) + 1):
        known = {lam: text for lam, text in verdicts.items() if last[lam] <= number}
        lows.append(max((lam for lam, text in known.items() if text == "holds"), default=1.0))
        broken = [lam for lam, text in known.items() if text == "breaks" and lam > lows[-1]]
        highs.append(min(broken, default=top))
    return lows, highs


def standing(trial: Mapping[str, Any], floor: float) -> str:
    """How a trial of a bracket.json ended, in words."""
    if trial["verdict"] == "collapsed":
        return "collapsed, stopped early"
    return "above the floor" if trial["parsed"] >= floor * trial["sampled"] else "below"
