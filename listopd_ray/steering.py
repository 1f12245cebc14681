"""What keeps a run below the cliff: the governor chooses λ, the alarm acts on a collapse."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from listopd_ray.cliff.alarm import Alarm
from listopd_ray.cliff.governor import Governor
from listopd_ray.config import Config, schedule_value
from listopd_ray.tracking import read_json
from listopd_ray.types import ListopdError


class Steering:
    """Governor and alarm of one run. `num_rollbacks` are those that the run has behind it."""

    def __init__(self, config: Config, num_rollbacks: int) -> None:
        self._config = config
        self._num_rollbacks = num_rollbacks
        self._governor = Governor(
            clip=config.clip,
            margin=config.governor.margin,
            decay=config.governor.decay,
            caps=config.governor.enabled or config.lam == "auto",
            predicted=predicted_threshold(config) if config.prediction else None,
        )
        self._alarm = Alarm(
            clip=config.clip,
            parse_share=config.alarm.parse_share,
            patience=config.alarm.patience,
        )
        self._reason: str | None = None
        self._warned = False
        self._skipped = 0  # updates in a row

    @property
    def healthy(self) -> bool:
        return self._alarm.healthy

    def lam(self, step: int) -> float:
        """λ of the update `step`: as asked for, capped by the governor, lowered by roll-backs."""
        config = self._config
        asked = math.inf if config.lam == "auto" else float(config.lam)
        scheduled = schedule_value(config.lam_schedule, asked, step, config.num_steps)
        lam = self._governor.working_lam(scheduled)
        if not self._num_rollbacks:
            return lam
        return 1.0 + (lam - 1.0) * config.alarm.backoff**self._num_rollbacks

    def observe(self, metrics: dict[str, float], lam: float) -> dict[str, float]:
        """Take in the metrics of an update made with `lam`; returns the governor's own."""
        seen = self._governor.update(metrics, lam)
        self._reason = self._alarm.check(metrics, self._governor.binding_class)
        self._skipped = self._skipped + 1 if metrics.get("train/skipped") else 0
        return seen

    def event(self, step: int, lam: float) -> dict[str, Any] | None:
        """What to record after `step` updates if the alarm rings; its `action` is to be taken.

        A warning is given once, until outputs are healthy again. Past `alarm.max_rollbacks` the
        action is to stop.
        """
        reason, action = self._reason, str(self._config.alarm.action)
        if self._skipped >= self._config.faults.max_skipped:
            reason = f"{self._skipped} updates in a row skipped: loss or gradient is not finite"
            action = str(self._config.faults.skipped_action)
        if reason is None:
            self._warned = self._warned and not self._alarm.healthy
            return None
        if action == "warn" and self._warned:
            return None
        self._warned = True
        if action == "rollback" and self._num_rollbacks >= self._config.alarm.max_rollbacks:
            action = "stop"
        self._num_rollbacks += action == "rollback"
        return {"step": step, "action": action, "reason": reason, "lam": lam}

    def state(self) -> dict[str, Any]:
        return {
            "governor": self._governor.state(),
            "alarm": self._alarm.state(),
            "warned": self._warned,
            "skipped": self._skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._governor.restore(state["governor"])
        self._alarm.restore(state["alarm"])
        self._reason, self._warned = None, state["warned"]
        self._skipped = state["skipped"]


def predicted_threshold(config: Config) -> float | None:
    """The smaller of λ* and escape in the run's prediction file; None where it has neither.

    Raises ListopdError where the file is none, or is of another clip.
    """
    prediction = read_prediction(config)
    thresholds = (prediction["lambda_star"], prediction.get("escape"))
    return min((value for value in thresholds if value is not None), default=None)


def check_prediction(config: Config, hashes: dict[str, str]) -> None:
    """Raises ListopdError where the prediction speaks of other data or models than the run's; says
    where it is out of scope and yet to steer."""
    prediction = read_prediction(config)
    check_origin(config, prediction, hashes)
    if config.governor.enabled or config.lam == "auto":
        for reason in prediction.get("out_of_scope", []):
            print(f"prediction: {config.prediction}: out of scope: {reason}", file=sys.stderr)


def check_origin(
    config: Config,
    prediction: dict[str, Any],
    hashes: Mapping[str, Any],
    names: Sequence[str] = ("data", "teacher", "warm_start"),
) -> None:
    """Raises ListopdError for a prediction that was made for another of `names`, by its hashes."""
    made_for = prediction.get("hashes", {})
    for name in names:
        if name in made_for and hashes[name] not in made_for[name]:
            raise ListopdError(f"prediction: {config.prediction}: was made for another {name}")


def read_prediction(config: Config) -> dict[str, Any]:
    """The run's prediction file, for this clip; raises ListopdError where it is none."""
    file = Path(config.prediction or "")
    prediction = read_json(file, f"prediction: {file}")
    if not isinstance(prediction, dict) or not {"lambda_star", "clip"} <= prediction.keys():
        raise ListopdError(f"prediction: {file}: no prediction.json of `listopd calibrate`")
    for key in ("lambda_star", "escape", "clip"):
        value = prediction.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 1 <= value < math.inf):
            raise ListopdError(f"prediction: {file}: {key} is {value!r}, not a number ≥ 1")
    clip = math.inf if prediction["clip"] is None else prediction["clip"]
    if clip != config.clip:
        raise ListopdError(
            f"prediction: {file}: is for c = {clip:g}, the run has c = {config.clip:g}"
        )
    return prediction
