"""Numbers in three places, the data, the trainer and the model: what one of them rounds is told once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
from support.bad_input import BASE, composed, frames
from torch import nn

from harness.job import execute, prepare, train
from harness.job.dtypes import parameter_dtypes, roundings
from harness.models import schnet_force_field

F32, F64, BF16 = "float32", "float64", "bfloat16"
BY_DATA, BY_MODEL = "data.dtype=float32 rounds positions", "the model is in float32"
WEIGHTS, LEFT = "rounds each step of the optimizer", "leaves layers with float64"
# data, precision, parameters: what is told
TABLE: dict[tuple[str, str, tuple[str, ...]], tuple[str, ...]] = {
    (F32, "32-true", (F32,)): (),
    (F64, "64-true", (F64,)): (),
    (F64, "64-true", (F32,)): (),
    (F32, "64-true", (F32,)): (BY_DATA,),
    (F32, "64-true", (F64,)): (BY_DATA,),
    (F64, "32-true", (F32,)): (BY_MODEL,),
    (F64, "32-true", (F64,)): (),
    (F32, "32-true", (F64,)): (BY_DATA,),
    (F64, "32-true", (F32, F64)): (),
    (F32, "bf16-mixed", (F32,)): (),
    (F64, "bf16-mixed", (F32,)): (BY_MODEL,),
    (F64, "16-mixed", (F32,)): (BY_MODEL,),
    (F64, "bf16-mixed", (F64,)): (LEFT,),
    (F32, "32-true", (BF16,)): (WEIGHTS,),
    (F32, "bf16-mixed", (BF16, F32)): (WEIGHTS,),
    (F32, "32-true", ()): (),
}


@pytest.mark.parametrize(("places", "told"), TABLE.items(), ids=str)
def test_what_is_told(places: tuple[str, str, tuple[str, ...]], told: tuple[str, ...]) -> None:
    data, precision, parameters = places
    found = roundings(getattr(torch, data), precision, list(parameters))
    assert len(found) == len(told), found
    assert all(words in sentence for words, sentence in zip(told, found, strict=True))


def test_dtypes_of_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2).double()})
    assert parameter_dtypes(model) == [F32, F64]
    model.register_parameter("table", nn.Parameter(torch.tensor([1, 6, 8]), requires_grad=False))
    assert parameter_dtypes(model) == [F32, F64]
    assert roundings(None, "64-true", [F32]) == []


def double_force_field(statistics: Any, **options: Any) -> nn.Module:
    return schnet_force_field(statistics, **options).double()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("dtypes")
    ase.io.write(path / "frames.xyz", frames(), format="extxyz")
    quiet = ["callbacks=none", "trainer.enable_progress_bar=false", "test=false", "dry_step=false"]
    return [*BASE, *quiet, f"data.train={path}/frames.xyz", f"output_dir={path}/run"]


@pytest.mark.parametrize(
    ("overrides", "told", "dtype"),
    [
        ((), (), torch.float32),
        (("trainer.precision=64-true",), (BY_DATA,), torch.float64),
        (("trainer.precision=64-true", "data.dtype=float64"), (), torch.float64),
        (("data.dtype=float64",), (BY_MODEL,), torch.float32),
        (("data.dtype=float64", "model._target_=test_dtypes.double_force_field"), (), torch.float64),
        (("trainer.precision=bf16-mixed",), (), torch.float32),
    ],
    ids=str,
)
def test_it_is_told_once_before_the_training_and_true(
    overrides: tuple[str, ...],
    told: tuple[str, ...],
    dtype: torch.dtype,
    base: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the trainer makes of the parameters is what the sentence says."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job = prepare(composed([*base, *overrides]))
        before = [str(each.message) for each in caught]
        execute(job)
    words = (BY_DATA, BY_MODEL, WEIGHTS, LEFT)
    assert [each for each in before if any(word in each for word in words)] == [
        each for each in (str(each.message) for each in caught) if any(word in each for word in words)
    ]
    found = [each for each in before if any(word in each for word in words)]
    assert len(found) == len(told)
    assert all(word in each for word, each in zip(told, found, strict=True))
    assert {parameter.dtype for parameter in job.module.model.parameters()} == {dtype}


def test_weights_of_a_checkpoint_that_are_rounded_are_told(base: list[str], tmp_path: Path) -> None:
    double = ["trainer.precision=64-true", "data.dtype=float64", "callbacks=default", "callbacks.parity=null"]
    train(composed([*base, *double, f"output_dir={tmp_path}/double"]))
    again = [*base, "train=false", "test=true", f"ckpt_path={tmp_path}/double/checkpoints/best.ckpt"]
    with pytest.warns(UserWarning, match=r"\d+ weights of the checkpoint are in float64 and rounded to float32 here"):
        job = prepare(composed(again))
    assert "differs from the checkpoint: trainer.precision: 64-true → 32-true" in job.notes
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rounded to float32.*")
        prepare(composed([*again, *double]))
