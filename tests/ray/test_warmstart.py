"""Warm starts with real Ray Train workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

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


def test_two_workers_make_the_same_warm_start_as_one(
    ray_cluster: None, config: Config, tmp_path: Path
) -> None:
    # Muon for the matrices, AdamW for the rest.
    warmstart = WarmstartConfig(num_steps=6, batch_size=16, format_noise=0.1, optimizer="muon")
    student = dataclasses.replace(config.student, warmstart=warmstart)
    states = []
    for num_workers in (1, 2):
        changed = dataclasses.replace(
            config, student=student, warmstart_workers=num_workers, cache=str(tmp_path)
        )
        states.append(load_model(warm_start(changed, "student")).state_dict())
    for name, one in states[0].items():
        # The sums of the gradients differ in their order, and Adam divides by their size.
        torch.testing.assert_close(states[1][name], one, rtol=0, atol=2e-4)


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
