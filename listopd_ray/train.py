"""The main loop: sample, score, learn, publish."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from listopd_ray.config import Config, schedule_value
from listopd_ray.evaluate import Sampler, evaluate, judge_rollout
from listopd_ray.roles.rollout import Generated
from listopd_ray.steering import Steering
from listopd_ray.task.contract import TokenText
from listopd_ray.task.data import PromptStream
from listopd_ray.tracking import Run, evaluation_metrics, progress_bar

if TYPE_CHECKING:  # not at run time: it brings Ray Train along
    from listopd_ray.prepare import Prepared

GATE_PROMPTS = 16


class RolloutWorkers(Sampler, Protocol):
    def load_weights(self, weights: Any) -> float: ...


class Scorer(Protocol):
    def score(self, generated: list[Any]) -> list[Any]: ...

    def score_with(self, model_path: Path, generated: list[Any]) -> list[Any]: ...


class LearnerRole(Protocol):
    def step(self, scored: list[Any], lam: float, lr: float) -> dict[str, float]: ...

    def check_scores(self, scored: list[Any]) -> dict[str, float]: ...

    def publish_weights(self) -> Any: ...

    def save(self, directory: Any) -> None: ...

    def restore(self, directory: Any) -> None: ...


def train(
    config: Config,
    data: Prepared,
    workers: RolloutWorkers,
    teacher: Scorer,
    learner: LearnerRole,
    run: Run,
) -> dict[str, Any]:
    """One optimizer step per turn; returns the evaluations {"warm_start": …, "student": …}.

    With `max_staleness=1` the next batch is sampled while the learner works on this one.
    """
    prompts = PromptStream(data.train.prompts, config.seed)
    steering = Steering(config, run.num_rollbacks())
    step, results = 0, dict[str, Any]()

    def take_up(state: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Go on from a checkpoint, which is in the learner already."""
        prompts.restore(state["prompts"])
        steering.restore(state["steering"])
        workers.load_weights(learner.publish_weights())
        return state["step"], state["results"]

    def keep(cursor: dict[str, Any]) -> None:
        state = {"prompts": cursor, "results": results, "steering": steering.state()}
        run.save(step, learner, state, healthy=step == 0)  # others once their rollouts are seen

    def sample(at: int) -> list[Any]:
        batch = prompts.take(config.num_prompts)
        return workers.generate(batch, f"train/{at}", group_size=config.group_size)

    def assess() -> tuple[dict[str, Any], dict[str, float]]:
        num_prompts = config.evaluation.num_prompts
        result, judged = evaluate(workers, data.evaluation, data.text, num_prompts)
        run.keep_samples(step, judged)
        return result, evaluation_metrics(result)

    if state := run.restore(learner):
        step, results = take_up(state)
    else:
        workers.load_weights(learner.publish_weights())
        trial = workers.generate(data.train.prompts[:GATE_PROMPTS], "gate")
        gate = learner.check_scores(teacher.score_with(data.student_path, trial))
        results["warm_start"], metrics = assess()
        run.log(0, gate | metrics)
        steering.observe(metrics, lam=1.0)  # the warm start's parse rate may be the best
        if config.alarm.action == "rollback":
            keep(prompts.state())

    bar = progress_bar(config.name, config.num_steps, initial=step)
    rollouts = sample(step) if step < config.num_steps else []
    while step < config.num_steps:
        start, cursor = time.perf_counter(), prompts.state()
        scored = teacher.score(rollouts)
        is_last, saves = step + 1 == config.num_steps, _due(step + 1, config.checkpoint.every)
        # Nothing is sampled ahead over a checkpoint: a resumed run could not sample it again.
        overlaps = config.max_staleness > 0 and not is_last and not saves
        upcoming = sample(step + 1) if overlaps else []
        lam = steering.lam(step)
        lr = schedule_value(config.lr_schedule, config.lr, step, config.num_steps)
        metrics = {"train/lam": lam, "train/lr": lr}
        metrics |= contract_metrics(workers.fetch(rollouts), data.text)
        metrics |= learner.step(scored, lam, lr)
        sync_start = time.perf_counter()
        metrics["sync/canary_max"] = workers.load_weights(learner.publish_weights())
        step += 1
        now = time.perf_counter()
        metrics |= {"time/sync_s": now - sync_start, "time/step_s": now - start}
        metrics["perf/tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/step_s"]
        if is_last or _due(step, config.evaluation.every):
            results["student"], evaluated = assess()
            metrics |= evaluated
        metrics |= steering.observe(metrics, lam)
        if steering.healthy:
            run.mark_healthy(step - 1)  # its weights have sampled this batch, if it was kept
        run.log(step, metrics)
        show_progress(bar, metrics)
        if (event := steering.event(step, lam)) and run.record(event) == "rollback":
            step, results = take_up(run.roll_back(learner))
            bar.update(step - bar.n)
            upcoming = []
        elif is_last or saves:
            keep(cursor)
        rollouts = upcoming or (sample(step) if step < config.num_steps else [])
    bar.close()
    return results


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
        kl=f"{metrics['kl/reverse']:.3f}",
        stale=f"{metrics['rollout/staleness']:.0f}",
        tok_s=f"{metrics['perf/tokens_per_s']:.0f}",
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
