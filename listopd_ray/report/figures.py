"""The charts of a report. Colours of text and grid are the page's: it has a light and a dark form.

`meta.group` of a trace is the group that it belongs to; `meta.axis` of a layout says that x counts
updates, which the page can exchange for generated tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from listopd_ray.report.groups import Group, late_mean, mean_curve, overall_mean
from listopd_ray.report.runs import BY_CLASS, CLASSES, RunData
from listopd_ray.search.judgement import closing, standing
from listopd_ray.tracking import STAGES

# Okabe and Ito's palette, told apart by colour-blind readers; no black and no yellow, which one of
# the two backgrounds would swallow.
PALETTE = ("#2484C6", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D31", "#999999")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")
STAR_STYLES = (("#D55E00", "dash"), ("#CC79A7", "dot"), ("#009E73", "dashdot"), ("#8C6D31", "dot"))
LEGEND_ABOVE = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
MAX_POINTS = 400  # of a curve
POINTS_OF_CHART = 16_000  # of all its curves
MOST_BARS = 16  # of groups; beyond them families
MOST_BANDS = 8  # groups whose spread is drawn

CURVES = {
    "contract/parse_rate": "strict parse of training samples",
    "eval/parse_rate": "strict parse, held out",
    "eval/ndcg_at_1": "NDCG@1 of parsed, held out",
    "eval/ndcg_at_k_all": "NDCG@K, unparsed 0, held out",
    "kl/reverse": "reverse KL to the teacher (nats a token)",
    "loss/clip_fraction": "share of tokens at the clip c",
    "loss/advantage": "mean advantage (nats)",
    "loss/grad_norm": "gradient norm before clipping",
    "cliff/drive": "drive, (λ − 1)/(λ* − 1)",
    "rollout/staleness": "staleness (updates)",
    "perf/tokens_per_s": "tokens a second",
}
CLASS_CHARTS = {
    "kl/reverse": "reverse KL (nats a token)",
    "cliff/tail_mass": "tail mass, 1 − q",
    "loss/clip_fraction": "share of tokens at the clip c",
}


def styles(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(colour, dash) of each group. A few are told apart by the palette; where they are many each
    family has the palette for itself, or a scale."""
    families: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        family = group.family if len(groups) > len(PALETTE) else ""
        families.setdefault(family, []).append(index)
    result = [("", "")] * len(groups)
    for members in families.values():
        if len(members) <= len(PALETTE):
            own = list(zip(PALETTE, cycle(DASHES)))
        else:
            scale = sample_colorscale("Cividis", list(np.linspace(0.2, 0.95, len(members))))
            own = [(colour, "solid") for colour in scale]
        for index, style in zip(members, own, strict=False):
            result[index] = style
    return result


