"""Where the roles go: what each asks of a machine, and the placement group that gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from listopd_ray.config import Config, LearnerConfig, RolloutConfig, TeacherActorConfig
from listopd_ray.team import START_TIMEOUT_S
from listopd_ray.types import ListopdError


@dataclass(frozen=True)
class Bundle:
    """What one actor needs."""

    role: str
    resources: dict[str, float]  # CPU, GPU
    labels: dict[str, str] = field(default_factory=dict)  # of the machine, all of them

    def fits(self, resources: dict[str, float], labels: dict[str, str]) -> bool:
        """On an empty machine with these."""
        enough = all(need <= resources.get(name, 0) for name, need in self.resources.items())
        return enough and self.labels.items() <= labels.items()

    def __str__(self) -> str:
        needs = [f"{need:g} {name}" for name, need in self.resources.items()]
        return ", ".join(needs + [f"{name}={value}" for name, value in self.labels.items()])


def bundles_of(config: Config, *, with_teachers: bool = True) -> list[Bundle]:
    """The learner's ranks, then rollout workers, then teachers."""
    bundles = [_bundle("learner", config.learner)] * config.learner.num_ranks
    bundles += [_bundle("rollout", config.rollout)] * config.rollout.num_workers
    return bundles + (teacher_bundles(config) if with_teachers else [])


def teacher_bundles(config: Config) -> list[Bundle]:
    """Those of the default teacher first, then of each further one."""
    num_teachers = 1 + len(config.teachers)
    return [_bundle("scoring", config.scoring)] * (num_teachers * config.scoring.num_actors)


def _bundle(role: str, config: RolloutConfig | TeacherActorConfig | LearnerConfig) -> Bundle:
    needs = {"CPU": config.num_cpus, "GPU": config.num_gpus}
    return Bundle(role, {name: need for name, need in needs.items() if need}, dict(config.labels))


def reserve(
    config: Config, what: str, bundles: Sequence[Bundle], strategy: str = "SPREAD"
) -> PlacementGroup:
    """A placement group for `what`; raises ListopdError where there is no room.

    Over several machines it is spread, or packed where `strategy` is "PACK".
    """
    check_room(config, what, bundles)
    group = placement_group(
        [bundle.resources for bundle in bundles],
        strategy=strategy,
        bundle_label_selector=[bundle.labels for bundle in bundles],
    )
    timeout = config.autoscaling_wait_s or START_TIMEOUT_S
    try:
        ray.get(group.ready(), timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        remove_placement_group(group)
        raise ListopdError(f"{what}: no room after {timeout:g} s") from None
    return group


def check_room(config: Config, what: str, bundles: Sequence[Bundle]) -> None:
    """Raises ListopdError where the cluster is too small: Ray itself would wait for ever. One that
    grows (`autoscaling_wait_s`) is not looked at."""
    if config.autoscaling_wait_s:
        return
    have = ray.cluster_resources()
    for resource in ("CPU", "GPU"):
        need = sum(bundle.resources.get(resource, 0) for bundle in bundles)
        if need > have.get(resource, 0):
            raise ListopdError(
                f"{what} needs {need:g} {resource} but the Ray cluster has "
                f"{have.get(resource, 0):g}"
            )
    machines = [node for node in ray.nodes() if node["Alive"]]
    for bundle in bundles:
        if not any(bundle.fits(node["Resources"], node["Labels"]) for node in machines):
            raise ListopdError(f"{bundle.role}: no machine of the Ray cluster has {bundle}")


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """For actors that read and write the files that the calling process does."""
    return on_node(this_node())


def this_node() -> str:
    """Ray's id of the machine of the calling process."""
    return ray.get_runtime_context().get_node_id()
