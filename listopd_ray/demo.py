"""`listopd demo`: a few runs that differ in λ and in the form of extrapolation, side by side."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from listopd_ray.calibrate import keep_prediction, make_prediction, measure_run
from listopd_ray.cluster import launch
from listopd_ray.config import Config, run_directory, with_values
from listopd_ray.job import distill, finished_summary, print_table, summary_file
from listopd_ray.job_config import DemoConfig, DemoRun
from listopd_ray.prepare import prepare
from listopd_ray.report import close_with_report
from listopd_ray.tracking import read_json
from listopd_ray.types import ListopdError

RUNS = {
    "lam1": DemoRun(lam=1.0),
    "lam2": DemoRun(lam=2.0),
    "bounded": DemoRun(lam=5.0, extrapolation="bounded"),
}


def demo_job(config: DemoConfig) -> None:
    """The runs of `demo.runs` for every seed, then the table and the page.

    A seed varies warm start, prompts and sampling; teacher and data stay. Where a λ is a share of
    λ* − 1, λ* is predicted from the seed's warm start before its first run. What is finished
    already is read, not repeated.
    """
    runs = config.demo.runs or RUNS
    _check(config, runs)
    names = {name: list[Config]() for name in runs}
    for number, seed in enumerate(config.demo_seeds):
        configs = _seed(config, runs, seed, number * len(runs))
        for name, run_config in configs.items():
            names[name].append(run_config)
    print_table({name: [finished_summary(c) for c in group] for name, group in names.items()})
    directories = [run_directory(c) for group in zip(*names.values(), strict=True) for c in group]
    print(f"runs: {', '.join(map(str, directories))}")
    close_with_report(directories, Path(config.out) / f"{config.name}.html")


def _seed(
    config: DemoConfig, runs: dict[str, DemoRun], seed: int, num_before: int
) -> dict[str, Config]:
    """Run what is missing of one seed, one after the other on one set of engines."""
    # The teacher actors are shared and hold the base: λ = 1 gets its diagnostics too.
    common = with_values(
        config,
        {
            "name": f"{config.name}-s{seed}",
            "seed": seed,
            "demo_seeds": [],
            "cliff.measure": True,
            "tracking.group": config.tracking.group or config.name,
            "tracking.job_type": "demo",
        },
    )
    file = Path(config.out) / f"{common.name}-prediction.json"
    is_predicted = any(run.share is not None for run in runs.values())
    if not is_predicted or file.exists():
        configs = _configs(common, runs, file if is_predicted else None)
        if all(summary_file(run_config).exists() for run_config in configs.values()):
            return configs
    prepared = prepare(common)
    with launch(common, **prepared.cluster_arguments()) as cluster:
        if is_predicted and not file.exists():
            measured = measure_run(common, prepared, cluster)
            keep_prediction(file, make_prediction([measured], common.clip))
        configs = _configs(common, runs, file if is_predicted else None)
        total, each = len(runs) * len(config.demo_seeds), 0.0  # s of a whole run
        for number, run_config in enumerate(configs.values(), start=num_before + 1):
            if not summary_file(run_config).exists():
                left = f", about {each * (total - number + 1) / 60:.0f} min left" if each else ""
                lam = f"λ = {run_config.lam:g}, {run_config.extrapolation}"
                print(f"{run_config.name}: {lam}, run {number} of {total}{left}", file=sys.stderr)
                is_begun = summary_file(run_config).parent.exists()
                seconds = distill(run_config, prepared, cluster)["seconds"]
                each = each if is_begun else seconds
    return configs


def _configs(
    common: Config, runs: dict[str, DemoRun], prediction: Path | None
) -> dict[str, Config]:
    """Each run's configuration; raises ListopdError where λ* is needed and none was found."""
    star: Any = math.nan
    if prediction is not None:
        content = read_json(prediction, str(prediction))
        star = content.get("lambda_star") if isinstance(content, dict) else None
        if not isinstance(star, float):
            raise ListopdError(f"{prediction}: predicts no λ*: demo.runs.NAME.share means nothing")
    common = with_values(common, {"prediction": str(prediction) if prediction else None})
    return {name: _run_config(common, name, run, star) for name, run in runs.items()}


def _run_config(common: Config, name: str, run: DemoRun, star: float) -> Config:
    values: dict[str, Any] = {
        "name": f"{common.name}-{name}",
        "lam": run.lam if run.share is None else round(1 + run.share * (star - 1), 2),
        "extrapolation": run.extrapolation,
    }
    return with_values(common, values)


def _check(config: DemoConfig, runs: dict[str, DemoRun]) -> None:
    if not config.demo_seeds:
        raise ListopdError("demo_seeds: give at least one seed")
    for name, run in runs.items():
        if run.share is not None and not 0 <= run.share < math.inf:
            raise ListopdError(f"demo.runs.{name}.share: must be finite and ≥ 0")
        if run.share is not None and run.lam != 1:
            raise ListopdError(f"demo.runs.{name}: give lam or share, not both")
        _run_config(config, name, run, star=2.0)
