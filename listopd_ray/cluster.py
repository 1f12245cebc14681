"""Places the roles on a Ray cluster."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from listopd_ray.config import Config, max_num_seqs, sync_directory
from listopd_ray.handles import LearnerHandle, StartFailed, Workers
from listopd_ray.model_files import model_files
from listopd_ray.placement import bundles_of, reserve, teacher_bundles
from listopd_ray.roles.learner import Learner
from listopd_ray.roles.rollout import RolloutWorker
from listopd_ray.roles.teacher import Teacher
from listopd_ray.supervision import Faults, handlers_kept
from listopd_ray.teacher_pool import TeacherPool
from listopd_ray.team import GONE, START_TIMEOUT_S, Team
from listopd_ray.tracking import progress_bar
from listopd_ray.types import ListopdError, last_line

# Freed blocks stay with the process instead of going back to the system and being faulted in again
# on the next allocation: a fifth of a tiny model's step on the CPU. Not so the largest, heads of
# large vocabularies and their logits: the holes they leave are as large again.
_TORCH_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(128 << 20),
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
    with handlers_kept():
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


class Cluster:
    """One placement group with the rollout workers, the teachers (but for `teacher_path=None`), and
    room for one learner, of one rank or several. With `supervised` an actor that dies is replaced,
    as often as the configuration allows."""

    def __init__(
        self,
        config: Config,
        *,
        student_path: Path,
        teacher_path: Path | None,
        teachers: Mapping[str, Path] | None = None,
        end_ids: tuple[int, ...],
        max_prompt_tokens: int,
        max_new_tokens: int,
        supervised: bool = True,
    ) -> None:
        """`teachers`: further ones, by the names that prompts give."""
        bundles = bundles_of(config, with_teachers=teacher_path is not None)
        # A slot of a search stays together: one machine lost is one trial lost.
        strategy = "SPREAD" if supervised else "PACK"
        self._group = reserve(config, "the run (rollout, scoring, learner)", bundles, strategy)
        self._supervised = supervised
        self.faults = Faults(config.faults)
        self._learner: list[Any] = []  # its ranks
        rollout, first_worker = config.rollout, config.learner.num_ranks
        first_teacher = first_worker + rollout.num_workers

        def start_worker(index: int) -> Any:
            return _spawn(
                RolloutWorker, self._group, first_worker + index, _env(config, "vllm")
            ).remote(
                rollout,
                model_path=model_files(student_path),
                dtype=rollout.dtype or config.learner.dtype,
                device=config.device,
                max_num_seqs=max_num_seqs(config),
                end_ids=end_ids,
                max_prompt_tokens=max_prompt_tokens,
                max_new_tokens=max_new_tokens,
                tolerance=config.sync.tolerance,
                adapter_rank=config.lora.rank if config.sync.method == "adapter" else 0,
            )

        scorers = _scorers(config, teacher_path, teachers) if teacher_path is not None else []

        def start_teacher(index: int) -> Any:
            place, path = first_teacher + index, scorers[index][1]
            lengths = (max_prompt_tokens, max_new_tokens)
            return _spawn_teacher(config, path, self._group, place, lengths)

        workers = self._team("rollout", start_worker, rollout.num_workers)
        scoring = self._team("teacher", start_teacher, len(scorers))
        self.workers = Workers(workers, config.seed)
        self.teacher = TeacherPool(scoring, [name for name, _ in scorers])
        self._teams = (workers, scoring)

    def start_learner(
        self, config: Config, student_path: Path, canary_ids: np.ndarray
    ) -> LearnerHandle:
        """A fresh learner in place of the one before."""

        def start() -> list[Any]:
            self.stop_learner()
            place = _at(self._group, 0)
            point = ray.get(ray.remote(_meeting_point).options(num_cpus=0, **place).remote())
            self._learner = [
                _spawn(Learner, self._group, rank, _env(config, "hf")).remote(
                    config,
                    student_path=model_files(student_path),
                    canary_ids=canary_ids,
                    sync_directory=sync_directory(config),
                    rank=rank,
                    meeting_point=point,
                )
                for rank in range(config.learner.num_ranks)
            ]
            _wait([rank.__ray_ready__.remote() for rank in self._learner], "learner")
            return self._learner

        return LearnerHandle(start(), self.faults, start if self._supervised else None)

    def stop_learner(self) -> None:
        for rank in self._learner:
            ray.kill(rank)
        self._learner = []

    @property
    def num_actors(self) -> int:
        """Rollout workers and teachers."""
        return sum(len(team.actors) for team in self._teams)

    def wait_until_ready(self, advance: Callable[[int], object] | None = None) -> None:
        """Wait for rollout workers and teachers, each a word to `advance`; raises what their
        start-up raised, and where one has died since."""
        actors = [actor for team in self._teams for actor in team.actors]
        ready = [actor.__ray_ready__.remote() for actor in actors]
        _wait(ready, "rollout or teacher actor", advance)

    def shutdown(self) -> None:
        remove_placement_group(self._group)

    def _team(self, role: str, start: Callable[[int], Any], count: int) -> Team:
        actors = [start(index) for index in range(count)]
        return Team(role, actors, self.faults, start if self._supervised else None)


class SharedTeachers:
    """Teacher actors in a placement group of their own, for several clusters at once."""

    def __init__(
        self,
        config: Config,
        num_bases: int,
        teacher_path: Path,
        teachers: Mapping[str, Path],
        lengths: tuple[int, int],
    ) -> None:
        """`num_bases` runs with bases of their own may use them at once; `teachers` as for
        `Cluster`; `lengths`: of the longest prompt and completion."""
        self._group = reserve(config, "the teachers", teacher_bundles(config))
        scorers = _scorers(config, teacher_path, teachers)
        self._actors = [
            _spawn_teacher(config, path, self._group, index, lengths, num_bases)
            for index, (_, path) in enumerate(scorers)
        ]
        team = Team("teacher", self._actors, Faults(config.faults), spawn=None)
        self.pool = TeacherPool(team, [name for name, _ in scorers])

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
        runtime_env={"env_vars": env},
        **_at(group, bundle),
    )


def _scorers(
    config: Config, teacher_path: Path, teachers: Mapping[str, Path] | None
) -> list[tuple[str | None, Path]]:
    """Name (None: the default) and checkpoint of every teacher actor."""
    named = [(None, teacher_path), *(teachers or {}).items()]
    return [pair for pair in named for _ in range(config.scoring.num_actors)]


def _at(group: PlacementGroup, bundle: int) -> dict[str, Any]:
    return {
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        )
    }


def _meeting_point() -> str:
    """Where the learner's ranks meet: a free port of the machine that this runs on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def _spawn_teacher(
    config: Config,
    teacher_path: Path,
    group: PlacementGroup,
    bundle: int,
    lengths: tuple[int, int],
    num_bases: int = 1,
) -> Any:
    return _spawn(Teacher, group, bundle, _env(config, config.scoring.backend)).remote(
        config.scoring,
        teacher_path=model_files(teacher_path),
        dtype=config.scoring.dtype or config.learner.dtype,
        device=config.device,
        num_bases=num_bases,
        max_prompt_tokens=lengths[0],
        max_new_tokens=lengths[1],
        tolerance=config.sync.tolerance,
    )


