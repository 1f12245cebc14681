"""Secrets stay out of what is written: configurations, checkpoints, W&B and messages."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "<redacted>"
SHORTEST = 8  # characters of a variable's value that is looked for in texts

_KEYS = r"(?:api|access|account|auth|private|secret)[_-]?key(?:[_-]?id)?"
_WORDS = r"token|secret|password|passwd|pwd|passphrase|credential|authorization|sig(?:nature)?"
_NAME = rf"(?:{_WORDS}|{_KEYS})"
_SECRET_NAME = re.compile(rf"{_NAME}s?$", re.IGNORECASE)
_VALUE = r"""(?:"[^"]*"|'[^']*'|(?:Bearer )?[^\s"'&,;)}\]]+)"""
_ASSIGNED = re.compile(rf"""({_NAME}["']?(?:=|: ?))({_VALUE})""", re.IGNORECASE)
_IN_URL = re.compile(r"""(://)(?:[^\s"'/@:]*:[^\s"']*|[^\s"'/@]+)@""")


def redacted(value: Any, name: str = "") -> Any:
    """`value` (nested dicts and lists too) without the values of keys that look like secrets, the
    credentials in URLs, and whatever a secret environment variable holds."""
    is_count = isinstance(value, int | float) and name.endswith("s")  # max_new_tokens
    if _SECRET_NAME.search(name) and not is_count and value not in (None, "", {}, []):
        return HIDDEN
    if isinstance(value, dict):
        return {key: redacted(part, str(key)) for key, part in value.items()}
    if isinstance(value, list):
        return [redacted(part) for part in value]
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """As `redacted`, for a message: `…token=VALUE` loses its value."""
    secrets = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and name not in ("PWD", "OLDPWD")  # the shell's directories
    }
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    return _IN_URL.sub(rf"\1{HIDDEN}@", _ASSIGNED.sub(rf"\1{HIDDEN}", text))
