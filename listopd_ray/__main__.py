"""The command line: `listopd <command> [conf.yaml …] [key=value …]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from listopd_ray import __version__
from listopd_ray.types import ListopdError
