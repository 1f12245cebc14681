"""The image's files agree with each other and with pyproject.toml; no engine is needed for that."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
STEPS = runpy.run_path(str(DOCKER / "chroot.py"))["STEPS"]
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
COMPILERS = re.compile(r"\b(gcc|g\+\+|clang|build-essential|cpp|tcc)\b")


def stage(name):
    """The steps of one stage, without its FROM."""
    start = next(i for i, (_, rest) in enumerate(STEPS) if rest.endswith(f" AS {name}")) + 1
    end = next((i for i in range(start, len(STEPS)) if STEPS[i][0] == "FROM"), len(STEPS))
    return STEPS[start:end]


def ignored(path, patterns):
    """Docker's rule: the last pattern that fits the path or a directory above it decides."""
    result = False
    for pattern in patterns:
        regex = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(.*/)?")
        regex = regex.replace(r"\*", "[^/]*")
        if any(re.fullmatch(regex, str(p)) for p in (path, *path.parents) if p != Path(".")):
            result = not pattern.startswith("!")
    return result


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def test_hadolint_finds_nothing():
    result = run(str(Path(sys.executable).with_name("hadolint")), "docker/Dockerfile")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "hadolint ignore" not in (DOCKER / "Dockerfile").read_text()


@pytest.mark.parametrize(("target", "extra"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_every_dependency_has_an_exact_version_within_its_range(target, extra):
    lines = (DOCKER / f"constraints-{target}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, [*wanted, *project["build-system"]["requires"]]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
    installs = [rest for _, rest in stage(f"{target}-builder") if "pip install" in rest]
    text = " ".join(installs)
    assert text.count("pip install") == text.count(f"--constraint docker/constraints-{target}.txt")
    assert f".[{extra}]" in text


def test_the_build_context_holds_what_is_copied_and_nothing_else():
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    copies = [rest.split() for kind, rest in STEPS if kind == "COPY" and "--from" not in rest]
    sources = {Path(source) for *source_list, _ in copies for source in source_list}
    folders = ("conf", "docker", "docs", "jobs", "listopd_ray", "tests")
    files = {path for path in REPOSITORY.iterdir() if path.is_file()}
    files |= {path for d in folders for path in (REPOSITORY / d).rglob("*") if path.is_file()}
    paths = {path.relative_to(REPOSITORY) for path in files}
    paths |= {Path("listopd_ray/__pycache__/job.pyc"), Path("conf/old.pyc")}
    let_in = {path for path in paths if not ignored(path, patterns)}
    compiled = {path for path in paths if path.suffix == ".pyc"}
    assert let_in == {p for p in paths - compiled if sources & {p, *p.parents}}
    for path in (".git/config", ".venv/bin/python", "data/a.jsonl", "runs/a/student", "cache/a"):
        assert ignored(Path(path), patterns)
    assert all((REPOSITORY / source).exists() for source in sources)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_final_stage_has_no_compiler_and_no_root(target):
    steps = [*stage("runtime"), *stage(target)]
    assert not any(COMPILERS.search(rest) for kind, rest in steps if kind == "RUN")
    assert [rest for kind, rest in steps if kind == "USER"] == ["1000:1000"]
    assert any(kind == "HEALTHCHECK" for kind, _ in steps)


def test_the_base_is_one_release_of_python():
    assert re.fullmatch(r"BASE=python:3\.11\.\d+-slim-bookworm", STEPS[0][1])
    parents = {rest.split()[0] for kind, rest in STEPS if kind == "FROM"}
    assert parents == {"${BASE}", "builder", "runtime"}


def test_compose_file_is_valid():
    schema = ("--builtin-schema", "vendor.compose-spec")
    result = run(sys.executable, "-m", "check_jsonschema", *schema, "docker/compose.yaml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_compose_publishes_on_this_machine_only():
    for service in COMPOSE["services"].values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
        assert not {"network_mode", "privileged", "user", "cap_add"} & set(service)


def test_secrets_come_from_outside():
    for service in COMPOSE["services"].values():
        assert "RAY_AUTH_TOKEN" in service["environment"]
        for name, value in service["environment"].items():
            if re.search("TOKEN|KEY|SECRET|PASSWORD", name):
                assert re.fullmatch(rf"\$\{{{name}:\?[^}}]+\}}", value)
    for kind, rest in STEPS:
        if kind in ("ARG", "ENV"):
            assert not re.search(r"(TOKEN|KEY|SECRET|PASSWORD)\w*=", rest)
