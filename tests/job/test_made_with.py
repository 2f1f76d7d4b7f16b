"""What a checkpoint was made with is in it, as plain data."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from support.bad_input import BASE, composed, frames
from support.commands import NO_FIGURES
from torch.distributed.fsdp import FSDPModule

import harness
from harness.job import train
from harness.job.made_with import MADE_WITH, NOT_SET, differences, made_with
from harness.module.empty_batches import PredictedRows, skip_empty_batches
from harness.trained.record import packages_of

made_with_module = importlib.import_module("harness.job.made_with")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frames") / "frames.xyz"
    ase.io.write(path, frames(), format="extxyz")
    return path


def settings(file: Path, folder: Path, *more: str) -> list[str]:
    return [*BASE, f"data.train={file}", *NO_FIGURES, f"output_dir={folder}", *more]


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of one epoch; a setting and a label key that look like secrets are among its settings."""
    made = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_TOKEN", "of-a-secret")
        train(composed(settings(file, made, "+data_token=abc", "+note=has-of-a-secret-in-it", "test=false")))
    return made


def test_every_checkpoint_says_what_it_was_made_with(folder: Path, file: Path) -> None:
    record = made_with(folder / "checkpoints" / "last.ckpt")
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert record is not None
    assert best[MADE_WITH] == record
    assert record["settings"]["optimizer.lr"] == 0.005
    assert record["settings"]["model.cutoff"] == 3.5
    assert not [name for name in record["settings"] if name.startswith("logger.")]
    assert record["data"]["cutoff"] == "3.5 Å"
    assert "sha256" in record["data"]["train file 1"]
    assert (record["type_names"], record["cutoff"]) == (["Cu", "Ag"], 3.5)
    assert (record["dtype"], record["precision"]) == ("float32", "32-true")
    assert record["versions"]["harness"] == harness.__version__

    statistics, made = record["statistics"], frames()
    assert statistics["type_names"] == ["Cu", "Ag"]
    assert statistics["num_frames"] == 10
    assert record["energy_shifts"] == dict(zip(["Cu", "Ag"], statistics["energy_shifts"], strict=True))
    fitted = 3 * record["energy_shifts"]["Cu"] + record["energy_shifts"]["Ag"]
    energies = [atoms.get_potential_energy() for atoms in made]
    assert min(energies) <= fitted <= max(energies)
    squares = [np.mean(atoms.get_forces() ** 2) for atoms in made]
    assert min(squares) <= statistics["force_rms"] ** 2 <= max(squares)


def test_secrets_are_not_in_it(folder: Path) -> None:
    checkpoint = (folder / "checkpoints" / "last.ckpt").read_bytes()
    record = made_with(folder / "checkpoints" / "last.ckpt")
    assert record is not None
    assert (record["settings"]["data_token"], record["settings"]["note"]) == ("***", "***")
    assert b"of-a-secret" not in checkpoint


def test_differences_are_those_of_settings_and_not_of_the_run(folder: Path, file: Path, tmp_path: Path) -> None:
    record = made_with(folder / "checkpoints" / "last.ckpt")
    assert record is not None
    same = settings(file, tmp_path, "+data_token=abc", "+note=has-of-a-secret-in-it")
    of_a_run = ["resume=null", "train=false", "ckpt_path=x", "logger=csv", "name=other"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_TOKEN", "of-a-secret")
        assert differences(record, composed([*same, *of_a_run])) == []
        found = differences(record, composed([*same, "optimizer=adamw", "cutoff=4.0", "optimizer.lr=0.1", "~note"]))
    assert {
        ("optimizer._target_", "torch.optim.Adam", "torch.optim.AdamW"),
        ("optimizer.lr", 0.005, 0.1),
        ("cutoff", 3.5, 4.0),
        ("model.cutoff", 3.5, 4.0),
        ("data.cutoff", 3.5, 4.0),
        ("note", "***", NOT_SET),
    } <= set(found)


def test_a_checkpoint_of_0_1_0_has_no_record() -> None:
    assert made_with(Path(__file__).parents[1] / "fixtures" / "checkpoint-0.1.0.ckpt") is None


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("+thing={api_key: TOPSECRET123}", "+thing=***"),
        ("logger.wandb.settings={base: {token: abc}}", "logger.wandb.settings=***"),
        ("+service.password=hidden", "+service.password=***"),
        ("+url=https://me:hidden@host/path", "+url=***"),
        ("data.keys.energy=REF_energy", "data.keys.energy=REF_energy"),
        ("loss.coeffs={forces: 1, total_energy: 10}", "loss.coeffs={forces: 1, total_energy: 10}"),
        ("data.train=[a.xyz,b.xyz]", "data.train=[a.xyz,b.xyz]"),
        ("~schedule", "~schedule"),
        ("max_epochs=4", "max_epochs=4"),
    ],
)
def test_secrets_of_the_command_are_masked_at_any_depth(
    override: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = type("Typed", (), {"overrides": (override,)})
    monkeypatch.setattr(made_with_module, "command", lambda: typed)
    monkeypatch.setattr(made_with_module.HydraConfig, "initialized", staticmethod(lambda: True))
    assert made_with_module._command() == [kept]


def test_the_package_of_a_model_is_found_behind_a_class_of_a_strategy() -> None:
    """FSDP2 and the skipping of empty batches put a class of their own in front of a model's."""
    kind = type("Own", (torch.nn.Module,), {"__module__": "omegaconf.own"})  # of a package that is installed
    expected = {"omegaconf": importlib.metadata.version("omegaconf")}
    assert packages_of(kind()) == expected
    skipping = kind()
    skip_empty_batches(skipping, PredictedRows([]))
    assert type(skipping) is not kind
    assert type(skipping).__module__ == "omegaconf.own"
    assert packages_of(skipping) == expected
    split = kind()
    split.__class__ = type("FSDPOwn", (FSDPModule, kind), {})
    split.__class__.__module__ = "torch.distributed.fsdp"
    assert packages_of(split) == expected