def learning_curves(groups: Sequence[Group]) -> Iterator[tuple[str, go.Figure]]:
    """(title, chart) of every metric that some group has and that moves: means over seeds, with
    their range as a band where the groups are few."""
    points = max(40, min(MAX_POINTS, POINTS_OF_CHART // len(groups)))
    drawn_as = styles(groups)
    for metric, title in CURVES.items():
        figure, extent = go.Figure(), set[float]()
        for index, (group, (colour, dash)) in enumerate(zip(groups, drawn_as, strict=True)):
            steps, mean, low, high = mean_curve(group, metric)
            if not len(steps):
                continue
            extent |= {float(mean.min()), float(mean.max())}
            kept = thinned(len(steps), points)
            steps, mean, low, high = (values[kept] for values in (steps, mean, low, high))
            if len(group.runs) > 1 and len(groups) <= MOST_BANDS:
                figure.add_scatter(
                    x=[*steps.tolist(), *steps[::-1].tolist()],
                    y=np.concatenate([high, low[::-1]]),
                    fill="toself",
                    fillcolor=colour,
                    opacity=0.18,
                    line={"width": 0},
                    hoverinfo="skip",
                    meta={"group": index},
                )
            figure.add_scatter(
                x=steps.tolist(),
                y=mean,
                mode="lines+markers" if len(steps) < 12 else "lines",
                line={"color": colour, "width": 2, "dash": dash},
                name=plain(group.label),
                meta={"group": index, "metric": metric},
            )
        if len(extent) > 1 or (extent and extent != {0.0}):
            figure.update_layout(meta={"axis": "steps", "metric": metric}, xaxis_title="updates")
            if max(extent) <= 1 and min(extent) >= 0 and "norm" not in title:
                figure.update_yaxes(rangemode="tozero")
            yield title, figure


@dataclass(frozen=True)
class Point:
    """A run in a chart over λ."""

    family: str
    lam: float
    parse_rate: float
    ndcg_at_1: float | None
    about: str
    finished: bool = True


def points_of(groups: Sequence[Group]) -> list[Point]:
    """Of all runs whose λ is a number."""
    points = []
    for group in groups:
        family = group.family if "lam" in group.values else group.label
        for run in group.runs:
            parse_rate, lam = run.final("parse_rate"), run.config["lam"]
            if parse_rate is None or isinstance(lam, str):
                continue
            finished = run.summary is not None
            about = f"{run.name}, seed {run.config['seed']}"
            about += "" if finished else f": no end, after {run.num_updates} updates"
            ndcg = run.final("ndcg_at_1")
            points.append(Point(family, float(lam), parse_rate, ndcg, about, finished))
    return points


def against_lam(
    points: Sequence[Point],
    *,
    stars: Sequence[Mapping[str, Any]] = (),
    onset: tuple[float, float | None] | None = None,
) -> go.Figure:
    """Strict parse above NDCG@1 of parsed outputs, against λ: a line a family (means over seeds), a
    point a run, open where it has no end. `stars`: {label, value, low, high} of what was predicted;
    `onset`: as measured."""
    figure = go.Figure()
    families = list(dict.fromkeys(point.family for point in points))
    for family, colour, marker in zip(families, cycle(PALETTE), cycle(MARKERS)):
        own = [point for point in points if point.family == family]
        for metric, axis in (("parse_rate", "y"), ("ndcg_at_1", "y2")):
            pairs: list[tuple[Point, float]] = [
                (p, y) for p in own if (y := getattr(p, metric)) is not None
            ]
            lams = sorted({point.lam for point, _ in pairs})
            figure.add_scatter(
                x=lams,
                y=[fmean(y for point, y in pairs if point.lam == lam) for lam in lams],
                mode="lines",
                line={"color": colour, "width": 2},
                name=plain(family),
                legendgroup=family,
                showlegend=axis == "y" and len(families) > 1,
                hoverinfo="skip",
                yaxis=axis,
            )
            figure.add_scatter(
                x=[point.lam for point, _ in pairs],
                y=[y for _, y in pairs],
                text=[plain(point.about) for point, _ in pairs],
                hovertemplate="λ = %{x}: %{y:.3f}<br>%{text}<extra></extra>",
                mode="markers",
                marker={
                    "color": colour,
                    "size": 8,
                    "symbol": [f"{marker}{'' if p.finished else '-open'}" for p, _ in pairs],
                    "opacity": 0.75,
                },
                legendgroup=family,
                showlegend=False,
                yaxis=axis,
            )
    _mark_lam(figure, stars, onset)
    empty = all(point.ndcg_at_1 is None for point in points)
    figure.update_layout(
        xaxis={"title": "λ", "anchor": "y2"},
        yaxis={"title": "strict parse", "domain": [0.43, 1], "range": [-0.03, 1.03]},
        yaxis2={"title": "NDCG@1", "domain": [0, 0.36], "range": [0, 1] if empty else None},
        legend=LEGEND_ABOVE,
        height=460,
    )
    return figure


def _mark_lam(
    figure: go.Figure,
    stars: Sequence[Mapping[str, Any]],
    onset: tuple[float, float | None] | None,
) -> None:
    band = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "hoverinfo": "name"}
    if onset is not None and onset[1] is not None:
        low, high = onset[0], onset[1]
        figure.add_scatter(
            x=[low, high, high, low],
            y=[-1, -1, 2, 2],
            fillcolor="rgba(136,136,136,0.25)",
            name=f"onset ({low:g}, {high:g}]",
            **band,
        )
    for star, (colour, dash) in zip(stars, cycle(STAR_STYLES)):
        if star["value"] is None:
            continue
        name = f"{star['label']} {star['value']:.3f}"
        if None not in (low := star["low"], high := star["high"]):
            fill = f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.2)"
            figure.add_scatter(
                x=[low, high, high, low],
                y=[-1, -1, 2, 2],
                fillcolor=fill,
                legendgroup=name,
                showlegend=False,
                name=name,
                **band,
            )
        figure.add_scatter(
            x=[star["value"]] * 2,
            y=[-1, 2],
            mode="lines",
            line={"color": colour, "dash": dash, "width": 2},
            name=name,
            legendgroup=name,
            hoverinfo="name",
        )


