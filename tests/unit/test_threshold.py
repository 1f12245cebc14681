import math
import subprocess
import sys

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from listopd_ray.cliff import threshold
from listopd_ray.cliff.threshold import (
    bounded_has_fixed_point,
    calibrated_lambda_star,
    clip_exit,
    clip_for,
    effective_gap,
    escape,
    fixed_point,
    is_clip_safe,
    lambda_star,
    logit,
    rescale_onset,
    reversed_mass,
    reversed_onset,
    reversed_runaway,
    runaway,
    safe_lam,
    settled_mass,
    smallest_bounded_delta,
    time_to_leave,
)

INF, NAN = math.inf, math.nan
THREE = (lambda_star, clip_exit, runaway)

masses = st.floats(0.01, 0.99)
clips = st.floats(1.05, 20.0)


@st.composite
def ordered(draw):
    """Teacher mass p above base mass b."""
    b, gap = draw(st.floats(0.01, 0.95)), draw(st.floats(0.05, 6.0))
    return 1 / (1 + math.exp(-logit(b) - gap)), b


def restoring_force(p, q, c):
    """R_c(q) as the definition writes it, clips by `min` and `max`."""
    bound = math.log(c)
    rest = max(-bound, min(bound, math.log((1 - p) / (1 - q))))
    modal = max(-bound, min(bound, math.log(p / q)))
    return rest - modal


def log_odds_where_force_is(p, c, drive):
    """z with R_c(σ(z)) = drive, by bisection over log-odds; the force never falls with z."""

    def excess(z):
        return restoring_force(p, 1 / (1 + math.exp(-z)), c) - drive

    return brentq(excess, -35.0, 35.0, xtol=1e-12)


@pytest.mark.parametrize(
    ("p", "b", "c", "closed", "leaves", "runs"),
    [
        (0.767, 0.288, 1.3, 1.125, 1.157, 1.250),
        (0.767, 0.288, 2.0, 1.331, 1.398, 1.457),
        (0.767, 0.288, 5.0, 1.768, 1.871, 1.894),
    ],
)
def test_reference_figures_of_the_small_study(p, b, c, closed, leaves, runs):
    found = [function(p, b, c) for function in THREE]
    assert found == pytest.approx([closed, leaves, runs], abs=6e-4)  # three decimals


@pytest.mark.parametrize(
    ("p", "b", "closed"), [(0.680, 0.191, 1.315), (0.881, 0.335, 1.258), (0.5, 0.5, INF)]
)
def test_reference_figures_of_other_students(p, b, closed):
    assert lambda_star(p, b, 2.0) == pytest.approx(closed, abs=6e-4)


def test_logit_has_its_limits_and_inverts_the_logistic_function():
    assert (logit(0.0), logit(1.0), logit(0.5)) == (-INF, INF, 0.0)
    for z in (-30.0, -1.0, 0.3, 5.0):
        assert logit(1 / (1 + math.exp(-z))) == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize("function", THREE)
def test_limits_of_the_three_thresholds(function):
    for same in (0.0, 0.4, 1.0):
        assert function(same, same, 2.0) == INF  # no drive
        assert function(same, same, 1.0) == INF
    for p, b in ((1.0, 0.5), (0.9, 0.0), (1.0, 0.0)):
        assert function(p, b, 2.0) == 1.0  # infinite drive
    assert function(0.9, 0.5, 1.0) == 1.0  # no pull back at all
    for p in (0.9, 1.0):
        assert function(p, 0.5, INF) == INF  # no clip, no cliff
    assert function(1e-9, 1e-12, 1.0) == 1.0
    assert function(1 - 1e-12, 0.5, 2.0) == pytest.approx(1.0, abs=0.03)
    assert function(0.9, 0.9 - 1e-9, 2.0) > 1e6


@settings(deadline=None)
@given(pb=ordered(), c=clips)
def test_thresholds_come_in_order_closed_form_exit_runaway(pb, c):
    closed, leaves, runs = (function(*pb, c) for function in THREE)
    assert 1.0 < closed <= leaves * (1 + 1e-12)
    assert leaves <= runs * (1 + 1e-12)


