"""One Markdown file of all sections, each measured by a process of its own; see ``benchmarks/gpu.sh``.

A section that fails is in the file with its error, one that needs a missing package with the reason, and the others go
on. Nothing of torch is imported here, so that a broken installation is a line of the file, too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TAIL = 15
"""Lines of the output of a section that failed."""


@dataclass(frozen=True)
class Section:
    """A part of the file: its heading, the seconds that it may take, and the folder of wheels that it needs besides."""

    heading: str
    seconds: int
    wheels: str | None = None


SECTIONS = {
    "machine": Section("Machine", 40),
    "loss": Section("Loss step", 60),
    "training-schnet": Section("Training step: SchNet", 90),
    "training-nequip": Section("Training step: NequIP", 120, "nequip"),
    "training-mace": Section("Training step: MACE", 120, "mace"),
    "precision-schnet": Section("Precision: SchNet", 60),
    "precision-nequip": Section("Precision: NequIP", 60, "nequip"),
    "precision-mace": Section("Precision: MACE", 60, "mace"),
    "ranks": Section("Ranks on one GPU", 60),
    "compiled": Section("Loss step, compiled and as a CUDA graph", 90),
    "tests": Section("GPU tests", 150),
}


def main() -> None:
    """Parse the command line, measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu.md"), help="Markdown file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes, to try it out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--minutes", type=float, default=8.0, help="sections that begin later are left out")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "wheels", help="of `gpu.sh --collect`")
    arguments = parser.parse_args()
    start, end = time.monotonic(), time.monotonic() + 60 * arguments.minutes
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        parts = [f"# GPU report\n\n`benchmarks/gpu.sh --device {arguments.device}` of {time.strftime('%d %B %Y')}\n"]
        for name in [name for name in SECTIONS if name in arguments.only]:
            began = time.monotonic()
            text, is_failed = measured(name, arguments.device, arguments.wheels, Path(folder), end - began)
            failed += [name] if is_failed else []
            parts.append(f"## {SECTIONS[name].heading}\n\n{text.strip()}\n")
            print(f"{name}: {text.strip().splitlines()[0] if is_failed else 'done'}, {time.monotonic() - began:.0f} s")
            # after each, so that a machine that goes away leaves what there was
            arguments.output.write_text("\n".join([*parts, f"Took {time.monotonic() - start:.0f} s.\n"]))
    print(f"written to {arguments.output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


def measured(name: str, device: str, wheels: Path, folder: Path, seconds_left: float) -> tuple[str, bool]:
    """Text of a section, and whether it failed."""
    section = SECTIONS[name]
    seconds = min(seconds_left, section.seconds * (1 if device == "cuda" else 3))
    if seconds_left < 10:
        return "Left out: the time was up (`--minutes`).", True
    path = [str(ROOT)]
    for group in filter(None, (section.wheels, "common")):
        path += unpacked(wheels / group, folder / group, only_missing=group == "common")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "WANDB_MODE": "offline",
        "HARNESS_CACHE": str(folder / "cache"),
        "KINETO_LOG_LEVEL": "99",  # the profiler is talkative
    }
    into = folder / f"{name}.md"
    command = [sys.executable, str(HERE / "section.py"), name, "--device", device, "--into", str(into)]
    log = folder / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"no end after {seconds:.0f} s"
            os.killpg(process.pid, 9)  # its ranks too
            process.wait()
    text = into.read_text() if into.exists() else ""
    if code == 0:
        return text, False
    last = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
    cause = code if isinstance(code, str) else f"exit code {code}"
    return f"Failed: {cause}.\n\n```text\n{last}\n```\n\n{text}", True


def unpacked(wheels: Path, into: Path, only_missing: bool) -> list[str]:
    """Folder with the contents of wheels, made once; none without wheels."""
    if not into.exists():
        for wheel in sorted(wheels.glob("*.whl")):
            if not (only_missing and is_installed(wheel.name.split("-")[0])):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(into)
                for program in into.glob("*/bin/*"):  # zipfile drops the permissions
                    program.chmod(0o755)
    return [str(into)] if into.exists() else []


def is_installed(name: str) -> bool:
    """True if this Python has a distribution of that name."""
    try:
        importlib.metadata.version(re.sub("[-_.]+", "-", name))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
