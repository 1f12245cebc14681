"""Datasets on disk: what a ranking example must hold, splits, hashes, and the order of prompts.

One JSON object a line: `id`, `query`, `items` (objects with `id` and `text`) and `relevance` (one
gain for each item); `teacher` may name the one that scores it (`teachers` of the configuration).
Rows that do not hold this are set aside in a side file and counted.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import numpy as np

from listopd_ray.types import Example, Item, ListopdError, Prompt

T = TypeVar("T")

SPLITS = ("train", "eval")
MAX_LINE_BYTES = 1_000_000
ADVANCE_LINES = 1000  # between two words on how far a file is read
QUARANTINED_CHARS = 2000  # of a bad row, kept for a person to look at


class BadRow(Exception):  # noqa: N818 - not a failure of the program: a row to set aside
    """Why a row is set aside, in a few words."""


class Quarantine:
    """Side file for bad rows, usable over several input files.

    Streams to a temporary file, since a file of the wrong kind may hold millions of bad rows, and
    moves it to `path` on leaving the `with` block; no bad row, no file. Leaving with more than
    `max_bad_rows` raises ListopdError.
    """

    def __init__(self, path: Path | None, max_bad_rows: int) -> None:
        self.count = 0
        self._path = path
        self._max_bad_rows = max_bad_rows
        self._first = ""
        self._stream: IO[str] | None = None

    def add(self, file: Path, line: int, reason: str, raw: bytes) -> None:
        if self.count == 0:
            self._first = f"{file}:{line}: {reason}"
            if self._path is not None:
                _make_directory(self._path.parent)
                try:
                    self._stream = _temporary(self._path).open("w", encoding="utf-8")
                except OSError as error:
                    raise ListopdError(f"{self._path}: {error.strerror}") from None
        self.count += 1
        if self._stream is not None:
            text = raw.decode("utf-8", errors="replace")[:QUARANTINED_CHARS]
            entry = {"file": str(file), "line": line, "reason": reason, "row": text}
            self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    @property
    def first(self) -> str:
        return f", the first {self._first}" if self.count else ""

    @property
    def where(self) -> str:
        return f"; see {self._path}" if self.count and self._path is not None else ""

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None and self._path is not None:
            self._stream.close()
            os.replace(_temporary(self._path), self._path)
        if error is None and self.count > self._max_bad_rows:
            raise ListopdError(
                f"{self._first} (first of {self.count} bad rows, "
                f"max_bad_rows is {self._max_bad_rows}{self.where})"
            )


class PromptStream:
    """Endless prompts: each epoch shows every prompt once, in an order fixed by (seed, epoch)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ListopdError("no prompts to draw from")
        self._prompts = prompts
        self._seed = seed
        self._num_taken = 0
        self._epoch = -1  # of `_order`; −1: none yet
        self._order: list[int] = []

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts; may cross the border of an epoch."""
        taken = []
        for index in range(self._num_taken, self._num_taken + n):
            epoch, position = divmod(index, len(self._prompts))
            if epoch != self._epoch:
                rng = np.random.default_rng([self._seed, epoch])
                self._order = rng.permutation(len(self._prompts)).tolist()
                self._epoch = epoch
            taken.append(self._prompts[self._order[position]])
        self._num_taken += n
        return taken

    def state(self) -> dict[str, int]:
        epoch, position = divmod(self._num_taken, len(self._prompts))
        return {"epoch": epoch, "position": position}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where `state()` was taken, over the same prompts and seed."""
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < len(self._prompts):
            raise ListopdError(
                f"prompt stream at {position} of epoch {epoch} does not fit {len(self._prompts)} "
                "prompts: the data is not that of the checkpoint"
            )
        self._num_taken = epoch * len(self._prompts) + position


def read_examples(
    path: Path,
    *,
    max_bad_rows: int,
    quarantine: Path | None = None,
    reject: Callable[[Example], str | None] | None = None,
) -> list[Example]:
    """Every good row of `path`. `reject` gives a reason to set a well-formed example aside.

    Raises ListopdError where the file cannot be read, holds more than `max_bad_rows` bad rows, or
    holds no good one.
    """
    seen: set[str] = set()

    def parse(row: dict[str, Any]) -> Example:
        example = parse_example(row)
        if example.id in seen:
            raise BadRow(f"duplicate id {example.id!r}")
        if reject is not None and (reason := reject(example)):
            raise BadRow(reason)
        seen.add(example.id)
        return example

    with Quarantine(quarantine, max_bad_rows) as bad:
        examples = list(read_rows(path, parse, bad))
    if bad.count and quarantine is not None:
        print(f"listopd: {path}: {bad.count} bad rows set aside{bad.where}", file=sys.stderr)
    if not examples:
        raise ListopdError(f"{path}: no usable example ({bad.count} bad rows{bad.where})")
    return examples


def read_rows(
    path: Path,
    parse: Callable[[dict[str, Any]], T],
    quarantine: Quarantine,
    advance: Callable[[int], object] | None = None,
) -> Iterator[T]:
    """`parse` of each row of a .jsonl or .jsonl.gz file; rows it refuses go to `quarantine`, bytes
    of the file that were read to `advance`."""
    for number, raw in _lines(path, advance):
        try:
            value = parse(_decode(raw))
        except BadRow as error:
            quarantine.add(path, number, str(error), raw)
        else:
            yield value


