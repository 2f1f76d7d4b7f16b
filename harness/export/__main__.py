"""Run as ``python -m harness.export``."""

from harness.export.command import main

main()
