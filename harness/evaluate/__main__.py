"""``python -m harness.evaluate``."""

from harness.evaluate.command import main

main()
