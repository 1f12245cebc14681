"""From a configuration to everything a loop needs: data, prompts, tokenizer, warm starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from listopd_ray.config import Config, needs_base
from listopd_ray.models import (
    check_same_tokenizer,
    encode_prompt,
    end_ids,
    load_tokenizer,
    model_hash,
)
from listopd_ray.task.contract import TokenText, answer_text, ideal_ranking
from listopd_ray.task.data import dataset_hash, read_examples
from listopd_ray.types import Example, ListopdError, Prompt
from listopd_ray.warmstart import warm_start

ANSWER_SLACK = 8  # tokens that a completion may be longer than the longest correct answer


@dataclass(frozen=True, kw_only=True)
class Split:
    """Examples of one split and their prompts, in the same order."""

    examples: Sequence[Example]
    prompts: Sequence[Prompt]

    @property
    def relevance(self) -> Mapping[str, Sequence[float]]:
        return {example.id: example.relevance for example in self.examples}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Inputs of a run; checkpoints are directories that exist."""

    train: Split
    evaluation: Split
    student_path: Path
    teacher_path: Path
    base_path: Path | None  # None: no step of the run needs a base
    text: TokenText
    end_ids: tuple[int, ...]
    max_new_tokens: int
    canary_ids: np.ndarray  # [L] int32: a prompt with its correct answer
    hashes: dict[str, str]  # SHA-256 of data and models

    @property
    def base_is_student(self) -> bool:
        return self.base_path == self.student_path

    def cluster_arguments(self) -> dict[str, Any]:
        longest = max(
            len(p.token_ids) for split in (self.train, self.evaluation) for p in split.prompts
        )
        return dict(
            student_path=self.student_path,
            teacher_path=self.teacher_path,
            base_path=self.base_path,
            end_ids=self.end_ids,
            max_prompt_tokens=max(longest, len(self.canary_ids)),
            max_new_tokens=self.max_new_tokens,
        )


def prepare(config: Config) -> Prepared:
    """Read the data, make the warm starts that are not cached, check that the roles fit together.

    Raises ListopdError for missing or bad data, an unusable checkpoint or base, and tokenizers
    that differ.
    """
    data = data_directory(config)
    student_path, teacher_path = warm_start(config, "student"), warm_start(config, "teacher")
    base_path = None
    if needs_base(config):
        base_path = Path(config.base.path) if config.base.path else student_path
    roles = {"student": student_path, "teacher": teacher_path}
    check_same_tokenizer(roles | ({"base": base_path} if base_path else {}))
    tokenizer = load_tokenizer(student_path)
    train = load_split(config, "train", tokenizer)
    evaluation = load_split(config, "eval", tokenizer)
    answer = _answer_ids(tokenizer, train.examples[0])
    longest = answer_length(tokenizer, (*train.examples, *evaluation.examples))
    hashes = {"data": dataset_hash(data)}
    hashes |= {role: model_hash(path) for role, path in roles.items()}
    return Prepared(
        train=train,
        evaluation=evaluation,
        student_path=student_path,
        teacher_path=teacher_path,
        base_path=base_path,
        text=TokenText(tokenizer, end_ids(student_path, tokenizer)),
        end_ids=end_ids(student_path, tokenizer),
        max_new_tokens=config.rollout.max_new_tokens or longest,
        canary_ids=np.concatenate([train.prompts[0].token_ids, answer]).astype(np.int32),
        hashes=hashes,
    )


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
    limit = config.data.max_prompt_tokens
    encoded: dict[str, np.ndarray] = {}

    def too_long(example: Example) -> str | None:
        ids = encode_prompt(tokenizer, example, chat_template=config.task.chat_template)
        encoded[example.id] = ids
        return f"prompt of {len(ids)} tokens (limit {limit})" if len(ids) > limit else None

    examples = read_examples(
        data / f"{name}.jsonl",
        max_bad_rows=config.data.max_bad_rows,
        quarantine=data / f"{name}.quarantine.jsonl",
        reject=too_long,
    )
    prompts = [
        Prompt(id=e.id, token_ids=encoded[e.id], num_items=len(e.items)) for e in examples
    ]
    return Split(examples=examples, prompts=prompts)


def answer_length(tokenizer: Any, examples: Sequence[Example]) -> int:
    """Tokens that a completion may take: those of the longest correct answer and some slack."""
    longest = max(examples, key=lambda example: len(example.items))
    return len(_answer_ids(tokenizer, longest)) + ANSWER_SLACK


def _answer_ids(tokenizer: Any, example: Example) -> np.ndarray:
    text = answer_text(ideal_ranking(example.relevance))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)
