"""What two runs that should be equal are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from listopd_ray.ledger import committed
from listopd_ray.tracking import TIMING, read_jsonl


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The run's metrics without those in which equal runs differ."""
    rows = read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in rows]


def check_equal(run: Path, other: Path) -> None:
    """Metrics, samples and weights, to the last bit."""
    assert metrics_of(run) == metrics_of(other)
    for name in ("samples.jsonl", "updates.jsonl"):
        assert read_jsonl(run / name) == read_jsonl(other / name)
    weights = [load_file(path / "student" / "model.safetensors") for path in (run, other)]
    assert set(weights[0]) == set(weights[1])
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[1])
    assert _learnt(run) == _learnt(other)


def _learnt(run: Path) -> dict[int, Any]:
    """Version and ids of the samples of every update."""
    updates = committed(read_jsonl(run / "ledger.jsonl"))
    return {n: [(part["version"], part["ids"]) for part in updates[n]["samples"]] for n in updates}
