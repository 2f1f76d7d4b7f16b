"""Ranks that fail, stop or are cut off in the middle of a training: the others leave too, and say why."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest
from support.commands import ROOT, TINY, run, train
from support.hosts import Hosts, train_on, two_hosts, why_not

from harness.checkpoints import step_of
from harness.distributed import is_lost_connection, keep_alive, named

REASON = why_not()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ARGUMENTS = (*TINY, "logger=csv", "callbacks.progress=null", "test=false")
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
LIMIT = 12  # seconds of trainer.timeout; enough for ranks to meet on a busy machine


def fault(name: str, **options: object) -> str:
    values = "".join(f", {key}: {value}" for key, value in options.items())
    return f"+callbacks.fault={{_target_: support.failures_for_tests.{name}{values}}}"


def first_error(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("error: "))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def wait_for(sign: Path, folder: Path, seconds: float = 150) -> float:
    """Until a rank has touched a file; the time at which it had."""
    deadline = time.monotonic() + seconds
    while not sign.exists():
        assert time.monotonic() < deadline, (folder / "stderr").read_text()[-4000:]
        time.sleep(0.05)
    return time.monotonic()


def seconds_until_left(hosts: Hosts, since: float, longest: float) -> list[float]:
    """How long the launcher of each host took to end."""
    took = [longest] * len(hosts.processes)
    while time.monotonic() < since + longest and longest in took:
        for node, process in enumerate(hosts.processes):
            if took[node] == longest and process.poll() is not None:
                took[node] = time.monotonic() - since
        time.sleep(0.1)
    print("left after", [f"{seconds:.1f} s" for seconds in took])
    return took


# --- an error of one rank ---


@pytest.mark.parametrize(("error", "rank"), [("RuntimeError", 1)])
def test_the_error_of_one_rank_is_shown_first_and_once(error: str, rank: int, tmp_path: Path) -> None:
    started = time.monotonic()
    done = train(
        *ARGUMENTS, fault("RaiseAt", step=3, error=error, rank=rank), folder=tmp_path, ranks=2, PYTHONPATH=PATHS
    )
    assert done.code != 0
    assert time.monotonic() - started < 120  # and not trainer.timeout, 300 s
    said = done.err.split("error: ")[1]
    assert re.match(rf"rank {rank} \(host .+\) failed: {error}: made up for the test", said), done.err[-4000:]
    assert done.err.count("error: ") == 1
    assert done.err.index("error: ") < done.err.index("Traceback")
    assert len(re.findall(rf"^(?:torch\.)?{error}: made up", done.err, flags=re.MULTILINE)) == 1  # one traceback
    assert "gloo" not in said.split("Traceback")[0]


@pytest.mark.slow
def test_the_checkpoint_of_before_an_error_is_written(tmp_path: Path) -> None:
    """Rank 0 is told of an error of rank 1 while its thread writes, and leaves once that is done."""
    faults = [fault("RaiseAt", step=3, error="RuntimeError", rank=1)]
    faults.append("+callbacks.slow={_target_: support.failures_for_tests.SlowToWrite, seconds: 15}")
    last = ["callbacks.best=null", "callbacks.last.every_n_steps=1"]
    done = train(*ARGUMENTS, *faults, *last, folder=tmp_path, ranks=2, PYTHONPATH=PATHS)
    assert done.code != 0
    assert "rank 1" in first_error(done.err)
    (folder,) = done.runs
    assert step_of(folder / "checkpoints" / "last.ckpt") == 2
    assert step_of(folder / "checkpoints" / "previous.ckpt") == 1
    assert not list((folder / "checkpoints").glob(".*"))


@needs_hosts
@pytest.mark.slow
def test_rank_zero_tells_the_error_of_another_host_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / f"node{node}" for node in range(2)]
    sign = tmp_path / "raised"
    with two_hosts() as hosts:
        for node in range(2):
            arguments = [*ARGUMENTS, fault("RaiseAt", step=3, error="OutOfMemoryError", sign=sign)]
            train_on(hosts, node, arguments, folders[node])
        took = seconds_until_left(hosts, wait_for(sign, folders[0]), 60)
        done = hosts.finish(folders, 1)
    assert max(took) < 45  # 4 s on an idle machine
    assert all(each.code != 0 for each in done)
    assert first_error(done[0].err).startswith(
        "error: rank 1 (host node1) failed: OutOfMemoryError: made up for the test"
    )
    assert "Make data.batch_size smaller" in done[0].err
    assert "RaiseAt" not in done[0].err.partition("harness.train FAILED")[0]
    assert "in act" in done[1].err  # the traceback
    assert "error: " not in done[1].err


@pytest.mark.slow
def test_without_torchrun(tmp_path: Path) -> None:
    """Any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: rank 0 keeps the store itself."""
    command = [sys.executable, "-m", "harness.train", *ARGUMENTS, fault("RaiseAt", step=3, error="MemoryError", rank=0)]
    shell = (
        f"export MASTER_PORT={_free_port()} MASTER_ADDR=127.0.0.1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2\n"
        'RANK=1 LOCAL_RANK=1 "$@" > one.txt 2>&1 & other=$!\n'
        'code=0; RANK=0 LOCAL_RANK=0 "$@" || code=$?\n'
        'wait $other && exit 99; echo "other $?"; exit $code'
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = run(["bash", "-c", shell, "bash", *command], tmp_path, 200, PATH=path, PYTHONPATH=PATHS)
    assert done.code == 1, done.err[-4000:]
    assert "other 1" in done.out
    assert re.match(r"error: rank 0 \(host .+\) failed: MemoryError: made up", first_error(done.err))
    assert "error: " not in (tmp_path / "one.txt").read_text()


@pytest.mark.slow
def test_an_error_before_training_is_told_by_rank_zero(tmp_path: Path) -> None:
    """A model that cannot be made on one rank, by an error that is nobody's input."""
    (tmp_path / "my_model.py").write_text(
        "import os\nfrom harness.models import schnet_force_field\n\ndef make(statistics, **options):\n"
        "    if os.environ['RANK'] == '1':\n        raise MemoryError('too large')\n"
        "    return schnet_force_field(statistics, **options)\n"
    )
    done = train(
        *ARGUMENTS,
        "model._target_=my_model.make",
        folder=tmp_path,
        ranks=2,
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
    )
    assert done.code != 0
    assert re.search(r"error: on rank 1 \(host .+\): .*too large", done.err), done.err[-4000:]
    assert not list(tmp_path.rglob("*.ckpt"))


