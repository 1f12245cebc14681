"""TRL's `DistillationTrainer` on the workload of the benchmarks; runs in the peers' environment.

    python tests/bench/peer_trl.py DIRECTORY NUM_UPDATES THREADS

prints one line of JSON as `workload.py` does. Set up in its favour: on-policy, reverse KL (its
default), one batch an update, float32, no gradient checkpointing, no logging, no saving, no dropout
to switch off. Its loss is the divergence over the whole vocabulary; it has no base model to score.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

BATCH = 64
NEW_TOKENS = 32


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.perf_counter())


def main(directory: Path, num_updates: int, threads: int) -> None:
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = json.loads((directory / "prompts.json").read_text())
    models = [
        AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
        for name in ("student", "teacher")
    ]
    tokenizer = AutoTokenizer.from_pretrained(directory / "student", padding_side="left")
    clock = Clock()
    trainer = DistillationTrainer(
        model=models[0],
        teacher_model=models[1],
        args=DistillationConfig(
            output_dir=str(directory / "trl"),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            max_steps=num_updates,
            max_completion_length=NEW_TOKENS,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device != "cpu",
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    lengths = trainer._metrics["train"]["completions/mean_length"]
    assert all(length == NEW_TOKENS for length in lengths), lengths
    seconds = [end - start for start, end in pairwise(clock.ends)]
    print(json.dumps({"seconds": seconds, "samples": BATCH, "version": version("trl")}))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
