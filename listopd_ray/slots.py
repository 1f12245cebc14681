"""Slots: engines and teachers that live on from one trial to the next, on one machine or many.

A slot is an actor that owns a placement group with rollout engines, teachers and room for one
learner. A trial is a whole run: it leases a slot, brings its own learner and returns the slot.
As many trials run at once as there are slots, so a small cluster never deadlocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.util import ActorPool

from listopd_ray.cluster import Cluster, bundles_of, check_resources
from listopd_ray.config import Config, needs_base
from listopd_ray.prepare import Prepared, prepare
from listopd_ray.types import ListopdError


class Slots:
    """The slots as one. Use as a context manager within a Ray session."""

    def __init__(self, config: Config, num_slots: int) -> None:
        """`config` says how large a slot is; raises ListopdError where they do not all fit."""
        check_resources(f"{num_slots} slots", bundles_of(config) * num_slots)
        self._actors = [ray.remote(Slot).options(num_cpus=0).remote() for _ in range(num_slots)]

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def run(self, configs: Sequence[Config]) -> Iterator[tuple[Config, dict[str, Any]]]:
        """Trials as they finish, with their summaries; {"error": …} for one that failed."""
        pool = ActorPool(self._actors)
        for number in range(len(configs)):
            pool.submit(lambda actor, n: actor.run.remote(n, configs[n]), number)
        while pool.has_next():
            number, summary = pool.get_next_unordered()
            yield configs[number], summary

    def measure(self, configs: Sequence[Config]) -> list[Any]:
        """A `calibrate.Measured` for each."""
        return list(ActorPool(self._actors).map(lambda a, c: a.measure.remote(c), configs))


class Slot:
    """Runs trials one after the other; new engines only for a trial that these do not fit."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None
        self._built_for: Any = None
        self._prepared: Prepared | None = None
        self._prepared_for: Any = None

    def run(self, number: int, config: Config) -> tuple[int, dict[str, Any]]:
        """Distil; `number` comes back with the summary, or with the error that ended the trial."""
        from listopd_ray.job import distill  # which imports much that the driver does without

        try:
            return number, distill(config, *self._lease(config))
        except (ListopdError, ray.exceptions.RayError) as error:
            self._drop_cluster()  # whatever state it is in
            lines = str(getattr(error, "cause", error)).strip().splitlines()
            return number, {"error": lines[-1] if lines else type(error).__name__}

    def measure(self, config: Config) -> Any:
        from listopd_ray.calibrate import measure_run

        return measure_run(config, *self._lease(config))

    def _lease(self, config: Config) -> tuple[Prepared, Cluster]:
        """The trial's inputs, kept for the next one of the same seed, and engines that fit it."""
        inputs = (config.seed, config.data, config.task, config.tokenizer, needs_base(config))
        models = (config.student, config.teacher, config.base, config.rollout.max_new_tokens)
        if self._prepared is None or self._prepared_for != (inputs, models):
            self._prepared = prepare(config)
            self._prepared_for = (inputs, models)
        arguments = self._prepared.cluster_arguments()
        fixed = {name: value for name, value in arguments.items() if name != "student_path"}
        wanted = (fixed, config.rollout, config.scoring, config.learner, config.sync, config.device)
        if self._cluster is None or self._built_for != wanted:
            self._drop_cluster()
            self._cluster = Cluster(config, **arguments)
            self._built_for = wanted
            self._cluster.wait_until_ready()
        return self._prepared, self._cluster

    def _drop_cluster(self) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster = None
