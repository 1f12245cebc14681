"""Run the Dockerfile's steps without a Docker engine, in root file systems made by debootstrap.

    sudo [ARG=VALUE] [BIND="PATH …"] python docker/chroot.py ROOT TARGET [COMMAND …]

Makes the stages that the directory ROOT lacks, then runs COMMAND as TARGET would. Two things are
not as with an engine: the base is Debian of the tag's release with this interpreter copied to
/usr/local, and the context is what git tracks. Steps of root see the caller's PIP_* variables;
the paths in BIND show through while a step runs.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
# What python:slim has beside Debian's minimum.
PACKAGES = "ca-certificates,netbase,tzdata,libbz2-1.0,libffi8,liblzma5,libncursesw6,libreadline8,"
PACKAGES += "libsqlite3-0,libssl3,libuuid1,zlib1g"

text = (REPOSITORY / "docker/Dockerfile").read_text()
text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
STEPS = [line.split(None, 1) for line in text.splitlines() if line]  # [instruction, rest]


def make(root: Path, name: str) -> None:
    """Make a stage and those it needs; its file of settings says that it is complete."""
    layer, settings = root / name, root / f"{name}.json"
    if settings.exists():
        return
    subprocess.run(["rm", "-rf", layer], check=True)
    if name == "base":
        state = make_base(layer)
    else:
        steps = iter(STEPS)
        parent = next(rest for _, rest in steps if rest.endswith(f" AS {name}")).split()[0]
        parent = parent.replace("${BASE}", "base")
        make(root, parent)
        subprocess.run(["cp", "-a", root / parent, layer], check=True)
        state = json.loads((root / f"{parent}.json").read_text())
        for instruction, rest in steps:
            if instruction == "FROM":
                break
            before, start = size(layer), time.monotonic()
            step(layer, state, instruction, rest)
            grown, seconds = size(layer) - before, time.monotonic() - start
            print(f"{name}: {grown:5} MiB {seconds:4.0f} s  {instruction} {rest[:55]}", flush=True)
    settings.write_text(json.dumps(state))


def make_base(layer: Path) -> dict:
    release = next(rest for _, rest in STEPS if rest.startswith("BASE=")).split("-")[-1]
    options = ["--variant=minbase", f"--include={PACKAGES}"]
    subprocess.run(["debootstrap", *options, release, layer], check=True)
    subprocess.run(["rm", "-rf", layer / "var/cache/apt"], check=True)
    python, prefix = f"python{sysconfig.get_python_version()}", Path(sys.base_prefix)
    skip = shutil.ignore_patterns("site-packages", "test", "__pycache__")
    for part in (f"lib/{python}", f"include/{python}"):
        shutil.copytree(prefix / part, layer / "usr/local" / part, ignore=skip)
    for file in (prefix / "bin" / python, *(prefix / "lib").glob("libpython*.so*")):
        shutil.copy(file, layer / "usr/local" / file.relative_to(prefix), follow_symlinks=False)
    state = {"user": "0:0", "workdir": "/usr/local/bin", "env": {}}
    links = f"ln -s {python} python && ln -s pip3 pip"
    if run(layer, state, f"ldconfig && {links} && python -m ensurepip"):
        sys.exit("base: its Python does not run")
    return state


def step(layer: Path, state: dict, instruction: str, rest: str) -> None:
    if instruction == "USER":
        state["user"] = rest
    elif instruction == "WORKDIR":
        state["workdir"] = rest
        (layer / rest[1:]).mkdir(parents=True, exist_ok=True)
    elif instruction == "ENV":
        state["env"] |= dict(pair.split("=", 1) for pair in shlex.split(rest))
    elif instruction == "ARG":  # which a RUN sees as a variable
        name, default = rest.split("=", 1)
        state["env"][name] = os.environ.get(name, default)
    elif instruction == "RUN" and (status := run(layer, state, rest)):
        sys.exit(f"exit status {status} of RUN {rest}")
    elif instruction == "COPY":
        flags = dict(word[2:].split("=") for word in rest.split() if word.startswith("--"))
        source, target = (word for word in rest.split() if not word.startswith("--"))
        destination = layer / os.path.join(state["workdir"], target)[1:]
        if stage := flags.get("from"):
            make(layer.parent, stage)
            subprocess.run(["mkdir", "-p", destination], check=True)
            origin = f"{layer.parent / stage}{source}/."
            subprocess.run(["cp", "-a", origin, destination], check=True)
        else:
            git = ["git", "ls-files", source]
            for file in subprocess.check_output(git, cwd=REPOSITORY, text=True).splitlines():
                inside = Path(file).name if target.endswith("/") else Path(file).relative_to(source)
                (destination / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / file, destination / inside)
        if owner := flags.get("chown"):
            subprocess.run(["chown", "-R", owner, destination], check=True)


def run(layer: Path, state: dict, command: str) -> int:
    """Exit status of a shell command; what it leaves mounted or running goes with it."""
    mounts = [f"mount --rbind /{d} {layer}/{d}" for d in ("dev", "sys")]
    mounts += [f"mount -t proc proc {layer}/proc", f"mount -t tmpfs tmpfs {layer}/dev/shm"]
    for path in map(Path, os.environ.get("BIND", "").split()):
        inside = layer / path.relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.mkdir(exist_ok=True) if path.is_dir() else inside.touch()
        mounts.append(f"mount --bind {path} {inside}")
    root = state["user"].startswith("0")
    env = {"PATH": PATH, "HOME": "/root" if root else "/home/ray", **state["env"]}
    env |= {k: v for k, v in os.environ.items() if root and k.startswith("PIP_")}
    chroot = ["chroot", f"--userspec={state['user']}", "--groups=", str(layer), "env", "-i"]
    chroot += [f"{name}={value}" for name, value in env.items()]
    chroot += ["sh", "-c", f"cd {state['workdir']} && {command}"]
    script = " && ".join([*mounts, f"exec {shlex.join(chroot)}"])
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    return subprocess.run([*unshare, "sh", "-c", script]).returncode


def size(layer: Path) -> int:
    return int(subprocess.check_output(["du", "-smx", layer], text=True).split()[0])


if __name__ == "__main__":
    root, target, *command = sys.argv[1:]
    directory = Path(root).resolve()
    make(directory, target)
    if command:
        settings = json.loads((directory / f"{target}.json").read_text())
        sys.exit(run(directory / target, settings, shlex.join(command)))
