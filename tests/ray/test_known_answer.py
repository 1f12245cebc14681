"""Calibration against warm starts whose masses are known from how they were made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from listopd_ray.cliff.calibration import measure, predict
from listopd_ray.config import Config, ModelConfig, WarmstartConfig, load_config
from listopd_ray.handles import make_requests
from listopd_ray.models import load_tokenizer
from listopd_ray.roles.rollout import Completion, Generated, make_rollout
from listopd_ray.roles.teacher import Teacher
from listopd_ray.splits import answer_ids, load_split
from listopd_ray.task.synthetic import SyntheticConfig, write_synthetic
from listopd_ray.warmstart import warm_start

TOLERANCE = 0.003
TEACHER_NOISE, BASE_NOISE = 0.01, 0.05
STRUCTURE = ("opening", "separator", "closing")


@pytest.fixture(scope="module")
def noisy_warm_starts(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, dict[float, Path]]:
    """Checkpoints by format noise.

    At the rate at which the form is learnt in seconds the gradient's own noise moves a mass by more
    than the tolerance; the schedule's end at a twentieth of it averages it out.
    """
    root = tmp_path_factory.mktemp("noise")
    data = SyntheticConfig(
        out=str(root / "data"), num_items=6, num_train=4000, num_eval=200, criteria=["rating"]
    )
    write_synthetic(data)
    arguments = [f"data.path={data.out}", f"cache={root / 'cache'}", "warmstart_workers=2"]
    config = load_config(Config, arguments)
    paths = {}
    for noise in (TEACHER_NOISE, BASE_NOISE):
        warmstart = WarmstartConfig(num_steps=300, batch_size=256, lr=1e-2, format_noise=noise)
        tiny = ModelConfig(num_layers=1, hidden_size=32, intermediate_size=64, warmstart=warmstart)
        paths[noise] = warm_start(dataclasses.replace(config, student=tiny), "student")
    return config, paths


def test_structural_masses_are_those_that_the_noise_of_the_warm_starts_allows(
    noisy_warm_starts: tuple[Config, dict[float, Path]],
) -> None:
    """On prefixes as they were trained on: of a sampled one that was not nothing is known."""
    config, paths = noisy_warm_starts
    base, tokenizer = paths[BASE_NOISE], load_tokenizer(paths[BASE_NOISE])
    split = load_split(config, "eval", tokenizer)
    rollouts = []
    for example, request in zip(
        split.examples, make_requests(split.prompts, 0, "calibrate"), strict=True
    ):
        answer = answer_ids(tokenizer, example).tolist()
        rollouts.append(make_rollout(request, Completion(answer, [0.0] * len(answer), True), 0))
    teacher = Teacher(
        config.scoring, teacher_path=str(paths[TEACHER_NOISE]), dtype="float32", device="cpu"
    )
    generated = Generated(rollouts=tuple(rollouts), seconds=0.0)
    scored = teacher.score(generated, str(base)).rollouts
    evaluation = {"parse_rate": 0.5, "ndcg_at_1": None, "ndcg_at_1_interval": [None, None]}
    prediction = predict(measure(scored), clip=2.0, warm_start=evaluation, teacher=evaluation)

    def truth(noise: float) -> float:
        """A noisy target is the right token after all once in V."""
        return 1 - noise + noise / len(tokenizer)

    for name in STRUCTURE:
        row = prediction["classes"][name]
        assert row["teacher_mass"] == pytest.approx(truth(TEACHER_NOISE), abs=TOLERANCE)
        assert row["base_mass"] == pytest.approx(truth(BASE_NOISE), abs=TOLERANCE)
        assert row["kind"] == "resolved"
