"""Pages on runs, studies and searches.

What makes them is imported when one is made: a trial's process makes none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from listopd_ray.types import ListopdError

REPORT = "report.html"  # in the directory of what it is about


def close_with_report(paths: Sequence[Path], out: Path) -> None:
    """The page, and its link, at the end of a command: one that fails does not fail the work that
    it is about."""
    from listopd_ray.report.page import print_link, write_page

    try:
        print_link(write_page(paths, out))
    except ListopdError as error:
        print(f"no report: {error}", file=sys.stderr)
