"""Variables of W&B's own, where neither the configuration nor the caller says something.

A value that is given wins over the variable, and the variable over a default of this package. Most variables are read
by W&B itself, such as ``WANDB_ENTITY``, ``WANDB_TAGS``, ``WANDB_NOTES``, ``WANDB_BASE_URL`` and ``WANDB_SILENT``; here
are those that would meet a default of ours, and those that decide before W&B is asked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeVar, cast

from harness.support.checks import is_number

__all__ = ["Mode", "Resume", "has_credentials", "mode", "resume", "variable"]

Mode = Literal["online", "offline", "disabled", "shared"]
Resume = Literal["allow", "auto", "must", "never"]
_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",  # by its older names
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
    "shared": "shared",
}
_RESUME: dict[str, Resume] = {"allow": "allow", "auto": "auto", "true": "auto", "must": "must", "never": "never"}
Default = TypeVar("Default", str, float, bool, None)


def variable(name: str, default: Default) -> str | Default:
    """Value of ``WANDB_<name>``; the default if there is none, or it is empty.

    Args:
        name: without ``WANDB_``.
        default: if it is a number, so must be the variable.

    Raises:
        ValueError: no number where one is expected.
    """
    found = os.environ.get(f"WANDB_{name}")
    if not found:
        return default
    if not is_number(default):
        return found
    try:
        return cast(Default, float(found))
    except ValueError:
        raise ValueError(f"WANDB_{name} is a number of seconds, found {found!r}.") from None


def has_credentials() -> bool:
    """True if W&B finds a key or token: in a variable, or in the file that ``wandb login`` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return Path(os.environ.get("NETRC") or Path.home() / ".netrc").is_file()


def mode(given: str | None, offline: bool | None) -> Mode:
    """Mode of a run: as given, else by ``WANDB_MODE``, else online if W&B has credentials.

    Args:
        given: argument ``mode`` of ``wandb.init``.
        offline: true for ``offline`` and false for ``online``.

    Raises:
        ValueError: no mode of W&B's, or ``mode`` and ``offline`` contradict each other.
    """
    named = None if given is None else _among(_MODES, given, "mode")
    if offline is not None:
        if named is not None and offline != (named == "offline"):
            raise ValueError(f"mode={given} contradicts offline={str(offline).lower()}: give one of them.")
        return named or ("offline" if offline else "online")
    return (
        named or _among(_MODES, variable("MODE", None), "WANDB_MODE") or ("online" if has_credentials() else "offline")
    )


def resume(given: str | bool | None) -> Resume:
    """Treatment of a run that is there: as given, else by ``WANDB_RESUME``, else ``allow``.

    Raises:
        ValueError: nothing that W&B knows.
    """
    asked = None if given is None or given is False else _among(_RESUME, str(given).lower(), "resume")
    return asked or _among(_RESUME, variable("RESUME", None), "WANDB_RESUME") or "allow"


Known = TypeVar("Known", Mode, Resume)


def _among(known: dict[str, Known], found: str | None, what: str) -> Known | None:
    if found is not None and found not in known:
        raise ValueError(f"{what} is one of {', '.join(known)}, found {found!r}.")
    return None if found is None else known[found]
