"""A trained model as a file of its own package, or as plain tensors.

    harness-export outputs/alloy/2026-11-27_10-00-00/checkpoints/best.ckpt --to mace
    harness-export best.ckpt --to nequip -o alloy-nequip.ckpt
    python -m harness.export best.ckpt --to state-dict

The checkpoint is all that is needed. Averaged weights are exported where the training has averaged them. A file of
another package is tried before it gets its name: the package itself predicts a made-up structure from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import field_spec
from harness.data import Frame, collate, frame_to_sample
from harness.export.format import Format
from harness.export.mace import MACEFormat
from harness.export.nequip import NequIPFormat
from harness.export.sevennet import SevenNetFormat
from harness.export.state_dict import state_dict_file
from harness.export.structure import example_structure
from harness.models.heads import heads_of
from harness.support.files import replacing
from harness.support.process import mistakes_reported
from harness.trained import TrainedCheckpoint, TrainedModel

__all__ = ["FORMATS", "main"]

FORMATS: dict[str, Format] = {each.name: each for each in (MACEFormat(), NequIPFormat(), SevenNetFormat())}
"""Formats of other packages by the value of ``--to``."""
_STATE_DICT = "state-dict"
_BUILDERS = "harness.models."


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harness-export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of a training, such as best.ckpt")
    of_formats = "; ".join(f"{name}: of {_configs(each)}" for name, each in FORMATS.items())
    parser.add_argument(
        "--to",
        required=True,
        choices=[*FORMATS, _STATE_DICT],
        help=f"format. {of_formats}; {_STATE_DICT}: of any model, plain tensors and what is known about them",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="file; beside the checkpoint if not given")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--dtype", choices=["float32", "float64"], help="of the weights (--to mace); that of the training if not given"
    )
    parser.add_argument(
        "--head",
        metavar="SET",
        help="data set of a mixture whose energies the file predicts, of a model without heads; those of the mixture "
        "if not given",
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="NAME",
        help="package or module whose builder of the model may be called, for a model of your own; can be repeated",
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Command line of ``harness-export``."""
    arguments = _arguments(given)
    with mistakes_reported():
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    """Read, convert, write, try, and say what was done.

    Raises:
        ValueError: the checkpoint lacks what is needed, has another model than the format is for, or its file predicts
            something else.
        OSError: there is no checkpoint, or the file is there or cannot be written.
        ModuleNotFoundError: the package of the model is not installed.
    """
    checkpoint = TrainedCheckpoint.read(arguments.checkpoint)
    fmt = FORMATS.get(arguments.to)
    suffix = fmt.suffix if fmt is not None else f"-{_STATE_DICT}.pt"
    output = (arguments.output or checkpoint.path.with_name(checkpoint.path.stem + suffix)).expanduser()
    if arguments.dtype is not None and (fmt is None or not fmt.has_dtype):
        raise ValueError(f"--dtype is of --to mace alone: --to {arguments.to} keeps the dtype of the training.")
    if arguments.head is not None and fmt is None:
        raise ValueError(
            f"--head is of files of other packages: --to {_STATE_DICT} keeps the weights, and has the references of "
            f"each set in metadata['statistics']['set_references']."
        )
    _check_output(output, checkpoint.path, arguments.force)
    if fmt is None:
        with replacing(output) as part:
            _save(state_dict_file(checkpoint), part)
        lines = [("read back", f'torch.load("{output}", weights_only=True)')]
    else:
        dtype = getattr(torch, arguments.dtype or "", None)
        lines = _export(checkpoint, fmt, output, dtype, arguments.trust, arguments.head)
    weights = "averaged weights" if checkpoint.are_averaged else "weights"
    _print("checkpoint", f"{checkpoint.path}: {weights} of step {checkpoint.step}")
    _print("written", f"{output} ({output.stat().st_size / 2**20:.2f} MiB)")
    for name, line in lines:
        _print(name, line)


