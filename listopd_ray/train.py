"""The main loop: sample, score, learn, publish."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
from tqdm import tqdm

from listopd_ray.checkpoint import Files
from listopd_ray.config import Config, schedule_value
from listopd_ray.evaluate import Sampler, evaluate, inspection_row, judge_rollout, sample_rows
from listopd_ray.ledger import Ledger, admit
from listopd_ray.roles.rollout import Generated
from listopd_ray.roles.teacher import Scored
from listopd_ray.steering import Steering
from listopd_ray.supervision import (
    Faults,
    Interrupted,
    LearnerLost,
    LimitReached,
    hold_interrupts,
    interruptible,
)
from listopd_ray.task.contract import TokenText
from listopd_ray.task.data import PromptStream
from listopd_ray.trace import Trace
from listopd_ray.tracking import Run, evaluation_metrics, kept_json, progress_bar
from listopd_ray.types import Inspection, ListopdError, Prompt, Rollout

if TYPE_CHECKING:  # not at run time: it brings Ray Train along
    from listopd_ray.prepare import Prepared

GATE_SAMPLES = 16


class RolloutWorkers(Sampler, Protocol):
    def ready(self, works: list[Any]) -> list[int]: ...

    def load_weights(self, weights: Any) -> dict[str, float]: ...


class Scorer(Protocol):
    def score(self, generated: list[Generated]) -> list[Any]: ...

    def fetch(self, works: list[Any]) -> list[Scored]: ...

    def score_with(self, model_path: Path, generated: list[Generated]) -> list[Scored]: ...


class LearnerRole(Protocol):
    def step(
        self, scored: list[Scored], lam: float, lr: float, meanwhile: Callable[[], None]
    ) -> dict[str, float]: ...

    def inspect(self) -> Inspection: ...

    def check_scores(self, scored: list[Scored]) -> dict[str, float]: ...

    def publish_weights(self) -> Any: ...

    def save(self, url: str) -> Files: ...

    def restore(self, url: str, files: Files) -> None: ...

    def restart(self, why: Exception) -> None: ...


class Loop:
    """All updates of a run, one a turn, in two halves: `_update` ends with the learner's step,
    `_finish` with its row of metrics. In between, and before either, the state is a checkpoint's.

    With `max_staleness=1` the next batch is sampled while the learner works on this one.

    Every actor may die: workers and teachers are replaced where their results are waited for, the
    learner here, and what was learnt since its newest checkpoint is learnt again. A run that is
    interrupted, or reaches a limit of what it can live through, leaves a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        data: Prepared,
        workers: RolloutWorkers,
        teacher: Scorer,
        learner: LearnerRole,
        run: Run,
        faults: Faults,
        trace: Trace | None = None,
        warm_start_file: Path | None = None,
    ) -> None:
        """`warm_start_file`: the evaluation of the warm start, kept for runs that begin alike."""
        self._config, self._data, self._run, self._faults = config, data, run, faults
        self._span = (trace or Trace(False)).span
        self._workers, self._teacher, self._learner = workers, teacher, learner
        self._warm_start_file = warm_start_file
        self._prompts = PromptStream(data.train.prompts, config.seed)
        self._steering = Steering(config, run.num_rollbacks())
        self._ledger = Ledger(run.directory / "ledger.jsonl")
        self._bar = progress_bar(config.name, config.num_steps)
        self._step = 0  # updates done, the learner's version
        self._results: dict[str, Any] = {}
        self._batch: Batch | None = None  # for the next update, under way
        self._unfinished: dict[str, float] | None = None  # metrics of an update without its row
        self._score: float | None = None  # of an evaluation at this step
        self._stop: ListopdError | None = None  # what came while the learner worked
        self._kept: Any = None  # (step, whether it is finished) of the newest checkpoint
        self._start = time.perf_counter()  # of the turn
        self._fresh = self._state()

    def run(self) -> dict[str, Any]:
        """Returns the evaluations {"warm_start": …, "student": …}."""
        with interruptible(), self._bar:
            todo: Callable[[], None] | None = self._begin
            while todo is not None:
                try:
                    todo()
                    is_done = self._step == self._config.num_steps and self._unfinished is None
                    todo = None if is_done else self._turn
                except LearnerLost as error:
                    todo = functools.partial(self._recover, error)
                except (LimitReached, Interrupted) as error:
                    self._leave(error)
        return self._results

    def _begin(self) -> None:
        """From the newest checkpoint, or from the warm start: its gate and evaluation first."""
        state = self._run.restore(self._learner)
        self._take_up(state or self._fresh)
        if state is None:
            with self._span("gate"):
                # In groups, as in training: models may share a prompt.
                size = self._config.group_size
                prompts = self._data.train.prompts[: math.ceil(GATE_SAMPLES / size)]
                trial = self._workers.generate(prompts, "gate", group_size=size)
                generated = self._workers.fetch(trial)
                scored = self._teacher.score_with(self._data.student_path, generated)
                gate = self._learner.check_scores(scored)
            self._results["warm_start"], metrics = self._assess(self._warm_start_file)
            self._run.log(0, gate | metrics)
            self._steering.observe(metrics, lam=1.0)  # its parse rate may be the best
            if "rollback" in (self._config.alarm.action, self._config.faults.skipped_action):
                self._save()
        self._bar.unpause()  # all of this is no part of the first update

    def _turn(self) -> None:
        with self._span("turn", step=self._step):
            if self._unfinished is None:
                self._unfinished = self._update()
                if self._stop is not None:
                    raise self._stop
            self._finish(self._unfinished)

    def _recover(self, error: Exception) -> None:
        """Another learner, and everything as at its newest checkpoint."""
        self._learner.restart(error)
        self._begin()

    def _leave(self, error: ListopdError) -> NoReturn:
        """Keep what there is, and raise `error` with a word on that."""
        hold_interrupts()
        try:
            if "warm_start" in self._results:
                is_finished = self._unfinished is None
                if self._kept != (self._step, is_finished):
                    is_due = is_finished and self._is_due(self._config.checkpoint.every)
                    self._save(extra=not is_due)
                kept = f"checkpoint after update {self._step}: the same command goes on"
                error.args = (f"{error}; {kept}",)
        except ListopdError as failure:
            error.args = (f"{error}; no checkpoint of update {self._step}: {failure}",)
        raise error

    def _update(self) -> dict[str, float]:
        config, self._start = self._config, time.perf_counter()
        batch = self._batch = self._batch or self._sample(self._step)
        generated = self._fetch(batch)
        metrics = queue_metrics(batch, time.perf_counter())
        is_last = self._step + 1 == config.num_steps
        upcoming = self._sample(self._step + 1) if config.max_staleness and not is_last else None
        lam = self._steering.lam(self._step)
        lr = schedule_value(config.lr_schedule, config.lr, self._step, config.num_steps)
        metrics |= {"train/lam": lam, "train/lr": lr} | contract_metrics(generated, self._data.text)
        with self._span("wait for scores"):
            scores = self._teacher.fetch(batch.scores())
        scored, dropped = admit(generated, scores, self._step, config.max_staleness)
        metrics |= fault_metrics(generated, dropped, config.faults.max_dropped)
        with self._span("learn"):
            ahead = functools.partial(self._fetch_ahead, upcoming)
            metrics |= self._learner.step(scored, lam, lr, ahead)
        self._step, self._score = self._step + 1, None
        self._ledger.commit(self._step, generated, dropped)
        if self._is_due(config.evaluation.every):
            rollouts = [each.rollout for part in scored for each in part.rollouts]
            row = inspection_row(self._learner.inspect(), rollouts, self._data.text)
            self._run.keep_update(self._step, row)
        self._batch = upcoming
        return metrics

    def _finish(self, metrics: dict[str, float]) -> None:
        config, step, start = self._config, self._step, time.perf_counter()
        metrics |= self._sync()
        now = time.perf_counter()
        metrics |= {"time/sync_s": now - start, "time/step_s": now - self._start}
        metrics["perf/tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/step_s"]
        if self._is_due(config.evaluation.every):
            self._results["student"], evaluated = self._assess()
            metrics |= evaluated
            self._score = evaluated.get("eval/ndcg_at_k_all")  # None: nothing has relevance
        metrics |= self._steering.observe(metrics, metrics["train/lam"])
        if self._steering.healthy:  # so are the weights that have sampled this batch, if kept
            self._run.mark_healthy(step - 1 - math.ceil(metrics["rollout/staleness"]))
        self._run.log(step, metrics | self._faults.progress())
        show_progress(self._bar, metrics)
        self._unfinished = None
        event = self._steering.event(step, metrics["train/lam"])
        if event and self._run.record(event) == "rollback":
            self._take_up(self._run.roll_back(self._learner))
        elif self._is_due(config.checkpoint.every):
            self._save()

    def _take_up(self, state: dict[str, Any]) -> None:
        """Go on from a state whose weights are in the learner already."""
        self._step, self._results = state["step"], dict(state["results"])
        self._prompts.restore(state["prompts"])
        self._steering.restore(state["steering"])
        self._unfinished, self._score = state["unfinished"], None
        self._kept = (self._step, self._unfinished is None) if state is not self._fresh else None
        in_flight = from_json(state["in_flight"], self._data.train.prompts)
        self._batch = (
            Batch(state["prompts"], state["prompts"], [], dict(enumerate(in_flight)))
            if in_flight
            else None
        )
        self._ledger.begin(self._step)
        if self._bar.n == 0:
            self._bar.initial = self._step  # of the rate: those were done before
        self._bar.n = self._bar.last_print_n = self._step
        self._bar.refresh()
        self._sync()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the learner. A batch that is under way is drawn again
        where it would be the same, else kept: these are samples of older weights."""
        cursor, in_flight = self._prompts.state(), list[Any]()
        if self._batch is not None:
            cursor = self._batch.before
            if self._config.max_staleness:
                with suppress(LimitReached):  # nobody is left to draw it
                    in_flight = to_json(self._fetch(self._batch))
                    cursor = self._batch.after
        return {
            "step": self._step,
            "prompts": cursor,
            "in_flight": in_flight,
            "results": dict(self._results),
            "steering": self._steering.state(),
            "unfinished": self._unfinished,
        }

    def _is_due(self, every: int) -> bool:
        """After this update, whatever happens: what comes after `every` updates and the last."""
        step = self._step
        return step > 0 and (step == self._config.num_steps or (every > 0 and step % every == 0))

    def _save(self, *, extra: bool = False) -> None:
        healthy = self._step == 0 and not extra  # others once their rollouts are seen
        marks = {"healthy": healthy, "extra": extra, "score": self._score}
        with self._span("checkpoint"):
            self._run.save(self._step, self._learner, self._state(), **marks)
        self._kept = (self._step, self._unfinished is None)

    def _sync(self) -> dict[str, float]:
        """The learner's weights into every worker; metrics of that."""
        with self._span("publish"):
            weights = self._learner.publish_weights()
        with self._span("load_weights"):
            return self._workers.load_weights(weights)

    def _sample(self, at: int) -> Batch:
        before, config, asked = self._prompts.state(), self._config, time.perf_counter()
        prompts = self._prompts.take(config.num_prompts)
        works = self._workers.generate(prompts, f"train/{at}", group_size=config.group_size)
        return Batch(before, self._prompts.state(), works, asked=asked)

    def _fetch(self, batch: Batch) -> list[Generated]:
        with self._span("wait for rollouts"):
            while len(batch.scoring) < max(len(batch.works), len(batch.parts)):
                self._collect(batch)
        return [batch.parts[number] for number in sorted(batch.parts)]

    def _fetch_ahead(self, batch: Batch | None) -> None:
        """While the learner works: the teacher gets the next samples as soon as they are there. The
        update is completed, whatever happens meanwhile."""
        try:
            if batch is not None:
                self._fetch(batch)
        except (LimitReached, Interrupted) as error:
            self._stop = error

    def _collect(self, batch: Batch) -> None:
        """Wait for a part at least that is not in yet; the teacher gets each at once."""
        left = [number for number in range(len(batch.works)) if number not in batch.parts]
        works = [batch.works[number] for number in left]
        for position in self._workers.ready(works) if works else []:
            (batch.parts[left[position]],) = self._workers.fetch([works[position]])
        for number in sorted(set(batch.parts) - set(batch.scoring)):
            batch.scoring[number] = self._teacher.score([batch.parts[number]])

    def _assess(self, file: Path | None = None) -> tuple[dict[str, Any], dict[str, float]]:
        """Result and metrics of an evaluation, out of `file` if it is there, else kept in it."""
        found = kept_json(file, self._evaluate) if file is not None else self._evaluate()
        self._run.keep_samples(self._step, found["samples"])
        return found["result"], evaluation_metrics(found["result"])

    def _evaluate(self) -> dict[str, Any]:
        data, config, name = self._data, self._config.evaluation, self._config.name
        self._bar.set_description(f"{name}, evaluation")
        with self._span("evaluate"):
            result, judged = evaluate(self._workers, data.evaluation, data.text, config.num_prompts)
        self._bar.set_description(name, refresh=False)
        kept = judged[: config.num_samples]
        samples = sample_rows(kept, data.evaluation.prompts, data.text)
        return {"result": result, "samples": samples}


