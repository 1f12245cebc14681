import json
import math
import random
import statistics

import pytest

from listopd_ray.cliff.governor import Average, Governor
from listopd_ray.types import ListopdError

ITEM_STAR = 1 + math.log(2) / (math.log(0.7 / 0.3) - math.log(0.35 / 0.65))  # c = 2


def governor(**changes):
    options = {"clip": 2.0, "margin": 0.1, "decay": 0.9, "caps": True, "predicted": None}
    return Governor(**options | changes)


def step_metrics(**masses):
    """Metrics of one step from `class=(p, b, q)`; b None: no base loaded."""
    metrics = {"loss/policy": 1.0}
    for name, values in masses.items():
        for owner, mass in zip(("teacher", "base", "student"), values, strict=True):
            if mass is not None:
                metrics[f"cliff/{owner}_mass_{name}"] = mass
    return metrics


def noisy_step(rng):
    p, b = rng.gauss(0.7, 0.02), rng.gauss(0.35, 0.015)
    return step_metrics(item_id=(p, b, rng.gauss(0.4, 0.02)), separator=(0.99, 0.95, 0.96))


def test_the_average_equals_a_loop_over_weighted_readings():
    rng = random.Random(0)
    readings = [rng.gauss(3, 1) for _ in range(40)]
    average = Average()
    for number, reading in enumerate(readings, 1):
        average.add(reading, decay=0.8)
        raw = [0.8 ** (number - 1 - index) for index in range(number)]
        weights = [weight / sum(raw) for weight in raw]
        mean = sum(w * x for w, x in zip(weights, readings, strict=False))
        variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, readings, strict=False))
        assert average.mean == pytest.approx(mean, rel=1e-12)
        assert average.variance == pytest.approx(variance, rel=1e-9, abs=1e-15)
        assert average.squares == pytest.approx(sum(w**2 for w in weights), rel=1e-12)


def test_the_interval_of_an_average_holds_the_truth_about_95_times_in_100():
    rng = random.Random(1)
    hits = 0
    for _ in range(1000):
        average = Average()
        for _ in range(60):
            average.add(rng.gauss(5, 2), decay=0.95)
        hits += abs(average.mean - 5) <= average.half_width()
    assert 0.92 < hits / 1000 < 0.97


def test_with_decay_near_one_the_interval_is_the_textbook_one():
    readings = [1.0, 2.0, 4.0, 8.0, 5.0]
    average = Average()
    for reading in readings:
        average.add(reading, decay=1 - 1e-9)
    standard_error = statistics.stdev(readings) / math.sqrt(len(readings))
    assert average.half_width() == pytest.approx(1.959964 * standard_error, rel=1e-5)


def test_the_first_step_counts_fully_and_gives_the_closed_form():
    measured = governor()
    metrics = measured.update(step_metrics(item_id=(0.7, 0.35, 0.4)), lam=1.2)
    assert metrics == {
        "cliff/lambda_star": pytest.approx(ITEM_STAR, rel=1e-12),
        "cliff/drive": pytest.approx(0.2 / (ITEM_STAR - 1), rel=1e-12),
        "cliff/headroom": pytest.approx(ITEM_STAR - 1.2, rel=1e-12),
        "cliff/tail_mass_item_id": pytest.approx(0.6, rel=1e-12),
    }
    assert measured.binding_class == "item_id"
    assert measured.working_lam(5.0) == pytest.approx(1 + 0.9 * (ITEM_STAR - 1), rel=1e-12)


def test_the_interval_of_lambda_star_comes_from_the_spread_of_the_logit_gap():
    measured, gaps = governor(decay=1 - 1e-9), []
    steps = [(0.70, 0.36), (0.68, 0.35), (0.73, 0.36), (0.71, 0.33)]
    for p, b in steps:
        metrics = measured.update(step_metrics(item_id=(p, b, 0.4)), lam=1.0)
        gaps.append(math.log(p / (1 - p)) - math.log(b / (1 - b)))
    half = 1.959964 * statistics.stdev(gaps) / 2
    centre = math.log(2) / (metrics["cliff/lambda_star"] - 1)
    assert centre == pytest.approx(statistics.mean(gaps), rel=5e-3)
    low, high = metrics["cliff/lambda_star_low"], metrics["cliff/lambda_star_high"]
    assert math.log(2) / (low - 1) - centre == pytest.approx(half, rel=1e-5)
    assert centre - math.log(2) / (high - 1) == pytest.approx(half, rel=1e-5)


def test_an_interval_that_reaches_infinity_has_no_upper_end():
    measured = governor()
    measured.update(step_metrics(item_id=(0.5, 0.2, 0.4)), lam=1.0)
    metrics = measured.update(step_metrics(item_id=(0.5, 0.49, 0.4)), lam=1.0)
    assert 1 < metrics["cliff/lambda_star_low"] < metrics["cliff/lambda_star"]
    assert "cliff/lambda_star_high" not in metrics


def test_the_binding_class_is_the_unresolved_one_with_the_smallest_lambda_star():
    measured = governor()
    # Opening has the smallest λ* of all but is resolved; closing has p < b.
    metrics = measured.update(
        step_metrics(
            opening=(0.9999, 0.51, 0.9),
            item_id=(0.7, 0.35, 0.4),
            separator=(0.7, 0.45, 0.4),
            closing=(0.3, 0.4, 0.4),
        ),
        lam=1.0,
    )
    assert measured.binding_class == "item_id"
    assert metrics["cliff/lambda_star"] == pytest.approx(ITEM_STAR, rel=1e-12)
    assert measured.working_lam(5.0) == pytest.approx(1 + 0.9 * (ITEM_STAR - 1), rel=1e-12)


