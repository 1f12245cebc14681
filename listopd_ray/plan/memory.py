"""Peak memory of every role, in bytes, from shapes alone.

Left out: what a restart holds in passing (a checkpoint is read beside the weights it replaces), and
Ray's own processes. B sequences · L = P + T their longest prompt and completion · H, I, q, k, V as
in `Shape`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from listopd_ray.config import Config, learner_scores_base, needs_base
from listopd_ray.plan.shapes import Shape

MIB = 1 << 20
BYTES = {"float32": 4, "bfloat16": 2}

# Measured (tests/bench/plan.py, case tiny): interpreter, libraries, tokenizer, and how much of that
# are files that the processes of a machine share.
PROCESS = {"learner": 650 * MIB, "rollout": 830 * MIB, "scoring": 630 * MIB, "driver": 750 * MIB}
LIBRARIES = 300 * MIB
# Assumed, no GPU was at hand: context and libraries on the GPU, and the process beside it.
ON_GPU, BESIDE_GPU = 1024 * MIB, 3072 * MIB
# On the CPU freed blocks up to KEPT_BLOCK (set in cluster.py) stay in the heap, and aligned ones of
# the same size do not fit their holes (glibc 2.36). Measured: 0.7 bytes of holes for one of
# activations, 0.9 for one of weights that vLLM loads anew. torch's own on GPUs: a tenth, assumed.
KEPT_BLOCK = 128 * MIB
HOLES, RELOAD_HOLES, GPU_HOLES = 0.7, 0.9, 0.1
RELOAD_HEADS = 2  # of a head that vLLM loads anew: as it comes and as it is packed

EVALUATED_AT_ONCE = 128  # the teacher's own completions (roles/teacher.py)
SCORED_MIB = 256  # of float32 logits at once in a teacher (roles/scoring.py)

# Bytes that autograd keeps for a layer and token, as multiples of H, q, k, I and, where queries and
# keys are normed, again q and k. Counted with torch.autograd.graph.saved_tensors_hooks under
# transformers 5.19 (tests/unit/test_plan.py counts again).
KEPT = {
    ("float32", False): (24, 8, 8, 16, 8, 8),
    ("bfloat16", False): (16, 4, 4, 8, 6, 6),
    ("autocast", False): (26, 4, 4, 8, 6, 6),
    ("float32", True): (16, 8, 8, 16, 4, 4),  # with an adapter
    ("bfloat16", True): (28, 8, 4, 10, 4, 4),  # PEFT's own weights are float32
    ("autocast", True): (18, 6, 4, 8, 4, 4),
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes of one actor."""

    parameters: float = 0.0
    optimizer: float = 0.0
    gradients: float = 0.0
    base: float = 0.0  # a copy of the base model
    kv_cache: float = 0.0
    activations: float = 0.0
    logits: float = 0.0  # and gradients of the head, in blocks that are given back
    transit: float = 0.0  # weights on their way, likewise, at another time
    holes: float = 0.0  # what the allocator loses
    process: float = 0.0  # libraries and interpreter

    @property
    def passing(self) -> float:
        return max(self.logits, self.transit)

    @property
    def total(self) -> float:
        kept = sum(getattr(self, field.name) for field in fields(self))
        return kept - self.logits - self.transit + self.passing


@dataclass(frozen=True, kw_only=True)
class Models:
    """Shapes and lengths of a run."""

    student: Shape
    teachers: dict[str, Shape]  # by name
    base: Shape
    prompt: int  # P
    completion: int  # T

    @property
    def length(self) -> int:
        return self.prompt + self.completion


def per_token(shape: Shape, mode: str, *, has_adapter: bool) -> int:
    """Bytes kept for the backward pass of one layer, a token. `mode`: float32, bfloat16 or
    autocast."""
    hidden, query, key, inner, normed_query, normed_key = KEPT[mode, has_adapter]
    kept = (
        hidden * shape.hidden + query * shape.query + key * shape.key + inner * shape.intermediate
    )
    if shape.normed:
        kept += normed_query * shape.query + normed_key * shape.key
    return kept


