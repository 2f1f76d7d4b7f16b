"""Command line of an evaluation: checkpoint, files and settings; and settings that a checkpoint's training decides."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from harness.config.explain import explain
from harness.config.resolvers import config_folder
from harness.data.extras import Extras
from harness.data.reading import LabelKeys
from harness.data.repeats import refuse_repeated_files
from harness.data.weights import WEIGHTS
from harness.support.configs import unwrapped
from harness.support.text import did_you_mean

__all__ = ["Request", "batch_limit", "extras_of", "label_keys", "parse"]

_SETTING = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@]*=.*|~[A-Za-z_][\w.]*", re.DOTALL)
_LIMITS = ("eval_batch_size", "max_atoms", "max_edges")


@dataclass(frozen=True)
class Request:
    """Request of a command line.

    Attributes:
        checkpoint: path of the checkpoint.
        files: to evaluate.
        config: of ``conf/eval.yaml``, with what was given.
        given: names of the settings that were given.
    """

    checkpoint: Path
    files: list[Path]
    config: DictConfig
    given: frozenset[str]


class _Parser(argparse.ArgumentParser):
    """Parser whose mistakes are exceptions: one rank reports them for all."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. {self.format_usage().strip()}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="harness-eval",
        usage="harness-eval CHECKPOINT FILE [FILE ...] [setting=value ...] [--write FILE.xyz] [--group NAME]",
        description="Errors and predictions of a trained model on files or stores, on one rank or on many.",
        epilog=f"Settings:\n\n{(Path(config_folder()) / 'eval.yaml').read_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", help="checkpoint, files, and settings as name=value")
    parser.add_argument("--write", metavar="FILE.xyz", help="write all frames with predictions beside their labels")
    parser.add_argument("--group", metavar="NAME", help="errors by the values of a name in the frames")
    parser.add_argument("--overwrite", action="store_true", help="replace files of an evaluation before")
    return parser


def parse(arguments: Sequence[str]) -> Request:
    """Request of the arguments of a command line.

    Raises:
        ValueError: something is missing, repeated or unknown.
    """
    options = _parser().parse_intermixed_args(list(arguments))
    given = [each for each in options.arguments if _is_setting(each)]
    paths = [Path(each).expanduser() for each in options.arguments if not _is_setting(each)]
    if len(paths) < 2:
        found = f"found {paths[0]} alone" if paths else "found neither"
        usage = _parser().format_usage().strip()
        raise ValueError(f"a checkpoint and the files to evaluate are needed, {found}. {usage}")
    config = _composed(given)
    names = {each.lstrip("+~").partition("=")[0] for each in given}
    shorthands = {"write": options.write, "group": options.group, "overwrite": options.overwrite or None}
    for name, value in shorthands.items():
        if value is None:
            continue
        if name in names:
            raise ValueError(f"both --{name} and {name}=... are given; expected one of them")
        config[name] = value
        names.add(name)
    refuse_repeated_files("the list of files", paths[1:])
    return Request(paths[0], paths[1:], config, frozenset(names))


def _is_setting(argument: str) -> bool:
    """True for ``name=value``, unless there is a file of that name."""
    return _SETTING.fullmatch(argument) is not None and not Path(argument).is_file()


def _composed(overrides: Sequence[str]) -> DictConfig:
    try:
        with initialize_config_dir(config_folder(), version_base="1.3"):
            return compose("eval", list(overrides))
    except HydraException as error:
        raise ValueError(_explained(error, overrides)) from error


