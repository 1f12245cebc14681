"""How long another machine takes to copy a model directory from the driver's, against `cp`.

python tests/bench/model_copy.py [MIB] – two raylets on this machine, one block size after another.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from listopd_ray import model_files as module
from listopd_ray.model_files import model_files, on_node


@ray.remote(num_cpus=1)
def copied(files, block):
    """Seconds; that the other raylet sees the same disk is to be ignored."""
    module.BLOCK, module._listing = block, lambda _: ()
    start = time.perf_counter()
    path = os.fspath(files)
    seconds = time.perf_counter() - start
    shutil.rmtree(path)
    return seconds


def main():
    size = int(sys.argv[1] if len(sys.argv) > 1 else 512) << 20
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other = machines.add_node(num_cpus=1)
    ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch, "here")
        here.mkdir()
        (here / "model.safetensors").write_bytes(os.urandom(size))
        files = model_files(here)
        start = time.perf_counter()
        shutil.copytree(here, Path(scratch, "cp"))
        cp = time.perf_counter() - start
        there = copied.options(scheduling_strategy=on_node(other.node_id))
        ray.get(there.remote(files, 64 << 20))  # starts the process that reads
        print(f"cp: {size / cp / 1e9:.2f} GB/s")
        for block in (4 << 20, 16 << 20, 64 << 20, 256 << 20):
            seconds = ray.get(there.remote(files, block))
            rate = f"{size / seconds / 1e9:.2f} GB/s, {seconds / cp:.1f} × cp"
            print(f"blocks of {block >> 20} MiB: {rate}")
    ray.shutdown()
    machines.shutdown()


if __name__ == "__main__":
    main()
