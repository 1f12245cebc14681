"""The rollout worker: samples completions from the student's current weights.

Sampling is at T = 1 without truncation or penalties, and in training without a grammar, so that the
log-probabilities the sampler reports are those of the policy itself (an importance ratio against
anything else is biased; a grammar renormalises over the tokens it allows). One engine a process:
vLLM's CPU backend changes torch for the process it lives in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from listopd_ray.config import RolloutConfig
from listopd_ray.roles.packing import Packed, pack, unpack
from listopd_ray.types import ListopdError, Loaded, Prompt, Rollout, StrPath, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    prompt: Prompt
    sample_index: int
    seed: int  # of this sample alone: noise does not depend on batch mates or on the worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    rollouts: tuple[Rollout, ...]  # in the order of the requests
    seconds: float
    attempt: int = 0  # how often its requests were made before

    def __reduce__(self) -> tuple[Any, ...]:
        packed = pack(self.rollouts) if self.rollouts else None
        return _generated, (packed, self.seconds, self.attempt)


def _generated(packed: Packed | None, seconds: float, attempt: int) -> Generated:
    rollouts = unpack(packed) if packed else ()
    return Generated(rollouts=rollouts, seconds=seconds, attempt=attempt)


class RolloutWorker:
    """Owns one engine. Refuses to sample before the first `load_weights`."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: StrPath,
        dtype: str,
        device: str,
        max_num_seqs: int,
        end_ids: tuple[int, ...],
        max_prompt_tokens: int,
        max_new_tokens: int,
        tolerance: float,
        adapter_rank: int = 0,
    ) -> None:
        """`adapter_rank`: of the LoRA adapters that it will load over the checkpoint; 0: none."""
        self._policy_version: int | None = None
        self._tolerance = tolerance
        options: dict[str, Any] = dict(
            model_path=model_path,
            dtype=dtype,
            end_ids=end_ids,
            max_new_tokens=max_new_tokens,
            adapter_rank=adapter_rank,
        )
        if config.backend == "vllm":
            from listopd_ray.roles.vllm_engine import VllmEngine

            self._engine: Any = VllmEngine(
                config,
                max_num_seqs=max_num_seqs,
                max_model_len=max_prompt_tokens + max_new_tokens,
                **options,
            )
        else:
            from listopd_ray.roles.hf_engine import HfEngine

            self._engine = HfEngine(batch_size=max_num_seqs, device=device, **options)

    def use_checkpoint(self) -> None:
        """Serve the weights of the checkpoint itself, as version 0."""
        self._policy_version = 0

    def load_weights(self, weights: Weights) -> Loaded:
        """Load `weights`, then compare the canary's log-probabilities with the learner's.

        Raises ListopdError where one differs by more than the tolerance: names, order, a stale tied
        head or a stale cache show up here and nowhere else.
        """
        from listopd_ray.roles.weights import wait_for_files

        start = time.perf_counter()
        self._policy_version = None  # a half-loaded engine must never serve
        wait_for_files(weights)
        self._engine.load_weights(weights)
        loaded = time.perf_counter()
        logprobs = self._engine.prompt_logprobs(weights.canary_ids)
        difference = float(np.abs(logprobs - weights.canary_logprobs).max())
        if not difference <= self._tolerance:  # NaN fails too
            raise ListopdError(
                f"weight sync to version {weights.policy_version}: canary log-probabilities differ "
                f"from the learner's by {difference:.2g} nats (sync.tolerance={self._tolerance:g})"
            )
        self._policy_version = weights.policy_version
        return Loaded(
            canary_max=difference,
            num_bytes=weights.num_bytes,
            publish_seconds=weights.seconds,
            load_seconds=loaded - start,
            canary_seconds=time.perf_counter() - loaded,
        )

    def generate(
        self, requests: Sequence[Request], greedy: bool = False, attempt: int = 0
    ) -> Generated:
        """Complete each request under the current weights."""
        if self._policy_version is None:
            raise RuntimeError("generate before load_weights")
        start = time.perf_counter()
        outputs = self._engine.generate(requests, greedy)
        rollouts = tuple(
            make_rollout(request, output, self._policy_version)
            for request, output in zip(requests, outputs, strict=True)
        )
        seconds = time.perf_counter() - start
        return Generated(rollouts=rollouts, seconds=seconds, attempt=attempt)


@dataclass(frozen=True, slots=True)
class Completion:
    token_ids: list[int]  # end token included
    logprobs: list[float]
    stopped: bool  # by an end token


def make_rollout(request: Request, output: Completion, policy_version: int) -> Rollout:
    return Rollout(
        prompt=request.prompt,
        sample_index=request.sample_index,
        token_ids=np.array(output.token_ids, dtype=np.int32),
        sampler_logprobs=np.array(output.logprobs, dtype=np.float32),
        finish_reason="stop" if output.stopped else "length",
        policy_version=policy_version,
    )
