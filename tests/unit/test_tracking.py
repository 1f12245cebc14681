import json
import subprocess
import sys
from pathlib import Path

import pytest

from listopd_ray import tracking
from listopd_ray.config import Config, load_config
from listopd_ray.tracking import Run, append_rows, lock_directory, replace_file
from listopd_ray.types import ListopdError


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line_with_the_file():
    with pytest.raises(ListopdError, match="/dev/full: cannot write: No space left on device"):
        append_rows(Path("/dev/full"), [{"a": 1}])


def test_a_file_that_cannot_be_replaced_stays_and_leaves_no_remains(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    replace_file(file, "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking.os, "replace", full)
    with pytest.raises(ListopdError, match=r"x\.json: cannot write: No space left on device"):
        replace_file(file, "after")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert file.read_text() == "before"


def test_another_process_that_writes_a_run_is_waited_for_and_then_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "LOCK_WAIT_S", 0.1)
    with lock_directory(tmp_path):
        again = lock_directory(tmp_path)
        with pytest.raises(ListopdError, match="another process is writing here"):
            again.__enter__()
    with lock_directory(tmp_path):  # and is free again
        pass