def parse_example(row: dict[str, Any]) -> Example:
    """Raises BadRow unless the row is a complete example. Unknown fields are ignored."""
    items = tuple(_parse_item(item) for item in typed(row, "items", list))
    if len(items) < 2:
        raise BadRow("items: fewer than 2")
    if len({item.id for item in items}) < len(items):
        raise BadRow("items: duplicate id")
    relevance = tuple(_parse_gain(value) for value in typed(row, "relevance", list))
    if len(relevance) != len(items):
        raise BadRow(f"relevance: {len(relevance)} values for {len(items)} items")
    return Example(
        id=text_field(row, "id"),
        query=text_field(row, "query"),
        items=items,
        relevance=relevance,
        teacher=text_field(row, "teacher") if row.get("teacher") is not None else None,
    )


def text_field(row: dict[str, Any], key: str) -> str:
    """A string that is not blank and can be written as UTF-8 (JSON may spell half a surrogate)."""
    text: str = typed(row, key, str)
    if not text.strip():
        raise BadRow(f"{key}: empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{key}: lone surrogate") from None
    return text


def typed(row: dict[str, Any], key: str, *kinds: type) -> Any:
    """`row[key]` if it is of one of `kinds` exactly: a bool is not a number here."""
    if key not in row:
        raise BadRow(f"{key}: missing")
    if type(row[key]) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise BadRow(f"{key}: {type(row[key]).__name__} where {names} is due")
    return row[key]


def split_by_query(
    examples: Sequence[Example],
    *,
    num_eval: int,
    seed: int,
    key: Callable[[Example], str] = lambda example: example.query,
) -> dict[str, list[Example]]:
    """Train and eval without a common query; `key` says what counts as the same query.

    Whole queries go to eval, in an order given by a hash of (seed, query), while they fit into
    `num_eval`; so eval is smaller where the remaining queries are too frequent. The order of the
    examples is kept.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(key(example), []).append(example)

    def rank(query: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{query}".encode()).digest()

    held_out: set[str] = set()
    num_held_out = 0
    for query in sorted(groups, key=rank):
        if num_held_out + len(groups[query]) <= num_eval:
            held_out.add(query)
            num_held_out += len(groups[query])
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for query, group in groups.items():
        splits["eval" if query in held_out else "train"].extend(group)
    order = {example.id: position for position, example in enumerate(examples)}
    for split, chosen in splits.items():
        if not chosen:
            raise ListopdError(
                f"no example for {split}: {len(examples)} examples of {len(groups)} distinct "
                f"queries cannot give {num_eval} to eval"
            )
        chosen.sort(key=lambda example: order[example.id])
    return splits


def write_dataset(out: Path, splits: dict[str, list[Example]], meta: dict[str, Any]) -> None:
    """Write `<out>/train.jsonl`, `eval.jsonl` and, last, `dataset.json`; each atomically.

    The same input gives the same bytes. `dataset.json` holds `meta` (settings, seed) with the
    number of examples and the SHA-256 of each split.
    """
    _make_directory(out)
    record: dict[str, Any] = {**meta, "num_examples": {}, "sha256": {}}
    for split in SPLITS:
        text = "".join(_example_line(example) for example in splits[split])
        _write_atomically(out / f"{split}.jsonl", text)
        record["num_examples"][split] = len(splits[split])
        record["sha256"][split] = hashlib.sha256(text.encode()).hexdigest()
    _write_atomically(out / "dataset.json", json.dumps(record, ensure_ascii=False, indent=2) + "\n")


def dataset_hash(path: Path) -> str:
    """SHA-256 (hex) over the split files of a dataset directory."""
    digest = hashlib.sha256()
    for split in SPLITS:
        try:
            with (path / f"{split}.jsonl").open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ListopdError(f"{path / split}.jsonl: {error.strerror}") from None
    return digest.hexdigest()


def _lines(
    path: Path, advance: Callable[[int], object] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their end, blank ones left out, cut one byte past the longest allowed.

    Read piecewise, so that one endless line does not fill the memory.
    """
    try:
        with (
            path.open("rb") as stored,
            gzip.open(stored) if path.suffix == ".gz" else stored as file,
        ):
            number = told = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if advance is not None and number % ADVANCE_LINES == 0:
                    told, before = stored.tell(), told
                    advance(told - before)
                rest = raw
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES)
                if raw.strip():
                    yield number, raw.rstrip(b"\r\n")
            if advance is not None:
                advance(stored.tell() - told)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ListopdError(f"{path}: {reason}") from None


def _decode(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise BadRow(f"line longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(
            raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except UnicodeDecodeError:
        raise BadRow("not UTF-8") from None
    except RecursionError:
        raise BadRow("nested too deep") from None
    except ValueError as error:  # also an integer of more digits than Python converts
        raise BadRow(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    return row


def _refuse_constant(name: str) -> None:
    raise BadRow(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise BadRow("an object has the same key twice")
    return row


def _parse_item(item: Any) -> Item:
    if not isinstance(item, dict):
        raise BadRow("items: not an object")
    return Item(id=text_field(item, "id"), text=text_field(item, "text"))


def _parse_gain(value: Any) -> float:
    if type(value) not in (int, float):
        raise BadRow("relevance: not a number")
    try:
        gain = float(value)
    except OverflowError:
        gain = math.inf
    if not math.isfinite(gain) or gain < 0:
        raise BadRow("relevance: not finite and ≥ 0")
    return gain


def _example_line(example: Example) -> str:
    row = {
        "id": example.id,
        "query": example.query,
        "items": [{"id": item.id, "text": item.text} for item in example.items],
        "relevance": list(example.relevance),
        **({"teacher": example.teacher} if example.teacher is not None else {}),
    }
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _write_atomically(path: Path, text: str) -> None:
    temporary = _temporary(path)
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ListopdError(f"{path}: {error.strerror}") from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ListopdError(f"{path}: {error.strerror}") from None
