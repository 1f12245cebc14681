"""Weights reach a real engine whole, or the canary says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import ray

from listopd_ray.cluster import Cluster
from listopd_ray.config import Config
from listopd_ray.handles import Workers
from listopd_ray.prepare import Prepared
from listopd_ray.supervision import ActorLost
from listopd_ray.team import Team
from listopd_ray.types import Prompt, Weights


@pytest.fixture(scope="module")
def versions(config: Config, prepared: Prepared, cluster: Cluster) -> tuple[Weights, Weights]:
    """The student before and after one large update."""
    learner = cluster.start_learner(config, prepared.student_path, prepared.canary_ids)
    before = learner.publish_weights()
    cluster.workers.load_weights(before)
    workers, teacher = cluster.workers, cluster.teacher
    rollouts = workers.fetch(workers.generate(prepared.train.prompts[:8], "test"))
    learner.step(teacher.fetch(teacher.score(rollouts)), lam=1.0, lr=1e-2)
    return ray.get(before), ray.get(learner.publish_weights())


def completions(workers: Workers, prompts: Sequence[Prompt]) -> list[list[int]]:
    parts = workers.fetch(workers.generate(prompts, "test"))
    return [rollout.token_ids.tolist() for part in parts for rollout in part.rollouts]


def test_completions_do_not_depend_on_batch_mates(
    prepared: Prepared, cluster: Cluster, versions: tuple[Weights, Weights]
) -> None:
    cluster.workers.load_weights(versions[0])
    prompts = prepared.train.prompts[:8]
    together = completions(cluster.workers, prompts)
    assert completions(cluster.workers, prompts[::-1]) == together[::-1]
    assert completions(cluster.workers, prompts[3:4]) == together[3:4]


def test_a_rollout_carries_the_version_of_the_weights_that_sampled_it(
    prepared: Prepared, cluster: Cluster, versions: tuple[Weights, Weights]
) -> None:
    for version, weights in enumerate(versions):
        cluster.workers.load_weights(weights)
        (part,) = cluster.workers.fetch(cluster.workers.generate(prepared.train.prompts[:2], "v"))
        assert [rollout.policy_version for rollout in part.rollouts] == [version, version]


def drop_tied_head(weights: Weights) -> dict[str, np.ndarray]:
    return {name: array for name, array in weights.tensors.items() if name != "lm_head.weight"}


def swap_layers(weights: Weights) -> dict[str, np.ndarray]:
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    swapped = dict(weights.tensors)
    for name in weights.tensors:
        for layer in other:
            if layer in name:
                swapped[name] = weights.tensors[name.replace(layer, other[layer])]
    return swapped


def scale_one_matrix(weights: Weights) -> dict[str, np.ndarray]:
    name = "model.layers.1.mlp.down_proj.weight"
    return {**weights.tensors, name: weights.tensors[name] * np.float32(1.01)}


@pytest.mark.parametrize("broken", [drop_tied_head, swap_layers, scale_one_matrix])
def test_the_canary_fails_on_a_broken_sync_and_the_engine_refuses_to_serve(
    prepared: Prepared,
    cluster: Cluster,
    versions: tuple[Weights, Weights],
    broken: Callable[[Weights], dict[str, np.ndarray]],
) -> None:
    before, after = versions
    team = cluster.workers._team
    workers = Workers(Team(team.role, team.actors, cluster.faults, spawn=None), seed=0)
    assert workers.load_weights(before) < 1e-4
    with pytest.raises(ActorLost, match="rollout 0: failed: weight sync to version 1: canary"):
        workers.load_weights(dataclasses.replace(after, tensors=broken(after)))
    with pytest.raises(RuntimeError, match="before load_weights"):
        completions(workers, prepared.train.prompts[:1])
    assert workers.load_weights(after) < 1e-4