@settings(deadline=None)
@given(p=st.floats(0.95, 0.99999), b=st.floats(0.001, 0.5), c=st.floats(1.001, 10.0))
@example(p=0.95, b=0.5, c=10.0)
def test_closed_form_is_within_one_percent_of_the_exit_for_a_near_deterministic_position(p, b, c):
    assert lambda_star(p, b, c) == pytest.approx(clip_exit(p, b, c), rel=0.01)


def test_closed_form_is_further_from_the_exit_where_the_base_is_resolved():
    ratio = clip_exit(0.95, 0.9, 2.0) / lambda_star(0.95, 0.9, 2.0)
    assert ratio == pytest.approx(1.018, abs=1e-3)


@settings(deadline=None)
@given(pb=ordered(), c=clips)
@example(pb=(0.05, 0.01), c=2.0)  # the modal ratio clips first
@example(pb=(0.9, 0.3), c=2.0)  # that of the rest does
def test_exit_is_where_the_unclipped_fixed_point_meets_the_clip(pb, c):
    p, b = pb

    def largest_ratio(lam):
        q = fixed_point(p, b, lam)
        return max(q / p, (1 - p) / (1 - q)) if q < 1 else INF

    leaves = clip_exit(p, b, c)
    step = 1e-6 * (leaves - 1)
    assert largest_ratio(leaves - step) < c < largest_ratio(leaves + step)
    assert is_clip_safe(p, b, c, leaves - step)
    assert not is_clip_safe(p, b, c, leaves + step)


@pytest.mark.parametrize(("p", "b"), [(0.767, 0.288), (0.1, 0.05), (0.9, 0.95), (0.2, 0.45)])
def test_clip_safe_is_where_the_clip_changes_nothing(p, b):
    safe = [is_clip_safe(p, b, 2.0, 0.01 * step) for step in range(400)]
    for step, expected in enumerate(safe):
        lam = 0.01 * step
        same = math.isclose(settled_mass(p, b, 2.0, lam), fixed_point(p, b, lam), rel_tol=1e-12)
        assert same == expected
    assert safe[100] and not all(safe)
    assert is_clip_safe(p, b, INF, 50.0)
    assert is_clip_safe(p, p, 2.0, 50.0)
    assert not is_clip_safe(1.0, b, 2.0, 1.1)
    assert not is_clip_safe(0.0, b, 2.0, 0.5)


@settings(deadline=None, max_examples=300)
@given(p=masses, b=masses, c=clips, share=st.floats(-0.95, 0.95))
@example(p=0.767, b=0.288, c=2.0, share=0.92)  # between exit and runaway
@example(p=0.05, b=0.01, c=2.0, share=0.9)  # p < 1/(1 + c): the modal ratio clips first
@example(p=0.97, b=0.99, c=3.0, share=-0.9)  # reversed
def test_settled_mass_balances_drive_and_force(p, b, c, share):
    gap = logit(p) - logit(b)
    assume(abs(gap) > 0.05)
    up = share > 0
    limit = math.log(c) + min(math.log(c), math.log(1 / p if up else 1 / (1 - p)))
    lam = 1 + share * limit / gap
    assume(lam >= 0)
    root = log_odds_where_force_is(p, c, share * limit)
    # 1e-12 of bisection; a slope of the force down to 1 − q in log-odds.
    assert logit(settled_mass(p, b, c, lam)) == pytest.approx(root, abs=1e-8)


@settings(deadline=None)
@given(pb=ordered(), c=clips)
def test_settled_mass_is_one_from_the_runaway_on_and_reaches_it_from_below(pb, c):
    p, b = pb
    runs = runaway(p, b, c)
    assert settled_mass(p, b, c, 1 + (runs - 1) * (1 + 1e-9)) == 1.0
    assert settled_mass(p, b, c, 2 * runs + 5) == 1.0
    below = settled_mass(p, b, c, 1 + (runs - 1) * (1 - 1e-9))
    # Continuous only where the modal ratio never saturates, p ≥ 1/c; else it stops at the clip.
    saturated = max(c * p, 1 - (1 - p) / c) if c * p < 1 else 1.0
    assert below == pytest.approx(saturated, abs=1e-6)


@settings(deadline=None)
@given(p=masses, b=masses, c=clips)
def test_one_settles_at_the_teacher_and_zero_unclipped_at_the_base(p, b, c):
    assert settled_mass(p, b, c, 1.0) == fixed_point(p, b, 1.0) == p
    assert fixed_point(p, b, 0.0) == b
    assert settled_mass(p, b, INF, 0.0) == b


