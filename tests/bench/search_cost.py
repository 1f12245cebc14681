"""What searches cost against a grid with the same seeds, criterion and stopper.

cd docs/search; python ../../tests/bench/search_cost.py grid.jsonl five.json doubled.json

The arguments are the grid's trials.jsonl and the searches' bracket.json files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

from listopd_ray.cliff.calibration import FLOOR_SHARE
from listopd_ray.cliff.verdict import find_onset
from listopd_ray.tracking import read_jsonl


def main(grid: Path, searches: list[Path]) -> None:
    rows = read_jsonl(grid)
    lams = sorted({row["lam"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    if len(rows) != len(lams) * len(seeds) or any("error" in row for row in rows):
        sys.exit(f"{grid}: {len(rows)} trials of {len(lams)} λ and {len(seeds)} seeds, or failures")
    rates = [fmean(row["parse_rate"] for row in rows if row["lam"] == lam) for lam in lams]
    low, high = find_onset(lams, rates, FLOOR_SHARE * rates[0])
    spent = sum(row["updates"] for row in rows)
    stopped = sum(not row["finished"] for row in rows)
    print("| | starts from λ* | onset | λ | trials | stopped early | updates | of the grid's |")
    print("|---|---|---|---|---|---|---|---|")
    whole = f"{len(lams)} | {len(rows)} | {stopped} | {spent} | 100 %"
    print(f"| grid | – | ({low:g}, {high:g}] | {whole} |")
    for file in searches:
        bracket = json.loads(file.read_text())
        # The student of the recommended λ is no part of a grid.
        student = bracket["recommended"] not in [row["lam"] for row in bracket["verdicts"]]
        trials = bracket["trials"][: len(bracket["trials"]) - student]
        updates = sum(trial["updates"] for trial in trials)
        early = sum(t["verdict"] == "collapsed" or t["updates"] > t["budget"] for t in trials)
        if bracket["seeds"] != seeds or bracket["resolution"] > 1.001 * (lams[1] - lams[0]):
            sys.exit(f"{file}: of other seeds, or coarser than {grid}")
        prediction = bracket["prediction"]
        print(
            f"| {file.stem} | {prediction['lambda_star']:.3f}, {prediction['kind']} "
            f"| ({bracket['low']:g}, {bracket['high']:g}] | {len(bracket['verdicts']) + 1} "
            f"| {len(trials)} | {early} | {updates} | {updates / spent:.0%} |"
        )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
