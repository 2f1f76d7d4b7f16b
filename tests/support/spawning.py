"""Real gloo ranks for tests, as :mod:`harness.testing` offers them to users."""

from __future__ import annotations

from harness.testing.ranks import PRELOAD, RankFailedError, close_all, spawn

__all__ = ["RankFailedError", "close_all", "spawn"]

# what most ranks of these tests use; each would take seconds to import it
PRELOAD += ["lightning.pytorch", "harness.callbacks", "harness.module", "harness.strategies"]
