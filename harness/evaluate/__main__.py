"""``python -m harness.evaluate``."""

from harness.evaluate import main

main()
