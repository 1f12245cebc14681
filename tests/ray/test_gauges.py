"""A run's metrics at the endpoint that Prometheus scrapes."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from listopd_ray import gauges
from listopd_ray.cluster import Cluster
from listopd_ray.config import Config
from listopd_ray.gauges import GAUGES, Gauges
from listopd_ray.job import distill
from listopd_ray.prepare import Prepared

LINE = re.compile(r'^ray_(listopd_\w+)\{.*\brun="(.*?)".*\} (\S+)$', re.MULTILINE)


def scraped(run: str) -> dict[str, float]:
    """Values of the run's gauges by name, of all nodes."""
    values = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            for name, whose, value in LINE.findall(response.read().decode()):
                if whose == run:
                    values[name] = float(value)
    return values


def wait_for(run: str, holds: Callable[[dict[str, float]], Any]) -> dict[str, float]:
    end = time.monotonic() + 60
    while not holds(values := scraped(run)):
        assert time.monotonic() < end, values
        time.sleep(0.2)
    return values


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as the tests' cluster reports, or values would come and go."""
    monkeypatch.setattr(gauges, "REFRESH_S", 0.5)


def test_a_run_is_seen_at_the_endpoint_as_it_goes(
    hf_config: Config, prepared: Prepared, hf_cluster: Cluster
) -> None:
    config = dataclasses.replace(hf_config, name="watched", num_steps=2)
    seen: list[dict[str, float]] = []

    def scrape(row: dict[str, float]) -> None:
        expected = {name: row[metric] for metric, (name, _) in GAUGES.items() if metric in row}

        def is_of_row(values: dict[str, float]) -> bool:  # Ray gives each away when it comes to it
            own = {name: values[name] for name in expected if name in values}
            return own == pytest.approx(expected, rel=1e-9)

        seen.append(wait_for("watched", is_of_row))

    distill(config, prepared, hf_cluster, scrape)
    assert [values["listopd_step"] for values in seen] == [0, 1, 2]
    rows = map(json.loads, Path(config.out, "watched", "metrics.jsonl").read_text().splitlines())
    logged = {"num_steps": 2} | {metric: 0 for metric in GAUGES if metric.endswith("_restarts")}
    for row in rows:
        logged |= row  # the newest of each
    # λ* where enough of a token class was sampled.
    assert {metric for metric in GAUGES if metric not in logged} <= {"cliff/lambda_star"}
    expected = {name: logged[metric] for metric, (name, _) in GAUGES.items() if metric in logged}
    assert seen[-1] == pytest.approx(expected, rel=1e-9)


def test_gauges_stay_while_nothing_is_logged_and_go_with_the_run(ray_cluster: None) -> None:
    tag = "half %CE%BB"  # Ray's metrics know ASCII alone
    with Gauges(Config(name="half λ")) as shown:
        assert scraped(tag) == {}
        shown.show({"train/step": 3, "cliff/lambda_star": 1.25})
        shown.show({"train/step": 4, "contract/parse_rate": 0.5})
        wait_for(tag, lambda values: values.get("listopd_step") == 4)
        time.sleep(4)  # longer than Ray keeps what is not set again
        values = scraped(tag)
        assert (values["listopd_lambda_star"], values["listopd_parse_rate"]) == (1.25, 0.5)
    wait_for(tag, lambda values: not values)


def test_runs_of_one_process_have_gauges_of_their_own(ray_cluster: None) -> None:
    with Gauges(Config(name="one", num_steps=10)) as one, Gauges(Config(name="two")) as two:
        one.show({"train/step": 1})
        two.show({"train/step": 2})
        assert wait_for("one", len)["listopd_num_steps"] == 10
        assert wait_for("two", len)["listopd_step"] == 2
