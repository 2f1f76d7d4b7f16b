"""One section of the GPU report: ``python benchmarks/gpu/section.py NAME --device cuda --into FILE``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch

PACKAGES = ("torch", "lightning", "torchmetrics", "torch_geometric", "e3nn", "nequip", "mace-torch", "ase", "numpy")


def machine(device: torch.device) -> str:
    """Names and versions."""
    rows = [("Python", platform.python_version()), ("processor", f"{_processor()}, {torch.get_num_threads()} threads")]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        rows += [
            ("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"),
            ("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"),
            ("NCCL", ".".join(map(str, torch.cuda.nccl.version()))),
        ]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not there"))
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    rows.append(("commit", done.stdout.strip() or "unknown"))
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def tests(device: torch.device) -> str:
    """The last lines of ``pytest -m gpu``."""
    if device.type != "cuda":
        return "Skipped: `pytest -m gpu` is for GPUs; the twins of these tests on the CPU are in `make test`."
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-p", "no:cacheprovider", "--tb=short"]
    with tempfile.TemporaryFile("w+") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        output.seek(0)
        lines = output.read().splitlines()
    text = f"`pytest -m gpu tests/gpu`, exit code {code}:\n\n```text\n" + "\n".join(lines[-80:]) + "\n```"
    if code:
        raise RuntimeError(text)
    return text


def text_of(name: str, device: torch.device) -> str:
    """Markdown of a section."""
    part, _, model = name.partition("-")
    match part:
        case "machine":
            return machine(device)
        case "tests":
            return tests(device)
        case "loss":
            import loss

            return loss.steps(device)
        case "compiled":
            import loss

            return loss.compiled(device)
        case "training":
            import training

            return training.table(model, device)
        case "precision":
            import rounding

            return rounding.table(model, device)
        case "ranks":
            import ranks

            return ranks.tables(device)
    raise ValueError(f"no section {name!r}")


def main() -> None:
    """Measure one section; a missing package is a reason and no failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--into", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch.cuda.is_available() is False: is this torch built with CUDA, and is there a GPU?")
        text = text_of(arguments.name, torch.device(arguments.device, 0 if arguments.device == "cuda" else None))
    except ModuleNotFoundError as error:
        text = f"Skipped: {error}"
    except Exception as error:
        lines = "".join(traceback.format_exception(error)).splitlines()
        arguments.into.write_text("```text\n" + "\n".join(lines[-40:]) + "\n```\n")
        print(f"{type(error).__name__}: {error}")
        sys.exit(1)
    arguments.into.write_text(text)


if __name__ == "__main__":
    main()
