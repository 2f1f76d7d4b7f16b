"""Run as ``python -m harness.sweep``."""

from harness.sweep.command import main

main()
