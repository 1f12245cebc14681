"""A teacher as a vLLM engine, which scores by the log-probabilities of prompts.

It tells the log-probability of every token and the most likely ones of every place, no more: what
needs the whole vocabulary (the mass of the unused ids, a reshaped teacher) is for transformers.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import torch

from listopd_ray.config import RolloutConfig, TeacherActorConfig
from listopd_ray.models import load_model, load_tokenizer
from listopd_ray.roles.batching import Batch, collate, completion_logprobs, gather
from listopd_ray.roles.rollout import Completion, Request
from listopd_ray.roles.scoring import Columns, Places
from listopd_ray.roles.vllm_engine import VllmEngine
from listopd_ray.types import ListopdError, Rollout, StrPath

# Of any kind of text: an engine and transformers must agree on it.
CANARY = '1 Blue sock $12.50 (7)\n2 jacket 日本\n{"ranking": [2, 1]}'


class PromptScores:
    """Owns the engine: one a process, see `rollout`."""

    def __init__(
        self,
        config: TeacherActorConfig,
        *,
        model_path: StrPath,
        dtype: str,
        device: str,
        end_ids: tuple[int, ...],
        excluded: np.ndarray,
        max_prompt_tokens: int,
        max_new_tokens: int,
        tolerance: float,
    ) -> None:
        """`excluded`: tokens that never enter the support. Raises ListopdError where the engine and
        transformers differ by more than `tolerance` (nats) on the teacher's log-probabilities."""
        self._support_size, self._excluded = config.support_size, excluded
        # As many of the most likely as leave S when those that are excluded are taken out.
        self._num_best = config.support_size + len(excluded) if config.support_size else 1
        canary = np.array(load_tokenizer(model_path).encode(CANARY), dtype=np.int32)
        # First, and given back before the engine takes its share of a GPU.
        expected = _transformers_logprobs(model_path, dtype, device, canary)
        longest = max(max_prompt_tokens + max_new_tokens, len(canary)) + 1  # one is sampled
        self._engine = VllmEngine(
            RolloutConfig(engine={"max_logprobs": max(20, self._num_best), **config.engine}),
            max_num_seqs=config.micro_batch_size,
            model_path=model_path,
            dtype=dtype,
            end_ids=end_ids,
            max_new_tokens=max_new_tokens,
            max_model_len=longest,
        )
        found = self._engine.prompt_logprobs(canary)
        difference = float(np.abs(found - expected).max())
        if not difference <= tolerance:  # NaN fails too
            raise ListopdError(
                f"scoring.backend=vllm: log-probabilities of {model_path} differ from those of "
                f"transformers by {difference:.2g} nats (sync.tolerance={tolerance:g})"
            )

    def generate(self, requests: Sequence[Request], greedy: bool) -> list[Completion]:
        return self._engine.generate(requests, greedy)

    def columns(self, rollouts: Sequence[Rollout], _: Batch, __: Places) -> Columns:
        """As `scoring.teacher_columns`, but for the mass of the unused ids: NaN throughout."""
        sequences = [np.concatenate([r.prompt.token_ids, r.token_ids]) for r in rollouts]
        tables = self._engine.best_prompt_logprobs(sequences, self._num_best)
        return best_columns(rollouts, tables, self._support_size, self._excluded)


def best_columns(
    rollouts: Sequence[Rollout],
    tables: Sequence[tuple[np.ndarray, np.ndarray]],
    support_size: int,
    excluded: np.ndarray,
) -> Columns:
    """Columns [N] out of `VllmEngine.best_prompt_logprobs` of prompts with completions."""
    ends = [slice(-len(rollout.token_ids), None) for rollout in rollouts]
    ids = np.concatenate([table[0][end] for table, end in zip(tables, ends, strict=True)])
    logprobs = np.concatenate([table[1][end] for table, end in zip(tables, ends, strict=True)])
    columns = {
        "teacher_logprobs": logprobs[:, 0],
        "modal_ids": ids[:, 1],
        "teacher_modal_logprobs": logprobs[:, 1],
        "teacher_unused_mass": np.full(len(ids), np.nan, dtype=np.float32),
    }
    if support_size:
        is_excluded = np.isin(ids[:, 1:], excluded)
        kept = 1 + np.argsort(is_excluded, axis=1, kind="stable")[:, :support_size]
        columns["support_ids"] = np.take_along_axis(ids, kept, axis=1)
        columns["support_logprobs"] = np.take_along_axis(logprobs, kept, axis=1)
    return columns


@torch.inference_mode()
def _transformers_logprobs(
    path: StrPath, dtype: str, device: str, token_ids: np.ndarray
) -> np.ndarray:
    """Log-probabilities [L − 1] of tokens 1 … L − 1."""
    model = load_model(path, dtype=dtype, device=device).eval()
    batch = collate([token_ids[:1]], [token_ids[1:]], device)
    logprobs = gather(completion_logprobs(model, batch), batch.token_ids).cpu().numpy()
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return logprobs
