"""The Grafana dashboard asks for what runs export, and for all of it."""

import json
import re
from pathlib import Path

import pytest

from listopd_ray.gauges import GAUGES

DASHBOARD = Path(__file__).parents[2] / "jobs/grafana/listopd.json"
EXPORTED = {f"ray_{name}" for name, _ in GAUGES.values()}
SELECTED = re.compile(r"(ray_\w+)\{([^}]*)\}")


@pytest.fixture(scope="module")
def dashboard():
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def panels(dashboard):
    return {panel["title"]: panel for panel in dashboard["panels"]}


def expressions(panel):
    return [target["expr"] for target in panel["targets"]]


def test_the_dashboard_shows_every_gauge_and_no_other(panels):
    shown = {
        name
        for panel in panels.values()
        for e in expressions(panel)
        for name, _ in SELECTED.findall(e)
    }
    assert shown == EXPORTED
    for panel in panels.values():
        for expression in expressions(panel):
            assert len(re.findall(r"\bray_", expression)) == len(SELECTED.findall(expression))


def test_every_expression_selects_by_run_and_says_whose_it_is(panels):
    for panel in panels.values():
        for target in panel["targets"]:
            assert {s for _, s in SELECTED.findall(target["expr"])} == {'run=~"$run"'}
            assert target["expr"].count("(") == target["expr"].count(")")
            assert "{{run}}" in target["legendFormat"]


def test_data_source_and_runs_are_variables(dashboard, panels):
    source, run = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    asked = re.fullmatch(r"label_values\((\w+), run\)", run["query"]["query"])
    assert asked and asked[1] in EXPORTED and run["name"] == "run"
    own = {"type": "prometheus", "uid": "${datasource}"}
    assert run["datasource"] == own
    for panel in panels.values():
        assert panel["datasource"] == own
        assert all(target["datasource"] == own for target in panel["targets"])


def test_panels_have_titles_units_and_places_of_their_own(dashboard, panels):
    assert len(panels) == len(dashboard["panels"]) == len({p["id"] for p in panels.values()})
    taken = set()
    for panel in panels.values():
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


def test_lam_is_shown_with_its_threshold_and_the_stages_are_stacked(panels):
    both = " ".join(expressions(panels["λ and λ*"]))
    assert "ray_listopd_lam{" in both and "ray_listopd_lambda_star{" in both
    stages = panels["Seconds of the stages"]["fieldConfig"]
    assert stages["defaults"]["custom"]["stacking"]["mode"] == "normal"
