"""Table and figures of a study, from its trials' rows and verdict alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import rich
from rich.markdown import Markdown

from listopd_ray.cliff.verdict import ENOUGH_PARSED
from listopd_ray.task.contract import REASONS
from listopd_ray.tracking import replace_file

# Okabe and Ito's palette: told apart by colour-blind readers.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
REASON_COLOURS = dict(
    zip(REASONS, ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#999999"), strict=True)
)
KIND_COLOURS = {"apriori": ORANGE, "calibrated": GREEN, "budget": "#CC79A7", "escape": "#D55E00"}


def write_report(
    directory: Path, verdict: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """`verdict.json`, `study.md` and one figure a curve into `directory`; the tests on screen."""
    replace_file(directory / "verdict.json", json.dumps(verdict, indent=2) + "\n")
    curves = {row["curve"]: [r for r in rows if r["curve"] == row["curve"]] for row in rows}
    parts = [tests_table(verdict)]
    parts += [curve_table(name, curve, verdict) for name, curve in curves.items()]
    replace_file(directory / "study.md", "\n".join(parts))
    for name, curve in curves.items():
        if name in verdict["curves"]:
            tests = [t for t in verdict["tests"] if t["name"].rsplit(" ", 1)[0] == name]
            draw_curve(directory / f"{name}.svg", name, curve, verdict["curves"][name], tests)
    rich.print(Markdown(parts[0]))


def tests_table(verdict: Mapping[str, Any]) -> str:
    lines = [
        "| prediction | c | updates | predicted λ* | measured onset | inside |",
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


def curve_table(name: str, rows: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any]) -> str:
    """λ by λ: means over seeds with the seeds' range, and why outputs fail."""
    lines = [f"### {name}", ""]
    onset = verdict["curves"].get(name)
    if onset:
        own = ", ".join(_onset(*edges) for edges in onset["onset_by_seed"].values())
        lines += [
            f"Floor {onset['floor']:.3f}; onset {_onset(onset['low'], onset['high'])}; of the "
            f"seeds {own}; bootstrap {_between(*onset['onset_interval'])}.",
            "",
        ]
    lines += [
        "| λ | strict parse | NDCG@1 of parsed | NDCG@K, unparsed 0 | failures by reason | s |",
        "|---|---|---|---|---|---|",
    ]
    for lam in sorted({row["lam"] for row in rows}, key=lambda lam: lam or 0):
        at = [row for row in rows if row["lam"] == lam]
        reasons = failures(at)
        listed = ", ".join(f"{reason} {share:.2f}" for reason, share in reasons.items() if share)
        parsed = [row for row in at if row["parse_rate"] >= ENOUGH_PARSED]
        cells = [_mean(at, "parse_rate"), _mean(parsed, "ndcg_at_1"), _mean(at, "ndcg_at_k_all")]
        seconds = sum(row["seconds"] for row in at) / len(at)
        worked = sum(row.get("mean_lam") or 0 for row in at) / len(at)
        governed = lam is not None and abs(worked - lam) > 1e-9
        shown = "–" if lam is None else f"{lam:g}" + (f" (mean {worked:.3f})" if governed else "")
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
        2, 1, figsize=(6.4, 5.6), sharex=True, height_ratios=(3, 1.4), layout="constrained"
    )
    lams = onset["lams"]
    for key, label, colour, marker in (
        ("parse_rate", "strict parse", BLUE, "o"),
        ("ndcg_at_1", "NDCG@1 of parsed", "#333333", "s"),
    ):
        shown = [r for r in rows if key == "parse_rate" or r["parse_rate"] >= ENOUGH_PARSED]
        points = [(r["lam"], r[key]) for r in shown if r[key] is not None]
        if not points:
            continue
        top.plot(*zip(*points, strict=True), marker, color=colour, alpha=0.35, ms=4, ls="none")
        means = [(lam, [v for at, v in points if at == lam]) for lam in lams]
        line = [(lam, sum(values) / len(values)) for lam, values in means if values]
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
        top.axvline(test["predicted"], color=colour, ls="--", lw=1.4, label=f"λ* {kind}")
    top.set(ylim=(-0.03, 1.03), ylabel="mean over seeds", title=f"{name}: c = {rows[0]['clip']:g}")
    top.legend(frameon=False, fontsize=8, loc="best")
    shares = [failures([row for row in rows if row["lam"] == lam]) for lam in lams]
    width = 0.6 * min((b - a for a, b in pairwise(lams)), default=0.1)
    base = [0.0] * len(lams)
    for reason in REASONS:
        heights = [share[reason] for share in shares]
        if any(heights):
            bottom.bar(lams, heights, width, base, color=REASON_COLOURS[reason], label=reason, lw=0)
        base = [below + height for below, height in zip(base, heights, strict=True)]
    bottom.set(ylim=(0, 1), xlabel="λ", ylabel="failures")
    figure.legend(
        *bottom.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return "–"
    return f"{sum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def _onset(low: float, high: float | None) -> str:
    return f"> {low:g}" if high is None or math.isinf(high) else f"({low:g}, {high:g}]"


def _between(low: float | None, high: float | None) -> str:
    edges = ("∞" if edge is None else f"{edge:.3f}" for edge in (low, high))
    return "" if low is None and high is None else "[{}, {}]".format(*edges)