def test_settled_mass_of_certain_teachers_and_bases():
    assert settled_mass(1.0, 0.5, 2.0, 1.1) == 1.0
    assert settled_mass(1.0, 0.5, 2.0, 0.9) == 0.0  # infinite drive against a bounded force
    assert settled_mass(0.9, 0.0, 2.0, 1.1) == 1.0
    assert settled_mass(0.0, 0.5, 2.0, 1.1) == 0.0
    assert settled_mass(0.3, 0.3, 2.0, 9.0) == 0.3
    assert fixed_point(1.0, 0.5, 0.5) == 1.0
    assert fixed_point(0.9, 0.0, 0.5) == 0.0
    assert fixed_point(0.9, 0.5, 1e6) == 1.0
    with pytest.raises(ValueError, match="mixture"):
        fixed_point(1.0, 0.0, 0.5)


@settings(deadline=None)
@given(pb=ordered(), c=clips, lam=st.floats(1.0, 20.0))
def test_clip_for_inverts_the_closed_form(pb, c, lam):
    p, b = pb
    assert clip_for(p, b, lambda_star(p, b, c)) == pytest.approx(c, rel=1e-9)
    needed = clip_for(p, b, lam)
    assert lambda_star(p, b, needed) == pytest.approx(lam, rel=1e-9)
    if needed > 1.001:
        assert lambda_star(p, b, needed * 0.9999) < lam  # the smallest


def test_clip_for_limits():
    assert clip_for(0.9, 0.5, 0.3) == clip_for(0.9, 0.5, 1.0) == clip_for(0.9, 0.9, 7.0) == 1.0
    assert clip_for(1.0, 0.5, 1.1) == clip_for(0.9, 0.5, 1e6) == INF


@settings(deadline=None)
@given(star=st.floats(1.0, 5.0), margin=st.floats(0.0, 0.99))
def test_safe_lam_leaves_the_margin_of_the_way(star, margin):
    lam = safe_lam(star, margin)
    assert star - lam == pytest.approx(margin * (star - 1), abs=1e-12)


def test_safe_lam_limits():
    assert safe_lam(1.4, 0.0) == 1.4
    assert safe_lam(1.4, 1.0) == safe_lam(INF, 1.0) == 1.0
    assert safe_lam(INF, 0.5) == INF


def test_time_to_leave_integrates_the_runaway():
    p, b, c, lam, end = 0.99, 0.5, 2.0, 1.3, 8.0
    start = math.log(c / (1 - p) - 1)
    net = (lam - lambda_star(p, b, c)) * (logit(p) - logit(b))
    # Midpoint rule over log-odds of dz/(q(1 − q)κ).
    cells = 20_000
    width = (end - start) / cells
    total = 0.0
    for cell in range(cells):
        q = 1 / (1 + math.exp(-(start + (cell + 0.5) * width)))
        total += width / (q * (1 - q) * net)
    assert time_to_leave(p, b, c, lam, end) == pytest.approx(total, rel=1e-6)


@settings(deadline=None)
@given(pb=ordered(), c=clips, above=st.floats(0.01, 3.0))
def test_time_to_leave_goes_as_one_over_the_distance_from_the_threshold(pb, c, above):
    p, b = pb
    star = lambda_star(p, b, c)
    once, twice = (time_to_leave(p, b, c, star + share * above, 12.0) for share in (1, 2))
    assert once == pytest.approx(2 * twice, rel=1e-6)
    assert once > 0


def test_time_to_leave_limits():
    star = lambda_star(0.95, 0.5, 2.0)
    assert time_to_leave(0.95, 0.5, 2.0, star, 8.0) == INF
    assert time_to_leave(0.95, 0.5, 2.0, 0.5, 8.0) == INF
    assert time_to_leave(0.95, 0.5, 2.0, star + 0.1, 800.0) == INF
    assert time_to_leave(0.95, 0.5, 2.0, star + 0.1, math.log(1.999 / 0.05 - 1)) == 0.0
    assert time_to_leave(0.95, 0.5, 2.0, star + 0.1, -3.0) == 0.0
    assert time_to_leave(0.95, 0.5, INF, 9.0, 8.0) == INF


