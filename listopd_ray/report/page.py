"""`listopd report` and `listopd compare`: one HTML page that needs nothing else, and a Markdown
table beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from listopd_ray import __version__
from listopd_ray.cliff.verdict import ENOUGH_PARSED
from listopd_ray.config import load_config
from listopd_ray.job_config import CompareConfig, ReportConfig, StudyConfig
from listopd_ray.report import REPORT, figures
from listopd_ray.report.figures import Point, against_lam, points_of, styles, thinned
from listopd_ray.report.groups import (
    SYMBOLS,
    Group,
    group_runs,
    label_of,
    largest_family,
    mean_curve,
    spread,
)
from listopd_ray.report.runs import RunData, as_json, find_runs, json_or_none, read_runs
from listopd_ray.task.contract import first_violation
from listopd_ray.tracking import read_jsonl, replace_file
from listopd_ray.types import ListopdError

RESULTS = {  # of a run's final numbers
    "parse_rate": "strict parse",
    "ndcg_at_1": "NDCG@1 of parsed",
    "ndcg_at_k_all": "NDCG@K, unparsed 0",
    "lambda_star": "λ* at update 1",
    "lam_over_lambda_star": "λ/λ*",
    "tokens": "tokens",
    "seconds": "seconds",
}
WHOLE = ("tokens", "seconds")  # shown without decimals
EVALUATIONS = {
    "parse_rate": "strict parse",
    "ndcg_at_1": "NDCG@1 of parsed",
    "ndcg_at_k": "NDCG@K of parsed",
    "kendall_tau": "Kendall τ of parsed",
    "ndcg_at_k_all": "NDCG@K, unparsed 0",
}
MOST_SAMPLES = 6  # prompts shown
MOST_SIDES = 4  # groups whose completions stand side by side


def compare_command(paths: list[str], config: CompareConfig) -> None:
    keys = [key.strip() for key in config.group.split(",") if key.strip()]
    out = write_page([Path(path) for path in paths], Path(config.out), keys)
    print(f"table: {out.with_suffix('.md')}")
    print_link(out)


def report_command(path: str, config: ReportConfig) -> None:
    print_link(write_page([Path(path)], Path(config.out or Path(path, REPORT))))


def print_link(page: Path) -> None:
    """As terminals make it one."""
    print(f"report: {page.absolute().as_uri()}")


def write_page(paths: Sequence[Path], out: Path, keys: Sequence[str] = ()) -> Path:
    """The page `out` of all runs among `paths`, and its table as Markdown; `keys`: those that make
    a group, none: every one in which runs differ but the seed.

    Raises ListopdError where a path holds no run, a file is not what a run writes, or `out` cannot
    be written.
    """
    directories, table = find_runs(paths), out.with_suffix(".md")
    if out.suffix != ".html":
        raise ListopdError(f"out: {out}: must end in .html")
    if not out.absolute().parent.is_dir():
        raise ListopdError(f"out: {out}: no directory {out.parent}")
    if table.exists() and not out.exists():
        raise ListopdError(f"out: {table}: exists, and is not the table of such a page")
    runs = read_runs(directories)
    try:
        content = _content(paths, runs, keys)
        page = _template().render(content)
    except (KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        names = ", ".join(map(str, paths))
        raise ListopdError(f"{names}: holds what no run writes: {error!r}") from None
    replace_file(out, page)
    replace_file(table, _markdown(content))
    return out


def _content(paths: Sequence[Path], runs: list[RunData], keys: Sequence[str]) -> dict[str, Any]:
    verdict = json_or_none(paths[0] / "verdict.json") if len(paths) == 1 else None
    if verdict and not keys:
        keys = ("lam", "curve")  # the plan of a study says in what its curves differ
        for run in runs:
            run.config["curve"] = run.name.rpartition("-lam")[0]
    groups = group_runs(runs, keys)
    names = [path.resolve().name for path in paths]
    alone = runs[0] if len(runs) == 1 else None
    inspection = alone.inspection if alone else None
    return {
        "title": names[0] if len(names) == 1 else f"{len(runs)} runs compared",
        "version": __version__,
        "headline": _headline(groups),
        "charts": list(_lam_charts(paths, groups, verdict)),
        "tests": _tests(verdict) if verdict else [],
        "curves_set": _curves(paths[0]) if verdict else {},
        "evaluations": _evaluations(alone.summary) if alone and alone.summary else [],
        "evaluation_columns": EVALUATIONS,
        "keys": list(groups[0].values),
        "symbols": SYMBOLS,
        "results": _results(groups),
        "result_columns": RESULTS,
        "digits": {name: 0 if name in WHOLE else 3 for name in RESULTS},
        "legend": _legend(groups),
        "axes": [_token_axis(group) for group in groups],
        "curves": [_chart(*pair) for pair in figures.learning_curves(groups)],
        "classes": [_chart(*pair) for pair in figures.by_class(groups)],
        "stages": _chart("seconds an update, by stage", figures.stage_seconds(groups)),
        "samples": _samples(groups),
        "taught": _taught(inspection) if inspection else [],
        "histograms": [_chart(*pair) for pair in figures.histograms(inspection or {})],
        "events": [(run.name, event) for run in runs for event in run.events],
        "runs": [_provenance(run) for run in runs],
        "config": alone.config if alone else {},
        "plotly": get_plotlyjs(),
    }


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = as_json
    return environment.get_template("page.html")


def _chart(title: str, figure: go.Figure) -> dict[str, Any]:
    """Title and the JSON that plotly.js takes; nothing in it can end the script it stands in."""
    figure.update_layout(template="none")
    text = figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e")
    metric = (figure.layout.meta or {}).get("metric", "")
    height = figure.layout.height or 300
    text = text.replace("&", "\\u0026")
    return {"title": title, "metric": metric, "json": text, "height": height}


def _headline(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    finished = [run for run in runs if run.summary is not None]
    if len(runs) == 1:
        run = runs[0]
        total = run.config["num_steps"]
        if run.summary is None:
            return f"not finished: {run.num_updates} of {total} updates"
        before, after = (run.summary[who]["parse_rate"] for who in ("warm_start", "student"))
        text = f"strict parse {before:.1%} → {after:.1%} in {total} updates"
        ratio = run.final("lam_over_lambda_star")
        return text + (f", at λ/λ* = {ratio:.2f}" if ratio else "")
    seeds = len({run.config["seed"] for run in runs})
    counted = f"{len(runs)} runs in {len(groups)} groups, {seeds} seed{'s' if seeds > 1 else ''}"
    open_ends = len(runs) - len(finished)
    return counted + (f"; {open_ends} not finished" if open_ends else "")


def _lam_charts(
    paths: Sequence[Path], groups: Sequence[Group], verdict: Mapping[str, Any] | None
) -> Iterator[dict[str, str]]:
    """Strict parse and NDCG@1 against λ, with λ* and what was measured: of the curves of a study,
    of a search, and of anything else that varies λ."""
    if verdict:
        yield from _study_charts(paths[0], verdict)
        return
    points = points_of(groups)
    if len({point.lam for point in points}) < 2:
        return
    if len(paths) == 1 and (outcome := json_or_none(paths[0] / "bracket.json")):
        predicted = outcome["prediction"]
        low, high = outcome["low"], outcome["high"]
        star = {
            "label": "λ* predicted",
            "value": predicted["lambda_star"],
            "low": predicted["lambda_star_low"],
            "high": predicted["lambda_star_high"],
        }
        onset = f"({low:g}, {'∞' if high is None else f'{high:g}'}]"
        inside = {True: "inside", False: "not inside", None: "not judged"}[outcome["inside"]]
        yield _chart(
            f"strict parse breaks in {onset}, c = {outcome['clip']:g}; predicted λ*: {inside}",
            against_lam(points, stars=[star], onset=(low, high)),
        )
        yield _chart("how the bracket closed", figures.bracketing(outcome))
        return
    measured: dict[float, dict[str, list[float]]] = {}  # by c, and by teacher
    for run in (run for group in groups for run in group.runs):
        teacher = [v for key, v in run.config.items() if key.startswith(("teacher.", "scoring."))]
        if value := run.final("lambda_star"):
            by_teacher = measured.setdefault(float(run.config["clip"]), {})
            by_teacher.setdefault(repr((teacher, run.inputs.get("teacher"))), []).append(value)
    stars = [
        {"label": f"λ* measured, c = {clip:g}:", "value": fmean(v), "low": min(v), "high": max(v)}
        for clip, by_teacher in sorted(measured.items())
        for v in by_teacher.values()
        if len(by_teacher) == 1  # several teachers have several λ*
    ]
    yield _chart("strict parse and NDCG@1 against λ", against_lam(points, stars=stars[:4]))


def _study_charts(directory: Path, verdict: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """A chart a curve, in the study's order."""
    rows = [row for row in read_jsonl(directory / "trials.jsonl") if row["lam"] is not None]
    for curve in dict.fromkeys(row["curve"] for row in rows):
        own = [row for row in rows if row["curve"] == curve]
        points = []
        for row in own:
            ndcg = row["ndcg_at_1"] if row["parse_rate"] >= ENOUGH_PARSED else None
            points.append(Point("", row["lam"], row["parse_rate"], ndcg, f"seed {row['seed']}"))
        tests = [t for t in verdict["tests"] if t["name"].rsplit(" ", 1)[0] == curve]
        stars = [
            {
                "label": f"predicted, {test['kind']}:",
                "value": test["predicted"],
                "low": test["predicted_low"],
                "high": test["predicted_high"],
            }
            for test in tests
        ]
        measured = verdict["curves"].get(curve)
        onset = (measured["low"], measured["high"]) if measured else None
        title = f"{curve}: c = {own[0]['clip']:g}, {own[0]['num_steps']} updates"
        yield _chart(title, against_lam(points, stars=stars[:4], onset=onset))


