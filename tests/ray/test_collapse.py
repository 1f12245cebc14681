"""A real run over the cliff: the alarm rings, the run goes back and ends well with a lower λ."""

from __future__ import annotations

import json
import re
from pathlib import Path

from listopd_ray.cluster import Cluster
from listopd_ray.config import Config, with_values
from listopd_ray.job import distill
from listopd_ray.prepare import Prepared, prepare

LAM, BACKOFF = 4.0, 0.05


def test_a_run_over_the_cliff_rolls_back_and_recovers(
    config: Config, prepared: Prepared, cluster: Cluster
) -> None:
    # Of the warm start's 0.72, measured with λ = 4: 0.6 after four updates, 0 from the eighth on.
    # With λ = 1 it stays at 0.75.
    config = with_values(
        config,
        {
            "name": "collapse",
            "lam": LAM,
            "lr": 1e-3,
            "num_prompts": 64,
            "num_steps": 16,
            "evaluation.num_prompts": 64,
            "evaluation.every": 0,
            "checkpoint.every": 4,
            "alarm.action": "rollback",
            "alarm.backoff": BACKOFF,
        },
    )
    summary = distill(config, prepare(config), cluster)

    run = Path(config.out) / config.name
    (event,) = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    assert (event["action"], event["lam"]) == ("rollback", LAM)
    seen = re.match(r"training parses (\S+), best was (\S+) ", event["reason"])
    assert seen is not None
    collapsed, best = map(float, seen.groups())
    assert collapsed < best / 2

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/step"] for row in rows] == list(range(17))
    lams = [row["train/lam"] for row in rows[1:]]
    kept = lams.count(LAM)  # updates of the checkpoint that was gone back to
    assert kept in (0, 4)
    assert lams[kept:] == [1 + (LAM - 1) * BACKOFF] * (16 - kept)
    for row in rows[1:]:  # engine and learner went back together
        assert row["rollout/staleness"] == 0
        assert row["kl/mismatch_max"] < 1e-4
    assert min(row["contract/parse_rate"] for row in rows[kept + 1 :]) > 2 * collapsed

    final, warm = (summary[model]["parse_rate"] for model in ("student", "warm_start"))
    assert final >= 0.8 * warm
    assert final > 3 * collapsed
