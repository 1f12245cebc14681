"""Secrets are in nothing that is written."""

import dataclasses
import sys

import pytest
from test_train_loop import config, data, start  # noqa: F401 - fixtures

from listopd_ray.__main__ import main
from listopd_ray.config import Config, dump_config, load_config
from listopd_ray.job_config import StudyConfig
from listopd_ray.redact import HIDDEN, redacted, redacted_text
from listopd_ray.tracking import check_unchanged

SECRET = "planted-4f1c9d"
IN_ENVIRONMENT = "also-planted-77e0"


def files_with(directory, *secrets):
    files = [file for file in directory.rglob("*") if file.is_file()]
    return [file for file in files for secret in secrets if secret.encode() in file.read_bytes()]


@pytest.fixture
def planted(config, monkeypatch):  # noqa: F811
    """A configuration with secrets wherever it takes any."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("STORE_ACCESS_KEY", IN_ENVIRONMENT)
    keys = [f"rollout.engine.hf_token={SECRET}", f"rollout.engine={{hf_token: {SECRET}}}"]
    monkeypatch.setattr(sys, "argv", ["listopd", "train", *keys])
    engine = {
        "hf_token": SECRET,
        "nested": {"apiKey": SECRET, "list": [{"password": SECRET}]},
        "credentials": {"value": SECRET},
        "hf_tokens": [SECRET],
        "header": f"authorization: Bearer {SECRET}",
        "store": [f"s3://AK:a/{SECRET}@bucket", f"https://host/x?X-Amz-Signature={SECRET}&y=1"],
        "download_dir": f"/models?x={IN_ENVIRONMENT}",
    }
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, engine=engine),
        checkpoint=dataclasses.replace(
            config.checkpoint, path=f"memory://user:{SECRET}@store/checkpoints"
        ),
        tracking=dataclasses.replace(config.tracking, wandb=True),
    )


def test_a_run_writes_none(planted, start, tmp_path):  # noqa: F811
    start(planted, finish=False)
    check_unchanged(planted)  # it goes on
    start(planted)
    written = (tmp_path / "runs").rglob("*")
    assert {"config.yaml", "inputs.json", "metrics.jsonl"} <= {file.name for file in written}
    assert any(file.suffix == ".wandb" for file in (tmp_path / "runs").rglob("*"))
    assert files_with(tmp_path, SECRET, IN_ENVIRONMENT) == []


def test_nor_do_its_checkpoints(planted, start, tmp_path):  # noqa: F811
    """They hold whose they are."""
    checkpoint = dataclasses.replace(planted.checkpoint, path=str(tmp_path / "checkpoints"))
    start(dataclasses.replace(planted, checkpoint=checkpoint))
    assert list((tmp_path / "checkpoints").rglob("state.json"))
    assert files_with(tmp_path, SECRET, IN_ENVIRONMENT) == []


@pytest.mark.parametrize("schema", [Config, StudyConfig])
def test_nor_a_dumped_configuration(schema):
    dumped = dump_config(load_config(schema, [f"rollout.engine.hf_token={SECRET}"]))
    assert SECRET not in dumped
    assert f"hf_token: {HIDDEN}" in dumped


def test_of_two_secrets_of_which_one_begins_the_other_nothing_is_left(monkeypatch):
    monkeypatch.setenv("A_TOKEN", IN_ENVIRONMENT)
    monkeypatch.setenv("B_TOKEN", f"{IN_ENVIRONMENT}-more")
    assert redacted_text(f"x {IN_ENVIRONMENT}-more y") == f"x {HIDDEN} y"


def test_nor_an_error(capsys, monkeypatch):
    monkeypatch.setenv("STORE_ACCESS_KEY", IN_ENVIRONMENT)
    for wrong in (f"rolout.engine.hf_token={SECRET}", f"s3://user:{SECRET}@b", IN_ENVIRONMENT):
        with pytest.raises(SystemExit) as raised:
            main(["train", wrong])
        shown = f"{raised.value.code}{''.join(capsys.readouterr())}"
        assert SECRET not in shown
        assert IN_ENVIRONMENT not in shown


def test_what_is_no_secret_stays():
    kept = {
        "max_new_tokens": 8,
        "max_batched_tokens": 2.0,
        "tokenizer": {"vocab_size": 512},
        "hf_token": None,
        "key": "k",
    }
    assert redacted(kept) == kept
    said = "chat template: no token, 3 tokens: key=value, s3://bucket/path@1"
    assert redacted_text(said) == said
    config = load_config(Config, ["data.path=x"])  # noqa: F811
    assert load_config(Config, []) != config
    assert HIDDEN not in dump_config(config)


def test_the_shells_directories_are_no_secrets(monkeypatch):
    monkeypatch.setenv("PWD", "/home/user/project")
    monkeypatch.setenv("OLDPWD", "/home/user/other")
    monkeypatch.setenv("DB_PWD", "hunter2hunter2")
    text = "/home/user/project/runs /home/user/other hunter2hunter2"
    assert redacted_text(text) == "/home/user/project/runs /home/user/other <redacted>"
