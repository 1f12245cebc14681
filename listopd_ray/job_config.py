"""Configurations of whole jobs: a run's, and a section of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from listopd_ray.config import Config


@dataclass(frozen=True)
class CalibrateConfig(Config):
    """Of `listopd calibrate`."""

    from_: str | None = None  # verdict.json or bracket.json: scale its onset to this clip
    from_clip: float | None = None  # which of a verdict's clips; null: the nearest
    from_curve: str | None = None  # which of its curves, where several have that clip


@dataclass(frozen=True)
class Curve:
    """Trials over λ with everything else fixed; what is predicted of it is locked before them."""

    set: dict[str, Any] = field(default_factory=dict)  # keys of the run's configuration
    lams: list[float] = field(default_factory=list)  # λ; none: 1 and `points` around λ*
    step: float = 0.1  # between grid points
    points: int = 5  # of the grid around λ*: its first lies one to two steps below
    seeds: list[int] | None = None  # null: the study's
    judge: bool = False  # lock the a-priori prediction and judge it
    calibrated_from: str | None = None  # what predicts it: an earlier curve, or FILE[:CURVE]
    budget_from: str | None = None  # an earlier curve at another num_steps, likewise


@dataclass(frozen=True)
class StudySection:
    slots: int = 2  # trials at once; each takes the resources of one run
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of warm start, prompts, sampling
    curves: dict[str, Curve] = field(default_factory=dict)  # name → keys below; run in this order
    only: list[str] = field(default_factory=list)  # curves to run this time; none: all
    compare: list[str] = field(default_factory=list)  # curves set side by side in the report
    baselines: bool = False  # also judge what a user would do in place of extrapolation


@dataclass(frozen=True)
class StudyConfig(Config):
    """Of `listopd study`: a run's configuration and the curves that vary it."""

    study: StudySection = field(default_factory=StudySection)


@dataclass(frozen=True)
class DemoRun:
    """A run of a demo."""

    lam: float = 1.0  # λ
    share: float | None = None  # in the place of lam: λ = 1 + share·(λ* − 1), to two decimals
    extrapolation: Literal["plain", "bounded"] = "plain"  # plain | bounded


@dataclass(frozen=True)
class DemoSection:
    runs: dict[str, DemoRun] = field(default_factory=dict)  # none: λ = 1, λ = 2, λ = 5 bounded


@dataclass(frozen=True)
class DemoConfig(Config):
    """Of `listopd demo`: a run's configuration and the runs that differ from it in λ."""

    demo: DemoSection = field(default_factory=DemoSection)


@dataclass(frozen=True)
class ImportConfig:
    """Of `listopd model import`."""

    gguf: str | None = None  # the file
    out: str | None = None  # directory to make


Metric = Literal[
    "eval/parse_rate", "eval/ndcg_at_1_all", "eval/ndcg_at_k_all", "eval/kendall_tau_all"
]


@dataclass(frozen=True)
class SearchSection:
    slots: int = 2  # trials at once; each takes the resources of one run, the teachers are shared
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])  # that judge every λ
    resolution: float = 0.05  # of λ: how wide the bracket may be in the end
    max_lam: float = 5.0  # the search goes no farther
    error: float = 0.01  # allowed probability that a verdict on a λ is wrong, for these seeds
    rung: int = 20  # updates after which a collapse rules a λ out; none passes before num_steps
    collapsed: float = 0.05  # strict parse of the rollouts below which outputs have collapsed
    patience: int = 5  # updates in a row
    attempts: int = 3  # of a trial that fails, before the search ends
    margin: float = 0.2  # share of low − 1 that the recommended λ stays below low
    # Other searches, over any keys: {lr: {loguniform: [1e-4, 1e-2]}, lam: {choice: [1.0, 1.2]}}.
    algorithm: Literal["bracket", "grid", "optuna"] = "bracket"  # bracket | grid | optuna
    space: dict[str, Any] = field(default_factory=dict)  # key → {distribution: [its arguments]}
    num_samples: int = 1  # draws from the space; of a grid, how often it is repeated
    metric: Metric = "eval/ndcg_at_k_all"  # to maximise: this or parse_rate, ndcg_at_1_all, …
    asha: bool = False  # stop trials early that are worse than others at the same update


@dataclass(frozen=True)
class SearchConfig(Config):
    """Of `listopd search`: a run's configuration and how its λ is searched."""

    search: SearchSection = field(default_factory=SearchSection)


@dataclass(frozen=True)
class Machine:
    """A kind of machine that a run is planned for."""

    count: int = 1  # of this kind
    memory_gib: float | None = None  # main memory, GiB each; null: as much as this machine has
    num_gpus: int = 0  # each
    gpu_memory_gib: float = 80.0  # GiB, of each GPU
    labels: dict[str, str] = field(default_factory=dict)  # as Ray knows them
    tflops: float | None = None  # 10^12 bfloat16 operations/s that a GPU, or all cores, reach
    tflops_float32: float | None = None  # the same in float32; null: no times (cores: measured)
    memory_gb_s: float | None = None  # 10^9 bytes/s that a GPU, or all cores, read
    weights_gb_s: float = 2.0  # 10^9 bytes/s of weights from learner to rollout workers


@dataclass(frozen=True)
class PlanSection:
    prompt_tokens: int | None = None  # of the longest prompt; null: data.max_prompt_tokens
    completion_tokens: int | None = None  # of the longest; null: rollout.max_new_tokens, else 40
    machines: dict[str, Machine] = field(default_factory=dict)  # none: this one; keys below


@dataclass(frozen=True)
class PlanConfig(Config):
    """Of `listopd plan`: a run's configuration and what it is to run on."""

    plan: PlanSection = field(default_factory=PlanSection)


@dataclass(frozen=True)
class CompareConfig:
    """Of `listopd compare`."""

    group: str = ""  # keys by which runs are one group, as lam,clip; none: all but the seed
    out: str = "compare.html"  # the page; a Markdown table of the same name beside it


@dataclass(frozen=True)
class ReportConfig:
    """Of `listopd report`."""

    out: str | None = None  # the page; null: report.html in the run's own directory


@dataclass(frozen=True)
class WatchConfig:
    """Of `listopd watch`."""

    every_s: float = 2.0  # s between looks
    once: bool = False  # print the state and leave
