import json
import os
import pty
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from listopd_ray import tracking
from listopd_ray.config import (
    CheckpointConfig,
    Config,
    TrackingConfig,
    dump_config,
    load_config,
)
from listopd_ray.job_config import SearchConfig, SearchSection
from listopd_ray.tracking import (
    Run,
    append_rows,
    check_startable,
    check_unchanged,
    lock_directory,
    progress_bar,
    replace_file,
)
from listopd_ray.types import ListopdError
from listopd_ray.wandb_run import symbolic_name


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


def test_a_key_more_or_less_is_another_configuration(tmp_path):
    section = SearchSection(algorithm="grid", space={"lr": {"grid_search": [1e-3]}})
    config = SearchConfig(name="run", out=str(tmp_path), search=section)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    check_unchanged(config)
    more = {"lr": {"grid_search": [1e-3]}, "clip": {"choice": [2.0]}}
    for space, key in ((more, r"search\.space\.clip"), ({}, r"search\.space\.lr")):
        changed = replace(config, search=replace(section, space=space))
        with pytest.raises(ListopdError, match=rf"begun with another configuration: .*{key}"):
            check_unchanged(changed)


@pytest.mark.parametrize("content", ["null", "[]", "{", "{}"])
def test_damaged_inputs_are_one_line_and_stay(tmp_path, content):
    config = Config(name="run", out=str(tmp_path), tracking=TrackingConfig(wandb=False))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "inputs.json").write_text(content)
    with pytest.raises(ListopdError, match=r"inputs\.json|begun on other data"):
        Run(config, {"data": "a"})
    assert (tmp_path / "run" / "inputs.json").read_text() == content


def test_a_checkpoint_path_that_cannot_be_made_is_refused_before_anything_is(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoint = CheckpointConfig(path=str(tmp_path / "file" / "x"))
    config = Config(name="run", out=str(tmp_path / "runs"), checkpoint=checkpoint)
    with pytest.raises(ListopdError, match="not a directory that can be written to"):
        check_startable(config)
    assert not (tmp_path / "runs").exists()


def test_a_run_may_go_on_on_another_cluster_or_traced_but_not_as_another(tmp_path):
    config = Config(out=str(tmp_path), tracking=TrackingConfig(wandb=False))
    with Run(config, {}):
        pass
    elsewhere = replace(
        config,
        autoscaling_wait_s=60.0,
        trace=True,
        learner=replace(
            config.learner, num_cpus=4, labels={"pool": "far"}, num_ranks=2, sharding="full"
        ),
        rollout=replace(config.rollout, num_gpus=1),
    )
    with Run(elsewhere, {}):
        pass
    with pytest.raises(ListopdError, match=r"rollout.num_workers \(1 → 2\)$"):
        check_startable(replace(elsewhere, rollout=replace(elsewhere.rollout, num_workers=2)))


def wandb_records(directory):
    (file,) = (directory / "wandb").glob("offline-run-*/*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    command = [wandb, "leet", "inspect", "--json", file]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_a_trial_in_wandb_has_group_name_tables_histograms_and_the_student(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = ["name=core-lam1.3-s4", "lam=1.3", "seed=4", "extrapolation=bounded"]
    settings += ["tracking.group=study", "tracking.job_type=study", "tracking.artifact=true"]
    config = load_config(Config, [f"out={tmp_path}", *settings])
    sample = {"id": "q", "prompt": "a prompt", "completion": "an answer", "reason": "not_json"}
    sample |= {"tokens": ["an", " answer"], "advantages": [0.5, None]}
    histogram = {"counts": [1, 2], "edges": [0.0, 1.0, 2.0]}
    with Run(config, {}) as run:
        run.log(0, {})
        run.keep_update(1, {"rollouts": [sample], "histograms": {"rollout/staleness": histogram}})
        run.log(1, {"kl/reverse": 0.5, "rollout/tokens": 100.0})
        run.log(2, {"kl/reverse": 0.4, "rollout/tokens": 50.0})
        (run.directory / "student").mkdir()
        (run.directory / "student" / "model.safetensors").write_bytes(b"weights")
        run.finish({"final": {"parse_rate": 0.5}})
    records = wandb_records(run.directory)
    (begun,) = (record["run"] for record in records if record["type"] == "run")
    assert (begun["run_group"], begun["job_type"]) == ("study", "study")
    assert begun["display_name"] == "lam=1.30 c=2 s4 bounded core"
    assert begun["tags"] == ["core-lam1.3-s4", "bounded"]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["train/tokens"] for row in history] == [0.0, 100.0, 150.0]
    assert ["samples/rollouts.path" in row for row in history] == [False, True, False]
    assert history[1]["histogram/rollout/staleness.values"] == [1, 2]
    assert history[1]["histogram/rollout/staleness.bins"] == [0.0, 1.0, 2.0]
    (table,) = (run.directory / "wandb").rglob("rollouts_*.table.json")
    assert json.loads(table.read_text())["data"] == [
        [1, "q", "a prompt", "an answer", "not_json", '+0.50  "an"']
    ]
    metrics = {
        record["metric"].get("glob_name") for record in records if record["type"] == "metric"
    }
    assert "*" in metrics
    kinds = [record["artifact"]["type"] for record in records if record["type"] == "artifact"]
    assert "model" in kinds


def test_a_run_that_goes_on_is_the_same_one_in_wandb_and_counts_its_tokens_on(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_config(Config, [f"out={tmp_path}", "name=mine"])
    ids = []
    for _ in range(2):
        with Run(config, {}) as run:
            run.log(1, {"rollout/tokens": 100.0})
            ids.append(run._wandb._run.id)
    assert len(set(ids)) == 1


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["lam=1.3", "name=lam1.3-seed0"], "lam=1.30 c=2 s0"),
        (["lam=1.3", "name=lam1.3-lr0.01-seed0"], "lam=1.30 c=2 s0 lr0.01"),
        (["lam=1.3", "name=core-c2-lam1.3-s0"], "lam=1.30 c=2 s0 core-c2"),
        (["lam=1.125", "clip=1.3", "seed=7", "name=mine"], "lam=1.125 c=1.3 s7 mine"),
        (["lam=auto", "name=mine"], "lam=auto c=2 s0 mine"),
        (["lam=2", "governor.enabled=true", "name=x"], "lam=2.00 c=2 s0 governed x"),
        (
            ["lam=5", "extrapolation=bounded", "name=demo-s0-bounded"],
            "lam=5.00 c=2 s0 bounded demo-bounded",
        ),
    ],
)
def test_names_say_lambda_clip_and_seed(settings, name):
    assert symbolic_name(load_config(Config, settings)) == name


