"""Places the roles on a Ray cluster and hands out their verbs.

The driver holds what passes from role to role: a rollout is small, and what it holds is not lost
with the actor, or the machine, that made it.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from listopd_ray.checkpoint import Files
from listopd_ray.config import Config
from listopd_ray.roles.learner import Learner
from listopd_ray.roles.rollout import Generated, Request, RolloutWorker
from listopd_ray.roles.teacher import Scored, Teacher
from listopd_ray.supervision import Faults, LearnerLost
from listopd_ray.team import GONE, LOST, START_TIMEOUT_S, Team, Work, why_lost
from listopd_ray.types import ListopdError, Prompt

# Freed blocks stay with the process instead of going back to the system and being faulted in again
# on the next allocation: a fifth of a tiny model's step on the CPU.
_TORCH_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_VLLM_ENV = {
    **_TORCH_ENV,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the actor: weights need no copy
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "",
}
# Without a GPU vLLM would call a C++ compiler for its log-probability path at the first request.
_VLLM_CPU_ENV = {**_VLLM_ENV, "TORCHDYNAMO_DISABLE": "1"}


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names or that runs here, else start a private one."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": _TORCH_ENV},
        )
    except Exception as error:  # Ray has no common base for them
        raise ListopdError(f"Ray did not start: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


class StartFailed(ListopdError):  # noqa: N818 - what happened, not what went wrong
    """An actor died before it was ready."""


class Workers:
    """The rollout workers as one."""

    def __init__(self, team: Team, seed: int) -> None:
        self._team = team
        self._seed = seed

    def with_seed(self, seed: int) -> Workers:
        """The same engines, for a run with another seed."""
        return Workers(self._team, seed)

    def generate(
        self, prompts: Sequence[Prompt], tag: str, *, group_size: int = 1, greedy: bool = False
    ) -> list[Work]:
        """Start sampling `group_size` completions a prompt, a part of them by each worker.

        `tag` names the occasion ("train/17"): with the run's seed it fixes every sample's seed.
        """
        requests = make_requests(prompts, self._seed, tag, group_size)
        bounds = np.linspace(0, len(requests), len(self._team.actors) + 1).astype(int)

        def start(index: int, low: int, high: int) -> Work:
            part = requests[low:high]
            return self._team.start(index, lambda a, n: a.generate.remote(part, greedy, n))

        parts = enumerate(pairwise(bounds))
        return [start(index, low, high) for index, (low, high) in parts if high > low]

    def fetch(self, works: list[Work]) -> list[Generated]:
        """Wait for what `generate` started. What a worker that died had not finished is made again,
        with the same seeds, by one that has the current weights."""
        return self._team.results(works)

    def use_checkpoint(self) -> None:
        """Serve the weights that the engines were started with: there is no learner."""
        self._everywhere(lambda actor: actor.use_checkpoint.remote())

    def load_weights(self, weights: Any) -> float:
        """Load into every worker; the largest canary difference (nats).

        An engine in which that fails is replaced: half-loaded weights are never loaded over.
        """
        return max(self._everywhere(lambda actor: actor.load_weights.remote(weights)))

    def _everywhere(self, call: Callable[[Any], Any]) -> list[Any]:
        team = self._team
        team.set_up = call
        works = [team.start(index, lambda a, _: call(a)) for index in range(len(team.actors))]
        return team.results(works, poisons=True)


class TeacherPool:
    """The teacher actors as one."""

    def __init__(self, team: Team, base: str | None = None) -> None:
        self._team = team
        self._base = base

    def with_base(self, base_path: Path | None) -> TeacherPool:
        """The same actors, for a run with this base (None: none)."""
        return TeacherPool(self._team, str(base_path.absolute()) if base_path else None)

    def score(self, generated: Sequence[Generated]) -> list[Work]:
        """Start scoring, each on one of the actors."""
        base, count = self._base, len(self._team.actors)

        def start(number: int, part: Generated) -> Work:
            return self._team.start(number % count, lambda a, _: a.score.remote(part, base))

        return [start(number, part) for number, part in enumerate(generated)]

    def fetch(self, works: list[Work]) -> list[Scored]:
        """Wait for what `score` started; what an actor that died had not finished is made again."""
        return self._team.results(works)

    def score_with(self, model_path: Path, generated: Sequence[Generated]) -> list[Scored]:
        """Scores by every actor with another checkpoint in the teacher's place."""
        path = str(model_path.absolute())

        def start(index: int, part: Generated) -> Work:
            return self._team.start(index, lambda a, _: a.score_with.remote(path, part))

        indices = range(len(self._team.actors))
        return self.fetch([start(index, part) for index in indices for part in generated])

    def generate(
        self, requests: list[Request], max_new_tokens: int, greedy: bool = False
    ) -> Generated:
        arguments = (requests, max_new_tokens, greedy)
        work = self._team.start(0, lambda a, _: a.generate.remote(*arguments))
        (generated,) = self._team.results([work])
        return generated


