"""One frozen, typed configuration: dataclass defaults < YAML files left to right < key=value."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from listopd_ray.redact import redacted
from listopd_ray.types import ListopdError, SyncMethod

T = TypeVar("T")

JOB_SECTIONS = ("study", "search", "plan", "demo")  # of whole jobs' files (job_config.py)

AT_LEAST_ONE = (
    *(
        f"{role}.{key}"
        for role in ("student", "teacher")
        for key in ("num_layers", "hidden_size", "intermediate_size", "warmstart.batch_size")
    ),
    "alarm.patience",
    "faults.max_skipped",
    "num_prompts",
    "group_size",
    "num_steps",
    "num_threads",
    "checkpoint.keep",
    "evaluation.num_prompts",
    "learner.logits_mib",
    "learner.micro_batch_size",
    "learner.num_ranks",
    "rollout.kv_cache_mib",
    "rollout.max_new_tokens",
    "rollout.max_num_seqs",
    "rollout.num_workers",
    "scoring.micro_batch_size",
    "scoring.num_actors",
    "warmstart_workers",
)


@dataclass(frozen=True)
class Schedule:
    """How a value (λ or the learning rate) moves over the run."""

    kind: Literal["constant", "warmup", "linear"] = "constant"  # constant | warmup | linear
    initial: float = 0.0  # warmup: value at step 0
    steps: int = 0  # warmup: steps until the full value
    final: float = 0.0  # linear: value at the last step, from the full value at step 0


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # directory that `listopd data` wrote
    max_prompt_tokens: int = 512  # longer prompts are set aside
    max_bad_rows: int = 100  # more quarantined rows than this stop the command


@dataclass(frozen=True)
class WarmstartConfig:
    """Supervised fine-tuning before distillation. `num_steps: 0` takes the checkpoint as it is."""

    num_steps: int = 0  # updates; 0: the checkpoint as it is
    batch_size: int = 64  # examples an update, over all workers
    lr: float = 3e-3  # peak; cosine to a twentieth
    warmup_steps: int = 50  # of the learning rate, linear
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw | muon (matrices; AdamW the rest)
    weight_decay: float = 0.0  # decoupled
    max_grad_norm: float = 1.0  # gradients are scaled down to it
    format_noise: float = 0.0  # share of completion targets replaced by a random token
    prompt_loss_weight: float = 0.0  # next-token loss on the prompt, relative to the completion's
    seed: int | None = None  # null: the run's seed


@dataclass(frozen=True)
class ModelConfig:
    """A checkpoint directory, or (path: null) the shape of a tiny Qwen3 made here."""

    path: str | None = None  # checkpoint directory; null: a tiny Qwen3 of the shape below
    num_layers: int = 2  # of a model made here
    hidden_size: int = 64  # a multiple of 32, the head size
    intermediate_size: int = 192  # width of the MLP
    init_std: float = 0.06  # standard deviation of the initial weights
    warmstart: WarmstartConfig = field(default_factory=WarmstartConfig)


@dataclass(frozen=True)
class TokenizerConfig:
    """The byte-level BPE built on the data for models made here."""

    vocab_size: int = 512  # at most; fewer where the data has fewer


@dataclass(frozen=True)
class TaskConfig:
    chat_template: bool = False  # true: the checkpoint's own template, thinking off


@dataclass(frozen=True)
class BaseConfig:
    path: str | None = None  # null: the student's warm start


@dataclass(frozen=True)
class RolloutConfig:
    backend: Literal["vllm", "hf"] = "vllm"  # vllm | hf (machines without vLLM)
    num_workers: int = 1  # vLLM engines
    num_cpus: float = 0.5  # each worker
    num_gpus: float = 0.0  # each actor
    labels: dict[str, str] = field(default_factory=dict)  # of the machines it may be on
    max_new_tokens: int | None = None  # null: the longest correct answer in the data plus 8
    dtype: Literal["float32", "bfloat16"] | None = None  # float32 | bfloat16; null: the learner's
    max_num_seqs: int | None = None  # decoded at once; null: a worker's share of an update, ≤ 256
    kv_cache_mib: int | None = None  # each engine; null: room for max_num_seqs at full length
    grammar: bool = False  # decode under the contract's JSON schema; not for training samples
    engine: dict[str, Any] = field(default_factory=dict)  # passed on to vllm.LLM


@dataclass(frozen=True)
class TeacherActorConfig:
    num_actors: int = 1  # of each teacher, with the base
    num_cpus: float = 0.5  # each actor
    num_gpus: float = 0.0  # each actor
    labels: dict[str, str] = field(default_factory=dict)  # of the machines it may be on
    backend: Literal["hf", "vllm"] = "hf"  # hf | vllm (of teachers; the base is scored by hf)
    engine: dict[str, Any] = field(default_factory=dict)  # passed on to vllm.LLM
    dtype: Literal["float32", "bfloat16"] | None = None  # float32 | bfloat16; null: learner.dtype
    micro_batch_size: int = 64  # sequences at once
    support_size: int = 0  # S: also return the teacher's S most likely tokens
    temperature: float = 1.0  # of the teacher that scores: < 1 sharper, > 1 flatter
    id_temperature: float = 1.0  # in its place where an item id is due
    uniform_share: float = 0.0  # mixed into the teacher that scores


@dataclass(frozen=True)
class LearnerConfig:
    num_ranks: int = 1  # learner actors that share every update
    sharding: Literal["none", "full"] = "none"  # none: each holds it all | full: a part (FSDP2)
    num_cpus: float = 1.0  # each rank
    num_gpus: float = 0.0  # each rank
    labels: dict[str, str] = field(default_factory=dict)  # of the machines it may be on
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights, of every role
    autocast: bool = False  # bfloat16 over float32 weights, in warm starts too; its head float32
    gradient_checkpointing: bool = False  # recompute each layer's activations: less memory
    micro_batch_size: int = 64  # sequences at once
    micro_batch_tokens: int = 0  # padded tokens at once; 0: no limit
    logits_mib: int = 256  # MiB of float32 logits at once
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.0  # decoupled
    max_grad_norm: float = 1.0  # gradients are scaled down to it


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in the place of full training (PEFT)."""

    rank: int = 0  # 0: full training
    alpha: float = 32.0  # the adapter counts alpha/rank times
    target_modules: list[str] = field(default_factory=list)  # none: every linear layer of a block
    peft: dict[str, Any] = field(default_factory=dict)  # passed on to peft.LoraConfig


