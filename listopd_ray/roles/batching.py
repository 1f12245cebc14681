"""From ragged sequences to tensors and back: padding, and the one place that shifts.

B sequences · L padded length · N completion tokens of all sequences, flat in order ·
H hidden size · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


def collate_rollouts(rollouts: Sequence[Rollout], device: str = "cpu") -> Batch:
    return collate([r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts], device)


def hidden_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """[N, H]: what the head makes the completion tokens' logits of."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
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