# --- ranks that do not answer ---


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "waited_for"),
    [
        ("StopAt", "the merge of loss and metrics over the ranks, in training step 3 of the run, epoch 0"),
        ("StopInValidation", "the end of a validation epoch, in training step 5 of the run, epoch 0"),
    ],
)
def test_a_rank_that_stops(callback: str, waited_for: str, tmp_path: Path) -> None:
    folders = [tmp_path / f"node{node}" for node in range(2)]
    sign = tmp_path / "stopped"
    with two_hosts() as hosts:
        for node in range(2):
            stop = fault(callback, step=3, sign=sign)
            train_on(hosts, node, [*ARGUMENTS, f"trainer.timeout={LIMIT}", stop], folders[node])
        took = seconds_until_left(hosts, wait_for(sign, folders[0]), LIMIT + 40)
        done = hosts.finish(folders, 1)
    assert max(took) < LIMIT + 40
    assert all(each.code != 0 for each in done)
    said = first_error(done[0].err)
    assert said.startswith(f"error: rank 0 (host node0) waited {LIMIT} s for {waited_for}. No answer came from rank 1")
    assert "(host node1)" in said
    assert f"trainer.timeout={LIMIT}" in said


@needs_hosts
@pytest.mark.slow
def test_a_link_that_goes_down(tmp_path: Path) -> None:
    folders = [tmp_path / f"node{node}" for node in range(2)]
    sign = tmp_path / "reached"
    with two_hosts() as hosts:
        for node in range(2):
            wait = fault("WaitAt", step=3, sign=sign)
            train_on(hosts, node, [*ARGUMENTS, f"trainer.timeout={LIMIT}", wait], folders[node])
        wait_for(sign, folders[0])
        hosts.pull_the_cable()
        pulled = time.monotonic()
        Path(f"{sign}.go").touch()
        took = seconds_until_left(hosts, pulled, LIMIT + 40)
        done = hosts.finish(folders, 1)
    assert max(took) < LIMIT + 40
    assert all(each.code != 0 for each in done)
    assert first_error(done[0].err).startswith(f"error: rank 0 (host node0) waited {LIMIT} s for the merge of loss")
    assert "No answer came from rank 1 (host node1)" in first_error(done[0].err)
    assert first_error(done[1].err).startswith(f"error: rank 1 (host node1) waited {LIMIT} s for the merge of loss")
    assert "The store of the job at 10.77.0.1:29500 does not answer either" in first_error(done[1].err)


