"""One training: made, checked, run, ended."""

from harness.job.job import Job, build_module, execute, follow_schedule, prepare, read_schedule, train

__all__ = ["Job", "build_module", "execute", "follow_schedule", "prepare", "read_schedule", "train"]
