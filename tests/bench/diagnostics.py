"""What the per-token-class diagnostics cost: seconds with and without them, in one process.

    python tests/bench/diagnostics.py STUDENT TEACHER DATA [rollouts]

STUDENT and TEACHER are checkpoints of the embedded default (`listopd warmstart conf/demo.yaml` says
where they are). Times one turn's stages – sampling, scoring, the update, the driver's share – and
within them the parts that only the diagnostics need: token classes and unused-id mass in the
teacher, masses by class in the learner, governor and alarm in the driver.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict

import numpy as np
import torch

import listopd_ray.roles.scoring as scoring_module
import listopd_ray.roles.update_metrics as metrics_module
from listopd_ray.config import Config, TeacherActorConfig, load_config
from listopd_ray.handles import make_requests
from listopd_ray.models import end_ids, load_tokenizer
from listopd_ray.roles.hf_engine import HfEngine
from listopd_ray.roles.learner import Learner
from listopd_ray.roles.rollout import Generated, make_rollout
from listopd_ray.roles.teacher import Teacher
from listopd_ray.splits import answer_length, load_split
from listopd_ray.steering import Steering
from listopd_ray.task.contract import TokenText
from listopd_ray.train import contract_metrics

SPENT: dict[str, float] = defaultdict(float)
TURNS = 12


def timed(name, function):
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            SPENT[name] += time.perf_counter() - start

    return wrapper


def main(student: str, teacher_path: str, data: str, num_rollouts: int = 192) -> None:
    torch.set_num_threads(1)
    config = load_config(Config, [f"data.path={data}", "lam=1.2", "clip=2"])
    tokenizer = load_tokenizer(student)
    split = load_split(config, "train", tokenizer)
    text = TokenText(tokenizer, end_ids(student, tokenizer))
    engine = HfEngine(
        model_path=student,
        dtype="float32",
        device="cpu",
        end_ids=end_ids(student, tokenizer),
        max_new_tokens=answer_length(tokenizer, split.examples),
        batch_size=num_rollouts,
    )
    teacher = Teacher(
        TeacherActorConfig(), teacher_path=teacher_path, dtype="float32", device="cpu"
    )
    canary = np.concatenate([split.prompts[0].token_ids, [1]])
    learner = Learner(config, student_path=student, canary_ids=canary)
    steering = Steering(config, 0)
    teacher._contract.places = timed("token classes", teacher._contract.places)  # and ids due
    scoring_module._starts = timed("unused-id mass", scoring_module._starts)
    scoring_module._mass = timed("unused-id mass", scoring_module._mass)
    metrics_module._class_metrics = timed("masses by class", metrics_module._class_metrics)
    steering.observe = timed("governor and alarm", steering.observe)
    for turn in range(TURNS):
        if turn == 2:
            SPENT.clear()  # caches are warm
        requests = make_requests(split.prompts[:num_rollouts], turn, "bench")
        sampled = timed("generate", engine.generate)(requests, False)
        rollouts = [make_rollout(r, c, turn) for r, c in zip(requests, sampled, strict=True)]
        generated = Generated(rollouts=tuple(rollouts), seconds=0.0)
        scored = timed("score", teacher.score)(generated, student)
        metrics = timed("learn", learner.step)(1.2, 1e-4, scored)
        metrics |= timed("judge", contract_metrics)([generated], text)
        steering.observe(metrics, 1.2)
    stages = ("generate", "score", "learn", "judge", "governor and alarm")
    whole = sum(SPENT[stage] for stage in stages)
    parts = ("token classes", "unused-id mass", "masses by class", "governor and alarm")
    for name in (*stages[:-1], *parts):
        seconds = SPENT[name] / (TURNS - 2)
        print(f"{name:20s} {1e3 * seconds:8.2f} ms  {SPENT[name] / whole:6.2%} of the turn")
    share = sum(SPENT[part] for part in parts) / whole
    print(f"diagnostics: {share:.2%} of a turn of {1e3 * whole / (TURNS - 2):.0f} ms")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
