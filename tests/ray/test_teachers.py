"""Teachers in their actors: a vLLM engine against transformers, several teachers, replicas."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from listopd_ray.cluster import Cluster, SharedTeachers, launch
from listopd_ray.config import Config, TeacherActorConfig, with_values
from listopd_ray.handles import make_requests
from listopd_ray.prepare import Prepared, prepare
from listopd_ray.roles.rollout import Generated
from listopd_ray.roles.teacher import Teacher
from listopd_ray.teacher_pool import TeacherPool
from listopd_ray.types import ListopdError

# Two implementations in float32.
TOLERANCE = 1e-4
SUPPORT: dict[str, Any] = {"support_size": 5, "micro_batch_size": 16}


@pytest.fixture(scope="module")
def routed(
    config: Config, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Prepared]:
    """Every third example asks for the second teacher: the student."""
    data = tmp_path_factory.mktemp("routed")
    assert config.data.path is not None
    shutil.copytree(config.data.path, data, dirs_exist_ok=True)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for row in rows[::3]:
        row["teacher"] = "second"
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "data.path": str(data),
        "rollout.backend": "hf",
        "teachers": {"second": str(prepared.student_path)},
    }
    for role, path in (("student", prepared.student_path), ("teacher", prepared.teacher_path)):
        values |= {f"{role}.path": str(path), f"{role}.warmstart.num_steps": 0}
    two = with_values(config, values)
    return two, prepare(two)


@pytest.fixture(scope="module")
def cluster(routed: tuple[Config, Prepared]) -> Iterator[Cluster]:
    config, prepared = routed
    with launch(config, **prepared.cluster_arguments()) as running:
        running.workers.use_checkpoint()
        yield running


@pytest.fixture(scope="module")
def generated(routed: tuple[Config, Prepared], cluster: Cluster) -> list[Generated]:
    """Rollouts of the warm start."""
    prompts = routed[1].train.prompts[:24]
    return cluster.workers.fetch(cluster.workers.generate(prompts, "teachers"))


def with_engine(config: Config, prepared: Prepared, **values: object) -> SharedTeachers:
    values = {f"scoring.{key}": value for key, value in {**SUPPORT, **values}.items()}
    tight = {"sync.tolerance": values.pop("scoring.tolerance", config.sync.tolerance)}
    config = with_values(config, values | tight | {"scoring.backend": "vllm"})
    longest = max(len(p.token_ids) for p in prepared.train.prompts)
    lengths = (longest, prepared.max_new_tokens)
    return SharedTeachers(config, 1, prepared.teacher_path, {}, lengths)


@pytest.fixture(scope="module")
def engine(config: Config, prepared: Prepared) -> Iterator[TeacherPool]:
    teachers = with_engine(config, prepared)
    teachers.wait_until_ready()
    yield teachers.pool.with_base(prepared.student_path)
    teachers.shutdown()


def one_teacher(generated: list[Generated]) -> list[Generated]:
    """The same for the default teacher."""
    return [
        replace(
            part,
            rollouts=tuple(
                replace(r, prompt=replace(r.prompt, teacher=None)) for r in part.rollouts
            ),
        )
        for part in generated
    ]


def test_a_vllm_teacher_agrees_with_transformers(
    engine: TeacherPool, prepared: Prepared, generated: list[Generated]
) -> None:
    (part,) = one_teacher(generated)
    (found,) = engine.fetch(engine.score([part]))
    teacher = Teacher(
        TeacherActorConfig(**SUPPORT),
        teacher_path=prepared.teacher_path,
        dtype="float32",
        device="cpu",
    )
    expected_of = teacher.score(part, prepared.student_path)
    assert len(found.rollouts) == 24
    for one, other in zip(found.rollouts, expected_of.rollouts, strict=True):
        assert np.array_equal(one.rollout.token_ids, other.rollout.token_ids)
        assert np.array_equal(one.token_classes, other.token_classes)
        assert np.isnan(one.teacher_unused_mass).all()  # it cannot know
        names = ["teacher_logprobs", "teacher_modal_logprobs", "support_logprobs", "base_logprobs"]
        for name in names:
            values, expected = getattr(one, name), getattr(other, name)
            assert values.dtype == expected.dtype and values.shape == expected.shape, name
            assert np.abs(values - expected).max() < TOLERANCE, name
        # Two tokens may be as likely, and change places: then the likelihoods agree all the same.
        same = one.support_ids == other.support_ids
        assert same.mean() > 0.95
        assert (
            np.abs(one.base_support_logprobs - other.base_support_logprobs)[same].max() < TOLERANCE
        )
        assert np.array_equal(np.isnan(one.base_unused_mass), np.isnan(other.base_unused_mass))
        np.testing.assert_allclose(one.base_unused_mass, other.base_unused_mass, atol=TOLERANCE)


def test_the_gate_and_the_teachers_own_answers_work_with_an_engine(
    engine: TeacherPool, prepared: Prepared, generated: list[Generated]
) -> None:
    (scored,) = engine.score_with(prepared.student_path, generated)
    gap = np.concatenate([s.teacher_logprobs - s.rollout.sampler_logprobs for s in scored.rollouts])
    assert np.abs(gap).max() < TOLERANCE
    requests = make_requests(prepared.evaluation.prompts[:8], 0, "own")
    answers = engine.generate(requests, prepared.max_new_tokens, True)
    assert all(r.finish_reason == "stop" for r in answers.rollouts)


def test_an_engine_that_differs_from_transformers_does_not_start(
    config: Config, prepared: Prepared
) -> None:
    teachers = with_engine(config, prepared, tolerance=1e-12)
    with pytest.raises(ListopdError, match=r"scoring.backend=vllm: log-probabilities of .* differ"):
        teachers.wait_until_ready()
    teachers.shutdown()


def test_examples_are_scored_by_the_teacher_they_name_also_after_it_was_killed(
    routed: tuple[Config, Prepared], cluster: Cluster, generated: list[Generated]
) -> None:
    prepared, pool = routed[1], cluster.teacher
    assert prepared.hashes["teachers.second"] == prepared.hashes["warm_start"]
    prompts = prepared.train.prompts[:24]
    assert [p.teacher for p in prompts] == ["second", None, None] * 8

    def check() -> None:
        (scored,) = pool.fetch(pool.score(generated))
        assert [s.rollout.prompt.id for s in scored.rollouts] == [p.id for p in prompts]
        for s in scored.rollouts:
            gap = np.abs(s.teacher_logprobs - s.rollout.sampler_logprobs).max()
            assert (gap < TOLERANCE) == (s.rollout.prompt.teacher == "second")

    check()
    assert [name for name, _ in pool.members()] == ["teacher 0", "teacher 1"]
    second = pool.members()[1][1]
    os.kill(ray.get(second.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    check()
    assert cluster.faults.progress() == {"fault/teacher_restarts": 1.0}


def test_a_teacher_that_is_not_there_is_one_clear_line(routed: tuple[Config, Prepared]) -> None:
    config, _ = routed
    with pytest.raises(
        ListopdError, match=r"^teachers: example '[^']+' asks for 'second'; there: other$"
    ):
        prepare(replace(config, teachers={"other": config.teachers["second"]}))


def test_the_tokenizer_of_a_further_teacher_is_checked(
    routed: tuple[Config, Prepared], tmp_path: Path
) -> None:
    config, prepared = routed
    other = tmp_path / "other"
    shutil.copytree(prepared.student_path, other)
    file = other / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 5}))
    with pytest.raises(ListopdError, match=r"^teachers\.second .* have different tokenizers$"):
        prepare(replace(config, teachers={"second": str(other)}))
