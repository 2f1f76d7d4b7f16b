"""Secrets in settings and on the command line, which no logger writes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

__all__ = ["MASK", "arguments_have_secrets", "without_secrets"]

MASK = "***"
_SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SECRET_SETTING = re.compile(  # whole words only: `keys` of labels, `tokens` and `keyword` are none
    r"(^|[^a-z])(key|apikey|token|secret|password|passwd|credentials?)([^a-z]|$)", re.IGNORECASE
)
_SHORTEST_SECRET = 8
_CREDENTIALS = re.compile(r"(://[^/\s:@]+:)[^/\s@]+@")  # of an address, https://user:password@host


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with ``***`` in the place of everything that looks like a secret.

    A secret is the value of a setting whose name has a word such as ``key``, ``token``, ``secret``, ``password`` or
    ``credentials`` in it, and any text that contains the value of an environment variable with such a name
    (``WANDB_API_KEY``, ``HF_TOKEN``) of at least 8 characters. Values that are paths of this machine are none. Of an
    address with a password, the password is masked.

    Args:
        settings: settings, with dictionaries and lists at any depth; they are not changed.

    Returns:
        A copy of them.
    """
    return cast(dict[str, Any], _masked(settings, _secret_values()))


def _secret_values() -> list[str]:
    return [
        value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET and not os.path.exists(value)
    ]


def _masked(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: MASK if _names_a_secret(key) and item not in (None, "") else _masked(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_masked(item, secrets) for item in value]
    text = str(value) if isinstance(value, str | int | float | bytes | Path) else ""
    if any(secret in text for secret in secrets):
        return MASK
    return _CREDENTIALS.sub(rf"\1{MASK}@", value) if isinstance(value, str) else value


def _names_a_secret(name: object) -> bool:
    return isinstance(name, str) and _SECRET_SETTING.search(re.sub(r"([a-z])([A-Z])", r"\1_\2", name)) is not None


def arguments_have_secrets() -> bool:
    """True if the command line of this process, which W&B would store, looks as if it had a secret in it."""
    secrets = _secret_values()
    return any(
        any(secret in argument for secret in secrets) or ("=" in argument and _names_a_secret(argument.split("=")[0]))
        for argument in sys.argv[1:]
    )
