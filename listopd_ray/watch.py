"""`listopd watch`: a run, a study or a search while it runs, seen from its directory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from listopd_ray.following import JobView, RunView, open_view
from listopd_ray.job_config import StudyConfig, WatchConfig
from listopd_ray.tracking import STAGES
from listopd_ray.types import ListopdError

COLOURS = {
    "running": "green",
    "silent": "yellow",
    "interrupted": "red",
    "stopped": "cyan",
    "finished": "blue",
}
BLOCKS = "▁▂▃▄▅▆▇█"
OTHER_LINES = 9  # of a job's view, around the rows of its trials


def watch(
    run: str,
    config: WatchConfig,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show `run` (a directory) until it is finished: on a terminal kept up to date, elsewhere a
    line a change."""
    if not 0 < config.every_s < math.inf:
        raise ListopdError("every_s: must be finite and > 0")
    view = open_view(Path(run), clock)
    console = Console()
    if config.once:
        view.look()
        console.print(render(view))
        return
    if not sys.stdout.isatty():
        return _watch_lines(view, config.every_s, sleep)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            view.look()
            live.update(render(view, console.height), refresh=True)
            if view.state == "finished":
                return
            sleep(config.every_s)


def _watch_lines(view: RunView | JobView, every_s: float, sleep: Callable[[float], None]) -> None:
    before: dict[str, Any] = {}
    while True:
        view.look()
        now = _marks(view)
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            # Trials that were there before are not news.
            news = [f"{name} {now[name]}; " for name in changed if name and before]
            print("".join(news) + summary_line(view), flush=True)
        if view.state == "finished":
            return
        before = now
        sleep(every_s)


def _marks(view: RunView | JobView) -> dict[str, Any]:
    """What makes a line where it differs; of a job, by trial."""
    if isinstance(view, JobView):
        return {"": view.state, **view.states}
    return {"": (view.step, view.state, view.evaluated, view.restarts, len(view.events))}


def summary_line(view: RunView | JobView) -> str:
    name = view.directory.resolve().name
    if isinstance(view, JobView):
        return f"{name}: {state_text(view)}, {_counts(view)}{_left(view)}"
    parse = f", parse {view.parse[-1]:.2f}" if view.parse else ""
    if view.evaluated is not None:
        parse += f", held-out {view.metrics['eval/parse_rate']:.3f}"
    alarm = f", alarm at update {view.events[-1].get('step')}" if view.events else ""
    where = f"update {view.step}/{view.config.num_steps}"
    return f"{name}: {state_text(view)}, {where}{parse}{_left(view)}{alarm}"


def state_text(view: RunView | JobView) -> str:
    if isinstance(view, JobView) or view.state not in ("silent", "interrupted"):
        return view.state
    return f"{view.state}: no update for {span(view.quiet_s)}"


