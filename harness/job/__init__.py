"""One training: built, checked, run, ended."""

from harness.job.build import Job, build, build_module, follow_schedule, read_schedule
from harness.job.job import execute, prepare, train
from harness.job.protocols import ChecksJob, FinishesRun, KeepsCheckpoints, WritesFiles
from harness.job.recorded_model import from_checkpoint

__all__ = [
    "ChecksJob",
    "FinishesRun",
    "Job",
    "KeepsCheckpoints",
    "WritesFiles",
    "build",
    "build_module",
    "execute",
    "follow_schedule",
    "from_checkpoint",
    "prepare",
    "read_schedule",
    "train",
]
