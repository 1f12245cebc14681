"""The learner's side of a weight sync: every version as tensors, or as files of their own."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from listopd_ray.roles.weights import CHECKPOINT_FILE, export_tensors, to_arrays
from listopd_ray.types import ListopdError, SyncMethod, Weights

if TYPE_CHECKING:  # as in weights.py
    from peft import PeftModel


class Publisher:
    """Publishes one model. Files of a version are in a directory that is never written again, since
    readers map them into memory; it goes once all workers have loaded the next version."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        method: SyncMethod,
        directory: Path | None,
        dtype: str,
    ) -> None:
        """`directory` is this publisher's alone: what a process before has left there is removed.
        None will do for `object_store`.

        Raises ListopdError for an adapter that cannot be merged into its model."""
        self._model, self._method, self._directory = model, method, directory
        self._dtype = dtype
        self._count = 0
        self._kept: Path | None = None  # the newest version's, which workers may still be reading
        self.close()
        if not isinstance(model, PreTrainedModel):
            from listopd_ray.roles.adapters import check_names

            check_names(model)

    @torch.no_grad()
    def publish(
        self,
        policy_version: int,
        canary_ids: np.ndarray,
        canary_logprobs: np.ndarray,
        *,
        since: float,
    ) -> Weights:
        """The model as it is now. Every worker must have loaded what was published before.

        `since`: when publishing began, by `time.perf_counter`."""
        tensors: dict[str, np.ndarray] = {}
        path, files = None, dict[str, int]()
        if self._method == "object_store":
            tensors = to_arrays(export_tensors(self._model, getattr(torch, self._dtype)))
        else:
            path = self._write(policy_version)
            files = {file.name: file.stat().st_size for file in path.iterdir()}
        sizes = files.values() if path else (tensor.nbytes for tensor in tensors.values())
        return Weights(
            policy_version=policy_version,
            method=self._method,
            tensors=tensors,
            path=str(path) if path else None,
            files=files,
            dtype=self._dtype,  # type: ignore[arg-type]
            canary_ids=canary_ids,
            canary_logprobs=canary_logprobs,
            num_bytes=sum(sizes),
            seconds=time.perf_counter() - since,
        )

    def close(self) -> None:
        """Remove all files."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _write(self, policy_version: int) -> Path:
        """Whole or not at all, and in another place each time: after a roll-back a version comes
        again, with other weights."""
        assert self._directory is not None
        self._count += 1
        target = self._directory / f"{self._count:06d}-v{policy_version}"
        partial = target.with_suffix(".tmp")
        try:
            partial.mkdir(parents=True)
            if self._method == "adapter":
                from listopd_ray.roles.adapters import write_adapter

                write_adapter(self._model, partial)
            else:
                tensors = export_tensors(self._model, getattr(torch, self._dtype))
                save_file(tensors, partial / CHECKPOINT_FILE)
            partial.rename(target)
            for old in self._directory.iterdir():
                if old not in (target, self._kept):
                    shutil.rmtree(old)
        except OSError as error:
            raise ListopdError(f"sync.path: {target}: {error.strerror or error}") from error
        self._kept = target
        return target
