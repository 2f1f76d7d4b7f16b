"""Arguments of a mixture and of its sets: which there are, and errors about them by the names of the config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf

from harness.data.arguments import paths_of
from harness.data.datamodule import AtomsDataModule
from harness.data.store import is_store
from harness.data.store_datamodule import OF_THE_BUILD, StoreDataModule
from harness.support.checks import is_number
from harness.support.text import did_you_mean, reason

__all__ = ["about_set", "checked_sets", "data_module", "plain", "weights_of", "with_set"]

_OF_THE_WHOLE = frozenset(
    {
        "cutoff",
        "batch_size",
        "max_atoms",
        "max_edges",
        "balance",
        "eval_batch_size",
        "seed",
        "type_names",
        "dtype",
        "num_workers",
        "pin_memory",
        "neighbors",
        "cache_neighbors",
    }
)
"""Arguments of a data module that are those of the mixture, and no set's own."""
_FILES = ("train", "val", "test")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_EXAMPLE = "'data.sets={bulk: {train: bulk.xyz, weight: 2}, molecules: {train: molecules.xyz, split: {val: 0.1}}}'"


def plain(value: Any) -> Any:
    """A value without classes of OmegaConf."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return value


def _arguments_of_sets() -> list[str]:
    """Names of the arguments that a set may have."""
    of_module = [name for name in inspect.signature(AtomsDataModule.__init__).parameters if name != "self"]
    return [*(name for name in of_module if name not in _OF_THE_WHOLE), "weight", "references"]


def checked_sets(sets: Any, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of each set, by its name; they and those for all sets are looked at.

    Raises:
        KeyError: an argument that no set has.
        TypeError: sets that are no mappings.
        ValueError: no sets, or a name that no key could be made of.
    """
    valid = _arguments_of_sets()
    of_one = ("weight", "references", "train", "val", "test")
    for name in options:
        if name not in valid or name in of_one:
            meant = did_you_mean(name, [each for each in valid if each not in of_one])
            what = "is of one set" if name in of_one else "is no argument of a mixture or a set"
            raise KeyError(f"data.{name} {what}. {meant}Files and weights are in data.sets, such as {_EXAMPLE}")
    if not sets:
        raise ValueError(f"data.sets is empty; expected at least one named set, such as {_EXAMPLE}")
    if not isinstance(sets, Mapping):
        raise TypeError(f"data.sets is a mapping of names to sets, such as {_EXAMPLE}, found {sets!r}")
    found: dict[str, dict[str, Any]] = {}
    for key, given in sets.items():
        name = str(key)
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"data.sets: {name!r} is no name of a set, which becomes part of log keys (forces_mae@{name}); "
                f"expected letters, digits, and _ . + - within"
            )
        if not isinstance(given, Mapping):
            raise TypeError(f"data.sets.{name} is a mapping such as {{train: {name}.xyz}}, found {given!r}")
        for argument in given:
            if argument in valid:
                continue
            meant = did_you_mean(argument, valid)
            whole = f"It is of the whole: data.{argument}. " if argument in _OF_THE_WHOLE else ""
            raise KeyError(
                f"data.sets.{name} has {argument!r}, which is no argument of a set. {whole or meant}A set has "
                f"{', '.join(valid)}"
            )
        if not given.get("train"):
            raise ValueError(
                f"data.sets.{name} has no training frames; expected train: a file, or a list of files. To evaluate on "
                f"other frames alone, give them as val or test of a set that is trained on, or use harness-eval"
            )
        found[name] = dict(given)
    return found


def weights_of(arguments: dict[str, dict[str, Any]]) -> list[float] | None:
    """Weights of the sets, taken out of their arguments; None if no set has one.

    Raises:
        ValueError: a weight that is not positive.
    """
    given = {name: each.pop("weight", None) for name, each in arguments.items()}
    for name, weight in given.items():
        if weight is not None and (not is_number(weight) or not 0 < weight < float("inf")):
            raise ValueError(
                f"data.sets.{name}.weight must be a positive number, found {weight!r}; a set that is not trained on is "
                f"left out"
            )
    if all(weight is None for weight in given.values()):
        return None
    return [1.0 if weight is None else float(weight) for weight in given.values()]


@contextmanager
def about_set(name: str) -> Iterator[None]:
    """Name the set in errors about its arguments and files."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise _same_kind(error)(f"data.sets.{name}: {with_set(reason(error), name)}") from error


def _same_kind(error: Exception) -> type[Exception]:
    kinds = (FileNotFoundError, KeyError, TypeError, ValueError, OSError)
    return next(kind for kind in kinds if isinstance(error, kind))


def with_set(text: str, name: str) -> str:
    """A message in which settings of the data are those of a set: ``data.sets.bulk.keys`` for ``data.keys``."""
    settings = "|".join(each for each in _arguments_of_sets() if each not in ("weight", "references"))
    return re.sub(rf"\bdata\.({settings})\b", rf"data.sets.{name}.\1", text)


def data_module(shared: Mapping[str, Any], options: Mapping[str, Any], given: Mapping[str, Any]) -> AtomsDataModule:
    """Data module of a set: of stores, if its training frames are in one, or else of files.

    Args:
        shared: arguments of the whole.
        options: arguments of every set that does not have them; those that a store's build has decided are left out.
        given: arguments of the set.
    """
    if not any(is_store(path.expanduser()) for path in paths_of(given["train"])):
        return AtomsDataModule(**{**shared, **options, **given})
    of_training = {name: value for name, value in options.items() if name not in OF_THE_BUILD}
    return StoreDataModule(**{**shared, **of_training, **given})
