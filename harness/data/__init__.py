"""Data: files of structures → batches, the same on any number of ranks."""

from harness.data.budget import BudgetBatchSampler, EvaluationBudgetSampler
from harness.data.collate import collate, empty_batch, frame_to_sample
from harness.data.datamodule import AtomsDataModule, EmbeddedAlloyDataModule
from harness.data.dataset import AtomsDataset
from harness.data.embedded import embedded_alloy_file
from harness.data.loader import LookAheadLoader, ResumableDataLoader, look_ahead
from harness.data.neighbors import neighbor_list
from harness.data.reading import Frame, LabelKeys, read_frames
from harness.data.samplers import EvaluationBatchSampler, GlobalBatchSampler, TrainingBatchSampler
from harness.data.statistics import DataStatistics, training_statistics
from harness.data.store import StoredFrames, build_store
from harness.data.store_datamodule import StoreDataModule

__all__ = [
    "AtomsDataModule",
    "AtomsDataset",
    "BudgetBatchSampler",
    "DataStatistics",
    "EmbeddedAlloyDataModule",
    "EvaluationBatchSampler",
    "EvaluationBudgetSampler",
    "Frame",
    "GlobalBatchSampler",
    "LabelKeys",
    "LookAheadLoader",
    "ResumableDataLoader",
    "StoreDataModule",
    "StoredFrames",
    "TrainingBatchSampler",
    "build_store",
    "collate",
    "embedded_alloy_file",
    "empty_batch",
    "frame_to_sample",
    "look_ahead",
    "neighbor_list",
    "read_frames",
    "training_statistics",
]
