"""One name for the numbers of a training: what follows from it, what may be given beside it, and what is told."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support.configs import composed

from harness.config.precision import PRECISIONS, places
from harness.job import prepare

# precision: data.dtype, trainer.precision, model.dtype
TABLE = {
    "float32": ("float32", "32-true", "float32"),
    "float64": ("float64", "64-true", "float64"),
    "bf16-mixed": ("float32", "bf16-mixed", "float32"),
    "float32-on-float64": ("float64", "32-true", "float32"),
}
# settings beside a precision: what there is then
GIVEN = {
    (): ("float32", "32-true", "float32"),
    ("trainer.precision=64-true", "data.dtype=float64"): ("float64", "64-true", "float64"),
    ("trainer.precision=64-true",): ("float32", "64-true", "float64"),
    ("data.dtype=float64",): ("float64", "32-true", "float32"),
    ("precision=float64", "data.dtype=float32"): ("float32", "64-true", "float64"),
    ("precision=float64", "model.dtype=float32"): ("float64", "64-true", "float32"),
    ("precision=float64", "trainer.precision=32-true"): ("float64", "32-true", "float32"),
}
CASES = {(f"precision={name}",): expected for name, expected in TABLE.items()} | GIVEN


@pytest.mark.parametrize(("overrides", "expected"), CASES.items(), ids=str)
def test_what_follows(overrides: tuple[str, ...], expected: tuple[str, ...]) -> None:
    config = composed("data=file", "model=nequip", *overrides)
    assert (config.data.dtype, config.trainer.precision, config.model.dtype) == expected


@pytest.mark.parametrize("model", ["mace", "allegro", "sevennet"])
def test_every_model_follows(model: str) -> None:
    config = composed(f"model={model}", "precision=float64")
    assert (config.data.dtype, config.trainer.precision, config.model.dtype) == TABLE["float64"]


def test_the_table_is_that_of_the_package() -> None:
    assert {name: (each.data, each.trainer, each.weights) for name, each in PRECISIONS.items()} == TABLE


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("64", r"Did you mean float64\?"),
        ("64-true", r"Did you mean float64\?"),
        ("flaot64", r"Did you mean float64\?"),
        ("16-mixed", "float32, float64, bf16-mixed, float32-on-float64, found '16-mixed'.*trainer.precision"),
    ],
)
def test_another_name_is_answered_with_the_valid_ones(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        places(name)
    with pytest.raises(ValueError, match=words):
        prepare(composed(f"precision={name}"))


def test_sections_without_a_top_level_have_the_default() -> None:
    section = composed().data
    assert OmegaConf.create(
        {"data": OmegaConf.to_container(section, resolve=False), "cutoff": 4, "seed": 0}
    ).data.dtype == ("float32")


TINY = ("data.num_frames=12", "data.split={val: 2, test: 2}", "data.batch_size=2", "logger=none", "callbacks=none")
SMALL = ("model.hidden_channels=4", "model.num_filters=4", "model.num_interactions=1", "model.num_gaussians=4")
OTHERS = ("precision=", "data.dtype=", "trainer.precision=")


def started(folder: Path, *overrides: str) -> tuple[Any, list[str]]:
    """A job that is ready to train, and what it has warned of numbers."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    config = composed(*overrides, *TINY, *SMALL, "trainer.accelerator=cpu")
    config.output_dir = str(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job = prepare(config)
    return job, [text for text in (str(each.message) for each in caught) if any(word in text for word in OTHERS)]


@pytest.mark.parametrize("name", TABLE)
def test_every_precision_starts_without_a_word(name: str, tmp_path: Path) -> None:
    job, told = started(tmp_path, f"precision={name}")
    assert told == []
    data, trainer, _ = TABLE[name]
    assert job.datamodule.dtype == getattr(torch, data)
    assert job.trainer.precision == trainer
    # the trainer converts the weights when it starts
    assert {weight.dtype for weight in job.module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("precision=float64", "data.dtype=float32"), "stands for data.dtype=float64, trainer.precision=64-true, but "),
        (("precision=float64", "trainer.precision=32-true"), "but trainer.precision=32-true was given, and counts"),
        (("precision=bf16-mixed", "trainer.precision=32-true"), "but trainer.precision=32-true was given"),
        (("precision=float32-on-float64", "data.dtype=float32"), "but data.dtype=float32 was given"),
        (("precision=bf16-mixed", "trainer.precision=bf16-mixed"), None),
        (("precision=float64", "trainer.precision=64-true"), None),
        (("trainer.precision=64-true", "data.dtype=float64"), None),
    ],
)
def test_a_disagreement_is_told_before_training(overrides: tuple[str, ...], words: str | None, tmp_path: Path) -> None:
    told = [text for text in started(tmp_path, *overrides, "dry_step=false")[1] if "stands for" in text]
    assert len(told) == (words is not None)
    assert all(str(words) in text for text in told)