def micro_batch(config: Config, length: int) -> int:
    """Sequences that the learner, or one rank of it, takes at once."""
    learner, samples = config.learner, config.num_prompts * config.group_size
    rows = min(learner.micro_batch_size, -(-samples // learner.num_ranks))
    fits = learner.micro_batch_tokens // length if learner.micro_batch_tokens else rows
    return max(1, min(rows, fits))


def fed_tokens(config: Config, models: Models, shape: Shape, samples: int, ranks: int = 1) -> int:
    """Tokens of so many samples, which `ranks` learners divide with the others of their prompt."""
    together = max(1, config.group_size // ranks) if shape.shares_prompts else 1
    return -(-samples // together) * models.prompt + samples * models.completion


def learner_memory(config: Config, models: Models, rank: int = 0) -> tuple[Memory, Memory]:
    """Of a rank: on its device, and in main memory beside a GPU."""
    learner, shape = config.learner, models.student
    size, shards = BYTES[learner.dtype], learner.num_ranks if learner.sharding == "full" else 1
    has_adapter = config.lora.rank > 0
    trained = shape.adapter * 4 if has_adapter else shape.parameters * size
    weights = shape.parameters * size + (trained if has_adapter else 0)
    published = shape.parameters * size if config.sync.method != "adapter" else trained
    on_gpu, exported = config.device == "cuda", shape.parameters * size
    layers = _layers(config, models)
    if learner.autocast and (shards == 1 or has_adapter):  # bfloat16 copies of all matrices
        layers += 2 * shape.body
    if shards > 1:  # whole again: two layers, embedding and head
        layers += 2 * shape.layer * (2 if learner.autocast else size)
        layers += (shape.parameters - shape.body) * size
    head, is_kept = _head(config, models), not on_gpu and 4 * shape.head <= KEPT_BLOCK
    device = Memory(
        parameters=weights / shards,
        optimizer=2 * trained / shards,
        gradients=trained / shards,
        activations=layers + (head if is_kept else 0),
        logits=0.0 if is_kept else head,
        holes=layers * (GPU_HOLES if on_gpu else HOLES),
        transit=0.0 if on_gpu or rank else max(published, 2 * exported),
        process=ON_GPU if on_gpu else PROCESS["learner"],
    )
    if rank:  # rank 0 alone collects
        return device, Memory(process=BESIDE_GPU)
    # An export is there as files and as the message they travel in; from a GPU as tensors too, as
    # is what goes into a checkpoint: weights and both moments.
    transit = max(published, 3 * trained, 3 * exported)
    return device, Memory(transit=transit, process=BESIDE_GPU)


def _layers(config: Config, models: Models) -> float:
    """Activations of a micro-batch until they are needed for the gradient."""
    learner, shape = config.learner, models.student
    mode = "autocast" if learner.autocast else learner.dtype
    rows = micro_batch(config, models.length)
    tokens = fed_tokens(config, models, shape, rows, learner.num_ranks)
    layer = per_token(shape, mode, has_adapter=config.lora.rank > 0) * tokens
    hidden = BYTES[learner.dtype] * shape.hidden * tokens
    if learner.gradient_checkpointing:
        return shape.num_layers * hidden + layer + 2 * hidden
    return shape.num_layers * layer + 2 * hidden  # of the last norm


def _head(config: Config, models: Models) -> float:
    """A chunk of logits and their gradient; the gradient of the head and a chunk's share of it, in
    float32; on the CPU a bfloat16 head in float32."""
    learner, shape = config.learner, models.student
    answers = micro_batch(config, models.length) * models.completion
    rows = min(answers, max(1, (learner.logits_mib << 20) // (4 * shape.vocab)))
    copies = 0 if config.lora.rank > 0 else 2
    copies += learner.dtype == "bfloat16" and config.device == "cpu"
    return 4 * (2 * rows * shape.vocab + copies * shape.head)


def rollout_memory(config: Config, models: Models) -> tuple[Memory, Memory]:
    """Of one worker, as `learner_memory`."""
    rollout, shape = config.rollout, models.student
    samples = config.num_prompts * config.group_size
    seqs = rollout.max_num_seqs or min(256, -(-samples // rollout.num_workers))
    dtype = rollout.dtype or config.learner.dtype
    if rollout.backend == "hf":
        return _on(config, "rollout", _transformers(config, shape, models, dtype, seqs))
    cache = (rollout.kv_cache_mib or 0) << 20
    memory = _engine(config, shape, models, dtype, seqs, cache, rollout.engine)
    return _on(config, "rollout", memory)


def scoring_memory(config: Config, models: Models, teacher: Shape) -> tuple[Memory, Memory]:
    """Of an actor with this teacher, as `learner_memory`."""
    scoring, samples = config.scoring, config.num_prompts * config.group_size
    dtype = scoring.dtype or config.learner.dtype
    size = BYTES[dtype]
    rows = min(scoring.micro_batch_size, -(-samples // config.rollout.num_workers))
    if scoring.backend == "vllm":
        seqs = scoring.engine.get("max_num_seqs", rows)
        memory = _engine(config, teacher, models, dtype, seqs, None, scoring.engine)
    else:  # its own completions at the end take more than scoring, or the other way round
        evaluated = min(EVALUATED_AT_ONCE, config.evaluation.num_prompts)
        memory = _transformers(config, teacher, models, dtype, evaluated)
    has_base = needs_base(config) and not learner_scores_base(config)
    # Without a base the student is here for once, at the start-up gate.
    visitor = 0 if has_base else size * models.student.parameters
    scored = 3 * min(4 * rows * models.completion * teacher.vocab, SCORED_MIB << 20)
    forward = fed_tokens(config, models, teacher, rows) * _passing(teacher, size)
    return _on(
        config,
        "scoring",
        replace(
            memory,
            base=size * models.base.parameters if has_base else 0,
            activations=max(memory.activations, forward),
            logits=max(memory.logits, scored + visitor),
            transit=0,
        ),
    )


def driver_memory(config: Config, models: Models) -> Memory:
    """The exported student passes through it as files."""
    exported = models.student.parameters * BYTES[config.learner.dtype]
    return Memory(transit=exported, process=PROCESS["driver"])


def object_store(config: Config, models: Models) -> float:
    """Bytes on every machine with a learner or rollout worker: this version and the next."""
    if config.sync.method != "object_store":
        return 0.0
    return 2 * models.student.parameters * BYTES[config.learner.dtype]


def _on(config: Config, section: str, memory: Memory) -> tuple[Memory, Memory]:
    """With what the process and its allocator take."""
    on_gpu = config.device == "cuda"
    holes = memory.holes + memory.activations * (GPU_HOLES if on_gpu else HOLES)
    process = ON_GPU if on_gpu else PROCESS[section]
    return replace(memory, holes=holes, process=process), Memory(process=BESIDE_GPU)


def _passing(shape: Shape, size: int) -> int:
    """Bytes a token that a forward pass holds at once, in the MLP of one layer."""
    return size * (3 * shape.hidden + 4 * shape.intermediate)


def _transformers(config: Config, shape: Shape, models: Models, dtype: str, seqs: int) -> Memory:
    """A model of transformers that samples `seqs` completions at once. Of a step's logits there are
    the log-probabilities too, and in double precision their exponentials and the sums of these."""
    size = BYTES[dtype]
    return Memory(
        parameters=size * shape.parameters,
        kv_cache=cache_bytes(shape, size, seqs, models.length),
        activations=seqs * models.prompt * _passing(shape, size),
        logits=(4 + 4 + 8 + 8) * seqs * shape.vocab,
    )


def _engine(
    config: Config,
    shape: Shape,
    models: Models,
    dtype: str,
    seqs: int,
    cache: int | None,
    engine: dict,
) -> Memory:
    """vLLM's, on each of the GPUs that share it."""
    size, parts = BYTES[dtype], engine.get("tensor_parallel_size", 1)
    on_gpu = config.device == "cuda"
    weights = size * (shape.parameters if on_gpu else shape.packed)
    tokens = max(models.length, min(2048, seqs * models.prompt))  # a step's prompts
    is_kept = not on_gpu and size * shape.head <= KEPT_BLOCK
    heads = RELOAD_HEADS * size * shape.head / parts
    reloaded = weights if is_kept else size * shape.body
    lost = 0 if is_kept or on_gpu else size * shape.head  # measured, of a head that is given back
    return Memory(
        parameters=weights / parts,
        kv_cache=(cache or cache_bytes(shape, size, seqs, models.length)) / parts,
        activations=tokens * _passing(shape, size) / parts,
        logits=3 * 4 * max(seqs, models.length) * shape.vocab,  # of samples or of the canary
        transit=0 if is_kept else heads,
        holes=0 if on_gpu else RELOAD_HOLES * reloaded + (heads if is_kept else lost),
    )


def cache_bytes(shape: Shape, size: int, seqs: int, length: int) -> int:
    """Keys and values of `seqs` sequences."""
    return seqs * length * 2 * shape.key * shape.num_layers * size
