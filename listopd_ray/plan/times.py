"""Seconds of an update, from operations and bytes over stated rates.

2 operations a parameter and token forward, as many again for the gradient of activations, and again
for that of weights; the head at completion tokens only. A decoding step takes its operations or one
reading of weights and cache, whichever is longer, and what launching it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from listopd_ray.config import Config, learner_scores_base, needs_base
from listopd_ray.job_config import Machine
from listopd_ray.plan.memory import BYTES, Models, cache_bytes, fed_tokens
from listopd_ray.plan.shapes import Shape

LAUNCH_S = {"cpu": 0.003, "cuda": 0.02}  # of a decoding step, assumed


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations/s by type, bytes/s."""

    operations: dict[str, float]
    memory: float
    weights: float


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds."""

    generate: float
    score: float
    learn: float
    sync: float
    turn: float


def rates_of(machine: Machine, device: str) -> Rates | None:
    """Those that are stated; on the CPU those that are missing are measured now, in a second. None
    where a GPU's are missing."""
    stated = {"bfloat16": machine.tflops, "float32": machine.tflops_float32}
    operations = {name: rate * 1e12 for name, rate in stated.items() if rate}
    memory = (machine.memory_gb_s or 0.0) * 1e9
    if device == "cuda" and not (memory and "bfloat16" in operations):
        return None
    if device == "cuda":
        operations.setdefault("float32", operations["bfloat16"] / 8)
    else:
        for name in stated:
            operations.setdefault(name, _products(getattr(torch, name)))
        memory = memory or _reading()
    return Rates(operations=operations, memory=memory, weights=machine.weights_gb_s * 1e9)


def estimate(config: Config, models: Models, rates: Rates) -> Times:
    learner, student = config.learner, models.student
    samples = config.num_prompts * config.group_size

    def forward(shape: Shape, ranks: int = 1) -> float:
        tokens = fed_tokens(config, models, shape, samples, ranks)
        return 2.0 * (shape.body * tokens + shape.head * samples * models.completion)

    has_adapter = config.lora.rank > 0
    passes = (2 if has_adapter else 3) + (1 if learner.gradient_checkpointing else 0)
    if learner_scores_base(config):
        passes += 1
    rate = rates.operations["bfloat16" if learner.autocast else learner.dtype]
    learn = passes * forward(student, learner.num_ranks) / learner.num_ranks / rate
    teachers = list(models.teachers.values())
    if config.scoring.backend == "vllm":  # which is fed every sample whole
        teachers = [replace(shape, shares_prompts=False) for shape in teachers]
    scored = sum(map(forward, teachers)) / len(teachers)
    if needs_base(config) and not learner_scores_base(config):
        scored += forward(models.base)
    dtype = config.scoring.dtype or learner.dtype
    score = scored / config.scoring.num_actors / rates.operations[dtype]
    generate = _generate(config, models, rates, samples)
    size = BYTES[learner.dtype]
    moved = 4 * student.adapter if config.sync.method == "adapter" else size * student.parameters
    sync = moved / rates.weights
    together = max(generate, score + learn) if config.max_staleness else generate + score + learn
    return Times(generate=generate, score=score, learn=learn, sync=sync, turn=together + sync)


def _generate(config: Config, models: Models, rates: Rates, samples: int) -> float:
    rollout, shape = config.rollout, models.student
    dtype = rollout.dtype or config.learner.dtype
    size, rate = BYTES[dtype], rates.operations[dtype]
    share = -(-samples // rollout.num_workers)
    seqs = min(share, rollout.max_num_seqs or 256)
    rounds = share / seqs
    prompts = 2.0 * share * shape.body * models.prompt / rate
    read = size * shape.parameters + cache_bytes(shape, size, seqs, models.length)
    step = max(2.0 * seqs * (shape.body + shape.head) / rate, read / rates.memory)
    return prompts + rounds * models.completion * (step + LAUNCH_S[config.device])


def _products(dtype: torch.dtype) -> float:
    """Operations/s of all cores on a product of matrices."""
    size = 1024
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2.0 * size**3 / _shortest(lambda: left @ right)


def _reading() -> float:
    """Bytes/s of all cores out of main memory."""
    block = torch.ones(64 << 20, dtype=torch.uint8)
    return block.numel() / _shortest(lambda: block.view(torch.int64).sum())


def _shortest(call: Callable[[], object]) -> float:
    """Seconds of the quickest of the calls of 0.3 s, three at least: others may use the cores."""
    begin, times = time.perf_counter(), list[float]()
    while len(times) < 3 or time.perf_counter() - begin < 0.3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
