"""Every example runs as a user runs it, in a process of its own, and says what it promises."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(200)

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(command: list[str], folder: Path, seconds: float = 150) -> str:
    """Standard output of a command in ``folder``; a failure shows all it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(EXAMPLES))),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def torchrun(num_ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


def printed(output: str, label: str) -> float:
    """The number behind ``label`` in the line that starts with it."""
    lines = [line for line in output.splitlines() if line.startswith(label)]
    assert len(lines) == 1, f"{label!r} in {len(lines)} lines of\n{output}"
    return float(lines[0].removeprefix(label))


def logged(file: Path) -> dict[str, float]:
    """Last value of every key in a CSV logger's file."""
    values: dict[str, float] = {}
    with file.open() as lines:
        for row in csv.DictReader(lines):
            values |= {key: float(value) for key, value in row.items() if value}
    return values


def test_own_model_learns_forces(tmp_path: Path) -> None:
    output = run([sys.executable, str(EXAMPLES / "own_model.py")], tmp_path)
    assert printed(output, "test forces_rmse") < 0.35 * printed(output, "RMS of the training forces")
    assert printed(output, "test stress_rmse") < 0.02
    assert not list(tmp_path.iterdir()), "the example leaves files behind"


def test_own_data_leaves_missing_labels_out(tmp_path: Path) -> None:
    output = run([sys.executable, str(EXAMPLES / "own_data.py")], tmp_path)
    assert "13 of 40 training frames have no stress" in output
    assert printed(output, "test forces_rmse") < 0.5
    assert printed(output, "test stress_rmse") < 0.02


def test_own_loop_prints_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    script = str(EXAMPLES / "own_loop.py")
    one, two = run([sys.executable, script], tmp_path), run([*torchrun(2), script], tmp_path)
    assert len(one.splitlines()) == 11
    for alone, together in zip(one.splitlines(), two.splitlines(), strict=True):
        for word, other in zip(alone.split(), together.split(), strict=True):
            try:
                assert float(other) == pytest.approx(float(word), rel=1e-9, abs=2e-10)
            except ValueError:
                assert word == other
    losses = [float(line.split("weighted_sum ")[1].split()[0]) for line in one.splitlines() if "step" in line]
    assert losses[-1] < 0.5 * losses[0]


def test_own_config_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.train", "--config-dir", str(EXAMPLES / "own_config"), "experiment=mine"]
    output = run([*command, "loss.metrics.1.coeff=5", "max_epochs=3"], tmp_path)
    assert "forces_rmse" in output
    (folder,) = (tmp_path / "outputs" / "mine").iterdir()
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert (folder / "parity_test0.png").is_file()
    values = logged(folder / "csv" / "metrics.csv")
    assert values["loss_coeff/forces_huber"] == pytest.approx(5 / 115)
    assert values["test0_epoch/energy_r2"] <= 1
    by_type = {name: values[f"train_loss_epoch/forces_huber_{name}"] for name in ("Cu", "Pd", "Ag", "Au")}
    weights = {"Cu": 1, "Pd": 1, "Ag": 2, "Au": 2}
    average = sum(weights[name] * by_type[name] for name in weights) / sum(weights.values())
    assert values["train_loss_epoch/forces_huber"] == pytest.approx(average)
    assert values["train_loss_epoch/weighted_sum"] == pytest.approx(
        sum(
            values[f"loss_coeff/{name}"] * values[f"train_loss_epoch/{name}"]
            for name in ("energy_huber", "forces_huber", "stress_huber")
        )
    )


def test_losses_and_metrics_inside_nequip_train(tmp_path: Path) -> None:
    pytest.importorskip("nequip")
    from harness.data import embedded_alloy_file

    (tmp_path / "alloy.xyz").write_bytes(embedded_alloy_file(24).read_bytes())
    command = [sys.executable, "-c", "from nequip.scripts.train import main; main()"]
    run([*command, "-cp", str(EXAMPLES), "-cn", "in_nequip"], tmp_path)
    values = logged(tmp_path / "csv" / "metrics.csv")
    loss = {key.partition("/")[2]: value for key, value in values.items() if key.startswith("train_loss_epoch/")}
    assert set(loss) == {"per_atom_energy_mse", "stress_mse", "forces_mse", "weighted_sum"} | {
        f"forces_mse_{name}" for name in ("Cu", "Pd", "Ag", "Au")
    }
    mean = (loss["per_atom_energy_mse"] + loss["forces_mse"] + loss["stress_mse"]) / 3
    assert loss["weighted_sum"] == pytest.approx(mean, rel=1e-5)  # the file has six digits
    assert "train_loss_step/forces_mse_Ag" in values
    assert values["val0_epoch/weighted_sum"] == pytest.approx(
        (values["val0_epoch/per_atom_energy_rmse"] + values["val0_epoch/forces_rmse"]) / 2, rel=1e-5
    )
