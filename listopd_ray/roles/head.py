"""The output head at completion positions: log-probabilities of chosen tokens, chunk by chunk.

The logits of a batch are the largest tensor there is: [N, V] in float32 are 1.2 GB for 2,048
tokens and a vocabulary of 151,936. Here no more than `logits_mib` of them exist at a time, in the
backward pass either, where they are computed once more.

N completion tokens · H hidden size · V vocabulary · S tokens asked for at each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

MIB = 1 << 20


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, logits_mib: int
) -> torch.Tensor:
    """log-softmax(hidden @ weightᵀ) [N, S] at `token_ids` [N, S], float32 whatever the inputs are.

    Differentiable in `hidden` [N, H] and `weight` [V, H].
    """
    rows = max(1, logits_mib * MIB // (4 * weight.shape[0]))
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden, weight, token_ids, rows)


def logits_by_chunk(
    hidden: torch.Tensor, weight: torch.Tensor, logits_mib: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Float32 logits [n, V] of the positions of `hidden` [N, H], n at a time; for scoring alone."""
    rows = max(1, int(logits_mib * MIB) // (4 * weight.shape[0]))
    inputs, head = _operands(hidden, weight)
    for start in range(0, len(inputs), rows):
        yield slice(start, start + rows), _logits(inputs[start : start + rows], head)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, rows: int
    ) -> torch.Tensor:
        inputs, head = _operands(hidden, weight)
        picked, normalisers = [], []
        for chunk, ids in zip(inputs.split(rows), token_ids.split(rows), strict=True):
            logits = _logits(chunk, head)
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            picked.append(logits.gather(-1, ids) - normaliser)
            normalisers.append(normaliser)
        kept = logits if len(picked) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, token_ids, torch.cat(normalisers), kept)
        ctx.rows = rows
        return torch.cat(picked)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        hidden, weight, token_ids, normalisers, kept = ctx.saved_tensors
        inputs, head = _operands(hidden, weight)
        total = torch.zeros(head.shape, device=head.device) if ctx.needs_input_grad[1] else None
        to_hidden = []
        parts = (inputs, token_ids, normalisers, gradient)
        for chunk, ids, normaliser, part in zip(*(p.split(ctx.rows) for p in parts), strict=True):
            logits = _logits(chunk, head) if kept is None else kept
            # d logprob[s] / d logit[v] = [v is s] − softmax[v]
            slope = (logits - normaliser).exp_().mul_(-part.sum(dim=-1, keepdim=True))
            slope.scatter_add_(-1, ids, part)
            slope = slope.to(head.dtype)
            to_hidden.append(slope @ head)
            if total is not None:
                total += slope.T @ chunk
        to_weight = total.to(weight.dtype) if total is not None else None
        return torch.cat(to_hidden).to(hidden.dtype), to_weight, None, None


def _operands(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the product takes them. Bfloat16 stays what it is only where the sums of the product come
    out in float32: elsewhere rounded logits would make rounded log-probabilities."""
    if hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16:
        return hidden, weight
    return hidden.float(), weight.float()


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden @ weight.T