def bracketing(outcome: Mapping[str, Any]) -> go.Figure:
    """A search's trials in the order they ended, and the bracket closing around what was
    predicted."""
    trials, star = outcome["trials"], outcome["prediction"]["lambda_star"]
    lows, highs = closing(outcome)
    figure = go.Figure()
    x = list(range(len(lows)))
    edge = {"mode": "lines", "line": {"width": 0, "shape": "hv"}, "hoverinfo": "skip"}
    figure.add_scatter(x=x, y=lows, showlegend=False, **edge)
    figure.add_scatter(
        x=x, y=highs, fill="tonexty", fillcolor="rgba(136,136,136,0.22)", name="bracket", **edge
    )
    groups: dict[str, tuple[str, str, list[tuple[int, Mapping[str, Any]]]]] = {
        "above the floor": (PALETTE[0], "circle", []),
        "below": (PALETTE[3], "diamond", []),
        "collapsed, stopped early": (PALETTE[3], "triangle-down-open", []),
    }
    for number, trial in enumerate(trials, start=1):
        groups[standing(trial, outcome["floor"])][2].append((number, trial))
    for label, (colour, symbol, points) in groups.items():
        figure.add_scatter(
            x=[number for number, _ in points],
            y=[trial["lam"] for _, trial in points],
            text=[
                f"seed {t['seed']}: {t['parsed']:g} of {t['sampled']:g} parse" for _, t in points
            ],
            hovertemplate="trial %{x}, λ = %{y}<br>%{text}<extra></extra>",
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 9},
            name=label,
        )
    if star is not None:
        figure.add_hline(
            y=star,
            line={"color": "#D55E00", "dash": "dash", "width": 2},
            annotation={"text": f"λ* {star:.3f}"},
        )
    figure.update_layout(
        xaxis_title="trials in the order they ended",
        yaxis={"title": "λ", "range": [0.97, highs[0]]},
        legend=LEGEND_ABOVE,
    )
    return figure


def by_class(groups: Sequence[Group]) -> Iterator[tuple[str, go.Figure]]:
    """(title, chart) by token class: over the updates for one group, else the mean of the last
    tenth of the updates for each."""
    classes = list(zip(CLASSES, PALETTE, MARKERS, strict=False))
    for metric in BY_CLASS:
        figure = go.Figure()
        if len(groups) == 1:
            figure.update_layout(xaxis_title="updates")
            for token_class, colour, _ in classes:
                steps, mean, *_ = mean_curve(groups[0], f"{metric}_{token_class}")
                kept = thinned(len(steps), MAX_POINTS)
                if len(steps):
                    line = {"color": colour, "width": 2}
                    x, name = steps[kept].tolist(), token_class.replace("_", " ")
                    figure.add_scatter(x=x, y=mean[kept], name=name, mode="lines", line=line)
        else:
            first_of = {group.family: index for index, group in reversed([*enumerate(groups)])}
            for family, index in sorted(first_of.items(), key=lambda pair: pair[1]):
                own = [group for group in groups if group.family == family]
                for token_class, colour, marker in classes:
                    means = [(g, late_mean(g, f"{metric}_{token_class}")) for g in own]
                    known = [(plain(g.short_label), y) for g, y in means if y is not None]
                    figure.add_scatter(
                        x=[label for label, _ in known],
                        y=[y for _, y in known],
                        mode="lines+markers",
                        line={"color": colour, "width": 1},
                        marker={"symbol": marker, "size": 8},
                        name=token_class.replace("_", " "),
                        meta={"family": index},
                    )
            figure.update_xaxes(type="category")
        if any(len(trace.x) for trace in figure.data):
            figure.update_layout(legend=LEGEND_ABOVE, meta={"metric": f"{metric}_<class>"})
            figure.update_yaxes(rangemode="tozero")
            yield CLASS_CHARTS[metric], figure