def test_rescaled_onset_approaches_the_threshold_with_the_budget():
    assert rescale_onset(1.2, 1.5, 100, 100) == pytest.approx(1.5)
    assert rescale_onset(1.2, 1.5, 100, 300) == pytest.approx(1.3)
    assert rescale_onset(1.2, 1.5, 100, 50) == pytest.approx(1.8)
    assert rescale_onset(1.2, rescale_onset(1.2, 1.37, 60, 90), 90, 60) == pytest.approx(1.37)


def test_calibration_reproduces_the_recorded_predictions():
    """An onset of 1.5 at c = 2 gave 1.19 for c = 1.3 and 2.16 for c = 5."""
    assert calibrated_lambda_star(1.5, 2.0, 1.3) == pytest.approx(1.19, abs=5e-3)
    assert calibrated_lambda_star(1.5, 2.0, 5.0) == pytest.approx(2.16, abs=5e-3)
    assert calibrated_lambda_star(1.5, 2.0, 2.0) == pytest.approx(1.5)
    assert calibrated_lambda_star(1.0, 2.0, 5.0) == 1.0
    assert calibrated_lambda_star(1.5, 2.0, 1.0) == 1.0
    assert calibrated_lambda_star(1.5, 2.0, INF) == INF


@settings(deadline=None)
@given(pb=ordered(), c0=clips, c=clips)
def test_an_onset_at_the_closed_form_calibrates_to_the_closed_form(pb, c0, c):
    p, b = pb
    onset = lambda_star(p, b, c0)
    assert effective_gap(onset, c0) == pytest.approx(logit(p) - logit(b), rel=1e-6)
    assert calibrated_lambda_star(onset, c0, c) == pytest.approx(lambda_star(p, b, c), rel=1e-6)


def test_reversed_reference_figure():
    assert reversed_runaway(0.95, 0.99, 2.0) == pytest.approx(1.84, abs=5e-3)
    assert reversed_runaway(0.95, 0.99, INF) == INF
    assert reversed_runaway(0.95, 1.0, 2.0) == reversed_runaway(0.0, 0.5, 2.0) == 1.0


@settings(deadline=None)
@given(pb=ordered(), c=clips, share=st.floats(0.0, 1.2))
def test_reversed_functions_mirror_the_forward_ones(pb, c, share):
    p, b = pb
    runs = runaway(p, b, c)
    assert reversed_runaway(1 - p, 1 - b, c) == pytest.approx(runs, rel=1e-9)
    lam = 1 + share * (runs - 1)
    assume(abs(share - 1) > 1e-6)
    mirrored = settled_mass(1 - p, 1 - b, c, lam)
    assert mirrored == pytest.approx(1 - settled_mass(p, b, c, lam), abs=1e-9)
    assert reversed_mass(1 - p, 1 - b, lam) == pytest.approx(1 - fixed_point(p, b, lam), abs=1e-9)


@settings(deadline=None)
@given(
    pb=ordered(),
    c=st.one_of(st.just(INF), clips),
    num_positions=st.integers(1, 40),
    floor=st.floats(0.01, 0.99),
)
@example(pb=(0.99, 0.95), c=2.0, num_positions=21, floor=0.01)  # past the clip
@example(pb=(0.9, 0.5), c=1.2, num_positions=1, floor=0.95)  # the clip lets go upwards at λ < 1
def test_reversed_onset_is_where_the_output_parses_at_the_floor(pb, c, num_positions, floor):
    b, p = pb
    lam = reversed_onset(p, b, num_positions, floor, c)
    assume(lam > 1e-3)
    assert lam <= (1 + 1e-12) * reversed_runaway(p, b, c)

    def parse_rate(lam):
        return settled_mass(p, b, c, lam) ** num_positions

    step = 1e-6 * lam
    assert parse_rate(lam - step) >= floor >= parse_rate(lam + step)


def test_reversed_onset_limits():
    unclipped = reversed_onset(0.95, 0.99, 21, 0.05)
    assert reversed_mass(0.95, 0.99, unclipped) ** 21 == pytest.approx(0.05)
    assert reversed_onset(0.95, 0.99, 21, 0.05, 2.0) < unclipped
    assert reversed_onset(0.95, 0.99, 21, 0.95**21) == pytest.approx(1.0)
    assert reversed_onset(0.95, 0.99, 21, 0.99) == 0.0  # the base parses at 0.99**21 = 0.81
    assert reversed_onset(0.95, 0.99, 21, 0.0) == INF
    assert reversed_onset(0.95, 0.99, 21, 0.0, 2.0) == reversed_runaway(0.95, 0.99, 2.0)
    assert reversed_onset(0.95, 1.0, 21, 0.2) == reversed_onset(0.95, 1.0, 21, 0.0) == 1.0
    assert reversed_onset(0.95, 0.99, 21, 1.0) == 0.0
    assert reversed_onset(0.0, 0.9, 21, 0.05) == 0.0


