import dataclasses
import math

import numpy as np
import oracles
import pytest
import torch
from oracles import prefix_logprobs

from listopd_ray.checkpoint import CorruptCheckpoint
from listopd_ray.config import Config, LearnerConfig, RolloutConfig, TeacherActorConfig
from listopd_ray.models import write_files
from listopd_ray.roles import losses, teacher
from listopd_ray.roles.learner import Learner
from listopd_ray.roles.rollout import Generated, Request, RolloutWorker
from listopd_ray.roles.teacher import Scored, Teacher
from listopd_ray.types import CONTRACT_CLASSES, ListopdError, Prompt, TokenClass

LR = 1e-3
TIMING = ("time/", "perf/")


@pytest.fixture
def make_learner(student_path, canary_ids):
    def make(path=student_path, **settings):
        # No limit on the gradient norm: rescaling would hide a wrong factor.
        learner = LearnerConfig(
            micro_batch_size=settings.pop("micro_batch_size", 8), max_grad_norm=1e9
        )
        config = Config(learner=learner, **settings)
        return Learner(config, student_path=str(path), canary_ids=canary_ids)

    return make


def make_teacher(teacher_path):
    return Teacher(
        TeacherActorConfig(micro_batch_size=4),
        teacher_path=str(teacher_path),
        dtype="float32",
        device="cpu",
    )


@pytest.fixture(scope="module")
def scored(rollouts, teacher_path, base_path):
    """Eight ragged rollouts whose sampler was a slightly different policy than the student."""
    rng = np.random.default_rng(0)
    noisy = tuple(
        dataclasses.replace(
            rollout,
            sampler_logprobs=rollout.sampler_logprobs
            + rng.normal(0, 0.2, len(rollout.token_ids)).astype(np.float32),
        )
        for rollout in rollouts
    )
    return make_teacher(teacher_path).score(Generated(rollouts=noisy, seconds=0.0), str(base_path))


def replaced(scored, index, **fields):
    """`scored` with other fields in one of its rollouts; `sampler_logprobs` is the rollout's."""
    parts = list(scored.rollouts)
    if "sampler_logprobs" in fields:
        own = {"sampler_logprobs": fields.pop("sampler_logprobs")}
        fields["rollout"] = dataclasses.replace(parts[index].rollout, **own)
    parts[index] = dataclasses.replace(parts[index], **fields)
    return dataclasses.replace(scored, rollouts=tuple(parts))


