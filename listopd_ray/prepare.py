"""From a configuration to everything a loop needs: data, prompts, tokenizer, warm starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from listopd_ray.config import Config, needs_base
from listopd_ray.models import check_same_tokenizer, end_ids, load_tokenizer, model_hash
from listopd_ray.splits import Split, answer_ids, answer_length, data_directory, load_split
from listopd_ray.task.contract import TokenText
from listopd_ray.task.data import dataset_hash
from listopd_ray.types import Example, ListopdError
from listopd_ray.warmstart import warm_start


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Inputs of a run; checkpoints are directories that exist."""

    train: Split
    evaluation: Split
    student_path: Path
    teacher_path: Path
    teachers: Mapping[str, Path] = field(default_factory=dict)  # the further ones, by name
    base_path: Path | None  # None: no step of the run needs a base
    text: TokenText
    end_ids: tuple[int, ...]
    max_new_tokens: int
    canary_ids: np.ndarray  # [L] int32: a prompt with its correct answer
    hashes: dict[str, str]  # SHA-256 of data and models

    def cluster_arguments(self) -> dict[str, Any]:
        longest = max(
            len(p.token_ids) for split in (self.train, self.evaluation) for p in split.prompts
        )
        return dict(
            student_path=self.student_path,
            teacher_path=self.teacher_path,
            teachers=self.teachers,
            end_ids=self.end_ids,
            max_prompt_tokens=max(longest, len(self.canary_ids)),
            max_new_tokens=self.max_new_tokens,
        )


def prepare(config: Config) -> Prepared:
    """Read the data, make the warm starts that are not cached, check that the roles fit together.

    Raises ListopdError for missing or bad data, an unusable checkpoint or base, tokenizers that
    differ, and a configuration whose samples nothing can be learned from.
    """
    if config.rollout.grammar:
        raise ListopdError(
            "rollout.grammar: only for evaluate, rank and label; in training its mask would hide "
            "the very tokens whose probabilities matter"
        )
    data = data_directory(config)
    given = {"student": config.student.path, "teacher": config.teacher.path}
    given |= {f"teachers.{name}": path for name, path in config.teachers.items()}
    if needs_base(config):
        given["base"] = config.base.path
    # Before minutes go into warm starts.
    check_same_tokenizer({role: Path(path) for role, path in given.items() if path})
    student_path, teacher_path = warm_start(config, "student"), warm_start(config, "teacher")
    base_path = None
    if needs_base(config):
        base_path = Path(config.base.path) if config.base.path else student_path
    teachers = {name: Path(path) for name, path in config.teachers.items()}
    roles = {"student": student_path, "teacher": teacher_path}
    roles |= {f"teachers.{name}": path for name, path in teachers.items()}
    check_same_tokenizer(roles | ({"base": base_path} if base_path else {}))
    tokenizer = load_tokenizer(student_path)
    train = load_split(config, "train", tokenizer)
    evaluation = load_split(config, "eval", tokenizer)
    check_teachers(config, (*train.examples, *evaluation.examples))
    answer = answer_ids(tokenizer, train.examples[0])
    longest = answer_length(tokenizer, (*train.examples, *evaluation.examples))
    models = {"warm_start": student_path, "teacher": teacher_path, "base": base_path}
    models |= {f"teachers.{name}": path for name, path in teachers.items()}
    hashes = {"data": dataset_hash(data)}
    hashes |= {name: model_hash(path) for name, path in models.items() if path is not None}
    return Prepared(
        train=train,
        evaluation=evaluation,
        student_path=student_path,
        teacher_path=teacher_path,
        teachers=teachers,
        base_path=base_path,
        text=TokenText(tokenizer, end_ids(student_path, tokenizer)),
        end_ids=end_ids(student_path, tokenizer),
        max_new_tokens=config.rollout.max_new_tokens or longest,
        canary_ids=np.concatenate([train.prompts[0].token_ids, answer]).astype(np.int32),
        hashes=hashes,
    )


def check_teachers(config: Config, examples: Iterable[Example]) -> None:
    """Raises ListopdError for an example that asks for a teacher which is not there."""
    for example in examples:
        if example.teacher is not None and example.teacher not in config.teachers:
            known = ", ".join(sorted(config.teachers)) or "none"
            raise ListopdError(
                f"teachers: example {example.id!r} asks for {example.teacher!r}; there: {known}"
            )


def serving_arguments(model: str, config: Config, tokenizer: Any, split: Split) -> dict[str, Any]:
    """What `cluster.serve` needs to run `model` on the prompts of `split`."""
    return dict(
        student_path=Path(model),
        end_ids=end_ids(model, tokenizer),
        max_prompt_tokens=max(len(prompt.token_ids) for prompt in split.prompts),
        max_new_tokens=config.rollout.max_new_tokens or answer_length(tokenizer, split.examples),
    )
