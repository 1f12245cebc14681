"""Generation with transformers alone: rollouts without vLLM, and the teacher's evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, StaticCache

from listopd_ray.models import load_model
from listopd_ray.roles.batching import collate, completion_logprobs, gather
from listopd_ray.roles.rollout import Completion, Request
from listopd_ray.roles.weights import torch_tensors
from listopd_ray.types import StrPath, Weights


class HfEngine:
    """Same verbs as the vLLM engine, and as there every sample has noise of its own."""

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
    """Sample one completion a request at T = 1 from the model's full distribution, as one batch.

    A loop of its own: `model.generate` takes twice the time for small models, keeps [B, T, V]
    logits for the log-probabilities, and has one stream of noise for the whole batch.
    """
    device, head = model.device, model.get_output_embeddings()
    prompts = [request.prompt.token_ids for request in requests]
    input_ids, mask = (t.to(device) for t in _left_padded(prompts, max_new_tokens))
    length, ends = input_ids.shape[1], torch.tensor(end_ids, device=device)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # [B, P + T]
    noise = torch.from_numpy(_noise(requests, max_new_tokens)).to(device)  # [B, T]
    cache = StaticCache(config=model.config, max_cache_len=length + max_new_tokens)
    tokens, sampled = list[torch.Tensor](), list[torch.Tensor]()
    is_done = torch.zeros(len(requests), dtype=torch.bool, device=device)
    first, last = 0, length  # places of `input_ids`
    while True:
        hidden = model.base_model(
            input_ids=input_ids,
            attention_mask=mask[:, :last],
            position_ids=positions[:, first:last],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logprobs = torch.log_softmax(head(hidden).float(), dim=-1)  # [B, V]
        token = logprobs.argmax(-1) if greedy else _draw(logprobs, noise[:, len(tokens)])
        tokens.append(token)
        sampled.append(gather(logprobs, token))
        is_done |= torch.isin(token, ends)
        if len(tokens) == max_new_tokens or is_done.all():
            break
        input_ids, first, last = token.unsqueeze(-1), last, last + 1
    all_tokens, all_sampled = torch.stack(tokens, dim=1), torch.stack(sampled, dim=1).cpu().numpy()
    is_end = torch.isin(all_tokens, ends).cpu().numpy()
    completions = []
    for row, drawn in enumerate(all_tokens.cpu().numpy()):
        stopped = bool(is_end[row].any())
        stop = int(is_end[row].argmax()) + 1 if stopped else len(drawn)
        logprobs_of_row = all_sampled[row, :stop].tolist()
        completions.append(Completion(drawn[:stop].tolist(), logprobs_of_row, stopped))
    return completions


def _left_padded(prompts: Sequence[np.ndarray], room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, P] and their mask [B, P + room], 1 in the room that follows."""
    length = max(map(len, prompts))
    input_ids = np.zeros((len(prompts), length), dtype=np.int64)
    mask = np.ones((len(prompts), length + room), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = prompt
        mask[row, : length - len(prompt)] = 0
    return torch.from_numpy(input_ids), torch.from_numpy(mask)


def _noise(requests: Sequence[Request], count: int) -> np.ndarray:
    """Uniform numbers [B, count] in [0, 1), each row from its request's own seed."""
    return np.stack([np.random.default_rng(request.seed).random(count) for request in requests])


def _draw(logprobs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens [B] by inversion of the distribution function of `logprobs` [B, V].

    In double precision: at V = 150,000 a float32 sum loses whole tails of the distribution.
    """
    function = logprobs.double().exp().cumsum(dim=-1)
    target = noise.unsqueeze(-1) * function[:, -1:]
    token = torch.searchsorted(function, target, right=True).squeeze(-1)
    return token.clamp(max=logprobs.shape[-1] - 1)
