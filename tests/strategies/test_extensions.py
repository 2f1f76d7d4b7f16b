"""A lock that a killed compilation has left does not keep a DeepSpeed training waiting; one that is held stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from harness.strategies.extensions import remove_abandoned_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch's lock of an extension would be."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    return folder / "lock"


def abandoned(lock: Path, minutes: float) -> FileBaton:
    """The lock of a process that was killed: nobody has it open."""
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert baton.fd is not None
    os.close(baton.fd)
    before = time.time() - 60 * minutes
    os.utime(lock, (before, before))
    return baton


def test_an_abandoned_lock_is_removed_and_named(lock: Path) -> None:
    abandoned(lock, 11)
    with pytest.warns(RuntimeWarning, match="deepspeed_shm_comm/lock, which a process that was killed left 11 min ago"):
        assert remove_abandoned_locks() == [lock]
    assert not lock.exists()
    FileBaton(str(lock)).wait()  # torch itself has nothing to wait for


def test_a_young_lock_may_be_another_machines(lock: Path) -> None:
    abandoned(lock, 1)
    with pytest.warns(RuntimeWarning, match=f"If nothing is compiled, remove {lock}"):
        assert remove_abandoned_locks() == []
    assert lock.exists()
    with pytest.warns(RuntimeWarning, match="Removed"):
        assert remove_abandoned_locks(0) == [lock]


def test_a_lock_that_is_held_stays(lock: Path, recwarn: pytest.WarningsRecorder) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    try:
        before = time.time() - 3600
        os.utime(lock, (before, before))
        assert remove_abandoned_locks() == []
        assert lock.exists()
    finally:
        baton.release()
    assert remove_abandoned_locks() == []
    assert not [warning for warning in recwarn if "lock" in str(warning.message)]


def test_folders_right_below_a_given_root_are_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "fused_adam").mkdir()
    abandoned(tmp_path / "fused_adam" / "lock", 20)
    with pytest.warns(RuntimeWarning, match="fused_adam"):
        remove_abandoned_locks()
