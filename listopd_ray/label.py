"""`listopd label`: a dataset whose training relevance is a model's own greedy rankings.

A warm start on it (`student.path=… data.path=<out>`) is supervised fine-tuning on its outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from listopd_ray.config import Config
from listopd_ray.types import Example, ListopdError

if TYPE_CHECKING:  # these need torch, and the command line starts without it
    from listopd_ray.evaluate import Sampler
    from listopd_ray.splits import Split
    from listopd_ray.task.contract import TokenText


@dataclass(frozen=True)
class LabelConfig(Config):
    """A run's configuration, so that its YAML files serve here too."""

    out: str = ""  # directory of the labelled dataset


def label_command(model: str, config: LabelConfig) -> None:
    if not config.out:
        raise ListopdError("label: give out=DIR")
    result = label(config, Path(model), Path(config.out))
    dropped = ", ".join(f"{count} {reason}" for reason, count in result["dropped"].items())
    print(
        f"{config.out}: {result['labelled']} train examples as {model} ranks them, dropped "
        f"{dropped or 'none'}; {result['eval']} eval examples unchanged"
    )


def label(config: Config, model: Path, out: Path) -> dict[str, Any]:
    """Write the dataset of `data.path` to `out` with `model`'s greedy rankings as train relevance.

    Examples whose greedy output breaks the contract are dropped. Returns the numbers `labelled`,
    `eval` and, by reason, `dropped`. Raises ListopdError where `out` holds something already, where
    no output keeps the contract, and for data or a model that cannot be used.
    """
    from listopd_ray.cluster import serve
    from listopd_ray.evaluate import chunk_size
    from listopd_ray.models import load_tokenizer, model_hash
    from listopd_ray.prepare import serving_arguments
    from listopd_ray.splits import data_directory, load_split
    from listopd_ray.task.contract import TokenText
    from listopd_ray.task.data import dataset_hash, read_examples, write_dataset

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ListopdError(f"{out}: not an empty directory; give another out=… or remove it")
    data = data_directory(config)
    held_out = read_examples(data / "eval.jsonl", max_bad_rows=config.data.max_bad_rows)
    tokenizer = load_tokenizer(model)
    split = load_split(config, "train", tokenizer)
    arguments = serving_arguments(str(model), config, tokenizer, split)
    with serve(config, **arguments) as workers:
        text = TokenText(tokenizer, arguments["end_ids"])
        labelled, dropped = label_examples(workers, split, text, chunk_size(config))
    if not labelled:
        raise ListopdError(f"{model}: no greedy output keeps the contract: {dropped}")
    meta = {"source": "label", "model": model_hash(model), "data": dataset_hash(data)}
    write_dataset(out, {"train": labelled, "eval": held_out}, meta | {"dropped": dropped})
    return {"labelled": len(labelled), "dropped": dropped, "eval": len(held_out)}


def label_examples(
    sampler: Sampler, split: Split, text: TokenText, chunk_size: int
) -> tuple[list[Example], dict[str, int]]:
    """The examples of `split` with greedy rankings for relevance; how many are dropped, and why."""
    from listopd_ray.evaluate import InChunks, judge_rollout
    from listopd_ray.tracking import progress_bar

    labelled, dropped, prompts = [], Counter[str](), split.prompts
    with progress_bar("label", len(prompts), unit="prompt") as bar:
        sampler = InChunks(sampler, chunk_size, bar)
        parts = sampler.fetch(sampler.generate(prompts, "label", greedy=True))
    rollouts = [rollout for part in parts for rollout in part.rollouts]
    for example, rollout in zip(split.examples, rollouts, strict=True):
        output = judge_rollout(rollout, text)
        if output.ranking is None:
            dropped[str(output.reason)] += 1
        else:
            labelled.append(replace(example, relevance=relevance_of(output.ranking)))
    return labelled, dict(sorted(dropped.items()))


def relevance_of(ranking: Sequence[int]) -> tuple[float, ...]:
    """Gains of items 1…K: 1 for the item ranked first, then (K − 1)/K, and so on to 1/K."""
    num_items = len(ranking)
    return tuple((num_items - ranking.index(item)) / num_items for item in range(1, num_items + 1))
