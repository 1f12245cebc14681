import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from runs_on_disk import page_of, sample, write_run

from listopd_ray.config import Config, load_config
from listopd_ray.report.figures import against_lam, points_of, stage_seconds, styles, thinned
from listopd_ray.report.groups import (
    group_runs,
    late_mean,
    mean_curve,
    overall_mean,
    spread,
)
from listopd_ray.report.page import write_page
from listopd_ray.report.runs import find_runs, read_columns, read_run, read_runs
from listopd_ray.tracking import Run, evaluation_metrics, read_jsonl
from listopd_ray.types import ListopdError


def grouped(root, keys=()):
    return group_runs(read_runs(find_runs(sorted(root.iterdir()))), keys)


class Page(HTMLParser):
    """The numbers of a page: those in the text, and those in the charts, by metric or title."""

    def __init__(self, file):
        super().__init__()
        self.numbers, self.charts = {}, {}
        self._title, self._in = None, None
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._in = tag
        if tag == "data":
            self.numbers.setdefault(attributes["data-metric"], []).append(
                float(attributes["value"])
            )
        if tag == "figure":
            self._title = attributes["aria-label"]

    def handle_data(self, data):
        if self._in == "script" and self._title and data.startswith("{"):
            self.charts[self._title] = json.loads(data)
            self._title = None


def values(array):
    """Of a trace, as plotly writes them."""
    if isinstance(array, dict):
        return np.frombuffer(base64.b64decode(array["bdata"]), dtype=array["dtype"]).tolist()
    return array


# Reading


def test_columns_are_the_metrics_with_gaps_where_a_row_has_none(tmp_path):
    rows = write_run(tmp_path)
    columns = read_columns(tmp_path / "run" / "metrics.jsonl")
    for name in ("train/step", "kl/reverse", "eval/parse_rate", "cliff/tail_mass_item_id"):
        expected = [row.get(name, math.nan) for row in rows]
        np.testing.assert_array_equal(columns[name], expected)


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    rows = write_run(tmp_path)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"train/step": 5, "kl/rev')
    assert read_columns(file)["train/step"].tolist() == [row["train/step"] for row in rows]


