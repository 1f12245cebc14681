"""The newest metrics of a run as gauges of Ray's own Prometheus endpoints."""

from __future__ import annotations

import string
import threading
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote

from listopd_ray.config import Config

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

# Ray gives a gauge away once, and drops it from the endpoint 20 s (two of its report intervals)
# later: whatever lasts has to be set again and again, and what has ended goes by itself.
REFRESH_S = 5.0

# metric → (gauge, what it says); Ray puts `ray_` before the name.
GAUGES = {
    "num_steps": ("listopd_num_steps", "Updates of the whole run"),
    "perf/tokens_per_s": ("listopd_tokens_per_second", "Sampled tokens over the turn's seconds"),
    "rollout/staleness": ("listopd_staleness", "Mean updates since the samples were drawn"),
    "contract/parse_rate": ("listopd_parse_rate", "Share of the rollouts that parse strictly"),
    "train/lam": ("listopd_lam", "Reward-extrapolation coefficient of this update"),
    "cliff/lambda_star": ("listopd_lambda_star", "Predicted threshold of the coefficient"),
    "kl/reverse": ("listopd_reverse_kl", "Mean log-ratio of student and teacher, in nats"),
    "time/queue_wait_s": ("listopd_queue_wait_seconds", "How long the rollouts lay waiting"),
    "time/generate_s": ("listopd_generate_seconds", "Sampling"),
    "time/score_s": ("listopd_score_seconds", "Scoring by teacher and base"),
    "time/learn_s": ("listopd_learn_seconds", "The learner's step"),
    "time/sync_s": ("listopd_sync_seconds", "New weights into every rollout worker"),
    "time/step_s": ("listopd_turn_seconds", "The whole turn"),
    "fault/rollout_restarts": ("listopd_rollout_restarts", "Rollout workers replaced so far"),
    "fault/teacher_restarts": ("listopd_teacher_restarts", "Teachers replaced so far"),
    "fault/learner_restarts": ("listopd_learner_restarts", "Learners replaced so far"),
    "train/step": ("listopd_step", "Updates done"),
}


class Gauges:
    """Of one run, tagged with its name: there from its first row of metrics on as long as it runs,
    and half a minute after that gone, as are those of a process that was killed."""

    def __init__(self, config: Config) -> None:
        self._tags = {"run": quote(config.name, safe=string.printable)}  # Ray takes ASCII alone
        restarts = {metric: 0.0 for metric in GAUGES if metric.endswith("_restarts")}
        self._constant = {"num_steps": float(config.num_steps), **restarts}
        self._values: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="gauges", daemon=True)

    def __enter__(self) -> Gauges:
        self._thread.start()
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def show(self, row: dict[str, float]) -> None:
        """What this row lacks keeps the value that it had."""
        known = {metric: float(row[metric]) for metric in GAUGES if metric in row}
        self._values = {**self._constant, **self._values, **known}  # a whole one for the thread
        self._set()

    def _set(self) -> None:
        values = self._values
        for metric in GAUGES:
            if metric in values:
                _gauge(metric).set(values[metric], self._tags)

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_S):
            self._set()


@cache
def _gauge(metric: str) -> Gauge:
    """Made once a process: Ray keeps every one that was ever made."""
    from ray.util.metrics import Gauge  # here: the names above are of use without it

    name, description = GAUGES[metric]
    return Gauge(name, description, tag_keys=("run",))
