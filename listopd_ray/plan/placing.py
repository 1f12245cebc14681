"""Which machine and GPU every actor may get, and whether its memory fits there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from listopd_ray.config import Config
from listopd_ray.job_config import Machine
from listopd_ray.plan.memory import LIBRARIES, Memory
from listopd_ray.types import ListopdError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Actor:
    """One actor of a run, or the driver."""

    name: str  # "learner 0"
    section: str  # of the configuration; "driver"
    device: Memory  # on each of its GPUs; without any, in main memory
    host: Memory  # in main memory beside GPUs


@dataclass
class Node:
    """One machine, and who is on it."""

    name: str
    machine: Machine
    memory_gib: float
    free: list[float]  # of each GPU, its share that nobody has yet
    on_gpu: list[list[Actor]]
    on_host: list[tuple[Actor, Memory]] = field(default_factory=list)  # and what of it is there

    def need(self, store: float, *, together: bool) -> float:
        """Bytes of main memory, with those of the object store; libraries once. Unless all roles
        work at the same time (`together`), what comes and goes is there for one of them."""
        if not self.on_host:
            return 0.0
        memories = [memory for _, memory in self.on_host]
        need = sum(memory.total for memory in memories) + store
        if not together:
            passing = defaultdict[str, float](float)
            for actor, memory in self.on_host:
                passing[actor.section] += memory.passing
            need -= sum(passing.values()) - max(passing.values())
        return need - LIBRARIES * (len(memories) - 1)


def nodes_of(machines: dict[str, Machine], memory_gib: float) -> list[Node]:
    """`memory_gib`: of a machine that does not say."""
    return [
        Node(
            name=name if machine.count == 1 else f"{name} {number}",
            machine=machine,
            memory_gib=machine.memory_gib or memory_gib,
            free=[1.0] * machine.num_gpus,
            on_gpu=[[] for _ in range(machine.num_gpus)],
        )
        for name, machine in machines.items()
        for number in range(machine.count)
    ]


def place(config: Config, actors: Sequence[Actor], nodes: list[Node]) -> None:
    """Spread them as Ray does: over the machines with most room, several on a GPU where their
    shares allow it. Ray knows nothing of bytes, so nor does this.

    Raises ListopdError where there are too few machines or GPUs.
    """
    for actor in actors:
        if actor.section == "driver":
            nodes[0].on_host.append((actor, actor.device))
            continue
        section = getattr(config, actor.section)
        suited = [n for n in nodes if section.labels.items() <= n.machine.labels.items()]
        if not suited:
            labels = ", ".join(f"{key}={value}" for key, value in section.labels.items())
            raise ListopdError(f"{actor.name}: no machine of plan.machines has {labels}")
        if config.device == "cpu":
            node = min(suited, key=lambda n: len(n.on_host))
            node.on_host.append((actor, actor.device))
            continue
        share = section.num_gpus
        if not share:
            raise ListopdError(f"{actor.section}.num_gpus: 0 although device=cuda")
        suited = [n for n in suited if len(_gpus(n, share)) * min(share, 1.0) >= share - 1e-9]
        if not suited:
            raise ListopdError(f"{actor.name}: needs {share:g} GPU, and none is left for it")
        node = max(suited, key=lambda n: sum(n.free))
        taken = _gpus(node, share)[: max(1, round(share))]
        for gpu in taken:
            node.free[gpu] -= min(share, 1.0)
            node.on_gpu[gpu].append(actor)
        node.on_host.append((actor, actor.host))


def _gpus(node: Node, share: float) -> list[int]:
    """Those with room for it, the fullest first."""
    room = [g for g, free in enumerate(node.free) if free >= min(share, 1.0) - 1e-9]
    return sorted(room, key=lambda gpu: node.free[gpu])


def check(nodes: Sequence[Node], store: float, *, together: bool) -> None:
    """Raises ListopdError for the first GPU or machine whose memory does not do. `store` are the
    bytes of the object store on a machine with actors, `together` is as in `Node.need`."""
    for node in nodes:
        for number, actors in enumerate(node.on_gpu):
            needs = [(actor, actor.device) for actor in actors]
            place, have = f"GPU {number} of {node.name}", node.machine.gpu_memory_gib
            _check(place, "GPU memory", needs, sum(m.total for _, m in needs), have)
        need = node.need(store, together=together)
        _check(node.name, "main memory", node.on_host, need, node.memory_gib)


def _check(
    place: str, what: str, needs: Sequence[tuple[Actor, Memory]], need: float, have_gib: float
) -> None:
    if need <= have_gib * GIB:
        return
    largest, memory = max(needs, key=lambda pair: pair[1].total)
    whole = f" ({need / GIB:.1f} with all that is there)" if len(needs) > 1 else ""
    raise ListopdError(
        f"{largest.name}: needs {memory.total / GIB:.1f} GiB of {what}{whole}, "
        f"{place} has {have_gib:g} GiB"
    )
