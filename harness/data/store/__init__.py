"""Stores: frames on disk, checked and counted once, and read by any number of processes without being in memory."""

from harness.data.store.building import BuildSettings, build_store
from harness.data.store.stored import StoredFrames, is_store

__all__ = ["BuildSettings", "StoredFrames", "build_store", "is_store"]
