"""Puts off what :mod:`harness.train` puts off: for scripts that train, which import this before anything else.

It halves the time until all is imported.
"""

from harness.support.deferred import defer

defer()