def worst_bounded_excess(p, c, delta):
    """Largest (drive − sup of the force), over both directions, by brute force over b and λ.

    The force is that of the definition at the far ends.
    """
    bound = (1 - delta) * math.log(c)
    worst = -INF
    for b in (1e-6, 0.1 * p, 1 - 0.1 * (1 - p), 1 - 1e-6):
        for lam in (1.0, 2.0, 5.0, 50.0, 1e4):
            modal = max(-bound, min(bound, (lam - 1) * math.log(p / b)))
            rest = max(-bound, min(bound, (lam - 1) * math.log((1 - p) / (1 - b))))
            far = 1 - 1e-12 if b < p else 1e-12
            worst = max(worst, abs(modal - rest) - abs(restoring_force(p, far, c)))
    return worst


@settings(deadline=None)
@given(p=masses, c=clips, delta=st.floats(0.0, 1.0))
@example(p=0.767, c=2.0, delta=0.2)
@example(p=0.5, c=4.0, delta=0.1)
@example(p=0.3, c=2.0, delta=0.2)  # settles upwards, not downwards
def test_bounded_verdict_agrees_with_the_worst_drive_and_force(p, c, delta):
    excess = worst_bounded_excess(p, c, delta)
    assume(abs(excess) > 1e-9)
    assert bounded_has_fixed_point(p, c, delta) == (excess < 0)


@settings(deadline=None)
@given(p=st.floats(0.0, 1.0), c=clips)
def test_half_is_always_enough_and_the_two_bounded_functions_agree(p, c):
    smallest = smallest_bounded_delta(p, c)
    assert 0.0 <= smallest <= 0.5
    assert bounded_has_fixed_point(p, c, 0.5)
    assert bounded_has_fixed_point(p, c, min(1.0, smallest + 1e-9))
    assert not bounded_has_fixed_point(p, c, max(0.0, smallest - 1e-9))


