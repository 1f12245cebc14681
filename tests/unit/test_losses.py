import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from listopd_ray.roles.losses import TokenScores, Update, opd_advantages, opd_loss, support_loss

LN2 = math.log(2)

logprobs = st.floats(-12.0, 0.0)
# One column for each of learner, sampler, teacher, base.
tokens = st.lists(st.tuples(logprobs, logprobs, logprobs, logprobs), min_size=1, max_size=12)


def columns(rows):
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]


def random_columns(seed, n, spread=1.0):
    """Learner, sampler, teacher, base log-probabilities; the first two close to each other."""
    rng = np.random.default_rng(seed)
    learner = -rng.uniform(0.1, 4.0, n)
    sampler = learner + rng.normal(0, 0.3, n)
    teacher, base = (learner + rng.normal(0, spread, n) for _ in range(2))
    return [torch.tensor(column) for column in (learner, sampler, teacher, base)]


@settings(deadline=None)
@given(
    rows=tokens,
    lam=st.one_of(st.just(1.0), st.floats(0.0, 5.0)),
    clip=st.one_of(st.just(math.inf), st.floats(1.01, 20.0)),
    extrapolation=st.sampled_from(["plain", "bounded"]),
    delta=st.floats(0.0, 1.0),
    ratio_clip=st.floats(0.01, 0.9),
)
def test_loss_matches_the_loop_written_oracle(rows, lam, clip, extrapolation, delta, ratio_clip):
    assume(not (extrapolation == "bounded" and math.isinf(clip)))  # the configuration refuses it
    learner, sampler, teacher, base = columns(rows)
    options = dict(lam=lam, clip=clip, extrapolation=extrapolation, delta=delta)
    num_tokens = len(rows) + 3  # of the whole update, of which this is a part

    advantages = opd_advantages(learner, teacher, base, **options)
    loss = opd_loss(learner, sampler, advantages, ratio_clip=ratio_clip, num_tokens=num_tokens)

    expected = [oracles.advantage(row[0], row[2], row[3], **options) for row in rows]
    # Double precision; the two sides add in another order.
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert loss.item() == pytest.approx(
        oracles.loss(
            [row[0] for row in rows],
            [row[1] for row in rows],
            expected,
            ratio_clip=ratio_clip,
            num_tokens=num_tokens,
        ),
        rel=1e-10,
        abs=1e-10,
    )


@pytest.mark.parametrize(
    ("ratio", "gain", "loss"),
    [
        (1.5, 1.0, -1.2),  # the gain is capped
        (1.5, -1.0, 1.5),  # the loss is not: pessimistic
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.8),
        (1.1, 2.0, -2.2),  # inside the region
        (0.9, -2.0, 1.8),
    ],
)
def test_ratio_clip_takes_the_pessimistic_side(ratio, gain, loss):
    result = opd_loss(
        torch.tensor([math.log(ratio)], dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([gain], dtype=torch.float64),
        ratio_clip=0.2,
        num_tokens=1,
    )
    assert result.item() == pytest.approx(loss, abs=1e-12)


def test_gradient_matches_finite_differences_with_the_advantages_held_fixed():
    learner, sampler, teacher, base = random_columns(0, 64)
    ratio = (learner - sampler).exp()
    assert ((ratio - 1).abs() > 0.2).sum() > 10, "some tokens must lie outside the region"
    assert ((ratio - 1).abs() - 0.2).abs().min() > 1e-4, "no token on the kink itself"

    def loss_at(logprobs):
        return opd_loss(logprobs, sampler, advantages, ratio_clip=0.2, num_tokens=80)

    learner.requires_grad_()
    advantages = opd_advantages(learner, teacher, base, lam=1.7, clip=2.0)
    loss_at(learner).backward()
    assert not advantages.requires_grad

    step = 1e-6
    with torch.no_grad():
        for index in range(len(learner)):
            shift = torch.zeros_like(learner)
            shift[index] = step
            slope = (loss_at(learner + shift) - loss_at(learner - shift)) / (2 * step)
            # Central differences: step² of truncation, 1e-16/step of rounding.
            assert learner.grad[index].item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize(
    ("ratio", "gain", "sign"),
    [
        (1.0, 1.0, -1),  # descent raises the log-probability of what the teacher likes better
        (1.0, -1.0, 1),
        (1.3, 1.0, 0),  # raised far enough
        (1.3, -1.0, 1),
        (0.7, 1.0, -1),
        (0.7, -1.0, 0),
    ],
)
def test_gradient_has_the_sign_of_the_advantage_until_the_ratio_leaves_its_region(
    ratio, gain, sign
):
    learner = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    opd_loss(learner, zero, torch.tensor([gain]), ratio_clip=0.2, num_tokens=1).backward()
    assert np.sign(learner.grad.item()) == sign


def test_parts_of_a_batch_add_up_to_the_whole():
    learner, sampler, teacher, base = random_columns(1, 30)
    advantages = opd_advantages(learner, teacher, base, lam=1.3, clip=2.0)
    arguments = dict(ratio_clip=0.2, num_tokens=30)
    whole = opd_loss(learner, sampler, advantages, **arguments)
    parts = [
        opd_loss(learner[part], sampler[part], advantages[part], **arguments)
        for part in (slice(0, 1), slice(1, 12), slice(12, 30))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("extrapolation", ["plain", "bounded"])
def test_lambda_one_is_plain_distillation_bit_for_bit_and_ignores_the_base(extrapolation):
    learner, _, teacher, base = (column.float() for column in random_columns(2, 100))
    plain = (teacher - learner).clamp(-LN2, LN2)
    garbage = torch.full_like(base, float("nan"))
    for any_base in (None, base, garbage):
        advantages = opd_advantages(
            learner, teacher, any_base, lam=1.0, clip=2.0, extrapolation=extrapolation, delta=0.2
        )
        assert advantages.numpy().tobytes() == plain.numpy().tobytes()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.5, 4.0])
