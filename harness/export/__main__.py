"""Run as ``python -m harness.export``."""

from harness.export import main

main()