def weights_of(learner):
    return {name: tensor.copy() for name, tensor in learner.publish_weights().tensors.items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(
        left[name].tobytes() == right[name].tobytes() for name in left
    )


def gradients(learner):
    return torch.cat([p.grad.flatten() for p in learner._student.trained()])


def without_timing(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(TIMING)}


def test_micro_batches_of_one_and_of_eight_give_the_same_update(make_learner, scored):
    ones, eights = make_learner(micro_batch_size=1), make_learner(micro_batch_size=8)
    metrics = [learner.step(1.5, LR, scored) for learner in (ones, eights)]
    gap = (gradients(ones) - gradients(eights)).abs().max().item()
    # Float32 sums in another order. Measured: 3e-7, at a gradient norm of 5.8.
    assert gap < 1e-6 * gradients(ones).norm().item()
    assert gradients(ones).norm() > 1
    left, right = (without_timing(part) for part in metrics)
    assert left == pytest.approx(right, abs=1e-5)
    # Adam divides by the gradient's size, so where that is near its ε of 1e-8 rounding shows.
    pairs = [(weights_of(ones)[n], weights_of(eights)[n]) for n in weights_of(ones)]
    assert np.mean(np.concatenate([np.abs(a - b).ravel() for a, b in pairs]) > 1e-6) < 1e-3


def test_samples_that_share_a_prompt_give_the_update_of_samples_apart(
    make_learner, rollouts, teacher_path, base_path, monkeypatch
):
    in_groups = tuple(
        dataclasses.replace(rollout, prompt=rollouts[index % 3].prompt)
        for index, rollout in enumerate(rollouts)
    )
    learners, scores = [], []
    for can_share in (True, False):
        monkeypatch.setattr(teacher, "can_share_prompts", lambda _, can=can_share: can)
        part = make_teacher(teacher_path).score(
            Generated(rollouts=in_groups, seconds=0.0), str(base_path)
        )
        learner = make_learner(micro_batch_size=4)
        assert learner._student.can_share_prompts
        learner._student.can_share_prompts = can_share
        learner.step(1.5, LR, part)
        learners.append(learner)
        scores.append(np.concatenate([r.teacher_logprobs - r.base_logprobs for r in part.rollouts]))
    assert np.abs(scores[0] - scores[1]).max() < 1e-5
    shared, apart = map(gradients, learners)
    # Float32 sums in another order, of scores too.
    assert (shared - apart).abs().max() < 3e-6 * apart.norm()
    assert apart.norm() > 1


def test_the_split_over_teacher_actors_does_not_matter(make_learner, scored):
    whole, halves = make_learner(), make_learner()
    whole.step(1.5, LR, scored)
    parts = [Scored(rollouts=r, seconds=0.0) for r in (scored.rollouts[:3], scored.rollouts[3:])]
    halves.step(1.5, LR, *parts)
    assert same_bits(weights_of(whole), weights_of(halves))


def effective_share(learner, sampler):
    ratios = [math.exp(x - y) for x, y in zip(learner, sampler, strict=True)]
    return sum(ratios) ** 2 / sum(ratio**2 for ratio in ratios) / len(ratios)


@pytest.mark.parametrize("extrapolation", ["plain", "bounded"])
def test_metrics_match_the_oracle(
    make_learner, scored, student_model, teacher_model, base_model, tokenizer, extrapolation
):
    options = dict(lam=1.5, clip=2.0, extrapolation=extrapolation, delta=0.2)
    learner = make_learner(clip=2.0, extrapolation=extrapolation, delta=0.2, micro_batch_size=3)
    metrics = learner.step(options["lam"], LR, scored)

    own, sampler, gains, gaps, kinds_of = [], [], [], [], []
    unused = {"teacher": [], "base": []}
    first_ratios, first_gaps = [], []
    masses = {name: {kind: [] for kind in TokenClass} for name in ("teacher", "base", "student")}
    for part in scored.rollouts:
        prompt, token_ids = part.rollout.prompt.token_ids, part.rollout.token_ids
        student, teacher, base = (
            prefix_logprobs(model, prompt, token_ids)
            for model in (student_model, teacher_model, base_model)
        )
        sampler += part.rollout.sampler_logprobs.tolist()
        num_items = part.rollout.prompt.num_items
        starts = oracles.id_starts(tokenizer, token_ids, num_items)
        for t in list(starts)[:1]:
            token = token_ids[t]
            first_ratios.append(teacher[t][token] - base[t][token])
            gap = teacher[t][token] - student[t][token]
            first_gaps.append(oracles.clip_value(gap, math.log(2)))
        for t, used in starts.items():
            for owner, rows in (("teacher", teacher), ("base", base)):
                unused[owner].append(oracles.unused_mass(tokenizer, rows[t], used, num_items))
        for t, token in enumerate(token_ids):
            own.append(student[t][token])
            gaps.append(student[t][token] - teacher[t][token])
            gains.append(
                oracles.advantage(student[t][token], teacher[t][token], base[t][token], **options)
            )
            modal = teacher[t].argmax()
            kind = TokenClass(part.token_classes[t])
            kinds_of.append(kind)
            masses["teacher"][kind].append(math.exp(teacher[t][modal]))
            masses["base"][kind].append(math.exp(base[t][modal]))
            masses["student"][kind].append(math.exp(student[t][modal]))
    expected = {
        "loss/policy": oracles.loss(own, sampler, gains, ratio_clip=0.2, num_tokens=len(own)),
        "loss/advantage": np.mean(gains),
        "kl/reverse": np.mean(gaps),
        "kl/mismatch": np.mean(np.subtract(sampler, own)),
        "kl/mismatch_max": np.abs(np.subtract(sampler, own)).max(),
        "loss/clip_fraction": np.mean(np.abs(gaps) >= math.log(2)),
        "loss/ratio_clipped": np.mean(np.abs(np.exp(np.subtract(own, sampler)) - 1) > 0.2),
        "rollout/tokens": len(own),
        "rollout/staleness": 0,
    }
    expected |= {
        "cliff/first_log_ratio": np.mean(first_ratios),
        "cliff/first_clipped_log_ratio": np.mean(first_gaps),
    }
    expected |= {f"cliff/{owner}_unused_mass": np.mean(mass) for owner, mass in unused.items()}
    for owner, kinds in masses.items():
        for kind, values in kinds.items():
            if kind != TokenClass.STRAY:
                expected[f"cliff/{owner}_mass_{kind.name.lower()}"] = np.mean(values)
    expected["loss/effective_sample_size"] = effective_share(own, sampler)
    for kind in set(kinds_of) - {TokenClass.STRAY}:
        chosen = [index for index, other in enumerate(kinds_of) if other == kind]
        clipped = [abs(gaps[index]) >= math.log(2) for index in chosen]
        expected[f"loss/clip_fraction_{kind.name.lower()}"] = sum(clipped) / len(clipped)
        expected[f"loss/effective_sample_size_{kind.name.lower()}"] = effective_share(
            [own[index] for index in chosen], [sampler[index] for index in chosen]
        )
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert all(math.isfinite(value) for value in metrics.values())


def test_each_step_counts_as_a_policy_version_and_staleness_is_the_distance(make_learner, scored):
    learner = make_learner()
    versions, staleness = [learner.publish_weights().policy_version], []
    for _ in range(2):
        staleness.append(learner.step(1.0, LR, scored)["rollout/staleness"])
        versions.append(learner.publish_weights().policy_version)
    assert versions == [0, 1, 2]
    assert staleness == [0.0, 1.0]  # the rollouts stay those of version 0


def test_the_step_uses_the_learning_rate_it_is_given(make_learner, scored):
    learner = make_learner()
    before = weights_of(learner)
    learner.step(1.0, 0.0, scored)
    assert same_bits(before, weights_of(learner))
    learner.step(1.0, 1e-2, scored)
    moved = max(np.abs(after - before[n]).max() for n, after in weights_of(learner).items())
    assert 1e-3 < moved <= 1.1e-2  # Adam moves a weight by about the rate


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "column", ["teacher_logprobs", "base_logprobs", "sampler_logprobs", "teacher_modal_logprobs"]
)
def test_scores_that_are_not_finite_stop_the_step_and_leave_the_weights(
    make_learner, scored, column, value
):
    learner = make_learner(micro_batch_size=1)
    before = weights_of(learner)
    lengths = [len(s.rollout.prompt.token_ids) + len(s.rollout.token_ids) for s in scored.rollouts]
    last = int(np.argmin(lengths))  # when the gradients of all others are there already
    holder = scored.rollouts[last]
    good = getattr(holder.rollout if column == "sampler_logprobs" else holder, column)
    bad = good.copy()
    bad[-1] = value
    with pytest.raises(ListopdError, match=column.removesuffix("_logprobs")):
        learner.step(1.5, LR, replaced(scored, last, **{column: bad}))
    assert same_bits(before, weights_of(learner))
    assert learner.policy_version == 0
    # Nothing of the failed step is left: the next one is that of a learner that never failed.
    learner.step(1.5, LR, scored)
    fresh = make_learner(micro_batch_size=1)
    fresh.step(1.5, LR, scored)
    assert same_bits(weights_of(fresh), weights_of(learner))


