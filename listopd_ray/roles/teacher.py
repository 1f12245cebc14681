"""The teacher: scores every sampled token under teacher and base in one call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from listopd_ray.config import TeacherActorConfig
from listopd_ray.models import end_ids, load_model, load_tokenizer
from listopd_ray.roles.batching import (
    Batch,
    can_share_prompts,
    collate_rollouts,
    micro_batches,
    sequence_lengths,
)
from listopd_ray.roles.hf_engine import generate
from listopd_ray.roles.packing import Packed, pack, unpack
from listopd_ray.roles.rollout import Generated, Request, make_rollout
from listopd_ray.roles.scoring import (
    Columns,
    Contract,
    Places,
    base_columns,
    special_ids,
    split_columns,
    teacher_columns,
)
from listopd_ray.types import ListopdError, Rollout, ScoredRollout, StrPath

if TYPE_CHECKING:
    from listopd_ray.roles.prompt_scores import PromptScores

ScoreBatch = Callable[[Sequence[Rollout], Batch, Places], Columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    rollouts: tuple[ScoredRollout, ...]  # in the order of the rollouts
    seconds: float

    def __reduce__(self) -> tuple[Any, ...]:
        return _scored, (pack(self.rollouts) if self.rollouts else None, self.seconds)


def _scored(packed: Packed | None, seconds: float) -> Scored:
    return Scored(rollouts=unpack(packed) if packed else (), seconds=seconds)


class Teacher:
    """Holds the teacher and the bases that it was last asked to score with (λ ≠ 1 and the
    diagnostics need one), `num_bases` of them at most: as many as runs share this actor.

    Its own completions come from the teacher as it is; scores from the one that `config` reshapes.
    With `backend: vllm` the teacher is an engine, and only bases are models of transformers.
    """

    def __init__(
        self,
        config: TeacherActorConfig,
        *,
        teacher_path: StrPath,
        dtype: str,
        device: str,
        num_bases: int = 1,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int | None = None,
        tolerance: float = 1e-4,
    ) -> None:
        """The last three are for `backend: vllm`, `tolerance` (nats) as for `PromptScores`."""
        teacher_path = os.fspath(teacher_path)
        self._config = config
        self._dtype, self._device = dtype, device
        self._bases: dict[StrPath, PreTrainedModel] = {}  # by path, the last one used at the end
        self._num_bases = num_bases
        tokenizer = load_tokenizer(teacher_path)
        self._end_ids = end_ids(teacher_path, tokenizer)
        self._contract = Contract(tokenizer, self._end_ids)
        self._excluded = special_ids(tokenizer, self._end_ids)
        most = len(tokenizer) - len(self._excluded)
        if config.support_size > most:
            raise ListopdError(f"scoring.support_size: {teacher_path} has {most} tokens to choose")
        self._teacher: PreTrainedModel | None = None
        self._engine: PromptScores | None = None
        if config.backend == "hf":
            self._teacher = self._load(teacher_path)
        else:
            from listopd_ray.roles.prompt_scores import PromptScores

            assert max_prompt_tokens is not None and max_new_tokens is not None
            self._engine = PromptScores(
                config,
                model_path=teacher_path,
                dtype=dtype,
                device=device,
                end_ids=self._end_ids,
                excluded=self._excluded,
                max_prompt_tokens=max_prompt_tokens,
                max_new_tokens=max_new_tokens,
                tolerance=tolerance,
            )

    def score(self, generated: Generated, base_path: StrPath | None = None) -> Scored:
        """Scores under the teacher and, where one is given, the base."""
        start = time.perf_counter()
        base = self._base(base_path) if base_path else None
        if self._engine is not None:
            rollouts = self._score(generated, self._engine.columns, base)
        else:
            assert self._teacher is not None
            rollouts = self._score(generated, self._by_model(self._teacher, self._config), base)
        return Scored(rollouts=rollouts, seconds=time.perf_counter() - start)

    def score_with(self, model_path: StrPath, generated: Generated) -> Scored:
        """Scores by another checkpoint, as it is, in the teacher's place: the start-up gate. By
        transformers: an engine has compared itself with them when it started."""
        start = time.perf_counter()
        plain = TeacherActorConfig(micro_batch_size=self._config.micro_batch_size)
        rollouts = self._score(generated, self._by_model(self._load(model_path), plain), None)
        return Scored(rollouts=rollouts, seconds=time.perf_counter() - start)

    def generate(
        self, requests: Sequence[Request], max_new_tokens: int, greedy: bool = False
    ) -> Generated:
        """The teacher's own completions, for its evaluation; version 0, it never changes. An engine
        ends them at the `max_new_tokens` that it was made with."""
        start = time.perf_counter()
        if self._engine is not None:
            outputs = self._engine.generate(requests, greedy)
        else:
            assert self._teacher is not None
            outputs = []
            for first in range(0, len(requests), 128):
                outputs += generate(
                    self._teacher,
                    requests[first : first + 128],
                    greedy=greedy,
                    end_ids=self._end_ids,
                    max_new_tokens=max_new_tokens,
                )
        pairs = zip(requests, outputs, strict=True)
        rollouts = tuple(make_rollout(request, output, 0) for request, output in pairs)
        return Generated(rollouts=rollouts, seconds=time.perf_counter() - start)

    @torch.inference_mode()
    def _score(
        self, generated: Generated, teacher: ScoreBatch, base: PreTrainedModel | None
    ) -> tuple[ScoredRollout, ...]:
        rollouts = generated.rollouts
        models = [model for model in (self._teacher, base) if model is not None]
        share_prompts = all(map(can_share_prompts, models))
        lengths = sequence_lengths(rollouts, share_prompts=share_prompts)
        scored: dict[int, ScoredRollout] = {}
        for group in micro_batches(lengths, self._config.micro_batch_size):
            chosen = [rollouts[index] for index in group]
            batch = collate_rollouts(chosen, self._device, share_prompts=share_prompts)
            places = self._contract.places(chosen)
            columns = teacher(chosen, batch, places) | {"token_classes": places.classes}
            if base is not None:
                columns |= base_columns(base, batch, places, columns)
            scored.update(zip(group, split_columns(chosen, columns), strict=True))
        return tuple(scored[index] for index in range(len(rollouts)))

    def _by_model(self, model: PreTrainedModel, config: TeacherActorConfig) -> ScoreBatch:
        return lambda _, batch, places: teacher_columns(
            model, batch, places, config, self._excluded
        )

    def _load(self, path: StrPath) -> PreTrainedModel:
        return load_model(path, dtype=self._dtype, device=self._device).eval()

    def _base(self, path: StrPath) -> PreTrainedModel:
        if path in self._bases:
            self._bases[path] = self._bases.pop(path)
        else:
            while len(self._bases) >= self._num_bases:
                del self._bases[next(iter(self._bases))]
            self._bases[path] = self._load(path)
        return self._bases[path]
