"""Table and figures of a study, from its trials' rows and verdict alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import rich
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.markdown import Markdown

from listopd_ray.cliff.verdict import ENOUGH_PARSED
from listopd_ray.task.contract import REASONS
from listopd_ray.tracking import replace_file

matplotlib.rcParams["svg.hashsalt"] = "listopd"  # the same figure is the same file
# Okabe and Ito's palette: told apart by colour-blind readers.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
REASON_COLOURS = dict(
    zip(REASONS, ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#999999"), strict=True)
)
KIND_COLOURS = {
    "apriori": ORANGE,
    "calibrated": GREEN,
    "budget": "#CC79A7",
    "budget_first_id": "#8C6D31",
    "budget_escape": "#7F3C8D",
    "escape": "#D55E00",
    "first_id": "#56B4E9",
}
METHOD_STYLES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), ("#CC79A7", "D"), ("#56B4E9", "v"))
BASELINE_LINES: tuple[Any, ...] = ("--", "-.", ":", (0, (5, 1)))
COMPARED = {
    "parse_rate": "strict parse",
    "ndcg_at_1": "NDCG@1 of parsed",
    "ndcg_at_k_all": "NDCG@K, unparsed 0",
    "mean_lam": "mean working λ",
    "seconds": "seconds",
}


def write_report(
    directory: Path,
    verdict: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    compare: Sequence[str] = (),
) -> None:
    """`verdict.json`, `study.md` and one figure a curve into `directory`; the tests on screen.

    The curves of `compare` come side by side, with the baselines, and in `compare.svg`.
    """
    replace_file(directory / "verdict.json", json.dumps(verdict, indent=2) + "\n")
    curves = {row["curve"]: [r for r in rows if r["curve"] == row["curve"]] for row in rows}
    baselines = {name: curve for name, curve in curves.items() if curve[0]["lam"] is None}
    compared = {name: curves[name] for name in compare if name in curves}
    predictions = tests_table(verdict)
    parts = ["## Predictions\n", predictions, "## What they rest on\n", scope_table(verdict)]
    if compared:
        parts += ["## Methods\n", comparison(compared, baselines)]
        draw_comparison(directory / "compare.svg", compared, baselines)
    parts.append("## Curves\n")
    parts += [
        curve_table(name, curve, verdict) for name, curve in curves.items() if name not in baselines
    ]
    replace_file(directory / "study.md", "\n".join(parts))
    for name, curve in curves.items():
        if name in verdict["curves"]:
            tests = [t for t in verdict["tests"] if t["name"].rsplit(" ", 1)[0] == name]
            draw_curve(directory / f"{name}.svg", name, curve, verdict["curves"][name], tests)
    rich.print(Markdown(predictions))


def tests_table(verdict: Mapping[str, Any]) -> str:
    lines = [
        "| prediction | c | updates | predicted λ | measured onset | inside |",
        "|---|---|---|---|---|---|",
    ]
    for test in verdict["tests"]:
        predicted = _between(test["predicted_low"], test["predicted_high"])
        point = "–" if test["predicted"] is None else f"{test['predicted']:.3f} {predicted}"
        inside = {True: "yes", False: "**no**", None: test.get("why", "")}[test["inside"]]
        lines.append(
            f"| {test['name']} | {test['clip']:g} | {test['num_steps']} | {point} | "
            f"{_onset(test['measured_low'], test['measured_high'])} | {inside} |"
        )
    return "\n".join(lines) + "\n"


def scope_table(verdict: Mapping[str, Any]) -> str:
    """What every a-priori prediction rests on (masses, strict parse), and where it bows out.

    The masses are the scoring teacher's; its strict parse is that of the teacher before
    `scoring.temperature`, `id_temperature` and `uniform_share`.
    """
    lines = [
        "| curve | p | b | warm start | teacher as it is | λ* | onset | inside | out of scope |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for test in verdict["tests"]:
        if test["kind"] != "apriori":
            continue
        keys = ("teacher_mass", "base_mass", "warm_start_parse_rate", "teacher_parse_rate")
        numbers = ["–" if test[key] is None else f"{test[key]:.3f}" for key in keys]
        predicted = "–" if test["predicted"] is None else f"{test['predicted']:.3f}"
        onset = _onset(test["measured_low"], test["measured_high"])
        inside = {True: "yes", False: "**no**", None: "–"}[test["inside"]]
        name, reasons = test["name"].removesuffix(" apriori"), "; ".join(test["out_of_scope"])
        lines.append(_table_row(name, (*numbers, predicted, onset, inside, reasons)))
    return "\n".join(lines) + "\n"


def comparison(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    baselines: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """Method against λ, one table a metric; then the baselines."""
    lams = sorted({row["lam"] for rows in curves.values() for row in rows})
    tables = []
    for key, title in COMPARED.items():
        lines = [
            _table_row(title, (f"λ = {lam:g}" for lam in lams)),
            "|---" * (1 + len(lams)) + "|",
        ]
        for name, rows in curves.items():
            at = _by_lam(rows)
            lines.append(_table_row(name, (_mean(at.get(lam, []), key) for lam in lams)))
        tables.append("\n".join(lines) + "\n")
    if baselines:
        lines = [_table_row("baseline", COMPARED.values()), "|---" * (1 + len(COMPARED)) + "|"]
        for name, rows in baselines.items():
            lines.append(_table_row(name, (_mean(rows, key) for key in COMPARED)))
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def draw_comparison(
    file: Path,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    baselines: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Strict parse, and NDCG@K with unparsed as zero, of every method against λ."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.8), sharex=True, layout="constrained")
    keys = ("parse_rate", "ndcg_at_k_all")
    for axis, key in zip(axes, keys, strict=True):
        for (name, rows), (colour, marker) in zip(curves.items(), cycle(METHOD_STYLES)):
            at = {lam: _values(trials, key) for lam, trials in _by_lam(rows).items()}
            means = [fmean(values) for values in at.values()]
            axis.plot(list(at), means, f"-{marker}", color=colour, label=name, lw=1.6, ms=5)
            points = [(lam, value) for lam, values in at.items() for value in values]
            axis.plot(*zip(*points, strict=True), marker, color=colour, alpha=0.25, ms=4, ls="none")
        for (name, rows), dashes in zip(baselines.items(), cycle(BASELINE_LINES)):
            axis.axhline(fmean(_values(rows, key)), color="#777777", lw=1.2, ls=dashes, label=name)
        axis.set(ylim=(-0.03, 1.03), xlabel="λ", title=COMPARED[key])
    _save(figure, file, legend_of=axes[0], ncols=4)


def curve_table(name: str, rows: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any]) -> str:
    """λ by λ: means over seeds with the seeds' range, and why outputs fail."""
    lines = [f"### {name}", ""]
    onset = verdict["curves"].get(name)
    if onset:
        own = ", ".join(_onset(*edges) for edges in onset["onset_by_seed"].values())
        interval = _between(*onset["onset_interval"]) or "beyond the grid"
        lines += [
            f"Floor {onset['floor']:.3f}; onset {_onset(onset['low'], onset['high'])}; of the "
            f"seeds {own}; bootstrap of its upper edge {interval}.",
            "",
        ]
    lines += [
        "| λ | strict parse | NDCG@1 of parsed | NDCG@K, unparsed 0 | failures by reason | s |",
        "|---|---|---|---|---|---|",
    ]
    for lam, at in _by_lam(rows).items():
        reasons = failures(at)
        listed = ", ".join(f"{reason} {share:.2f}" for reason, share in reasons.items() if share)
        cells = [_mean(at, key) for key in ("parse_rate", "ndcg_at_1", "ndcg_at_k_all")]
        seconds, worked = (fmean(_values(at, key)) for key in ("seconds", "mean_lam"))
        shown = f"{lam:g}" + (f" (mean {worked:.3f})" if abs(worked - lam) > 1e-9 else "")
        lines.append(f"| {shown} | {' | '.join(cells)} | {listed} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def failures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of all outputs that fail for each reason."""
    outputs = sum(row["num_prompts"] for row in rows)
    return {reason: sum(row["reasons"][reason] for row in rows) / outputs for reason in REASONS}


def draw_curve(
    file: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    onset: Mapping[str, Any],
    tests: Sequence[Mapping[str, Any]],
) -> None:
    """Strict parse and NDCG@1 of parsed against λ, predictions as bands; failures below."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.2, 5.6), sharex=True, height_ratios=(3, 1.4), layout="constrained"
    )
    lams, trials = onset["lams"], _by_lam(rows)
    for key, label, colour, marker in (
        ("parse_rate", "strict parse", BLUE, "o"),
        ("ndcg_at_1", "NDCG@1 of parsed", "#333333", "s"),
    ):
        at = {lam: values for lam in lams if (values := _values(trials[lam], key))}
        if not at:
            continue
        points = [(lam, value) for lam, values in at.items() for value in values]
        top.plot(*zip(*points, strict=True), marker, color=colour, alpha=0.35, ms=4, ls="none")
        line = [(lam, fmean(values)) for lam, values in at.items()]
        top.plot(*zip(*line, strict=True), "-", color=colour, label=label, lw=1.6)
    top.axhline(onset["floor"], color="#999999", lw=0.8, ls=":", label="floor")
    if onset["high"] is not None:
        top.axvspan(onset["low"], onset["high"], color="#000000", alpha=0.07, label="onset")
    for test in tests:
        if test["predicted"] is None:
            continue
        kind, colour = test["kind"], KIND_COLOURS[test["kind"]]
        low, high = test["predicted_low"], test["predicted_high"]
        if low is not None and high is not None:
            top.axvspan(low, high, color=colour, alpha=0.18, lw=0)
        top.axvline(test["predicted"], color=colour, ls="--", lw=1.4, label=f"predicted: {kind}")
    title = f"{name}: c = {onset['clip']:g}, {onset['num_steps']} updates"
    top.set(ylim=(-0.03, 1.03), ylabel="mean over seeds", title=title)
    top.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    shares = [failures(trials[lam]) for lam in lams]
    width = 0.6 * min((b - a for a, b in pairwise(lams)), default=0.1)
    base = [0.0] * len(lams)
    for reason in REASONS:
        heights = [share[reason] for share in shares]
        if any(heights):
            bottom.bar(lams, heights, width, base, color=REASON_COLOURS[reason], label=reason, lw=0)
        base = [below + height for below, height in zip(base, heights, strict=True)]
    bottom.set(ylim=(0, 1), xlabel="λ", ylabel="failures")
    _save(figure, file, legend_of=bottom, ncols=5)


def _save(figure: Figure, file: Path, *, legend_of: Axes, ncols: int) -> None:
    """Write and close `figure`, with the legend of one of its axes below all."""
    figure.legend(
        *legend_of.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=ncols,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _table_row(first: str, cells: Iterable[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


def _by_lam(rows: Sequence[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
    """Trials by λ, which rises."""
    lams = sorted({row["lam"] for row in rows})
    return {lam: [row for row in rows if row["lam"] == lam] for lam in lams}


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Of the trials that count: NDCG of parsed outputs means nothing where a handful parse."""
    counted = [r for r in rows if key != "ndcg_at_1" or r["parse_rate"] >= ENOUGH_PARSED]
    return [row[key] for row in counted if row.get(key) is not None]


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """With the range over seeds; and how many they are where not all count."""
    values, digits = _values(rows, key), 0 if key == "seconds" else 3
    if not values:
        return "–"
    numbers = (fmean(values), min(values), max(values))
    text = "{} [{}, {}]".format(*(f"{number:.{digits}f}" for number in numbers))
    return text if len(values) == len(rows) else f"{text}, {len(values)} of {len(rows)}"


def _onset(low: float, high: float | None) -> str:
    return f"> {low:g}" if high is None or math.isinf(high) else f"({low:g}, {high:g}]"


def _between(low: float | None, high: float | None) -> str:
    edges = ("∞" if edge is None else f"{edge:.3f}" for edge in (low, high))
    return "" if low is None and high is None else "[{}, {}]".format(*edges)
