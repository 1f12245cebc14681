"""Several learner ranks do what one does: the same gradient, the same weights, the same files."""

import dataclasses
import multiprocessing
import socket

import numpy as np
import pytest
import rank_process
import torch

from listopd_ray.config import Config, LearnerConfig, LoraConfig, TeacherActorConfig
from listopd_ray.roles.learner import Learner
from listopd_ray.roles.optimizer_state import optimizer_tensors
from listopd_ray.roles.rollout import Generated
from listopd_ray.roles.teacher import Teacher

NUM_BATCHES = 20
PROCESSES = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def batches(rollouts, teacher_path, base_path):
    """Of one rollout to eight, in random order, sampled by slightly other policies."""
    rng = np.random.default_rng(0)
    teacher = Teacher(
        TeacherActorConfig(), teacher_path=str(teacher_path), dtype="float32", device="cpu"
    )
    recorded = []
    for number in range(NUM_BATCHES):
        picked = rng.permutation(len(rollouts))[: 1 + number % len(rollouts)]
        noisy = tuple(
            dataclasses.replace(
                rollouts[index],
                sampler_logprobs=rollouts[index].sampler_logprobs
                + rng.normal(0, 0.1, len(rollouts[index].token_ids)).astype(np.float32),
            )
            for index in picked
        )
        recorded.append(teacher.score(Generated(rollouts=noisy, seconds=0.0), str(base_path)))
    return recorded


@pytest.fixture(scope="module")
def processes():
    """Two that take tasks, and their answers: to start one takes ten seconds."""
    queues = [(PROCESSES.Queue(), PROCESSES.Queue()) for _ in range(2)]
    ranks = [
        PROCESSES.Process(target=rank_process.serve, args=(rank, *both), daemon=True)
        for rank, both in enumerate(queues)
    ]
    for process in ranks:
        process.start()
    yield queues
    for (tasks, _), process in zip(queues, ranks, strict=True):
        tasks.put(None)
        process.join(timeout=10)


@pytest.fixture(scope="module")
def run_ranks(processes, student_path, canary_ids, batches, tmp_path_factory):
    """Runs a learner of `count` ranks over the batches; the directory with what it left."""

    def run(count, lora=0, **learner):
        out = tmp_path_factory.mktemp("ranks")
        config = Config(
            learner=LearnerConfig(
                num_ranks=count, micro_batch_size=3, max_grad_norm=1e9, **learner
            ),
            lora=LoraConfig(rank=lora, alpha=4.0),
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            point = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        arguments = {"student_path": str(student_path), "canary_ids": canary_ids}
        for tasks, _ in processes[:count]:
            tasks.put((point, config, arguments, batches, str(out)))
        for _, outcomes in processes[:count]:
            error = outcomes.get(timeout=120)
            assert error is None, error
        return out

    return run


def compare(one, two):
    """Largest relative difference of the gradients of a step, and of the weights after it."""
    left, right = np.load(one / "steps.npz"), np.load(two / "steps.npz")
    differences = []
    for name in ("gradients", "weights"):
        assert left[name].shape[0] == NUM_BATCHES
        gaps = np.linalg.norm(left[name] - right[name], axis=1)
        differences.append(float((gaps / np.linalg.norm(left[name], axis=1)).max()))
    return differences


@pytest.fixture(scope="module")
def one_rank(run_ranks):
    return run_ranks(1)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_ranks_learn_what_one_learns(one_rank, run_ranks, student_path, canary_ids, sharding):
    two = run_ranks(2, sharding=sharding)
    gradient, weight = compare(one_rank, two)
    assert gradient < 1e-5
    assert weight < 1e-4
    left, right = (torch.load(out / "given.pt", weights_only=False) for out in (one_rank, two))
    for before, after in zip(left["metrics"], right["metrics"], strict=True):
        assert {n: v for n, v in after.items() if "time/" not in n} == pytest.approx(
            {n: v for n, v in before.items() if "time/" not in n}, rel=1e-3, abs=1e-4
        )
    for name, tensor in left["published"].items():
        np.testing.assert_allclose(right["published"][name], tensor, atol=2e-4, err_msg=name)
    assert left["published"].keys() == right["published"].keys()
    assert left["exported"]["student"].keys() == right["exported"]["student"].keys()
    config = (out["exported"]["student"]["config.json"] for out in (left, right))
    assert len(set(config)) == 1  # shards leave no trace in it
    slots = [np.load(out / "optimizer.npz") for out in (one_rank, two)]
    assert set(slots[0].files) == set(slots[1].files)
    for name in slots[0].files:  # after a restore
        gap = np.linalg.norm(slots[0][name] - slots[1][name])
        assert gap <= 1e-3 * np.linalg.norm(slots[0][name]), name
    alone = Learner(Config(), student_path=str(student_path), canary_ids=canary_ids)
    alone.restore(f"{two}/checkpoint", right["files"])
    weights = torch.cat([p.detach().flatten() for p in alone._student.trained()])
    np.testing.assert_array_equal(weights.numpy(), np.load(two / "steps.npz")["weights"][-1])
    state = dict(optimizer_tensors(alone._optimizer))
    for name in slots[1].files:
        np.testing.assert_array_equal(state[name].numpy(), slots[1][name], err_msg=name)


def test_two_ranks_train_one_adapter(run_ranks):
    gradient, weight = compare(run_ranks(1, lora=2), run_ranks(2, lora=2))
    assert gradient < 1e-5
    assert weight < 1e-4
