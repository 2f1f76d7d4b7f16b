"""The start of a command: what is imported before anything happens, and that what is put off works once it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ROOT

from harness.support.deferred import DEFERRED

HEAVY = (
    "torch",
    "lightning",
    "torchmetrics",
    "torch_geometric",
    "ase",
    "scipy",
    "matplotlib",
    "wandb",
    "numpy",
    "sympy",
)

# all that a training imports, and a step of its optimizer
TRAINING = """
import gc, sys
from harness.support.deferred import DEFERRED, defer, is_deferred
defer()
import harness.job.run, harness.callbacks, harness.loggers.wandb_logger, harness.models.schnet, harness.presets
import torch
from torch import nn
model = nn.Linear(2, 1)
optimizer = torch.optim.Adam(model.parameters())
optimizer.zero_grad()
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
"""


def _prints(program: str, folder: Path) -> list[str]:
    """Lines that a program in a process of its own prints last."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("option", [["--help"], ["--cfg", "job", "max_epochs=3"]], ids=["help", "cfg"])
def test_a_command_that_only_prints_imports_no_torch(option: list[str], tmp_path: Path) -> None:
    program = (
        f"import sys\nsys.argv = ['harness-train', *{option}]\nfrom harness.train import main\n"
        f"try:\n    main()\nexcept SystemExit as error:\n    assert not error.code, error.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    lines = _prints(program, tmp_path)
    assert lines[-1] == "[]"
    assert ("max_epochs: 3" in lines) is (option[0] == "--cfg")
    assert len(lines) > 20


def test_a_mistake_on_the_command_line_is_told_without_torch(tmp_path: Path) -> None:
    """By one process, which asks no other."""
    program = (
        "import sys\nsys.argv = ['harness-train', 'loss.coeffs.force=1']\nfrom harness.train import main\n"
        "sys.stderr = sys.stdout\ntry:\n    main()\nexcept SystemExit as error:\n    print(error.code)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    lines = _prints(program, tmp_path)
    assert lines[-2:] == ["1", "[]"]
    assert any(line.startswith("error: loss.coeffs has no force") for line in lines)


def test_a_training_executes_none_of_what_is_put_off(tmp_path: Path) -> None:
    program = TRAINING + (
        "print([name for name in DEFERRED if name in sys.modules and not is_deferred(sys.modules[name])])\n"
        "print([name for name in DEFERRED if name not in sys.modules])\n"
        "print([name for name in ('matplotlib', 'wandb', 'torch._inductor', 'deepspeed') if name in sys.modules])"
    )
    executed, unknown, loaded = _prints(program, tmp_path)
    assert executed == "[]"
    assert set(eval(unknown)) <= {"scipy.spatial"}  # else an entry is of no use any more
    assert loaded == "[]"


@pytest.mark.parametrize("command", ["evaluate", "export", "preview"])
def test_other_commands_execute_none_of_what_is_put_off(command: str, tmp_path: Path) -> None:
    program = (
        f"import sys\nsys.argv = ['harness-{command}', '--help']\nfrom harness.{command} import main\n"
        f"try:\n    main()\nexcept SystemExit as error:\n    assert not error.code, error.code\n"
        f"import harness.{command}.command\n"
        "from harness.support.deferred import DEFERRED, is_deferred\n"
        "print([name for name in DEFERRED if name in sys.modules and not is_deferred(sys.modules[name])])\n"
        "print('torch' in sys.modules)"
    )
    assert _prints(program, tmp_path)[-2:] == ["[]", "True"]


USES = {
    "torch._dynamo": """
from lightning.fabric import wrappers
print(isinstance(model, wrappers.OptimizedModule), is_deferred(sys.modules[NAME]))
compiled = torch.compile(model, backend="eager")
print(isinstance(compiled, wrappers.OptimizedModule), is_deferred(sys.modules[NAME]))
optimizer.zero_grad()
compiled(torch.ones(1, 2)).sum().backward()
before = model.weight.detach().clone()
optimizer.step()
print(not torch.equal(before, model.weight))
from torch._dynamo.utils import counters
print(counters["stats"]["unique_graphs"] >= 1, counters is sys.modules["torch._dynamo.utils"].counters)
""",
    "scipy.signal": """
import numpy, scipy.signal
print(is_deferred(scipy.signal))
print(numpy.allclose(scipy.signal.hamming(5), scipy.signal.windows.hamming(5)))
print(scipy.signal.hamming is scipy.signal.windows.hamming)
from scipy.signal.windows import hann
print(hann is scipy.signal.windows.hann)
""",
    "torchmetrics.utilities.plot": """
import matplotlib, torchmetrics
matplotlib.use("agg")
metric = torchmetrics.MeanMetric()
metric.update(1.0)
figure, axes = metric.plot()
from torchmetrics.utilities import plot
print(isinstance(axes, plot._AX_TYPE), plot._AX_TYPE is type(axes))
collection = torchmetrics.MetricCollection([metric])
print(type(collection.plot(together=True)[1]) is type(axes))
""",
    "torch_geometric.datasets": """
import torch_geometric
print(torch_geometric.datasets.FakeDataset(num_graphs=2)[0].num_nodes > 0)
""",
    "ase": """
import numpy
from ase.build import bulk
from ase.neighborlist import neighbor_list, primitive_neighbor_list
from ase.dft.dos import DOS
print(len(neighbor_list("i", bulk("Cu"), 3.0)))
from ase import neighborlist
tree = neighborlist.cKDTree(numpy.zeros((1, 3)))
print(isinstance(tree, neighborlist.cKDTree), type(tree) is sys.modules["scipy.spatial"].cKDTree)
from ase import dft
print(float(dft.trapezoid([1.0, 1.0])))
""",
}
EXPECTED = {
    "torch._dynamo": ["False True", "True False", "True", "True True"],
    "scipy.signal": ["True", "True", "True", "True"],
    "torchmetrics.utilities.plot": ["True True", "True"],
    "torch_geometric.datasets": ["True"],
    "ase": ["12", "True True", "1.0"],
}


@pytest.mark.slow
def test_what_is_put_off_works_when_it_is_used(tmp_path: Path) -> None:
    uses = "".join(f"print({name!r})\n{use.replace('NAME', repr(name))}" for name, use in USES.items())
    lines = _prints(TRAINING + uses, tmp_path)
    assert lines == [line for name, expected in EXPECTED.items() for line in (name, *expected)]


def test_what_is_put_off_has_uses_here() -> None:
    assert {*DEFERRED} - {*USES} == {"scipy.integrate", "scipy.spatial"}  # of ASE's


def test_a_program_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    program = (
        "import sys\nbefore = [*sys.meta_path]\nimport harness\nharness.MetricsManager\nprint(sys.meta_path == before)"
    )
    assert _prints(program, tmp_path) == ["True"]