def test_an_update_whose_gradient_is_not_finite_is_skipped(make_learner, scored, monkeypatch):
    learner, fresh = make_learner(), make_learner()
    for either in (learner, fresh):
        either.step(1.5, LR, scored)
    before = weights_of(learner)
    with monkeypatch.context() as patch:
        loss = losses.opd_loss
        patch.setattr(losses, "opd_loss", lambda *a, **k: math.nan * loss(*a, **k))
        metrics = learner.step(1.5, LR, scored)
    assert metrics["train/skipped"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())
    assert "loss/grad_norm" not in metrics
    assert same_bits(before, weights_of(learner))
    assert learner.policy_version == 2  # it is an update all the same
    assert learner.step(1.5, LR, scored)["train/skipped"] == 0.0
    fresh.step(1.5, LR, scored)  # without the one between
    assert same_bits(weights_of(fresh), weights_of(learner))


def test_a_restored_learner_goes_on_as_the_uninterrupted_one(
    make_learner, scored, teacher_path, tmp_path
):
    whole = make_learner()
    whole.step(1.5, LR, scored)
    whole.step(1.2, LR, scored)
    files = whole.save(str(tmp_path / "checkpoint"))

    resumed = make_learner(path=teacher_path)  # from other weights: all must come from the save
    resumed.restore(str(tmp_path / "checkpoint"), files)
    assert resumed.policy_version == 2
    assert same_bits(weights_of(whole), weights_of(resumed))
    for step in range(2):
        ours, theirs = (learner.step(1.5, LR * (1 + step), scored) for learner in (whole, resumed))
        assert without_timing(ours) == without_timing(theirs)
        assert same_bits(weights_of(whole), weights_of(resumed))
    states = [learner._optimizer.state_dict()["state"] for learner in (whole, resumed)]
    for index, slots in states[0].items():
        assert set(slots) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, states[1][index][slot]) for slot, value in slots.items())


