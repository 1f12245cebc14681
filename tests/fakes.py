"""Stand-ins for the roles, small enough to predict: the main loop runs on them without Ray."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from listopd_ray.checkpoint import digests, fetched, staged
from listopd_ray.roles.rollout import Generated
from listopd_ray.roles.teacher import Scored
from listopd_ray.types import Histogram, Inspection, Prompt, Rollout, ScoredRollout


def make_rollout(
    prompt_ids,
    token_ids,
    *,
    num_items=3,
    prompt_id="p",
    sampler_logprobs=None,
    finish_reason="stop",
    policy_version=0,
    sample_index=0,
):
    if sampler_logprobs is None:
        sampler_logprobs = np.zeros(len(token_ids))
    prompt_ids = np.array(prompt_ids, dtype=np.int32)
    return Rollout(
        prompt=Prompt(id=prompt_id, token_ids=prompt_ids, num_items=num_items),
        sample_index=sample_index,
        token_ids=np.array(token_ids, dtype=np.int32),
        sampler_logprobs=np.array(sampler_logprobs, dtype=np.float32),
        finish_reason=finish_reason,
        policy_version=policy_version,
    )


def make_scored(rollout, teacher_logprob=-0.5):
    length = len(rollout.token_ids)
    logprobs = np.full(length, teacher_logprob, dtype=np.float32)
    return ScoredRollout(
        rollout=rollout,
        teacher_logprobs=logprobs,
        base_logprobs=None,
        modal_ids=rollout.token_ids,
        teacher_modal_logprobs=logprobs,
        base_modal_logprobs=None,
        token_classes=np.zeros(length, dtype=np.int8),
        teacher_unused_mass=np.full(length, np.nan, dtype=np.float32),
        base_unused_mass=None,
    )


class Interrupted(Exception):  # noqa: N818 - what happens, not what went wrong
    """The end of a process, wherever a test wants it."""


@dataclass(frozen=True)
class Reference:
    """What a remote call returns: the loop may hand it on but not look inside."""

    value: Any


class FakeWorkers:
    """Completions are a function of the loaded weights and of the sample's name, nothing else."""

    def __init__(self, events, tokenizer):
        self._events = events
        texts = ['{"ranking": [1, 2, 3]}', '{"ranking": [3, 1, 2]}', '{"ranking": [2, 2, 1]}', "no"]
        self._completions = [[*tokenizer.encode(t), tokenizer.eos_token_id] for t in texts]
        self._weights = None

    def load_weights(self, weights):
        self._weights = weights
        self._events.append(("load_weights", weights["policy_version"]))
        return {"sync/canary_max": 0.0}

    def generate(self, prompts, tag, *, group_size=1, greedy=False):
        self._events.append(("generate", tag))
        rollouts, drawn = [], Counter()
        for prompt in prompts:
            for _ in range(group_size):
                index = drawn[prompt.id]
                drawn[prompt.id] += 1
                key = f"{self._weights['theta']!r} {tag} {prompt.id} {index} {greedy}"
                known = self._weights["completions"]
                choice = known[hashlib.sha256(key.encode()).digest()[0] % len(known)]
                rollouts.append(
                    Rollout(
                        prompt=prompt,
                        sample_index=index,
                        token_ids=np.array(self._completions[choice], dtype=np.int32),
                        sampler_logprobs=np.full(len(self._completions[choice]), -1.0, np.float32),
                        finish_reason="stop",
                        policy_version=self._weights["policy_version"],
                    )
                )
        half = (len(rollouts) + 1) // 2  # as of two workers
        parts = [part for part in (rollouts[:half], rollouts[half:]) if part]
        return [Reference(Generated(rollouts=tuple(part), seconds=0.0)) for part in parts]

    def ready(self, works):
        return list(range(len(works)))

    def fetch(self, works):
        return [reference.value for reference in works]


class FakeTeacher:
    def __init__(self, events):
        self._events = events

    def score(self, generated):
        self._events.append(("score", len(generated)))
        return [Reference(self._score(part)) for part in generated]

    def fetch(self, works):
        return [reference.value for reference in works]

    def score_with(self, model_path, generated):
        self._events.append(("score_with", model_path))
        return [self._score(part) for part in generated]

    def _score(self, part):
        return Scored(rollouts=tuple(map(make_scored, part.rollouts)), seconds=0.0)


class FakeLearner:
    """One weight, θ, that moves by lr · λ · (share of the completions it was given).

    With a `cliff` every answer parses until an update with λ above it, and none from then on.
    """

    def __init__(self, events, fail_at=None, cliff=None):
        self._events = events
        self._fail_at = fail_at  # update in which the process ends
        self._cliff = cliff
        self.begin_again()
        self.batches = []  # prompt ids of each update
        self.staleness = []  # of each update, one set

    def begin_again(self):
        """At the warm start."""
        self.theta = 0.0
        self.completions = [0, 1, 2, 3] if self._cliff is None else [0, 1]  # of `FakeWorkers`
        self.policy_version = 0

    def step(self, scored, lam, lr, meanwhile):
        if self.policy_version == self._fail_at:
            raise Interrupted
        self._events.append(("learner.step", self.policy_version))
        rollouts = [scored.rollout for part in scored for scored in part.rollouts]
        self._last = rollouts
        self.batches.append([rollout.prompt.id for rollout in rollouts])
        self.staleness.append({self.policy_version - r.policy_version for r in rollouts})
        signal = float(np.mean([int(r.token_ids.sum()) % 7 for r in rollouts]))
        self.theta += lr * lam * signal
        if self._cliff is not None and lam > self._cliff:
            self.completions = [2, 3]
        self.policy_version += 1
        meanwhile()
        return {
            "kl/reverse": 1.0 / (1.0 + self.theta),
            "rollout/staleness": float(max(self.staleness[-1])),
            "rollout/tokens": float(sum(len(r.token_ids) for r in rollouts)),
        }

    def inspect(self):
        even = Histogram(counts=[len(self._last)], edges=[0.0, 2.0])
        return Inspection(
            advantages=[np.full(len(r.token_ids), self.theta) for r in self._last[:2]],
            histograms={"loss/importance_ratio": even},
        )

    def check_scores(self, scored):
        self._events.append(("check_scores", len(scored)))
        return {"gate/rollout_max": 0.0}

    def publish_weights(self):
        return {
            "policy_version": self.policy_version,
            "theta": self.theta,
            "completions": self.completions,
        }

    def save(self, url):
        self._events.append(("save", self.policy_version))
        with staged(url) as directory:
            (directory / "fake.json").write_text(json.dumps(self.publish_weights()))
            return digests(directory)

    def restore(self, url, files):
        with fetched(url, files) as directory:
            state = json.loads((directory / "fake.json").read_text())
        self.policy_version, self.theta = state["policy_version"], state["theta"]
        self.completions = state["completions"]
