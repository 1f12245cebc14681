"""The teacher: scores every sampled token under teacher and base in one call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from listopd_ray.config import TeacherActorConfig
from listopd_ray.models import end_ids, load_model, load_tokenizer
from listopd_ray.roles.batching import (
    collate_rollouts,
    completion_logprobs,
    gather,
    micro_batches,
)
from listopd_ray.roles.hf_engine import generate
from listopd_ray.roles.rollout import Generated, Request, make_rollout
from listopd_ray.task.contract import IdTokens, Scan, TokenText, scan
from listopd_ray.types import Rollout, ScoredRollout, StrPath, TokenClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    rollouts: tuple[ScoredRollout, ...]  # in the order of the rollouts
    seconds: float


class Teacher:
    """Holds the teacher and the bases that it was last asked to score with (λ ≠ 1 and the
    diagnostics need one), `num_bases` of them at most: as many as runs share this actor.

    Its own completions come from the teacher as it is; scores from the one that `config` reshapes.
    """

    def __init__(
        self,
        config: TeacherActorConfig,
        *,
        teacher_path: StrPath,
        dtype: str,
        device: str,
        num_bases: int = 1,
    ) -> None:
        self._config = config
        self._dtype, self._device = dtype, device
        self._teacher = load_model(teacher_path, dtype=dtype, device=device).eval()
        self._bases: dict[StrPath, PreTrainedModel] = {}  # by path, the last one used at the end
        self._num_bases = num_bases
        self._tokenizer = load_tokenizer(teacher_path)
        self._end_ids = end_ids(teacher_path, self._tokenizer)
        self._text = TokenText(self._tokenizer, self._end_ids)
        self._id_tokens: dict[int, IdTokens] = {}  # by K

    @torch.inference_mode()
    def score(self, generated: Generated, base_path: StrPath | None = None) -> Scored:
        """Scores under the teacher and, where one is given, the base."""
        start = time.perf_counter()
        base = self._base(base_path) if base_path else None
        rollouts = generated.rollouts
        lengths = [len(r.prompt.token_ids) + len(r.token_ids) for r in rollouts]
        scored: dict[int, ScoredRollout] = {}
        for group in micro_batches(lengths, self._config.micro_batch_size):
            batch = self._score_batch([rollouts[index] for index in group], base)
            scored.update(zip(group, batch, strict=True))
        ordered = tuple(scored[index] for index in range(len(rollouts)))
        return Scored(rollouts=ordered, seconds=time.perf_counter() - start)

    def score_with(self, model_path: StrPath, generated: Generated) -> Scored:
        """`score` with another checkpoint, as it is, in the teacher's place: the start-up gate."""
        teacher, config = self._teacher, self._config
        self._teacher = load_model(model_path, dtype=self._dtype, device=self._device).eval()
        self._config = TeacherActorConfig(micro_batch_size=config.micro_batch_size)
        try:
            return self.score(generated)
        finally:
            self._teacher, self._config = teacher, config

    def generate(
        self, requests: Sequence[Request], max_new_tokens: int, greedy: bool = False
    ) -> Generated:
        """The teacher's own completions, for its evaluation; version 0, it never changes."""
        start = time.perf_counter()
        rollouts = []
        for first in range(0, len(requests), 128):
            chunk = requests[first : first + 128]
            outputs = generate(
                self._teacher,
                chunk,
                greedy=greedy,
                end_ids=self._end_ids,
                max_new_tokens=max_new_tokens,
            )
            pairs = zip(chunk, outputs, strict=True)
            rollouts += [
                make_rollout(request, output, policy_version=0) for request, output in pairs
            ]
        return Generated(rollouts=tuple(rollouts), seconds=time.perf_counter() - start)

    def _base(self, path: StrPath) -> PreTrainedModel:
        if path in self._bases:
            self._bases[path] = self._bases.pop(path)
        else:
            while len(self._bases) >= self._num_bases:
                del self._bases[next(iter(self._bases))]
            options = dict(dtype=self._dtype, device=self._device)
            self._bases[path] = load_model(path, **options).eval()
        return self._bases[path]

    def _score_batch(
        self, rollouts: Sequence[Rollout], base_model: PreTrainedModel | None
    ) -> list[ScoredRollout]:
        batch = collate_rollouts(rollouts, self._device)
        scans = [self._scan(rollout) for rollout in rollouts]
        where, tokens = self._unused_tokens(rollouts, scans)
        classes = np.concatenate([s.classes for s in scans])
        teacher = self._reshape(completion_logprobs(self._teacher, batch), classes)  # [N, V]
        modal_logprobs, modal_ids = teacher.max(dim=-1)
        columns: dict[str, torch.Tensor | np.ndarray] = {
            "teacher_logprobs": gather(teacher, batch.token_ids),
            "modal_ids": modal_ids.int(),
            "teacher_modal_logprobs": modal_logprobs,
            "teacher_unused_mass": _mass(teacher, where, tokens),
            "token_classes": classes,
        }
        if self._config.support_size:
            support_logprobs, support_ids = teacher.topk(self._config.support_size, dim=-1)
            columns |= {"support_ids": support_ids.int(), "support_logprobs": support_logprobs}
        base_columns = ("base_logprobs", "base_modal_logprobs", "base_unused_mass")
        if base_model is not None:
            base = completion_logprobs(base_model, batch)
            columns |= {
                "base_logprobs": gather(base, batch.token_ids),
                "base_modal_logprobs": gather(base, modal_ids),
                "base_unused_mass": _mass(base, where, tokens),
            }
        arrays = {
            name: column if isinstance(column, np.ndarray) else column.cpu().numpy()
            for name, column in columns.items()
        }
        ends = np.cumsum([len(rollout.token_ids) for rollout in rollouts])
        missing = dict.fromkeys(base_columns) if base_model is None else {}
        return [
            ScoredRollout(
                rollout=rollout,
                **missing,  # type: ignore[arg-type]
                **{
                    name: array[end - len(rollout.token_ids) : end]
                    for name, array in arrays.items()
                },
            )
            for rollout, end in zip(rollouts, ends, strict=True)
        ]

    def _reshape(self, logprobs: torch.Tensor, classes: np.ndarray) -> torch.Tensor:
        """The teacher that the config asks for: sharpened, flattened or mixed with uniform."""
        config = self._config
        if config.temperature != 1.0 or config.id_temperature != 1.0:
            is_id = torch.from_numpy(classes == TokenClass.ITEM_ID).to(logprobs.device)
            temperature = torch.where(is_id, config.id_temperature, config.temperature)
            logprobs = torch.log_softmax(logprobs / temperature.unsqueeze(-1), dim=-1)
        if config.uniform_share:
            uniform = config.uniform_share / logprobs.shape[-1]
            logprobs = torch.log((1 - config.uniform_share) * logprobs.exp() + uniform)
        return logprobs

    def _scan(self, rollout: Rollout) -> Scan:
        pieces = self._text.pieces(rollout.token_ids)
        return scan(pieces, rollout.prompt.num_items, self._text.ended(rollout.token_ids))

    def _unused_tokens(
        self, rollouts: Sequence[Rollout], scans: Sequence[Scan]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places [M] among the N tokens where an id is due, and the tokens [M, ·] that begin an
        unused one there, −1 after the last."""
        due = [  # [N] (K, ids not used yet)
            (r.prompt.num_items, ids)
            for r, s in zip(rollouts, scans, strict=True)
            for ids in s.unused
        ]
        where = [position for position, (_, ids) in enumerate(due) if ids is not None]
        first = [self._first_tokens(*due[position]) for position in where]  # type: ignore[arg-type]
        tokens = np.full((len(where), max(map(len, first), default=0)), -1, dtype=np.int64)
        for row, ids in enumerate(first):
            tokens[row, : len(ids)] = ids
        device = self._device
        return torch.tensor(where, device=device).long(), torch.from_numpy(tokens).to(device)

    def _first_tokens(self, num_items: int, unused: frozenset[int]) -> np.ndarray:
        if num_items not in self._id_tokens:
            self._id_tokens[num_items] = IdTokens(self._tokenizer, num_items)
        return self._id_tokens[num_items].first_tokens(unused)


def _mass(logprobs: torch.Tensor, where: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mass [N] that `logprobs` [N, V] puts on `tokens` at the places `where`; NaN elsewhere."""
    mass = torch.full((len(logprobs),), float("nan"), device=logprobs.device)
    picked = logprobs[where.unsqueeze(-1), tokens.clamp(min=0)].exp()
    mass[where] = (picked * (tokens >= 0)).sum(dim=-1)
    return mass