@pytest.mark.parametrize(
    "masses", [(0.99, 0.51, 0.9), (0.3, 0.3, 0.3), (0.2, 0.3, 0.2), (0.7, None, 0.4)]
)
def test_without_an_unresolved_class_that_gains_only_tail_masses_are_reported(masses):
    measured = governor(predicted=1.5)
    metrics = measured.update(step_metrics(item_id=masses), lam=1.0)
    assert metrics == {"cliff/tail_mass_item_id": pytest.approx(1 - masses[2])}
    assert measured.binding_class is None
    assert measured.working_lam(3.0) == pytest.approx(1.45)  # still the prediction


def test_a_class_missing_in_a_step_keeps_its_averages():
    measured = governor(decay=0.5)
    measured.update(step_metrics(item_id=(0.7, 0.35, 0.4)), lam=1.0)
    metrics = measured.update(step_metrics(opening=(0.99, 0.95, 0.97)), lam=1.0)
    assert metrics["cliff/lambda_star"] == pytest.approx(ITEM_STAR, rel=1e-12)
    assert metrics["cliff/tail_mass_item_id"] == pytest.approx(0.6)
    assert metrics["cliff/tail_mass_opening"] == pytest.approx(0.03)


def test_the_prediction_caps_until_the_run_has_measured():
    predicted = governor(predicted=1.5, margin=0.2)
    assert predicted.working_lam(2.0) == pytest.approx(1.4)
    assert predicted.working_lam(math.inf) == pytest.approx(1.4)
    predicted.update(step_metrics(item_id=(0.7, 0.35, 0.4)), lam=1.4)
    assert predicted.working_lam(2.0) == pytest.approx(1 + 0.8 * (ITEM_STAR - 1), rel=1e-12)


def test_with_nothing_known_lambda_is_capped_at_one():
    assert governor().working_lam(2.0) == governor().working_lam(math.inf) == 1.0
    assert governor().working_lam(0.3) == 0.3


def test_a_request_below_the_cap_or_without_the_governor_passes_unchanged():
    requested = 1.1 + 1e-15
    assert governor(predicted=1.5).working_lam(requested) == requested
    off = governor(caps=False, predicted=1.5)
    off.update(step_metrics(item_id=(0.7, 0.35, 0.4)), lam=3.0)
    assert off.working_lam(7.1) == 7.1


@pytest.mark.parametrize("changes", [{"caps": False}, {"predicted": math.inf}])
def test_auto_without_a_finite_cap_is_an_error(changes):
    with pytest.raises(ListopdError, match="no finite λ"):
        governor(**changes).working_lam(math.inf)


def test_without_a_clip_there_is_no_cliff_and_no_cap():
    unclipped = governor(clip=math.inf)
    metrics = unclipped.update(step_metrics(item_id=(0.7, 0.35, 0.4)), lam=2.0)
    assert metrics == {"cliff/tail_mass_item_id": pytest.approx(0.6)}
    assert unclipped.working_lam(2.5) == 2.5


def test_masses_at_or_beyond_zero_and_one_stay_finite():
    measured = governor()
    for p, b in ((1.0, 0.0), (1.0 + 1e-7, -1e-9), (0.9, 0.0)):
        metrics = measured.update(step_metrics(item_id=(p, b, 1.0)), lam=1.0)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["cliff/lambda_star"] > 1


def test_a_restored_governor_continues_bit_for_bit():
    rng = random.Random(2)
    first = governor()
    for _ in range(7):
        first.update(noisy_step(rng), lam=1.1)
    second = governor()
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    for _ in range(7):
        metrics = noisy_step(rng)
        assert first.working_lam(9.0) == second.working_lam(9.0)
        assert first.update(metrics, lam=1.1) == second.update(metrics, lam=1.1)
        assert first.state() == second.state()


def test_the_cap_stays_below_the_escape_threshold_too():
    measured = governor(margin=0.2)
    metrics = step_metrics(item_id=(0.7, 0.35, 0.4), separator=(0.99, 0.95, 0.96))
    # A mean advantage of −0.3 − 3(λ − 1), against −log 2: 0.131 of room.
    metrics |= {"cliff/first_log_ratio": -3.0, "cliff/first_clipped_log_ratio": -0.3}
    seen = measured.update(metrics, lam=1.0)
    escape = 1 + (math.log(2) - 0.3) / 3
    assert seen["cliff/escape"] == pytest.approx(escape, rel=1e-12)
    assert escape < ITEM_STAR
    assert measured.working_lam(3.0) == pytest.approx(1 + 0.8 * (escape - 1), rel=1e-12)
    assert governor(caps=False).working_lam(3.0) == 3.0
    # Where nothing finite is measured, the prediction stays in force.
    open_ended = governor(margin=0.2, predicted=1.3)
    open_ended.update({"cliff/first_log_ratio": 0.5, "cliff/first_clipped_log_ratio": 0.3}, 1.0)
    assert open_ended.working_lam(3.0) == pytest.approx(1.24, rel=1e-12)
    # Where λ* is the smaller one it decides.
    far = governor(margin=0.2)
    far.update(metrics | {"cliff/first_log_ratio": -0.5}, lam=1.0)
    assert far.working_lam(3.0) == pytest.approx(1 + 0.8 * (ITEM_STAR - 1), rel=1e-12)
