"""Secrets stay out of what is written: configurations, checkpoints, W&B and messages."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "<redacted>"
SHORTEST = 8  # characters of a variable's value that is looked for in texts

_KEYS = r"(?:api|access|account|auth|private|secret)[_-]?key(?:[_-]?id)?"
_NAME = rf"(?:token|secret|password|passwd|passphrase|credentials?|{_KEYS})"
_SECRET_NAME = re.compile(rf"{_NAME}$", re.IGNORECASE)
_ASSIGNED = re.compile(rf"({_NAME}(?:=|[\"']: ?)[\"']?)[^\s\"'&,;)}}]+", re.IGNORECASE)
_IN_URL = re.compile(r"(://)[^/@\s]+@")


def redacted(value: Any, name: str = "") -> Any:
    """`value` (nested dicts and lists too) without the values of keys that look like secrets, the
    credentials in URLs, and whatever a secret environment variable holds."""
    if isinstance(value, dict):
        return {key: redacted(part, str(key)) for key, part in value.items()}
    if isinstance(value, list):
        return [redacted(part, name) for part in value]
    if value in (None, "", HIDDEN):
        return value
    if _SECRET_NAME.search(name):
        return HIDDEN
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """As `redacted`, for a message: `…token=VALUE` loses its value."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    return _IN_URL.sub(rf"\1{HIDDEN}@", _ASSIGNED.sub(rf"\1{HIDDEN}", text))
