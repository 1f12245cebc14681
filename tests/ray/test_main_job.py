"""A whole run with real actors and a real engine: what it writes, and that it can be repeated."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from equality import check_equal, metrics_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from listopd_ray.cluster import Cluster
from listopd_ray.config import Config, dump_config, load_config
from listopd_ray.job import distill, evaluate_job, train_job
from listopd_ray.prepare import Prepared
from listopd_ray.rank import RankConfig, rank
from listopd_ray.tracking import Run
from listopd_ray.types import ListopdError


def run_again(config: Config, prepared: Prepared, cluster: Cluster, **changes: Any) -> Path:
    changed = dataclasses.replace(config, **changes)
    distill(changed, prepared, cluster)
    return Path(changed.out) / changed.name


def test_a_run_leaves_config_metrics_samples_checkpoint_student_and_summary(
    finished_run: Path, config: Config
) -> None:
    assert load_config(Config, [str(finished_run / "config.yaml")]) == config
    assert [row["train/step"] for row in metrics_of(finished_run)] == [0, 1, 2, 3, 4]
    assert (finished_run / "checkpoints" / "step-000004" / "optimizer.safetensors").is_file()
    samples = (finished_run / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 3 * config.evaluation.num_samples  # before, after 2 and after 4 updates
    summary = json.loads((finished_run / "summary.json").read_text())
    assert (summary["lam"], summary["clip"], summary["num_steps"], summary["seed"]) == (
        1.5,
        2,
        4,
        0,
    )
    for model in ("warm_start", "teacher", "student"):
        low, high = summary[model]["parse_rate_interval"]
        assert 0 <= low <= summary[model]["parse_rate"] <= high <= 1
        assert {"ndcg_at_1", "ndcg_at_k", "ndcg_at_k_all", "kendall_tau"} <= set(summary[model])


def test_a_finished_run_shows_its_table_again_unless_it_is_another(
    finished_run: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(finished_run.rglob("*"))
    assert train_job(config) == json.loads((finished_run / "summary.json").read_text())
    shown = capsys.readouterr().out
    assert "held-out prompts" in shown
    assert "weight sync by object_store: 0." in shown
    assert f"report: {(finished_run / 'report.html').absolute().as_uri()}" in shown
    more = set(finished_run.rglob("*")) - before
    assert {file.name for file in more} <= {"report.html", "report.md"}
    with pytest.raises(ListopdError, match="begun with another configuration: lr"):
        train_job(dataclasses.replace(config, lr=1.0))
    copy = dataclasses.replace(config, out=str(tmp_path))
    shutil.copytree(finished_run, tmp_path / config.name)
    (tmp_path / config.name / "config.yaml").write_text(dump_config(copy))
    for content, said in (
        ("[]", "not what this writes"),
        ('{"hashes": {}}', r"from other data or models: data \("),
    ):
        (tmp_path / config.name / "summary.json").write_text(content)
        with pytest.raises(ListopdError, match=said):
            train_job(copy)


def test_rollout_logprobs_are_the_learners_after_every_sync(finished_run: Path) -> None:
    rows = metrics_of(finished_run)
    assert 0 < rows[0]["gate/rollout_max"] < 1e-4
    # The student in the teacher's place: its reverse KL to itself is 0.
    assert rows[0]["gate/teacher_max"] < 1e-5
    for row in rows[1:]:
        assert 0 < row["sync/canary_max"] < 1e-4
        assert 0 < row["kl/mismatch_max"] < 1e-4
        assert row["rollout/staleness"] == 0


def test_the_same_seed_gives_identical_metrics(
    finished_run: Path, config: Config, prepared: Prepared, cluster: Cluster
) -> None:
    repeated = run_again(config, prepared, cluster, name="repeated")
    assert metrics_of(repeated) == metrics_of(finished_run)


def test_another_seed_gives_other_samples(
    finished_run: Path, config: Config, prepared: Prepared, cluster: Cluster
) -> None:
    other = run_again(config, prepared, cluster, name="other-seed", seed=1)
    assert metrics_of(other)[1]["kl/reverse"] != metrics_of(finished_run)[1]["kl/reverse"]


def test_an_interrupted_run_continues_to_the_metrics_and_weights_of_an_undisturbed_one(
    finished_run: Path,
    config: Config,
    prepared: Prepared,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Run.log

    def fail_after_three(self: Run, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", fail_after_three)
        run_again(config, prepared, cluster, name="interrupted", trace=True)
    traced = Path(config.out) / "interrupted" / "trace.json"  # of what there was
    assert len(rows_of(traced)["learner"]["step"]) == 3
    resumed = run_again(config, prepared, cluster, name="interrupted")
    check_equal(resumed, finished_run)


@pytest.fixture(scope="module")
def ahead_run(config: Config, prepared: Prepared, cluster: Cluster) -> Path:
    return run_again(config, prepared, cluster, name="ahead", max_staleness=1, trace=True)


def test_sampling_ahead_is_stale_by_one_update(ahead_run: Path) -> None:
    rows = metrics_of(ahead_run)
    assert [row["rollout/staleness"] for row in rows[1:]] == [0, 1, 1, 1]
    assert rows[-1]["kl/mismatch_max"] > 1e-3  # the samples are another policy's, and it shows


def rows_of(trace: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """(start, end) of every block, by row and name, in order."""
    events = json.loads(trace.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            block = event["ts"], event["ts"] + event["dur"]
            rows[names[event["tid"]]].setdefault(event["name"], []).append(block)
    return rows


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def test_a_trace_shows_what_the_actors_do_in_the_drivers_stages(ahead_run: Path) -> None:
    rows = rows_of(ahead_run / "trace.json")
    assert list(rows) == ["driver", "learner", "rollout 0", "teacher 0"]
    driver, rollout, teacher = rows["driver"], rows["rollout 0"], rows["teacher 0"]
    assert len(driver["turn"]) == len(driver["learn"]) == len(rows["learner"]["step"]) == 4
    # Each of these waits for one call of the actor, which lies within it on one machine's clock.
    for stage, step in zip(driver["learn"], rows["learner"]["step"], strict=True):
        assert stage[0] <= step[0] and step[1] <= stage[1]
    for stage, load in zip(driver["load_weights"], rollout["load_weights"], strict=True):
        assert stage[0] <= load[0] and load[1] <= stage[1]
    waits = driver["wait for scores"]
    for number, (wait, score) in enumerate(zip(waits, teacher["score"], strict=True)):
        assert score[1] <= wait[1]
        if number:  # begun while the learner worked on the batch before
            assert score[0] >= driver["learn"][number - 1][0]
    # Each turn but the last begins to sample for the next one before it is over.
    for turn in driver["turn"][:-1]:
        assert any(overlap(turn, generate) for generate in rollout["generate"])
    assert len(rollout["execute"]) >= len(rollout["generate"]) + len(rollout["load_weights"])


def test_without_trace_none_is_written(finished_run: Path) -> None:
    assert not (finished_run / "trace.json").exists()


def test_a_finished_run_is_not_overwritten(
    finished_run: Path, config: Config, prepared: Prepared, cluster: Cluster
) -> None:
    with pytest.raises(ListopdError, match="finished"):
        distill(config, prepared, cluster)


def test_the_exported_student_loads_in_transformers_and_in_a_fresh_engine(
    finished_run: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    student = finished_run / "student"
    model = AutoModelForCausalLM.from_pretrained(student)
    assert (
        model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(student).eos_token_id
    )
    assert "λ = 1.5" in (student / "README.md").read_text()
    evaluate_job(str(student), config)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    trained = json.loads((finished_run / "summary.json").read_text())["student"]
    # The same prompts, seeds and weights: the same completions, but for rounding in the reload.
    assert math.isclose(result["parse_rate"], trained["parse_rate"], abs_tol=1.5 / 32)
    assert math.isclose(
        result["greedy"]["parse_rate"], trained["greedy"]["parse_rate"], abs_tol=1.5 / 32
    )


def test_rank_writes_a_ranking_of_item_ids_or_the_reason_for_none(
    finished_run: Path, config: Config, tmp_path: Path
) -> None:
    examples = Path(str(config.data.path), "eval.jsonl").read_text().splitlines()[:5]
    rows = [json.loads(line) for line in examples]
    for row in rows:
        del row["relevance"]  # nobody who asks for a ranking has it
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"input={source}", f"output={target}"]
    rank(str(finished_run / "student"), load_config(RankConfig, arguments))
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        if answer["ranking"] is None:
            assert answer["reason"]
        else:
            assert sorted(answer["ranking"]) == sorted(item["id"] for item in row["items"])


def test_the_loop_runs_on_transformers_alone(
    hf_config: Config, prepared: Prepared, hf_cluster: Cluster
) -> None:
    changed = dataclasses.replace(hf_config, name="hf", num_steps=2, group_size=2)
    rows = metrics_of(run_again(changed, prepared, hf_cluster))
    assert rows[0]["gate/rollout_max"] < 1e-4
    assert all(row["sync/canary_max"] < 1e-4 for row in rows[1:])
    assert rows[1]["kl/mismatch_max"] < 1e-4
