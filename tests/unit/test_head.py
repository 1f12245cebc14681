"""Log-probabilities chunk by chunk are those of the whole, forward and backward."""

import pytest
import torch

from listopd_ray.roles import head
from listopd_ray.roles.head import token_logprobs

N, H, V = 50, 16, 3000  # 1 MiB of float32 logits are 87 rows of it


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    ids = torch.randint(0, V, (N, 3), generator=generator)
    ids[:, 2] = ids[:, 0]  # asked for twice: both count
    slope = torch.randn(N, 3, generator=generator)
    return hidden, weight, ids, slope


def by_autograd(hidden, weight, ids, slope):
    hidden, weight = (t.double().requires_grad_() for t in (hidden, weight))
    logprobs = torch.log_softmax(hidden @ weight.T, dim=-1).gather(-1, ids)
    (logprobs * slope).sum().backward()
    return logprobs.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("rows", [1, 7, N, N + 1])
def test_values_and_gradients_do_not_depend_on_the_chunk(inputs, monkeypatch, rows):
    hidden, weight, ids, slope = inputs
    expected = by_autograd(*inputs)
    hidden, weight = (t.clone().requires_grad_() for t in (hidden, weight))
    logprobs = head._TokenLogprobs.apply(hidden, weight, ids, rows)
    (logprobs * slope).sum().backward()
    # Float32 against double precision; the logits reach ±15.
    assert torch.allclose(logprobs.double(), expected[0], atol=1e-5, rtol=0)
    for ours, theirs in ((hidden.grad, expected[1]), (weight.grad, expected[2])):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_no_more_logits_than_allowed_exist_at_once(inputs, monkeypatch):
    hidden, weight, ids, _ = inputs
    sizes = []
    product = head._logits

    def watched(chunk, matrix):
        logits = product(chunk, matrix)
        sizes.append(logits.numel() * logits.element_size())
        return logits

    monkeypatch.setattr(head, "_logits", watched)
    many = hidden.repeat(4, 1).requires_grad_()
    token_logprobs(many, weight.requires_grad_(), ids.repeat(4, 1), 1).sum().backward()
    assert len(sizes) == 6  # 87 rows of 200 at a time, there and back
    assert max(sizes) <= 1 << 20


def test_a_frozen_head_gets_no_gradient(inputs):
    hidden, weight, ids, slope = inputs
    expected = by_autograd(*inputs)[1]
    hidden.requires_grad_()
    (token_logprobs(hidden, weight, ids, 256) * slope).sum().backward()
    assert weight.grad is None
    assert torch.allclose(hidden.grad.double(), expected, atol=1e-4)


def test_bfloat16_inputs_give_float32_logprobs_of_their_exact_product(inputs):
    hidden, weight, ids, slope = inputs
    half = (hidden.bfloat16(), weight.bfloat16())
    logprobs = token_logprobs(*half, ids, 256)
    assert logprobs.dtype == torch.float32
    exact, _, _ = by_autograd(*(t.double() for t in half), ids, slope)
    assert torch.allclose(logprobs.double(), exact, atol=1e-5, rtol=0)


def test_autocast_leaves_the_head_alone(inputs):
    hidden, weight, ids, _ = inputs
    alone = token_logprobs(hidden, weight, ids, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_logprobs(hidden, weight, ids, 256), alone)
