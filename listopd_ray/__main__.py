"""The command line: `listopd <command> [conf.yaml …] [key=value …]`."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from listopd_ray import __version__
from listopd_ray.config import Config, describe_keys, load_config
from listopd_ray.job_config import (
    CalibrateConfig,
    CompareConfig,
    DemoConfig,
    ImportConfig,
    PlanConfig,
    ReportConfig,
    SearchConfig,
    StudyConfig,
    WatchConfig,
)
from listopd_ray.label import LabelConfig, label_command
from listopd_ray.rank import RankConfig
from listopd_ray.redact import redacted_text
from listopd_ray.supervision import Interrupted
from listopd_ray.task.amazon import AmazonConfig, write_amazon
from listopd_ray.task.synthetic import SyntheticConfig, write_synthetic
from listopd_ray.types import ListopdError

SHOWN_AFTER_S = 2.0  # a bar of what may be done in no time

USAGE = """usage: listopd <command> [conf.yaml …] [key=value …]

YAML files are read left to right over the defaults, then the key=value pairs.
`listopd <command> --help` lists a command's keys; `listopd --version` the version.

commands:"""


@dataclass(frozen=True)
class Command:
    summary: str
    schema: type
    run: Callable[..., None]  # (config) or, with a positional argument, (argument, config)
    positional: str | None = None
    details: str = ""


def _data_synthetic(config: SyntheticConfig) -> None:
    print(write_synthetic(config))


def _data_amazon(config: AmazonConfig) -> None:
    from listopd_ray.tracking import progress_bar

    files = [Path(file) for file in (config.meta, config.reviews) if file]
    size = sum(file.stat().st_size for file in files if file.is_file())
    with progress_bar("read", size, unit="B", delay=SHOWN_AFTER_S) as bar:
        written = write_amazon(config, bar.update)
    print(written)


def _model_import(config: ImportConfig) -> None:
    from listopd_ray.model_import import import_model

    print(import_model(config))


def _plan(config: PlanConfig) -> None:
    from listopd_ray.plan.command import plan

    plan(config)


def _warmstart(config: Config) -> None:
    from listopd_ray.cluster import ray_session
    from listopd_ray.warmstart import warm_start

    with ray_session():
        for role in ("student", "teacher"):
            print(f"{role}: {warm_start(config, role)}")


def _train(config: Config) -> None:
    from listopd_ray.job import train_job

    train_job(config)


def _calibrate(config: CalibrateConfig) -> None:
    from listopd_ray.calibrate import calibrate_job

    calibrate_job(config)


def _demo(config: DemoConfig) -> None:
    from listopd_ray.demo import demo_job

    demo_job(config)


def _study(config: StudyConfig) -> None:
    from listopd_ray.study import study_job

    study_job(config)


def _search(config: SearchConfig) -> None:
    from listopd_ray.search.search import search_job

    search_job(config)


def _report(run: str, config: ReportConfig) -> None:
    from listopd_ray.report.page import report_command

    report_command(run, config)


def _compare(runs: list[str], config: CompareConfig) -> None:
    from listopd_ray.report.page import compare_command

    compare_command(runs, config)


def _watch(run: str, config: WatchConfig) -> None:
    from listopd_ray.watch import watch

    watch(run, config)


def _evaluate(model: str, config: Config) -> None:
    from listopd_ray.job import evaluate_job

    evaluate_job(model, config)


def _rank(model: str, config: RankConfig) -> None:
    from listopd_ray.rank import rank

    rank(model, config)


COMMANDS = {
    "data synthetic": Command(
        "write a seeded fashion catalogue's ranking examples", SyntheticConfig, _data_synthetic
    ),
    "data amazon": Command(
        "build ranking examples from Amazon Reviews 2023 files", AmazonConfig, _data_amazon
    ),
    "model import": Command(
        "make a checkpoint directory of a GGUF file",
        ImportConfig,
        _model_import,
        details="Weights are dequantised to float32; what is written is read back and compared.",
    ),
    "plan": Command(
        "say what a run takes in memory and time, and whether it fits",
        PlanConfig,
        _plan,
        details="Starts nothing and reads no weights: of a checkpoint directory config.json is "
        "enough.\nMachines are plan.machines.NAME, or this one. Ends with status 1 where a role "
        "does not fit.",
    ),
    "warmstart": Command(
        "fine-tune student and teacher on correct rankings (cached)", Config, _warmstart
    ),
    "train": Command(
        "distil one student on-policy; makes the warm starts it needs",
        Config,
        _train,
        details="Writes <out>/<name>/; the same command again continues an interrupted run,\n"
        "and shows the table of a finished one.",
    ),
    "calibrate": Command(
        "measure teacher and warm start, and predict λ* before any training",
        CalibrateConfig,
        _calibrate,
        details="Writes <out>/<name>/prediction.json. With from=FILE it scales an onset that a "
        "study or search\nmeasured at another clip instead.",
    ),
    "study": Command(
        "train curves over λ, with predictions locked before, and judge them",
        StudyConfig,
        _study,
        details="Writes <out>/<name>/; the same command again continues: one trial is the unit.",
    ),
    "demo": Command(
        "distil with several λ and print the table",
        DemoConfig,
        _demo,
        details="The runs of demo.runs (by default λ = 1, λ = 2 and λ = 5 bounded) for each of "
        "demo_seeds.\nWhere a λ is relative to λ*, that is predicted first. Finished runs are not "
        "repeated.",
    ),
    "search": Command(
        "find the interval of λ in which the output contract starts to break",
        SearchConfig,
        _search,
        details="Writes <out>/<name>/bracket.json and the student of the recommended λ. It starts\n"
        "from prediction=FILE of `listopd calibrate`, or from what it measures itself; the same\n"
        "command again continues. With search.algorithm=grid or optuna: trials over any keys.",
    ),
    "report": Command(
        "one page on a run, study or search: curves, answers, where the time went",
        ReportConfig,
        _report,
        positional="RUN",
        details="RUN is a directory, finished or not. Writes RUN/report.html, which needs no "
        "network, and\nreport.md. train, study and search do so when they end.",
    ),
    "compare": Command(
        "one page on several runs, studies or searches side by side",
        CompareConfig,
        _compare,
        positional="RUN…",
        details="Runs that differ in the seed alone are a group; --group lam,clip makes others.\n"
        "Writes compare.html and compare.md.",
    ),
    "watch": Command(
        "follow a run, a study or a search while it runs",
        WatchConfig,
        _watch,
        positional="RUN",
        details="RUN is its directory, here or on storage shared with the machine it runs on. Ends "
        "when what it\nwatches is finished. Where standard output is no terminal: a line a change.",
    ),
    "evaluate": Command(
        "judge a checkpoint on held-out prompts, sampled and greedy",
        Config,
        _evaluate,
        positional="MODEL",
        details="MODEL is a Hugging Face directory; needs data.path=DIR. Prints a table and JSON.",
    ),
    "label": Command(
        "write a dataset whose training relevance is a checkpoint's own ranking",
        LabelConfig,
        label_command,
        positional="MODEL",
        details="Needs data.path=DIR and out=DIR. MODEL's greedy outputs that break the contract "
        "are dropped\nand counted; the held-out examples stay as they are.",
    ),
    "rank": Command(
        "rank the items of examples with a checkpoint",
        RankConfig,
        _rank,
        positional="MODEL",
        details="Reads JSONL rows {id, query, items: [{id, text}, …]} from a file or standard "
        "input;\nwrites {id, ranking: [item ids, best first]} rows, ranking null with the reason "
        "where the\nmodel's answer breaks the contract.",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a failure that its user can mend ends in one line and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    terminated = list[int]()

    def terminate(signum: int, _: Any) -> None:
        """As Ctrl-C: what the process holds is given back."""
        terminated.append(signum)  # Ray replaces what is raised inside its calls
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        _dispatch(arguments)
        sys.stdout.flush()  # here a closed pipe can still be handled
    except (Interrupted, KeyboardInterrupt) as error:
        if not isinstance(error, Interrupted):
            error = Interrupted(terminated[0] if terminated else signal.SIGINT)
        print(redacted_text(f"listopd: {error}"), file=sys.stderr)
        sys.exit(128 + error.signum)
    except ListopdError as error:
        # Ray wraps what an actor raised together with a remote trace.
        sys.exit(redacted_text(f"listopd: error: {getattr(error, 'cause', error)}"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        cause = getattr(error, "cause", error)  # an actor's
        if type(cause).__name__ not in ("MemoryError", "OutOfMemoryError"):
            raise
        sys.exit(f"listopd: error: out of memory: {' '.join(str(cause).split())[:300]}")


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(USAGE)
        for name, command in COMMANDS.items():
            print(f"  {_signature(name, command):<18}{command.summary}")
        return
    if arguments[0] == "--version":
        print(f"listopd {__version__}")
        return
    group = {name: c for name, c in COMMANDS.items() if name.startswith(f"{arguments[0]} ")}
    if group and (len(arguments) == 1 or arguments[1] in ("--help", "-h")):
        for name, command in group.items():
            print(f"  {name:<18}{command.summary}")
        return
    name, rest = _find_command(arguments)
    command = COMMANDS[name]
    if "--help" in rest or "-h" in rest:
        print(_help(name, command))
        return
    rest = _without_dashes(rest)
    positional: list[Any] = []
    if command.positional:
        is_key = re.compile(r"=|\.ya?ml$")
        paths = [a for a in rest if not is_key.search(a) or Path(a).is_dir()]
        several = command.positional.endswith("…")
        if not paths or (not several and rest[0] != paths[0]):
            raise ListopdError(f"{name}: {command.positional} is missing (listopd {name} --help)")
        positional = [paths] if several else paths[:1]
        rest = [a for a in rest if a not in paths] if several else rest[1:]
    command.run(*positional, load_config(command.schema, rest))


def _without_dashes(arguments: list[str]) -> list[str]:
    """`--key=value` and `--key value` as `key=value`."""
    pairs, queue = [], list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument.startswith("--") and "=" not in argument and queue and "=" not in queue[0]:
            argument += f"={queue.pop(0)}"
        if argument.startswith("-") and not re.match(r"--\w.*=", argument):
            raise ListopdError(f"{argument}: no such flag; settings are key=value")
        pairs.append(argument.removeprefix("--"))
    return pairs


def _find_command(arguments: list[str]) -> tuple[str, list[str]]:
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in COMMANDS:
            return name, arguments[length:]
    is_group = any(name.startswith(f"{arguments[0]} ") for name in COMMANDS)
    given = " ".join(arguments[:2]) if is_group else arguments[0]
    near = get_close_matches(given, COMMANDS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"one of: {', '.join(COMMANDS)}"
    raise ListopdError(f"no command '{given}'; {hint}")


def _signature(name: str, command: Command) -> str:
    return f"{name} {command.positional}" if command.positional else name


def _help(name: str, command: Command) -> str:
    lines = [f"usage: listopd {_signature(name, command)} [conf.yaml …] [key=value …]", ""]
    lines += [command.summary[0].upper() + command.summary[1:] + ".", command.details, "", "keys:"]
    for key, default, comment in describe_keys(command.schema):
        left = f"  {key}={default}"
        lines.append(f"{left:<44}{comment}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
