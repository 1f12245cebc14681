"""What a user would do in place of extrapolation, judged on the same held-out prompts.

grammar      the warm start, decoded under the contract's JSON schema
sft          as many more supervised updates on the teacher's greedy outputs
sft+grammar  that one, decoded under the schema
opd+grammar  plain on-policy distillation (λ = 1), decoded under the schema
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from listopd_ray.config import Config, with_values
from listopd_ray.job import evaluate_checkpoint
from listopd_ray.label import label
from listopd_ray.tracking import replace_file
from listopd_ray.warmstart import warm_start


def run_baselines(trial: Config, run: Path, directory: Path) -> Iterator[dict[str, Any]]:
    """One row a baseline for the seed of `trial`, a λ = 1 run finished in `run`; results are kept.

    `seconds` are those of training and labelling; the labels are shared by all seeds.
    """
    base = warm_start(trial, "student")
    labels, labelling_s = _labels(trial, directory / "labels")
    tuning = with_values(
        trial,
        {
            "data.path": str(labels),
            "student.path": str(base),
            "student.warmstart.num_steps": trial.num_steps,
            "student.warmstart.batch_size": trial.num_prompts * trial.group_size,
            "student.warmstart.lr": trial.lr,
            "student.warmstart.warmup_steps": 1,
            "student.warmstart.format_noise": 0.0,
            "student.warmstart.prompt_loss_weight": 0.0,
        },
    )
    start = time.perf_counter()
    tuned = warm_start(tuning, "student")
    seconds_file = directory / f"sft-s{trial.seed}.seconds"
    if not seconds_file.exists():  # else the warm start came from the cache
        replace_file(seconds_file, f"{time.perf_counter() - start}")
    tuning_s = labelling_s + float(seconds_file.read_text())
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for name, model, grammar, seconds in (
        ("grammar", base, True, 0.0),
        ("sft", tuned, False, tuning_s),
        ("sft+grammar", tuned, True, tuning_s),
        ("opd+grammar", run / "student", True, summary["seconds"]),
    ):
        file = directory / f"{name}-s{trial.seed}.json"
        if not file.exists():
            config = with_values(trial, {"rollout.grammar": grammar})
            row = {"curve": name, "lam": None, "seed": trial.seed, "seconds": seconds}
            row |= evaluate_checkpoint(str(model), config)
            replace_file(file, json.dumps(row))
        yield json.loads(file.read_text(encoding="utf-8"))


def _labels(config: Config, out: Path) -> tuple[Path, float]:
    """The training data as the teacher ranks it greedily, made once; and the seconds it took."""
    if not out.exists():
        partial = out.with_name(f"{out.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        start = time.perf_counter()
        label(config, warm_start(config, "teacher"), partial)
        (partial / "seconds").write_text(f"{time.perf_counter() - start}")
        os.replace(partial, out)
    return out, float((out / "seconds").read_text())
