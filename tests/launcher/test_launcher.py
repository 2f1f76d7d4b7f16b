"""Agents that start the ranks of sweep points, without a rank: settings, GPUs, signals, names of folders."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from support.configs import CONF

from harness.launcher import Settings, SettingsError, agent
from harness.launcher.launch import _slots, _stop_signals, _visible_gpus, quoted


def test_a_node_leaves_a_sweep_that_gives_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent, "SILENCE", 0.3)
    (tmp_path / ".launch").mkdir()
    (tmp_path / ".launch" / "alive").write_text("1.0")
    assert agent._join(tmp_path, node_rank=1) == 1
    assert f"no sign of life of the sweep in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["/a b/c=1,2/[x]", "it's", "back\\'slash", "end\\", "${name}", "$HOME", "{a: 1}"])
def test_any_folder_is_one_value_of_an_override(text: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("train", [f"name={quoted(text)}"]).name == text


def test_signals_that_are_ignored_stay_so() -> None:
    """As ``nohup`` asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert received == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_gpus_are_those_that_cuda_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for visible, number, names in [
        (None, 2, ["0", "1"]),
        ("3, 5", 2, ["3", "5"]),
        ("0,-1,1", 1, ["0"]),
        ("MIG-a,MIG-b", 1, ["MIG-a"]),
    ]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda number=number: number)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert _visible_gpus() == names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nproc_per_node": "gpu"}, "nproc_per_node is a number, at least 1, or auto, found 'gpu'"),
        ({"parallel": 0}, "parallel is a number, at least 1, or auto, found 0"),
        ({"max_restarts": -1}, "max_restarts is a whole number, at least 0, found -1"),
        ({"omp_num_threads": 0}, "omp_num_threads is a whole number, at least 1, found 0"),
        ({"nnodes": "2:1"}, "nnodes is a number of nodes, or MIN:MAX, found '2:1'"),
        ({"foo": 2}, "no setting 'foo'; it has nproc_per_node, parallel,"),
        ({"nnodes": 2}, "nnodes=2 needs an address where the nodes meet"),
        ({"nnodes": "1:2", "rdzv_endpoint": "a:1", "parallel": 2}, "one after the other"),
    ],
)
def test_wrong_settings_of_the_launcher_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.of(given)


def test_points_share_out_the_gpus_or_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    four = ["2", "3", "5", "7"]
    settings, slots = _slots(Settings(nproc_per_node=2, parallel="auto"), four, 16)
    assert settings.parallel == 2
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["2,3", "5,7"]
    assert [slot["OMP_NUM_THREADS"] for slot in slots] == ["4", "4"]
    settings, slots = _slots(Settings(), four, 16)
    assert (settings.nproc_per_node, slots) == (4, [{"OMP_NUM_THREADS": "4"}])
    settings, slots = _slots(Settings(nproc_per_node=2, parallel="auto", omp_num_threads=3), [], 7)
    assert [*map(dict, slots)] == [{"OMP_NUM_THREADS": "3"}] * 3
    settings, slots = _slots(Settings(nnodes=2, rdzv_endpoint="a:1", nproc_per_node=1, parallel="auto"), four, 16)
    assert len(slots) == 1
    with pytest.raises(SettingsError, match=r"3 point\(s\) of 2 rank\(s\) side by side need 6 GPUs, found 4"):
        _slots(Settings(nproc_per_node=2, parallel=3), four, 16)
