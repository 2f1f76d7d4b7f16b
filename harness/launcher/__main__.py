"""Run as ``python -m harness.launcher``."""

from harness.launcher.agent import main

main()
