"""Stores of frames: built once of files that ASE reads, for trainings that begin at once and keep nothing in memory.

harness-data build my.store train.xyz more.traj folder/       # resumed by the same command where it was stopped
harness-data build my.store train.xyz data.keys.forces=REF_forces --cutoff 5.0 --workers 16
harness-data info my.store                                    # what is in it
harness-data info my.store --verify                           # and whether every byte is what was written
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from harness.config.resolvers import config_folder
from harness.data.arguments import checked_cutoff, checked_min_distance
from harness.data.extras import Extras, split_keys
from harness.data.reading import LabelKeys
from harness.data.store import BuildSettings, StoredFrames, build_store
from harness.data.store.changes import changed_sources
from harness.data.store.sources import found_files
from harness.support.text import did_you_mean

__all__ = ["main"]

_SETTING = re.compile(r"[+~]{0,2}[A-Za-z_][\w.]*=.*", re.DOTALL)
_SHOWN = 20  # groups, and files


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``harness-data``; mistakes end it with one message and exit code 1, Ctrl-C with 130.

    Args:
        arguments: those of the process if not given.
    """
    options = _parser().parse_intermixed_args(sys.argv[1:] if arguments is None else list(arguments))
    try:
        _build(options) if options.command == "build" else _info(options)
    except (ValueError, TypeError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"\nerror: {text}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="harness-data",
        usage="harness-data build STORE FILE [FILE ...] [setting=value ...] | harness-data info STORE [--verify]",
        description=__doc__,
        epilog=f"Settings of build:\n\n{(Path(config_folder()) / 'build.yaml').read_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("build", "info"))
    parser.add_argument("arguments", nargs="*", help="store; files, folders of files, and settings as name=value")
    parser.add_argument("--cutoff", type=float, action="append", help="in Å: keep the numbers of edges within it")
    parser.add_argument("--workers", type=int, help="processes; default: one for each processor")
    parser.add_argument("--restart", action="store_true", help="begin an unfinished build anew")
    parser.add_argument("--verify", action="store_true", help="read every byte of the store, and its sources")
    return parser


def _composed(overrides: Sequence[str]) -> DictConfig:
    try:
        with initialize_config_dir(config_folder(), version_base="1.3"):
            return compose("build", list(overrides))
    except HydraException as error:
        text = "\n".join(filter(None, (str(error), str(error.__cause__ or ""))))
        wrong = re.search(r"Could not override '([^'\n]+)'", text)
        if wrong is None:
            raise ValueError(text) from error
        names = list(_names(OmegaConf.to_container(OmegaConf.load(Path(config_folder()) / "build.yaml"))))
        last = wrong[1].rpartition(".")[2]
        meant = did_you_mean(wrong[1], names) or next((f"Did you mean {n}? " for n in names if n.endswith(last)), "")
        raise ValueError(f"there is no setting {wrong[1]}. {meant}`harness-data --help` lists all of them") from error


def _names(content: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in content.items():
        found += [f"{prefix}{key}", *(_names(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return found


def _settings(config: DictConfig) -> BuildSettings:
    data: Any = OmegaConf.to_container(config.data, resolve=True)
    of_labels, of_weights = split_keys(data["keys"])
    extras = Extras.from_config(data["labels"], data["inputs"], data["weights"], data["group_key"], of_weights)
    if not isinstance(data["check_units"], bool):
        raise TypeError(f"data.check_units is true or false, found {data['check_units']!r}")
    return BuildSettings(
        LabelKeys.from_mapping(of_labels),
        extras,
        checked_min_distance(data["min_distance"]),
        data["check_units"],
        tuple(sorted({checked_cutoff(cutoff) for cutoff in config.cutoffs})),
    )


def _build(options: argparse.Namespace) -> None:
    settings = [each for each in options.arguments if _SETTING.fullmatch(each) and not Path(each).exists()]
    paths = [Path(each) for each in options.arguments if each not in settings]
    if len(paths) < 2:
        raise ValueError("the name of the store and the files to build it of are needed: harness-data build STORE FILE")
    config = _composed(settings)
    for name in ("cutoff", "workers"):
        if getattr(options, name) is not None:
            config["cutoffs" if name == "cutoff" else name] = getattr(options, name)
    workers = len(os.sched_getaffinity(0)) if config.workers is None else config.workers
    console = Console(stderr=True)
    begin = time.monotonic()
    files, skipped = found_files(paths[1:])
    size = sum(file.stat().st_size for file in files)
    console.print(
        f"{_counted(len(files), 'file')}, {size / 2**20:.1f} MiB; {_counted(workers, 'process', 'processes')}",
        highlight=False,
    )
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        console.print(f"left out, of no format of ASE: {', '.join(map(str, skipped[:3]))}{more}", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("building", total=None)
        shown = [-1]

        def progress(done: int, total: int, num_frames: int) -> None:
            bar.update(task, completed=done, total=total, description=f"{num_frames} frames")
            tenth = 10 * done // max(total, 1)
            if not console.is_terminal and tenth > shown[0]:
                console.print(f"{done} of {total} parts, {num_frames} frames", highlight=False)
                shown[0] = tenth

        store = build_store(
            paths[0],
            paths[1:],
            _settings(config),
            num_workers=workers,
            restart=options.restart,
            progress=progress,
            tell=lambda text: console.print(text, highlight=False, markup=False),
        )
    seconds = time.monotonic() - begin
    console.print(f"built in {seconds:.1f} s, {1e6 * seconds / len(store):.0f} µs a frame", highlight=False)
    _print(_description(store))
    print(f"next        harness-train data=store data.train={paths[0]}")


def _counted(number: int, one: str, several: str = "") -> str:
    """A number with the word in singular or plural."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def _info(options: argparse.Namespace) -> None:
    if len(options.arguments) != 1:
        raise ValueError(f"one store is needed, found {options.arguments}: harness-data info STORE")
    store = StoredFrames(options.arguments[0])
    _print(_description(store))
    damages = list(store.damages()) if options.verify else []
    changed = changed_sources(store, compare_content=options.verify)
    for text in changed:
        print(f"changed     {text}; the store has the frames of before")
    if damages:
        raise ValueError(
            f"{'; '.join(damages[:3])}{f'; and {len(damages) - 3} more files' if len(damages) > 3 else ''}. Build the "
            f"store anew: harness-data build {options.arguments[0]} FILES..."
        )
    if options.verify:
        print("verified    every byte of the store is what was written")


def _print(lines: Mapping[str, str]) -> None:
    for name, text in lines.items():
        print(f"{name:<11} {text}")


def _description(store: StoredFrames) -> dict[str, str]:
    """Lines on a store by their titles."""
    manifest, settings = store.manifest, store.manifest["settings"]
    atoms = store.column("num_atoms")
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    inputs, labels = settings["extras"]["inputs"], settings["extras"]["labels"]
    counts = store.label_counts()
    found = {
        "store": f"{store.path}, {size / 2**20:.1f} MiB, {size / len(store) / 1024:.2f} KiB a frame",
        "frames": f"{len(store)}, of {atoms.min()} to {atoms.max()} atoms, {store.num_atoms().sum()} in all",
        "elements": ", ".join(sorted(store.symbols())),
        "labels": ", ".join(f"{name} {number}" for name, number in counts.items() if name not in inputs),
    }
    if inputs:
        found["inputs"] = ", ".join(f"{name} {counts.get(name, 0)}" for name in inputs)
    weights = store.weight_names()
    if weights:
        found["weights"] = ", ".join(weights)
    names, codes = store.group_names(), store.column("group")
    if names:
        numbers = np.bincount(codes[codes >= 0], minlength=len(names))
        shown = [f"{name} {number}" for name, number in zip(names, numbers, strict=True)][:_SHOWN]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        found["groups"] = f"{', '.join(shown)}{more} ({settings['extras']['group_key']})"
    isolated = int(store.column("isolated").sum())
    if isolated:
        found["isolated"] = f"{isolated} isolated atoms, references of the energies (data.isolated_atoms)"
    for cutoff in settings["cutoffs"]:
        edges = store.num_edges(cutoff)
        if edges is not None:
            found[f"{cutoff:g} Å"] = f"{edges.min()} to {edges.max()} edges, {edges.sum()} in all"
    distance = settings["min_distance"]
    found["checked"] = f"units {'yes' if settings['check_units'] else 'no'}, distances " + (
        "no" if distance is None else f"of at least {distance:g} Å"
    )
    sources = manifest["sources"]
    shown = [f"{entry['path']} ({entry['bytes']} bytes)" for entry in sources[:3]]
    more = f" and {len(sources) - 3} more files" if len(sources) > 3 else ""
    of_fields = {name: entry["key"] for name, entry in {**labels, **inputs}.items()}
    keys = ", ".join(f"{label}={key}" for label, key in {**settings["keys"], **of_fields}.items())
    found |= {
        "files": f"{', '.join(shown)}{more}",
        "keys": keys,
        "made by": str(manifest["made_by"]),
        "fingerprint": f"sha256 {store.digest}",
    }
    return found


if __name__ == "__main__":
    main()
