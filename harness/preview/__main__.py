"""Run as ``python -m harness.preview``."""

from harness.preview import main

main()
