"""The learner's own advantages and loss, descended by a table of logits, against the closed forms.

Each row is a position of its own, and the loss the sum of the rows' exact expectations, so time is
learning rate × updates. `opd_loss` is homogeneous in the advantages for weights ≥ 0: one call with
probability × advantage of every token of the vocabulary is the mean loss over sampled tokens.
"""

import functools
import itertools
import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from listopd_ray.cliff.threshold import (
    bounded_has_fixed_point,
    clip_exit,
    fixed_point,
    lambda_star,
    logit,
    rescale_onset,
    reversed_mass,
    reversed_runaway,
    runaway,
    settled_mass,
    time_to_leave,
)
from listopd_ray.roles.losses import opd_advantages, opd_loss


def column(values):
    return torch.tensor(values, dtype=torch.float64)


def two_classes(logits):
    """[N] log-odds → [N, 2] log-probabilities of the modal class and the rest."""
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)


def softmax(logits):
    return logits.log_softmax(-1)


def expected_loss(learner, teacher, base, **options):
    """Σ over rows of the mean loss of a token that the student itself samples."""
    advantages = opd_advantages(learner, teacher, base, **options)
    return opd_loss(
        learner, learner.detach(), learner.detach().exp() * advantages, ratio_clip=0.2, num_tokens=1
    )


def descend(logits, teacher, base, *, rate, num_steps, policy=two_classes, still=0.0, **options):
    """Plain gradient descent of the expected loss; yields the logits after every update.

    Ends early where no logit would move by `still` or more.
    """
    logits = logits.clone().requires_grad_()
    for _ in range(num_steps):
        loss = expected_loss(policy(logits), teacher, base, **options)
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= rate * gradient
        yield logits.detach().clone()
        if still and rate * gradient.abs().max().item() < still:
            return


def last(steps):
    return deque(steps, maxlen=1).pop()


def settle(p, b, *, rate=2.0, num_steps=3000, **options):
    """Modal mass [N] at which students that start at the base come to rest."""
    teacher, base = (two_classes(torch.logit(column(mass))) for mass in (p, b))
    start = torch.logit(column(b))
    # Contracting by at least 0.0035 an update, they are then within 3e-5 of it in log-odds.
    steps = descend(start, teacher, base, rate=rate, num_steps=num_steps, still=1e-7, **options)
    return last(steps).sigmoid().tolist()


# Masses that a plain gradient descent reaches in some hundred steps: q(1 − q) not too small.
gaps = st.floats(0.3, 2.5)
shares = st.floats(0.0, 0.95)  # of the way to a boundary, which is itself left out


@st.composite
def positions(draw, lowest=0.3, highest=0.9, num=4):
    """Teacher masses p and lower base masses b of a few independent positions."""
    p = draw(st.lists(st.floats(lowest, highest), min_size=1, max_size=num))
    b = [1 / (1 + math.exp(draw(gaps) - logit(mass))) for mass in p]
    return p, b