def _explained(error: HydraException, overrides: Sequence[str]) -> str:
    """Message of settings that cannot be composed."""
    text = "\n".join(filter(None, (str(error), str(error.__cause__ or ""))))
    wrong = re.search(r"Could not override '([^'\n]+)'", text)
    if wrong is None:
        return explain(text, overrides)
    key = wrong.group(1)
    if key.startswith("metrics."):
        return f"{key} belongs to metrics that are chosen: give a file of conf/metrics, such as metrics=energy_force"
    names = list(_names(OmegaConf.to_container(OmegaConf.load(Path(config_folder()) / "eval.yaml"))))
    last = key.rpartition(".")[2]
    meant = did_you_mean(key, names) or did_you_mean(last, (name for name in names if name.startswith("data.")))
    meant = meant or next((f"Did you mean {name}? " for name in names if name.endswith(f".{key}")), "")
    return f"there is no setting {key}. {meant}`harness-eval --help` lists all of them"


def _names(content: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in content.items():
        if key != "defaults":
            found += [f"{prefix}{key}", *(_names(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return found


def label_keys(config: DictConfig, settings: Mapping[str, Any]) -> tuple[LabelKeys, dict[str, str]]:
    """Names of the labels: those that were given, and otherwise those of the checkpoint's training.

    Args:
        config: of the evaluation.
        settings: of the training by dotted name.

    Returns:
        All names, and those that were given, by label.
    """
    names = [str(name) for name in config.data["keys"] if name not in WEIGHTS]
    given = {name: str(config.data["keys"][name]) for name in names if config.data["keys"][name] is not None}
    of_training = {name: settings.get(f"data.keys.{name}") for name in names}
    return LabelKeys.from_mapping({**{k: v for k, v in of_training.items() if v is not None}, **given}), given


def extras_of(config: DictConfig, recorded: Mapping[str, Any] | None) -> tuple[Extras, list[str]]:
    """Further labels, inputs and weights: those that were given, and otherwise those of the checkpoint's training.

    Args:
        config: of the evaluation.
        recorded: entry ``extras`` of the checkpoint's record; None in one that has none.

    Returns:
        All of them, and the fields of the labels that were given.
    """
    before, data = recorded or {}, config.data
    labels, asked = _overlaid(data.labels, before.get("labels"))
    inputs, _ = _overlaid(data.inputs, before.get("inputs"))
    of_training = before.get("weights") or {}
    keys = {**dict.fromkeys(WEIGHTS), **(of_training.get("keys") or {})}
    keys |= {name: data["keys"][name] for name in WEIGHTS if data["keys"][name] is not None}
    factors = of_training.get("factors") if data.weights is None else data.weights
    if data.unweighted:
        keys, factors = dict.fromkeys(WEIGHTS), None
    return Extras.from_config(labels, inputs, factors, config.group, keys), asked


def _overlaid(given: Any, recorded: Mapping[str, Any] | None) -> tuple[Any, list[str]]:
    """Entries of a record with those that were given in their place, option by option, and the names of these."""
    given = unwrapped(given)
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        given = {name: {} for name in given}
    if given is None or not isinstance(given, dict):
        return (recorded if given is None else given), []
    found: dict[str, Any] = dict(recorded or {})
    for name, options in given.items():
        options = {"key": options} if isinstance(options, str) else options or {}
        found[name] = {**found.get(name, {}), **options} if isinstance(options, dict) else options
    return found, list(given)


def batch_limit(config: DictConfig, settings: Mapping[str, Any]) -> dict[str, int]:
    """Limit of a batch of all ranks: the one that was given, or that of the checkpoint's training, or 32 frames.

    Raises:
        ValueError: more than one was given.
    """
    given = {name: config.data[name] for name in _LIMITS if config.data[name] is not None}
    if len(given) > 1:
        found = ", ".join(f"data.{name}={value}" for name, value in given.items())
        raise ValueError(f"one of {', '.join(f'data.{name}' for name in _LIMITS)} limits a batch, found {found}")
    if not given:
        trained = [(name, settings.get(f"data.{name}")) for name in (*_LIMITS, "batch_size")]
        given = dict([next((each for each in trained if each[1] is not None), ("eval_batch_size", 32))])
    ((name, value),) = given.items()
    return {"batch_size" if name == "eval_batch_size" else name: value}
