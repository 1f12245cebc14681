"""Run directories as a report reads them: columns of metrics, and what else a run left."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import yaml

from listopd_ray.cliff.verdict import ENOUGH_PARSED
from listopd_ray.config import Config, exact, resolved
from listopd_ray.tracking import STAGES, flatten, read_json, read_jsonl
from listopd_ray.types import CONTRACT_CLASSES, ListopdError

CLASSES = tuple(token_class.name.lower() for token_class in CONTRACT_CLASSES)
BY_CLASS = ("kl/reverse", "cliff/tail_mass", "loss/clip_fraction")
EVALUATED = ("parse_rate", "ndcg_at_1", "ndcg_at_k", "ndcg_at_k_all", "kendall_tau")
COLUMNS = (  # of metrics.jsonl, that a report shows
    "train/step",
    "train/tokens",
    "contract/parse_rate",
    "kl/reverse",
    "loss/policy",
    "loss/advantage",
    "loss/grad_norm",
    "loss/clip_fraction",
    "cliff/lambda_star",
    "cliff/drive",
    "rollout/staleness",
    "rollout/tokens",
    "perf/tokens_per_s",
    "time/step_s",
    *(f"time/{stage}_s" for stage in STAGES),
    *(f"eval/{name}" for name in EVALUATED),
    *(f"{metric}_{token_class}" for metric in BY_CLASS for token_class in CLASSES),
)
SCHEMA = pa.schema([(name, pa.float64()) for name in COLUMNS])


@dataclass(frozen=True, eq=False)
class RunData:
    directory: Path
    config: dict[str, Any]  # every key, flat
    columns: dict[str, np.ndarray]  # [rows] float64, NaN where a row lacks the metric
    summary: dict[str, Any] | None  # None: not finished
    samples: list[dict[str, Any]]  # of its last evaluation
    inputs: dict[str, Any]  # SHA-256 of data and models
    inspection: dict[str, Any] | None  # the last row of updates.jsonl
    events: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def num_updates(self) -> int:
        steps = self.columns["train/step"]
        return int(steps[-1]) if len(steps) else 0

    def last(self, metric: str) -> float | None:
        """The newest value that was logged."""
        known = self._known(metric)
        return float(known[-1]) if len(known) else None

    def final(self, name: str) -> float | None:
        """Of the summary's `final` numbers; None where there is no such number, and for NDCG of
        parsed outputs where too few parse for it to mean anything. Without a summary all that there
        is is what parsed of the last training samples."""
        if self.summary is None:
            return self.last("contract/parse_rate") if name == "parse_rate" else None
        if name == "ndcg_at_1" and self.summary["student"]["parse_rate"] < ENOUGH_PARSED:
            return None
        if "final" in self.summary:
            return self.summary["final"].get(name)
        lam, star = self.summary["mean_lam"], self.first("cliff/lambda_star")
        return {  # written before there was `final`
            "lam": lam,
            "seconds": self.summary["seconds"],
            "tokens": self.last("train/tokens"),
            "lambda_star": star,
            "lam_over_lambda_star": lam / star if star else None,
            **{key: self.summary["student"].get(key) for key in EVALUATED},
        }.get(name)

    def first(self, metric: str) -> float | None:
        known = self._known(metric)
        return float(known[0]) if len(known) else None

    def _known(self, metric: str) -> np.ndarray:
        values = self.columns[metric]
        return values[~np.isnan(values)]


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run directories among `paths` and, of studies and searches, their trials'.

    Raises ListopdError for a path that is none of them, and where there is no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_file() and path.suffix in (".html", ".md"):
            continue  # pages that lie beside runs
        if not path.is_dir():
            raise ListopdError(f"{path}: no such directory")
        if (path / "trials").is_dir():
            runs = sorted(p for p in (path / "trials").iterdir() if (p / "config.yaml").exists())
        elif (path / "config.yaml").exists():
            runs = [path]
        else:
            raise ListopdError(f"{path}: neither a run nor a study or search that has trials")
        found |= {run.resolve(): run for run in runs}
    if not found:
        raise ListopdError(f"{' '.join(map(str, paths))}: no trial has begun")
    return list(found.values())


def read_runs(directories: Sequence[Path]) -> list[RunData]:
    """Several at once: most of the time goes into parsing, which needs no interpreter."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read_run, directories))


def read_run(directory: Path) -> RunData:
    """Raises ListopdError, with the file, where one is not what a run writes."""
    summary_file = directory / "summary.json"
    summary = read_json(summary_file, str(summary_file)) if summary_file.exists() else None
    student = summary.get("student") if isinstance(summary, dict) else None
    if summary is not None and not (isinstance(student, dict) and "parse_rate" in student):
        raise ListopdError(f"{summary_file}: not the summary of a run")
    samples = _rows(directory / "samples.jsonl", "train/step", "id", "completion", "reason")
    last = max((row["train/step"] for row in samples), default=0)
    updates = _rows(directory / "updates.jsonl", "train/step", "rollouts", "histograms")
    inputs = json_or_none(directory / "inputs.json")
    return RunData(
        directory=directory,
        config=_config(directory / "config.yaml"),
        columns=read_columns(directory / "metrics.jsonl"),
        summary=summary,
        samples=[row for row in samples if row["train/step"] == last],
        inspection=updates[-1] if updates else None,
        events=_rows(directory / "events.jsonl", "step", "lam", "action", "reason"),
        inputs=inputs if isinstance(inputs, dict) else {},
    )


def read_columns(file: Path) -> dict[str, np.ndarray]:
    """`COLUMNS` of a metrics.jsonl, empty where there is none yet; a last line that a crash cut
    short is left out."""
    try:
        content = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise ListopdError(f"{file}: {error.strerror}") from None
    content = content[: content.rfind(b"\n") + 1]
    if not content:
        return {name: np.empty(0) for name in COLUMNS}
    try:
        table = pa.json.read_json(
            io.BytesIO(content),
            pa.json.ReadOptions(use_threads=False, block_size=len(content)),
            pa.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise ListopdError(f"{file}: not the metrics of a run: {reason}") from None
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    if np.isnan(columns["train/step"]).any():
        raise ListopdError(f"{file}: not the metrics of a run: a row without train/step")
    if np.isnan(columns["train/tokens"]).all():  # written before it was kept
        columns["train/tokens"] = np.nancumsum(columns["rollout/tokens"])
    return columns


def _rows(file: Path, *keys: str) -> list[dict[str, Any]]:
    rows = read_jsonl(file)
    if not all(isinstance(row, dict) and row.keys() >= set(keys) for row in rows):
        raise ListopdError(f"{file}: not what a run writes")
    return rows


def _config(file: Path) -> dict[str, Any]:
    """With the defaults of keys that were not there when it was written."""
    try:
        written = yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise ListopdError(f"{file}: {error.strerror}") from None
    except yaml.YAMLError:
        raise ListopdError(f"{file}: not YAML") from None
    if not isinstance(written, dict):
        raise ListopdError(f"{file}: not the configuration of a run")
    return _defaults() | flatten(written)


@cache
def _defaults() -> dict[str, Any]:
    return flatten(resolved(Config()))


def json_or_none(file: Path) -> Any:
    """The content of a file that need not be there."""
    return read_json(file, str(file)) if file.exists() else None


def as_json(value: Any) -> str:
    """Values of configurations, short and comparable."""
    is_plain = isinstance(value, float | str)
    return exact(value) if is_plain else json.dumps(value, sort_keys=True)
