"""How long `listopd compare` takes over many runs, and how large its page is.

    python tests/bench/compare.py [RUNS] [UPDATES]

Makes the runs (λ from 1 to 2.95, five seeds each) with every metric that a run writes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from listopd_ray.config import Config, dump_config, load_config
from listopd_ray.report.runs import COLUMNS

OTHERS = [f"other/metric_{n}" for n in range(40)]  # that a report does not show
SEEDS = 5


def write_run(directory: Path, config: Config) -> None:
    directory.mkdir()
    (directory / "config.yaml").write_text(dump_config(config))
    rng = np.random.default_rng([int(1000 * config.lam), config.seed])
    names = [name for name in COLUMNS if not name.startswith(("eval/", "train/"))] + OTHERS
    values = rng.random((config.num_steps + 1, len(names)))
    with (directory / "metrics.jsonl").open("w") as stream:
        for step, row in enumerate(values):
            metrics = {"train/step": step, "train/tokens": 1000.0 * step, "train/lam": config.lam}
            metrics |= dict(zip(names, row.tolist(), strict=True))
            if step % 40 == 0:
                metrics |= {name: 0.5 for name in COLUMNS if name.startswith("eval/")}
            stream.write(json.dumps(metrics) + "\n")
    samples = [
        {
            "train/step": config.num_steps,
            "id": f"q{n}",
            "num_items": 6,
            "prompt": "socks\n1 red socks\n2 a hat\n",
            "completion": '{"ranking": [1, 2, 3, 4, 5, 6]}',
            "ranking": [1, 2, 3, 4, 5, 6],
            "reason": None,
        }
        for n in range(8)
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    evaluation = {"parse_rate": float(rng.random()), "ndcg_at_1": 0.6, "ndcg_at_k_all": 0.5}
    final = {**evaluation, "lam": config.lam, "lambda_star": 1.33, "tokens": 1e6, "seconds": 60.0}
    final["lam_over_lambda_star"] = config.lam / 1.33
    summary = {"final": final, "student": evaluation, "warm_start": evaluation}
    (directory / "summary.json").write_text(json.dumps(summary))


def main() -> None:
    num_runs, num_steps = (int(a) for a in [*sys.argv[1:], "200", "2000"][:2])
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for number in range(num_runs):
            lam, seed = 1 + 0.05 * (number // SEEDS), number % SEEDS
            keys = [f"lam={lam:g}", f"seed={seed}", f"num_steps={num_steps}", f"name=r{number}"]
            runs.append(Path(scratch, f"r{number}"))
            write_run(runs[-1], load_config(Config, keys))
        size = sum(file.stat().st_size for run in runs for file in run.iterdir())
        page = Path(scratch, "compare.html")
        start = time.perf_counter()
        command = [sys.executable, "-m", "listopd_ray", "compare", *map(str, runs), f"out={page}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        print(
            f"{num_runs} runs of {num_steps} updates, {size / 1e6:.0f} MB: {seconds:.1f} s, "
            f"page {page.stat().st_size / 1e6:.2f} MB"
        )
        if len(sys.argv) > 3:
            Path(sys.argv[3]).write_bytes(page.read_bytes())


if __name__ == "__main__":
    main()
