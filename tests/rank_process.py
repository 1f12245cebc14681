"""One rank of a learner, for test_ranks: it steps on recorded batches and keeps what came of it."""

import traceback

import numpy as np
import torch
import torch.distributed as dist

from listopd_ray.roles.learner import Learner
from listopd_ray.roles.optimizer_state import optimizer_tensors
from listopd_ray.roles.ranks import whole


def serve(rank, tasks, outcomes):
    """Runs what comes, an error's trace or None for each, until None comes."""
    for task in iter(tasks.get, None):
        try:
            run(rank, *task)
            outcomes.put(None)
        except Exception:
            outcomes.put(traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()


def run(rank, meeting_point, config, arguments, batches, out):
    """Writes, from rank 0, gradients and weights after every step ([steps, parameters] each) and
    what the learner gives away; then all ranks together take up the checkpoint of one."""
    torch.set_num_threads(1)
    learner = Learner(config, rank=rank, meeting_point=meeting_point, **arguments)
    gradients, weights, metrics = [], [], []
    for scored in batches:
        metrics.append(learner.step(1.5, 1e-3, scored))
        trained = learner._student.trained()
        gradients.append(torch.cat([whole(p.grad).flatten() for p in trained]).numpy())
        weights.append(torch.cat([whole(p.detach()).flatten() for p in trained]).numpy())
    files, exported = learner.save(f"{out}/checkpoint"), learner.exported()
    published = learner.publish_weights()
    (files, *_) = learner._ranks.gathered(files)  # rank 0 has written
    if rank == 0:
        np.savez(f"{out}/steps.npz", gradients=gradients, weights=weights)
        given = {"metrics": metrics, "exported": exported, "published": published.tensors}
        given["files"] = files
        torch.save(given, f"{out}/given.pt")
    else:
        assert exported is published is None
    learner.step(1.5, 1e-3, batches[0])
    learner.restore(f"{out}/checkpoint", files)
    restored = torch.cat([whole(p.detach()).flatten() for p in learner._student.trained()])
    np.testing.assert_array_equal(restored.numpy(), weights[-1])
    state = {name: value.numpy() for name, value in optimizer_tensors(learner._optimizer)}
    if rank == 0:
        np.savez(f"{out}/optimizer.npz", **state)
