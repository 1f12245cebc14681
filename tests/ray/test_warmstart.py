"""Warm starts with real Ray Train workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from listopd_ray import warmstart as warmstart_module
from listopd_ray.config import Config, ModelConfig, WarmstartConfig
from listopd_ray.models import load_model
from listopd_ray.prepare import Prepared, prepare
from listopd_ray.types import ListopdError
from listopd_ray.warmstart import warm_start


def test_a_warm_start_is_made_once(prepared: Prepared, config: Config) -> None:
    made = prepared.student_path.stat().st_mtime_ns
    assert warm_start(config, "student") == prepared.student_path
    assert prepared.student_path.stat().st_mtime_ns == made
    assert prepared.student_path != prepared.teacher_path


@pytest.fixture(scope="module")
def of_one_worker(ray_cluster: None, config: Config, tmp_path_factory) -> tuple[Config, dict]:
    """Of six updates, uninterrupted: its configuration and weights."""
    # Muon for the matrices, AdamW for the rest.
    warmstart = WarmstartConfig(num_steps=6, batch_size=16, format_noise=0.1, optimizer="muon")
    student = dataclasses.replace(config.student, warmstart=warmstart)
    cache = str(tmp_path_factory.mktemp("cache"))
    config = dataclasses.replace(config, student=student, warmstart_workers=1, cache=cache)
    return config, load_model(warm_start(config, "student")).state_dict()


def test_two_workers_make_the_same_warm_start_as_one(of_one_worker, tmp_path: Path) -> None:
    config, expected = of_one_worker
    changed = dataclasses.replace(config, warmstart_workers=2, cache=str(tmp_path))
    state = load_model(warm_start(changed, "student")).state_dict()
    for name, one in expected.items():
        # The sums of the gradients differ in their order, and Adam divides by their size.
        torch.testing.assert_close(state[name], one, rtol=0, atol=2e-4)


def test_an_interrupted_warm_start_goes_on_to_the_same_bits(
    of_one_worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    config, expected = of_one_worker
    config = dataclasses.replace(config, cache=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(warmstart_module, "KEEP_EVERY_S", 0.0)
        patch.setattr(warmstart_module, "write_files", interrupt)  # when all is trained
        with pytest.raises(KeyboardInterrupt):
            warm_start(config, "student")
    made = tmp_path / "warmstart"
    (unfinished,) = made.iterdir()
    assert unfinished.suffix == ".unfinished"
    content = unfinished.read_bytes()
    unfinished.write_bytes(content[:100])
    with pytest.raises(ListopdError, match=r"\.unfinished: damaged, remove it: "):
        warm_start(config, "student")
    unfinished.write_bytes(content)
    capfd.readouterr()
    with safe_open(unfinished, "pt") as file:
        num_done = int(file.metadata()["step"])
    assert 1 <= num_done < 6
    state = load_model(warm_start(config, "student")).state_dict()
    assert f" {num_done}/6 " in capfd.readouterr().err
    for name, one in expected.items():
        assert torch.equal(state[name], one), name
    assert [path.suffix for path in made.iterdir()] == [""]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_lambda_other_than_one_without_a_usable_base_is_an_error(
    prepared: Prepared, config: Config, tmp_path: Path
) -> None:
    base = dataclasses.replace(config.base, path=str(tmp_path))
    with pytest.raises(ListopdError, match=r"no config\.json"):
        prepare(dataclasses.replace(config, base=base))
    assert prepare(dataclasses.replace(config, base=base, lam=1.0)).base_path is None


def test_roles_with_different_tokenizers_are_an_error(
    prepared: Prepared, config: Config, student_path: Path
) -> None:
    student = ModelConfig(path=str(student_path))
    with pytest.raises(ListopdError, match="different tokenizers"):
        prepare(dataclasses.replace(config, student=student))