def thinned(count: int, points: int) -> np.ndarray:
    """Indices of so many of `count` entries at most, the ends among them."""
    return np.unique(np.linspace(0, count - 1, min(points, max(count, 1))).round().astype(int))


def stage_seconds(groups: Sequence[Group]) -> go.Figure:
    """Seconds of an update by stage, a bar a group, or a family where the groups are many. Stages
    that overlap take more than the update in all; what none of them explains is `other`."""
    bars: dict[str, list[RunData]] = {}
    for group in groups:
        by_family = len(groups) > MOST_BARS and group.family
        bars.setdefault(plain(group.family if by_family else group.label), []).extend(group.runs)
    figure, labels, runs = go.Figure(), [*bars][::-1], list(bars.values())
    means = {stage: [overall_mean(r, f"time/{stage}_s") or 0.0 for r in runs] for stage in STAGES}
    whole = [overall_mean(r, "time/step_s") or 0.0 for r in runs]
    means["other"] = [
        max(0.0, total - sum(parts)) for total, *parts in zip(whole, *means.values(), strict=True)
    ]
    for (stage, seconds), colour in zip(means.items(), (*PALETTE[:4], PALETTE[-1]), strict=True):
        figure.add_bar(
            x=seconds[::-1],
            y=labels,
            orientation="h",
            name=stage,
            marker={"color": colour},
            hovertemplate="%{y}: " + stage + " %{x:.3f} s<extra></extra>",
        )
    figure.update_layout(
        barmode="stack",
        xaxis_title="seconds an update, mean",
        yaxis={"automargin": True},
        legend=LEGEND_ABOVE | {"traceorder": "normal"},
        height=130 + 24 * len(bars),
    )
    return figure


def histograms(inspection: Mapping[str, Any]) -> Iterator[tuple[str, go.Figure]]:
    """(title, chart) of importance ratio and staleness in one update."""
    titles = {
        "loss/importance_ratio": "importance ratio π_θ/μ of tokens",
        "rollout/staleness": "staleness of samples (updates)",
    }
    for name, title in titles.items():
        histogram = inspection.get("histograms", {}).get(name)
        if not histogram:
            continue
        edges = np.array(histogram["edges"])
        logarithmic = name == "loss/importance_ratio"
        centres = np.sqrt(edges[1:] * edges[:-1]) if logarithmic else (edges[1:] + edges[:-1]) / 2
        figure = go.Figure()
        figure.add_bar(
            x=centres.tolist(),
            y=histogram["counts"],
            width=np.diff(edges).tolist(),
            marker={"color": PALETTE[0]},
            hovertemplate="%{x:.2f}: %{y}<extra></extra>",
        )
        axis: dict[str, Any] = {"title": title.split(" of ")[0]}
        if logarithmic:
            axis |= {"type": "log", "tickvals": [0.25, 0.5, 1, 2, 4]}
            axis["range"] = [math.log10(0.24), math.log10(4.2)]
        else:
            axis |= {"dtick": 1, "range": [-0.6, max(1, len(centres) - 1) + 0.6]}
        figure.update_layout(xaxis=axis, yaxis_title="count")
        yield title, figure


def plain(text: str) -> str:
    """Plotly takes some tags and links in labels for markup: names of others must not be."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
