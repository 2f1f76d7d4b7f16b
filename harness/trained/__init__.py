"""Trained models: rebuilt from a checkpoint alone."""

from harness.trained.checkpoint import TrainedCheckpoint, model_weights
from harness.trained.model import TrainedModel, load_model
from harness.trained.record import MADE_WITH, RecordedStatistics, made_with

__all__ = [
    "MADE_WITH",
    "RecordedStatistics",
    "TrainedCheckpoint",
    "TrainedModel",
    "load_model",
    "made_with",
    "model_weights",
]
