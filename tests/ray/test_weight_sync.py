"""Weights reach a real engine whole, or the canary says so."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from listopd_ray.cluster import Cluster, launch
from listopd_ray.config import Config, LearnerConfig, LoraConfig, sync_directory
from listopd_ray.handles import Workers
from listopd_ray.prepare import Prepared
from listopd_ray.roles.batching import collate
from listopd_ray.roles.publisher import Publisher
from listopd_ray.roles.ranks import Ranks
from listopd_ray.roles.student import Student
from listopd_ray.supervision import ActorLost
from listopd_ray.team import Team
from listopd_ray.types import Prompt, Rollout, SyncMethod, Weights

RANK = 4


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


def unsupervised(workers: Workers) -> Workers:
    """The same engines; one that fails is not replaced."""
    team = workers._team
    return Workers(Team(team.role, team.actors, team._faults, spawn=None), seed=0)


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


def drop_one_matrix(weights: Weights) -> dict[str, np.ndarray]:
    name = "model.layers.1.mlp.down_proj.weight"
    return {other: array for other, array in weights.tensors.items() if other != name}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (drop_one_matrix, r"weights are missing: \['model.layers.1.mlp.down_proj.weight'\]"),
        (swap_layers, "weight sync to version 1: canary"),
        (scale_one_matrix, "weight sync to version 1: canary"),
    ],
)
def test_the_canary_fails_on_a_broken_sync_and_the_engine_refuses_to_serve(
    prepared: Prepared,
    cluster: Cluster,
    versions: tuple[Weights, Weights],
    broken: Callable[[Weights], dict[str, np.ndarray]],
    message: str,
) -> None:
    before, after = versions
    workers = unsupervised(cluster.workers)
    assert workers.load_weights(before)["sync/canary_max"] < 1e-4
    with pytest.raises(ActorLost, match=f"rollout 0: failed: {message}"):
        workers.load_weights(dataclasses.replace(after, tensors=broken(after)))
    with pytest.raises(RuntimeError, match="before load_weights"):
        completions(workers, prepared.train.prompts[:1])
    assert workers.load_weights(after)["sync/canary_max"] < 1e-4


class Source:
    """What a learner publishes. `update` moves the adapter, or without one (`rank` 0) the tied
    embedding, far enough to be seen."""

    def __init__(self, prepared: Prepared, rank: int = 0, dtype: Any = "float32") -> None:
        config = Config(learner=LearnerConfig(dtype=dtype), lora=LoraConfig(rank=rank))
        self._student = Student(prepared.student_path, config, Ranks())
        self._canary_ids = prepared.canary_ids

    def publisher(self, method: SyncMethod, directory: Path | None = None) -> Publisher:
        return Publisher(self._student, method, directory)

    @torch.no_grad()
    def publish(self, publisher: Publisher, version: int) -> Weights:
        since = time.perf_counter()
        batch = collate([self._canary_ids[:1]], [self._canary_ids[1:]])
        logprobs = self._student.logprobs(batch, batch.token_ids[:, None])[:, 0].numpy()
        weights = publisher.publish(version, self._canary_ids, logprobs, since=since)
        assert weights is not None
        return weights

    @torch.no_grad()
    def update(self) -> None:
        torch.manual_seed(0)
        for name, parameter in self._student.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if not self._student.has_adapter:
            self._student.model.get_input_embeddings().weight.mul_(1.5)


@pytest.fixture(params=["vllm", "hf"])
def either(request: pytest.FixtureRequest) -> Cluster:
    """Engines that are loaded with whole models."""
    return request.getfixturevalue("cluster" if request.param == "vllm" else "hf_cluster")


@dataclasses.dataclass
class Engines:
    adapters: Cluster  # hold the warm start and are given adapters
    whole: Cluster  # of the same backend, given whole models


@pytest.fixture(scope="module", params=["vllm", "hf"])
def engines(request: pytest.FixtureRequest, prepared: Prepared) -> Iterator[Engines]:
    names = ("config", "cluster") if request.param == "vllm" else ("hf_config", "hf_cluster")
    config, whole = map(request.getfixturevalue, names)
    lora = dataclasses.replace(config.lora, rank=RANK)
    sync = dataclasses.replace(config.sync, method="adapter")
    arguments = {**prepared.cluster_arguments(), "teacher_path": None}
    with launch(dataclasses.replace(config, lora=lora, sync=sync), **arguments) as adapters:
        yield Engines(adapters, whole)


@pytest.fixture(scope="module")
def packed(config: Config, prepared: Prepared) -> Iterator[Cluster]:
    """An engine that packs its matrices, as those of wide models do."""
    learner = dataclasses.replace(config.learner, dtype="bfloat16")
    sync = dataclasses.replace(config.sync, tolerance=0.3)
    arguments = {**prepared.cluster_arguments(), "teacher_path": None}
    with launch(dataclasses.replace(config, learner=learner, sync=sync), **arguments) as running:
        yield running


def sampled(workers: Workers, prepared: Prepared) -> list[Rollout]:
    parts = workers.fetch(workers.generate(prepared.train.prompts[:8], "test"))
    return [rollout for part in parts for rollout in part.rollouts]


def check_same_policy(found: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.policy_version == other.policy_version
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.sampler_logprobs, other.sampler_logprobs, atol=1e-4)


def test_files_give_the_policy_that_the_object_store_gives(
    config: Config, prepared: Prepared, either: Cluster
) -> None:
    results = []
    for method in ("object_store", "directory"):
        own = dataclasses.replace(config, sync=dataclasses.replace(config.sync, method=method))
        learner = either.start_learner(own, prepared.student_path, prepared.canary_ids)
        metrics = either.workers.load_weights(learner.publish_weights())
        assert metrics["sync/canary_max"] < 1e-4
        assert metrics["sync/bytes"] > 4 * 100_000
        assert min(metrics["time/publish_s"], metrics["time/load_s"]) > 0
        results.append(sampled(either.workers, prepared))
        assert sync_directory(own).exists() == (method == "directory")
        learner.close()
        assert not sync_directory(own).exists()
    check_same_policy(*results)


def test_an_adapter_gives_the_policy_that_merged_weights_give(
    prepared: Prepared, engines: Engines, tmp_path: Path
) -> None:
    source = Source(prepared, RANK)
    alone, merged = source.publisher("adapter", tmp_path), source.publisher("object_store")
    before: list[int] = []
    for version in range(3):
        small, large = source.publish(alone, version), source.publish(merged, version)
        assert small.num_bytes < large.num_bytes / 2
        for workers, weights in (
            (engines.adapters.workers, small),
            (engines.whole.workers, large),
        ):
            metrics = workers.load_weights(weights)
            assert metrics["sync/canary_max"] < 1e-4
            assert metrics["sync/bytes"] == weights.num_bytes
        found = sampled(engines.adapters.workers, prepared)
        check_same_policy(found, sampled(engines.whole.workers, prepared))
        tokens = [token for rollout in found for token in rollout.token_ids.tolist()]
        assert tokens != before, "the update must be seen"
        before = tokens
        source.update()


def test_a_worker_in_anothers_place_gets_the_current_adapter(
    prepared: Prepared, engines: Engines, tmp_path: Path
) -> None:
    workers = engines.adapters.workers
    source = Source(prepared, RANK)
    publisher = source.publisher("adapter", tmp_path)
    for version in range(2):
        workers.load_weights(source.publish(publisher, version))
        source.update()
    expected = sampled(workers, prepared)
    ray.kill(workers._team.actors[0])
    check_same_policy(sampled(workers, prepared), expected)


def test_a_worker_in_anothers_place_reads_the_current_files(
    prepared: Prepared, hf_cluster: Cluster, tmp_path: Path
) -> None:
    source = Source(prepared)
    publisher, workers = source.publisher("directory", tmp_path), hf_cluster.workers
    for version in range(2):
        workers.load_weights(source.publish(publisher, version))
        source.update()
    expected = sampled(workers, prepared)
    ray.kill(workers._team.actors[0])
    check_same_policy(sampled(workers, prepared), expected)
    weights = source.publish(publisher, 2)
    ray.kill(workers._team.actors[0])  # this time before it loads
    assert workers.load_weights(weights)["sync/canary_max"] < 1e-4


def test_an_adapter_of_another_rank_and_a_version_that_is_gone_are_one_line(
    prepared: Prepared, engines: Engines, tmp_path: Path
) -> None:
    workers = unsupervised(engines.adapters.workers)
    source = Source(prepared, 2 * RANK)
    weights = source.publish(source.publisher("adapter", tmp_path), 0)
    with pytest.raises(ActorLost, match=r"rollout 0: failed: .*v0: an adapter of rank 8, the "):
        workers.load_weights(weights)
    source = Source(prepared, RANK)
    publisher = source.publisher("adapter", tmp_path)
    weights = source.publish(publisher, 1)
    publisher.close()
    with pytest.raises(ActorLost, match=r"v1/adapter_\w+\.\w+: not there on this machine"):
        workers.load_weights(weights)


def test_packed_matrices_are_packed_anew(
    prepared: Prepared, packed: Cluster, tmp_path: Path
) -> None:
    workers, source = unsupervised(packed.workers), Source(prepared, dtype="bfloat16")
    for method in ("directory", "object_store"):
        publisher = source.publisher(method, tmp_path)
        for version in range(2):
            weights = source.publish(publisher, version)
            workers.load_weights(weights)
            source.update()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="on this CPU vLLM packs no bfloat16 head, and none can be stale",
)
def test_a_stale_tied_head_shows(prepared: Prepared, packed: Cluster, tmp_path: Path) -> None:
    workers, source = unsupervised(packed.workers), Source(prepared, dtype="bfloat16")
    publisher = source.publisher("object_store", tmp_path)
    workers.load_weights(source.publish(publisher, 0))
    source.update()
    stale = source.publish(publisher, 1)
    with pytest.raises(ActorLost, match="weight sync to version 1: canary"):
        workers.load_weights(dataclasses.replace(stale, tensors=drop_tied_head(stale)))