def test_one_weighted_call_is_the_mean_over_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits, teacher, base = (
        torch.randn(3, 5, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    teacher, base = softmax(teacher), softmax(base)
    options = dict(lam=1.7, clip=1.5)
    leaf = logits.clone().requires_grad_()
    loss = expected_loss(softmax(leaf), teacher, base, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)

    mean_loss, mean_gradient = 0.0, torch.zeros_like(logits)
    for row in range(3):
        for token in range(5):
            leaf = logits.clone().requires_grad_()
            learner = softmax(leaf)[row, token : token + 1]
            at = (row, slice(token, token + 1))
            advantages = opd_advantages(learner, teacher[at], base[at], **options)
            loss_of_one = opd_loss(
                learner, learner.detach(), advantages, ratio_clip=0.2, num_tokens=1
            )
            probability = learner.detach().exp().item()
            mean_loss += probability * loss_of_one.item()
            mean_gradient += probability * torch.autograd.grad(loss_of_one, leaf)[0]
    assert loss.item() == pytest.approx(mean_loss, abs=1e-12)
    assert gradient.flatten().tolist() == pytest.approx(mean_gradient.flatten().tolist(), abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(pb=positions(), clip=st.floats(1.2, 5.0), share=shares)
def test_below_the_clip_exit_positions_come_to_rest_at_the_unclipped_fixed_point(pb, clip, share):
    p, b = pb
    lam = 1 + share * (min(map(clip_exit, p, b, [clip] * len(p))) - 1)
    expected = [fixed_point(*pair, lam) for pair in zip(p, b, strict=True)]
    assert settle(p, b, lam=lam, clip=clip) == pytest.approx(expected, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(p=st.floats(0.1, 0.75), gap=gaps, clip=st.floats(1.3, 3.0), share=st.floats(0.05, 0.5))
def test_between_exit_and_runaway_a_position_comes_to_rest_at_its_settled_mass(p, gap, clip, share):
    b = 1 / (1 + math.exp(gap - logit(p)))
    leaves, runs = clip_exit(p, b, clip), runaway(p, b, clip)
    assume((runs - leaves) * gap > 0.01)  # both ratios clip at once at p = 1/(1 + c)
    lam = leaves + share * (runs - leaves)
    expected = settled_mass(p, b, clip, lam)
    assert expected < 1
    (found,) = settle([p], [b], lam=lam, clip=clip)
    # The slowest, q = 0.957, contracts by 0.0035 an update.
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("p", "b", "lam"), [(0.767, 0.288, 1.42), (0.1, 0.04, 2.3)], ids=["rest first", "modal first"]
)
def test_the_clip_moves_the_point_of_rest_away_from_the_unclipped_one(p, b, lam):
    assert clip_exit(p, b, 2.0) < lam < runaway(p, b, 2.0)
    (found,) = settle([p], [b], lam=lam, clip=2.0)
    assert found == pytest.approx(settled_mass(p, b, 2.0, lam), abs=1e-4)
    assert abs(found - fixed_point(p, b, lam)) > 0.005


@settings(deadline=None, max_examples=25)
@given(pb=positions(highest=0.95), clip=st.floats(1.2, 5.0), above=st.floats(0.05, 2.0))
def test_above_the_runaway_the_tail_never_stops_shrinking(pb, clip, above):
    """`above` × log c of net drive is left when every ratio has saturated."""
    p, b = pb
    runs = max(1 + (runaway(*pair, clip) - 1) for pair in zip(p, b, strict=True))
    smallest_gap = min(logit(x) - logit(y) for x, y in zip(p, b, strict=True))
    lam = runs + above * math.log(clip) / smallest_gap
    teacher, base = (two_classes(torch.logit(column(mass))) for mass in (p, b))
    start = torch.logit(column(b))
    tails = [
        (-logits).sigmoid()
        for logits in descend(start, teacher, base, rate=0.5, num_steps=200, lam=lam, clip=clip)
    ]
    shrinking = torch.stack(tails).diff(dim=0)
    assert (shrinking < 0).all()
    # dz/ds ≥ q(1 − q)·κ throughout: from b on, at least as far as F(z) = F(z_b) + κ·s allows.
    for pair, reached in zip(zip(p, b, strict=True), tails[-1].tolist(), strict=True):
        kappa = (lam - runaway(*pair, clip)) * (logit(pair[0]) - logit(pair[1]))
        z = logit(1 - reached)
        passed = [2 * math.sinh(x) + 2 * x for x in (z, logit(pair[1]))]
        assert passed[0] - passed[1] > 0.95 * kappa * 100  # steps of 0.5; Euler runs a little late


def time_until(break_logit, p, b, c, lam, rate=4.0):
    """Learning rate × updates from the clip exit to `break_logit`; interpolates the last step."""
    teacher, base = (two_classes(torch.logit(column([mass]))) for mass in (p, b))
    before = logit(1 - (1 - p) / c)
    steps = descend(column([before]), teacher, base, rate=rate, num_steps=5000, lam=lam, clip=c)
    for count, logits in enumerate(steps):
        now = logits.item()
        if now >= break_logit:
            return rate * (count + (break_logit - before) / (now - before))
        before = now
    raise AssertionError(f"still at {now} after {count + 1} updates")


P, B, C, BREAK = 0.995, 0.4, 2.0, logit(0.9995)  # the tail shrinks from 0.0025 to 0.0005
DISTANCES = (0.08, 0.16, 0.24)  # λ − λ*


@functools.cache
def measured_times():
    star = lambda_star(P, B, C)
    return [time_until(BREAK, P, B, C, star + distance) for distance in DISTANCES]


def test_time_to_leave_is_that_of_the_closed_form():
    """log(q/p) < 0.005 adds to the force, 1.1 % of the smallest κ = 0.46; stated: 1.5 %."""
    star = lambda_star(P, B, C)
    predicted = [time_to_leave(P, B, C, star + distance, BREAK) for distance in DISTANCES]
    for measured, expected in zip(measured_times(), predicted, strict=True):
        assert measured == pytest.approx(expected, rel=0.015)
        assert measured > expected  # the side on which the closed form errs


def test_time_to_leave_goes_as_one_over_the_net_drive():
    scaled = [time * distance for time, distance in zip(measured_times(), DISTANCES, strict=True)]
    assert scaled == pytest.approx([scaled[-1]] * len(scaled), rel=0.01)


def test_onset_moves_towards_the_threshold_as_the_budget_law_says():
    """A budget of s leaves at λ: so λ is the onset at s, and rescales to those of other budgets."""
    star = lambda_star(P, B, C)
    first, *others = zip(measured_times(), DISTANCES, strict=True)
    for budget, distance in others:
        predicted = rescale_onset(star, star + first[1], first[0], budget)
        assert predicted - star == pytest.approx(distance, rel=0.01)


@settings(deadline=None, max_examples=25)
@given(
    pb=positions(highest=0.95),
    clip=st.floats(1.2, 5.0),
    lam=st.floats(1.0, 50.0),
    delta=st.floats(0.5, 1.0),
)
def test_bounded_with_half_comes_to_rest_inside_the_clip_for_every_lambda(pb, clip, lam, delta):
    p, b = pb
    bound = (1 - delta) * math.log(clip)
    expected = []
    for teacher, base in zip(p, b, strict=True):
        modal = min(bound, (lam - 1) * math.log(teacher / base))
        rest = max(-bound, (lam - 1) * math.log((1 - teacher) / (1 - base)))
        expected.append(1 / (1 + math.exp(rest - modal - logit(teacher))))
    found = settle(p, b, lam=lam, clip=clip, extrapolation="bounded", delta=delta)
    assert found == pytest.approx(expected, abs=1e-5)
    for mass, teacher in zip(found, p, strict=True):
        assert (1 - teacher) / (1 - mass) < clip * (1 + 1e-4)
        assert mass / teacher < clip * (1 + 1e-4)


@pytest.mark.parametrize(("delta", "settles"), [(0.2, False), (0.27, False), (0.35, True)])
def test_bounded_with_too_small_a_delta_runs_away(delta, settles):
    """p = 0.767, c = 2: the smallest δ is 0.309. Tails after 500 and 5,000 units of time."""
    assert bounded_has_fixed_point(0.767, 2.0, delta) == settles
    teacher, base = (two_classes(torch.logit(column([mass]))) for mass in (0.767, 0.288))
    options = dict(lam=5.0, clip=2.0, extrapolation="bounded", delta=delta)
    start = torch.logit(column([0.288]))
    steps = list(descend(start, teacher, base, rate=4.0, num_steps=1250, **options))
    early, late = ((-steps[index]).sigmoid().item() for index in (124, 1249))
    if settles:
        # The drive 2(1 − δ)·log c against log c + log(q/p).
        assert late == pytest.approx(1 - 0.767 * 2.0 ** (1 - 2 * delta), rel=0.01)
    else:
        assert late < 0.35 * early


@settings(deadline=None, max_examples=25)
@given(pb=positions(), clip=st.floats(1.2, 5.0), share=shares)
def test_a_teacher_below_the_base_drags_the_student_past_it(pb, clip, share):
    p, b = ([1 - mass for mass in column] for column in pb)  # p < b
    exits = [clip_exit(1 - x, 1 - y, clip) for x, y in zip(p, b, strict=True)]
    lam = 1 + share * (min(exits) - 1)
    found = settle(p, b, lam=lam, clip=clip)
    expected = [reversed_mass(*pair, lam) for pair in zip(p, b, strict=True)]
    assert found == pytest.approx(expected, abs=1e-5)
    for mass, teacher, base in zip(found, p, b, strict=True):
        assert mass <= teacher + 1e-5 < base


def test_a_teacher_below_the_base_runs_away_downwards():
    runs = reversed_runaway(0.8, 0.9, 2.0)
    teacher, base = (two_classes(torch.logit(column([mass]))) for mass in (0.8, 0.9))
    options = dict(rate=2.0, num_steps=1500, clip=2.0)
    start = torch.logit(column([0.9]))
    held = last(descend(start, teacher, base, lam=1 + 0.9 * (runs - 1), **options))
    assert held.sigmoid().item() == pytest.approx(
        settled_mass(0.8, 0.9, 2.0, 1 + 0.9 * (runs - 1)), abs=1e-4
    )
    lost = [z.item() for z in descend(start, teacher, base, lam=1 + 1.1 * (runs - 1), **options)]
    assert all(after < before for before, after in itertools.pairwise(lost))
    assert lost[-1] < logit(0.02)


def vocabulary(modal, tail):
    """[N, K] log-probabilities: `modal` [N] on token 0, the rest spread as `tail` [K − 1]."""
    modal = column(modal)[:, None]
    return torch.cat([modal.log(), (1 - modal).log() + column(tail).log()], -1)


TAIL = [0.4, 0.3, 0.2, 0.1]
TEACHERS, BASES = [0.6, 0.767, 0.85], [0.3, 0.288, 0.5]


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_positions_of_many_tokens_come_to_rest_at_the_class_masses(share):
    """Teacher and base spread the tail alike; the student starts with another spread."""
    lam = 1 + share * (min(map(clip_exit, TEACHERS, BASES, [2.0] * 3)) - 1)
    steps = descend(
        vocabulary(BASES, [0.1, 0.1, 0.3, 0.5]),
        vocabulary(TEACHERS, TAIL),
        vocabulary(BASES, TAIL),
        rate=1.0,
        num_steps=3000,
        still=1e-7,
        policy=softmax,
        lam=lam,
        clip=2.0,
    )
    masses = last(steps).softmax(-1)
    expected = list(map(fixed_point, TEACHERS, BASES, [lam] * 3))
    assert masses[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
    spread = (masses[:, 1:] / (1 - masses[:, :1])).flatten().tolist()
    assert spread == pytest.approx(TAIL * 3, abs=1e-3)


def test_positions_of_many_tokens_settle_between_exit_and_runaway_and_run_away_beyond():
    """λ* = 1.331, exit at 1.398, runaway at 1.457."""
    teacher, base = vocabulary([0.767], TAIL), vocabulary([0.288], TAIL)
    options = dict(rate=1.0, num_steps=2500, policy=softmax, clip=2.0)
    settled = last(descend(base, teacher, base, lam=1.42, **options)).softmax(-1)[0, 0].item()
    assert settled == pytest.approx(settled_mass(0.767, 0.288, 2.0, 1.42), abs=1e-3)
    tails = [
        1 - logits.softmax(-1)[0, 0].item()
        for logits in descend(base, teacher, base, lam=1.6, **options)
    ]
    assert all(after < before for before, after in itertools.pairwise(tails))
    assert tails[-1] < 0.01


@pytest.mark.parametrize("stale", [False, True], ids=["on policy", "one update late"])
def test_sampled_tokens_lead_to_the_same_masses(stale):
    """2,048 tokens a position and update, drawn from the policy or its predecessor; the mean of
    the last 200 updates. Tolerance 0.01: a dozen standard errors."""
    lam = 1.3
    assert all(lam < clip_exit(p, b, 2.0) for p, b in zip(TEACHERS, BASES, strict=True))
    generator = torch.Generator().manual_seed(0)
    num_samples = 2048
    teacher, base = vocabulary(TEACHERS, TAIL), vocabulary(BASES, TAIL)
    logits = base.clone().requires_grad_()
    sampler = base
    seen = []
    for _ in range(600):
        learner = softmax(logits)
        if not stale:
            sampler = learner.detach()
        tokens = torch.multinomial(sampler.exp(), num_samples, True, generator=generator)
        of_learner, of_sampler, of_teacher, of_base = (
            values.gather(-1, tokens) for values in (learner, sampler, teacher, base)
        )
        advantages = opd_advantages(of_learner, of_teacher, of_base, lam=lam, clip=2.0)
        loss = opd_loss(of_learner, of_sampler, advantages, ratio_clip=0.2, num_tokens=num_samples)
        (gradient,) = torch.autograd.grad(loss, logits)
        sampler = learner.detach()
        with torch.no_grad():
            logits -= 0.5 * gradient
        seen.append(logits.detach().softmax(-1)[:, 0])
    found = torch.stack(seen[-200:]).mean(0).tolist()
    expected = list(map(fixed_point, TEACHERS, BASES, [lam] * 3))
    assert found == pytest.approx(expected, abs=0.01)
    for mass, teacher_mass in zip(found, TEACHERS, strict=True):
        assert mass > teacher_mass + 0.02  # beyond the teacher
