"""Our loop against TRL's `DistillationTrainer`: the same models, prompts, batch and lengths.

    python tests/bench/peers.py PEERS_PYTHON [NUM_UPDATES] [ROUNDS] [OUT]

PEERS_PYTHON is the interpreter of an environment with TRL (`make bench-peers` makes one). Every
round runs each side once, one after the other, in processes of their own. 64 prompts of 48 tokens
an update, completions of 32, student 2×64, teacher 3×96, vocabulary 512, float32.

Our side scores the base too (λ = 1.2), logs every update, keeps a ledger, checks a canary at every
sync and has its roles in separate processes; TRL's has one process with as many threads as cores
and no base.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median

from figures import WARM_UP, child, rates, spread, table, write
from workload import make_workload

OURS = {
    "listopd, sequential": ["max_staleness=0"],
    "listopd, overlap": ["max_staleness=1"],
    "listopd, transformers engine, sequential": ["rollout.backend=hf", "max_staleness=0"],
    "listopd, transformers engine, overlap": ["rollout.backend=hf", "max_staleness=1"],
}
PEER = "TRL"


def main(
    peers_python: str,
    num_updates: int = 40,
    rounds: int = 3,
    out: str = "runs/bench/peers.json",
) -> None:
    if num_updates < WARM_UP + 10:
        sys.exit(f"{num_updates} updates: too few, the first {WARM_UP} are left out")
    directory = Path(out).parent / "workload"
    make_workload(directory)
    threads = os.cpu_count() or 1
    runs: dict[str, list[dict]] = {name: [] for name in (PEER, *OURS)}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        env = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
        runs[PEER].append(
            child(peers_python, "peer_trl.py", directory, num_updates, threads, **env)
        )
        for name, overrides in OURS.items():
            runs[name].append(
                child(sys.executable, "workload.py", directory, num_updates, *overrides)
            )
    figures = {name: [rates(run) for run in several] for name, several in runs.items()}
    rows = []
    for name, several in figures.items():
        samples = [each["samples_per_s"] for each in several]
        # Ratios within a round: the machine's mood is the same.
        pairs = zip(samples, figures[PEER], strict=True)
        ratios = [own / peer["samples_per_s"] for own, peer in pairs]
        updates = [each["updates_per_s"] for each in several]
        shown = spread(ratios, 2) if name != PEER else "1"
        rows.append([name, spread(samples, 0), spread(updates, 2), shown])
    title = f"64 samples an update, {num_updates} updates, median of {rounds} rounds [range]"
    header = ["", "samples/s", "updates/s", "× TRL, in the same round"]
    table(title, header, rows)
    stages = {
        name: {
            stage: 1e3 * median(s for run in several for s in run["stages"][stage][WARM_UP:])
            for stage in several[0]["stages"]
        }
        for name, several in runs.items()
        if name != PEER
    }
    header = ["median ms", *next(iter(stages.values()))]
    body = [[name, *(f"{v:.0f}" for v in times.values())] for name, times in stages.items()]
    table("Stages of a turn", header, body)
    write(out, {"peers": figures, "stages_ms": stages, "trl": runs[PEER][0]["version"]})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:5])
