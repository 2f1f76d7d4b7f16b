"""Exits, sessions and sweep points: what rooms of a run hand to each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import ROOT

from harness import callbacks
from harness.runs import (
    POINT,
    RECORD,
    TYPED,
    Command,
    Interrupted,
    JobFailed,
    Preempted,
    SweepPoint,
    arguments_of_rank,
    claim,
    config_options,
    current_session,
    group,
    keyboard_interrupts,
    new_session,
    point_name,
    read,
    record,
    typed,
)
from harness.support.process import PARENT


@pytest.mark.parametrize(
    ("error", "code", "state"),
    [
        (JobFailed("no data"), 1, "failed"),
        (Preempted("saved"), 75, "preempted"),
        (Interrupted(), 130, "interrupted"),
        (KeyboardInterrupt(), None, "interrupted"),
        (RuntimeError("no data"), None, "failed"),
    ],
)
def test_each_exit_has_a_code_and_a_state(error: BaseException, code: int | None, state: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), record(tmp_path, Command((), ())):
        raise error
    assert read(tmp_path)["state"] == state
    assert getattr(error, "code", None) == code
    assert callbacks.REQUEUE_EXIT_CODE == callbacks.Preempted.exit_code == 75


def test_ctrl_c_is_told_from_an_exit_of_lightning() -> None:
    def of_lightning() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(Interrupted), keyboard_interrupts():
        of_lightning()
    with pytest.raises(SystemExit, match="3"), keyboard_interrupts():
        sys.exit(3)


def test_a_session_reports_its_sweeps_and_removes_what_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with new_session() as session:
        assert current_session() is session
        for name in ("refused", "done"):
            session.sweeps[tmp_path / name] = claim(tmp_path / name)
        (tmp_path / "done" / "0").mkdir()
        (tmp_path / "done" / "0" / RECORD).touch()
        with pytest.raises(ValueError, match="still going on"):
            claim(tmp_path / "done")
    assert current_session() is not session
    assert capsys.readouterr().out == f"\nsweep       {tmp_path / 'done'}\nreport      harness-sweep done\n"
    assert not (tmp_path / "refused").exists()
    claim(tmp_path / "done").release()


def test_a_rank_learns_its_point_from_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TYPED, '["of another sweep"]')
    monkeypatch.delenv(POINT, raising=False)
    assert SweepPoint.of_environment() is None
    assert point_name() is None
    assert group("alloy") == "alloy"
    assert "hydra.run.dir=." in arguments_of_rank(["a=1"], 1)
    point = SweepPoint(3, "forces=10", "/sweeps/of a/night", ("-m", "loss.coeffs.forces=1,10"))
    monkeypatch.setenv(POINT, point.to_json())
    assert SweepPoint.of_environment() == point
    assert typed() == point.typed
    assert point_name() == "forces=10"
    assert group("alloy") == "alloy/night"
    assert arguments_of_rank(["a=1"], 0) == ["a=1"]
    assert "hydra.run.dir=." not in arguments_of_rank(["a=1"], 1)  # the folder of the point is there


def test_options_of_the_config_are_told_from_overrides() -> None:
    arguments = ["-m", "--config-dir", "mine", "a=1", "~b", "-cn=other", "--config-pa", "/conf", "-c", "job"]
    options, overrides = config_options(arguments)
    assert options == {"config_dir": "mine", "config_name": "other", "config_path": "/conf"}
    assert overrides == ["a=1", "~b"]


def test_a_process_whose_parent_has_ended_does_not_start() -> None:
    code = (
        "import os, signal\nfrom harness.support.process import PARENT, end_with_parent\n"
        "print(end_with_parent(signal.SIGKILL), PARENT in os.environ)"
    )
    said = {}
    for parent in ("1", str(os.getpid()), None):
        environment = {key: value for key, value in os.environ.items() if key != PARENT}
        environment |= {"PYTHONPATH": str(ROOT), **({PARENT: parent} if parent else {})}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        said[parent] = (done.returncode, done.stdout.strip())
    # the variable is taken away: children of the process have another parent
    assert said == {"1": (1, ""), str(os.getpid()): (0, "True False"), None: (0, "False False")}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_a_process_ends_with_its_parent() -> None:
    child = (
        "import signal, time\nfrom harness.support.process import end_with_parent\nend_with_parent(signal.SIGKILL)\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    parent = (
        f"import os, subprocess, sys, time\nos.environ[{PARENT!r}] = str(os.getpid())\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        pid = int(started.stdout.readline())
        started.send_signal(signal.SIGKILL)
    for _ in range(200):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":  # killed, and not yet waited for by whoever has inherited it
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the process has outlived its parent")
