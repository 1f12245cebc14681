"""vLLM's `LLM` as the rollout worker and the teacher use it: token ids and log-probabilities."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from listopd_ray.config import PARALLEL, RolloutConfig
from listopd_ray.roles.rollout import Completion, Request
from listopd_ray.roles.vllm_weights import leave_unpacked, load_in_place, lora_options
from listopd_ray.types import Prompt, StrPath, Weights


class VllmEngine:
    """vLLM's `LLM` in this process."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: StrPath,
        dtype: str,
        end_ids: tuple[int, ...],
        max_new_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        adapter_rank: int = 0,
    ) -> None:
        from vllm import LLM

        self._adapter_rank = adapter_rank
        self._adapter: Any = None  # vLLM's LoRARequest of the version that it serves
        in_one_process = not set(PARALLEL) & set(config.engine)
        self._in_place = (
            in_one_process and dtype == "float32" and leave_unpacked(os.fspath(model_path))
        )
        self._end_ids = end_ids
        self._max_new_tokens = max_new_tokens
        self._grammar = config.grammar
        cache = config.kv_cache_mib
        if cache is None:
            shape = json.loads(Path(os.fspath(model_path), "config.json").read_text())
            cache = kv_cache_mib(shape, dtype, max_num_seqs, max_model_len, config.engine)
        options: dict[str, Any] = dict(
            skip_tokenizer_init=not config.grammar,  # token ids go in and out
            generation_config="vllm",  # no sampling defaults from the checkpoint
            enforce_eager=True,
            # A seeded request whose prompt is split over two steps fails on the CPU.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(8192, max_model_len),
            enable_prefix_caching=False,
            kv_cache_memory_bytes=cache << 20,
            disable_log_stats=True,
            seed=0,
            trust_remote_code=False,
            load_format="safetensors",
            use_tqdm_on_load=False,
        )
        if config.grammar:
            options["structured_outputs_config"] = {"backend": "xgrammar"}
        if adapter_rank:
            options |= lora_options(adapter_rank)
        self._llm = LLM(
            model=os.fspath(model_path),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            **{**options, **config.engine},
        )

    def load_weights(self, weights: Weights) -> None:
        from listopd_ray.roles.weights import torch_tensors

        if weights.method == "adapter":
            self._load_adapter(weights)
        elif self._in_place:
            self._llm.apply_model(lambda model: load_in_place(model, torch_tensors(weights)))
        else:
            # The layerwise reload: the only path that re-packs the CPU backend's kernels. Workers
            # in processes of their own (tensor parallelism) read files themselves.
            from_files = {"weights_path": weights.path}
            self._llm.collective_rpc(
                "reload_weights",
                kwargs=from_files if weights.path else {"weights_iterator": torch_tensors(weights)},
            )
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("prefix cache still in use: cached states of the old weights remain")

    def _load_adapter(self, weights: Weights) -> None:
        """In the place of the one before, over weights that stay."""
        from vllm.lora.request import LoRARequest

        from listopd_ray.roles.adapters import check_rank

        path = weights.path
        assert path is not None
        check_rank(path, self._adapter_rank)
        before, engine = self._adapter, self._llm.llm_engine
        number = before.lora_int_id + 1 if before else 1
        self._adapter = LoRARequest(f"{number}", number, path)  # a known name would not be read
        if before:
            engine.remove_lora(before.lora_int_id)
        engine.add_lora(self._adapter)

    def prompt_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        (output,) = self._llm.generate(
            [{"prompt_token_ids": token_ids.tolist()}],
            params,
            use_tqdm=False,
            lora_request=self._adapter,
        )
        return _flat(output.prompt_logprobs, token_ids[1:].tolist(), skip=1)

    def best_prompt_logprobs(
        self, sequences: Sequence[np.ndarray], num_best: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids (int32) and log-probabilities (float32), both [L − 1, 1 + num_best], for each
        sequence: of its own tokens 1 … L − 1, then of the most likely ones there, best first.

        Raises RuntimeError where any is missing.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=num_best, flat_logprobs=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": token_ids.tolist()} for token_ids in sequences]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            _table(output.prompt_logprobs, token_ids, num_best)
            for token_ids, output in zip(sequences, outputs, strict=True)
        ]

    def generate(self, requests: Sequence[Request], greedy: bool) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        def constraint(prompt: Prompt) -> Any:  # vLLM wants one object a request
            return StructuredOutputsParams(grammar=contract_grammar(prompt.num_items))

        params = [
            SamplingParams(
                temperature=0.0 if greedy else 1.0,
                seed=request.seed,
                max_tokens=self._max_new_tokens,
                stop_token_ids=list(self._end_ids),
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                structured_outputs=constraint(request.prompt) if self._grammar else None,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": r.prompt.token_ids.tolist()} for r in requests]
        completions = []
        for result in self._llm.generate(
            prompts, params, use_tqdm=False, lora_request=self._adapter
        ):
            output = result.outputs[0]
            token_ids = list(output.token_ids)
            logprobs = _flat(output.logprobs, token_ids).tolist()
            completions.append(Completion(token_ids, logprobs, output.finish_reason == "stop"))
        return completions


def kv_cache_mib(
    shape: Mapping[str, Any],
    dtype: str,
    num_seqs: int,
    num_tokens: int,
    engine: Mapping[str, Any],
) -> int:
    """MiB that `num_seqs` sequences of `num_tokens` take in each process of an engine.

    `shape` is the model's config.json. vLLM gives memory out in whole blocks, of 128 tokens on the
    CPU (of fewer on GPUs: there this is too much by less than a block a sequence), and keeps one.
    """
    heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
    heads = max(1, heads // engine.get("tensor_parallel_size", 1))
    size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    token = 2 * shape["num_hidden_layers"] * heads * size * (4 if dtype == "float32" else 2)
    block = engine.get("block_size", 128)
    num_blocks = num_seqs * math.ceil(num_tokens / block) + 1
    return math.ceil(num_blocks * block * token / (1 << 20))


@functools.cache
def contract_grammar(num_items: int) -> str:
    """xgrammar's EBNF of the contract's JSON schema, spelled as `json.dumps` spells it.

    vLLM's own `json=` constraint either lets whitespace run on without end wherever JSON has room
    for it or, with `disable_any_whitespace`, allows no blank at all: `{"ranking": [3, 1, 2]}`, what
    models are trained on, is then forbidden. That no item comes twice a JSON schema could say, but
    xgrammar does not enforce it.
    """
    from xgrammar import Grammar

    item = {"type": "integer", "minimum": 1, "maximum": num_items}
    ranking = {"type": "array", "items": item, "minItems": num_items, "maxItems": num_items}
    schema = {
        "type": "object",
        "properties": {"ranking": ranking},
        "required": ["ranking"],
        "additionalProperties": False,
    }
    return str(Grammar.from_json_schema(json.dumps(schema), any_whitespace=False))


def _flat(flat: Any, token_ids: list[int], skip: int = 0) -> np.ndarray:
    """One log-probability a position out of vLLM's flat lists, looked up by token id."""
    starts = flat.start_indices[skip:]
    if [flat.token_ids[start] for start in starts] != token_ids:
        raise RuntimeError("vLLM's log-probabilities are not those of the tokens asked for")
    return np.array([flat.logprobs[start] for start in starts], dtype=np.float32)


def _table(flat: Any, token_ids: np.ndarray, num_best: int) -> tuple[np.ndarray, np.ndarray]:
    """vLLM's flat lists as tables; nothing is said of the first token."""
    num_rows, width = len(token_ids) - 1, 1 + num_best
    if flat is None or len(flat) != 1 + num_rows or len(flat.logprobs) != num_rows * width:
        raise RuntimeError("vLLM's log-probabilities of a prompt are not complete")
    ids = np.array(flat.token_ids, dtype=np.int32).reshape(num_rows, width)
    if not np.array_equal(ids[:, 0], token_ids[1:]):
        raise RuntimeError("vLLM's log-probabilities are not those of the tokens asked for")
    return ids, np.array(flat.logprobs, dtype=np.float32).reshape(num_rows, width)
