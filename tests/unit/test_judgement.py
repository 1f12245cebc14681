"""The verdict on one λ: what it may rest on, and how often it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from listopd_ray.search.judgement import Outcome, judge

NUM_SEEDS, NUM_PROMPTS = 5, 512


def finished(rate, seed=0, lam=1.3):
    parsed = round(rate * NUM_PROMPTS)
    return Outcome(lam, seed, "finished", parsed, NUM_PROMPTS, step=120, updates=120)


def collapsed(rate=0.0, seed=0):
    return Outcome(1.3, seed, "collapsed", round(rate * 192), 192, step=30, updates=30)


def at(*rates):
    """Finished trials; None: not run."""
    return [None if rate is None else finished(rate, seed) for seed, rate in enumerate(rates)]


FLOOR = at(*[0.8] * NUM_SEEDS)  # a sum of 2.0 holds


@pytest.mark.parametrize(
    ("rates", "holds", "num_seeds"),
    [
        ((0.8, 0.8, 0.8, None, None), True, 3),
        ((0.7, 0.7, None, None, None), None, None),
        ((0.0, 0.0, 0.0, 0.0, None), False, 4),  # the last may parse 1: still below 2
        ((0.0, 0.0, 0.0, None, None), None, None),  # two that parse 1 would make it
        ((0.8, 0.0, 0.8, 0.0, 0.0), False, 5),
        ((0.8, 0.0, 0.8, 0.0, 0.8), True, 5),
    ],
)
def test_a_verdict_is_given_once_the_other_seeds_cannot_turn_it(rates, holds, num_seeds):
    verdict = judge(at(*rates), FLOOR, error=0.01)
    if holds is None:
        assert verdict is None
    else:
        assert (verdict.holds, verdict.num_seeds, verdict.full) == (holds, num_seeds, True)
        assert verdict.error <= 0.01


def test_seeds_after_the_one_that_decides_change_nothing():
    early = judge(at(0.8, 0.8, 0.8, None, None), FLOOR, 0.01)
    assert judge(at(0.8, 0.8, 0.8, 0.0, 0.0), FLOOR, 0.01) == early
    assert judge([*at(0.8, 0.8), None, *at(0.8, 0.8)], FLOOR, 0.01) is None  # the third is missing


def test_a_collapse_rules_out_but_never_passes():
    ruled_out = judge([collapsed()] * 4 + [None], FLOOR, 0.01)
    assert (ruled_out.holds, ruled_out.full) == (False, False)
    # Collapsed trials count as 0 towards passing, however well they parsed when they were stopped.
    assert judge([collapsed(1.0)] * 5, FLOOR, 0.01) is None
    passing = judge([*at(0.8, 0.8), collapsed(), *at(0.8)], FLOOR, 0.01)
    assert (passing.holds, passing.full, passing.num_seeds) == (True, True, 4)


def test_once_run_to_their_end_collapsed_trials_count_in_full():
    verdict = judge(at(0.0, 0.0, 0.0, 0.0, None), FLOOR, 0.01)
    assert (verdict.holds, verdict.full) == (False, True)


def test_too_close_to_call_is_said_with_its_error():
    verdict = judge(at(0.4, 0.4, 0.4, 0.4, 0.405), FLOOR, 0.01)
    assert verdict.holds
    assert verdict.error > 0.3


def draw(rng, rates):
    return at(*(rng.binomial(NUM_PROMPTS, rates) / NUM_PROMPTS))


@pytest.mark.parametrize("share", [0.9999, 1.0001])
def test_with_one_look_the_stated_error_is_the_one_made_next_to_the_floor(share):
    """The worst case: a true rate at the floor, either verdict clear as often as is allowed."""
    rng, error, draws = np.random.default_rng(0), 0.1, 4000
    wrong = 0
    for _ in range(draws):
        floor, seen = draw(rng, [0.8]), draw(rng, [0.4 * share])
        verdict = judge(seen, floor, error)
        wrong += verdict.error <= error and verdict.holds != (share > 1)
    assert wrong / draws == pytest.approx(error, abs=0.015)


@pytest.mark.parametrize("share", [0.9, 0.99, 1.01, 1.1])
def test_with_several_looks_it_is_no_larger(share):
    rng, error, draws = np.random.default_rng(0), 0.1, 2000
    wrong = clear = 0
    for _ in range(draws):
        floor = draw(rng, [0.8] * NUM_SEEDS)
        seen = draw(rng, np.array([0.8, 0.6, 0.3, 0.2, 0.1]) * share)  # 2.0 is the floor
        verdict = judge(seen, floor, error)
        clear += verdict.error <= error
        wrong += verdict.error <= error and verdict.holds != (share > 1)
    assert wrong / draws <= error
    assert clear / draws > (0.9 if abs(share - 1) > 0.05 else 0)
