"""Checkpoints of a run, on any path that fsspec knows; complete or not there at all.

    <root>/LATEST                      name of the newest
    <root>/step-000040/manifest.json   SHA-256 and size of every other file
                      /state.json      where the loop is
                      /…               the learner's

A checkpoint is written beside its place, brought to the disk and renamed. Where a file is not as
the manifest says (disks lose bytes, object stores rename file by file) the one before counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError

from listopd_ray.redact import redacted_text
from listopd_ray.types import ListopdError, last_line

MANIFEST = "manifest.json"
SHOWN_AFTER_S = 60.0  # NFS keeps what it knew of a directory for so long (s)
HEALTHY = "healthy"  # the empty file that marks such a checkpoint; it may come later

Files = dict[str, dict[str, Any]]  # path within a checkpoint → {"sha256": …, "bytes": …}


class CorruptCheckpoint(ListopdError):  # noqa: N818 - what it is, not what went wrong
    """A file of it is missing, or not what was written."""


class Saves(Protocol):
    def save(self, url: str) -> Files: ...

    def restore(self, url: str, files: Files) -> None: ...


class Checkpoints:
    """Those of one run under `root`, a path or URL: of the newest `keep`, the best by its score,
    and the newest healthy one to roll back to, none is removed.

    One that is extra (an interrupted run's) goes with the next and is never healthy: a run that is
    continued rolls back to where an undisturbed one does.
    """

    def __init__(self, root: str, keep: int) -> None:
        self._fs, self._root = _locate(root)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._keep = keep

    def save(
        self,
        step: int,
        learner: Saves,
        state: dict[str, Any],
        *,
        healthy: bool = False,
        extra: bool = False,
        score: float | None = None,
    ) -> None:
        """Write learner and `state` (JSON) after `step` updates; `score`: more is better.

        Raises ListopdError where it cannot be written: the ones before are then as they were.
        """
        name = f"step-{step:06d}"
        partial = f"{name}.tmp"
        for remains in self._names(r"step-\d+(\.old)?\.tmp"):
            self._fs.rm(self._path(remains), recursive=True)
        try:
            with writing(self._url()):
                self._fs.makedirs(self._root, exist_ok=True)
            files = learner.save(self._url(partial))
            if not self._sees([self._path(f"{partial}/{name}") for name in files]):
                raise ListopdError(
                    f"{self._url()}: not shared: what the learner's machine writes there is not on "
                    "the driver's; give checkpoint.path=… on storage that all machines see"
                )
            with writing(self._url(partial)):
                text = json.dumps({"step": step, **state}, indent=1)
                files["state.json"] = _digest_of(text.encode())
                self._write(f"{partial}/state.json", text)
                manifest: dict[str, Any] = {"step": step, "score": score, "extra": extra}
                manifest["files"] = files
                manifest["sha256"] = _manifest_digest(manifest)
                self._write(f"{partial}/{MANIFEST}", json.dumps(manifest, indent=1))
                if healthy:
                    self._write(f"{partial}/{HEALTHY}", "")
                self._replace(partial, name)
        except Exception:
            with suppress(Exception):  # what is left goes with the next save
                self._fs.rm(self._path(partial), recursive=True)
            raise
        with writing(self._url()):
            self._prune()

    def mark_healthy(self, step: int) -> None:
        """The checkpoint after `step` updates, if there is one, is good to roll back to."""
        name = f"step-{step:06d}"
        with writing(self._url()):
            if name in self._complete() and not self._marks(name).get("extra"):
                self._write(f"{name}/{HEALTHY}", "")

    def restore(self, learner: Saves) -> dict[str, Any] | None:
        """Put the newest intact checkpoint into `learner`; its state, or None where there is none.

        Those that are not intact are named on standard error and removed. Raises ListopdError where
        no one is intact.
        """
        corrupt: dict[str, CorruptCheckpoint] = {}
        names = self._complete()
        for name in reversed(names):
            try:
                state = self._restore(name, learner)
            except CorruptCheckpoint as error:
                corrupt[name] = error
                continue
            for later, reason in corrupt.items():
                print(redacted_text(f"{last_line(reason)}; going on from {name}"), file=sys.stderr)
                self._remove(later)
            if corrupt:
                self._point()
            return state
        if names:
            reasons = "; ".join(map(last_line, corrupt.values()))
            raise ListopdError(
                f"{self._url()}: no checkpoint is intact ({reasons}); remove the run to begin again"
            )
        return None

    def drop_unhealthy(self) -> None:
        """Remove those after the newest healthy one; all stay where none is healthy."""
        with writing(self._url()):
            complete = self._complete()
            healthy = [name for name in complete if self._is_healthy(name)]
            later = complete[complete.index(healthy[-1]) + 1 :] if healthy else []
            for name in reversed(later):  # the newest of those left is always one that was reached
                self._remove(name)
            if later:
                self._point()

    def _restore(self, name: str, learner: Saves) -> dict[str, Any]:
        files = dict(self._manifest(name)["files"])
        try:
            text = self._fs.cat_file(self._path(f"{name}/state.json"))
        except OSError:
            text = b""
        if _digest_of(text) != files.pop("state.json", None):
            raise CorruptCheckpoint(f"{self._url(name)}: state.json is not what was written")
        learner.restore(self._url(name), files)
        return json.loads(text)

    def _manifest(self, name: str) -> dict[str, Any]:
        try:
            manifest = json.loads(self._fs.cat_file(self._path(f"{name}/{MANIFEST}")))
            intact = manifest.pop("sha256") == _manifest_digest(manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise CorruptCheckpoint(f"{self._url(name)}: {MANIFEST} is not what was written")
        return manifest

    def _sees(self, paths: list[str]) -> bool:
        """What another machine has written may take a while to show (NFS keeps what it knew)."""
        end = time.monotonic() + SHOWN_AFTER_S
        while not all(map(self._fs.exists, paths)):
            if time.monotonic() > end:
                return False
            time.sleep(1)
            self._fs.invalidate_cache()
        return True

    def _prune(self) -> None:
        complete = self._complete()
        marks = {name: self._marks(name) for name in complete}
        regular = [name for name in complete if not marks[name].get("extra")]
        kept = {*complete[-1:], *regular[-self._keep :]}
        kept |= set([name for name in regular if self._is_healthy(name)][-1:])
        scores = {name: marks[name].get("score") for name in regular}
        finite = {name: s for name, s in scores.items() if s is not None and math.isfinite(s)}
        best = sorted(finite, key=lambda name: finite[name])
        kept |= set(best[-1:])  # the newest of equals
        for name in complete:
            if name not in kept:
                self._remove(name)
        self._point()

    def _marks(self, name: str) -> dict[str, Any]:
        """Its manifest; empty where that is not intact, as `restore` will say."""
        with suppress(CorruptCheckpoint):
            return self._manifest(name)
        return {}

    def _is_healthy(self, name: str) -> bool:
        return self._fs.exists(self._path(f"{name}/{HEALTHY}"))

    def _point(self) -> None:
        """LATEST, for people and other programs."""
        complete = self._complete()
        if complete:
            self._write("LATEST.tmp", f"{complete[-1]}\n")
            self._move("LATEST.tmp", "LATEST")

    def _complete(self) -> list[str]:
        return self._names(r"step-\d+")

    def _names(self, pattern: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = [Path(path).name for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted((n for n in found if re.fullmatch(pattern, n)), key=lambda n: (len(n), n))

    def _replace(self, source: str, target: str) -> None:
        """The old one, if any, goes when the new one is there."""
        aside = f"{target}.old.tmp"
        is_there = target in self._complete()
        if is_there:
            self._move(target, aside)
        try:
            self._move(source, target)
        except BaseException:
            if is_there:
                self._move(aside, target)
            raise
        if is_there:
            self._fs.rm(self._path(aside), recursive=True)

    def _remove(self, name: str) -> None:
        """All at once, as `_complete` sees it."""
        self._move(name, f"{name}.old.tmp")
        self._fs.rm(self._path(f"{name}.old.tmp"), recursive=True)

    def _move(self, source: str, target: str) -> None:
        if self._is_local:
            os.replace(self._path(source), self._path(target))
            sync(self._root)
        else:
            self._fs.mv(self._path(source), self._path(target), recursive=True)

    def _write(self, name: str, text: str) -> None:
        with self._fs.open(self._path(name), "wb") as stream:
            stream.write(text.encode())
        if self._is_local:
            sync(self._path(name))
            sync(os.path.dirname(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _url(self, name: str = "") -> str:
        """What another process finds it by."""
        path = self._path(name).rstrip("/")
        return path if self._is_local else self._fs.unstrip_protocol(path)


@contextmanager
def staged(url: str) -> Iterator[Path]:
    """An empty local directory; its files are at `url`, and on the disk, when the block ends.

    Raises ListopdError where they cannot be written.
    """
    fs, path = _locate(url)
    with writing(url):
        if isinstance(fs, LocalFileSystem):
            Path(path).mkdir(parents=True)
            yield Path(path)
            for file in [*Path(path).rglob("*"), Path(path)]:
                sync(str(file))
            return
        with TemporaryDirectory() as directory:
            yield Path(directory)
            fs.put(f"{directory}/", f"{path}/", recursive=True)


@contextmanager
def fetched(url: str, files: Files) -> Iterator[Path]:
    """A local directory with these files of `url`; raises CorruptCheckpoint where one is missing or
    not as it was written."""
    fs, path = _locate(url)
    if isinstance(fs, LocalFileSystem):
        _check(url, Path(path), files)
        yield Path(path)
        return
    with TemporaryDirectory() as directory:
        for name in files:
            with suppress(FileNotFoundError):
                fs.get_file(f"{path}/{name}", f"{directory}/{name}")
        _check(url, Path(directory), files)
        yield Path(directory)


def digests(directory: Path) -> Files:
    """Of all files below `directory`, by their path in it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(file.relative_to(directory)): _digest(file) for file in files}


def _locate(url: str) -> tuple[Any, str]:
    """File system and path; raises ListopdError for a URL that nothing here can open."""
    if "://" not in url:
        return LocalFileSystem(), os.path.abspath(url)
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ListopdError(f"checkpoint.path: {url}: {error}") from None


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check(url: str, directory: Path, files: Files) -> None:
    for name, digest in files.items():
        file = directory / name
        if not file.is_file():
            raise CorruptCheckpoint(f"{url}: {name} is missing")
        if (size := file.stat().st_size) != digest["bytes"]:
            raise CorruptCheckpoint(f"{url}: {name} has {size} of {digest['bytes']} bytes")
        if _digest(file) != digest:
            raise CorruptCheckpoint(f"{url}: {name} is not what was written (SHA-256)")


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": sha256, "bytes": file.stat().st_size}


def _digest_of(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def sync(path: str) -> None:
    """A file, or a directory's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(url: str) -> Iterator[None]:
    """Raises ListopdError, one line, for a full disk, a place that is read-only or gone."""
    try:
        yield
    except OSError as error:
        raise ListopdError(f"{url}: cannot write: {error.strerror or error}") from error
    except SafetensorError as error:  # it wraps what the system says
        raise ListopdError(f"{url}: cannot write: {error}") from error