@pytest.mark.parametrize("name", ["student/model.safetensors", "optimizer.safetensors"])
def test_a_learner_takes_nothing_from_a_damaged_checkpoint(make_learner, scored, tmp_path, name):
    learner = make_learner()
    learner.step(1.5, LR, scored)
    files = learner.save(str(tmp_path / "checkpoint"))
    learner.step(1.5, LR, scored)
    before = weights_of(learner)
    content = bytearray((tmp_path / "checkpoint" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "checkpoint" / name).write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=f"{name} is not what was written"):
        learner.restore(str(tmp_path / "checkpoint"), files)
    assert learner.policy_version == 2
    assert same_bits(before, weights_of(learner))


def test_a_learner_goes_back_to_before_its_first_update(make_learner, scored, tmp_path):
    learner = make_learner()
    files = learner.save(str(tmp_path / "checkpoint"))
    learner.step(3.0, LR, scored)
    learner.restore(str(tmp_path / "checkpoint"), files)
    assert learner.policy_version == 0
    learner.step(1.5, LR, scored)  # as if AdamW had seen nothing
    fresh = make_learner()
    fresh.step(1.5, LR, scored)
    assert same_bits(weights_of(fresh), weights_of(learner))


def test_published_weights_do_not_move_with_the_learner(make_learner, scored):
    learner = make_learner()
    weights = learner.publish_weights()
    before = {name: tensor.copy() for name, tensor in weights.tensors.items()}
    learner.step(1.5, LR, scored)
    changed = [name for name, tensor in weights.tensors.items() if (tensor != before[name]).any()]
    assert changed == []


def test_the_canary_is_the_learners_own_logprobs(make_learner, canary_ids, student_model):
    weights = make_learner().publish_weights()
    rows = prefix_logprobs(student_model, canary_ids[:1], canary_ids[1:])
    expected = [row[token] for row, token in zip(rows, canary_ids[1:], strict=True)]
    assert weights.canary_logprobs == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def gate(rollouts, student_path, teacher_path):
    """The student's own rollouts, scored with the student in the teacher's place."""
    teacher = make_teacher(teacher_path)
    return teacher.score_with(str(student_path), Generated(rollouts=rollouts, seconds=0.0))


def test_the_gate_passes_true_logprobs(make_learner, gate):
    metrics = make_learner().check_scores(gate)
    assert set(metrics) == {"gate/rollout_max", "gate/teacher_max"}
    assert max(metrics.values()) < 1e-5