def test_without_clip_the_advantage_is_that_of_reward_extrapolation(lam):
    learner, _, teacher, base = random_columns(3, 100, spread=3.0)
    advantages = opd_advantages(learner, teacher, base, lam=lam, clip=math.inf)
    extrapolated = lam * (teacher - base) - (learner - base)
    assert advantages.numpy() == pytest.approx(extrapolated.numpy(), abs=1e-12)  # double precision


@pytest.mark.parametrize("lam", [0.0, 0.999, 1.2])
def test_lambda_other_than_one_without_a_base_is_an_error(lam):
    learner, _, teacher, _ = random_columns(4, 3)
    with pytest.raises(ValueError, match="base"):
        opd_advantages(learner, teacher, None, lam=lam, clip=2.0)


@pytest.mark.parametrize("delta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("lam", [0.0, 1.5, 50.0])
def test_bounded_drive_never_exceeds_its_share_of_the_clip(lam, delta):
    learner, _, _, base = random_columns(5, 200, spread=3.0)
    teacher = learner  # no imitation term: what is left is the drive
    options = dict(lam=lam, clip=2.0, delta=delta)
    drive = opd_advantages(learner, teacher, base, extrapolation="bounded", **options)
    plain = opd_advantages(learner, teacher, base, extrapolation="plain", **options)
    bound = (1 - delta) * LN2
    assert drive.abs().max() <= bound
    inside = plain.abs() <= bound
    assert torch.equal(drive[inside], plain[inside])
    assert (drive[~inside] == plain[~inside].sign() * bound).all()
    if lam == 50.0:
        assert (~inside).sum() > 150, "the bound must have something to do"


def test_a_ratio_beyond_reason_stays_finite():
    learner = torch.tensor([0.0, -200.0], requires_grad=True)
    sampler = torch.tensor([-200.0, 0.0])
    loss = opd_loss(learner, sampler, torch.tensor([-1.0, -1.0]), ratio_clip=0.2, num_tokens=2)
    loss.backward()
    assert loss.isfinite()
    assert learner.grad.isfinite().all()


def five_token_vocabulary(seed):
    rng = np.random.default_rng(seed)
    logits, teacher, base = (torch.tensor(rng.normal(0, 1.5, 5)) for _ in range(3))
    return logits, teacher.log_softmax(-1), base.log_softmax(-1)


def expected_gradient(logits, teacher, base, **options):
    """Σ_k π_k · ∇ loss(k) over the vocabulary: the mean of what sampling would give."""
    total = torch.zeros_like(logits)
    for token in range(len(logits)):
        leaf = logits.clone().requires_grad_()
        learner = leaf.log_softmax(-1)[token : token + 1]
        at = slice(token, token + 1)
        advantages = opd_advantages(learner, teacher[at], base[at], **options)
        opd_loss(learner, learner.detach(), advantages, ratio_clip=0.2, num_tokens=1).backward()
        total += learner.detach().exp() * leaf.grad
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        dict(lam=1.0, clip=2.0),
        dict(lam=1.8, clip=2.0),
        dict(lam=1.8, clip=1.3),
        dict(lam=3.0, clip=2.0, extrapolation="bounded", delta=0.2),
    ],
    ids=str,
)
def test_expected_gradient_over_the_vocabulary_is_the_policy_gradient(seed, options):
    logits, teacher, base = five_token_vocabulary(seed)
    probabilities = logits.softmax(-1).tolist()
    gains = [
        oracles.advantage(math.log(q), t, b, **options)
        for q, t, b in zip(probabilities, teacher.tolist(), base.tolist(), strict=True)
    ]
    mean = sum(q * gain for q, gain in zip(probabilities, gains, strict=True))
    closed_form = [-q * (gain - mean) for q, gain in zip(probabilities, gains, strict=True)]
    gradient = expected_gradient(logits, teacher, base, **options)
    assert gradient.tolist() == pytest.approx(closed_form, abs=1e-12)


def test_expected_gradient_without_clip_is_that_of_the_reverse_kl():
    logits, teacher, base = five_token_vocabulary(7)
    leaf = logits.clone().requires_grad_()
    learner = leaf.log_softmax(-1)
    (learner.exp() * (learner - teacher)).sum().backward()  # KL(π_θ ‖ π_T)
    gradient = expected_gradient(logits, teacher, base, lam=1.0, clip=math.inf)
    assert gradient.tolist() == pytest.approx(leaf.grad.tolist(), abs=1e-12)


