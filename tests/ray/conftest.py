"""One Ray cluster, one dataset and one pair of warm starts serve all tests of a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from filelock import FileLock

from listopd_ray.cluster import Cluster, launch
from listopd_ray.config import Config, load_config
from listopd_ray.prepare import Prepared, prepare
from listopd_ray.task.synthetic import SyntheticConfig, write_synthetic


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes end at about the same time."""
    longest = ("search_trials", "search", "study", "submit", "hosts", "weight_sync", "killed")
    names = [f"test_{name}.py" for name in longest]
    items.sort(key=lambda item: [*names, item.path.name].index(item.path.name))


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of its own, whatever runs here; with more logical CPUs than the machine has, since the tests
    hold several placement groups at once."""
    with pytest.MonkeyPatch.context() as patch:  # gauges at once, for the tests that scrape them
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory of this test run, for all its processes."""
    root = tmp_path_factory.getbasetemp()
    return root if worker_id == "master" else root.parent


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Config:
    """A run of a few updates: four items, and a warm start that mostly parses (0.72)."""
    root = tmp_path_factory.mktemp("listopd")
    write_synthetic(
        SyntheticConfig(out=str(root / "data"), num_items=4, num_train=400, num_eval=64)
    )
    return load_config(
        Config,
        [
            f"data.path={root / 'data'}",
            f"out={root / 'runs'}",
            f"cache={shared / 'cache'}",
            "lam=1.5",
            "num_prompts=8",
            "num_steps=4",
            "lr=3e-3",
            "student.warmstart.seed=0",  # one warm start for all seeds
            "teacher.warmstart.seed=0",
            "student.warmstart.num_steps=150",
            "student.warmstart.format_noise=0.02",
            "student.warmstart.batch_size=32",
            "teacher.warmstart.num_steps=80",
            "teacher.warmstart.batch_size=32",
            "evaluation.num_prompts=32",
            "evaluation.every=2",
            "checkpoint.every=2",
            "tracking.wandb=false",
        ],
    )


@pytest.fixture(scope="session")
def prepared(ray_cluster: None, config: Config, shared: Path) -> Prepared:
    with FileLock(shared / "prepared.lock"):  # one process trains the warm starts
        return prepare(config)


@pytest.fixture(scope="session")
def cluster(config: Config, prepared: Prepared) -> Iterator[Cluster]:
    with launch(config, **prepared.cluster_arguments()) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="session")
def hf_config(config: Config) -> Config:
    """Sampled by transformers, which starts quickly."""
    return replace(config, rollout=replace(config.rollout, backend="hf", num_cpus=0.5))


@pytest.fixture(scope="session")
def hf_cluster(hf_config: Config, prepared: Prepared) -> Iterator[Cluster]:
    with launch(hf_config, **prepared.cluster_arguments()) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="session")
def finished_run(config: Config, prepared: Prepared, cluster: Cluster) -> Path:
    """The directory of a whole run on the shared engines."""
    from listopd_ray.job import distill

    distill(config, prepared, cluster)
    return Path(config.out) / config.name


@pytest.fixture
def stop_search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function: Ctrl-C in a search after so many trials; none: no more."""
    from listopd_ray.search.search import Display

    show = Display.show

    def arrange(number: int | None = None) -> None:
        left = [number]

        def show_and_stop(self: Display, event: str, result: Any) -> None:
            show(self, event, result)
            if left[0] is not None and event == "complete":
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt

        monkeypatch.setattr(Display, "show", show_and_stop)

    return arrange
