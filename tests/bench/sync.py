"""Weight sync side by side: bytes, and seconds to publish, load and compare the canary.

python tests/bench/sync.py [MILLIONS …] – Qwen3 models of about so many parameters (1 10 100), one
learner and one worker of a kind, the methods in turn; ms, median (smallest – largest). `packed` is
how vLLM's CPU backend keeps matrices by itself, `in place` how it is run up to a width.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from listopd_ray.cluster import _TORCH_ENV, _VLLM_CPU_ENV
from listopd_ray.config import Config, LoraConfig, RolloutConfig
from listopd_ray.models import build_tokenizer
from listopd_ray.roles import vllm_weights
from listopd_ray.roles.batching import collate
from listopd_ray.roles.publisher import Publisher
from listopd_ray.roles.ranks import Ranks
from listopd_ray.roles.rollout import Request, RolloutWorker
from listopd_ray.roles.student import Student
from listopd_ray.types import Prompt

SHAPES = {  # millions → layers, width, MLP, vocabulary, head
    0: (2, 64, 192, 420, 32),  # the demo's student
    1: (4, 128, 384, 1024, 32),
    4: (5, 256, 768, 2048, 32),
    10: (6, 320, 960, 4096, 32),
    100: (12, 768, 2304, 8192, 64),
}
ROUNDS = {10: 10, 100: 3}
RANK = 8
CANARY = np.arange(80, dtype=np.int32) + 5  # tokens, about a prompt with its answer
METHODS = {  # row → (method, worker)
    "object_store, packed": ("object_store", "packed"),
    "object_store, in place": ("object_store", "in place"),
    "directory, packed": ("directory", "packed"),
    "directory, in place": ("directory", "in place"),
    f"adapter of rank {RANK}": ("adapter", "adapter"),
}


class Source:
    """The learner's part."""

    def __init__(self, path, directory):
        adapted = Config(lora=LoraConfig(rank=RANK))
        whole = Student(path, Config(), Ranks())
        students = {"object_store": whole, "directory": whole}
        students["adapter"] = Student(path, adapted, Ranks())
        self._publishers = {
            method: (student, Publisher(student, method, Path(directory, method)))
            for method, student in students.items()
        }

    @torch.no_grad()
    def publish(self, method):
        since = time.perf_counter()
        student, publisher = self._publishers[method]
        batch = collate([CANARY[:1]], [CANARY[1:]])
        canary = student.logprobs(batch, batch.token_ids[:, None])[:, 0].numpy()
        return publisher.publish(0, CANARY, canary, since=since)


class Worker(RolloutWorker):
    def __init__(self, path, kind):
        vllm_weights.UNPACKED_WIDTH = 0 if kind == "packed" else 1 << 20
        super().__init__(
            RolloutConfig(kv_cache_mib=256),
            max_num_seqs=64,
            model_path=path,
            dtype="float32",
            device="cpu",
            end_ids=(0,),
            max_prompt_tokens=100,
            max_new_tokens=32,
            tolerance=1e-3,
            adapter_rank=RANK if kind == "adapter" else 0,
        )


def make(path, millions):
    layers, width, mlp, vocabulary, head = SHAPES[millions]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        head_dim=head,
        tie_word_embeddings=True,
        initializer_range=0.06,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(path)
    build_tokenizer(["a"], vocab_size=300).save_pretrained(path)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def shown(values):
    return f"{np.median(values):.1f} ({min(values):.1f} – {max(values):.1f})"


def measure(millions):
    prompt = Prompt(id="p", token_ids=CANARY[:50], num_items=6)
    requests = [Request(prompt=prompt, sample_index=n, seed=n) for n in range(64)]
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch, "model"))
        size = make(path, millions)
        env = {"env_vars": _TORCH_ENV}
        source = ray.remote(Source).options(num_cpus=1, runtime_env=env).remote(path, scratch)
        env = {"env_vars": _VLLM_CPU_ENV}
        remote = ray.remote(Worker).options(num_cpus=0.5, runtime_env=env)
        workers = {kind: remote.remote(path, kind) for kind in ("packed", "in place", "adapter")}
        rows = {name: [] for name in METHODS}
        for number in range(2 + ROUNDS.get(millions, 20)):
            for name, (method, kind) in METHODS.items():
                start = time.perf_counter()
                loaded = ray.get(workers[kind].load_weights.remote(source.publish.remote(method)))
                whole = time.perf_counter() - start
                parts = (loaded.publish_seconds, loaded.load_seconds, loaded.canary_seconds, whole)
                if number >= 2:
                    rows[name].append((loaded.num_bytes, *(1e3 * part for part in parts)))
        for name, measured in rows.items():
            num_bytes, *parts = zip(*measured, strict=True)
            cells = [f"{size:.2f} M", name, f"{num_bytes[0] / 1e6:.2f} MB", *map(shown, parts)]
            print("|", " | ".join(cells), "|", flush=True)
        seconds = {kind: [] for kind in workers}
        for _ in range(1 if millions == 100 else 5):
            for kind, worker in workers.items():
                generated = ray.get(worker.generate.remote(requests))
                seconds[kind].append(1e3 * generated.seconds)
        drawn = ", ".join(f"{kind} {shown(values)}" for kind, values in seconds.items())
        print(f"{size:.2f} M: 64 samples of 32 tokens, ms: {drawn}", flush=True)
        for actor in (source, *workers.values()):
            ray.kill(actor)


def main():
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    print("| parameters | method | bytes | publish, ms | load, ms | canary, ms | together, ms |")
    print("|---|---|---|---|---|---|---|")
    for millions in map(int, sys.argv[1:] or ("1", "10", "100")):
        measure(millions)
    ray.shutdown()


if __name__ == "__main__":
    main()
