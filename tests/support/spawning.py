"""Real gloo ranks for tests, as :mod:`harness.testing` offers them to users."""

from __future__ import annotations

from harness.testing.ranks import RankFailedError, close_all, spawn

__all__ = ["RankFailedError", "close_all", "spawn"]