@pytest.mark.parametrize(
    "spoil",
    [
        lambda logprobs: np.roll(logprobs, 1),  # off by one position
        lambda logprobs: logprobs + np.float32(1e-2),
        lambda logprobs: logprobs - np.float32(2e-4),  # twice what is allowed
        lambda logprobs: logprobs * np.float32(1.01),  # as of another temperature
        lambda logprobs: np.full_like(logprobs, np.nan),
    ],
    ids=["shifted", "biased", "barely", "tempered", "nan"],
)
@pytest.mark.parametrize("owner", ["rollout", "teacher"])
def test_the_gate_refuses_wrong_logprobs(make_learner, rollouts, gate, owner, spoil):
    column = {"rollout": "sampler_logprobs", "teacher": "teacher_logprobs"}[owner]
    wrong = replaced(gate, 0, **{column: spoil(rollouts[0].sampler_logprobs)})
    with pytest.raises(ListopdError, match=f"start-up gate: the {owner} actor"):
        make_learner().check_scores(gate, wrong)


def test_the_gate_refuses_scores_of_another_model(make_learner, rollouts, teacher_path):
    scored = make_teacher(teacher_path).score(Generated(rollouts=rollouts, seconds=0.0))
    with pytest.raises(ListopdError, match="teacher"):
        make_learner().check_scores(scored)


def test_the_teacher_is_itself_again_after_the_gate(rollouts, student_path, teacher_path):
    teacher, generated = make_teacher(teacher_path), Generated(rollouts=rollouts, seconds=0.0)
    before = teacher.score(generated).rollouts[0].teacher_logprobs
    during = teacher.score_with(str(student_path), generated).rollouts[0].teacher_logprobs
    after = teacher.score(generated).rollouts[0].teacher_logprobs
    assert np.abs(before - during).max() > 0.1
    np.testing.assert_array_equal(before, after)


@pytest.fixture
def make_worker(student_path):
    def make(path=student_path, **settings):
        return RolloutWorker(
            RolloutConfig(backend="hf"),
            model_path=str(path),
            dtype="float32",
            device="cpu",
            max_num_seqs=64,
            end_ids=(0,),
            max_prompt_tokens=64,
            **{"max_new_tokens": 8, "tolerance": 1e-4, **settings},
        )

    return make


def requests_for(rollouts, seed, copies):
    return [
        Request(prompt=rollout.prompt, sample_index=index, seed=1000 * seed + index)
        for rollout in rollouts
        for index in range(copies)
    ]


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(
    make_learner, make_worker, rollouts, student_path
):
    learner, worker = make_learner(), make_worker()
    worker.load_weights(learner.publish_weights())
    generated = worker.generate(requests_for(rollouts, seed=5, copies=2))
    scored = make_teacher(student_path).score(generated)
    learner.check_scores(scored)
    metrics = learner.step(1.0, LR, scored)
    assert abs(metrics["kl/reverse"]) < 1e-5
    assert abs(metrics["kl/mismatch"]) < 1e-5
    assert metrics["loss/grad_norm"] < 1e-5  # a teacher of its own gives about 1


def test_the_student_moves_towards_the_teacher(make_learner, make_worker, rollouts, teacher_path):
    learner, worker, teacher = (
        make_learner(),
        make_worker(max_new_tokens=2),
        make_teacher(teacher_path),
    )
    kls = []
    for step in range(30):
        worker.load_weights(learner.publish_weights())
        generated = worker.generate(requests_for(rollouts[:1], seed=step, copies=128))
        assert {rollout.policy_version for rollout in generated.rollouts} == {step}
        kls.append(learner.step(1.0, 1e-2, teacher.score(generated))["kl/reverse"])
    # Means of 1,280 tokens, known to a few per cent. Measured: 0.32.
    assert np.mean(kls[-5:]) < 0.5 * np.mean(kls[:5]), kls


def test_a_worker_refuses_to_sample_before_it_has_weights(make_worker, rollouts):
    worker = make_worker()
    with pytest.raises(RuntimeError, match="load_weights"):
        worker.generate(requests_for(rollouts, seed=0, copies=1))


def test_a_worker_refuses_weights_whose_canary_differs_and_serves_no_more(
    make_learner, make_worker, rollouts
):
    worker, weights = make_worker(), make_learner().publish_weights()
    assert worker.load_weights(weights).canary_max < 1e-5
    # A half-loaded update: one matrix of another version.
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = {**weights.tensors, name: weights.tensors[name] * np.float32(1.1)}
    for wrong in (
        dataclasses.replace(weights, tensors=tensors),
        dataclasses.replace(weights, canary_logprobs=weights.canary_logprobs * np.nan),
    ):
        with pytest.raises(ListopdError, match="canary"):
            worker.load_weights(wrong)
        with pytest.raises(RuntimeError, match="load_weights"):
            worker.generate(requests_for(rollouts, seed=0, copies=1))


