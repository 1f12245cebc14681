import pickle
from dataclasses import fields, replace

import numpy as np
from fakes import make_rollout, make_scored

from listopd_ray.roles.rollout import Generated
from listopd_ray.roles.teacher import Scored


def sent(value):
    """As to another process, and how many buffers that took."""
    buffers = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[buffer.raw() for buffer in buffers]), len(buffers)


def check_same(one, other):
    for field in fields(one):
        value, expected = getattr(one, field.name), getattr(other, field.name)
        if isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(value, expected)
            assert value.dtype == expected.dtype
        elif field.name in ("prompt", "rollout"):
            check_same(value, expected)
        else:
            assert value == expected, field.name


def make_rollouts():
    first = make_rollout(np.arange(4, dtype=np.int32), [1, 2, 3], prompt_id="p")
    named = replace(first.prompt, id="q", teacher="code", token_ids=np.arange(9, dtype=np.int32))
    second = replace(first, sample_index=1, token_ids=np.array([7], dtype=np.int32))
    third = replace(second, prompt=named, sampler_logprobs=np.zeros(1, np.float32))
    return first, replace(second, sampler_logprobs=np.ones(1, np.float32)), third


def test_rollouts_arrive_as_they_were():
    generated, _ = sent(Generated(rollouts=make_rollouts(), seconds=2.0, attempt=3))
    assert (generated.seconds, generated.attempt) == (2.0, 3)
    for rollout, expected in zip(generated.rollouts, make_rollouts(), strict=True):
        check_same(rollout, expected)
    first, second, third = generated.rollouts
    assert first.prompt is second.prompt  # of one prompt: it was sent once
    assert third.prompt is not second.prompt


def test_scores_arrive_as_they_were_with_or_without_a_base_and_a_support():
    support = np.arange(6, dtype=np.float32).reshape(3, 2)
    for change in ({}, {"support_logprobs": support, "support_ids": support.astype(np.int32)}):
        rollouts = [replace(make_scored(make_rollouts()[0]), **change)]
        rollouts += [replace(make_scored(rollout)) for rollout in make_rollouts()]
        scored, _ = sent(Scored(rollouts=tuple(rollouts), seconds=1.0))
        assert scored.seconds == 1.0
        for one, expected in zip(scored.rollouts, rollouts, strict=True):
            check_same(one, expected)


def test_the_number_of_buffers_does_not_depend_on_the_number_of_rollouts():
    rollouts = tuple(make_scored(rollout) for rollout in make_rollouts() * 50)
    _, many = sent(Scored(rollouts=rollouts, seconds=0.0))
    _, few = sent(Scored(rollouts=rollouts[:3], seconds=0.0))
    assert many == few < 12


def test_nothing_arrives_as_nothing():
    assert sent(Generated(rollouts=(), seconds=1.0))[0].rollouts == ()
    assert sent(Scored(rollouts=(), seconds=1.0))[0].rollouts == ()