def _export(
    checkpoint: TrainedCheckpoint,
    fmt: Format,
    output: Path,
    dtype: torch.dtype | None,
    trust: Sequence[str],
    head: str | None = None,
) -> list[tuple[str, str]]:
    """Write the file of another package; lines about it, each with its title."""
    builder = str(checkpoint.architecture.get("_target_"))
    own = builder.rpartition(".")[2].removesuffix("_force_field") if builder.startswith(_BUILDERS) else None
    if own in _known_models() - {*fmt.models}:  # before its package is imported, which may not be here
        raise _WrongModel(checkpoint, fmt, f"model={own}")
    names, cutoff = checkpoint.type_names, checkpoint.cutoff
    if names is None or cutoff is None:
        raise ValueError(
            f"{checkpoint.path} has no {'type names' if names is None else 'cutoff'}, which {fmt.name} needs: "
            f"--to {_STATE_DICT} takes any model."
        )
    changes = {"compile_mode": "eager"} if "compile_mode" in checkpoint.architecture else {}
    model = checkpoint.build(trust, changes).eval()
    if not fmt.takes(model):
        raise _WrongModel(checkpoint, fmt, builder)
    level = _choose_level(model, checkpoint, head)
    weights = next(model.parameters()).dtype
    kept = dtype or fmt.only_dtype or weights
    example = example_structure(names, cutoff)
    batch = collate([frame_to_sample(Frame(example), names, cutoff, dtype=torch.float64)])
    # a model with several heads is tried with each of them
    heads = heads_of(model) or ()
    batches = [{**batch, "set_index": torch.tensor([index])} for index in range(len(heads))] or [batch]
    with replacing(output) as part:
        _save(fmt.content(model, example, dtype), part)
        differences: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for each in batches:
            expected, found = model(each), fmt.predictions(part, example, each, model)
            for field in (name for name in found if name in expected):
                difference = float((found[field] - expected[field]).abs().max())
                differences[field] = max(differences.get(field, 0.0), difference)
                sizes[field] = max(sizes.get(field, 0.0), float(expected[field].abs().max()))
        _check_predictions(fmt, differences, sizes, max((weights, kept), key=lambda each: torch.finfo(each).eps))
    off = ", ".join(f"{field} by {value:.1e} {field_spec(field).unit}" for field, value in differences.items())
    first, *others = fmt.uses(output, model, kept)
    return [
        ("tried", f"on a made-up crystal of {len(example)} atoms: {fmt.name} is off in {off}"),
        *(("energies", sentence) for sentence in level),
        *(("note", remark) for remark in fmt.remarks(model, kept)),
        ("used by", first),
        *(("", line) for line in others),
    ]


def _choose_level(model: nn.Module, checkpoint: TrainedCheckpoint, head: str | None) -> list[str]:
    """Give a model without heads the references of a data set that is asked for; a sentence on its energies.

    Raises:
        ValueError: there is no such set, or the model has a head for each, all of which are written.
    """
    heads = heads_of(model)
    if heads and head is not None:
        raise ValueError(
            f"--head={head}: the model has the heads {', '.join(heads)}, and the file has all of them; leave it out, "
            f"and name the head where the file is used."
        )
    statistics = checkpoint.record.get("statistics") or {}
    sets, common = statistics.get("set_references") or {}, statistics.get("mixture_references") or {}
    if head is not None:
        TrainedModel(model, checkpoint).choose(head)
        absent = sorted(set(common) - set(sets[head]))
        rest = f"; {', '.join(absent)}, which it does not have, with references of other sets" if absent else ""
        return [f"those of the set {head}{rest}"]
    if heads or all(common.get(each) == energy for own in sets.values() for each, energy in own.items()):
        return []
    return [f"those of the mixture, which are moved; of one of its sets ({', '.join(sets)}) by --head SET"]


def _save(content: Any, part: Path) -> None:
    """Write a file with torch.

    Raises:
        OSError: it cannot be written, such as where the disk is full.
    """
    try:
        with part.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(f"{part.parent} takes no file: {str(error).splitlines()[0]}") from error


class _WrongModel(ValueError):
    """The model is none of those that a format is for."""

    def __init__(self, checkpoint: TrainedCheckpoint, fmt: Format, found: str) -> None:
        other = next((name for name, each in FORMATS.items() if found.removeprefix("model=") in each.models), None)
        or_other = f"--to {other}, or " if other else ""
        super().__init__(
            f"--to {fmt.name} is for {_configs(fmt)}, and {checkpoint.path} is of {found}: {or_other}--to "
            f"{_STATE_DICT}, which takes any model."
        )


def _check_output(output: Path, checkpoint: Path, force: bool) -> None:
    """Refuse a file that is there.

    Raises:
        FileExistsError: without ``force``.
        IsADirectoryError: it is a folder.
        ValueError: it is the checkpoint.
    """
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder, expected the name of a file: -o {output / 'NAME'}")
    if output.exists() and output.samefile(checkpoint):
        raise ValueError(
            f"{output} is the checkpoint itself, which an export leaves as it is: give another name with -o"
        )
    if output.exists() and not force:
        raise FileExistsError(f"{output} is there already: --force replaces it, or -o gives another name")
    output.parent.mkdir(parents=True, exist_ok=True)


def _check_predictions(fmt: Format, differences: dict[str, float], sizes: dict[str, float], dtype: torch.dtype) -> None:
    """Refuse a file from which the package predicts something else than the checkpoint's model.

    Raises:
        ValueError: a difference is above rounding.
    """
    eps = torch.finfo(dtype).eps
    # references are added once: a large energy excuses no more than the rounding of sums
    allowed = {
        name: eps * (1000 + 64 * sizes[name] if name == "total_energy" else 1000 * max(sizes[name], 1.0))
        for name in sizes
    }
    wrong = [name for name, value in differences.items() if not value <= allowed[name]]
    if wrong:
        found = ", ".join(f"{name} by {differences[name]:.1e} of {sizes[name]:.1e}" for name in wrong)
        raise ValueError(
            f"the file was not kept: for a made-up structure, {fmt.name} predicts other values from it than the "
            f"checkpoint's model ({found}). Please report it with the versions of both packages."
        )


def _known_models() -> set[str]:
    return {"schnet", *(name for each in FORMATS.values() for name in each.models)}


def _configs(fmt: Format) -> str:
    return " and ".join(f"model={name}" for name in fmt.models)


def _print(title: str, line: str) -> None:
    print(f"{title:<11} {line}", flush=True)