def span(seconds: float) -> str:
    """Roughly: 40 s, 4 min, 3.2 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def sparkline(rates: list[float]) -> str:
    """One character each; an eighth of [0, 1] a height."""
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(rate * len(BLOCKS)))] for rate in rates)


def render(view: RunView | JobView, height: int | None = None) -> RenderableType:
    """`height`: lines there are; None: as many as it takes."""
    return _render_job(view, height) if isinstance(view, JobView) else _render_run(view)


def _render_run(view: RunView) -> RenderableType:
    config = view.config
    samples = config.num_prompts * config.group_size
    form = f" bounded, δ = {config.delta:g}" if config.extrapolation == "bounded" else ""
    settings = f"λ = {config.lam}{form}, c = {config.clip:g}, seed {config.seed}"
    title = f"{settings}, {config.num_steps} updates of {samples} samples"
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    for label, text in (
        ("strict parse", _parse_text(view)),
        ("held-out", _evaluation_text(view)),
        ("reverse KL", _number(view, "kl/reverse", "{:.3f} nats")),
        ("λ", _lam_text(view)),
        ("sampling", _sampling_text(view)),
        ("stages", _stages_text(view)),
        ("restarts", ", ".join(f"{role} {count}" for role, count in view.restarts.items())),
        *(("alarm", _alarm_text(event)) for event in view.events[-3:]),
    ):
        if text:
            rows.add_row(label, Text(text))
    head = _head(view, title), _bar(view, view.step, config.num_steps, "update")
    return Group(*head, rows)


def _head(view: RunView | JobView, title: str) -> Text:
    name = (f"{view.directory.resolve().name}: ", "bold")
    return Text.assemble(name, (state_text(view), COLOURS[view.state]), f"\n{title}")


def _bar(view: RunView | JobView, done: int, total: int, unit: str) -> Table:
    line = Table.grid(padding=(0, 1))
    text = f"{unit} {done} of {total}, {tqdm.format_interval(view.elapsed_s)}{_left(view)}"
    line.add_row(ProgressBar(total=total, completed=done, width=30), text)
    return line


def _left(view: RunView | JobView) -> str:
    if view.state not in ("running", "silent") or view.left_s is None:
        return ""
    return f", {tqdm.format_interval(view.left_s)} left"


def _number(view: RunView, name: str, form: str) -> str:
    return form.format(view.metrics[name]) if name in view.metrics else ""


def _parse_text(view: RunView) -> str:
    return f"{view.parse[-1]:.3f}  {sparkline(list(view.parse)[-40:])}" if view.parse else ""


def _evaluation_text(view: RunView) -> str:
    if view.evaluated is None:
        return ""
    parts = [f"{view.metrics['eval/parse_rate']:.3f} at update {view.evaluated}"]
    for key, what in (("eval/ndcg_at_1", "NDCG@1"), ("eval/ndcg_at_k_all", "NDCG@K of all")):
        parts += [f"{what} {view.metrics[key]:.2f}"] if key in view.metrics else []
    return ", ".join(parts)


def _lam_text(view: RunView) -> str:
    text = _number(view, "train/lam", "{:.3g}")
    if text and "cliff/lambda_star" in view.metrics:
        text += _number(view, "cliff/lambda_star", ", λ* {:.3f}")
        text += _number(view, "cliff/headroom", ", headroom {:+.3f}")
    return text


def _sampling_text(view: RunView) -> str:
    parts = [
        _number(view, "perf/tokens_per_s", "{:.0f} tokens/s"),
        _number(view, "rollout/staleness", "staleness {:.1f}"),
    ]
    return ", ".join(filter(None, parts))


def _stages_text(view: RunView) -> str:
    parts = [_number(view, f"time/{stage}_s", f"{stage} {{:.2f}}") for stage in STAGES]
    return " · ".join(filter(None, parts)) + _number(view, "time/step_s", " of {:.2f} s")


def _alarm_text(event: dict[str, Any]) -> str:
    return f"update {event.get('step')}: {event.get('reason')}; {event.get('action')}"


def _render_job(view: JobView, height: int | None) -> RenderableType:
    config, states = view.config, view.states
    kind = "study" if isinstance(config, StudyConfig) else f"search ({config.search.algorithm})"
    title = f"{kind}, c = {config.clip:g}, {config.num_steps} updates"
    parts: list[RenderableType] = [_head(view, title)]
    if view.total is None:
        parts.append(Text(tqdm.format_interval(view.elapsed_s)))
    else:
        parts.append(_bar(view, view.done, view.total, "trial"))
    parts.append(Text(_counts(view)))
    if view.bracket is not None:
        high = "∞" if view.bracket.high is None else f"{view.bracket.high:g}"
        onset = f"onset in ({view.bracket.low:g}, {high}], {view.bracket.updates} updates spent"
        star = "" if view.predicted is None else f", predicted λ* {view.predicted:.3f}"
        parts.append(Text(onset + star))
    # Those under way first, then the others as they ended, the last ones first.
    order = list(COLOURS)
    names = sorted(states, key=lambda name: (order.index(states[name]), -view.ended(name)))
    room = len(names) if height is None else max(1, height - OTHER_LINES)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("trial", "", "update", "strict parse", "left"):
        is_number = column in ("update", "strict parse", "left")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    for name in names[:room]:
        table.add_row(name, Text(states[name], COLOURS[states[name]]), *_trial_cells(view, name))
    parts.append(table)
    if len(names) > room:
        parts.append(Text(f"and {len(names) - room} more"))
    return Group(*parts)


def _counts(view: JobView) -> str:
    counts = view.counts
    listed = ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state])
    return listed or "no trial yet"


def _trial_cells(view: JobView, name: str) -> tuple[str, str, str]:
    """Update, strict parse (held-out of a finished trial, else the rollouts'), time left."""
    if name in view.summaries:
        summary = view.summaries[name]
        return f"{summary['num_steps']}", f"{summary['parse_rate']:.3f}", ""
    trial = view.trials[name]
    parse = f"{trial.parse[-1]:.3f}" if trial.parse else ""
    is_running, left = view.states[name] == "running", trial.left_s
    shown = tqdm.format_interval(left) if is_running and left is not None else ""
    return f"{trial.step}/{trial.config.num_steps}", parse, shown
