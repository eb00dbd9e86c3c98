"""Simulates the machines of a Ray cluster: nodes of this machine, in a network namespace that has loopback alone.

`python -m tests.ray_nodes CORES...` starts a node for each number, with that many cores, the head first. It prints one
JSON line, and ends the nodes when its stdin ends. Ray turns 127.0.0.1 into this machine's own address elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())

LAUNCHER = "wanfast.runtime.processes.elastic"


def can_isolate() -> bool:
    """Returns whether this machine lets a user make a network namespace."""
    command = ["unshare", "-rn", "ip", "link", "set", "lo", "up"]
    return bool(shutil.which("unshare") and shutil.which("ip")) and not subprocess.run(command).returncode


@dataclass
class Nodes:
    """Holds a running cluster."""

    address: str
    raylets: list[int]  # process ids, the head's first
    namespace: int  # a process in the namespace

    def inside(self, *command: str) -> list[str]:
        """Returns a command that runs in the namespace of the nodes."""
        return ["nsenter", "-t", str(self.namespace), "-U", "-n", "--preserve-credentials", *command]

    def kill(self, index: int) -> None:
        """Kills a node with all its processes at once, as if its machine lost its power."""
        raylet = psutil.Process(self.raylets[index])
        for process in (raylet, *raylet.children(recursive=True)):
            process.kill()

    def ranks(self) -> list[psutil.Process]:
        """Returns the launchers and the ranks on all nodes."""
        found = []
        for raylet in self.raylets:
            with suppress(psutil.Error):  # of a process that ends
                for process in psutil.Process(raylet).children(recursive=True):
                    with suppress(psutil.Error):
                        if LAUNCHER in process.cmdline():
                            found.append(process)
        return found


@contextmanager
def nodes(*cores: int) -> Iterator[Nodes]:
    """Runs a cluster until the block ends."""
    words = [sys.executable, "-m", "tests.ray_nodes", *map(str, cores)]
    command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *words]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout
        line = process.stdout.readline()
        errors.seek(0)
        assert line.startswith("{"), errors.read()
        try:
            yield Nodes(**json.loads(line), namespace=process.pid)
        finally:
            process.communicate()  # ends its stdin, and so the nodes


def main(cores: list[int]) -> None:
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path is short
    os.environ["RAY_TMPDIR"] = folder  # the cluster's address would be written to /tmp/ray, which may be missing
    (Path(folder) / "ray").mkdir()

    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores[0], "temp_dir": folder, **common})
    try:
        others = [cluster.add_node(num_cpus=number, object_store_memory=100_000_000) for number in cores[1:]]
        cluster.wait_for_nodes()
        raylets = [node.all_processes["raylet"][0].process.pid for node in (cluster.head_node, *others)]
        print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
