"""What crosses process boundaries: the architecture in one file. Imports numpy at most.

P prompt tokens · T completion tokens · K items of a list. Log-probabilities are natural logs
(nats). Alignment: entry t of every per-token field describes completion token t given the prompt
and all completion tokens before it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length"]
SyncMethod = Literal["object_store", "directory", "adapter"]
StrPath = str | os.PathLike[str]


class ListopdError(Exception):
    """A failure that its user can cause and mend: shown as one line, without a trace."""


def last_line(error: BaseException) -> str:
    """What an error says in the end, that of an actor without Ray's remote trace."""
    lines = str(getattr(error, "cause", error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


class TokenClass(IntEnum):
    """Contract class of a completion token's place (see `listopd_ray.task.contract`)."""

    OPENING = 0  # brace, key, colon, bracket
    ITEM_ID = 1
    SEPARATOR = 2
    CLOSING = 3  # bracket, brace, end of sequence
    STRAY = 4  # after the token that broke the contract


CONTRACT_CLASSES = tuple(c for c in TokenClass if c != TokenClass.STRAY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One ranking example: rank `items` for `query`."""

    id: str
    query: str
    items: tuple[Item, ...]
    relevance: tuple[float, ...]  # [K] gains, ≥ 0, in the order of `items`
    teacher: str | None = None  # name of the teacher that scores it; None: the default


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """An example as the student sees it."""

    id: str  # of the example
    token_ids: np.ndarray  # [P] int32
    num_items: int  # K
    teacher: str | None = None  # as of the example


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One sampled completion: rollout worker → teacher."""

    prompt: Prompt
    sample_index: int  # 0 … group_size − 1 among the samples of this prompt in this step
    token_ids: np.ndarray  # [T] int32, end of sequence included
    sampler_logprobs: np.ndarray  # [T] float32, under the distribution actually sampled
    finish_reason: FinishReason
    policy_version: int  # learner updates completed when sampling began


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredRollout:
    """A rollout with what teacher and base say of it: teacher → learner.

    The base fields are None where no base model was loaded. `*_unused_mass` is the probability of
    any item id not used yet (the part of the contract that forbids repeats): NaN but where the
    first token of an id is due. The teacher's is NaN throughout with `scoring.backend: vllm`, which
    tells only the most likely tokens. The support leaves out special tokens but for those that end
    a completion.
    """

    rollout: Rollout
    teacher_logprobs: np.ndarray  # [T] float32, of the sampled tokens
    base_logprobs: np.ndarray | None  # [T] float32
    modal_ids: np.ndarray  # [T] int32, the teacher's most likely token
    teacher_modal_logprobs: np.ndarray  # [T] float32
    base_modal_logprobs: np.ndarray | None  # [T] float32, base on the teacher's modal token
    token_classes: np.ndarray  # [T] int8, `TokenClass`
    teacher_unused_mass: np.ndarray  # [T] float32
    base_unused_mass: np.ndarray | None  # [T] float32
    support_ids: np.ndarray | None = None  # [T, S] int32, the teacher's S most likely tokens
    support_logprobs: np.ndarray | None = None  # [T, S] float32, teacher
    base_support_logprobs: np.ndarray | None = None  # [T, S] float32, base on `support_ids`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """The student at one version: learner → every rollout worker.

    Its tensors themselves, as numpy arrays so that readers map them from the object store without a
    copy (bfloat16 travels as its uint16 bit pattern), or the directory that holds them.
    """

    policy_version: int
    method: SyncMethod = "object_store"
    # Hugging Face checkpoint names, `lm_head.weight` included.
    tensors: dict[str, np.ndarray] = field(default_factory=dict)  # empty but for object_store
    path: str | None = None  # directory: of a checkpoint's tensors; adapter: of PEFT
    files: dict[str, int] = field(default_factory=dict)  # of `path`: bytes by name
    dtype: Literal["float32", "bfloat16"]
    canary_ids: np.ndarray  # [L] int32, a fixed sequence
    canary_logprobs: np.ndarray  # [L − 1] float32, the learner's, of tokens 1 … L − 1
    num_bytes: int = 0  # of tensors or files
    seconds: float = 0.0  # that publishing took


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What one rollout worker says of the weights that it has loaded."""

    canary_max: float  # nats; the largest difference to the learner
    num_bytes: int
    publish_seconds: float
    load_seconds: float
    canary_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    counts: list[int]  # [n]
    edges: list[float]  # [n + 1], rising


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inspection:
    """A closer look at the learner's last update."""

    advantages: list[np.ndarray]  # [T] float32 each (nats), of the first rollouts of the batch
    histograms: dict[str, Histogram]  # by metric name


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One evaluated completion. `ranking` is None where the strict parse failed."""

    example_id: str
    text: str
    ranking: tuple[int, ...] | None  # permutation of 1…K, best first
    reason: str | None  # why it did not parse; None where it did


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval. NaN throughout where there was nothing to average."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Contract and ranking metrics of one model on one set of examples."""

    parse_rate: Estimate
    ndcg_at_1: Estimate  # of parsed outputs
    ndcg_at_k: Estimate
    kendall_tau: Estimate
    ndcg_at_1_all: Estimate  # unparsed outputs counted as zero
    ndcg_at_k_all: Estimate
    kendall_tau_all: Estimate
    num_prompts: int
    num_without_relevance: int  # left out of NDCG and τ: every item has relevance 0
    reasons: dict[str, int] = field(default_factory=dict)  # unparsed outputs by reason
