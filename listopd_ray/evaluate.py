"""Held-out evaluation: sampled at T = 1 and greedy, with every completion judged strictly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tqdm import tqdm

from listopd_ray.config import RolloutConfig
from listopd_ray.roles.rollout import Generated
from listopd_ray.splits import Split
from listopd_ray.task.contract import TokenText, judge
from listopd_ray.task.metrics import evaluate_judged, evaluation_to_dict
from listopd_ray.types import Judged, Prompt, Rollout

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


def chunk_size(config: RolloutConfig) -> int:
    """Prompts: each worker has its engine full four times over."""
    return 4 * config.max_num_seqs * config.num_workers


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


def _judged(parts: list[Generated], text: TokenText) -> list[Judged]:
    return [judge_rollout(rollout, text) for part in parts for rollout in part.rollouts]
