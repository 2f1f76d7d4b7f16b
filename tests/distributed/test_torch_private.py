"""The undocumented parts of torch.distributed are there, and do what they are used for."""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from support.spawning import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.agent.server import local_elastic_agent

from harness.distributed.torch_private import PRIVATE, TIMER_FILE, launcher_store, request_kill, set_default_timeout


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PRIVATE.items() for name in names])
def test_the_names_are_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def limits_of_new_groups(rank: int, world_size: int) -> list[timedelta]:
    before = c10d.default_pg_timeout, c10d.default_pg_nccl_timeout  # this process serves other tests too
    set_default_timeout(timedelta(seconds=77))
    try:
        mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("copies", "ranks"))
        groups = [dist.new_group(), mesh["copies"].get_group()]
    finally:
        c10d.default_pg_timeout, c10d.default_pg_nccl_timeout = before
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_groups_that_are_made_later_have_the_limit() -> None:
    assert spawn(2, limits_of_new_groups) == [[timedelta(seconds=77)] * 2] * 2


def test_a_request_reaches_the_timer_of_torchrun(tmp_path: Path) -> None:
    """As it reads them: lines of JSON in a named pipe."""
    pipe = tmp_path / "timer"
    os.mkfifo(pipe)
    read: list[dict[str, Any]] = []
    reader = threading.Thread(
        target=lambda: [read.extend(map(json.loads, pipe.read_text().splitlines())) for _ in range(2)], daemon=True
    )
    reader.start()
    before = time.time()
    request_kill(str(pipe), 60)
    deadline = time.monotonic() + 20
    while not read and time.monotonic() < deadline:
        time.sleep(0.01)
    request_kill(str(pipe), 0)
    reader.join(20)
    asked, taken_back = read
    assert (asked["pid"], asked["scope_id"]) == (taken_back["pid"], taken_back["scope_id"]) == (os.getpid(), "harness")
    assert before + 60 <= asked["expiration_time"] <= time.time() + 60
    assert taken_back["expiration_time"] < 0


def test_a_timer_that_has_gone_is_no_error(tmp_path: Path) -> None:
    request_kill(str(tmp_path / "nothing"), 60)


def test_the_variable_of_the_timer_is_that_of_torchrun() -> None:
    assert TIMER_FILE == local_elastic_agent.TORCHELASTIC_TIMER_FILE


def test_the_store_is_that_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    found = launcher_store(timedelta(seconds=20))
    found.set("key", "value")
    assert found.get("key") == b"value"
    assert store.num_keys() > 0
