"""Splits of a dataset as a model sees them: examples with their encoded prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from listopd_ray.config import Config
from listopd_ray.models import encode_prompt
from listopd_ray.task.contract import answer_text, ideal_ranking
from listopd_ray.task.data import read_examples
from listopd_ray.types import Example, ListopdError, Prompt

Reject = Callable[[Example], str | None]  # a reason to set a well-formed example aside

ANSWER_SLACK = 8  # tokens that a completion may be longer than the longest correct answer


@dataclass(frozen=True, kw_only=True)
class Split:
    """Examples of one split and their prompts, in the same order."""

    examples: Sequence[Example]
    prompts: Sequence[Prompt]

    @property
    def relevance(self) -> Mapping[str, Sequence[float]]:
        return {example.id: example.relevance for example in self.examples}


def data_directory(config: Config) -> Path:
    """The dataset directory; raises ListopdError where it is not set or not there."""
    if config.data.path is None:
        raise ListopdError("data.path: give a directory that `listopd data` wrote")
    path = Path(config.data.path)
    if not (path / "train.jsonl").is_file():
        raise ListopdError(f"data.path: no train.jsonl in {path} (make one with `listopd data`)")
    return path


def load_split(config: Config, name: str, tokenizer: Any) -> Split:
    """One split, encoded; over-long prompts are quarantined beside the data with other bad rows."""
    data = data_directory(config)

    def read(reject: Reject) -> list[Example]:
        return read_examples(
            data / f"{name}.jsonl",
            max_bad_rows=config.data.max_bad_rows,
            quarantine=data / f"{name}.quarantine.jsonl",
            reject=reject,
        )

    return encode_rows(config, tokenizer, read)


def encode_rows(config: Config, tokenizer: Any, read: Callable[[Reject], list[Example]]) -> Split:
    """What `read` finds, encoded; it is given a check that refuses prompts that are too long."""
    limit = config.data.max_prompt_tokens
    encoded: dict[str, np.ndarray] = {}

    def too_long(example: Example) -> str | None:
        ids = encode_prompt(tokenizer, example, chat_template=config.task.chat_template)
        encoded[example.id] = ids
        return f"prompt of {len(ids)} tokens (limit {limit})" if len(ids) > limit else None

    examples = read(too_long)
    prompts = [
        Prompt(id=e.id, token_ids=encoded[e.id], num_items=len(e.items), teacher=e.teacher)
        for e in examples
    ]
    return Split(examples=examples, prompts=prompts)


def answer_length(tokenizer: Any, examples: Sequence[Example]) -> int:
    """Tokens that a completion may take: those of the longest correct answer and some slack."""
    longest = max(examples, key=lambda example: len(example.items))
    return len(answer_ids(tokenizer, longest)) + ANSWER_SLACK


def answer_ids(tokenizer: Any, example: Example) -> np.ndarray:
    """Token ids [T] int32 of the correct answer, end of sequence included."""
    text = answer_text(ideal_ranking(example.relevance))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)
