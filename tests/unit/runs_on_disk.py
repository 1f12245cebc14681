"""Run directories as a run writes them, without the run."""

import json

import numpy as np

from listopd_ray.config import Config, dump_config, with_values
from listopd_ray.report import REPORT
from listopd_ray.report.page import write_page
from listopd_ray.tracking import evaluation_metrics

REASONS = ("truncated", "not_json", "extra_text", "wrong_schema", "not_a_permutation")


def evaluation(parse_rate):
    numbers = {"parse_rate": parse_rate, "ndcg_at_1": 0.6, "ndcg_at_k": 0.8, "kendall_tau": 0.1}
    numbers |= {f"{name}_all": numbers[name] * parse_rate for name in [*numbers][1:]}
    intervals = {f"{name}_interval": [value, value] for name, value in numbers.items()}
    return numbers | intervals | {"num_prompts": 64, "reasons": dict.fromkeys(REASONS, 0)}


def sample(prompt="socks\n1 red\n2 blue\n", completion='{"ranking": [2, 2]}', **fields):
    row = {"train/step": 4, "id": "q1", "num_items": 2, "prompt": prompt, "completion": completion}
    return row | {"ranking": None, "reason": "not_a_permutation"} | fields


def write_run(root, name="run", *, steps=4, finished=True, samples=(), updates=(), **values):
    """`values`: of the configuration, by key with __ for a dot. Returns the rows of metrics."""
    values = {key.replace("__", "."): value for key, value in values.items()}
    config = with_values(Config(), {"name": name, "out": str(root), "num_steps": 4} | values)
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))
    rng = np.random.default_rng([config.seed, int(1000 * config.lam)])
    last = evaluation(float(rng.random()))
    rows = [{"train/step": 0, "train/tokens": 0.0, "eval/parse_rate": 0.25}]
    for step in range(1, steps + 1):
        rows.append(
            {
                "train/step": step,
                "train/tokens": 100.0 * step,
                "train/lam": config.lam,
                "contract/parse_rate": float(rng.random()),
                "kl/reverse": float(rng.random()),
                "cliff/lambda_star": 1.3 + 0.01 * config.seed,
                "rollout/tokens": 100.0,
                "time/step_s": 1.0,
                **{f"time/{stage}_s": 0.2 for stage in ("generate", "score", "learn", "sync")},
            }
        )
        for metric in ("kl/reverse", "cliff/tail_mass", "loss/clip_fraction"):
            for token_class in ("opening", "item_id", "separator", "closing"):
                rows[-1][f"{metric}_{token_class}"] = float(rng.random())
    if finished:
        rows[-1] |= evaluation_metrics(last | {"greedy": evaluation(1.0)})
        star = rows[1]["cliff/lambda_star"]
        summary = {
            "final": {
                **{key: last[key] for key in ("parse_rate", "ndcg_at_1", "ndcg_at_k_all")},
                "lam": config.lam,
                "lambda_star": star,
                "lam_over_lambda_star": config.lam / star,
                "tokens": 100.0 * steps,
                "seconds": 4.0,
            },
            **{who: evaluation(0.5) | {"greedy": evaluation(1.0)} for who in ("teacher",)},
            "warm_start": evaluation(0.25) | {"greedy": evaluation(1.0)},
            "student": last | {"greedy": evaluation(1.0)},
            "mean_lam": config.lam,
            "seconds": 4.0,
            "hashes": {"data": "0" * 64},
            "version": "0",
        }
        (directory / "summary.json").write_text(json.dumps(summary))
    for file, lines in (("metrics", rows), ("samples", samples), ("updates", updates)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{file}.jsonl").write_text(text)
    return rows


def page_of(run):
    return write_page([run], run / REPORT)