def test_runs_from_before_tokens_were_counted_have_them_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"train/step": 0}, *({"train/step": n, "rollout/tokens": 10 * n} for n in (1, 2, 3))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_columns(file)["train/tokens"].tolist() == [0, 10, 30, 60]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", "nonsense\n", "not the metrics of a run"),
        ("metrics.jsonl", '{"train/step": "four"}\n', "not the metrics of a run"),
        (
            "metrics.jsonl",
            '{"kl/reverse": 1.0}\n',
            "not the metrics of a run: a row without train/step",
        ),
        ("summary.json", "[]", "not the summary of a run"),
        ("summary.json", "{", "not JSON"),
        ("config.yaml", "- a\n", "not the configuration of a run"),
        ("config.yaml", "a: [", "not YAML"),
        ("samples.jsonl", "[]\n", "not what a run writes"),
        ("updates.jsonl", "{\n", "not JSON lines"),
        ("updates.jsonl", '{"train/step": 1}\n', "not what a run writes"),
        ("samples.jsonl", '{"train/step": 1}\n', "not what a run writes"),
        ("samples.jsonl", "\udcff\n", "not JSON lines"),
        ("events.jsonl", "3\n", "not what a run writes"),
        ("summary.json", '{"student": {}}', "not the summary of a run"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it_and_leaves_no_page(tmp_path, file, content, said):
    write_run(tmp_path)
    (tmp_path / "run" / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ListopdError, match=rf"{file}: {said}") as raised:
        page_of(tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "report.html").exists()


def test_what_is_no_run_is_said(tmp_path):
    (tmp_path / "empty" / "trials").mkdir(parents=True)
    for path, said in (("gone", "no such directory"), (".", "neither a run nor a study")):
        with pytest.raises(ListopdError, match=said):
            find_runs([tmp_path / path])
    with pytest.raises(ListopdError, match="no trial has begun"):
        find_runs([tmp_path / "empty"])
    write_run(tmp_path)
    for out, said in (("page.txt", "must end in .html"), ("gone/page.html", "no directory")):
        with pytest.raises(ListopdError, match=said):
            write_page([tmp_path / "run"], tmp_path / out)


def test_trials_count_once_however_they_are_named(tmp_path):
    write_run(tmp_path / "study" / "trials", "a")
    paths = [tmp_path / "study", tmp_path / "study" / "trials" / "a"]
    assert [path.name for path in find_runs(paths)] == ["a"]


# Groups


def test_runs_that_differ_in_the_seed_or_their_place_alone_are_one_group(tmp_path):
    for seed in (0, 1, 2):
        for lam in (1.0, 1.5):
            cpus = 0.5 if seed else 1.0
            name = f"lam{lam}-{seed}"
            write_run(tmp_path, name, seed=seed, lam=lam, rollout__num_cpus=cpus)
    groups = grouped(tmp_path)
    assert [group.label for group in groups] == ["λ = 1", "λ = 1.5"]
    assert [[run.config["seed"] for run in group.runs] for group in groups] == [[0, 1, 2]] * 2
    assert [group.values for group in groups] == [{"lam": 1.0}, {"lam": 1.5}]


def test_labels_tell_what_is_unusual_and_are_unique(tmp_path):
    for number, changes in enumerate(
        [
            {"lam": 1.0},
            {"lam": 1.2},
            {"lam": 1.2, "lr": 0.01},
            {"lam": 1.2, "extrapolation": "bounded"},
            {"lam": 1.2, "lr": 0.01, "extrapolation": "bounded"},
        ]
    ):
        write_run(tmp_path, f"r{number}", **changes)
    groups = grouped(tmp_path)
    labels = [group.label for group in groups]
    assert set(labels) == {
        "λ = 1, plain",
        "λ = 1.2, plain",
        "λ = 1.2, plain, lr=0.01",
        "λ = 1.2, bounded",
        "λ = 1.2, bounded, lr=0.01",
    }
    assert {group.family for group in groups} == {
        "plain",
        "plain, lr=0.01",
        "bounded",
        "bounded, lr=0.01",
    }


def test_groups_may_be_asked_for_by_key(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, f"s{seed}", seed=seed)
    assert [group.label for group in grouped(tmp_path, ["seed"])] == ["seed=0", "seed=1"]
    with pytest.raises(ListopdError, match="'sed' is no key"):
        grouped(tmp_path, ["sed"])


def test_a_curve_is_the_mean_and_range_of_the_runs_that_came_so_far(tmp_path):
    long = write_run(tmp_path, "long", seed=0)
    short = write_run(tmp_path, "short", seed=1, steps=2, finished=False)
    (group,) = grouped(tmp_path)
    steps, mean, low, high = mean_curve(group, "kl/reverse")
    assert steps.tolist() == [1, 2, 3, 4]
    for step, *numbers in zip(steps, mean, low, high, strict=True):
        own = [rows[step]["kl/reverse"] for rows in (long, short) if step < len(rows)]
        assert numbers == pytest.approx([sum(own) / len(own), min(own), max(own)], abs=0)


def test_late_means_are_of_the_last_tenth_and_overall_ones_of_all(tmp_path):
    for seed in (0, 1):
        rows = write_run(tmp_path, f"s{seed}", seed=seed, num_steps=30, steps=30)
        late = [row["kl/reverse"] for row in rows[-3:]]
        (group,) = grouped(tmp_path)
    assert late_mean(group, "loss/policy") is None
    per_run = [read_run(run.directory).columns["kl/reverse"][-3:].mean() for run in group.runs]
    assert late_mean(group, "kl/reverse") == pytest.approx(np.mean(per_run))
    assert per_run[1] == pytest.approx(np.mean(late))
    every = np.concatenate([run.columns["kl/reverse"][1:] for run in group.runs])
    assert overall_mean(group.runs, "kl/reverse") == pytest.approx(every.mean())


def test_spreads_are_shown_as_mean_and_sample_deviation():
    assert spread([1.0, 2.0, 4.0]).text(2) == "2.33 ± 1.53"
    assert spread([1234.5]).text(0) == "1,234"
    assert spread([]).text(3) == "–"


# Charts


def test_thinning_keeps_the_ends_and_no_more_than_asked():
    assert thinned(5, 10).tolist() == [0, 1, 2, 3, 4]
    kept = thinned(1000, 7)
    assert len(kept) == 7 and kept[0] == 0 and kept[-1] == 999
    assert thinned(0, 7).tolist() == [0]


def test_a_run_without_an_end_counts_with_its_last_samples_and_is_marked(tmp_path):
    write_run(tmp_path, "a", lam=1.0)
    rows = write_run(tmp_path, "b", lam=1.5, steps=2, finished=False)
    points = points_of(grouped(tmp_path))
    assert [point.finished for point in points] == [True, False]
    assert points[1].parse_rate == rows[-1]["contract/parse_rate"]
    symbols = [s for trace in against_lam(points).data for s in (trace.marker.symbol or ())]
    assert "circle-open" in symbols and "circle" in symbols


def test_stages_and_the_rest_add_up_to_the_update(tmp_path):
    write_run(tmp_path, "a", lam=1.0)
    write_run(tmp_path, "b", lam=1.5)
    figure = stage_seconds(grouped(tmp_path))
    assert [trace.name for trace in figure.data] == ["generate", "score", "learn", "sync", "other"]
    for position in (0, 1):
        assert sum(trace.x[position] for trace in figure.data) == pytest.approx(1.0)
    assert figure.data[-1].x[0] == pytest.approx(0.2)


def test_few_groups_have_colours_of_their_own_and_many_a_scale(tmp_path):
    for number in range(10):
        write_run(tmp_path, f"r{number}", lam=1 + 0.1 * number)
    groups = grouped(tmp_path)
    assert len(set(styles(groups[:8]))) == 8
    assert len(set(styles(groups))) == 10


# The page


def test_the_page_holds_the_numbers_of_metrics_and_summary(tmp_path):
    rows = write_run(tmp_path)
    page = Page(page_of(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name, value in summary["final"].items():
        if name not in ("lam", "lambda_star"):
            assert page.numbers[f"final/{name}"] == [value]
    assert page.numbers["student/sampled/parse_rate"] == [rows[-1]["eval/parse_rate"]]
    assert page.numbers["student/greedy/parse_rate"] == [1.0]
    (trace,) = page.charts["strict parse of training samples"]["data"]
    assert trace["x"] == [1, 2, 3, 4]
    assert values(trace["y"]) == [row["contract/parse_rate"] for row in rows[1:]]
    by_class = page.charts["tail mass, 1 − q"]["data"]
    assert [trace["name"] for trace in by_class] == ["opening", "item id", "separator", "closing"]
    assert values(by_class[1]["y"]) == [row["cliff/tail_mass_item_id"] for row in rows[1:]]


def test_page_metrics_and_offline_wandb_have_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = write_run(tmp_path / "made")
    made = json.loads((tmp_path / "made" / "run" / "summary.json").read_text())
    config = load_config(Config, [f"out={tmp_path}", "name=run", "num_steps=4"])
    with Run(config, {}) as run:
        for row in rows:
            kept = {k: v for k, v in row.items() if k not in ("train/step", "train/tokens")}
            run.log(row["train/step"], kept)
        run.finish(made | {"final": run.final_numbers(made["student"], 4.0)})
    page = Page(page_of(run.directory))
    (file,) = (run.directory / "wandb").glob("offline-run-*/*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    leet = [wandb, "leet", "inspect", "--json"]
    records = subprocess.run([*leet, file], capture_output=True, check=True).stdout.splitlines()
    logged = [json.loads(line) for line in records if b'"type":"history"' in line]
    history = [record["history"]["item"] for record in logged]
    text = subprocess.run([*leet, "--summary", file], capture_output=True, check=True).stdout
    final = json.loads(text)["summary"]["final"]
    written = read_jsonl(run.directory / "metrics.jsonl")
    for title, metric in (
        ("strict parse of training samples", "contract/parse_rate"),
        ("reverse KL to the teacher (nats a token)", "kl/reverse"),
        ("strict parse, held out", "eval/parse_rate"),
    ):
        (trace,) = page.charts[title]["data"]
        expected = [row[metric] for row in written if metric in row]
        assert values(trace["y"]) == expected
        assert [item[metric] for item in history if metric in item] == expected
    for name in ("parse_rate", "ndcg_at_1", "ndcg_at_k_all", "lam_over_lambda_star", "tokens"):
        assert page.numbers[f"final/{name}"] == [pytest.approx(final[name], rel=1e-12)]
    assert final["tokens"] == written[-1]["train/tokens"] == 400.0
    last = evaluation_metrics(made["student"])["eval/parse_rate"]
    assert final["parse_rate"] == pytest.approx(last) == written[-1]["eval/parse_rate"]


def test_groups_of_a_comparison_carry_the_mean_of_their_seeds(tmp_path):
    for seed in (0, 1, 2):
        for lam in (1.0, 1.5):
            write_run(tmp_path / "runs", f"{lam}-{seed}", seed=seed, lam=lam)
    groups = grouped(tmp_path / "runs")
    page = Page(write_page(sorted((tmp_path / "runs").iterdir()), tmp_path / "page.html"))
    expected = [np.mean(group.finals("parse_rate")) for group in groups]
    assert page.numbers["final/parse_rate"] == pytest.approx(expected, rel=1e-12)
    table = (tmp_path / "page.md").read_text()
    for group in groups:
        text = spread(group.finals("parse_rate")).text(3)
        assert re.search(
            rf"^\| {group.values['lam']:g} \| 3 \| {re.escape(text)} ", table, re.MULTILINE
        )


def test_the_first_violation_of_each_answer_is_marked(tmp_path):
    rows = [
        sample(id="repeated", completion='{"ranking": [2, 2]}'),
        sample(id="cut", completion='{"ranking": [2,', reason="truncated"),
        sample(id="short", completion='{"ranking": [2, 1]', reason="not_json"),
        sample(id="good", completion='{"ranking": [2, 1]}', reason=None, ranking=[2, 1]),
    ]
    write_run(tmp_path, samples=rows)
    text = page_of(tmp_path / "run").read_text()
    quoted = "{&#34;ranking&#34;: [2, "
    assert f"<pre>{quoted}<mark>2</mark>]}}</pre>" in text
    assert "[2,<mark>⏏ cut off</mark></pre>" in text
    assert f"{quoted}1]<mark>⏏ ends here</mark></pre>" in text
    assert f"<pre>{quoted}1]}}</pre>" in text
    assert text.count("<mark>") == 3


def test_an_unfinished_run_has_a_page_too(tmp_path):
    write_run(tmp_path, steps=2, finished=False)
    assert "not finished: 2 of 4 updates" in page_of(tmp_path / "run").read_text()


def test_a_run_that_has_logged_nothing_has_a_page_too(tmp_path):
    write_run(tmp_path, steps=0, finished=False)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "not finished: 0 of 4 updates" in page_of(tmp_path / "run").read_text()


def test_a_name_cannot_break_the_markdown_table(tmp_path):
    write_run(tmp_path, "a", data__path="x|y")
    write_run(tmp_path, "b", data__path="<b>z")
    write_page([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    table = (tmp_path / "page.md").read_text()
    assert "x\\|y" in table and "&lt;b>z" in table


def test_a_summary_without_its_parts_is_one_line(tmp_path):
    write_run(tmp_path)
    (tmp_path / "run" / "summary.json").write_text('{"student": {"parse_rate": 0.5}}')
    with pytest.raises(ListopdError, match="run: holds what no run writes: KeyError"):
        page_of(tmp_path / "run")


def test_points_lie_at_the_lambda_of_their_run_however_runs_are_grouped(tmp_path):
    for lam in (1.0, 2.0):
        write_run(tmp_path, f"r{lam}", lam=lam)
    by_form = grouped(tmp_path, ["extrapolation"])
    assert len(by_form) == 1
    assert [point.lam for point in points_of(by_form)] == [1.0, 2.0]
    assert {point.family for point in points_of(by_form)} == {"plain"}


def test_what_only_is_kept_or_measured_of_runs_does_not_part_them(tmp_path):
    write_run(tmp_path, "a", checkpoint__every=10, data__path="here")
    write_run(tmp_path, "b", evaluation__every=7, cliff__measure=True, data__path="there", seed=1)
    assert [group.values for group in grouped(tmp_path)] == [
        {"data.path": "here"},
        {"data.path": "there"},
    ]
    for name in ("a", "b"):
        (tmp_path / name / "inputs.json").write_text('{"data": "the same"}')
    (group,) = grouped(tmp_path)
    assert group.values == {}


def test_lambda_star_is_drawn_where_there_is_one_alone(tmp_path):
    for number, temperature in enumerate((1.0, 1.0, 0.5)):
        lam = 1 + 0.5 * number
        write_run(tmp_path / "runs", f"r{number}", lam=lam, scoring__temperature=temperature)
    runs = sorted((tmp_path / "runs").iterdir())
    title = "strict parse and NDCG@1 against λ"

    def drawn(paths):
        data = Page(write_page(paths, tmp_path / "page.html")).charts[title]["data"]
        return [trace["name"] for trace in data if "λ*" in trace.get("name", "")]

    assert drawn(runs[:2])[-1] == "λ* measured, c = 2: 1.300"
    assert drawn(runs) == []  # two teachers


def test_collapsed_runs_count_in_the_table_as_in_the_chart(tmp_path):
    write_run(tmp_path / "runs", "whole", seed=0)
    rows = write_run(tmp_path / "runs", "collapsed", seed=1, steps=2, finished=False)
    (group,) = grouped(tmp_path / "runs")
    assert group.finals("parse_rate")[1] == rows[-1]["contract/parse_rate"]
    write_page(sorted((tmp_path / "runs").iterdir()), tmp_path / "page.html")
    table = (tmp_path / "page.md").read_text()
    assert "2, 1 without an end" in table and "0.600 (1 of 2)" in table


def test_answers_stand_side_by_side_where_the_prompt_is_the_same_and_say_their_update(tmp_path):
    shown = [sample(prompt="PROMPT A"), sample(id="q2", prompt="PROMPT C")]
    write_run(tmp_path / "runs", "a", lam=1.0, samples=shown)
    other = [sample(prompt="PROMPT B"), sample(id="q2", prompt="PROMPT C", completion="OTHER")]
    write_run(tmp_path / "runs", "b", lam=1.5, steps=50, samples=other)
    page = write_page(sorted((tmp_path / "runs").iterdir()), tmp_path / "page.html").read_text()
    assert "PROMPT C" in page and "OTHER"[1:] in page
    assert "PROMPT A" not in page and "PROMPT B" not in page
    assert page.count("update 4<") == 2 and "update 50<" not in page


def test_a_few_groups_answer_side_by_side_whatever_they_differ_in(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs, "a", lam=1.0, samples=[sample()])
    write_run(runs, "b", lam=1.5, samples=[sample()])
    write_run(runs, "c", lam=2.0, extrapolation="bounded", samples=[sample()])
    page = write_page(sorted(runs.iterdir()), tmp_path / "page.html").read_text()
    assert page.count("update 4<") == 3
    assert "λ = 2, bounded</" in page


def test_pages_beside_runs_are_no_runs_and_other_markdown_is_left_alone(tmp_path):
    write_run(tmp_path, "a")
    (tmp_path / "demo.html").write_text("")
    (tmp_path / "notes.md").write_text("mine")
    assert [path.name for path in find_runs(sorted(tmp_path.iterdir()))] == ["a"]
    with pytest.raises(ListopdError, match=r"notes\.md: exists"):
        write_page([tmp_path / "a"], tmp_path / "notes.html")
    assert (tmp_path / "notes.md").read_text() == "mine"
    write_page([tmp_path / "a"], tmp_path / "page.html")
    write_page([tmp_path / "a"], tmp_path / "page.html")  # its own it may replace