@dataclass
class Batch:
    """The samples of one update, in parts: a worker's share each."""

    before: dict[str, Any]  # state of the prompt stream before its prompts were taken
    after: dict[str, Any]
    works: list[Any]  # what samples each part; none for a batch out of a checkpoint
    parts: dict[int, Generated] = field(default_factory=dict)  # by number, once they are done
    scoring: dict[int, list[Any]] = field(default_factory=dict)  # what scores each part
    asked: float | None = None  # s, when they were; None: by a process before, another clock

    def scores(self) -> list[Any]:
        """What scores all parts, in their order."""
        return [work for number in sorted(self.scoring) for work in self.scoring[number]]


def queue_metrics(batch: Batch, now: float) -> dict[str, float]:
    """How long its samples lay waiting, for workers before they were drawn or for the learner
    after. Nothing for a batch out of a checkpoint: it lay there while nobody ran."""
    if batch.asked is None:
        return {}
    seconds = max(part.seconds for part in batch.parts.values())
    return {"time/queue_wait_s": max(0.0, now - batch.asked - seconds)}


def fault_metrics(
    generated: Sequence[Generated], dropped: Sequence[tuple[str, int, str]], max_dropped: float
) -> dict[str, float]:
    """Samples of an update that were drawn again, and that are unfit for it, if any; raises
    LimitReached where too many are."""
    total = sum(len(part.rollouts) for part in generated)
    reasons = Counter(reason for _, _, reason in dropped)
    if len(dropped) > max_dropped * total:
        listed = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        raise LimitReached(
            f"{len(dropped)} of {total} samples are unfit ({listed}): more than "
            f"faults.max_dropped={max_dropped:g}"
        )
    redone = sum(len(part.rollouts) for part in generated if part.attempt)
    counts = {f"fault/dropped_{reason}": count for reason, count in sorted(reasons.items())}
    counts |= {"fault/redone": redone} if redone else {}
    return {name: float(count) for name, count in counts.items()}