@dataclass(frozen=True)
class SyncConfig:
    method: SyncMethod = "object_store"  # object_store | directory (files) | adapter (LoRA alone)
    path: str | None = None  # of the files, for learner and workers; null: in the run's directory
    tolerance: float = 1e-4  # nats; the largest |rollout − learner| log-probability allowed


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 40  # steps; 0: only before and after
    num_prompts: int = 512  # held-out prompts, the first of the split
    num_samples: int = 8  # completions kept per evaluation in samples.jsonl


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 40  # steps; 0: only after the last
    keep: int = 2  # the newest so many; the best one stays beside them
    path: str | None = None  # directory or fsspec URL (s3://…), null: the run's own directory


@dataclass(frozen=True)
class CliffConfig:
    measure: bool = False  # load the base for its diagnostics where λ = 1 would need none


@dataclass(frozen=True)
class GovernorConfig:
    enabled: bool = False  # cap λ at 1 + (1 − margin)·(λ* − 1); `lam: auto` does so too
    margin: float = 0.2  # share of λ* − 1 that is kept as a distance
    decay: float = 0.9  # weight that the averages of p, b and q keep per step


@dataclass(frozen=True)
class AlarmConfig:
    """On a collapse of the contract. All actions are recorded in events.jsonl."""

    action: Literal["warn", "stop", "rollback"] = "warn"  # warn | stop | rollback
    parse_share: float = 0.5  # of the best strict parse so far: below it outputs have collapsed
    patience: int = 3  # updates in a row
    backoff: float = 0.5  # rollback: share of λ − 1 that is kept
    max_rollbacks: int = 3  # then stop


