"""Packages of other people's models: none is needed until its model is chosen."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager

from harness.support.guest import guest

__all__ = ["hosting", "missing_package", "version_of"]

_OWN_ENVIRONMENT = {"mace": "mace-torch and nequip need different versions of e3nn: one environment has one of them. "}


def missing_package(error: ModuleNotFoundError, model: str, extra: str) -> ModuleNotFoundError:
    """Error with the command that installs what a model needs.

    Args:
        error: of the import.
        model: name of the model.
        extra: name of the extra in ``pyproject.toml``.
    """
    return ModuleNotFoundError(
        f"{model} needs the package {error.name!r}, which is not installed: pip install 'potential-harness[{extra}]'. "
        f"{_OWN_ENVIRONMENT.get(extra, '')}".rstrip(),
        name=error.name,
    )


@contextmanager
def hosting(target: str) -> Iterator[None]:
    """Context in which a builder that a config names is imported and called, see :func:`~harness.support.guest.guest`.

    The packages of NequIP build models within a global state of theirs, which is made for them.

    Args:
        target: dotted path of the builder.
    """
    package = target.partition(".")[0]
    if package == __name__.partition(".")[0]:
        yield
        return
    with guest():
        if package in ("nequip", "allegro"):
            try:
                from nequip.utils.global_state import set_global_state
            except ModuleNotFoundError as error:
                raise missing_package(error, target, package) from error
            set_global_state()
        yield


def version_of(package: str) -> str:
    """Name and version of an installed package, such as ``sevenn 0.13.0``."""
    return f"{package} {importlib.metadata.version(package)}"
