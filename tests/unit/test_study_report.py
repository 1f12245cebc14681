import pytest

from listopd_ray.study_report import comparison, curve_table, scope_table, write_report
from listopd_ray.task.contract import REASONS


def row(curve, lam, seed, parse_rate, **changes):
    return {
        "curve": curve,
        "lam": lam,
        "seed": seed,
        "clip": 2.0,
        "parse_rate": parse_rate,
        "ndcg_at_1": 0.6 if parse_rate else None,
        "ndcg_at_k_all": 0.8 * parse_rate,
        "mean_lam": lam,
        "seconds": 100.4,
        "num_prompts": 100,
        "reasons": dict.fromkeys(REASONS, 0) | {"truncated": round(100 * (1 - parse_rate))},
        **changes,
    }


PLAIN = [
    row("plain", 1.0, 0, 0.7),
    row("plain", 1.0, 1, 0.8),
    row("plain", 3.0, 0, 0.04, ndcg_at_1=0.1),
    row("plain", 3.0, 1, 0.0),
]
BOUNDED = [row("bounded", 1.0, 0, 0.7), row("bounded", 3.0, 0, 0.9, mean_lam=1.25)]
GRAMMAR = [row("grammar", None, seed, rate, seconds=0.0) for seed, rate in enumerate((0.97, 0.99))]
EMPTY = {"tests": [], "curves": {}}


def cells(table):
    """First column → the others, of every line of a Markdown table."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if "---" not in line]
    return {first: rest for first, *rest in lines if rest}


def test_methods_stand_side_by_side_with_means_and_ranges_over_seeds():
    tables = comparison({"plain": PLAIN, "bounded": BOUNDED}, {"grammar": GRAMMAR}).split("\n\n")
    parse, ndcg, _, worked, seconds, baselines = map(cells, tables)
    assert parse["strict parse"] == ["λ = 1", "λ = 3"]
    assert parse["plain"] == ["0.750 [0.700, 0.800]", "0.020 [0.000, 0.040]"]
    assert parse["bounded"] == ["0.700 [0.700, 0.700]", "0.900 [0.900, 0.900]"]
    assert ndcg["plain"] == ["0.600 [0.600, 0.600]", "–"]  # what hardly parses does not count
    assert worked["bounded"][1] == "1.250 [1.250, 1.250]"
    assert seconds["plain"][0] == "100 [100, 100]"
    assert baselines["grammar"][0] == "0.980 [0.970, 0.990]"
    assert baselines["grammar"][3] == "–"


def test_a_curve_shows_failures_and_the_lambda_it_worked_with():
    table = cells(curve_table("bounded", BOUNDED, EMPTY))
    assert table["1"][3] == "truncated 0.30"
    assert "3 (mean 1.250)" in table


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ([1.2, 1.4], "[1.200, 1.400]"),
        ([1.4, None], "[1.400, ∞]"),
        ([None, None], "beyond the grid"),
    ],
)
def test_a_curve_shows_its_onset(interval, text):
    onset = {"floor": 0.35, "low": 1.0, "high": 3.0, "onset_by_seed": {"0": [1.0, None]}}
    curves = {"bounded": onset | {"onset_interval": interval}}
    table = curve_table("bounded", BOUNDED, {"tests": [], "curves": curves})
    assert f"onset (1, 3]; of the seeds > 1; bootstrap of its upper edge {text}." in table


def test_the_scope_table_says_what_a_prediction_rests_on():
    test = {
        "name": "flat apriori",
        "kind": "apriori",
        "predicted": 1.5,
        "measured_low": 1.3,
        "measured_high": None,
        "inside": None,
        "teacher_mass": 0.7,
        "base_mass": None,
        "warm_start_parse_rate": 0.3,
        "teacher_parse_rate": 0.8,
        "out_of_scope": ["no headroom", "no knowledge gap"],
    }
    verdict = {"tests": [test, test | {"name": "flat escape", "kind": "escape"}]}
    numbers = ["0.700", "–", "0.300", "0.800", "1.500", "> 1.3", "–"]
    table = cells(scope_table(verdict))
    assert table["flat"] == [*numbers, "no headroom; no knowledge gap"]
    assert "flat escape" not in table


@pytest.mark.parametrize("baselines", [[], GRAMMAR])
def test_the_report_has_all_curves_and_a_figure_of_those_compared(tmp_path, baselines):
    rows = PLAIN + BOUNDED + baselines
    write_report(tmp_path, EMPTY, rows, compare=["plain", "bounded", "not run yet"])
    report = (tmp_path / "study.md").read_text()
    assert report.count("### ") == 2
    assert ("grammar" in report) == bool(baselines)
    figure = (tmp_path / "compare.svg").read_text()
    assert "<svg" in figure
    again = tmp_path / "again"
    again.mkdir()
    write_report(again, EMPTY, rows)
    assert not (again / "compare.svg").exists()
