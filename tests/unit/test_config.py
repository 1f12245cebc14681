import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from listopd_ray.config import (
    CliffConfig,
    Config,
    Schedule,
    describe_keys,
    dump_config,
    load_config,
    needs_base,
    run_directory,
    schedule_value,
    with_values,
)
from listopd_ray.job_config import CalibrateConfig, DemoConfig, SearchConfig, StudyConfig
from listopd_ray.types import ListopdError

CONF = Path(__file__).parents[2] / "conf"


def load(*arguments):
    return load_config(Config, list(arguments))


@pytest.fixture
def write_yaml(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def one_line_error(*arguments):
    with pytest.raises(ListopdError) as raised:
        load(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_without_arguments_the_defaults_hold():
    assert load() == Config()


def test_later_arguments_win_over_earlier_ones_and_over_defaults(write_yaml):
    first = write_yaml("first.yaml", "lam: 1.5\nclip: 3.0\nlearner: {beta1: 0.8, beta2: 0.9}\n")
    second = write_yaml("second.yml", "clip: 4.0\nlearner: {beta2: 0.99}\n")
    config = load(first, "lam=2", second, "num_steps=7")
    assert (config.lam, config.clip, config.num_steps) == (2.0, 4.0, 7)
    assert (config.learner.beta1, config.learner.beta2) == (0.8, 0.99)  # sections merge by key
    assert load("clip=5.0", first).clip == 3.0  # also a file after a pair
    assert load(second, first).clip == 3.0


def test_numbers_may_be_written_in_any_usual_way():
    config = load("lr=1e-3", "clip=.inf", "demo_seeds=[0,1,2]", "data.path=null", "name=17")
    assert config.lr == 0.001
    assert config.clip == math.inf
    assert config.demo_seeds == [0, 1, 2]
    assert config.data.path is None
    assert config.name == "17"


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("num_prompt=3", "num_prompts"),
        ("learner.micro_batchsize=3", "micro_batch_size"),
        ("student.warmstart.num_step=3", "num_steps"),
        ("max_stalenes=1", "max_staleness"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(argument, nearest):
    message = one_line_error(argument)
    assert argument.partition("=")[0].split(".")[-1] in message
    assert nearest in message


def test_an_unknown_key_in_a_file_is_named_with_the_file(write_yaml):
    file = write_yaml("typo.yaml", "learner:\n  beta_1: 0.5\n")
    message = one_line_error(file)
    assert file in message
    assert "beta1" in message


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("lam=high", "lam"),
        ("lam=true", "lam"),
        ("lam=null", "lam"),
        ("governor.enabled=perhaps", "enabled"),
        ("alarm.action=panic", "action"),
        ("num_steps=2.5", "num_steps"),
        ("num_steps=null", "num_steps"),
        ("learner.beta1=[1]", "beta1"),
        ("student=3", "student"),
        ("tracking.wandb=perhaps", "wandb"),
        ("extrapolation=wild", "extrapolation"),
        ("rollout.backend=sglang", "backend"),
        ("lam_schedule.kind=cosine", "kind"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(argument, key):
    assert key in one_line_error(argument)


@pytest.mark.parametrize(
    "arguments",
    [
        ["lam=-0.1"],
        ["lam=.nan"],
        ["lam=.inf"],
        ["clip=1"],
        ["clip=.nan"],
        ["delta=1.1"],
        ["delta=-0.1"],
        ["ratio_clip=0"],
        ["clip=.inf", "extrapolation=bounded"],
        ["lam=auto", "clip=.inf"],
        ["lam=auto", "extrapolation=bounded"],
        ["lam=auto", "lam_schedule.kind=linear"],
        ["governor.enabled=true", "extrapolation=bounded"],
        ["governor.margin=1"],
        ["governor.decay=-0.1"],
        ["governor.decay=1"],
        ["alarm.backoff=1"],
        ["alarm.parse_share=1"],
        ["alarm.patience=0"],
        ["alarm.max_rollbacks=-1"],
        ["max_staleness=2"],
        ["max_staleness=-1"],
        ["lr=0"],
        ["num_prompts=0"],
        ["group_size=0"],
        ["num_steps=0"],
        ["lam_schedule.kind=warmup"],
        ["lr_schedule.kind=warmup", "lr_schedule.steps=0"],
        ["student.warmstart.format_noise=1"],
        ["teacher.hidden_size=48"],
        ["rollout.num_workers=0"],
        ["rollout.grammar=true", "rollout.backend=hf"],
        ["scoring.num_actors=0"],
        ["scoring.backend=vllm", "scoring.temperature=0.5"],
        ["scoring.backend=vllm", "scoring.id_temperature=0.5"],
        ["scoring.backend=vllm", "scoring.uniform_share=0.1"],
        ["teachers={code: ''}"],
        ["name=a/b"],
        ["name=.."],
        ["name="],
    ],
    ids=" ".join,
)
def test_a_value_out_of_range_is_named_with_its_key(arguments):
    named = [argument.partition("=")[0].removesuffix(".kind") for argument in arguments]
    message = one_line_error(*arguments)
    assert any(message.startswith(key) for key in named), message


@pytest.mark.parametrize(
    "argument",
    [
        "learner.micro_batch_size=0",
        "scoring.micro_batch_size=0",
        "scoring.support_size=-1",
        "rollout.max_num_seqs=0",
        "rollout.kv_cache_mib=0",
        "rollout.max_new_tokens=-1",
        "checkpoint.keep=0",
        "learner.beta1=1",
        "learner.max_grad_norm=0",
        "lam_schedule.final=-1",
        "lr=.inf",
        "rollout.num_cpus=-1",
        "scoring.num_cpus=nan",
        "learner.num_gpus=.inf",
        "scoring.num_cpus=0",  # and no GPU: Ray has no place for it
        "autoscaling_wait_s=-1",
        "rollout.labels={pool: in(a, b)}",
        "learner.labels.pool=",
        "learner.labels.pool=" + "x" * 64,
        "learner.labels={a b: x}",
        "learner.labels.ray.io/accelerator-type=H100",  # its dots part keys
        "num_steps=99999999999999999999999",
        "name=" + "x" * 201,
    ],
)
def test_a_value_that_could_only_fail_later_is_refused_at_once(argument):
    arguments = [argument]
    if argument.startswith("lam_schedule"):
        arguments.append("lam_schedule.kind=linear")
    assert argument.partition("=")[0].split(".")[0] in one_line_error(*arguments)


@pytest.mark.parametrize(
    "argument",
    [
        "rollout.engine.trust_remote_code=true",
        "rollout.engine={trust_remote_code: yes}",
        "rollout.engine.load_format=pt",
        "rollout.engine.load_format=auto",
    ],
)
def test_no_key_lets_a_checkpoint_bring_code_or_pickles(argument):
    assert "no code and no pickles from checkpoints" in one_line_error(argument)
    assert load("rollout.engine={trust_remote_code: false, load_format: safetensors}")


@pytest.mark.parametrize("argument", ["lam=much", "lam='1.5'"])
def test_lam_is_a_number_or_auto(argument):
    assert load("lam=auto").lam == "auto"
    assert [load(f"lam={text}").lam for text in ("2", "2.5", "1e0")] == [2, 2.5, 1]
    assert one_line_error(argument) == "lam: must be a number or auto"


@pytest.mark.parametrize("argument", ["lam", "conf.json", "--lam", ""])
def test_an_argument_that_is_neither_a_file_nor_a_pair_is_refused(argument):
    assert argument in one_line_error(argument)


def test_a_missing_file_is_named(tmp_path):
    file = str(tmp_path / "nowhere.yaml")
    assert one_line_error(file) == f"{file}: no such file"


@pytest.mark.parametrize("text", ["lam: [1", "a: b: c", "- 1\n- 2\n", "just words", "\x00"])
def test_a_file_that_is_no_mapping_of_keys_is_named(write_yaml, text):
    file = write_yaml("broken.yaml", text)
    assert file in one_line_error(file)


def test_an_empty_file_changes_nothing(write_yaml):
    assert load(write_yaml("empty.yaml", "")) == Config()


@pytest.mark.parametrize("argument", ["name=${nowhere}", "name=${oc.env:NO_SUCH_VARIABLE}"])
def test_a_reference_to_nothing_is_an_error_of_one_line(argument):
    assert argument.partition("=")[0] in one_line_error(argument)


def test_the_dumped_configuration_reads_back_as_the_same(write_yaml):
    config = load(
        "lam=1.7",
        "clip=.inf",
        "lr=3e-7",
        "name=ä run",
        "lam_schedule={kind: linear, final: 1.5}",
        "rollout.engine={enforce_eager: true, nested: {a: [1, 2]}}",
        "student.path=/models/qwen",
        "demo_seeds=[3]",
    )
    assert load(write_yaml("dumped.yaml", dump_config(config))) == config


def test_the_key_from_is_one_of_calibration_alone(write_yaml):
    file = write_yaml("calibrate.yaml", "from: a.json\nclip: 3.0\n")
    for arguments in (["from=a.json", "clip=3.0"], [file]):
        config = load_config(CalibrateConfig, arguments)
        assert (config.from_, config.clip) == ("a.json", 3.0)
    assert load_config(CalibrateConfig, [write_yaml("dumped.yaml", dump_config(config))]) == config
    assert {key for key, _, _ in describe_keys(CalibrateConfig) if "from" in key} == {
        "from",
        "from_clip",
        "from_curve",
    }
    assert one_line_error("from=a.json") == "from=a.json: Key 'from' not in 'Config'"


def test_values_by_dotted_key_are_checked_like_arguments():
    config = with_values(CalibrateConfig(from_="x"), {"lam": "auto", "alarm.action": "stop"})
    assert config == load("lam=auto", "alarm.action=stop")
    for values in ({"alarm.patience": 0}, {"alarm.patients": 1}, {"lam": "much"}):
        with pytest.raises(ListopdError, match=next(iter(values)).split(".")[-1]):
            with_values(Config(), values)


def test_a_configuration_cannot_be_changed():
    config = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lam = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.learner.beta1 = 0.0


def test_no_two_configurations_share_a_list_or_mapping():
    assert Config().demo_seeds is not Config().demo_seeds
    assert Config().rollout.engine is not Config().rollout.engine


def test_a_run_lives_under_out_and_name():
    assert str(run_directory(load("out=somewhere", "name=mine"))) == "somewhere/mine"


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule(), [2.0, 2.0, 2.0, 2.0, 2.0]),
        (Schedule(kind="constant", initial=9.0, final=9.0, steps=3), [2.0] * 5),
        (Schedule(kind="warmup", initial=1.0, steps=4), [1.25, 1.5, 1.75, 2.0, 2.0]),
        (Schedule(kind="warmup", initial=0.0, steps=1), [2.0] * 5),
        (Schedule(kind="linear", final=1.0), [2.0, 1.75, 1.5, 1.25, 1.0]),
        (Schedule(kind="linear", final=4.0), [2.0, 2.5, 3.0, 3.5, 4.0]),
    ],
    ids=str,
)
def test_schedule_takes_these_values(schedule, values):
    assert [schedule_value(schedule, 2.0, step, 5) for step in range(5)] == values


def test_a_linear_schedule_over_one_step_stays_at_its_start():
    assert schedule_value(Schedule(kind="linear", final=1.0), 2.0, 0, 1) == 2.0


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ([], False),
        (["lam=1.2"], True),
        (["lam=0"], True),
        (["lam_schedule.kind=warmup", "lam_schedule.steps=5"], False),  # from 1 to 1
        (["lam=2", "lam_schedule.kind=warmup", "lam_schedule.steps=500"], True),
        (["lam_schedule.kind=linear", "lam_schedule.final=1.5"], True),  # only later
        (["lam_schedule.kind=linear", "lam_schedule.final=1.5", "num_steps=1"], False),
        (["cliff.measure=true"], True),
        (["lam=auto"], True),
        (["governor.enabled=true"], False),  # nothing to cap at λ = 1
        (["governor.enabled=true", "lam=1.2"], True),
    ],
    ids=str,
)
def test_a_base_is_needed_where_any_step_extrapolates_or_measures(arguments, needed):
    assert needs_base(load(*arguments)) is needed


