"""The student: adapters, checkpoints of them, and ways to save memory that change nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from oracles import prefix_logprobs
from peft import PeftModel
from safetensors.torch import load_file

from listopd_ray.config import Config, LearnerConfig, LoraConfig, TeacherActorConfig
from listopd_ray.models import load_model, write_files
from listopd_ray.roles.learner import Learner
from listopd_ray.roles.rollout import Generated
from listopd_ray.roles.teacher import Teacher
from listopd_ray.types import ListopdError

LR = 1e-3
LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def make_learner(student_path, canary_ids):
    def make(lora=LORA, path=student_path, learner=None, **settings):
        options = dict(micro_batch_size=4, max_grad_norm=1e9) | (learner or {})
        config = Config(learner=LearnerConfig(**options), lora=lora, lam=1.5, **settings)
        return Learner(config, student_path=str(path), canary_ids=canary_ids)

    return make


@pytest.fixture(scope="module")
def teacher(teacher_path):
    return Teacher(
        TeacherActorConfig(micro_batch_size=8, support_size=5),
        teacher_path=str(teacher_path),
        dtype="float32",
        device="cpu",
    )


@pytest.fixture(scope="module")
def generated(rollouts):
    return Generated(rollouts=rollouts, seconds=0.0)


@pytest.fixture(scope="module")
def scored(teacher, generated):
    return teacher.score(generated)


@pytest.fixture(scope="module")
def scored_with_base(teacher, generated, student_path):
    return teacher.score(generated, str(student_path))


def tensors_of(learner):
    return {name: tensor.copy() for name, tensor in learner.publish_weights().tensors.items()}


def numbers(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_the_student_without_its_adapter_is_the_base(
    make_learner, scored, scored_with_base, estimator
):
    """Against a real second copy, over updates: scores of the base, losses, weights."""
    scoring = TeacherActorConfig(support_size=5)
    options = dict(estimator=estimator, scoring=scoring, ratio_clip=10.0)
    alone = make_learner(**options)
    # The same base by its path: then the learner leaves it to the teacher's actor.
    copy = make_learner(**options, base=dataclasses.replace(Config().base, path="a copy"))
    for _ in range(5):
        ours, theirs = alone.step(1.5, LR, scored), copy.step(1.5, LR, scored_with_base)
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-4, abs=1e-5)
        assert {"cliff/base_mass_item_id", "cliff/base_unused_mass"} <= ours.keys()
    left, right = tensors_of(alone), tensors_of(copy)
    for name in left:
        np.testing.assert_allclose(left[name], right[name], atol=1e-5, err_msg=name)


def test_twenty_updates_and_syncs_leave_the_base_bit_for_bit(
    make_learner, scored, student_path, teacher_path
):
    learner = make_learner()
    before = tensors_of(learner)
    stored = load_model(student_path).state_dict()
    for name, tensor in before.items():  # an untrained adapter adds nothing
        assert np.array_equal(tensor, stored[name].numpy())
    for _ in range(20):
        learner.step(1.5, LR, scored)
        learner.publish_weights()
    kept = {
        name.replace(".base_layer.", "."): p.detach()
        for name, p in learner._student.model.named_parameters()
        if ".lora_" not in name
    }
    assert all(torch.equal(kept[name], stored[name]) for name in kept)
    after = tensors_of(learner)
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {name for name in after if "proj" in name}  # every linear layer of a block
    assert after.keys() == {*stored, "lm_head.weight"}


def test_merged_weights_are_base_plus_scaled_product(make_learner, scored):
    learner = make_learner()
    learner.step(1.5, LR, scored)
    merged, layer = tensors_of(learner), "model.layers.1.mlp.down_proj"
    module = learner._student.model.get_submodule(layer)
    down, up = (
        m["default"].weight.detach().double().numpy() for m in (module.lora_A, module.lora_B)
    )
    expected = module.base_layer.weight.detach().double().numpy() + 8.0 / 4 * up @ down
    assert np.abs(up).max() > 0
    np.testing.assert_allclose(merged[f"{layer}.weight"], expected, atol=1e-7)


def test_exported_student_and_adapter_are_the_policy_in_training(
    make_learner, scored, tmp_path, student_path, canary_ids
):
    learner = make_learner()
    learner.step(1.5, LR, scored)
    files = learner.exported()
    for name, content in files.items():
        write_files(tmp_path / name, content)
    canary = learner.publish_weights().canary_logprobs
    merged = load_model(tmp_path / "student").eval()
    adapted = PeftModel.from_pretrained(load_model(student_path), tmp_path / "adapter").eval()
    for model in (merged, adapted):
        rows = prefix_logprobs(model, canary_ids[:1], canary_ids[1:])
        expected = [row[t] for row, t in zip(rows, canary_ids[1:], strict=True)]
        np.testing.assert_allclose(canary, expected, atol=1e-5)
    assert json.loads(files["student"]["config.json"])["architectures"] == ["Qwen3ForCausalLM"]


def test_a_restored_adapter_goes_on_as_the_uninterrupted_one(make_learner, scored, tmp_path):
    whole = make_learner()
    whole.step(1.5, LR, scored)
    files = whole.save(str(tmp_path / "checkpoint"))
    assert not any(name.startswith("student/") for name in files)  # the base is not kept twice
    resumed = make_learner(seed=5)
    resumed.restore(str(tmp_path / "checkpoint"), files)
    assert numbers(whole.step(1.5, LR, scored)) == numbers(resumed.step(1.5, LR, scored))
    left, right = tensors_of(whole), tensors_of(resumed)
    assert all(np.array_equal(left[name], right[name]) for name in left)
    for number in (0, 1):
        directory = tmp_path / str(number)
        (whole, resumed)[number].save(str(directory))
    one, two = (load_file(tmp_path / n / "optimizer.safetensors") for n in ("0", "1"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("lora", [LORA, LoraConfig()])
@pytest.mark.parametrize(
    "saving",
    [{"gradient_checkpointing": True}, {"micro_batch_tokens": 60}, {"logits_mib": 1}],
)
def test_what_saves_memory_changes_no_update(
    make_learner, scored_with_base, lora, saving, monkeypatch
):
    if "logits_mib" in saving:  # the vocabulary is small: a chunk of seven rows
        monkeypatch.setattr("listopd_ray.roles.head.MIB", 4 * 7 * 300)
    plain = make_learner(lora=lora)
    saving = make_learner(lora=lora, learner=saving)
    for _ in range(2):
        metrics = [x.step(1.5, LR, scored_with_base) for x in (plain, saving)]
        assert numbers(metrics[1]) == pytest.approx(numbers(metrics[0]), rel=1e-4, abs=1e-5)
    left, right = tensors_of(plain), tensors_of(saving)
    gaps = np.concatenate([np.abs(left[name] - right[name]).ravel() for name in left])
    assert np.mean(gaps > 1e-5) < 1e-3  # Adam: where a gradient is nearly 0 rounding shows


def test_autocast_computes_in_bfloat16_over_float32_weights(make_learner, scored_with_base):
    options = dict(lora=LoraConfig())
    exact = make_learner(**options)
    half = make_learner(**options, learner={"autocast": True})
    left, right = (x.step(1.5, LR, scored_with_base) for x in (exact, half))
    assert left["kl/reverse"] == pytest.approx(right["kl/reverse"], abs=0.05)
    assert left["kl/reverse"] != right["kl/reverse"]  # eight bits of mantissa show
    assert {p.dtype for p in half._student.trained()} == {torch.float32}
    assert {p.grad.dtype for p in half._student.trained()} == {torch.float32}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(rank=2, target_modules=["no_such_layer"]), "lora: .*no_such_layer"),
        (LoraConfig(rank=2, target_modules=["lm_head"]), "lora.target_modules: not the output"),
        (LoraConfig(rank=2, peft={"no_such_option": 1}), "lora: .*no_such_option"),
    ],
)
def test_an_adapter_that_cannot_be_made_is_one_line(make_learner, lora, message):
    with pytest.raises(ListopdError, match=message):
        make_learner(lora=lora)
