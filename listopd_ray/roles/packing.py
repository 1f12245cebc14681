"""Rows of arrays on their way to another process: a few long arrays in place of many short ones.

Every array is a buffer of its own for Ray, whatever its length: the 700 of an update's scores took
longer to hand over than their bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class _Arrays:
    """One array a row, of lengths that differ."""

    joined: np.ndarray  # [Σ lengths, …]
    ends: list[int]


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of one dataclass, column by column; a row that comes twice is there once."""

    kind: type
    columns: dict[str, Any]  # of a field: _Arrays, Packed, or the values themselves
    index: list[int]  # of each row among those of the columns


def pack(rows: Sequence[Any]) -> Packed:
    """`rows` are of one dataclass, one at least."""
    place: dict[int, int] = {}
    for row in rows:
        place.setdefault(id(row), len(place))
    by_id = {id(row): row for row in rows}
    distinct = [by_id[key] for key in place]
    kind = type(rows[0])
    columns = {f.name: _column([getattr(row, f.name) for row in distinct]) for f in fields(kind)}
    return Packed(kind, columns, [place[id(row)] for row in rows])


def unpack(packed: Packed) -> tuple[Any, ...]:
    """The rows again; their arrays are views."""
    values = [_values(column) for column in packed.columns.values()]
    names = tuple(packed.columns)
    distinct = [
        packed.kind(**dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)
    ]
    return tuple(distinct[place] for place in packed.index)


def _column(values: list[Any]) -> Any:
    if all(isinstance(value, np.ndarray) for value in values):
        forms = {(value.dtype, value.shape[1:]) for value in values}
        if len(forms) == 1:
            return _Arrays(np.concatenate(values), np.cumsum([len(v) for v in values]).tolist())
    return pack(values) if all(is_dataclass(value) for value in values) else values


def _values(column: Any) -> Sequence[Any]:
    if isinstance(column, Packed):
        return unpack(column)
    if isinstance(column, _Arrays):
        starts = [0, *column.ends[:-1]]
        return [column.joined[a:b] for a, b in zip(starts, column.ends, strict=True)]
    return column