def test_every_key_can_be_written_in_a_yaml_file_as_it_is():
    names = {part for key, _, _ in describe_keys(StudyConfig) for part in key.split(".")}
    assert dict.fromkeys(names, 1) == yaml.safe_load("".join(f"{name}: 1\n" for name in names))


def test_every_key_is_described_once():
    keys = [key for key, _, _ in describe_keys(Config)]
    assert len(keys) == len(set(keys))
    assert {"lam", "student.warmstart.lr", "rollout.engine", "lr_schedule.kind"} <= set(keys)
    described = {key: (default, comment) for key, default, comment in describe_keys(Config)}
    assert described["lam"] == ("1.0", "λ; auto: as high as the governor allows")
    assert described["data.path"][0] == "null"
    assert described["cliff.measure"][0] == str(CliffConfig().measure)


def test_the_file_of_a_whole_job_serves_for_a_single_run(tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text("num_steps: 7\nsearch: {slots: 3}\n")
    assert load_config(Config, [str(file)]).num_steps == 7
    assert load_config(CalibrateConfig, [str(file)]).num_steps == 7
    assert load_config(SearchConfig, [str(file)]).search.slots == 3
    with pytest.raises(ListopdError, match="search"):
        load_config(Config, ["search.slots=3"])


@pytest.mark.parametrize("over", [[], ["bfloat16.yaml"], ["smollm2_135m_products.yaml"]])
def test_the_real_models_files_lie_over_each_other(over):
    files = [str(CONF / name) for name in ["smollm2_135m.yaml", *over]]
    config = load_config(DemoConfig, files)
    assert load_config(Config, files).num_threads == 2  # for a run of its own
    assert config.student.path == config.teacher.path
    assert config.learner.autocast == ("bfloat16.yaml" in over)
    shares = {name: run.share for name, run in config.demo.runs.items()}
    assert shares["lam1"] is None and 0 < shares["below"] < 1 < shares["above"]
    for name in ("study_smollm2.yaml", "study_smollm2_long.yaml"):
        study = load_config(StudyConfig, [*files, str(CONF / name)]).study
        assert all(curve.judge for curve in study.curves.values())
