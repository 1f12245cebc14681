"""Generation with transformers alone: rollouts without vLLM, and the teacher's evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from listopd_ray.models import load_model
from listopd_ray.roles.batching import collate, completion_logprobs, gather
from listopd_ray.roles.rollout import Completion, Request
from listopd_ray.roles.weights import torch_tensors
from listopd_ray.types import StrPath, Weights


class HfEngine:
    """Same verbs as the vLLM engine. Noise is seeded per batch, by the first request's seed."""

    def __init__(
        self,
        *,
        model_path: StrPath,
        dtype: str,
        device: str,
        end_ids: tuple[int, ...],
        max_new_tokens: int,
        batch_size: int,
        adapter_rank: int = 0,
    ) -> None:
        self._model = load_model(model_path, dtype=dtype, device=device).eval()
        self._adapter_rank = adapter_rank
        self._adapter: Any = None  # PEFT's wrapper of the model
        self._end_ids = end_ids
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size

    def load_weights(self, weights: Weights) -> None:
        if weights.method == "adapter":
            from listopd_ray.roles.adapters import check_rank, load_adapter

            assert weights.path is not None
            check_rank(weights.path, self._adapter_rank)
            self._adapter = load_adapter(self._model, self._adapter, weights.path)
            return
        tensors = dict(torch_tensors(weights))
        missing, unexpected = self._model.load_state_dict(tensors, strict=False)
        tied = {"lm_head.weight"} if self._model.config.tie_word_embeddings else set()
        if unexpected or set(missing) - tied:
            raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")

    @torch.inference_mode()
    def prompt_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        batch = collate([token_ids[:1]], [token_ids[1:]], str(self._model.device))
        return gather(completion_logprobs(self._model, batch), batch.token_ids).cpu().numpy()

    def generate(self, requests: Sequence[Request], greedy: bool) -> list[Completion]:
        completions: list[Completion] = []
        for start in range(0, len(requests), self._batch_size):
            completions += generate(
                self._model,
                requests[start : start + self._batch_size],
                greedy=greedy,
                end_ids=self._end_ids,
                max_new_tokens=self._max_new_tokens,
            )
        return completions


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    greedy: bool,
    end_ids: tuple[int, ...],
    max_new_tokens: int,
) -> list[Completion]:
    """Sample one completion a request at T = 1 from the model's full distribution, as one batch."""
    prompts = [request.prompt.token_ids for request in requests]
    length = max(map(len, prompts))
    input_ids = np.zeros((len(prompts), length), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    torch.manual_seed(requests[0].seed)
    # Whatever penalties and truncations the checkpoint recommends: the sampler must be the policy.
    model.generation_config = GenerationConfig()
    output = model.generate(
        input_ids=torch.from_numpy(input_ids).to(model.device),
        attention_mask=torch.from_numpy(mask).to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[:, length:]
    logprobs = torch.log_softmax(torch.stack(output.logits, dim=1).float(), dim=-1)
    sampled = gather(logprobs, tokens).cpu().numpy()
    is_end = torch.isin(tokens, torch.tensor(end_ids, device=tokens.device)).cpu().numpy()
    completions = []
    for row, ids in enumerate(tokens.cpu().numpy()):
        stopped = bool(is_end[row].any())
        stop = int(is_end[row].argmax()) + 1 if stopped else len(ids)
        completions.append(Completion(ids[:stop].tolist(), sampled[row, :stop].tolist(), stopped))
    return completions