@dataclass(frozen=True)
class FaultsConfig:
    """What a run lives through, and how often."""

    max_restarts: int = 10  # of each role: rollout, teacher, learner
    backoff_s: float = 1.0  # s before a role is replaced; doubles until an update is done
    timeout_s: float = 1800.0  # s without an answer: the actor hangs
    max_dropped: float = 0.1  # share of an update's samples that may be unfit for it
    max_skipped: int = 3  # updates in a row whose loss or gradient is not finite
    skipped_action: Literal["stop", "rollback"] = "stop"  # then: stop | rollback


@dataclass(frozen=True)
class TrackingConfig:
    wandb: bool = True  # offline unless WANDB_MODE or WANDB_API_KEY say otherwise
    project: str = "listopd"  # in W&B
    group: str | None = None  # in W&B; null: the study, search or demo that a run is part of
    job_type: str = "train"  # in W&B; those of a study, search or demo say so
    artifact: bool = False  # give W&B the final student too


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Symbols as in the README's glossary."""

    name: str = "train"  # the key under which a run is found again
    out: str = "runs"  # a run lives in <out>/<name>
    cache: str = "cache"  # warm starts and evaluations, by content hash
    seed: int = 0  # warm start, prompt order, sampling
    device: Literal["cpu", "cuda"] = "cpu"  # cpu | cuda
    num_threads: int | None = None  # of each role and warm start; null: as many as its num_cpus
    autoscaling_wait_s: float = 0.0  # s to wait for machines; 0: the cluster is as large as it is

    lam: int | float | str = 1.0  # λ; auto: as high as the governor allows
    lam_schedule: Schedule = field(default_factory=lambda: Schedule(initial=1.0, final=1.0))
    clip: float = 2.0  # c; .inf: no clip
    prediction: str | None = None  # prediction.json of `listopd calibrate`
    extrapolation: Literal["plain", "bounded"] = "plain"  # plain | bounded
    delta: float = 0.5  # δ of the bounded form
    estimator: Literal["sampled", "topk"] = "sampled"  # topk: over scoring.support_size tokens
    importance: Literal["clip", "truncate", "gate"] = "clip"  # of learner/sampler
    ratio_clip: float = 0.2  # ε of clip: pessimistic beyond 1 ± ε
    ratio_cap: float = 2.0  # of truncate: at most so much; of gate: none beyond it or its inverse
    max_staleness: int = 0  # 0: on-policy; 1: generate the next batch while the learner works
    num_prompts: int = 64  # an update
    group_size: int = 1  # samples per prompt
    num_steps: int = 120  # updates
    lr: float = 1e-3  # AdamW's learning rate
    lr_schedule: Schedule = field(default_factory=Schedule)

    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: ModelConfig = field(default_factory=ModelConfig)
    teachers: dict[str, str] = field(default_factory=dict)  # name → checkpoint; examples say which
    base: BaseConfig = field(default_factory=BaseConfig)
    warmstart_workers: int = 1  # Ray Train workers
    demo_seeds: list[int] = field(default_factory=lambda: [0])  # of `listopd demo` only
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scoring: TeacherActorConfig = field(default_factory=TeacherActorConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cliff: CliffConfig = field(default_factory=CliffConfig)
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    trace: bool = False  # write trace.json, where the time goes: for ui.perfetto.dev


PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size")  # of `rollout.engine`: processes
PLAIN_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
NOT_NEGATIVE = (
    "autoscaling_wait_s",
    "faults.max_restarts",
    "faults.backoff_s",
    "alarm.max_rollbacks",
    "seed",
    "lam_schedule.initial",
    "lam_schedule.final",
    "lr_schedule.initial",
    "lr_schedule.final",
    "data.max_bad_rows",
    "evaluation.every",
    "evaluation.num_samples",
    "checkpoint.every",
    "learner.micro_batch_tokens",
    "lora.rank",
    "scoring.support_size",
    *(
        f"{role}.{key}"
        for role in ("rollout", "scoring", "learner")
        for key in ("num_cpus", "num_gpus")
    ),
    *(
        f"{role}.warmstart.{key}"
        for role in ("student", "teacher")
        for key in ("num_steps", "warmup_steps", "seed", "prompt_loss_weight", "weight_decay")
    ),
)


def load_config(schema: type[T], arguments: list[str]) -> T:
    """Read `[conf.yaml …] [key=value …]` over the defaults of `schema` (a frozen dataclass).

    Raises ListopdError, in one line that names the file or key, for a file that is missing or not
    YAML, an unknown key (with the nearest valid one), a wrong type, or a value out of range.
    """
    config: Any = _defaults(schema)  # type: ignore[arg-type]
    for argument in arguments:
        shown = " ".join(argument.split())  # an error is one line
        is_pair = "=" in argument
        if not is_pair and not argument.endswith((".yaml", ".yml")):
            raise ListopdError(f"'{shown}' is neither key=value nor a YAML file")
        try:
            layer = OmegaConf.from_dotlist([argument]) if is_pair else OmegaConf.load(argument)
            if "from_" in config and isinstance(layer, DictConfig) and "from" in layer:
                layer["from_"] = layer.pop("from")  # Python has no field called from
            if not is_pair and isinstance(layer, DictConfig) and issubclass(schema, Config):
                for section in set(JOB_SECTIONS) - set(config):
                    layer.pop(section, None)  # a job's file serves for a single run of it too
            config = OmegaConf.merge(config, layer)
        except FileNotFoundError:
            raise ListopdError(f"{shown}: no such file") from None
        except OmegaConfBaseException as error:
            raise ListopdError(f"{shown}: {_first_line(error)}") from None
        except Exception as error:  # a YAML parser's error has no common base in OmegaConf
            raise ListopdError(f"{shown}: {' '.join(str(error).split())}") from None
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ListopdError(_first_line(error)) from None
    if isinstance(result, Config):
        _validate(result)
    return result  # type: ignore[return-value]


@cache
def _defaults(schema: type) -> DictConfig:
    """Never changed: every merge makes another."""
    return OmegaConf.structured(schema)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A run's configuration with other values by dotted key; raises ListopdError as `load_config`.

    Sections that a subclass of Config adds are left out.
    """
    names = [field.name for field in dataclasses.fields(Config)]
    plain = OmegaConf.structured(Config(**{name: getattr(config, name) for name in names}))
    layer = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(layer, key, value)
    try:
        plain = OmegaConf.merge(plain, layer)
    except OmegaConfBaseException as error:
        raise ListopdError(_first_line(error)) from None
    result = OmegaConf.to_object(plain)
    _validate(result)  # type: ignore[arg-type]
    return result  # type: ignore[return-value]


def resolved(config: Any) -> dict[str, Any]:
    """Every key of a configuration, nested, without secrets."""
    return redacted(OmegaConf.to_container(OmegaConf.structured(config)))


def dump_config(config: Any) -> str:
    """`resolved` as YAML; `load_config` reads it back."""
    return OmegaConf.to_yaml(resolved(config))


def exact(value: Any) -> str:
    """As short as it can be without being another's."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def run_directory(config: Config) -> Path:
    return Path(config.out) / config.name


def sync_directory(config: Config) -> Path:
    """Absolute; of this run alone, for the files of its weights on their way to the workers."""
    run = run_directory(config).absolute()
    if config.sync.path is None:
        return run / "sync"
    digest = hashlib.sha256(str(run).encode()).hexdigest()[:8]
    return Path(config.sync.path).absolute() / f"{config.name}-{digest}"


def schedule_value(schedule: Schedule, target: float, step: int, num_steps: int) -> float:
    """The scheduled value at `step` (0-based) of `num_steps`; `target` is the full value."""
    if schedule.kind == "warmup" and step < schedule.steps:
        return schedule.initial + (target - schedule.initial) * (step + 1) / schedule.steps
    if schedule.kind == "linear" and num_steps > 1:
        return target + (schedule.final - target) * step / (num_steps - 1)
    return target


def max_num_seqs(config: Config) -> int:
    """Samples that one rollout worker decodes at once."""
    share = math.ceil(config.num_prompts * config.group_size / config.rollout.num_workers)
    return config.rollout.max_num_seqs or min(share, 256)


def needs_base(config: Config) -> bool:
    """Whether some step extrapolates (λ ≠ 1), or the diagnostics ask for the base."""
    if config.cliff.measure or isinstance(config.lam, str):
        return True
    lams = (
        schedule_value(config.lam_schedule, config.lam, step, config.num_steps)
        for step in range(config.num_steps)
    )
    return any(lam != 1.0 for lam in lams)


def learner_scores_base(config: Config) -> bool:
    """Whether the base is the student without its adapter: nobody else need hold a copy."""
    return config.lora.rank > 0 and config.base.path is None and needs_base(config)


def _first_line(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    message = str(error).splitlines()[0]
    return message if not key or f"'{key}'" in message else f"{key}: {message}"


def _validate(config: Config) -> None:
    def require(holds: object, key: str, rule: str) -> None:
        if not holds:
            raise ListopdError(f"{key}: {rule}")

    if isinstance(config.lam, str):
        require(config.lam == "auto", "lam", "must be a number or auto")
        constant = config.lam_schedule.kind == "constant"
        require(constant, "lam", "auto needs lam_schedule.kind=constant")
        require(math.isfinite(config.clip), "lam", "auto needs a finite clip")
        require(config.extrapolation == "plain", "lam", "auto needs extrapolation=plain")
    else:
        require(math.isfinite(config.lam) and config.lam >= 0, "lam", "λ must be finite and ≥ 0")
    if config.governor.enabled:
        plain = config.extrapolation == "plain"
        require(plain, "governor.enabled", "needs extrapolation=plain")
        require(math.isfinite(config.clip), "governor.enabled", "needs a finite clip")
    shares = ("governor.margin", "governor.decay", "alarm.backoff", "alarm.parse_share")
    for key in (*shares, "faults.max_dropped"):
        require(0 <= attrgetter(key)(config) < 1, key, "must lie in [0, 1)")
    require(config.clip > 1, "clip", "c must be > 1 (.inf for no clip)")
    require(0 <= config.delta <= 1, "delta", "δ must lie in [0, 1]")
    require(config.ratio_clip > 0, "ratio_clip", "ε must be > 0")
    require(1 < config.ratio_cap < math.inf, "ratio_cap", "must be finite and > 1")
    has_support = config.estimator == "sampled" or config.scoring.support_size > 1
    require(has_support, "scoring.support_size", "estimator=topk needs at least 2 tokens")
    alpha = config.lora.alpha
    require(math.isfinite(alpha) and alpha > 0, "lora.alpha", "must be finite and > 0")
    for key in ("lora_dropout", "modules_to_save", "bias", "use_dora"):
        rule = "no: neither engine nor merge can follow"
        require(not config.lora.peft.get(key), f"lora.peft.{key}", rule)
    is_float32 = config.learner.dtype == "float32"
    require(is_float32 or not config.learner.autocast, "learner.autocast", "needs dtype=float32")
    bounded_without_clip = config.extrapolation == "bounded" and math.isinf(config.clip)
    require(not bounded_without_clip, "clip", "extrapolation=bounded needs a finite c")
    require(config.max_staleness in (0, 1), "max_staleness", "must be 0 or 1")
    require(math.isfinite(config.lr) and config.lr > 0, "lr", "must be finite and > 0")
    for key in AT_LEAST_ONE:
        value = attrgetter(key)(config)
        require(value is None or value >= 1, key, "must be ≥ 1")
    for key in NOT_NEGATIVE:
        value = attrgetter(key)(config)
        valid = value is None or (math.isfinite(value) and value >= 0)
        require(valid, key, "must be finite and ≥ 0")
    require(config.seed < 1 << 63, "seed", "must be < 2^63")
    require(config.num_steps < 10**9, "num_steps", "must be < 10^9")
    unsafe = {"trust_remote_code": (False,), "load_format": ("safetensors", "dummy")}
    for role, engine in (("rollout", config.rollout.engine), ("scoring", config.scoring.engine)):
        for key, allowed in unsafe.items():
            rule = "no code and no pickles from checkpoints"
            require(engine.get(key, allowed[0]) in allowed, f"{role}.engine.{key}", rule)
    _validate_teachers(config, require)
    for role in ("rollout", "scoring", "learner"):
        section = getattr(config, role)
        require(section.num_cpus or section.num_gpus, f"{role}.num_cpus", "or num_gpus must be > 0")
        for key, label in section.labels.items():
            is_plain = isinstance(label, str) and PLAIN_LABEL.fullmatch(label)
            is_plain = is_plain and PLAIN_LABEL.fullmatch(key.rpartition("/")[2])
            require(is_plain, f"{role}.labels.{key}", "must be a plain label, ≤ 63 characters")
    grammar_without_vllm = config.rollout.grammar and config.rollout.backend != "vllm"
    require(not grammar_without_vllm, "rollout.grammar", "needs rollout.backend=vllm")
    timeout = config.faults.timeout_s
    require(0 < timeout < 1e9, "faults.timeout_s", "must be > 0 and finite")
    adapter_without_one = config.sync.method == "adapter" and config.lora.rank == 0
    require(not adapter_without_one, "sync.method", "adapter needs lora.rank ≥ 1")
    alone = all(config.rollout.engine.get(key, 1) == 1 for key in PARALLEL)
    rule = "object_store does not reach an engine's other processes: directory does"
    require(alone or config.sync.method != "object_store", "sync.method", rule)
    tolerance = config.sync.tolerance
    require(math.isfinite(tolerance) and tolerance > 0, "sync.tolerance", "must be finite and > 0")
    require(config.learner.max_grad_norm > 0, "learner.max_grad_norm", "must be > 0")
    for key, beta in (("beta1", config.learner.beta1), ("beta2", config.learner.beta2)):
        require(0 <= beta < 1, f"learner.{key}", "must lie in [0, 1)")
    for key, schedule in (
        ("lam_schedule", config.lam_schedule),
        ("lr_schedule", config.lr_schedule),
    ):
        require(schedule.kind != "warmup" or schedule.steps >= 1, f"{key}.steps", "must be ≥ 1")
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        noise = model.warmstart.format_noise
        require(0 <= noise < 1, f"{role}.warmstart.format_noise", "must lie in [0, 1)")
        require(model.hidden_size % 32 == 0, f"{role}.hidden_size", "must be a multiple of 32")
    named = "/" not in config.name and config.name not in ("", ".", "..")
    named = named and config.name.isprintable() and len(config.name.encode()) <= 200
    require(named, "name", "must be a plain name of at most 200 bytes")


def _validate_teachers(config: Config, require: Callable[[object, str, str], None]) -> None:
    scoring = config.scoring
    for key in ("temperature", "id_temperature"):
        temperature = getattr(scoring, key)
        valid = math.isfinite(temperature) and temperature > 0
        require(valid, f"scoring.{key}", "must be finite and > 0")
    require(0 <= scoring.uniform_share < 1, "scoring.uniform_share", "must lie in [0, 1)")
    as_it_is = {"temperature": 1.0, "id_temperature": 1.0, "uniform_share": 0.0}
    for key, value in as_it_is.items():  # the whole distribution is reshaped
        plain = scoring.backend == "hf" or getattr(scoring, key) == value
        require(plain, f"scoring.{key}", "needs scoring.backend=hf")
    for name, path in config.teachers.items():
        require(name.strip() and path.strip(), f"teachers.{name}", "give a name and a checkpoint")


def describe_keys(schema: type) -> list[tuple[str, str, str]]:
    """(key, default, comment) of every key of a config class; comments are this very source's."""
    return list(_describe(_defaults(schema), prefix=""))


def _describe(section: DictConfig, prefix: str) -> Iterator[tuple[str, str, str]]:
    schema = OmegaConf.get_type(section) or dict
    comments: dict[str, str] = {}
    for ancestor in schema.__mro__[-2::-1]:  # the class itself last: its own comment wins
        source = inspect.getsource(ancestor)
        comments |= re.findall(r"^    (\w+):.*?  # (.*)$", source, re.MULTILINE)
    types = get_type_hints(schema)
    for name, value in section.items():
        key = str(name)
        if isinstance(value, DictConfig) and OmegaConf.get_type(value) is not dict:
            yield from _describe(value, f"{prefix}{key}.")
        else:
            default = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            shown = "null" if default is None else str(default)
            yield f"{prefix}{key.rstrip('_')}", shown, comments.get(key, "")
        for element in get_args(types.get(key)):
            if dataclasses.is_dataclass(element):  # of a mapping name → section
                yield from _describe(OmegaConf.structured(element), f"{prefix}{key}.NAME.")
