import json
import random

import pytest

from listopd_ray.cliff.alarm import Alarm


def training(parse_rate, *, tail=None, clipped=None):
    """Metrics of a training step; the teacher's tail mass is 0.3, so (1 − p)/c = 0.15."""
    metrics = {"contract/parse_rate": parse_rate}
    if tail is not None:
        metrics |= {"cliff/teacher_mass_item_id": 0.7, "cliff/student_mass_item_id": 1 - tail}
    if clipped is not None:
        metrics["loss/clip_fraction_item_id"] = clipped
    return metrics


def first_ring(alarm, steps, binding_class="item_id"):
    """(step from 1, reason) of the first ring, or None."""
    for step, metrics in enumerate(steps, 1):
        if reason := alarm.check(metrics, binding_class):
            return step, reason
    return None


def batch(rng, parse_rate, size=64):
    return sum(rng.random() < parse_rate for _ in range(size)) / size


@pytest.mark.parametrize("start, end", [(0.33, 0.33), (0.33, 0.78), (0.9, 0.75)])
def test_a_healthy_run_with_the_noise_of_64_rollouts_never_rings(start, end):
    rng = random.Random(0)
    for _ in range(100):
        steps = [
            training(
                batch(rng, start + (end - start) * min(1, step / 40)),
                tail=0.6,
                clipped=rng.gauss(0.65, 0.02),
            )
            for step in range(120)
        ]
        assert first_ring(Alarm(clip=2.0), steps) is None


def test_a_sudden_collapse_rings_within_three_steps_of_the_third_bad_batch():
    rng = random.Random(1)
    for _ in range(50):
        alarm = Alarm(clip=2.0)
        assert first_ring(alarm, [training(batch(rng, 0.75)) for _ in range(40)]) is None
        step, reason = first_ring(alarm, [training(batch(rng, 0.01)) for _ in range(10)])
        assert 3 <= step <= 6
        assert reason.startswith("training parses 0.")


def test_the_training_average_rings_exactly_when_it_was_low_for_patience_steps():
    # From 0.8 the average goes 0.56, 0.392, 0.274, 0.192: below 0.4 from the second bad step on.
    steps = [training(0.8)] * 200 + [training(0.0)] * 10
    for patience in (1, 2, 4):
        step, reason = first_ring(Alarm(clip=2.0, patience=patience), steps)
        assert step == 200 + 1 + patience
        average = 0.8 * 0.7 ** (1 + patience)
        assert reason == (
            f"training parses {average:.3f}, best was 0.800 ({patience} steps in a row)"
        )
    assert first_ring(Alarm(clip=2.0, parse_share=0.3), steps)[0] == 200 + 4 + 2


def test_the_best_parse_rate_is_of_the_average_not_of_a_lucky_batch():
    steps = [training(0.5)] * 50 + [training(1.0)] + [training(0.0)] * 9
    # The best is 0.5 + 0.3·0.5 = 0.65; 0.65·0.7^k is below half of it from k = 2 on.
    step, reason = first_ring(Alarm(clip=2.0), steps)
    assert step == 51 + 2 + 2
    assert "best was 0.650" in reason


def test_a_dip_shorter_than_patience_is_forgotten():
    dip = [training(0.8)] * 20 + [training(0.0)] * 2 + [training(0.8)] * 3
    assert first_ring(Alarm(clip=2.0), dip * 3) is None
    assert first_ring(Alarm(clip=2.0, patience=1), dip * 3)[0] == 22


def test_one_bad_evaluation_rings():
    alarm = Alarm(clip=2.0)
    rates = [0.36, 0.8, 0.41]
    assert first_ring(alarm, [{"eval/parse_rate": rate} for rate in rates]) is None
    assert alarm.check(training(0.8) | {"eval/parse_rate": 0.39}, None) == (
        "evaluation parses 0.390, best was 0.800"
    )
    assert not alarm.healthy