def test_wandb_gets_what_a_roll_back_learns_anew_and_no_update_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_config(Config, [f"out={tmp_path}", "name=mine"])
    sample = {"id": "q", "prompt": "", "completion": "", "reason": None}
    row = {"rollouts": [sample | {"tokens": [], "advantages": []}], "histograms": {}}
    with Run(config, {}) as run:
        for step in range(4):
            run.log(step, {"kl/reverse": float(step)})
        run.keep_update(4, row)  # and then the learner dies; update 3 is learnt again
        run._wandb.forget_update()
        run.log(3, {"kl/reverse": 3.0})
        run.log(4, {"kl/reverse": 4.0})
        run._wandb.roll_back(2)
        run.log(3, {"kl/reverse": 30.0})
    records = wandb_records(run.directory)
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["train/step"] for row in history] == [0, 1, 2, 3, 4, 3]
    assert [row["kl/reverse"] for row in history] == [0, 1, 2, 3, 4, 30]
    assert [row["_step"] for row in history] == [0, 1, 2, 3, 4, 5]
    assert not any("samples/rollouts.path" in row for row in history)


def test_a_sitting_that_goes_on_counts_its_rows_on_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_config(Config, [f"out={tmp_path}", "name=mine"])
    with Run(config, {}) as run:
        run.log(7, {})
    (item,) = [r["history"]["item"] for r in wandb_records(run.directory) if r["type"] == "history"]
    assert item["_step"] == item["train/step"] == 7


def test_another_run_in_the_same_place_is_another_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = set()
    for lr in (1e-3, 1e-2):
        with Run(load_config(Config, [f"out={tmp_path}", "name=mine", f"lr={lr}"]), {}) as run:
            ids.add(run._wandb._run.id)
        shutil.rmtree(run.directory)
    assert len(ids) == 2


def test_what_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "bogus")
    config = load_config(Config, [f"out={tmp_path}", "name=mine"])
    with pytest.raises(ListopdError, match=r"^W&B: .*tracking\.wandb=false") as raised:
        Run(config, {})
    assert "\n" not in str(raised.value)


def test_a_bar_is_seen_on_a_terminal_that_does_not_tell_its_size(monkeypatch):
    master, slave = pty.openpty()  # of 0 lines and 0 columns
    with open(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar("warm start", 4) as bar:
            bar.update(4)
        shown = os.read(master, 1000).decode()
    os.close(master)
    assert "warm start: 100%" in shown
    assert "4/4" in shown
