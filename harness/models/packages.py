"""Packages of other people's models: none is needed until its model is chosen."""

from __future__ import annotations

__all__ = ["missing_package"]

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
