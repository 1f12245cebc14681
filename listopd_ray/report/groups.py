"""Runs that differ in nothing but the seed, and what the groups differ in."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from listopd_ray.report.runs import RunData, as_json
from listopd_ray.tracking import MAY_DIFFER
from listopd_ray.types import ListopdError

# Keys that say which run it is, or what is kept and measured of it, not what it learns.
APART = re.compile(
    r"^(name|out|cache|seed|prediction|demo_seeds|cliff\.measure|evaluation\.(every|num_samples))$"
    r"|^(checkpoint|faults)\."
)
# In labels; other keys where the value is not what most runs have.
ALWAYS_TOLD = ("lam", "clip", "extrapolation", "curve")
SYMBOLS = {"lam": "λ", "clip": "c", "delta": "δ", "ratio_clip": "ε"}


@dataclass(frozen=True, eq=False)
class Group:
    label: str  # "λ = 1.3, c = 2"; unique
    family: str  # the label without λ: what a curve over λ keeps; "" where no λ varies
    short_label: str  # unique within the family
    values: dict[str, Any]  # of the keys in which the groups differ
    runs: list[RunData]

    def finals(self, name: str) -> list[float]:
        """One a run that has the number."""
        return [value for run in self.runs if (value := run.final(name)) is not None]


@dataclass(frozen=True)
class Spread:
    """Of one number over seeds."""

    mean: float
    deviation: float  # the sample's standard deviation; NaN for one value
    count: int

    def text(self, digits: int, of: int = 1) -> str:
        """`of`: how many runs there are, which is said where not all have the number."""
        if self.count == 0:
            return "–"
        text = f"{self.mean:,.{digits}f}"
        text += f" ± {self.deviation:,.{digits}f}" if self.count > 1 else ""
        return text if self.count >= of else f"{text} ({self.count} of {of})"


def spread(values: Sequence[float]) -> Spread:
    if not values:
        return Spread(math.nan, math.nan, 0)
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), deviation, len(values))


def differing_keys(runs: Sequence[RunData]) -> list[str]:
    """Keys of the configuration that have several values, λ and c first."""
    first = runs[0].config
    keys = dict.fromkeys(key for run in runs for key in run.config)
    kept = [key for key in keys if not APART.search(key) and not MAY_DIFFER.search(key)]
    if len({run.inputs.get("data") for run in runs}) == 1 and "data" in runs[0].inputs:
        kept.remove("data.path")  # the same data, wherever it lies
    differ = [
        key
        for key in kept
        if any(as_json(run.config.get(key)) != as_json(first.get(key)) for run in runs)
    ]
    order = {key: index for index, key in enumerate(SYMBOLS)}
    return sorted(differ, key=lambda key: (order.get(key, len(order)), key))


def group_runs(runs: Sequence[RunData], keys: Sequence[str] = ()) -> list[Group]:
    """By the values of `keys`, which rise; raises ListopdError for a key that no run has. Without
    keys by all that differ: labels then leave out what most runs have."""
    asked, keys = bool(keys), keys or differing_keys(runs)
    for key in keys:
        if all(key not in run.config for run in runs):
            raise ListopdError(f"group: '{key}' is no key of these runs")
    members: dict[tuple[str, ...], list[RunData]] = {}
    for run in runs:
        members.setdefault(tuple(as_json(run.config.get(key)) for key in keys), []).append(run)
    usual = {
        key: Counter(as_json(same[0].config.get(key)) for same in members.values()).most_common(1)
        for key in keys
        if not asked and key not in ALWAYS_TOLD
    }
    lams_of: dict[str, set[str]] = {}  # by family
    parts = []
    for same in members.values():
        values = {key: same[0].config.get(key) for key in keys}
        told = {k: v for k, v in values.items() if k not in usual or as_json(v) != usual[k][0][0]}
        family = label_of({key: value for key, value in told.items() if key != "lam"})
        lams_of.setdefault(family, set()).add(as_json(values.get("lam")))
        parts.append((values, told, family, same))
    family_count = len(lams_of)
    over_lam = any(len(lams) > 1 for lams in lams_of.values())
    groups = []
    for values, told, family, same in parts:
        same = sorted(same, key=lambda run: (run.config["seed"], str(run.directory)))
        alone = same[0].name if len(runs) == 1 else "all runs"
        label = label_of(told) or ("as most" if len(members) > 1 else alone)
        short = label_of({"lam": values["lam"]}) if over_lam else label
        if family_count > 1:
            family = family or "as most"
        groups.append(Group(label, family if over_lam else "", short, values, same))
    return sorted(groups, key=lambda group: [_order(group.values[key]) for key in reversed(keys)])


def largest_family(groups: Sequence[Group]) -> str:
    """That of the most groups, the first of several."""
    return Counter(group.family for group in groups).most_common(1)[0][0]


def label_of(values: dict[str, Any]) -> str:
    parts = []
    for key, value in values.items():
        shown = as_json(value)
        if key in ("extrapolation", "curve"):
            parts.append(shown)
        elif key in SYMBOLS:
            parts.append(f"{SYMBOLS[key]} = {shown}")
        else:
            parts.append(f"{key}={shown}")
    return ", ".join(parts)


def mean_curve(group: Group, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, smallest, largest) [n] over the group's runs that have reached a step."""
    runs = [(run.columns["train/step"], run.columns[metric]) for run in group.runs]
    known = [(s[~np.isnan(v)].astype(int), v[~np.isnan(v)]) for s, v in runs]
    steps = np.unique(np.concatenate([s for s, _ in known]))
    if not len(steps):
        return steps, np.empty(0), np.empty(0), np.empty(0)
    table = np.full((len(known), len(steps)), np.nan)
    for row, (own, values) in zip(table, known, strict=True):
        row[np.searchsorted(steps, own)] = values
    return steps, np.nanmean(table, axis=0), np.nanmin(table, axis=0), np.nanmax(table, axis=0)


def late_mean(group: Group, metric: str) -> float | None:
    """Over the last tenth of the updates (at least one) and the runs; None where nobody has it."""
    means = []
    for run in group.runs:
        values = run.columns[metric]
        late = values[run.columns["train/step"] > 0.9 * run.num_updates + 1e-9]
        late = late[~np.isnan(late)]
        if len(late):
            means.append(float(late.mean()))
    return statistics.fmean(means) if means else None


def overall_mean(runs: Sequence[RunData], metric: str) -> float | None:
    """Over all updates of all runs."""
    values = np.concatenate([run.columns[metric] for run in runs])
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float)
    text = "" if value == "plain" else as_json(value)  # the form that others are held against
    return not is_number, float(value) if is_number else 0.0, text
