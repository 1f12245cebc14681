import json
import subprocess
import sys
from pathlib import Path

import pytest

from listopd_ray.config import Config, load_config
from listopd_ray.tracking import Run


def test_the_offline_wandb_run_holds_the_numbers_of_metrics_jsonl(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = load_config(Config, [f"out={tmp_path}", "name=tracked", "lam=1.3"])
    with Run(config, {}) as run:
        run.log(1, {"kl/reverse": 0.5, "contract/parse_rate": 0.25})
        run.log(2, {"kl/reverse": 0.125, "contract/parse_rate": 0.75})
        run.finish({"student": {"parse_rate": 0.625}, "lam": 1.3})
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    (file,) = (run.directory / "wandb").glob("offline-run-*/*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    report = subprocess.run(
        [wandb, "leet", "inspect", "--summary", "--json", file], capture_output=True, check=True
    )
    summary = json.loads(report.stdout)["summary"]
    assert {name: summary[name] for name in rows[-1]} == rows[-1]
    assert summary["student"] == pytest.approx({"parse_rate": 0.625})
    assert summary["lam"] == pytest.approx(1.3)
