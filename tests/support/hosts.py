"""Two hosts on one machine: network namespaces with names of their own, joined by a cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.commands import ROOT, Finished

HEAD = "10.77.0.1"
_NAME_FILES = ("hosts", "nsswitch.conf")


def why_not() -> str | None:
    """Why there can be no hosts here, or None."""
    if sys.platform != "linux" or not all(shutil.which(tool) for tool in ("ip", "unshare", "hostname")):
        return "network namespaces need Linux with iproute2 and util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"harness{os.getpid()}try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"this kernel or container makes no network namespaces: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass
class Hosts:
    """Hosts node0 and node1."""

    namespaces: tuple[str, str]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, node: int, command: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
        """A command on a host; output and errors go to files in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        names = folder.parent / f"names{node}"
        names.mkdir(exist_ok=True)
        (names / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")
        (names / "nsswitch.conf").write_text("hosts: files\n")  # nobody answers questions for names here
        steps = [f"hostname node{node}", *(f"mount --bind {names}/{file} /etc/{file}" for file in _NAME_FILES)]
        inside = ["ip", "netns", "exec", self.namespaces[node], "unshare", "--uts", "--mount"]
        named = ["sh", "-c", " && ".join([*steps, 'exec "$@"']), "sh", *command]
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("WANDB_", "TORCHELASTIC", "GLOO_", "NCCL_"))
        }
        env = {
            **inherited,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "COLUMNS": "140",
            **environment,
        }
        with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
            process = subprocess.Popen(
                [*inside, *named], cwd=folder, env=env, stdout=out, stderr=err, text=True, start_new_session=True
            )
        self.processes.append(process)
        return process

    def pull_the_cable(self) -> None:
        """The link between the hosts goes down, for good: packets are lost, connections are not closed."""
        subprocess.run(["ip", "-n", self.namespaces[1], "link", "set", "veth0", "down"], check=True)

    def finish(self, folders: list[Path], timeout: float) -> list[Finished]:
        """Wait for all commands; what is still there at the time limit is killed, which is an error."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            said = "\n".join((folder / "stderr").read_text()[-3000:] for folder in folders)
            raise TimeoutError(f"not all hosts were done within {timeout} s:\n{said}") from None
        finally:
            self.kill()
        return [
            Finished(process.returncode, (folder / "stdout").read_text(), (folder / "stderr").read_text(), folder)
            for process, folder in zip(self.processes, folders, strict=True)
        ]

    def kill(self) -> None:
        """End whatever still runs in the namespaces."""
        for namespace in self.namespaces:
            listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
            for pid in listed.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for process in self.processes:
            process.wait()


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Hosts 10.77.0.1 and 10.77.0.2; they and all that runs on them are gone afterwards."""
    namespaces = tuple(f"harness{os.getpid()}n{node}" for node in range(2))
    hosts = Hosts((namespaces[0], namespaces[1]))
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip(
            "-n", namespaces[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", namespaces[1]
        )
        for node, namespace in enumerate(namespaces):
            _ip("-n", namespace, "address", "add", f"10.77.0.{node + 1}/24", "dev", "veth0")
            _ip("-n", namespace, "link", "set", "veth0", "up")
        yield hosts
    finally:
        hosts.kill()
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def train_on(
    hosts: Hosts, node: int, overrides: list[str], folder: Path, nodes: str = "2", **environment: str
) -> subprocess.Popen[str]:
    """The script for several nodes on one of them, one rank each."""
    settings = {"HEAD": HEAD, "NODES": nodes, "NODE_RANK": str(node), "RANKS_PER_NODE": "1", **environment}
    return hosts.start(node, [str(ROOT / "launch" / "torchrun_multinode.sh"), *overrides], folder, **settings)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
