"""Held-out evaluation: sampled at T = 1 and greedy, with every completion judged strictly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from listopd_ray.config import Config, max_num_seqs
from listopd_ray.roles.rollout import Generated
from listopd_ray.splits import Split
from listopd_ray.task.contract import TokenText, judge
from listopd_ray.task.metrics import evaluate_judged, evaluation_to_dict
from listopd_ray.types import Inspection, Judged, Prompt, Rollout

TAG = "evaluation"  # one occasion: every evaluation of a run draws with the same noise


class Sampler(Protocol):
    """What evaluation needs of the rollout workers."""

    def generate(
        self, prompts: Sequence[Prompt], tag: str, *, group_size: int = 1, greedy: bool = False
    ) -> list[Any]: ...

    def fetch(self, generated: list[Any]) -> list[Generated]: ...


class InChunks:
    """A sampler whose bar moves chunk by chunk. All are asked for at once, so that no engine waits
    for the driver."""

    def __init__(self, sampler: Sampler, chunk_size: int, bar: tqdm) -> None:
        self._sampler = sampler
        self._chunk_size = chunk_size
        self._bar = bar

    def generate(
        self, prompts: Sequence[Prompt], tag: str, *, group_size: int = 1, greedy: bool = False
    ) -> list[Any]:
        size, how = self._chunk_size, {"group_size": group_size, "greedy": greedy}
        chunks = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        return [self._sampler.generate(chunk, tag, **how) for chunk in chunks]  # type: ignore[arg-type]

    def fetch(self, generated: list[Any]) -> list[Generated]:
        parts = []
        for chunk in generated:
            done = self._sampler.fetch(chunk)
            self._bar.update(sum(len(part.rollouts) for part in done))
            parts += done
        return parts


def chunk_size(config: Config) -> int:
    """Prompts: each worker has its engine full four times over."""
    return 4 * max_num_seqs(config) * config.rollout.num_workers


def evaluate(
    sampler: Sampler, split: Split, text: TokenText, num_prompts: int
) -> tuple[dict[str, Any], list[Judged]]:
    """The summary's object – T = 1, with the greedy one under `greedy` – and the T = 1 outputs."""
    prompts = split.prompts[:num_prompts]
    pending = [sampler.generate(prompts, TAG, greedy=greedy) for greedy in (False, True)]
    sampled, greedy = ([*_judged(sampler.fetch(p), text)] for p in pending)
    result = evaluation_to_dict(evaluate_judged(sampled, split.relevance))
    result["greedy"] = evaluation_to_dict(evaluate_judged(greedy, split.relevance))
    return result, sampled


def judge_rollout(rollout: Rollout, text: TokenText) -> Judged:
    completion = text.text(rollout.token_ids)
    return judge(rollout.prompt.id, completion, rollout.prompt.num_items, rollout.finish_reason)


def sample_rows(
    judged: Sequence[Judged], prompts: Sequence[Prompt], text: TokenText
) -> list[dict[str, Any]]:
    """Of samples.jsonl: the outputs for the first prompts of an evaluation, as many as `judged`."""
    return [
        {
            "id": output.example_id,
            "num_items": prompt.num_items,
            "prompt": text.text(prompt.token_ids),
            "completion": output.text,
            "ranking": output.ranking,
            "reason": output.reason,
        }
        for output, prompt in zip(judged, prompts, strict=False)
    ]


def inspection_row(
    inspection: Inspection, rollouts: Sequence[Rollout], text: TokenText
) -> dict[str, Any]:
    """Of updates.jsonl: samples of an update with the advantage (nats) of every token, and
    histograms. `rollouts`: those of the update, in order."""
    samples = []
    for rollout, advantages in zip(rollouts, inspection.advantages, strict=False):
        row = sample_rows([judge_rollout(rollout, text)], [rollout.prompt], text)[0]
        # Only an update that is skipped has others; JSON has none.
        row["advantages"] = [float(a) if np.isfinite(a) else None for a in advantages]
        row["tokens"] = text.pieces(rollout.token_ids)
        samples.append(row)
    histograms = {name: asdict(value) for name, value in inspection.histograms.items()}
    return {"rollouts": samples, "histograms": histograms}


def _judged(parts: list[Generated], text: TokenText) -> list[Judged]:
    return [judge_rollout(rollout, text) for part in parts for rollout in part.rollouts]
