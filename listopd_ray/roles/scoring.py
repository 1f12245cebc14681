"""What models say of completions: columns of numbers, one for every completion token.

N completion tokens of a batch, flat in order · n of them at once · V vocabulary · S support · M
places where an item id is due · U tokens that may begin one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from listopd_ray.config import TeacherActorConfig
from listopd_ray.roles.batching import Batch, hidden_states
from listopd_ray.roles.head import logits_by_chunk
from listopd_ray.task.contract import IdTokens, TokenText, scan
from listopd_ray.types import Rollout, ScoredRollout, TokenClass

LOGITS_MIB = 256  # of float32 logits at once: N × V of a large vocabulary are gigabytes

Columns = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Places:
    """Where the contract stands at each of N completion tokens."""

    classes: np.ndarray  # [N] int8, `TokenClass`
    due: np.ndarray  # [M] int64, which of the N are the first token of an id, rising
    starts: np.ndarray  # [M, U] int64, tokens that begin an unused id there, −1 after the last


class Contract:
    """The contract's view of rollouts, in the tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._text = TokenText(tokenizer, end_ids)
        self._id_tokens: dict[int, IdTokens] = {}  # by K

    def places(self, rollouts: Sequence[Rollout]) -> Places:
        classes, due, starts, first = [], list[int](), list[np.ndarray](), 0
        for rollout in rollouts:
            token_ids, num_items = rollout.token_ids, rollout.prompt.num_items
            scanned = scan(self._text.pieces(token_ids), num_items, self._text.ended(token_ids))
            classes.append(scanned.classes)
            for position, unused in enumerate(scanned.unused):
                if unused is not None:
                    due.append(first + position)
                    starts.append(self._first_tokens(num_items, unused))
            first += len(token_ids)
        padded = np.full((len(due), max(map(len, starts), default=0)), -1, dtype=np.int64)
        for row, ids in enumerate(starts):
            padded[row, : len(ids)] = ids
        return Places(np.concatenate(classes), np.array(due, dtype=np.int64), padded)

    def _first_tokens(self, num_items: int, unused: frozenset[int]) -> np.ndarray:
        if num_items not in self._id_tokens:
            self._id_tokens[num_items] = IdTokens(self._tokenizer, num_items)
        return self._id_tokens[num_items].first_tokens(unused)


def special_ids(tokenizer: Any, end_ids: tuple[int, ...]) -> np.ndarray:
    """Ids, ascending, of special tokens other than `end_ids`: no part of any answer."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    return np.array(sorted(special - set(end_ids)), dtype=np.int64)


def teacher_columns(
    model: PreTrainedModel,
    batch: Batch,
    places: Places,
    config: TeacherActorConfig,
    excluded: np.ndarray,
) -> Columns:
    """The teacher's fields of `ScoredRollout`, under the distribution that `config` asks for; the
    tokens `excluded` never enter the support."""
    device = batch.token_ids.device
    is_id = torch.from_numpy(places.classes == TokenClass.ITEM_ID).to(device)
    heat = torch.where(is_id, config.id_temperature, config.temperature).unsqueeze(-1)
    is_heated = config.temperature != 1.0 or config.id_temperature != 1.0
    masked = torch.from_numpy(excluded).to(device)

    def logprobs(logits: torch.Tensor, total: torch.Tensor, size: int) -> torch.Tensor:
        plain, share = logits - total, config.uniform_share
        return torch.log((1 - share) * plain.exp() + share / size) if share else plain

    parts = []
    for chunk, raw in _chunks(model, batch):
        logits = raw / heat[chunk] if is_heated else raw  # [n, V]
        total, size = logits.logsumexp(dim=-1, keepdim=True), logits.shape[-1]
        sampled = logits.gather(-1, batch.token_ids[chunk].unsqueeze(-1))
        modal, modal_ids = logits.max(dim=-1, keepdim=True)
        picked, due, begins = _starts(logits, places, chunk)
        columns = {
            "teacher_logprobs": logprobs(sampled, total, size).squeeze(-1),
            "modal_ids": modal_ids.int().squeeze(-1),
            "teacher_modal_logprobs": logprobs(modal, total, size).squeeze(-1),
            "teacher_unused_mass": _mass(logprobs(picked, total[due], size), due, begins, total),
        }
        if config.support_size:  # the logits are no longer needed
            support, ids = logits.index_fill_(-1, masked, -torch.inf).topk(config.support_size)
            columns |= {
                "support_ids": ids.int(),
                "support_logprobs": logprobs(support, total, size),
            }
        parts.append(columns)
    return _joined(parts)


def base_columns(model: PreTrainedModel, batch: Batch, places: Places, teacher: Columns) -> Columns:
    """The base's fields of `ScoredRollout`: on the tokens that the teacher's columns name."""
    named = [teacher["modal_ids"][:, None]]
    if "support_ids" in teacher:
        named.append(teacher["support_ids"])
    asked = torch.from_numpy(np.concatenate(named, axis=1)).to(batch.token_ids.device)
    asked = torch.cat([batch.token_ids.unsqueeze(-1), asked], dim=1)  # [N, 2 + S]
    parts = []
    for chunk, logits in _chunks(model, batch):
        total = logits.logsumexp(dim=-1, keepdim=True)
        logprobs = logits.gather(-1, asked[chunk]) - total
        picked, due, begins = _starts(logits, places, chunk)
        columns = {
            "base_logprobs": logprobs[:, 0],
            "base_modal_logprobs": logprobs[:, 1],
            "base_unused_mass": _mass(picked - total[due], due, begins, total),
        }
        if "support_ids" in teacher:
            columns["base_support_logprobs"] = logprobs[:, 2:]
        parts.append(columns)
    return _joined(parts)


def split_columns(rollouts: Sequence[Rollout], columns: Columns) -> list[ScoredRollout]:
    """Each rollout with its part of the columns; where there are none, its fields are None."""
    names = ("base_logprobs", "base_modal_logprobs", "base_unused_mass")
    absent: dict[str, Any] = {name: None for name in names if name not in columns}
    scored, stop = [], 0
    for rollout in rollouts:
        start, stop = stop, stop + len(rollout.token_ids)
        parts = {name: column[start:stop] for name, column in columns.items()}
        scored.append(ScoredRollout(rollout=rollout, **absent, **parts))
    return scored


def _chunks(model: PreTrainedModel, batch: Batch) -> Iterator[tuple[slice, torch.Tensor]]:
    """Float32 logits [n, V] at the positions that predict the completion tokens, to be changed at
    will. The head runs at those positions only."""
    weight = model.get_output_embeddings().weight
    return logits_by_chunk(hidden_states(model, batch), weight, LOGITS_MIB)


def _starts(
    logits: torch.Tensor, places: Places, chunk: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [m, U] of the tokens that may begin an id in this chunk, the rows [m] of `logits`
    where one is due, and which of the tokens there are: the others fill up."""
    low, high = np.searchsorted(places.due, (chunk.start, chunk.start + len(logits)))
    due = torch.from_numpy(places.due[low:high] - chunk.start).to(logits.device)
    starts = torch.from_numpy(places.starts[low:high]).to(logits.device)
    return logits[due.unsqueeze(-1), starts.clamp(min=0)], due, starts >= 0


def _mass(
    logprobs: torch.Tensor, due: torch.Tensor, begins: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """Probability [n] of the tokens that begin an id, at the rows `due`; NaN elsewhere."""
    mass = total.new_full((len(total),), torch.nan)
    mass[due] = (logprobs.exp() * begins).sum(dim=-1)
    return mass


def _joined(parts: Sequence[dict[str, torch.Tensor]]) -> Columns:
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
