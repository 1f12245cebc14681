"""One role at a time, in a process of its own: `loop.py` calls this.

    python tests/bench/roles.py DIRECTORY rollout | learn [key=value …]

`rollout`: tokens/s of the rollout worker and of vLLM's own `LLM.generate` with the same requests,
in turns on the same engine (`hf`: of the worker alone). `learn`: tokens/s of teacher (with base)
and learner, and the share of the measured matrix rate that they reach. One line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from workload import NEW_TOKENS, our_config

from listopd_ray.cluster import _VLLM_CPU_ENV, _VLLM_ENV
from listopd_ray.config import Config, max_num_seqs
from listopd_ray.handles import make_requests
from listopd_ray.prepare import Prepared, prepare
from listopd_ray.roles.rollout import Generated, Request, RolloutWorker
from listopd_ray.types import Rollout

TURNS, WARM_UP = 24, 6


def rollout(config: Config, data: Prepared) -> dict[str, Any]:
    arguments = data.cluster_arguments()
    worker = RolloutWorker(
        config.rollout,
        model_path=data.student_path,
        dtype=config.rollout.dtype or config.learner.dtype,
        device=config.device,
        max_num_seqs=max_num_seqs(config),
        end_ids=data.end_ids,
        max_prompt_tokens=arguments["max_prompt_tokens"],
        max_new_tokens=NEW_TOKENS,
        tolerance=1e-4,
    )
    worker.use_checkpoint()
    sides: dict[str, Callable[[list[Request]], object]] = {"worker": worker.generate}
    if config.rollout.backend == "vllm":
        sides["plain"] = _plain(worker, data.end_ids)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(TURNS):
        prompts = data.train.prompts[turn * config.num_prompts : (turn + 1) * config.num_prompts]
        for side, generate in sides.items():
            requests = make_requests(prompts, 0, f"{turn}", config.group_size)
            start = time.perf_counter()
            generate(requests)
            rates[side].append(len(requests) * NEW_TOKENS / (time.perf_counter() - start))
    return {side: values[WARM_UP:] for side, values in rates.items()}


def _plain(worker: RolloutWorker, end_ids: tuple[int, ...]) -> Callable[[list[Request]], object]:
    """What one would write without this project: a seed and the log-probability of every sample."""
    from vllm import SamplingParams

    def generate(requests: list[Request]) -> object:
        params = [
            SamplingParams(
                seed=request.seed,
                max_tokens=NEW_TOKENS,
                stop_token_ids=list(end_ids),
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": r.prompt.token_ids.tolist()} for r in requests]
        return worker._engine._llm.generate(prompts, params, use_tqdm=False)

    return generate


def learn(config: Config, data: Prepared) -> dict[str, Any]:
    from listopd_ray.roles.learner import Learner
    from listopd_ray.roles.teacher import Teacher

    dtype, device = config.learner.dtype, config.device
    teacher = Teacher(config.scoring, teacher_path=data.teacher_path, dtype=dtype, device=device)
    learner = Learner(config, student_path=data.student_path, canary_ids=data.canary_ids)
    generated = _random_rollouts(data, config.num_prompts * config.group_size)
    scored = teacher.score(generated, data.student_path)
    num_tokens = sum(len(r.prompt.token_ids) + NEW_TOKENS for r in generated.rollouts)
    results: dict[str, Any] = {"matrix_gflops": matrix_rate(dtype, device) / 1e9}
    models = {"teacher": data.teacher_path, "base": data.student_path}
    flops = {
        name: _flops(path, len(generated.rollouts), num_tokens) for name, path in models.items()
    }
    work = {
        "score": (lambda: teacher.score(generated, data.student_path), sum(flops.values())),
        # Backwards takes twice what forwards does.
        "learn": (lambda: learner.step(1.2, 1e-6, scored), 3 * flops["base"]),
    }
    for name, (call, operations) in work.items():
        seconds = _median_seconds(call, device)
        results[name] = {
            "ms": 1e3 * seconds,
            "tokens_per_s": num_tokens / seconds,
            "share_of_matrix_rate": operations / seconds / (1e9 * results["matrix_gflops"]),
        }
    return results


def matrix_rate(dtype: str, device: str) -> float:
    """Operations a second of a large matrix product, the best of some, with this process's
    threads."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    fastest = min(_seconds(lambda: a @ b, device) for _ in range(20))
    return 2 * size**3 / fastest


def _flops(path: Path, num_sequences: int, num_tokens: int) -> float:
    """Matrix operations of one forward pass: layers at every token, the head at completions."""
    shape = json.loads((path / "config.json").read_text())
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    layer = hidden * (2 * heads + 2 * kv) + 3 * hidden * shape["intermediate_size"]
    length = num_tokens / num_sequences
    attention = 2 * heads * length / 2  # a token sees half of the sequence on average
    body = num_tokens * shape["num_hidden_layers"] * (layer + attention)
    return 2 * (body + num_sequences * NEW_TOKENS * hidden * shape["vocab_size"])


def _random_rollouts(data: Prepared, count: int) -> Generated:
    rng = np.random.default_rng(0)
    vocab = json.loads((data.student_path / "config.json").read_text())["vocab_size"]
    rollouts = tuple(
        Rollout(
            prompt=data.train.prompts[index],
            sample_index=0,
            token_ids=rng.integers(2, vocab, NEW_TOKENS).astype(np.int32),
            sampler_logprobs=np.full(NEW_TOKENS, -np.log(vocab), dtype=np.float32),
            finish_reason="length",
            policy_version=0,
        )
        for index in range(count)
    )
    return Generated(rollouts=rollouts, seconds=0.0)


def _median_seconds(call: Callable[[], object], device: str) -> float:
    return median([_seconds(call, device) for _ in range(TURNS)][WARM_UP:])


def _seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    directory, role, *overrides = sys.argv[1:]
    config = our_config(Path(directory), 1, overrides)
    os.environ.update(_VLLM_CPU_ENV if config.device == "cpu" else _VLLM_ENV)
    if config.device == "cpu":
        torch.set_num_threads(1)  # as Ray gives an actor of at most one core
    print(json.dumps({"rollout": rollout, "learn": learn}[role](config, prepare(config))))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main()
