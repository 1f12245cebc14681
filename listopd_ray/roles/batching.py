"""From ragged sequences to tensors and back: padding, and the one place that shifts.

B sequences · L padded length · N completion tokens of all sequences, flat in order ·
H hidden size · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from listopd_ray.types import Rollout


@dataclass(frozen=True, slots=True)
class Batch:
    input_ids: torch.Tensor  # [B, L], right-padded; causal attention never sees the padding
    rows: torch.Tensor  # [N] sequence of each completion token
    columns: torch.Tensor  # [N] position whose output predicts it: its own less one
    token_ids: torch.Tensor  # [N] the completion tokens
    # Of sequences with several completions of one prompt, which must not see each other:
    position_ids: torch.Tensor | None = None  # [B, L]
    attention_mask: torch.Tensor | None = None  # [B, 1, L, L] bool, True where a query sees a key

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()


def collate(
    prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], device: str = "cpu"
) -> Batch:
    """Pad `prompts[i] + completions[i]` on the right and index the completion tokens."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    input_ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : lengths[row]] = completion
    counts = [len(c) for c in completions]
    columns = [len(p) - 1 + np.arange(len(c)) for p, c in zip(prompts, completions, strict=True)]
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device),
        rows=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device),
        columns=torch.from_numpy(np.concatenate(columns)).to(device),
        token_ids=torch.from_numpy(np.concatenate(completions).astype(np.int64)).to(device),
    )


def collate_rollouts(
    rollouts: Sequence[Rollout], device: str = "cpu", *, share_prompts: bool = False
) -> Batch:
    """A batch whose completion tokens are in the order of `rollouts`.

    With `share_prompts` samples of one prompt are one sequence, in which the prompt comes once.
    """
    samples: dict[bytes, list[int]] = {}  # of each prompt
    for index, rollout in enumerate(rollouts):
        samples.setdefault(rollout.prompt.token_ids.tobytes(), []).append(index)
    if share_prompts and len(samples) < len(rollouts):
        return _collate_groups(rollouts, list(samples.values()), device)
    return collate([r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts], device)


def _collate_groups(
    rollouts: Sequence[Rollout], groups: Sequence[Sequence[int]], device: str
) -> Batch:
    """A sequence for each group of samples of one prompt: the prompt, then every completion but
    for its last token, after which nothing is asked."""
    first = [rollouts[group[0]].prompt.token_ids for group in groups]
    lengths = [
        len(prompt) + sum(len(rollouts[i].token_ids) - 1 for i in group)
        for prompt, group in zip(first, groups, strict=True)
    ]
    shape = (len(groups), max(lengths))
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    sample = np.zeros(shape, np.int64)  # whose token it is; 0: everybody's
    places: list[Any] = [None] * len(rollouts)  # (row, columns)
    for row, (prompt, group) in enumerate(zip(first, groups, strict=True)):
        end = len(prompt)
        input_ids[row, :end], position_ids[row, :end] = prompt, np.arange(end)
        for number, index in enumerate(group, start=1):
            fed = rollouts[index].token_ids[:-1]
            start, end = end, end + len(fed)
            input_ids[row, start:end], sample[row, start:end] = fed, number
            position_ids[row, start:end] = len(prompt) + np.arange(len(fed))
            places[index] = row, np.concatenate([[len(prompt) - 1], np.arange(start, end)])
    is_visible = (sample[:, None, :] == 0) | (sample[:, None, :] == sample[:, :, None])
    is_visible &= np.tri(shape[1], dtype=bool)
    counts = [len(columns) for _, columns in places]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    return Batch(
        input_ids=tensor(input_ids),
        rows=tensor(np.repeat([row for row, _ in places], counts)),
        columns=tensor(np.concatenate([columns for _, columns in places])),
        token_ids=tensor(np.concatenate([r.token_ids for r in rollouts]).astype(np.int64)),
        position_ids=tensor(position_ids),
        attention_mask=tensor(is_visible[:, None]),
    )


def sequence_lengths(rollouts: Sequence[Rollout], *, share_prompts: bool) -> list[int]:
    """Tokens of each rollout with its prompt. With `share_prompts` the samples of a prompt all have
    their longest's, so that `micro_batches` keeps them together."""
    lengths = [len(r.prompt.token_ids) + len(r.token_ids) for r in rollouts]
    if not share_prompts:
        return lengths
    prompts = [rollout.prompt.token_ids.tobytes() for rollout in rollouts]
    longest: dict[bytes, int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))
    return [longest[prompt] for prompt in prompts]


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether a mask alone says which earlier tokens a token sees: every layer attends to all of
    them, by `scaled_dot_product_attention`, which takes one."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = getattr(config, "sliding_window", None) is not None or model._is_stateful
    return config._attn_implementation == "sdpa" and kinds == {"full_attention"} and not windows


def hidden_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """[N, H]: what the head makes the completion tokens' logits of."""
    hidden = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    ).last_hidden_state
    return hidden[batch.rows, batch.columns]


def completion_logprobs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """log-softmax [N, V] in float32 at the positions that predict the completion tokens.

    The head runs at those positions only, never over prompts and padding.
    """
    logits = model.get_output_embeddings()(hidden_states(model, batch))
    return torch.log_softmax(logits.float(), dim=-1)


def micro_batches(lengths: Sequence[int], size: int, max_tokens: int = 0) -> Iterator[list[int]]:
    """Indices in groups of at most `size`, of like length, longest first: little padding.

    With `max_tokens` a group, padded, has no more tokens than that; a longer sequence is alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    while order:
        fits = max(1, min(size, max_tokens // lengths[order[0]])) if max_tokens else size
        yield order[:fits]
        order = order[fits:]


def gather(logprobs: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """logprobs[n, token_ids[n]] for each n."""
    return logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
