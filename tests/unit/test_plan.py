"""`listopd plan`: what it says of memory against counting, and that what cannot fit is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from listopd_ray.__main__ import main
from listopd_ray.config import load_config
from listopd_ray.job_config import Machine, PlanConfig, SearchConfig, StudyConfig
from listopd_ray.plan.command import actors_of, models_of, plan
from listopd_ray.plan.memory import (
    BYTES,
    fed_tokens,
    learner_memory,
    per_token,
    rollout_memory,
    scoring_memory,
)
from listopd_ray.plan.placing import nodes_of, place
from listopd_ray.plan.shapes import shape_of
from listopd_ray.plan.times import Rates, estimate
from listopd_ray.types import ListopdError

CONF = Path(__file__).parents[2] / "conf"
# hidden, layers, intermediate, heads, tied: as published
QWEN3 = {
    "Qwen3-1.7B": (2048, 28, 6144, 16, True),
    "Qwen3-4B": (2560, 36, 9728, 32, True),
    "Qwen3-8B": (4096, 36, 12288, 32, False),
}
# Files of conf/: who is student and teacher, and hardware on which it cannot be.
SHIPPED = {
    "qwen3_1p7b.yaml": ("Qwen3-1.7B", "Qwen3-4B", "plan.machines.node.gpu_memory_gib=16"),
    "qwen3_4b_lora.yaml": ("Qwen3-4B", "Qwen3-8B", "plan.machines.gpu.gpu_memory_gib=40"),
    "qwen3_8b_teacher.yaml": ("Qwen3-1.7B", "Qwen3-8B", "plan.machines.teacher.count=1"),
}
SMALL = dict(hidden_size=128, intermediate_size=320, num_attention_heads=8, vocab_size=96)
MODELS = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, num_key_value_heads=4, head_dim=32)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=4, head_dim=16)),
}


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    """A directory of config.json files, without weights."""
    root = tmp_path_factory.mktemp("models")
    for name, (hidden, layers, inner, heads, tied) in QWEN3.items():
        Qwen3Config(
            vocab_size=151_936,
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=tied,
        ).save_pretrained(root / name)
    return root


def shipped(file, qwen3, *arguments):
    student, teacher, _ = SHIPPED[file]
    paths = [f"student.path={qwen3 / student}", f"teacher.path={qwen3 / teacher}"]
    return load_config(PlanConfig, [str(CONF / file), *paths, *arguments])


def kept_bytes(kind, mode, num_layers, with_adapter):
    """What autograd holds after a forward pass of 3 × 40 tokens, weights apart."""
    make, config = MODELS[kind]
    config.num_hidden_layers = num_layers
    config.layer_types = ["full_attention"] * num_layers
    model = make(config).to(torch.bfloat16 if mode == "bfloat16" else torch.float32)
    if with_adapter:
        get_peft_model(model, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    held, keep = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        keep.append(tensor)
        held[storage.data_ptr()] = (storage.nbytes(), tensor.dim() == 2 and tensor.shape)
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
    ):
        model.base_model(input_ids=torch.zeros(3, 40, dtype=torch.long), use_cache=False)
    shapes = {s for p in model.parameters() for s in (tuple(p.shape), tuple(p.shape)[::-1])}
    return sum(
        size
        for pointer, (size, shape) in held.items()
        if pointer not in weights and not (shape and tuple(shape) in shapes)  # copies for autocast
    )


@pytest.mark.parametrize("with_adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_activations_are_what_autograd_keeps(kind, mode, with_adapter, tmp_path):
    MODELS[kind][1].save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), "student.path", 0)
    layers = [kept_bytes(kind, mode, number, with_adapter) for number in (1, 3)]
    counted = (layers[1] - layers[0]) / 2 / (3 * 40)
    # Besides: norms' scales, attention's sums and the adapter's own (rank 1), a few bytes a token.
    assert counted == pytest.approx(per_token(shape, mode, has_adapter=with_adapter), rel=0.03)


def test_sizes_are_those_of_the_published_models(qwen3):
    sizes = {n: shape_of(str(qwen3 / n), "student.path", 0).parameters for n in QWEN3}
    assert sizes == {
        "Qwen3-1.7B": 1_720_574_976,
        "Qwen3-4B": 4_022_468_096,
        "Qwen3-8B": 8_190_735_360,
    }


def test_every_file_of_conf_loads():
    schemas = {"study.yaml": StudyConfig}
    for file in sorted(CONF.glob("*.yaml")):
        schema = SearchConfig if file.name.startswith("search") else PlanConfig
        load_config(schemas.get(file.name, schema), [str(file)])


@pytest.mark.parametrize("file", SHIPPED)
def test_what_is_shipped_fits_its_hardware_and_nothing_smaller(file, qwen3, capsys):
    plan(shipped(file, qwen3))
    assert "an update:" in capsys.readouterr().out
    with pytest.raises(ListopdError) as raised:
        plan(shipped(file, qwen3, SHIPPED[file][2]))
    assert "needs" in str(raised.value) and "\n" not in str(raised.value)


def test_one_gpu_of_80_gib_is_enough_where_the_file_says_so(qwen3, capsys):
    text = (CONF / "qwen3_1p7b.yaml").read_text()
    words = " ".join(line.lstrip("# ") for line in text.splitlines()[3:6]).split()
    keys = [word for word in words if "=" in word]
    assert len(keys) == 8
    plan(shipped("qwen3_1p7b.yaml", qwen3, *keys, "plan.machines.node.num_gpus=1"))
    assert "GPU 0" in capsys.readouterr().out


def test_weights_gradients_and_moments_are_counted_once_and_split_over_ranks(qwen3):
    config = shipped("qwen3_1p7b.yaml", qwen3)
    models = models_of(config)
    split, _ = learner_memory(config, models)
    alone = replace(config, learner=replace(config.learner, sharding="none"))
    whole, _ = learner_memory(alone, models)
    size = 4 * models.student.parameters
    assert (whole.parameters, whole.gradients, whole.optimizer) == (size, size, 2 * size)
    assert (split.parameters, split.gradients, split.optimizer) == (size / 4, size / 4, size / 2)


def test_an_adapter_needs_moments_for_itself_alone(qwen3):
    config = shipped("qwen3_4b_lora.yaml", qwen3)
    models = models_of(config)
    device, _ = learner_memory(config, models)
    # Rank 32 on q, k, v, o, gate, up and down of 36 layers.
    adapter = 32 * 36 * (2560 + 4096 + 2 * (2560 + 1024) + 4096 + 2560 + 3 * (2560 + 9728))
    assert models.student.adapter == adapter
    assert device.optimizer == 2 * 4 * adapter
    assert device.parameters == 2 * models.student.parameters + 4 * adapter


def test_the_base_is_held_by_teachers_unless_it_is_the_student_without_its_adapter(qwen3):
    lora = shipped("qwen3_4b_lora.yaml", qwen3)
    models = models_of(lora)

    def base(config):
        return scoring_memory(config, models, models.teachers["teacher"])[0].base

    copy = BYTES["bfloat16"] * models.student.parameters
    assert base(lora) == 0
    assert base(replace(lora, base=replace(lora.base, path="elsewhere"))) == copy
    assert base(replace(lora, lora=replace(lora.lora, rank=0))) == copy
    assert base(replace(lora, lora=replace(lora.lora, rank=0), lam=1.0)) == 0


def test_logits_are_bounded_and_checkpointing_spares_activations(qwen3):
    def memory(*arguments):
        config = shipped("qwen3_1p7b.yaml", qwen3, "learner.micro_batch_tokens=0", *arguments)
        return learner_memory(config, models_of(config))[0]

    def logits(mib):
        return memory(f"learner.logits_mib={mib}").logits

    assert logits(512) - logits(256) == pytest.approx(2 * (256 << 20), rel=0.01)
    assert logits(4096) == logits(8192)  # there are no more
    whole, half = memory().activations, memory("learner.micro_batch_size=16").activations
    assert memory("learner.gradient_checkpointing=false").activations > 3 * whole
    assert half < 0.8 * whole


def test_samples_of_a_prompt_are_fed_with_it_once(qwen3):
    keys = ["lam=1", "num_prompts=4", "group_size=6"]
    keys += ["plan.prompt_tokens=100", "plan.completion_tokens=10"]
    config = shipped("qwen3_1p7b.yaml", qwen3, *keys)
    models = models_of(config)
    student = models.student

    def tokens(shape, ranks=1):
        return fed_tokens(config, models, shape, 24, ranks)

    assert tokens(student) == 4 * 100 + 24 * 10
    assert tokens(student, ranks=2) == 8 * 100 + 24 * 10
    assert tokens(student, ranks=8) == tokens(replace(student, shares_prompts=False)) == 24 * 110

    def learn_and_score(*arguments):
        config = shipped("qwen3_1p7b.yaml", qwen3, *keys, "learner.num_ranks=1", *arguments)
        rates = Rates(operations={"float32": 1e12, "bfloat16": 1e12}, memory=1e11, weights=1e9)
        times = estimate(config, models_of(config), rates)
        return times.learn, times.score

    learn, score = learn_and_score()
    learn_alone, score_alone = learn_and_score("num_prompts=24", "group_size=1")
    assert learn < 0.4 * learn_alone and score < 0.4 * score_alone
    assert learn_and_score("scoring.backend=vllm") == (learn, score_alone)


def test_what_comes_and_goes_is_there_for_one_role_unless_all_work_at_once():
    keys = ["tokenizer.vocab_size=1000000", "learner.num_ranks=2", "evaluation.num_prompts=1"]
    keys.append("learner.logits_mib=1024")
    lengths = ["plan.prompt_tokens=4", "plan.completion_tokens=4"]
    config = load_config(PlanConfig, [*keys, *lengths])
    (node,) = nodes_of({"here": Machine()}, 1.0)
    place(config, actors_of(config, models_of(config)), [node])
    passing = {actor.name: memory.passing for actor, memory in node.on_host}
    together, in_turn = (node.need(0.0, together=together) for together in (True, False))
    learner = passing["learner 0"] + passing["learner 1"]
    others = [passing["rollout 0"], passing["teacher 0"], passing["driver"]]
    assert learner > max(others) > passing["learner 0"] / 2 > 0
    assert together - in_turn == pytest.approx(sum(others))


def test_roles_that_are_alike_are_one_line_and_all_are_placed(qwen3):
    config = shipped("qwen3_8b_teacher.yaml", qwen3)
    actors = actors_of(config, models_of(config))
    assert len(actors) == 1 + 4 + 4 + 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan.machines.small.memory_gib=2"], "GiB of main memory"),
        (["rollout.labels={pool: far}"], "rollout 0: no machine of plan.machines has pool=far"),
        (["device=cuda"], "learner.num_gpus: 0 although device=cuda"),
        (["student.path=nowhere"], "student.path: nowhere has no config.json"),
        (["teachers.other=nowhere"], "teachers.other: nowhere has no config.json"),
        (["plan.machines.a.memory_gib=-1"], "plan.machines.a.memory_gib: must be finite and > 0"),
        (
            ["plan.machines.a.memory_gb_s=nan"],
            "plan.machines.a.memory_gb_s: must be finite and > 0",
        ),
        (["plan.completion_tokens=0"], "plan.completion_tokens: must be at least 1"),
        (["plan.prompt_tokens=-5"], "plan.prompt_tokens: must be at least 1"),
        (["lora.rank=4", "lora.target_modules=[proj]"], "no linear layer called proj"),
        (["lora.rank=4", "lora.target_modules=[nothing]"], "no linear layer called nothing"),
        (
            ["device=cuda", "plan.machines.a.num_gpus=2"]
            + [f"{role}.num_gpus=1" for role in ("learner", "rollout", "scoring")],
            "teacher 0: needs 1 GPU, and none is left for it",
        ),
    ],
)
def test_what_cannot_be_ends_in_one_line_with_status_1(arguments, words):
    with pytest.raises(SystemExit) as raised:
        main(["plan", *arguments])
    assert words in raised.value.code and "\n" not in raised.value.code


@pytest.mark.parametrize(
    "broken",
    [
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"hidden_size": -5},
        {"num_experts": 128},
        {"model_type": "gpt2"},
        3,
    ],
    ids=str,
)
def test_a_config_json_that_is_no_dense_decoder_is_one_line(qwen3, tmp_path, broken):
    content = broken
    if isinstance(broken, dict):
        content = json.loads((qwen3 / "Qwen3-1.7B" / "config.json").read_text()) | broken
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as raised:
        main(["plan", f"student.path={tmp_path}"])
    assert raised.value.code.startswith("listopd: error: student.path: ")
    assert "\n" not in raised.value.code


def test_only_the_first_rank_collects_and_a_sampler_keeps_one_step_s_logits(qwen3):
    config = shipped("qwen3_1p7b.yaml", qwen3)
    models = models_of(config)
    (_, first), (_, second) = (learner_memory(config, models, rank) for rank in (0, 1))
    assert first.transit > 0 == second.transit
    keys = ["rollout.backend=hf", "rollout.max_num_seqs=64", "plan.completion_tokens="]
    logits = [
        rollout_memory(c, models_of(c))[0].logits
        for c in (shipped("qwen3_1p7b.yaml", qwen3, *keys[:2], f"{keys[2]}{n}") for n in (4, 40))
    ]
    assert logits[0] == logits[1] == 24 * 64 * 151_936


def test_the_default_fits_this_machine_and_says_how_long_an_update_takes(capsys):
    main(["plan", str(CONF / "demo.yaml"), "plan.prompt_tokens=60"])
    shown = capsys.readouterr().out
    for word in ("learner", "rollout", "teacher", "driver", "object store", "an update:"):
        assert word in shown
