"""`listopd rank`: a checkpoint's rankings of examples from a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from listopd_ray.config import Config
from listopd_ray.task.data import BadRow, Quarantine, parse_example, read_rows
from listopd_ray.types import Example, Judged, ListopdError


@dataclass(frozen=True)
class RankConfig(Config):
    """A run's configuration, so that its YAML files serve here too, and where rows come and go."""

    input: str = "/dev/stdin"  # JSONL file of examples
    output: str | None = None  # JSONL file of rankings; null: standard output
    greedy: bool = True  # false: sample at T = 1


def rank(model: str, config: RankConfig) -> None:
    """Write a row an example, in order: {"id", "ranking": item ids, best first, or null, "reason"}.

    Raises ListopdError for more than `data.max_bad_rows` rows that are no example or too long;
    fewer are counted on standard error, with the first one's line and reason.
    """
    from listopd_ray.cluster import serve
    from listopd_ray.evaluate import InChunks, chunk_size, judge_rollout
    from listopd_ray.models import end_ids, load_tokenizer
    from listopd_ray.prepare import serving_arguments
    from listopd_ray.splits import encode_rows
    from listopd_ray.task.contract import TokenText
    from listopd_ray.tracking import progress_bar, replace_file

    tokenizer = load_tokenizer(model)
    split = encode_rows(config, tokenizer, partial(read_requests, Path(config.input), config))
    text = TokenText(tokenizer, end_ids(model, tokenizer))
    with (
        serve(config, **serving_arguments(model, config, tokenizer, split)) as workers,
        progress_bar("rank", len(split.prompts), unit="prompt", delay=2.0) as bar,
    ):
        sampler = InChunks(workers, chunk_size(config), bar)
        parts = sampler.fetch(sampler.generate(split.prompts, "rank", greedy=config.greedy))
    judged = [judge_rollout(rollout, text) for part in parts for rollout in part.rollouts]
    rows = [
        json.dumps(_row(example, output), ensure_ascii=False) + "\n"
        for example, output in zip(split.examples, judged, strict=True)
    ]
    if config.output is None:
        sys.stdout.writelines(rows)
        return
    try:
        replace_file(Path(config.output), "".join(rows))
    except OSError as error:
        raise ListopdError(f"{config.output}: {error.strerror}") from None


def read_requests(
    path: Path, config: Config, reject: Callable[[Example], str | None]
) -> list[Example]:
    """Examples whose `relevance` may be missing: it is what ranking is to find out."""

    seen: set[str] = set()

    def parse(row: dict[str, Any]) -> Example:
        if row.get("relevance") is None:
            items = row.get("items")
            row = row | {"relevance": [0.0] * len(items) if isinstance(items, list) else []}
        example = parse_example(row)
        if example.id in seen:
            raise BadRow(f"duplicate id {example.id!r}")
        seen.add(example.id)
        if reason := reject(example):
            raise BadRow(reason)
        return example

    with Quarantine(None, config.data.max_bad_rows) as bad:
        examples = list(read_rows(path, parse, bad))
    if not examples:
        raise ListopdError(f"{path}: no usable example ({bad.count} bad rows{bad.first})")
    if bad.count:
        print(f"listopd: {bad.count} bad rows left out{bad.first}", file=sys.stderr)
    return examples


def _row(example: Example, output: Judged) -> dict[str, Any]:
    row: dict[str, Any] = {"id": example.id, "ranking": None}
    if output.ranking is None:
        return row | {"reason": output.reason}
    return row | {"ranking": [example.items[number - 1].id for number in output.ranking]}