def test_a_student_that_never_parsed_does_not_ring():
    steps = [training(0.0) | {"eval/parse_rate": 0.0}] * 20
    assert first_ring(Alarm(clip=2.0), steps) is None


@pytest.mark.parametrize("sign", [{"tail": 0.05}, {"clipped": 0.9}])
def test_a_sign_at_the_binding_class_is_silent_while_outputs_parse(sign):
    steps = [training(0.8, tail=0.6, clipped=0.6)] + [training(0.8, **sign)] * 50
    assert first_ring(Alarm(clip=2.0), steps) is None


@pytest.mark.parametrize(
    "sign, harmless, reason",
    [
        ({"tail": 0.149}, {"tail": 0.151}, "item_id tail mass 0.149 below (1-p)/c = 0.15"),
        ({"clipped": 0.81}, {"clipped": 0.79}, "item_id clip fraction 0.810, first was 0.600"),
    ],
)
def test_a_sign_at_the_binding_class_rings_once_parsing_is_falling_too(sign, harmless, reason):
    def fall(to, **signs):
        start = [training(0.8, tail=0.6, clipped=0.6)] * 100
        return first_ring(Alarm(clip=2.0), start + [training(to, **signs)] * 40)

    step, text = fall(0.55, **sign)
    # The average, 0.55 + 0.25·0.7^k, is below ¾ of 0.8 from the fifth lower step on.
    assert step == 100 + 5 + 2
    assert f"; {reason} (3 steps in a row)" in text
    assert fall(0.55) is None
    assert fall(0.55, **harmless) is None
    assert fall(0.61, **sign) is None


def test_signs_of_other_classes_and_of_none_are_not_looked_at():
    steps = [training(0.8, tail=0.6, clipped=0.6)] + [training(0.5, tail=0.05, clipped=0.9)] * 20
    assert first_ring(Alarm(clip=2.0), steps) is not None
    for name in ("opening", None):
        assert first_ring(Alarm(clip=2.0), steps, name) is None


def test_a_checkpoint_is_healthy_near_the_best_parse_rate_and_without_a_pending_fault():
    alarm = Alarm(clip=2.0, decay=0.0)  # no averaging
    assert alarm.healthy
    for parse_rate, healthy in ((0.5, True), (0.8, True), (0.73, True), (0.71, False)):
        alarm.check(training(parse_rate), None)
        assert alarm.healthy is healthy
    alarm = Alarm(clip=2.0, decay=0.0, parse_share=0.95)
    alarm.check(training(0.8), None)
    alarm.check(training(0.75), None)  # above 0.9 of the best, below the alarm's share: pending
    assert not alarm.healthy
    alarm.check(training(0.78), None)
    assert alarm.healthy


def test_a_restored_alarm_continues_bit_for_bit():
    rng = random.Random(3)
    steps = [training(batch(rng, 0.75), tail=0.6, clipped=0.6) for _ in range(30)]
    steps += [training(batch(rng, 0.1), tail=0.1) | {"eval/parse_rate": 0.4} for _ in range(10)]
    for cut in (1, 29, 32, 36):
        first, second = Alarm(clip=2.0), Alarm(clip=2.0)
        first_ring(first, [{"eval/parse_rate": 0.7}])
        first_ring(first, steps[:cut])
        second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
        for metrics in steps[cut:]:
            assert first.check(metrics, "item_id") == second.check(metrics, "item_id")
            assert first.state() == second.state()
            assert first.healthy is second.healthy


def test_after_restoring_a_healthy_state_the_collapse_is_forgotten():
    alarm = Alarm(clip=2.0)
    first_ring(alarm, [training(0.8)] * 20)
    kept = alarm.state()
    assert first_ring(alarm, [training(0.0)] * 10) is not None
    assert not alarm.healthy
    alarm.restore(kept)
    assert alarm.healthy
    assert first_ring(alarm, [training(0.75)] * 20) is None
