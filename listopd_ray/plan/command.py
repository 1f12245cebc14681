"""`listopd plan`: memory of every role, what fits, and seconds of an update."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from listopd_ray.config import Config
from listopd_ray.job_config import Machine, PlanConfig
from listopd_ray.plan.memory import (
    Memory,
    Models,
    driver_memory,
    learner_memory,
    micro_batch,
    object_store,
    rollout_memory,
    scoring_memory,
)
from listopd_ray.plan.placing import GIB, Actor, Node, check, nodes_of, place
from listopd_ray.plan.shapes import shape_of
from listopd_ray.plan.times import Times, estimate, rates_of
from listopd_ray.types import ListopdError

COLUMNS = {  # of the table; fields of Memory
    "weights": "parameters",
    "AdamW": "optimizer",
    "gradients": "gradients",
    "base": "base",
    "KV cache": "kv_cache",
    "activations": "activations",
    "logits": "logits",
    "in transit": "transit",
    "holes": "holes",
    "process": "process",
    "total": "total",
}
POSITIVE = (  # of a machine
    "count",
    "memory_gib",
    "gpu_memory_gib",
    "tflops",
    "tflops_float32",
    "memory_gb_s",
    "weights_gb_s",
)
COMPLETION = 40  # tokens, where nothing says


def plan(config: PlanConfig) -> None:
    """Print what the run takes; raises ListopdError where it cannot fit. Nothing is started and no
    weights are read."""
    models, machines = models_of(config), _machines(config)
    actors = actors_of(config, models)
    nodes = nodes_of(machines, _this_machine_gib())
    place(config, actors, nodes)
    store, together = object_store(config, models), config.max_staleness > 0
    print("\n".join(_heading(config, models)))
    print("\n".join(_memory_table(config, actors, store)))
    print("\n".join(_node_lines(nodes, store, together)))
    check(nodes, store, together=together)
    rates = rates_of(next(iter(machines.values())), config.device)
    if rates is None:
        print("times: give tflops and memory_gb_s of plan.machines")
    else:
        print(_times_line(config, estimate(config, models, rates)))


def models_of(config: PlanConfig) -> Models:
    """Shapes and lengths; raises ListopdError where a config.json is missing."""
    vocab = config.tokenizer.vocab_size
    student = shape_of(config.student, "student.path", vocab, config.lora)
    teachers = {"teacher": shape_of(config.teacher, "teacher.path", vocab)}
    for name, path in config.teachers.items():
        teachers[name] = shape_of(path, f"teachers.{name}", vocab)
    base = student
    if config.base.path:
        base = shape_of(config.base.path, "base.path", vocab)
    section = config.plan
    for name in ("prompt_tokens", "completion_tokens"):
        value = getattr(section, name)
        if value is not None and value < 1:
            raise ListopdError(f"plan.{name}: must be at least 1")
    return Models(
        student=student,
        teachers=teachers,
        base=base,
        prompt=section.prompt_tokens or config.data.max_prompt_tokens,
        completion=section.completion_tokens or config.rollout.max_new_tokens or COMPLETION,
    )


def actors_of(config: Config, models: Models) -> list[Actor]:
    """In the order in which Ray places them; the driver first."""
    actors = [_actor("driver", "driver", (driver_memory(config, models), Memory()))]
    for rank in range(config.learner.num_ranks):
        actors.append(_actor(f"learner {rank}", "learner", learner_memory(config, models, rank)))
    for index in range(config.rollout.num_workers):
        actors.append(_actor(f"rollout {index}", "rollout", rollout_memory(config, models)))
    for name, shape in models.teachers.items():
        for index in range(config.scoring.num_actors):
            both = scoring_memory(config, models, shape)
            actors.append(_actor(f"{name} {index}", "scoring", both))
    return actors


def _actor(name: str, section: str, both: tuple[Memory, Memory]) -> Actor:
    return Actor(name=name, section=section, device=both[0], host=both[1])


def _machines(config: PlanConfig) -> dict[str, Machine]:
    machines = config.plan.machines or {"this machine": Machine()}
    for name, machine in machines.items():
        for key in POSITIVE:
            value = getattr(machine, key)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ListopdError(f"plan.machines.{name}.{key}: must be finite and > 0")
        if machine.num_gpus < 0:
            raise ListopdError(f"plan.machines.{name}.num_gpus: must be ≥ 0")
    return machines


def _this_machine_gib() -> float:
    """Its memory, or what its container may take of it."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return min(size, math.inf if limit == "max" else int(limit)) / GIB


def _heading(config: Config, models: Models) -> list[str]:
    student, rows = models.student, micro_batch(config, models.length)
    names = {"student": student, **models.teachers}
    sizes = ", ".join(f"{name} {_count(shape.parameters)}" for name, shape in names.items())
    trained = f", adapter {_count(student.adapter)}" if config.lora.rank else ""
    return [
        f"parameters: {sizes}{trained}",
        f"at once: {rows} sequences of {models.prompt} + {models.completion} tokens in the learner",
        "",
    ]


def _memory_table(config: Config, actors: Sequence[Actor], store: float) -> list[str]:
    """GiB, one line for actors that are alike."""
    groups: dict[tuple[str, Memory, Memory], list[Actor]] = {}
    for actor in actors:
        kind = actor.name.rpartition(" ")[0] or actor.name
        groups.setdefault((kind, actor.device, actor.host), []).append(actor)
    lines = [f"{'GiB':<20}" + "".join(f"{column:>12}" for column in COLUMNS)]
    for (kind, device, host), alike in groups.items():
        name = f"{kind} × {len(alike)}" if len(alike) > 1 else kind
        on_gpu = config.device == "cuda" and kind != "driver"
        lines.append(_row(f"{name}, GPU" if on_gpu else name, device))
        if on_gpu:
            lines.append(_row("  main memory", host))
    if store:
        lines.append(f"{'object store':<20}{_gib(store):>{12 * len(COLUMNS)}}")
    return [*lines, "logits and weights in transit take turns: the larger counts", ""]


def _row(name: str, memory: Memory) -> str:
    return f"{name:<20}" + "".join(f"{_gib(getattr(memory, f)):>12}" for f in COLUMNS.values())


def _node_lines(nodes: Sequence[Node], store: float, together: bool) -> list[str]:
    lines = []
    for node in nodes:
        need = node.need(store, together=together)
        names = ", ".join(actor.name for actor, _ in node.on_host) or "nothing"
        lines.append(f"{node.name}: {need / GIB:.1f} of {node.memory_gib:.1f} GiB ({names})")
        for number, actors in enumerate(node.on_gpu):
            need = sum(actor.device.total for actor in actors)
            names = ", ".join(actor.name for actor in actors) or "nothing"
            have = node.machine.gpu_memory_gib
            lines.append(f"  GPU {number}: {need / GIB:.1f} of {have:g} GiB ({names})")
    return lines


def _times_line(config: Config, times: Times) -> str:
    parts = ", ".join(
        f"{name} {_seconds(getattr(times, name))}"
        for name in ("generate", "score", "learn", "sync")
    )
    hours = times.turn * config.num_steps / 3600
    whole = (
        f"{config.num_steps} updates {hours:.1f} h"
        if hours >= 1
        else (f"{config.num_steps} updates {times.turn * config.num_steps / 60:.1f} min")
    )
    return f"an update: {_seconds(times.turn)} ({parts}); {whole}, without evaluations"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}" if value else "–"


def _count(number: int) -> str:
    unit, name = (1e9, "G") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:.3g} {name}"