def to_json(generated: Sequence[Generated]) -> list[dict[str, Any]]:
    return [
        {
            "seconds": part.seconds,
            "attempt": part.attempt,
            "rollouts": [
                {
                    "prompt": rollout.prompt.id,
                    "sample_index": rollout.sample_index,
                    "token_ids": rollout.token_ids.tolist(),
                    "sampler_logprobs": rollout.sampler_logprobs.tolist(),  # float32 is exact
                    "finish_reason": rollout.finish_reason,
                    "policy_version": rollout.policy_version,
                }
                for rollout in part.rollouts
            ],
        }
        for part in generated
    ]


def from_json(parts: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> list[Generated]:
    by_id = {prompt.id: prompt for prompt in prompts} if parts else {}

    def rollout(values: dict[str, Any]) -> Rollout:
        return Rollout(
            prompt=by_id[values["prompt"]],
            sample_index=values["sample_index"],
            token_ids=np.array(values["token_ids"], dtype=np.int32),
            sampler_logprobs=np.array(values["sampler_logprobs"], dtype=np.float32),
            finish_reason=values["finish_reason"],
            policy_version=values["policy_version"],
        )

    return [
        Generated(
            rollouts=tuple(map(rollout, p["rollouts"])), seconds=p["seconds"], attempt=p["attempt"]
        )
        for p in parts
    ]


def contract_metrics(parts: Sequence[Generated], text: TokenText) -> dict[str, float]:
    """Strict parse rate, failures by reason and sampling time of the training rollouts."""
    judged = [judge_rollout(rollout, text) for part in parts for rollout in part.rollouts]
    failures = [output.reason for output in judged if output.reason is not None]
    metrics = {f"contract/{r}": failures.count(r) / len(judged) for r in sorted(set(failures))}
    metrics["contract/parse_rate"] = 1 - len(failures) / len(judged)
    metrics["time/generate_s"] = max(part.seconds for part in parts)
    return metrics


def show_progress(bar: tqdm, metrics: dict[str, float]) -> None:
    bar.update()
    bar.set_postfix(
        refresh=False,
        parse=f"{metrics['contract/parse_rate']:.2f}",
        kl=f"{metrics.get('kl/reverse', math.nan):.3f}",  # undefined in an update that was skipped
        stale=f"{metrics['rollout/staleness']:.0f}",
        tok_s=f"{metrics['perf/tokens_per_s']:.0f}",
    )