class LearnerHandle:
    """The learner actor's verbs; each waits for its result.

    Raises LearnerLost where it has died or hung: `restart` gives another, at the warm start.
    """

    def __init__(self, actor: Any, faults: Faults, spawn: Callable[[], Any] | None) -> None:
        self._actor = actor
        self._faults = faults
        self._spawn = spawn

    def step(self, scored: Sequence[Scored], lam: float, lr: float) -> dict[str, float]:
        return self._wait(self._actor.step.remote(lam, lr, *scored))

    def check_scores(self, scored: Sequence[Scored]) -> dict[str, float]:
        return self._wait(self._actor.check_scores.remote(*scored))

    def publish_weights(self) -> Any:
        """A reference to `Weights`, owned by the driver: it outlives the learner."""
        weights = self._actor.publish_weights.remote()
        self._wait(self._actor.__ray_ready__.remote())  # calls are done in order
        return weights

    def save(self, url: str) -> Files:
        return self._wait(self._actor.save.remote(url))

    def restore(self, url: str, files: Files) -> None:
        self._wait(self._actor.restore.remote(url, files))

    def export(self, directory: Path) -> None:
        self._wait(self._actor.export.remote(str(directory.absolute())))

    def restart(self, why: Exception) -> None:
        """Another actor in the place of one that was lost; raises `why` where nobody may."""
        if self._spawn is None:
            raise why
        reason = str(why)
        while True:
            self._faults.spend("learner", reason.removeprefix("learner").lstrip(": "))
            try:
                self._actor = self._spawn()
                return
            except StartFailed as error:  # on a machine that is about to be known as gone
                reason = str(error)

    def _wait(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=self._faults.timeout_s)  # a step is not interrupted
        except LOST as error:
            ray.kill(self._actor)  # one that hangs must not finish its step later
            raise LearnerLost(f"learner {why_lost(error)}") from error


class Cluster:
    """One placement group with the rollout workers, the teachers (but for `teacher_path=None`), and
    room for one learner. With `supervised` an actor that dies is replaced, as often as the
    configuration allows."""

    def __init__(
        self,
        config: Config,
        *,
        student_path: Path,
        teacher_path: Path | None,
        end_ids: tuple[int, ...],
        max_prompt_tokens: int,
        max_new_tokens: int,
        supervised: bool = True,
    ) -> None:
        self._group = _reserve(bundles_of(config, with_teachers=teacher_path is not None))
        self._supervised = supervised
        self.faults = Faults(config.faults)
        self._learner: Any = None
        rollout, first_teacher = config.rollout, 1 + config.rollout.num_workers

        def start_worker(index: int) -> Any:
            return _spawn(RolloutWorker, self._group, 1 + index, _vllm_env(config)).remote(
                rollout,
                model_path=str(student_path.absolute()),
                dtype=config.learner.dtype,
                device=config.device,
                end_ids=end_ids,
                max_prompt_tokens=max_prompt_tokens,
                max_new_tokens=max_new_tokens,
                tolerance=config.sync.tolerance,
            )

        def start_teacher(index: int) -> Any:
            assert teacher_path is not None
            return _spawn_teacher(config, teacher_path, self._group, first_teacher + index)

        num_teachers = config.scoring.num_actors if teacher_path is not None else 0
        workers = self._team("rollout", start_worker, rollout.num_workers)
        teachers = self._team("teacher", start_teacher, num_teachers)
        self.workers = Workers(workers, config.seed)
        self.teacher = TeacherPool(teachers)
        self._teams = (workers, teachers)

    def start_learner(
        self, config: Config, student_path: Path, canary_ids: np.ndarray
    ) -> LearnerHandle:
        """A fresh learner in place of the one before."""

        def start() -> Any:
            self.stop_learner()
            self._learner = _spawn(Learner, self._group, 0, _TORCH_ENV).remote(
                config, student_path=str(student_path.absolute()), canary_ids=canary_ids
            )
            _wait([self._learner.__ray_ready__.remote()], "learner")
            return self._learner

        return LearnerHandle(start(), self.faults, start if self._supervised else None)

    def stop_learner(self) -> None:
        if self._learner is not None:
            ray.kill(self._learner)
            self._learner = None

    def wait_until_ready(self) -> None:
        """Wait for rollout workers and teachers; raises what their start-up raised, and where one
        has died since."""
        actors = [actor for team in self._teams for actor in team.actors]
        _wait([actor.__ray_ready__.remote() for actor in actors], "rollout or teacher actor")

    def shutdown(self) -> None:
        remove_placement_group(self._group)

    def _team(self, role: str, start: Callable[[int], Any], count: int) -> Team:
        actors = [start(index) for index in range(count)]
        return Team(role, actors, self.faults, start if self._supervised else None)