@contextmanager
def launch(config: Config, **arguments: Any) -> Iterator[Cluster]:
    """Start the roles (arguments as for `Cluster`), wait for them, and take them down again."""
    with ray_session():
        cluster = Cluster(config, **arguments)
        try:
            with progress_bar("start", cluster.num_actors, unit="actor") as bar:
                cluster.wait_until_ready(bar.update)
            yield cluster
        finally:
            cluster.shutdown()


@contextmanager
def serve(config: Config, **arguments: Any) -> Iterator[Workers]:
    """Rollout workers alone, serving a checkpoint's own weights (arguments as for `Cluster`)."""
    with launch(config, teacher_path=None, **arguments) as cluster:
        cluster.workers.use_checkpoint()
        yield cluster.workers


def _wait(references: list[Any], what: str, advance: Callable[[int], object] | None = None) -> None:
    end, pending = time.monotonic() + START_TIMEOUT_S, references
    try:
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise ListopdError(f"{what}: not ready after {START_TIMEOUT_S:g} s")
            ray.get(ready)
            if advance is not None:
                advance(1)
    except GONE as error:
        raise StartFailed(f"{what}: failed to start: {last_line(error)}") from error


def _env(config: Config, backend: str) -> dict[str, str]:
    """Environment variables of an actor; Ray itself gives it as many threads as its num_cpus."""
    vllm = _VLLM_CPU_ENV if config.device == "cpu" else _VLLM_ENV
    threads = {"OMP_NUM_THREADS": str(config.num_threads)} if config.num_threads else {}
    return (vllm if backend == "vllm" else _TORCH_ENV) | threads
