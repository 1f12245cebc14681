"""What collapsed runs write in place of the first id: figures of `docs/cliff.md`.

    python tests/bench/collapses.py runs/study

Of every trial of the study of which less than 5 % parses: the character that most of its kept
completions (`samples.jsonl`, after the last update) have after `{"ranking": [`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from listopd_ray.cliff.verdict import ENOUGH_PARSED

OPENING = '{"ranking": ['


def main(study: Path) -> None:
    first = Counter()
    for file in sorted(study.glob("trials/*/summary.json")):
        summary = json.loads(file.read_text())
        if summary["student"]["parse_rate"] >= ENOUGH_PARSED:
            continue
        lines = (file.parent / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        last = [s["completion"] for s in samples if s["train/step"] == summary["num_steps"]]
        written = Counter(
            repr(text[len(OPENING) :][:1]) if text.startswith(OPENING) else "another opening"
            for text in last
        )
        most = written.most_common(1)[0][0]
        first[most] += 1
        print(f"{file.parent.name:24} {most:18} {last[0]!r:.70}")
    print(f"{first.total()} collapsed trials; after the opening comes")
    for written, count in first.most_common():
        print(f"  {written:18} {count}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
