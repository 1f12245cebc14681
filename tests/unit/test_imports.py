"""What an import drags in, each in a process of its own."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "transformers", "ray")


def imported_with(*modules):
    """Which of `HEAVY` are loaded after importing `modules` in a fresh interpreter."""
    code = f"import sys, {', '.join(modules)}; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_data_config_and_metrics_need_no_heavy_package():
    assert (
        imported_with(
            "listopd_ray.types",
            "listopd_ray.config",
            "listopd_ray.task.contract",
            "listopd_ray.task.data",
            "listopd_ray.task.metrics",
            "listopd_ray.task.synthetic",
            "listopd_ray.checkpoint",
            "listopd_ray.cliff.threshold",
            "listopd_ray.cliff.calibration",
            "listopd_ray.cliff.governor",
            "listopd_ray.cliff.alarm",
            "listopd_ray.cliff.verdict",
            "listopd_ray.steering",
            "listopd_ray.job_config",
            "listopd_ray.search.judgement",
            "listopd_ray.search.bracket",
            "listopd_ray.label",
            "listopd_ray.following",
            "listopd_ray.watch",
            "listopd_ray.gauges",
            "listopd_ray.trace",
        )
        == "[]"
    )


@pytest.mark.parametrize(
    "modules",
    [
        (
            "listopd_ray.models",
            "listopd_ray.roles.losses",
            "listopd_ray.roles.batching",
            "listopd_ray.roles.learner",
            "listopd_ray.roles.teacher",
            "listopd_ray.roles.scoring",
            "listopd_ray.roles.prompt_scores",
            "listopd_ray.roles.rollout",
            "listopd_ray.roles.weights",
            "listopd_ray.roles.hf_engine",
            "listopd_ray.tracking",
        ),
        ("listopd_ray.evaluate", "listopd_ray.train"),
        ("listopd_ray.plan.command",),
    ],
    ids=["roles", "loop", "plan"],
)
def test_roles_and_loop_need_neither_ray_nor_vllm(modules):
    assert imported_with(*modules) == "['torch', 'transformers']"
