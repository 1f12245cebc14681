"""An optimizer's moments as named tensors, whole where they are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.optim import Optimizer

from listopd_ray.roles.ranks import fill, whole


def optimizer_tensors(optimizer: Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """By number of the parameter and name of the slot: `3.exp_avg`. Every rank has to run through
    them."""
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            yield f"{index}.{slot}", whole(value)


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, torch.Tensor]) -> None:
    """What `optimizer_tensors` gave, of one with the same parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in saved.items():
        index, slot = name.split(".")
        if value.dim():  # of a parameter, and spread over the ranks as it is
            kept = torch.zeros_like(parameters[int(index)])
            fill(kept, value)
            value = kept
        slots.setdefault(int(index), {})[slot] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
