"""The learner's ranks: several actors that take one step together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among the ranks. One alone needs no process group."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def join(rank: int, count: int, address: str, device: str) -> Ranks:
        """Wait for the others at `address`, "tcp://host:port" of rank 0."""
        if count > 1:
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=address, rank=rank, world_size=count)
        return Ranks(rank, count)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Of all ranks, in every rank."""
        if self.count == 1:
            return
        reductions = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            reductions.append(dist.all_reduce(parameter.grad, async_op=True))
        for reduction in reductions:
            reduction.wait()

    def collected(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """On the CPU: all ranks run through them, since parts may be spread, and rank 0 keeps
        them."""
        return {name: tensor.cpu() for name, tensor in tensors if self.rank == 0}

    def gathered(self, value: Any) -> list[Any]:
        """What every rank has, in their order, in every rank; pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be spread over the ranks, in one piece; every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole value into a tensor that may be spread over the ranks."""
    if isinstance(tensor, DTensor):
        mesh, value = tensor.device_mesh, value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(value, mesh, tensor.placements)
    tensor.copy_(value)