def _curves(directory: Path) -> dict[str, str]:
    """What the curves of a study set, by name."""
    curves = load_config(StudyConfig, [str(directory / "config.yaml")]).study.curves
    return {name: label_of(curve.set) or "as the rest" for name, curve in curves.items()}


def _tests(verdict: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of a study's predictions."""
    rows = []
    for test in verdict["tests"]:
        low, high = test["measured_low"], test["measured_high"]
        value = "–" if test["predicted"] is None else f"{test['predicted']:.3f}"
        if test["predicted_low"] is not None and test["predicted_high"] is not None:
            value += f" [{test['predicted_low']:.3f}, {test['predicted_high']:.3f}]"
        rows.append(
            {
                "prediction": test["name"],
                "inside": {True: "yes", False: "no", None: test.get("why", "–")}[test["inside"]],
                "predicted λ": value,
                "measured onset": f"> {low:g}" if high is None else f"({low:g}, {high:g}]",
                "c": f"{test['clip']:g}",
                "updates": str(test["num_steps"]),
            }
        )
    return rows


def _evaluations(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Warm start, teacher and student on the held-out prompts, sampled and greedy."""
    rows = []
    for who in ("warm_start", "teacher", "student"):
        for how, part in (("sampled", summary[who]), ("greedy", summary[who]["greedy"])):
            cells = [(part[name], part[f"{name}_interval"]) for name in EVALUATIONS]
            rows.append({"who": who.replace("_", " "), "how": how, "cells": cells})
    return rows


def _results(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A row a group: what differs, how many runs (and ends), and the numbers over the seeds."""
    rows = []
    for group in groups:
        count = len(group.runs)
        ended = sum(run.summary is not None for run in group.runs)
        rows.append(
            {
                "values": list(group.values.values()),
                "count": count,
                "runs": f"{count}"
                if ended == count
                else f"{count}, {count - ended} without an end",
                "numbers": {name: spread(group.finals(name)) for name in RESULTS},
            }
        )
    return rows


def _legend(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Families and their groups with colours; of many groups one family shows at first."""
    first = largest_family(groups) if len(groups) > figures.MOST_BANDS else None
    families: dict[str, list[dict[str, Any]]] = {}
    for index, (group, (colour, _)) in enumerate(zip(groups, styles(groups), strict=True)):
        on = first is None or group.family == first
        entry = {"index": index, "label": group.short_label, "colour": colour, "on": on}
        families.setdefault(group.family, []).append(entry)
    return [{"family": name, "groups": entries} for name, entries in families.items()]


def _token_axis(group: Group) -> dict[str, list[float]]:
    """Generated tokens (mean over runs) at a few updates, for the page to interpolate."""
    steps, tokens, *_ = mean_curve(group, "train/tokens")
    kept = thinned(len(steps), 60)
    return {"steps": steps[kept].tolist(), "tokens": tokens[kept].tolist()} if len(steps) else {}


def _samples(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The same held-out prompts answered by several groups, one run each: by all, or where they
    are many by some of the largest family."""
    able = [group for group in groups if any(run.samples for run in group.runs)]
    are_few = len(able) <= MOST_SIDES
    if not are_few:
        able = [group for group in able if group.family == largest_family(able)]
        able = [able[int(index)] for index in thinned(len(able), MOST_SIDES)]
    sides = [(group, next(run for run in group.runs if run.samples)) for group in able]
    by_id = [{(row["id"], row.get("prompt")): row for row in run.samples} for _, run in sides]
    common = [key for key in (by_id[0] if by_id else ()) if all(key in rows for rows in by_id)]
    return [
        {
            "id": key[0],
            "prompt": key[1],
            "answers": [
                {
                    "label": group.label if are_few else group.short_label,
                    "about": f"seed {run.config['seed']}, update {rows[key]['train/step']}",
                    **_marked(rows[key], run),
                }
                for (group, run), rows in zip(sides, by_id, strict=True)
            ],
        }
        for key in common[:MOST_SAMPLES]
    ]


def _marked(row: Mapping[str, Any], run: RunData) -> dict[str, Any]:
    """A completion in three parts: what keeps the contract, the character that breaks it first (or
    a sign of the end), and what follows."""
    text, reason = row["completion"], row["reason"]
    num_items = row.get("num_items")
    if num_items is None:  # of older runs
        lengths = [len(other["ranking"]) for other in run.samples if other["ranking"]]
        num_items = max(lengths, default=0)
    at = first_violation(text, num_items) if reason is not None and num_items else None
    if reason is not None and at is None:
        at = len(text)
    if at is None:
        return {"before": text, "mark": "", "after": "", "reason": None}
    mark = text[at] if at < len(text) else "⏏ cut off" if reason == "truncated" else "⏏ ends here"
    return {"before": text[:at], "mark": mark, "after": text[at + 1 :], "reason": reason}


def _taught(inspection: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Training samples with the advantage of every token, as a share of the largest."""
    rollouts = inspection["rollouts"]
    known = [abs(a) for row in rollouts for a in row["advantages"] if a is not None]
    largest = max(known, default=0.0) or 1.0
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "reason": row["reason"],
            "tokens": [
                {"text": text, "advantage": a, "share": abs(a or 0.0) / largest}
                for text, a in zip(row["tokens"], row["advantages"], strict=True)
            ],
        }
        for row in rollouts[:MOST_SAMPLES]
    ]


def _provenance(run: RunData) -> dict[str, Any]:
    summary = run.summary or {}
    return {
        "name": run.name,
        "path": str(run.directory),
        "seed": run.config["seed"],
        "updates": f"{run.num_updates} of {run.config['num_steps']}",
        "version": summary.get("version", "–"),
        "hashes": {name: str(v)[:12] for name, v in summary.get("hashes", {}).items()},
    }


def _markdown(context: Mapping[str, Any]) -> str:
    """The table of results, for a README or a pull request."""
    heads = [SYMBOLS.get(key, key) for key in context["keys"]]
    columns = [*heads, "runs", *RESULTS.values()]
    lines = [f"# {_text(context['title'])}", "", context["headline"], ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in context["results"]:
        digits, count = context["digits"], row["count"]
        numbers = [n.text(digits[name], count) for name, n in row["numbers"].items()]
        cells = [*map(as_json, row["values"]), row["runs"], *numbers]
        lines.append("| " + " | ".join(map(_text, cells)) + " |")
    if context["tests"]:
        columns = list(context["tests"][0])
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(map(_text, row.values())) + " |" for row in context["tests"]]
    return "\n".join([*lines, ""])


def _text(cell: str) -> str:
    """Markdown's table marks, and HTML, as plain characters."""
    return cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