OPTIONS = [
    dict(lam=1.0, clip=2.0),
    dict(lam=1.8, clip=2.0),
    dict(lam=3.0, clip=2.0, extrapolation="bounded", delta=0.2),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_topk_over_the_whole_vocabulary_is_the_mean_of_the_sampled_estimator(options):
    logits, teacher, base = five_token_vocabulary(3)
    leaf = logits.clone().requires_grad_()
    rows = (part[None] for part in (leaf.log_softmax(-1), teacher, base))
    support_loss(*rows, torch.ones(1), num_tokens=1, **options).backward()
    expected = expected_gradient(logits, teacher, base, **options)
    assert leaf.grad.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_topk_matches_the_loop_written_oracle(options):
    """Three of five tokens, each model renormalised over them."""
    logits, teacher, base = five_token_vocabulary(4)
    support = [4, 0, 2]

    def renormalised(logprobs):
        total = sum(math.exp(logprobs[token]) for token in support)
        return [logprobs[token] - math.log(total) for token in support]

    models = [logits.log_softmax(-1), teacher, base]
    triples = list(zip(*(renormalised(m.tolist()) for m in models), strict=True))
    expected = -sum(math.exp(q) * oracles.advantage(q, t, b, **options) for q, t, b in triples)
    rows = [model[support][None] for model in models]
    loss = support_loss(*rows, torch.full((1,), 0.25), num_tokens=2, **options)
    assert loss.item() == pytest.approx(0.25 * expected / 2, abs=1e-12)


def test_topk_at_lambda_one_without_clip_is_the_truncated_reverse_kl():
    logits, teacher, _ = five_token_vocabulary(5)
    gradients = []
    for closed_form in (True, False):
        leaf = logits.clone().requires_grad_()
        learner, target = leaf[:3].log_softmax(-1), teacher[:3].log_softmax(-1)
        if closed_form:
            (learner.exp() * (learner - target)).sum().backward()
        else:
            inside = leaf.log_softmax(-1)[:3]
            options = dict(lam=1.0, clip=math.inf, num_tokens=1)
            support_loss(inside[None], teacher[:3][None], None, torch.ones(1), **options).backward()
        gradients.append(leaf.grad.tolist())
    assert gradients[0] == pytest.approx(gradients[1], abs=1e-12)
    assert gradients[0][3:] == [0.0, 0.0]  # tokens outside take no part


@pytest.mark.parametrize(
    ("importance", "ratio", "weight"),
    [
        ("truncate", 0.1, 0.1),
        ("truncate", 1.9, 1.9),
        ("truncate", 3.0, 2.0),
        ("gate", 0.6, 0.6),
        ("gate", 1.9, 1.9),
        ("gate", 0.4, 0.0),
        ("gate", 2.1, 0.0),
    ],
)
@pytest.mark.parametrize("gain", [0.7, -0.7])
def test_importance_weights_multiply_the_policy_gradient(importance, ratio, weight, gain):
    learner = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    sampler = torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64)
    loss = opd_loss(
        learner,
        sampler,
        torch.tensor([gain], dtype=torch.float64),
        ratio_clip=0.2,
        importance=importance,
        ratio_cap=2.0,
        num_tokens=4,
    )
    loss.backward()
    assert loss.item() == pytest.approx(-weight * gain / 4, abs=1e-12)
    assert learner.grad.item() == pytest.approx(-weight * gain / 4, abs=1e-12)


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
@pytest.mark.parametrize("importance", ["clip", "truncate", "gate"])
def test_the_update_weighs_every_estimator_as_its_options_say(estimator, importance):
    """Places whose sampled token has a ratio of 1 count fully, one with a ratio of 4 as told."""
    logits, teacher, base = (part.float() for part in five_token_vocabulary(6))
    learner = logits.log_softmax(-1)
    update = Update(lam=1.5, clip=2.0, estimator=estimator, importance=importance)

    def loss(ratio):
        scores = TokenScores(
            learner=learner[:1],
            sampler=learner[:1] - math.log(ratio),
            teacher=teacher[:1],
            base=base[:1],
            learner_support=learner[None],
            teacher_support=teacher[None],
            base_support=base[None],
        )
        return update.loss(scores, 1)[0].item()

    low, high = update.ratio_range
    whole = {"clip": estimator == "topk", "truncate": False, "gate": False}[importance]
    assert low <= 1 <= high and (low <= 4 <= high) == whole
    share = {"clip": 1.0 if estimator == "topk" else None, "truncate": 2.0, "gate": 0.0}[importance]
    if share is None:  # pessimistic: 1.2 of a gain, 4 of a loss
        share = 1.2 if loss(1.0) < 0 else 4.0
    assert loss(4.0) == pytest.approx(share * loss(1.0), abs=1e-6)
    assert abs(loss(1.0)) > 0.1