@needs_hosts
@pytest.mark.slow
def test_a_rank_that_is_killed_on_another_host(tmp_path: Path) -> None:
    folders = [tmp_path / f"node{node}" for node in range(2)]
    with two_hosts() as hosts:
        for node in range(2):
            train_on(hosts, node, [*ARGUMENTS, fault("KillAt", step=3)], folders[node])
        done = hosts.finish(folders, 150)  # and not trainer.timeout, 300 s
    assert all(each.code != 0 for each in done)
    said = first_error(done[0].err)
    assert said.startswith("error: rank 0 (host node0) lost a connection while it waited for the merge of loss"), said
    assert "No answer came from rank 1 (host node1)" in said


@needs_hosts
@pytest.mark.slow
def test_ranks_on_two_hosts_start_again(tmp_path: Path) -> None:
    """torchrun restarts them; they meet anew, at a store that remembers all they said before, in the same directory."""
    folders = [tmp_path / f"node{node}" for node in range(2)]
    with two_hosts() as hosts:
        for node in range(2):
            train_on(hosts, node, [*ARGUMENTS, fault("KillAt", step=3)], folders[node], MAX_RESTARTS="1")
        done = hosts.finish(folders, 200)
    assert [each.code for each in done] == [0, 0], done[0].err[-4000:]
    assert "lost a connection while it waited" in done[0].err
    assert len(done[0].runs) == 1


@pytest.mark.parametrize("keeps_store", [False, True], ids=["store of torchrun", "store of rank 0"])
def test_a_rank_that_is_never_started(keeps_store: bool, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom datetime import timedelta\n"
        "import torch.distributed as dist\nimport harness.distributed.rendezvous as d\n"
        "d.START_LIMIT = timedelta(seconds=1)\n"
        "port = int(sys.argv[1])\n"
        "agent = None if not port else dist.TCPStore('127.0.0.1', port, None, True, wait_for_workers=False)\n"
        "try:\n    d.share('x', 'y')\nexcept d.RankAbsentError as error:\n    print(error)"
    )
    port = str(_free_port())
    settings = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if not keeps_store:
        settings |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    done = run([sys.executable, "-c", program, "0" if keeps_store else port], tmp_path, 100, **settings)
    awaited = f"the other ranks to reach it at 127.0.0.1:{port}" if keeps_store else "rank 1 and rank 2 to start"
    assert done.out.startswith(f"Rank 0 waited 1 s for {awaited}"), done.out + done.err
    assert "Have all ranks been started" in done.out


# --- small parts ---


def test_all_ranks_of_a_ring_leave_together_when_one_is_killed(tmp_path: Path) -> None:
    """Its neighbours alone notice it by themselves, theirs once these have left, and so on."""
    done = run([sys.executable, "-m", "support.ring", "6", str(tmp_path)], tmp_path)
    assert done.code == 0, done.err[-3000:]
    seconds, codes = done.out.split(maxsplit=1)
    assert codes.strip() == "[1, 1, 1, -9, 1, 1]"
    assert float(seconds) < 20  # and not until the time limit
    said = "".join((tmp_path / f"stderr.{rank}").read_text() for rank in range(6))
    assert len(re.findall(r"^error: ", said, flags=re.MULTILINE)) == 1, said
    assert re.search(r"No answer came from rank 3 \(host \S+\): stopped", said), said


def test_lost_connections_are_told_from_errors_of_a_rank() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.2]:1234"
    assert is_lost_connection(RuntimeError(gloo))
    assert is_lost_connection(RuntimeError("[unbound_buffer.cc:78] Timed out waiting 10000ms for recv operation"))
    assert not is_lost_connection(RuntimeError("shape '[3]' is invalid for input of size 4"))
    assert not is_lost_connection(MemoryError("Timed out waiting"))


def test_ranks_by_name() -> None:
    assert named([3]) == "rank 3"
    assert named([1, 2], {1: "a", 2: None}) == "rank 1 (host a) and rank 2"
    assert named(list(range(100))).endswith("rank 7 and 92 more")


def test_nobody_to_keep_this_process_alive() -> None:
    keep_alive(1.0)  # not under torchrun: nothing happens
    assert "TORCHELASTIC_TIMER_FILE" not in os.environ
