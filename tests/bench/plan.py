"""`listopd plan` against the measured peak memory of whole runs on the CPU.

    python tests/bench/plan.py DIRECTORY [CASE …]

Models, data and runs go to DIRECTORY. Each case is a run of two updates with its start-up gate,
evaluations, checkpoint and export. Of every actor: the largest sum of anonymous and file-backed
resident memory, looked at every 20 ms; pages of Ray's object store, which several processes map,
count for the whole alone, which is the sum of the proportional set sizes once a second. Cases
`smollm2…` take the pretrained checkpoint DIRECTORY/smollm2-135m, which has to be there.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from listopd_ray.config import Config, load_config
from listopd_ray.job import train_job
from listopd_ray.job_config import Machine, PlanConfig
from listopd_ray.models import build_tokenizer, load_tokenizer
from listopd_ray.plan.command import actors_of, models_of
from listopd_ray.plan.memory import object_store
from listopd_ray.plan.placing import nodes_of, place
from listopd_ray.splits import load_split
from listopd_ray.task.contract import answer_text, ideal_ranking, prompt_text
from listopd_ray.task.data import read_examples
from listopd_ray.task.synthetic import SyntheticConfig, write_synthetic

MIB = 1 << 20
ROLES = {"ray::Learner": "learner", "ray::RolloutWorker": "rollout", "ray::Teacher": "teacher"}
# hidden, layers, intermediate, heads, heads of keys, vocabulary, tied
SHAPES = {
    "wide": (512, 10, 1536, 8, 4, 151_936, True),
    "wide-teacher": (640, 10, 1920, 10, 5, 151_936, True),
    "deep": (1024, 12, 3072, 16, 8, 8192, False),
    "deep-teacher": (1024, 16, 3072, 16, 8, 8192, False),
}
COMMON = [
    "lam=1.2",
    "num_steps=2",
    "evaluation.every=0",
    "evaluation.num_prompts=8",
    "checkpoint.every=0",
    "tracking.wandb=false",
    "sync.tolerance=1",
    "lr=1e-5",
    "rollout.max_num_seqs=16",
    "rollout.kv_cache_mib=128",
    "scoring.micro_batch_size=8",
]
CASES = {
    "tiny": ["num_prompts=8", "learner.micro_batch_size=4"],  # what does not grow with the model
    "smollm2": ["num_prompts=8", "learner.micro_batch_size=4"],
    "smollm2-shared": ["num_prompts=3", "group_size=8"],
    "smollm2-lora": ["num_prompts=3", "group_size=8", "lora.rank=16"],
    "wide": ["num_prompts=32", "learner.micro_batch_size=16"],
    "deep": ["num_prompts=32", "learner.micro_batch_size=16", "learner.dtype=bfloat16"],
    "deep-lora": ["num_prompts=32", "learner.micro_batch_size=16", "lora.rank=16"],
    "wide-checkpointing": [
        "num_prompts=32",
        "learner.micro_batch_size=16",
        "learner.gradient_checkpointing=true",
    ],
}


class Watch:
    """Peaks of the actors below this process, by role, and of all together, in bytes."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self.store: dict[str, int] = defaultdict(int)  # of its pages, mapped
        self.whole = 0
        self._ended = threading.Event()
        self._roles: dict[int, str] = {}
        self._threads = [threading.Thread(target=t) for t in (self._look, self._add_up)]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _look(self) -> None:
        found = 0.0
        while not self._ended.wait(0.02):
            if time.monotonic() - found > 0.5:
                self._roles, found = _actors(), time.monotonic()
            for pid, role in self._roles.items():
                own, shared = _resident(pid)
                self.peaks[role] = max(self.peaks[role], own)
                self.store[role] = max(self.store[role], shared)

    def _add_up(self) -> None:
        while not self._ended.wait(1.0):
            self.whole = max(self.whole, sum(_proportional(pid) for pid in dict(self._roles)))


