"""What does not fit is said before anything waits for it."""

from __future__ import annotations

import dataclasses

import pytest
import ray

from listopd_ray.config import Config, load_config
from listopd_ray.placement import Bundle, bundles_of, check_room, reserve
from listopd_ray.types import ListopdError

FAR = {"pool": "far"}


def test_every_role_asks_for_what_its_section_says() -> None:
    config = load_config(
        Config,
        [
            "rollout={num_workers: 2, num_cpus: 0, num_gpus: 1, labels: {pool: far}}",
            "learner={num_cpus: 2, num_gpus: 4}",
        ],
    )
    rollout = Bundle("rollout", {"GPU": 1.0}, FAR)
    learner = Bundle("learner", {"CPU": 2.0, "GPU": 4.0})
    assert bundles_of(config) == [learner, rollout, rollout, Bundle("scoring", {"CPU": 0.5})]


@pytest.mark.parametrize(
    ("resources", "labels", "fits"),
    [
        ({"CPU": 4.0, "GPU": 1.0}, {"pool": "far", "zone": "a"}, True),
        ({"CPU": 4.0, "GPU": 0.5}, {"pool": "far"}, False),
        ({"CPU": 4.0}, {"pool": "far"}, False),
        ({"CPU": 4.0, "GPU": 1.0}, {"pool": "near"}, False),
        ({"CPU": 4.0, "GPU": 1.0}, {}, False),
    ],
)
def test_a_machine_has_to_have_all_of_it(
    resources: dict[str, float], labels: dict[str, str], fits: bool
) -> None:
    assert Bundle("rollout", {"CPU": 4.0, "GPU": 1.0}, FAR).fits(resources, labels) == fits


def test_what_no_cluster_machine_has_is_one_clear_line(ray_cluster: None) -> None:
    config = Config()
    with pytest.raises(ListopdError, match=r"^the run needs 99 CPU but the Ray cluster has 16$"):
        reserve(config, "the run", [Bundle("learner", {"CPU": 99.0})])
    unknown = Bundle("rollout", {"CPU": 0.5}, FAR)
    with pytest.raises(ListopdError, match=r"^rollout: no machine .* has 0.5 CPU, pool=far$"):
        reserve(config, "the run", [unknown])


def test_a_cluster_that_grows_is_waited_for(
    ray_cluster: None,
) -> None:
    """No longer than it was said."""
    config = dataclasses.replace(Config(), autoscaling_wait_s=1.0)
    missing = Bundle("rollout", {"CPU": 0.5}, FAR)
    check_room(config, "the run", [missing])
    with pytest.raises(ListopdError, match=r"^the run: no room after 1 s$"):
        reserve(config, "the run", [missing])
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert "PENDING" not in states  # it is given back
