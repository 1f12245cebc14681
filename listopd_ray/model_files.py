"""Model directories on every machine: seen on shared storage, else copied once a machine.

The driver names a directory on its own disk; whoever opens it elsewhere gets the same files. Only
checkpoints need storage that all machines share.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from filelock import FileLock

from listopd_ray.placement import on_node, this_node
from listopd_ray.types import ListopdError

SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")  # of what a model is made of
BLOCK = 16 << 20  # bytes that travel at once (docs/benchmarks.md)


@dataclass(frozen=True)
class ModelFiles(os.PathLike[str]):
    """A model directory of one machine as a path on any: the directory itself where this machine
    sees the same files there, else a copy, which is made when the path is first asked for."""

    path: str
    node: str  # Ray's id of the machine
    files: tuple[tuple[str, int, int], ...]  # name, bytes, time of change (ns)

    def __fspath__(self) -> str:
        is_seen = this_node() == self.node or _listing(self.path) == self.files
        return self.path if is_seen else str(self._copy())

    def _copy(self) -> Path:
        key = hashlib.sha256(repr((self.path, self.files)).encode()).hexdigest()[:16]
        root = Path(tempfile.gettempdir(), f"listopd-{os.getuid()}")
        root.mkdir(mode=0o700, exist_ok=True)
        state = root.lstat()
        if state.st_uid != os.getuid() or state.st_mode & 0o077:
            raise ListopdError(f"{root}: open to other users")
        target = root / key
        with FileLock(root / f"{key}.lock"):  # the actors of a machine start together
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=root) as scratch:
                    partial = Path(scratch, "model")
                    partial.mkdir()
                    for name, size, changed in self.files:
                        with (partial / name).open("wb") as stream:
                            stream.writelines(self._blocks(name, size, changed))
                    partial.rename(target)
        return target

    def _blocks(self, name: str, size: int, changed: int) -> Iterator[bytes]:
        read = ray.remote(_read).options(num_cpus=0, scheduling_strategy=on_node(self.node))
        for offset in range(0, size, BLOCK):
            length = min(BLOCK, size - offset)
            block, *state = ray.get(read.remote(f"{self.path}/{name}", offset, length))
            if state != [size, changed]:
                raise ListopdError(f"{self.path}/{name}: has changed since the start")
            yield block


def model_files(path: Path) -> ModelFiles:
    """Those of a directory on this machine, to be sent to others."""
    absolute = str(path.absolute())
    return ModelFiles(absolute, this_node(), _listing(absolute))


def _listing(path: str) -> tuple[tuple[str, int, int], ...]:
    try:
        found = [file for file in os.scandir(path) if file.name.endswith(SUFFIXES)]
    except OSError:
        return ()
    stats = [(file.name, file.stat()) for file in found if file.is_file()]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def _read(file: str, offset: int, length: int) -> tuple[bytes, int, int]:
    """A block, with the file's size and time of change; where it is gone they are no file's."""
    try:
        with open(file, "rb") as stream:
            stream.seek(offset)
            block, stat = stream.read(length), os.fstat(stream.fileno())
    except OSError:
        return b"", -1, -1
    return block, stat.st_size, stat.st_mtime_ns
