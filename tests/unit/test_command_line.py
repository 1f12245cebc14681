import json
import os
import signal
import subprocess
import sys

import pytest

from listopd_ray import __version__
from listopd_ray.__main__ import COMMANDS, main


def fails_with(arguments) -> str:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    message = raised.value.code
    assert isinstance(message, str)  # sys.exit prints it and leaves with status 1
    assert "\n" not in message
    return message


def test_without_a_command_the_commands_are_listed(capsys):
    main([])
    listed = capsys.readouterr().out
    assert all(f"  {name}" in listed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_key_with_its_default(name, capsys):
    main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert COMMANDS[name].summary[1:] in shown
    others = {
        "watch": "every_s=2.0",
        "report": "out=null",
        "compare": "out=compare.html",
        "model import": "gguf=null",
    }
    assert others.get(name, "seed=0") in shown


def test_help_shows_defaults_of_nested_and_inherited_keys(capsys):
    main(["rank", "--help"])
    shown = capsys.readouterr().out
    assert "  lam_schedule.initial=1.0 " in shown  # not the 0.0 of the class alone
    assert "  input=/dev/stdin " in shown
    assert "δ of the bounded form" in shown
    main(["label", "--help"])
    shown = capsys.readouterr().out
    assert "directory of the labelled dataset" in shown  # not what `out` is elsewhere
    assert "the key under which a run is found again" in shown
    main(["study", "--help"])
    assert "  study.curves.NAME.step=0.1 " in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"listopd {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean 'train'?"),
        (["data", "syntetic"], "did you mean 'data synthetic'?"),
        (["train", "lamm=2"], "Did you mean one of: 'lam', 'alarm'?"),
        (["train", "student.warmstart.num_step=2"], "'num_steps'"),
        (["train", "lam=much"], "lam: must be a number or auto"),
        (["train", "clip=1"], "clip: c must be > 1"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["train", "--fast"], "--fast: no such flag"),
        (["train", "-f=1"], "-f=1: no such flag"),
        (["train", "--bogus", "1"], "bogus"),
        (["compare", "--group", "lam"], "RUN… is missing"),
        (["report", "no/such/run"], "no such directory"),
        (["report"], "RUN is missing"),
        (["train", "fast"], "'fast' is neither key=value nor a YAML file"),
        (["evaluate", "lam=1"], "MODEL is missing"),
        (["label", "out=labelled"], "MODEL is missing"),
        (["label", "model", "data.path=data"], "give out=DIR"),
        (["watch", "every_s=1"], "RUN is missing"),
        (["watch", "nowhere"], "nowhere: no such directory"),
        (["label", "model", "out=x", "rollout.grammar=true", "rollout.backend=hf"], "backend=vllm"),
        (["data", "amazon"], "give meta=FILE"),
        (["data", "synthetic", "num_items=1"], "num_items"),
    ],
)
def test_a_mistake_ends_in_one_line_that_says_what_and_where(arguments, words):
    assert words in fails_with(arguments)


def test_a_file_that_is_not_yaml_is_named_in_one_line(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("lam: [1\n")
    assert str(file) in fails_with(["train", str(file)])


def test_the_command_line_runs_as_a_module_and_leaves_with_its_status(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "listopd_ray", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    made = run("data", "synthetic", "out=data", "num_train=20", "num_eval=5")
    assert made.returncode == 0
    assert "20 train and 5 eval examples" in made.stdout
    assert len((tmp_path / "data" / "train.jsonl").read_text().splitlines()) == 20
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["num_examples"]["eval"] == 5
    failed = run("train", "lam=-1")
    assert failed.returncode == 1
    assert failed.stderr == "listopd: error: lam: λ must be finite and ≥ 0\n"


@pytest.mark.parametrize(
    ("name", "signum"), [("SIGTERM", signal.SIGTERM), ("SIGINT", signal.SIGINT)]
)
def test_a_signal_ends_a_command_in_one_line_with_its_status(name, signum, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    monkeypatch.setattr(
        "listopd_ray.__main__._dispatch", lambda _: os.kill(os.getpid(), int(signum))
    )
    try:
        with pytest.raises(SystemExit) as raised:
            main([])
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
    assert raised.value.code == 128 + signum
    assert capsys.readouterr().err == f"listopd: interrupted by {name}\n"


def test_a_reader_that_goes_away_is_no_traceback():
    command = [sys.executable, "-m", "listopd_ray", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
