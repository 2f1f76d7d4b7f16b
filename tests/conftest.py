"""What all tests share: one torch thread, functions that configs call, and ranks that end with the session."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from support import spawning
from support.alloy import data  # noqa: F401 - a fixture

from harness.config.resolvers import register_resolvers
from harness.strategies.extensions import remove_abandoned_locks

# every run draws the same examples: a failure in CI is one that can be repeated
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


# directories of the longest files, with those beside this one
FIRST = ("tests", "jobs", "strategies", "testing", "trained")


@pytest.hookimpl(specname="pytest_collection_modifyitems")
def pytest_long_files_first(items: list[pytest.Item]) -> None:
    """Order files so that the last ones are short: a worker that has nothing left to do waits for the other."""
    items.sort(key=lambda item: item.path.parent.name not in FIRST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session", autouse=True)
def _session() -> Iterator[None]:
    torch.set_num_threads(1)
    register_resolvers()  # of conf/, whichever test is the first to read it
    with warnings.catch_warnings():  # of a run of the tests that was killed in mid-compilation
        warnings.simplefilter("ignore")
        remove_abandoned_locks(0)
    yield
    spawning.close_all()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
