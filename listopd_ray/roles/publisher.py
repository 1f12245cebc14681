"""The learner's side of a weight sync: every version as tensors, or as files of their own."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from listopd_ray.roles.student import Student
from listopd_ray.roles.weights import CHECKPOINT_FILE
from listopd_ray.types import ListopdError, SyncMethod, Weights


class Publisher:
    """Publishes the student. Files of a version are in a directory that is never written again,
    since readers map them into memory; it goes once all workers have loaded the next version."""

    def __init__(
        self, student: Student, method: SyncMethod, directory: Path | None, *, is_first: bool = True
    ) -> None:
        """`directory` is this learner's alone: what a process before has left there is removed.
        None will do for `object_store`. `is_first`: of the learner's ranks, which all publish and
        one of which writes."""
        self._student, self._method, self._is_first = student, method, is_first
        self._directory = directory if is_first else None
        self._count = 0
        self._kept: Path | None = None  # the newest version's, which workers may still be reading
        self.close()

    @torch.no_grad()
    def publish(
        self,
        policy_version: int,
        canary_ids: np.ndarray,
        canary_logprobs: np.ndarray,
        *,
        since: float,
    ) -> Weights | None:
        """The student as it is now, in the first rank. Every worker must have loaded what was
        published before.

        `since`: when publishing began, by `time.perf_counter`."""
        tensors = self._student.adapter() if self._method == "adapter" else self._copies()
        if not self._is_first:
            return None
        path, files, arrays = None, dict[str, int](), dict[int, np.ndarray]()
        if self._method == "object_store":
            arrays = {id(tensor): _to_numpy(tensor) for tensor in tensors.values()}
        else:
            path = self._write(policy_version, tensors)
            files = {file.name: file.stat().st_size for file in path.iterdir()}
        return Weights(
            policy_version=policy_version,
            method=self._method,
            tensors={name: arrays[id(tensor)] for name, tensor in tensors.items() if arrays},
            path=str(path) if path else None,
            files=files,
            dtype=self._student.dtype_name,
            canary_ids=canary_ids,
            canary_logprobs=canary_logprobs,
            num_bytes=sum(files.values()) + sum(array.nbytes for array in arrays.values()),
            seconds=time.perf_counter() - since,
        )

    def close(self) -> None:
        """Remove all files."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _copies(self) -> dict[str, torch.Tensor]:
        """Of all weights, on the CPU, in the first rank. A tied head is the embedding's copy, which
        travels once, but for files, which cannot say so."""
        copies, source, copy = dict[str, torch.Tensor](), None, torch.empty(0)
        for name, tensor in self._student.tensors():  # in every rank
            if not self._is_first:
                continue
            if tensor is not source or self._method == "directory":
                source, copy = tensor, tensor.to("cpu", copy=True)
            copies[name] = copy
        return copies

    def _write(self, policy_version: int, tensors: dict[str, torch.Tensor]) -> Path:
        """Whole or not at all, and in another place each time: after a roll-back a version comes
        again, with other weights."""
        assert self._directory is not None
        self._count += 1
        target = self._directory / f"{self._count:06d}-v{policy_version}"
        partial = target.with_suffix(".tmp")
        try:
            partial.mkdir(parents=True)
            if self._method == "adapter":
                self._student.write_adapter(partial, tensors)
            else:
                save_file(tensors, partial / CHECKPOINT_FILE)
            partial.rename(target)
            for old in self._directory.iterdir():
                if old not in (target, self._kept):
                    shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ListopdError(f"sync.path: {target}: {reason}") from error
        self._kept = target
        return target


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
