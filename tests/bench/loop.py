"""How fast the loop and its roles are; prints tables and writes them as JSON.

    python tests/bench/loop.py [NUM_UPDATES] [ROUNDS] [OUT]

Rollouts in the loop against plain vLLM, overlap on against off, weight sync, scoring and learning
against the machine's matrix rate, and what grows with list length, vocabulary, batch and workers.
What is compared runs in turns, in processes of its own. On a machine with CUDA the roles share the
GPU, models are larger and in bfloat16, and rollouts run on vLLM where it is installed, else on
transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from figures import WARM_UP, child, machine, rates, spread, table, write
from workload import STUDENT, TEACHER, make_workload

from listopd_ray.config import ModelConfig

CUDA = torch.cuda.is_available()
BACKEND = "vllm" if find_spec("vllm") else "hf"
SHARED = ["device=cuda", "learner.dtype=bfloat16", "sync.tolerance=0.5"]  # shapes, not quality
SHARED += [f"{role}.num_gpus=0.25" for role in ("rollout", "scoring", "learner")]
PLACE = [f"rollout.backend={BACKEND}", *(SHARED if CUDA else [])]
SHAPES = (
    (
        ModelConfig(num_layers=12, hidden_size=768, intermediate_size=2304),
        ModelConfig(num_layers=24, hidden_size=1024, intermediate_size=3072),
    )
    if CUDA
    else (STUDENT, TEACHER)
)
# 1.0 M parameters without embeddings.
MILLION = ModelConfig(num_layers=3, hidden_size=160, intermediate_size=480)
GROWTH: dict[str, tuple[dict[str, int], list[str]]] = {
    "K = 9, V = 512, 64 samples, 1 worker": ({}, []),
    "K = 3": ({"num_items": 3}, []),
    "K = 6": ({"num_items": 6}, []),
    "V = 2,048": ({"vocab_size": 2048}, []),
    "V = 8,192": ({"vocab_size": 8192}, []),
    "128 samples": ({}, ["num_prompts=128"]),
    "256 samples": ({}, ["num_prompts=256"]),
    "2 workers": ({}, ["rollout.num_workers=2", "rollout.num_cpus=0.25"]),
}
STAGES = ("generate", "score", "learn", "sync", "step")


class Bench:
    def __init__(self, root: Path, num_updates: int, rounds: int) -> None:
        self._root, self._num_updates, self._rounds = root, num_updates, rounds

    def workload(self, name: str, *shapes: ModelConfig, **settings: int) -> Path:
        make_workload(self._root / name, *(shapes or SHAPES), **settings)
        return self._root / name

    def loop(self, directory: Path, *overrides: str) -> dict[str, Any]:
        arguments = (directory, self._num_updates, *PLACE, *overrides)
        return child(sys.executable, "workload.py", *arguments)

    def roles(self, directory: Path, role: str, *overrides: str) -> dict[str, Any]:
        # Ray gives an actor of at most one core one thread.
        arguments = (directory, role, *PLACE, *overrides)
        return child(sys.executable, "roles.py", *arguments, OMP_NUM_THREADS="1")

    def rollouts_and_overlap(self) -> dict[str, Any]:
        directory = self.workload("default")
        sides: dict[str, list[Any]] = {"off": [], "on": [], "plain": []}
        for _ in range(self._rounds):
            sides["off"].append(self.loop(directory, "max_staleness=0"))
            sides["plain"].append(self.roles(directory, "rollout"))
            sides["on"].append(self.loop(directory, "max_staleness=1"))
        in_loop = [_tokens_per_s(run) for run in sides["off"]]
        rows = [["in the loop, overlap off", spread(in_loop, 0)]]
        figures: dict[str, Any] = {"in_loop": in_loop}
        for side, name in (("worker", "worker alone"), ("plain", "plain vLLM on its engine")):
            alone = [median(run[side]) for run in sides["plain"] if side in run]
            if alone:
                figures[side] = alone
                ratios = [a / b for a, b in zip(in_loop, alone, strict=True)]
                rows.append([name, spread(alone, 0)])
                rows.append([f"loop / {name}", spread(ratios, 2)])
        table(f"Rollouts ({BACKEND}), tokens/s", ["", f"median [range] of {self._rounds}"], rows)
        return {"rollout_tokens_per_s": figures, "overlap": _overlap(sides["off"], sides["on"])}

    def sync(self) -> dict[str, Any]:
        runs = [self.loop(self.workload("million", MILLION, TEACHER)) for _ in range(self._rounds)]
        times = [_stage_ms(run)["sync"] for run in runs]
        table(
            "Weight sync of 1.1 M parameters: publish, load, canary on both sides",
            ["", "ms"],
            [["time/sync_s, medians of runs", spread(times)]],
        )
        return {"sync_ms": times}

    def learn(self) -> dict[str, Any]:
        result = self.roles(self.workload("default"), "learn")
        rate = result["matrix_gflops"]
        rows = [
            [
                name,
                f"{result[key]['ms']:.0f}",
                f"{result[key]['tokens_per_s']:,.0f}",
                f"{result[key]['share_of_matrix_rate']:.0%}",
            ]
            for key, name in (("score", "teacher and base"), ("learn", "learner"))
        ]
        title = f"Scoring and learning, one thread; matrix products reach {rate:,.0f} GFLOP/s"
        table(title, ["", "ms", "tokens/s (prompts too)", "of the matrix rate"], rows)
        return {"roles": result}

    def growth(self) -> dict[str, Any]:
        results, rows = {}, []
        for name, (settings, overrides) in GROWTH.items():
            tag = "-".join(f"{key}{value}" for key, value in settings.items()) or "default"
            run = self.loop(self.workload(tag, **settings), *overrides)
            results[name] = _stage_ms(run) | rates(run)
            shown = [f"{results[name][stage]:.0f}" for stage in STAGES]
            rows.append([name, *shown, f"{results[name]['samples_per_s']:.0f}"])
        table("What grows with what, median ms a turn", ["", *STAGES, "samples/s"], rows)
        return {"growth": results}


def _stage_ms(run: dict[str, Any]) -> dict[str, float]:
    return {name: 1e3 * median(run["stages"][name][WARM_UP:]) for name in STAGES}


def _tokens_per_s(run: dict[str, Any]) -> float:
    pairs = zip(run["tokens"], run["stages"]["generate"], strict=True)
    return median([tokens / seconds for tokens, seconds in pairs][WARM_UP:])


def _overlap(off: Sequence[Any], on: Sequence[Any]) -> dict[str, Any]:
    samples = {
        name: [rates(run)["samples_per_s"] for run in runs]
        for name, runs in (("off", off), ("on", on))
    }
    speed_up = [b / a for a, b in zip(samples["off"], samples["on"], strict=True)]
    stages = {name: median(_stage_ms(run)[name] for run in off) for name in STAGES}
    header = ["", "samples/s", *(f"{stage} ms" for stage in STAGES)]
    sequential = [f"{stages[stage]:.0f}" for stage in STAGES]
    empty = [""] * len(STAGES)
    rows = [
        ["off (stages of this run)", spread(samples["off"], 0), *sequential],
        ["on, staleness 1", spread(samples["on"], 0), *empty],
        ["speed-up", spread(speed_up, 2), *empty],
    ]
    table("Overlap", header, rows)
    return {"samples_per_s": samples, "speed_up": speed_up, "sequential_ms": stages}


def main(num_updates: int = 40, rounds: int = 3, out: str = "runs/bench/loop.json") -> None:
    if num_updates < WARM_UP + 6:
        sys.exit(f"{num_updates} updates: too few, the first {WARM_UP} are left out")
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores, GPU: {where['gpu']}, load {where['load']:.1f}")
    bench = Bench(Path(out).parent, num_updates, rounds)
    figures = bench.rollouts_and_overlap()
    for part in (bench.sync, bench.learn, bench.growth):
        figures |= part()
    write(out, figures)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:4])
