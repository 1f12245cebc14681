"""The verbs of the roles, for the driver.

It holds what passes from role to role: a rollout is small, and what the driver holds is not lost
with the actor, or the machine, that made it.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from listopd_ray.checkpoint import Files, writing
from listopd_ray.models import write_files
from listopd_ray.roles.rollout import Generated, Request
from listopd_ray.roles.teacher import Scored
from listopd_ray.supervision import ActorLost, Faults, LearnerLost
from listopd_ray.team import LOST, Team, Work, why_lost
from listopd_ray.types import Inspection, ListopdError, Prompt

CLOSE_TIMEOUT_S = 10.0


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

    def ready(self, works: list[Work]) -> list[int]:
        """Positions of those that are done, one at least: see `Team.ready`."""
        return self._team.ready(works, block=True)

    def fetch(self, works: list[Work]) -> list[Generated]:
        """Wait for what `generate` started. What a worker that died had not finished is made again,
        with the same seeds, by one that has the current weights."""
        return self._team.results(works)

    def members(self) -> list[tuple[str, Any]]:
        """As `Team.members`."""
        return self._team.members()

    def use_checkpoint(self) -> None:
        """Serve the weights that the engines were started with: there is no learner."""
        self._everywhere(lambda actor: actor.use_checkpoint.remote())

    def load_weights(self, weights: Any) -> dict[str, float]:
        """Load into every worker; metrics of the slowest and the one that differs most.

        An engine in which that fails is replaced: half-loaded weights are never loaded over.
        """
        loaded = self._everywhere(lambda actor: actor.load_weights.remote(weights))
        return {
            "sync/canary_max": max(each.canary_max for each in loaded),
            "sync/bytes": float(loaded[0].num_bytes),
            "time/publish_s": loaded[0].publish_seconds,
            "time/load_s": max(each.load_seconds + each.canary_seconds for each in loaded),
        }

    def _everywhere(self, call: Callable[[Any], Any]) -> list[Any]:
        team = self._team
        team.set_up = call
        works = [team.start(index, lambda a, _: call(a)) for index in range(len(team.actors))]
        return team.results(works, poisons=True)


class LearnerHandle:
    """The learner's ranks as one: every call is made in all of them, rank 0 answers."""

    def __init__(
        self, ranks: Sequence[Any], faults: Faults, spawn: Callable[[], Sequence[Any]] | None
    ) -> None:
        """`spawn` starts new ranks in the place of all; None: a loss is final."""
        self._ranks = list(ranks)
        self._members = [*enumerate(ranks)]  # and those in their place since
        self._faults = faults
        self._spawn = spawn

    def members(self) -> list[tuple[str, Any]]:
        """As `Team.members`."""
        several = len(self._ranks) > 1
        return [(f"learner {n}" if several else "learner", actor) for n, actor in self._members]

    def step(
        self,
        scored: Sequence[Scored],
        lam: float,
        lr: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """As `Learner.step`; `meanwhile` is called while the learner works."""
        if len(self._ranks) > 1:  # once into the object store, not once a rank
            scored = [ray.put(part) for part in scored]
        steps = [rank.step.remote(lam, lr, *scored) for rank in self._ranks]
        meanwhile()
        return self._wait(steps)[0]

    def inspect(self) -> Inspection:
        return self._call("inspect")

    def check_scores(self, scored: Sequence[Scored]) -> dict[str, float]:
        return self._call("check_scores", *scored)

    def publish_weights(self) -> Any:
        """A reference to `Weights`, owned by the driver: it outlives the learner."""
        weights, *others = [rank.publish_weights.remote() for rank in self._ranks]
        self._wait([*others, self._ranks[0].__ray_ready__.remote()])  # calls are done in order
        return weights

    def close(self) -> None:
        """Remove the files of its weights, if it still can: else the next learner of the run does.
        The last call."""
        with suppress(RayError):
            ray.get(self._ranks[0].close.remote(), timeout=CLOSE_TIMEOUT_S)

    def save(self, url: str) -> Files:
        return self._call("save", url)

    def restore(self, url: str, files: Files) -> None:
        self._call("restore", url, files)

    def export(self, directory: Path) -> None:
        """Write the student as a Hugging Face directory of this machine, and its adapter, where it
        has one, as a PEFT directory in it."""
        files = self._call("exported")
        with writing(str(directory)):
            write_files(directory, files["student"])
            if "adapter" in files:
                write_files(directory / "adapter", files["adapter"])

    def restart(self, why: Exception) -> None:
        """Others in the place of ranks of which one was lost; raises ActorLost where nobody may."""
        if self._spawn is None:  # not LearnerLost again: the loop would come back with it
            raise ActorLost(str(why)) from why
        reason = str(why)
        while True:
            self._faults.spend("learner", reason.removeprefix("learner").lstrip(": "))
            try:
                self._ranks = list(self._spawn())
                self._members += enumerate(self._ranks)
                return
            except StartFailed as error:  # on a machine that is about to be known as gone
                reason = str(error)

    def _call(self, verb: str, *arguments: Any) -> Any:
        return self._wait([getattr(rank, verb).remote(*arguments) for rank in self._ranks])[0]

    def _wait(self, references: list[Any]) -> list[Any]:
        """Of all ranks, whichever is lost or fails first: the others may be waiting for it."""
        end, pending = time.monotonic() + self._faults.timeout_s, references
        try:
            while pending:  # a step is not interrupted
                done, pending = ray.wait(pending, timeout=max(0.0, end - time.monotonic()))
                if not done:
                    raise GetTimeoutError(f"no answer in {self._faults.timeout_s:g} s")
                ray.get(done)
            return ray.get(references)
        except LOST as error:
            for rank in self._ranks:  # one that hangs must not finish its step later
                ray.kill(rank)
            raise LearnerLost(f"learner {why_lost(error)}") from error


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
