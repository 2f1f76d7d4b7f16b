"""Tests for parts of your own: :func:`check_metric` takes a metric through the laws that losses and metrics rely on.

Nothing here needs pytest: call it in a test of any framework, or in a script. :func:`spawn` runs a function on real
gloo ranks.
"""

from harness.testing.metric import MetricCheckError, check_metric
from harness.testing.ranks import RankFailedError, close_all, spawn

__all__ = ["MetricCheckError", "RankFailedError", "check_metric", "close_all", "spawn"]
