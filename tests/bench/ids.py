"""Where a collapse begins: item ids place by place. Figures of `docs/cliff.md`.

    python tests/bench/ids.py RUN …

RUN: the directory of a finished run. Two tables on 512 held-out prompts. First p, b and λ* of the
1st, 2nd, … id of the base's own answers (contract-valid prefixes, T = 1). Then what teacher, base
and trained student say after `{"ranking": [`: mean mass on another `{`, on ids, on anything else.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from listopd_ray.cliff.threshold import lambda_star
from listopd_ray.config import Config, TeacherActorConfig, load_config
from listopd_ray.handles import make_requests
from listopd_ray.models import end_ids, load_model, load_tokenizer
from listopd_ray.roles.batching import collate, completion_logprobs
from listopd_ray.roles.hf_engine import HfEngine
from listopd_ray.roles.rollout import Generated, make_rollout
from listopd_ray.roles.teacher import Teacher
from listopd_ray.splits import Split, answer_length, load_split
from listopd_ray.task.contract import IdTokens
from listopd_ray.warmstart import warm_start

CLIPS = (1.3, 2.0, 5.0)


def main(run: Path) -> None:
    config = load_config(Config, [str(run / "config.yaml")])
    tokenizer = load_tokenizer(run / "student")
    split = load_split(config, "eval", tokenizer)
    teacher, base = warm_start(config, "teacher"), warm_start(config, "student")
    print(run)
    by_place(teacher, base, split, tokenizer)
    at_the_first({"teacher": teacher, "base": base, "student": run / "student"}, split, tokenizer)


def by_place(teacher_path: Path, base: Path, split: Split, tokenizer) -> None:
    teacher = Teacher(
        TeacherActorConfig(), teacher_path=str(teacher_path), dtype="float32", device="cpu"
    )
    engine = HfEngine(
        model_path=str(base),
        dtype="float32",
        device="cpu",
        end_ids=end_ids(base, tokenizer),
        max_new_tokens=answer_length(tokenizer, split.examples),
        batch_size=128,
    )
    requests = make_requests(split.prompts[:512], 0, "ids")
    completions = engine.generate(requests, False)
    rollouts = [make_rollout(r, c, 0) for r, c in zip(requests, completions, strict=True)]
    masses = defaultdict(list)  # place → (p, b) of every output that gets so far
    generated = Generated(rollouts=tuple(rollouts), seconds=0.0)
    for scored in teacher.score(generated, str(base)).rollouts:
        for place, at in enumerate(np.flatnonzero(~np.isnan(scored.teacher_unused_mass)), start=1):
            pair = scored.teacher_modal_logprobs[at], scored.base_modal_logprobs[at]
            masses[place].append(np.exp(pair))
    print("  id   outputs      p      b   λ* at c =", *CLIPS)
    for place, pairs in masses.items():
        p, b = np.mean(pairs, axis=0).tolist()
        stars = " ".join(f"{lambda_star(p, b, clip):.3f}" for clip in CLIPS)
        print(f"  {place:2} {len(pairs):9}  {p:.3f}  {b:.3f}   {stars}")


@torch.inference_mode()
def at_the_first(paths: dict[str, Path], split: Split, tokenizer) -> None:
    prompts = split.prompts[:512]
    opening = np.array(tokenizer.encode('{"ranking": ['), dtype=np.int32)
    (brace,) = tokenizer.encode("{")
    batch = collate(
        [np.concatenate([prompt.token_ids, opening]) for prompt in prompts],
        [np.array([brace], dtype=np.int32)] * len(prompts),  # any token: what is before it counts
    )
    ids = {k: IdTokens(tokenizer, k) for k in {prompt.num_items for prompt in prompts}}
    every = {k: tokens.first_tokens(frozenset(range(1, k + 1))) for k, tokens in ids.items()}
    for name, path in paths.items():
        model = load_model(path, dtype="float32", device="cpu").eval()
        mass = completion_logprobs(model, batch).exp()
        rows = zip(mass, prompts, strict=True)
        on_ids = np.mean([row[every[prompt.num_items]].sum().item() for row, prompt in rows])
        on_brace = mass[:, brace].mean().item()
        rest = 1 - on_brace - on_ids
        print(f"  {name:8} another {{ {on_brace:.2g}   ids {on_ids:.4f}   else {rest:.2g}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