def test_export_writes_a_checkpoint_of_the_trained_student(make_learner, scored, tmp_path):
    learner = make_learner()
    learner.step(1.0, LR, scored)
    write_files(tmp_path / "student", learner.exported()["student"])
    assert same_bits(weights_of(learner), weights_of(make_learner(path=tmp_path / "student")))


def test_a_prompt_is_no_part_of_the_loss(make_learner, scored):
    """The same tokens as prompt and as completion: only the latter count."""
    part = scored.rollouts[0]
    longer = dataclasses.replace(
        part.rollout.prompt,
        token_ids=np.concatenate([part.rollout.prompt.token_ids, part.rollout.token_ids[:3]]),
    )
    assert isinstance(longer, Prompt)
    cut = {
        field.name: getattr(part, field.name)[3:]
        for field in dataclasses.fields(part)
        if isinstance(getattr(part, field.name), np.ndarray)
    }
    rollout = dataclasses.replace(
        part.rollout,
        prompt=longer,
        token_ids=part.rollout.token_ids[3:],
        sampler_logprobs=part.rollout.sampler_logprobs[3:],
    )
    shorter = dataclasses.replace(part, rollout=rollout, **cut)
    metrics = make_learner().step(1.0, LR, Scored(rollouts=(shorter,), seconds=0.0))
    assert metrics["rollout/tokens"] == len(part.rollout.token_ids) - 3


def test_inspection_gives_advantages_in_the_order_of_the_batch(make_learner, scored):
    """Micro-batches take the rollouts in another order."""
    whole, ones = make_learner(micro_batch_size=8), make_learner(micro_batch_size=1)
    shown = [learner.step(1.5, LR, scored) and learner.inspect() for learner in (whole, ones)]
    lengths = [len(r.rollout.token_ids) for r in scored.rollouts]
    assert len(set(lengths)) > 1
    for inspection in shown:
        assert [len(a) for a in inspection.advantages] == lengths
    for left, right in zip(*(inspection.advantages for inspection in shown), strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    mean = np.concatenate(shown[0].advantages).mean()
    again = make_learner(micro_batch_size=8).step(1.5, LR, scored)
    assert mean == pytest.approx(again["loss/advantage"], rel=1e-5)


def test_histograms_count_every_token_and_rollout(make_learner, scored):
    parts = [replaced(scored, 0, sampler_logprobs=scored.rollouts[0].rollout.sampler_logprobs - 9)]
    learner = make_learner()
    learner.step(1.5, LR, *parts)
    histograms = learner.inspect().histograms
    ratio, staleness = histograms["loss/importance_ratio"], histograms["rollout/staleness"]
    tokens = sum(len(r.rollout.token_ids) for r in scored.rollouts)
    assert sum(ratio.counts) == tokens
    assert ratio.counts[-1] == len(scored.rollouts[0].rollout.token_ids)  # e⁹ is in the open bin
    assert ratio.edges[0] == pytest.approx(1 / 4) and ratio.edges[-1] == pytest.approx(4)
    middle = len(ratio.counts) // 2
    assert ratio.edges[middle] < 1 < ratio.edges[middle + 1]
    assert (staleness.counts, staleness.edges) == ([len(scored.rollouts)], [-0.5, 0.5])


def test_reverse_kl_of_a_class_is_that_of_its_tokens(make_learner, scored):
    learner = make_learner(clip=math.inf)  # and λ = 1: the advantage is log π_T − log π_θ
    metrics = learner.step(1.0, LR, scored)
    gaps = np.concatenate(learner.inspect().advantages)
    classes = np.concatenate([r.token_classes for r in scored.rollouts])
    for token_class in CONTRACT_CLASSES:
        expected = -gaps[classes == token_class].mean()
        assert metrics[f"kl/reverse_{token_class.name.lower()}"] == pytest.approx(expected)
    assert metrics["kl/reverse"] == pytest.approx(-gaps.mean())