class SharedTeachers:
    """Teacher actors in a placement group of their own, for several clusters at once."""

    def __init__(self, config: Config, teacher_path: Path, num_bases: int) -> None:
        """`num_bases` runs with bases of their own may use them at once."""
        self._group = _reserve(teacher_bundles(config))
        self._actors = [
            _spawn_teacher(config, teacher_path, self._group, index, num_bases)
            for index in range(config.scoring.num_actors)
        ]
        self.pool = TeacherPool(Team("teacher", self._actors, Faults(config.faults), spawn=None))

    def wait_until_ready(self) -> None:
        """As `Cluster.wait_until_ready`."""
        _wait([actor.__ray_ready__.remote() for actor in self._actors], "teacher actor")

    def shutdown(self) -> None:
        remove_placement_group(self._group)


def _spawn(role: type, group: PlacementGroup, bundle: int, env: dict[str, str]) -> Any:
    resources = group.bundle_specs[bundle]
    return ray.remote(role).options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        ),
        runtime_env={"env_vars": env},
    )


def _spawn_teacher(
    config: Config, teacher_path: Path, group: PlacementGroup, bundle: int, num_bases: int = 1
) -> Any:
    return _spawn(Teacher, group, bundle, _TORCH_ENV).remote(
        config.scoring,
        teacher_path=str(teacher_path.absolute()),
        dtype=config.learner.dtype,
        device=config.device,
        num_bases=num_bases,
    )


@contextmanager
def launch(config: Config, **arguments: Any) -> Iterator[Cluster]:
    """Start the roles (arguments as for `Cluster`) and take them down again."""
    with ray_session():
        cluster = Cluster(config, **arguments)
        try:
            yield cluster
        finally:
            cluster.shutdown()


@contextmanager
def serve(config: Config, **arguments: Any) -> Iterator[Workers]:
    """Rollout workers alone, serving a checkpoint's own weights (arguments as for `Cluster`)."""
    with launch(config, teacher_path=None, **arguments) as cluster:
        cluster.wait_until_ready()
        cluster.workers.use_checkpoint()
        yield cluster.workers


def make_requests(
    prompts: Sequence[Prompt], seed: int, tag: str, group_size: int = 1
) -> list[Request]:
    """`group_size` requests a prompt. A prompt that comes twice gets further sample indices."""
    drawn: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        for _ in range(group_size):
            index = drawn[prompt.id]
            drawn[prompt.id] += 1
            sample = sample_seed(seed, tag, prompt.id, index)
            requests.append(Request(prompt=prompt, sample_index=index, seed=sample))
    return requests


def sample_seed(seed: int, tag: str, prompt_id: str, sample_index: int) -> int:
    """The seed of one sample: the same whichever worker draws it, in whatever batch."""
    key = f"{seed}\0{tag}\0{prompt_id}\0{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 2


def bundles_of(config: Config, *, with_teachers: bool = True) -> list[dict[str, float]]:
    """Resources of a placement group: the learner, then rollout workers, then teachers."""
    rollout, learner = config.rollout, config.learner
    bundles = [_bundle(learner.num_cpus, learner.num_gpus)]
    bundles += [_bundle(rollout.num_cpus, rollout.num_gpus)] * rollout.num_workers
    return bundles + (teacher_bundles(config) if with_teachers else [])


def teacher_bundles(config: Config) -> list[dict[str, float]]:
    scoring = config.scoring
    return [_bundle(scoring.num_cpus, scoring.num_gpus)] * scoring.num_actors


def _bundle(num_cpus: float, num_gpus: float) -> dict[str, float]:
    return {"CPU": num_cpus, **({"GPU": num_gpus} if num_gpus else {})}


def check_resources(what: str, bundles: list[dict[str, float]]) -> None:
    """Raises ListopdError where the cluster is too small: Ray itself would wait for ever."""
    have = ray.cluster_resources()
    for resource in ("CPU", "GPU"):
        need = sum(bundle.get(resource, 0) for bundle in bundles)
        if need > have.get(resource, 0):
            raise ListopdError(
                f"{what} needs {need:g} {resource} but the Ray cluster has "
                f"{have.get(resource, 0):g}"
            )


def _reserve(bundles: list[dict[str, float]]) -> PlacementGroup:
    check_resources("the run (rollout, scoring, learner)", bundles)
    group = placement_group(bundles, strategy="PACK")
    _wait([group.ready()], "placement group")
    return group


def _wait(references: list[Any], what: str) -> None:
    try:
        ray.get(references, timeout=START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise ListopdError(f"{what}: not ready after {START_TIMEOUT_S:g} s") from None
    except GONE as error:
        reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
        raise StartFailed(f"{what}: failed to start: {reason}") from error


def _vllm_env(config: Config) -> dict[str, str]:
    return _VLLM_CPU_ENV if config.device == "cpu" else _VLLM_ENV
