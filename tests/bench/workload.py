"""What the benchmarks of speed work on, and one run of our loop on it.

    python tests/bench/workload.py DIRECTORY NUM_UPDATES [key=value …]

makes data and models under DIRECTORY unless they are there, runs the loop through the code that
`listopd train` runs, and prints one line of JSON: seconds of every update and of its stages.

Every prompt has 48 tokens and every completion 32: the models are random (seeded), and made such
that they do not sample the end token.
"""

from __future__ import annotations

import json
import random
import shutil
import string
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from listopd_ray.cluster import launch
from listopd_ray.config import Config, ModelConfig, load_config
from listopd_ray.job import distill
from listopd_ray.models import build_tokenizer, make_model
from listopd_ray.prepare import prepare
from listopd_ray.task.contract import prompt_text
from listopd_ray.task.synthetic import SyntheticConfig, make_examples, write_synthetic

NUM_ITEMS = 9  # prompts of 48 tokens
NEW_TOKENS = 32
VOCAB = 512
STUDENT = ModelConfig(num_layers=2, hidden_size=64, intermediate_size=192)
TEACHER = ModelConfig(num_layers=3, hidden_size=96, intermediate_size=288)


def make_workload(
    directory: Path,
    student: ModelConfig = STUDENT,
    teacher: ModelConfig = TEACHER,
    vocab_size: int = VOCAB,
    num_items: int = NUM_ITEMS,
) -> None:
    """Data, student and teacher in `directory`, which stays as it is where it exists."""
    if (directory / "data").exists():
        return
    settings = SyntheticConfig(out=str(directory / "data"), num_items=num_items, num_train=4096)
    texts = [prompt_text(example) for example in make_examples(settings)["train"]]
    words = random.Random(0)
    filler = ["".join(words.choices(string.ascii_lowercase, k=6)) for _ in range(4 * vocab_size)]
    tokenizer = build_tokenizer([*texts, *filler], vocab_size)
    for name, shape, seed in (("student", student, 0), ("teacher", teacher, 1)):
        model = make_model(shape, tokenizer, seed)
        _silence(model, tokenizer.eos_token_id)
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    (directory / "prompts.json").write_text(json.dumps(texts))
    write_synthetic(settings)  # last: its presence says that all is there


@torch.no_grad()
def _silence(model: PreTrainedModel, token_id: int) -> None:
    """Probability 1e-6 at most for `token_id`: all embeddings share a direction, its own is the
    opposite one, and what the (tied) head sees begins with an embedding."""
    embeddings = model.get_input_embeddings().weight
    shared = torch.full_like(embeddings[0], 0.06)
    embeddings += shared
    embeddings[token_id] = -6 * shared


def our_config(directory: Path, num_updates: int, overrides: list[str]) -> Config:
    """λ ≠ 1, so that the base is scored too; evaluations and checkpoints before and after only."""
    return load_config(
        Config,
        [
            "name=run",
            f"out={directory / 'runs'}",
            f"cache={directory / 'cache'}",
            f"data.path={directory / 'data'}",
            f"student.path={directory / 'student'}",
            f"teacher.path={directory / 'teacher'}",
            f"num_steps={num_updates}",
            "lam=1.2",
            "lr=1e-6",  # nothing is learnt: the work stays the same
            f"rollout.max_new_tokens={NEW_TOKENS}",
            "evaluation.every=0",
            "evaluation.num_prompts=8",
            "checkpoint.every=0",
            "tracking.wandb=false",
            *overrides,
        ],
    )


def our_run(directory: Path, num_updates: int, overrides: list[str]) -> dict[str, Any]:
    """Seconds per update (the clock between its rows of metrics), and stage times as logged."""
    config = our_config(directory, num_updates, overrides)
    shutil.rmtree(Path(config.out), ignore_errors=True)
    prepared = prepare(config)
    ends: list[float] = []
    rows: list[dict[str, float]] = []

    def report(metrics: dict[str, float]) -> None:
        ends.append(time.perf_counter())
        rows.append(dict(metrics))

    with launch(config, **prepared.cluster_arguments()) as cluster:
        distill(config, prepared, cluster, report)
    updates = rows[1:]  # the first row is the warm start's evaluation
    stages = {
        name: [row[f"time/{name}_s"] for row in updates]
        for name in ("generate", "score", "learn", "sync", "step")
    }
    seconds = [end - start for start, end in pairwise(ends)]
    tokens = [row["rollout/tokens"] for row in updates]
    samples = config.num_prompts * config.group_size
    return {"seconds": seconds, "stages": stages, "tokens": tokens, "samples": samples}


def main() -> None:
    directory, num_updates, *overrides = sys.argv[1:]
    make_workload(Path(directory))
    print(json.dumps(our_run(Path(directory), int(num_updates), overrides)))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main()
