"""`listopd demo` on the shared engines: λ from the prediction, and going on where it was."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from listopd_ray import demo
from listopd_ray.cluster import Cluster
from listopd_ray.config import Config
from listopd_ray.demo import demo_job
from listopd_ray.job_config import DemoConfig, DemoRun, DemoSection
from listopd_ray.types import ListopdError

RUNS = {
    "lam1": DemoRun(),
    "below": DemoRun(share=0.5),
    "bounded": DemoRun(lam=2.0, extrapolation="bounded"),
}


@pytest.fixture
def launches(hf_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the configurations that engines were asked for."""
    asked = list[str]()

    @contextmanager
    def launch(config: Config, **_: Any) -> Iterator[Cluster]:
        asked.append(config.name)
        yield hf_cluster

    monkeypatch.setattr(demo, "launch", launch)
    return asked


def make_config(hf_config: Config, tmp_path: Path, **changes: Any) -> DemoConfig:
    values = vars(hf_config) | {"name": "d", "out": str(tmp_path), "num_steps": 1} | changes
    return DemoConfig(**values, demo=DemoSection(runs=RUNS))


def summaries(config: DemoConfig) -> dict[str, Any]:
    return {
        name: json.loads(Path(config.out, f"d-s0-{name}", "summary.json").read_text())
        for name in RUNS
    }


def test_lambda_is_a_share_of_the_way_to_what_was_predicted_before(
    hf_config: Config,
    launches: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(hf_config, tmp_path)
    demo_job(config)
    shown = capsys.readouterr().out
    file = tmp_path / "d-s0-prediction.json"
    star = json.loads(file.read_text())["lambda_star"]
    below = round(1 + 0.5 * (star - 1), 2)
    assert f"λ* = {star:.3f}" in shown
    found = summaries(config)
    assert {name: s["lam"] for name, s in found.items()} == {
        "lam1": 1.0,
        "below": below,
        "bounded": 2.0,
    }
    assert found["bounded"]["extrapolation"] == "bounded"
    digest = sha256(file.read_bytes()).hexdigest()
    assert {s["prediction_sha256"] for s in found.values()} == {digest}
    assert (tmp_path / "d.html").is_file()

    demo_job(config)  # all of it is there
    assert launches == ["d-s0"]
    again = capsys.readouterr().out
    assert again[again.index("held-out") :] == shown[shown.rindex("held-out") :]


def test_a_demo_goes_on_where_it_was(
    hf_config: Config, launches: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(hf_config, tmp_path)
    begun = list[str]()

    def distill(run: Config, *arguments: Any) -> dict[str, Any]:
        assert (tmp_path / "d-s0-prediction.json").is_file()  # before any run
        if len(begun) == 1:
            begun.append("interrupted")
            raise KeyboardInterrupt
        begun.append(run.name)
        return original(run, *arguments)

    original = demo.distill
    monkeypatch.setattr(demo, "distill", distill)
    with pytest.raises(KeyboardInterrupt):
        demo_job(config)
    locked = (tmp_path / "d-s0-prediction.json").read_bytes()
    demo_job(config)
    assert begun == ["d-s0-lam1", "interrupted", "d-s0-below", "d-s0-bounded"]
    assert (tmp_path / "d-s0-prediction.json").read_bytes() == locked


def test_without_a_threshold_there_is_no_share_of_it(
    hf_config: Config, launches: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "d-s0-prediction.json"
    file.write_text('{"lambda_star": null}')
    with pytest.raises(ListopdError, match=r"d-s0-prediction\.json: predicts no λ"):
        demo_job(make_config(hf_config, tmp_path))
    assert launches == []
    with pytest.raises(ListopdError, match="demo_seeds: give at least one"):
        demo_job(make_config(hf_config, tmp_path, demo_seeds=[]))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"x": DemoRun(lam=2.0, share=0.5)}, r"demo\.runs\.x: give lam or share, not both"),
        ({"x": DemoRun(share=-1.0)}, r"demo\.runs\.x\.share: must be finite"),
        ({"x": DemoRun(lam=math.nan)}, "lam: λ must be finite"),
        ({"a/b": DemoRun()}, "name: "),
    ],
)
def test_bad_runs_are_refused_before_anything_starts(
    hf_config: Config,
    launches: list[str],
    tmp_path: Path,
    runs: dict[str, DemoRun],
    message: str,
) -> None:
    config = dataclasses.replace(make_config(hf_config, tmp_path), demo=DemoSection(runs=runs))
    with pytest.raises(ListopdError, match=message):
        demo_job(config)
    assert launches == [] and not (tmp_path / "d-s0-prediction.json").exists()