def _actors() -> dict[int, str]:
    here = psutil.Process()
    roles = {here.pid: "driver"}
    for process in here.children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        for start, role in ROLES.items():
            if command.startswith(start):
                roles[process.pid] = role
    return roles


def _resident(pid: int) -> tuple[int, int]:
    """Own bytes, and shared memory's."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    size = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if "kB" in line}
    if "RssAnon" not in size:
        return 0, 0
    return size["RssAnon"] + size["RssFile"], size["RssShmem"]


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _random_model(directory: Path, name: str, data: Path, dtype: str) -> Path:
    target = directory / f"{name}-{dtype}"
    if target.exists():
        return target
    examples = read_examples(data / "train.jsonl", max_bad_rows=0)
    texts = [prompt_text(e) + answer_text(ideal_ranking(e.relevance)) for e in examples]
    tokenizer = build_tokenizer(texts, 512)
    hidden, layers, intermediate, heads, key_heads, vocab, tied = SHAPES[name]
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=64,
            tie_word_embeddings=tied,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.to(getattr(torch, dtype)).save_pretrained(target)  # of another type: mapped beside it
    tokenizer.save_pretrained(target)
    return target


def _models(directory: Path, case: str, data: Path) -> list[str]:
    shape = case.partition("-")[0]
    if shape == "tiny":
        return ["student.warmstart.num_steps=2", "teacher.warmstart.num_steps=2"]
    if shape == "smollm2":
        student, teacher = directory / "smollm2-135m", directory / "smollm2-copy"
        if not teacher.exists():
            shutil.copytree(student, teacher)  # its pages in memory are not the student's
        return [f"student.path={student}", f"teacher.path={teacher}"]
    dtype = "bfloat16" if "learner.dtype=bfloat16" in CASES[case] else "float32"
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # its memory is not this process's
        names = shape, f"{shape}-teacher"
        student, teacher = (
            pool.submit(_random_model, directory, name, data, dtype).result() for name in names
        )
    return [f"student.path={student}", f"teacher.path={teacher}"]


def main(directory: Path, case: str) -> None:
    data = directory / "data"
    if not data.exists():
        write_synthetic(SyntheticConfig(out=str(data), num_items=8, num_train=400, num_eval=64))
    arguments = [
        *COMMON,
        *CASES[case],
        *_models(directory, case, data),
        f"data.path={data}",
        f"cache={directory / 'cache'}",
        "rollout.max_new_tokens=32",
    ]
    with tempfile.TemporaryDirectory(dir=directory) as out, Watch() as watch:
        summary = train_job(load_config(Config, [*arguments, f"out={out}"]))
        longest = _longest_prompt(load_config(Config, arguments), Path(out) / "train" / "student")
    assert summary["num_steps"] == 2
    config = load_config(PlanConfig, [*arguments, f"plan.prompt_tokens={longest}"])
    models = models_of(config)
    actors, store = actors_of(config, models), object_store(config, models)
    (node,) = nodes_of({"here": Machine()}, 0.0)
    place(config, actors, [node])
    print(f"\n{case}: MiB, planned / measured; prompts of up to {longest} tokens")
    for actor in actors:
        role = actor.name.split()[0]
        _show(role, actor.device.total, watch.peaks[role], watch.store[role])
    _show("whole", node.need(store, together=False), watch.whole, 0)


def _show(name: str, need: float, peak: int, store: int) -> None:
    mapped = f"  (and {store / MIB:.0f} of the object store mapped)" if store else ""
    share = f"{need / peak - 1:+.1%}"
    print(f"{name:<10}{need / MIB:>8.0f} / {peak / MIB:<8.0f}{share:>8}{mapped}", flush=True)


def _longest_prompt(config: Config, model: Path) -> int:
    split = load_split(config, "train", load_tokenizer(model))
    return max(len(prompt.token_ids) for prompt in split.prompts)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for chosen in sys.argv[2:] or ["smollm2", "wide", "deep"]:
        main(root, chosen)
