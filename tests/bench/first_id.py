"""What is said at the first id, where a collapse begins: figures of `docs/cliff.md`.

    python tests/bench/first_id.py RUN …

RUN: the directory of a finished run. Its teacher, base and trained student read `{"ranking": [`
after 512 held-out prompts. Printed: the mean masses on another `{`, on ids and on anything else,
and KL(π_B‖π_T) in nats beside logit p − logit b of the mean masses, which λ* is made of.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from listopd_ray.cliff.threshold import logit
from listopd_ray.config import Config, load_config
from listopd_ray.models import load_model, load_tokenizer
from listopd_ray.roles.batching import collate, completion_logprobs
from listopd_ray.splits import load_split
from listopd_ray.task.contract import IdTokens
from listopd_ray.warmstart import warm_start


@torch.inference_mode()
def main(run: Path) -> None:
    config = load_config(Config, [str(run / "config.yaml")])
    tokenizer = load_tokenizer(run / "student")
    prompts = load_split(config, "eval", tokenizer).prompts[:512]
    opening = np.array(tokenizer.encode('{"ranking": ['), dtype=np.int32)
    (brace,) = tokenizer.encode("{")
    ids = {p.num_items: IdTokens(tokenizer, p.num_items) for p in prompts}
    batch = collate(
        [np.concatenate([prompt.token_ids, opening]) for prompt in prompts],
        [np.array([brace], dtype=np.int32)] * len(prompts),  # any token: what is before it counts
    )
    paths = {
        "teacher": warm_start(config, "teacher"),
        "base": warm_start(config, "student"),
        "student": run / "student",
    }
    said = {
        name: completion_logprobs(load_model(path, dtype="float32", device="cpu").eval(), batch)
        for name, path in paths.items()
    }
    print(run)
    for name, logprobs in said.items():
        mass = logprobs.exp()
        on_ids = sum(
            row[ids[p.num_items].first_tokens(frozenset(range(1, p.num_items + 1)))].sum().item()
            for row, p in zip(mass, prompts, strict=True)
        ) / len(prompts)
        on_brace = mass[:, brace].mean().item()
        rest = 1 - on_brace - on_ids
        print(f"  {name:8} another {{ {on_brace:.2g}   ids {on_ids:.4f}   else {rest:.2g}")
    teacher, base = said["teacher"], said["base"]
    divergence = (base.exp() * (base - teacher)).sum(dim=-1).mean()
    modal = teacher.argmax(dim=-1, keepdim=True)
    p, b = (logprobs.exp().gather(-1, modal).mean().item() for logprobs in (teacher, base))
    print(
        f"  KL(base‖teacher) {divergence:.2f}   p {p:.3f}   b {b:.3f}   "
        f"logit p − logit b {logit(p) - logit(b):.2f}"
    )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
