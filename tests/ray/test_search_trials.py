"""Searches with real trials, and the slots that they lease."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from listopd_ray.config import Config, run_directory, with_values
from listopd_ray.job_config import SearchConfig, SearchSection
from listopd_ray.search import search as search_module
from listopd_ray.search.search import search_job
from listopd_ray.slots import Lease, Slots, prepared_for


def outcome(config: SearchConfig) -> Any:
    return json.loads((run_directory(config) / "bracket.json").read_text())


@pytest.fixture(scope="module")
def shared_slots(ray_cluster: None, hf_config: Config) -> Iterator[Slots]:
    with Slots(hf_config, 2) as slots:
        yield slots


@pytest.fixture
def use_shared_slots(shared_slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches use engines that are there already, and leave them."""
    shared = contextlib.nullcontext(shared_slots)
    monkeypatch.setattr(search_module, "Slots", lambda config, number: shared)


def real_search(config: Config, name: str, **settings) -> SearchConfig:
    """Three small updates."""
    changes = {
        "name": name,
        "num_steps": 3,
        "evaluation.every": 0,
        "lr": 3e-4,
    }
    plain = with_values(config, changes)
    return SearchConfig(**vars(plain), search=SearchSection(**settings))


def test_real_trials_are_searched_interrupted_and_continued(
    ray_cluster: None,
    hf_config: Config,
    stop_search: Callable[..., None],
    request: pytest.FixtureRequest,
) -> None:
    settings = dict(seeds=[0], resolution=0.1, max_lam=1.2, error=0.4)
    interrupted, whole = (
        real_search(hf_config, n, **settings) for n in ("search-cut", "search-whole")
    )
    stop_search(2)
    with pytest.raises(KeyboardInterrupt):
        search_job(interrupted)
    stop_search()
    request.getfixturevalue("use_shared_slots")
    search_job(interrupted)
    prediction = run_directory(interrupted) / "prediction.json"
    search_job(replace(whole, prediction=str(prediction)))
    result, again = outcome(whole), outcome(interrupted)
    for key in ("low", "high", "confidence", "verdicts", "floor", "recommended"):
        assert again[key] == result[key]  # λ sequence and every count
    assert result["prediction"]["kind"] == "apriori"
    slots = again["slots"]
    assert np.median(slots["reused"]) < min(slots["built"]) / 10
    model = json.loads((run_directory(whole) / "student" / "config.json").read_text())
    assert model["model_type"] == "qwen3"


def test_grids_and_optuna_run_the_same_trials_over_any_key(
    hf_config: Config, use_shared_slots: None, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"lr": {"grid_search": [1e-3, 3e-3]}, "group_size": {"choice": [2]}}
    grid = real_search(hf_config, "grid", algorithm="grid", space=space)
    search_job(grid)
    file = run_directory(grid) / "trials.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["lr"] for row in rows) == [1e-3, 3e-3]
    assert all(row["finished"] and row["updates"] == 3 for row in rows)
    assert all(0 <= row["eval/ndcg_at_k_all"] <= 1 for row in rows)
    run = next((run_directory(grid) / "trials").glob("*lr0.001*"))
    assert "group_size: 2" in (run / "config.yaml").read_text()
    before = (run / "metrics.jsonl").read_text()
    search_job(grid)  # all are finished
    assert (run / "metrics.jsonl").read_text() == before

    space = {"clip": {"uniform": [1.5, 3.0]}}
    options = dict(algorithm="optuna", asha=True, rung=1, space=space)

    def optuna(number: int) -> SearchConfig:
        plain = real_search(hf_config, "optuna", num_samples=number, **options)
        return replace(plain, evaluation=replace(plain.evaluation, every=1))

    search_job(optuna(2))
    file = run_directory(optuna(2)) / "trials.jsonl"
    clips = {json.loads(line)["clip"] for line in file.read_text().splitlines()}
    assert len(clips) == 2
    search_job(optuna(3))  # one more
    again = {json.loads(line)["clip"] for line in file.read_text().splitlines()}
    assert clips < again
    assert len(again) == 3
    assert any(json.loads(line)["finished"] for line in file.read_text().splitlines())
    assert "best first" in capsys.readouterr().out


def test_a_slot_whose_engine_died_is_rebuilt(ray_cluster: None, hf_config: Config) -> None:
    config = hf_config
    prepared = prepared_for(config)
    with Slots(config, 1) as slots:

        def lease(holder: str) -> Lease:
            return ray.get(slots.keeper.lease.remote(config, prepared.cluster_arguments(), holder))

        def give_back(holder: str, *, sound: bool) -> None:
            ray.get(slots.keeper.release.remote(holder, sound=sound))

        first = lease("a")
        give_back("a", sound=True)
        again = lease("b")
        assert again.workers._team.actors == first.workers._team.actors
        ray.kill(again.workers._team.actors[0])
        give_back("b", sound=True)
        rebuilt = lease("c")
        assert rebuilt.workers._team.actors != first.workers._team.actors
        learner = rebuilt.start_learner(config, prepared.student_path, prepared.canary_ids)
        loaded = rebuilt.workers.load_weights(learner.publish_weights())
        assert loaded["sync/canary_max"] < 1e-4
        give_back("c", sound=False)  # its trial failed: the engines may be poisoned
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(rebuilt.workers._team.actors[0].__ray_ready__.remote())