def test_bounded_reference_figures():
    """δ = 0.2 is not enough at p = 0.767, c = 2: the net drive is at most 0.15."""
    assert not bounded_has_fixed_point(0.767, 2.0, 0.2)
    assert 1.6 * math.log(2) - (math.log(2) + math.log(1 / 0.767)) == pytest.approx(0.15, abs=2e-3)
    assert smallest_bounded_delta(0.767, 2.0) == pytest.approx(0.309, abs=1e-3)
    assert smallest_bounded_delta(0.5, 4.0) == pytest.approx(0.25)
    assert smallest_bounded_delta(1.0, 2.0) == 0.5
    assert smallest_bounded_delta(0.5, 1.5) == 0.0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: logit(1.1), "mass"),
        (lambda: logit(NAN), "mass"),
        *[
            (lambda f=f, arguments=arguments: f(*arguments), named)
            for f in THREE
            for arguments, named in [
                ((1.2, 0.5, 2.0), "p="),
                ((NAN, 0.5, 2.0), "p="),
                ((0.9, -0.1, 2.0), "b="),
                ((0.9, NAN, 2.0), "b="),
                ((0.9, 0.5, 0.9), "c="),
                ((0.9, 0.5, NAN), "c="),
                ((0.9, 0.95, 2.0), "reversed_onset"),
            ]
        ],
        (lambda: fixed_point(0.9, 0.5, -0.1), "lam="),
        (lambda: fixed_point(0.9, 1.5, 1.0), "b="),
        (lambda: settled_mass(0.9, 0.5, 0.5, 1.0), "c="),
        (lambda: settled_mass(0.9, 0.5, 2.0, NAN), "lam="),
        (lambda: settled_mass(0.9, 0.5, 2.0, INF), "lam="),
        (lambda: is_clip_safe(0.9, 0.5, NAN, 1.0), "c="),
        (lambda: is_clip_safe(0.9, 0.5, 2.0, -1.0), "lam="),
        (lambda: clip_for(0.5, 0.9, 1.2), "reversed_onset"),
        (lambda: clip_for(0.9, 0.5, NAN), "lam="),
        (lambda: safe_lam(0.9, 0.1), "lambda_star="),
        (lambda: safe_lam(1.3, 1.1), "margin="),
        (lambda: time_to_leave(0.9, 0.5, 2.0, 2.0, NAN), "break_logit="),
        (lambda: time_to_leave(0.5, 0.9, 2.0, 2.0, 5.0), "reversed_onset"),
        (lambda: rescale_onset(1.2, 0.9, 10, 20), "onset="),
        (lambda: rescale_onset(1.2, 1.3, 0, 20), "num_steps="),
        (lambda: rescale_onset(1.2, 1.3, 10, 0), "to_steps="),
        (lambda: rescale_onset(INF, 1.3, 10, 20), "lambda_star="),
        (lambda: effective_gap(1.0, 2.0), "onset="),
        (lambda: effective_gap(1.3, 1.0), "c="),
        (lambda: calibrated_lambda_star(1.3, 1.0, 2.0), "c0="),
        (lambda: calibrated_lambda_star(1.3, 2.0, 0.5), "c="),
        (lambda: calibrated_lambda_star(0.9, 2.0, 2.0), "onset="),
        (lambda: reversed_mass(0.9, 0.9, 1.2), "lambda_star"),
        (lambda: reversed_runaway(0.9, 0.5, 2.0), "lambda_star"),
        (lambda: reversed_onset(0.9, 0.5, 10, 0.1), "lambda_star"),
        (lambda: reversed_onset(0.9, 0.95, 0, 0.1), "num_positions="),
        (lambda: reversed_onset(0.9, 0.95, 10, 1.1), "floor="),
        (lambda: reversed_onset(0.9, 0.95, 10, 0.1, 0.5), "c="),
        (lambda: smallest_bounded_delta(0.9, 1.0), "c="),
        (lambda: smallest_bounded_delta(0.9, INF), "c="),
        (lambda: smallest_bounded_delta(1.9, 2.0), "p="),
        (lambda: bounded_has_fixed_point(0.9, 2.0, 1.5), "delta="),
        (lambda: bounded_has_fixed_point(0.9, 2.0, NAN), "delta="),
    ],
)
def test_arguments_out_of_range_are_named(call, named):
    with pytest.raises(ValueError, match=rf"(^|\W){named}"):
        call()


def test_thresholds_need_nothing_but_the_standard_library():
    # By file, past the package: what the others import is not this module's doing.
    program = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "sys.exit(any(name in sys.modules for name in ('numpy', 'torch', 'ray')))"
    )
    subprocess.run([sys.executable, "-c", program, threshold.__file__], check=True)


def test_escape_is_where_the_mean_advantage_meets_the_deepest_penalty_of_the_clip():
    # Two ids, one that the teacher is sure of: masses of teacher and student, c = 2.
    teacher, student = (0.96, 0.04), (0.5, 0.5)
    ratios = [math.log(t / s) for t, s in zip(teacher, student, strict=True)]
    log_ratio = sum(s * r for s, r in zip(student, ratios, strict=True))
    clipped = sum(
        s * max(-math.log(2), min(math.log(2), r)) for s, r in zip(student, ratios, strict=True)
    )
    lam = escape(log_ratio, clipped, 2.0)
    assert lam == pytest.approx(1 + (math.log(2) + clipped) / -log_ratio)
    mean_advantage = sum(
        s * (max(-math.log(2), min(math.log(2), r)) + (lam - 1) * r)
        for s, r in zip(student, ratios, strict=True)
    )
    assert mean_advantage == pytest.approx(-math.log(2))


def test_escape_has_its_limits_and_refuses_what_no_clip_gives():
    assert escape(0.0, 0.1, 2.0) == escape(0.5, 0.1, 2.0) == math.inf  # no negative drive
    assert escape(-1.0, -math.log(2), 2.0) == 1.0  # at the bound without any drive
    assert escape(-1e9, 0.0, 2.0) == pytest.approx(1.0)
    assert escape(-1.0, 0.0, 1.0) == 1.0
    for arguments in ((math.nan, 0.0, 2.0), (-1.0, math.nan, 2.0), (-1.0, 0.7, 2.0), (-1, 0, 0.9)):
        with pytest.raises(ValueError, match="must lie in"):
            escape(*arguments)
