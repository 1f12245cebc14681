"""What a search shows: a live table, bracket.json and the figure."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import rich
from rich.live import Live
from rich.table import Table
from tqdm import tqdm

from listopd_ray import __version__
from listopd_ray.cliff.verdict import CRITERION, judge
from listopd_ray.job_config import SearchConfig
from listopd_ray.search.bracket import Bracket
from listopd_ray.search.judgement import Outcome, closing, rate, standing
from listopd_ray.search.tuning import AGAIN, PARSE_RATE
from listopd_ray.study_report import BLUE, ORANGE

RED = "#D55E00"


class Display:
    """The search while it runs: on a terminal a table that is kept up to date, elsewhere a line a
    trial. Use as a context manager."""

    def __init__(
        self, bracket: Bracket, prediction: Mapping[str, Any], config: SearchConfig
    ) -> None:
        self._bracket = bracket
        self._config = config
        self._star = prediction["lambda_star"]
        self._begun = time.monotonic()
        self._running: dict[tuple[float, int], str] = {}  # (λ, seed) → how far
        self._first: dict[tuple[float, int], tuple[float, int]] = {}  # → (time, update) first seen
        self._live = Live(get_renderable=self._table, refresh_per_second=2, transient=True)
        self.last_error = ""

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._live.stop()
        rich.print(self._table())

    def show(self, event: str, result: Mapping[str, Any]) -> None:
        """What `GiveBack` sees of a trial."""
        lam, seed = key = result["config"]["lam"], result["config"]["seed"]
        name = f"λ = {lam:g}, seed {seed}"
        if event == "result":
            step, total = result["train/step"], self._config.num_steps
            if AGAIN in result:  # of another sitting, and there at once
                self._first.pop(key, None)
            since, first = self._first.setdefault(key, (time.monotonic(), step))
            text = f"{seed}: {step}/{total}, {result.get(PARSE_RATE, 0):.2f}"
            if step > first:  # evaluations and checkpoints count
                left = (time.monotonic() - since) / (step - first) * (total - step)
                text += f", {tqdm.format_interval(left)}"
            self._running[key] = text
            return
        self._running.pop(key, None)
        self._first.pop(key, None)
        if event == "error":
            self.last_error = f"{name}: {result['error']}"
            print(f"{name}: failed: {result['error']}", file=sys.stderr)
        elif key not in self._bracket.outcomes:
            self.last_error = f"{name}: ended without counts"
            print(self.last_error, file=sys.stderr)
        elif not self._live.is_started:
            outcome = self._bracket.outcomes[key]
            print(f"{name}: {_outcome_text(outcome)}; {self._standing()}", flush=True)

    def _standing(self) -> str:
        high = "∞" if self._bracket.high is None else f"{self._bracket.high:g}"
        spent = self._bracket.updates
        minutes = (time.monotonic() - self._begun) / 60
        return f"({self._bracket.low:g}, {high}], {spent} updates, {minutes:.0f} min"

    def _table(self) -> Table:
        star = "–" if self._star is None else f"{self._star:.3f}"
        title = f"{self._config.name}: {self._standing()}, predicted λ* = {star}"
        table = Table(title=title)
        for column in ("λ", "seeds", "strict parse", "running (seed: update, parse, left)"):
            table.add_column(column, no_wrap=column != "running (seed: update, parse, left)")
        table.add_column("verdict", no_wrap=True)
        lams = {lam for lam, _ in (*self._bracket.outcomes, *self._running)}
        for lam in sorted(lams):
            seen = [o for (at, _), o in self._bracket.outcomes.items() if at == lam]
            mean = f"{fmean(map(rate, seen)):.3f}" if seen else ""
            running = "  ".join(text for (at, _), text in self._running.items() if at == lam)
            row = (f"{lam:g}", f"{len(seen)}", mean, running, self._verdict_text(lam))
            table.add_row(*row)
        return table

    def _verdict_text(self, lam: float) -> str:
        if lam == 1.0:
            floor = self._bracket.floor
            return "" if floor is None else f"floor {floor:.3f}"
        if lam not in self._bracket.asked:
            return "student"
        return verdict_text(self._bracket, lam)


def verdict_text(bracket: Bracket, lam: float) -> str:
    """ "holds", "breaks", "too close to call", or "" before anything is decided."""
    verdict = bracket.verdict(lam)
    if verdict is None:
        return ""
    if not bracket.is_clear(verdict):
        return "too close to call"
    return "holds" if verdict.holds else "breaks"


def _outcome_text(outcome: Outcome) -> str:
    if outcome.kind == "finished":
        return f"strict parse {rate(outcome):.3f}"
    return f"{outcome.kind} at update {outcome.step}"


def outcome_json(
    config: SearchConfig,
    bracket: Bracket,
    prediction: Mapping[str, Any],
    state: Mapping[str, Any],
) -> dict[str, Any]:
    """The object of bracket.json; `calibrate from=` reads `low`, `high`, `clip`, `num_steps`."""
    onset = {"low": bracket.low, "high": bracket.high}
    known = {"clip": config.clip, "num_steps": config.num_steps}
    keys = ("kind", "lambda_star", "lambda_star_low", "lambda_star_high")
    predicted = {key: prediction.get(key) for key in keys}
    test = judge("search", {**predicted, **known}, onset, config.search.resolution)
    masses = [k for k in ("binding_class", "teacher_mass", "base_mass") if prediction[k]]
    student = bracket.outcomes[bracket.recommended, bracket.student_seed]
    return {
        **onset,
        "confidence": bracket.confidence,
        "resolution": config.search.resolution,
        "floor": bracket.floor,
        **known,
        "samples_per_update": config.num_prompts * config.group_size,
        "seeds": config.search.seeds,
        "criterion": CRITERION,
        "prediction": predicted,
        "inside": test["inside"],
        "recommended": bracket.recommended,
        "student": {"seed": student.seed, "parse_rate": rate(student)},
        "updates": bracket.updates,
        "seconds": state["seconds"],
        "slots": state["slots"],
        **{key: prediction[key] for key in masses},
        "hashes": state["hashes"],
        "verdicts": [
            {"lam": lam, "verdict": verdict_text(bracket, lam), **_verdict_row(bracket, lam)}
            for lam in bracket.asked
        ],
        "trials": [
            {
                "lam": outcome.lam,
                "seed": outcome.seed,
                "verdict": outcome.kind,
                "budget": outcome.step,
                "updates": outcome.updates,
                "parsed": outcome.parsed,
                "sampled": outcome.sampled,
            }
            for outcome in bracket.outcomes.values()
        ],
        "version": __version__,
    }


def _verdict_row(bracket: Bracket, lam: float) -> dict[str, Any]:
    verdict = bracket.verdict(lam)
    assert verdict is not None  # the search is over
    return {"error": verdict.error, "num_seeds": verdict.num_seeds, "full_budget": verdict.full}


def draw_bracket(outcome: Mapping[str, Any], file: Path) -> None:
    """Trials in the order they ended, and the bracket closing around what was predicted."""
    trials, predicted = outcome["trials"], outcome["prediction"]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    lows, highs = closing(outcome)
    star, low, high = (predicted[f"lambda_star{end}"] for end in ("", "_low", "_high"))
    axes.fill_between(
        range(len(lows)),
        lows,
        highs,
        step="post",
        color="#000000",
        alpha=0.08,
        lw=0,
        label="bracket",
    )
    if star is not None:
        axes.axhline(star, color=ORANGE, ls="--", lw=1.4, label=f"λ*: {predicted['kind']}")
        if low is not None and high is not None:
            axes.axhspan(low, high, color=ORANGE, alpha=0.18, lw=0)
    groups: dict[str, tuple[str, str, list[tuple[int, float]]]] = {
        "above the floor": (BLUE, "o", []),
        "below": (RED, "o", []),
        "collapsed, stopped early": (RED, "v", []),
    }
    for number, trial in enumerate(trials, start=1):
        groups[standing(trial, outcome["floor"])][2].append((number, trial["lam"]))
    for label, (colour, marker, points) in groups.items():
        if points:
            axes.scatter(*zip(*points, strict=True), c=colour, marker=marker, s=26, label=label)
    axes.set(
        xlabel="trials in the order they ended",
        ylabel="λ",
        ylim=(0.97, highs[0]),
        title=f"c = {outcome['clip']:g}, {outcome['num_steps']} updates, one point a trial",
    )
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
