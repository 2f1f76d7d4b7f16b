"""Averaged weights: parameters are averaged with a warm-up, buffers are copied, and Lightning's checkpoints go on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support import alloy
from support.linear import trainer
from torch import Tensor
from torch.utils.data import DataLoader

import harness
from harness.callbacks import ExponentialMovingAverage
from harness.callbacks.averaged_weights import warmed_up_decay
from harness.data import EmbeddedAlloyDataModule
from harness.support.lightning_private import average_model

NUM_STEPS = 12
TABLE, SHIFT = [1, 6, 8], -1000.123456789


class Weighed(LightningModule):
    """A parameter that is trained, and buffers: a table of integers, a shift in float64, a mean that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        self.exact = torch.nn.Parameter(torch.tensor([1.0 / 3.0], dtype=torch.float64))
        self.kind = torch.nn.Parameter(torch.tensor([7]), requires_grad=False)
        for name, value in {
            "table": torch.tensor(TABLE),
            "used": torch.tensor([True, False]),
            "shift": torch.tensor([SHIFT], dtype=torch.float64),
            "mean": torch.tensor([0.0]),
        }.items():
            self.register_buffer(name, value)
        self.validated: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.mean += 1.0
        return ((self.weight - batch.mean()) ** 2).sum() + (self.exact * batch.mean()).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Steps(Callback):
    """Weights and mean after each optimizer step; a table that is damaged in the checkpoints it loads stays so."""

    def __init__(self) -> None:
        self.weights: list[np.ndarray[Any, Any]] = []
        self.exact: list[float] = []
        self.means: list[float] = []
        self._step = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.weights.append(pl_module.weight.detach().double().numpy().copy())
            self.exact.append(float(pl_module.exact))
            self.means.append(float(pl_module.mean))


def loader(number: int = NUM_STEPS) -> DataLoader[Any]:
    return DataLoader(torch.linspace(-1, 1, number).reshape(-1, 1), batch_size=1)  # type: ignore[arg-type]


def fit(averaging: Callback, *callbacks: Callback, ckpt: Path | None = None, **options: Any) -> tuple[Weighed, Steps]:
    module, steps = Weighed(), Steps()
    running = trainer(
        callbacks=[averaging, steps, *callbacks],
        **{"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": bool(callbacks), **options},
    )
    running.fit(module, loader(), loader(1), ckpt_path=ckpt, weights_only=True)
    return module, steps


def averaged(values: list[Any], decay: float, warm_up: bool) -> Any:
    """The closed form: each step's weights times its share of the average, in float64."""
    decays = [0.0, *(min(decay, (1 + n) / (10 + n)) if warm_up else decay for n in range(1, len(values)))]
    shares = [(1 - each) * np.prod(decays[index + 1 :]) for index, each in enumerate(decays)]
    assert np.isclose(sum(shares), 1)
    return sum(share * value for share, value in zip(shares, values, strict=True))


@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_parameters_are_averaged_as_in_the_closed_form(decay: float, warm_up: bool) -> None:
    module, steps = fit(ExponentialMovingAverage(decay, warm_up=warm_up))
    assert len(steps.weights) == NUM_STEPS
    np.testing.assert_allclose(module.weight.detach(), averaged(steps.weights, decay, warm_up), rtol=1e-5)
    assert float(module.exact) == pytest.approx(averaged(steps.exact, decay, warm_up), rel=1e-13)
    assert module.exact.dtype == torch.float64
    assert (module.kind.dtype, int(module.kind)) == (torch.int64, 7)


def test_the_initial_weights_are_the_first_update_where_they_count() -> None:
    """As in torch_ema: s -= (1 - d) (s - w), with d = min(0.99, (1 + n) / (10 + n)) at step n = 1, 2, ..."""
    module, steps = fit(ExponentialMovingAverage(0.99, include_initial=True))
    shadow = 1.0 / 3.0
    for number, weight in enumerate(steps.exact, 1):
        shadow -= (1 - min(0.99, (1 + number) / (10 + number))) * (shadow - weight)
    assert float(module.exact) == pytest.approx(shadow, rel=1e-14)


def test_the_warm_up_forgets_the_first_weights() -> None:
    """Ten steps leave 0.1 % of the first ones, where a decay of 0.999 leaves 99 %."""
    assert [warmed_up_decay(0.999, n) for n in (0, 1, 8, 90)] == [0.1, 2 / 11, 0.5, 0.91]
    assert warmed_up_decay(0.9, 1000) == 0.9
    assert np.prod([warmed_up_decay(0.999, n) for n in range(1, 11)]) < 1.1e-4
    assert np.prod([0.999] * 10) > 0.99


def test_buffers_are_copied_unless_they_are_named() -> None:
    module, steps = fit(ExponentialMovingAverage(0.9))
    assert module.table.tolist() == TABLE
    assert module.used.tolist() == [True, False]
    assert (module.shift.item(), module.shift.dtype) == (SHIFT, torch.float64)
    assert module.mean.item() == steps.means[-1] == NUM_STEPS
    named, steps = fit(ExponentialMovingAverage(0.9, average_buffers=["me*", "shift"]))
    assert named.mean.item() == pytest.approx(averaged(steps.means, 0.9, True), rel=1e-6)
    assert named.mean.item() < NUM_STEPS - 0.5
    assert named.shift.item() == pytest.approx(SHIFT, rel=1e-15)
    assert named.table.tolist() == TABLE


def test_lightnings_class_damages_a_table_of_integers() -> None:
    """So that the test above is known to see a difference."""
    module, _ = fit(EMAWeightAveraging(decay=0.9))
    assert module.table.tolist() != TABLE


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["tabel"], ["'tabel'", "no buffer", "mean", "shift"]),
        (["table"], ["table", "int64", "whole numbers", "mean, shift"]),
        (["*"], ["'*'", "table"]),
        (["used"], ["bool"]),
    ],
)
def test_other_buffers_are_refused_before_the_training(patterns: list[str], words: list[str]) -> None:
    averaging = ExponentialMovingAverage(average_buffers=patterns)
    with pytest.raises(ValueError, match="average_buffers") as error:
        averaging.check_job(trainer(), Weighed(), "fit")
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(ValueError, match="average_buffers"):
        fit(averaging)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"decay": 1.0}, "decay is at least 0 and below 1"),
        ({"decay": -0.1}, "decay"),
        ({"decay": "slow"}, "decay"),
        ({"warm_up": "no"}, "warm_up"),
        ({"average_buffers": "mean"}, "average_buffers is a list"),
        ({"update_every_n_steps": 0}, "update_every_n_steps"),
        ({"update_starting_at_step": -1}, "update_starting_at_step"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        ExponentialMovingAverage(**arguments)


def test_a_step_of_micro_batches_is_one_update() -> None:
    module, steps = fit(ExponentialMovingAverage(0.9), accumulate_grad_batches=5)
    assert len(steps.weights) == 3
    np.testing.assert_allclose(module.weight.detach(), averaged(steps.weights, 0.9, True), rtol=1e-5)
    assert module.mean.item() == NUM_STEPS


def test_before_the_first_update_the_weights_themselves_are_validated() -> None:
    module, steps = fit(ExponentialMovingAverage(0.9, update_starting_at_step=NUM_STEPS), max_epochs=2)
    np.testing.assert_allclose(module.validated[0], steps.weights[NUM_STEPS - 1])
    np.testing.assert_allclose(module.weight.detach(), averaged(steps.weights[NUM_STEPS:], 0.9, True), rtol=1e-5)
    assert np.abs(module.validated[0].numpy() - [3, -2]).max() > 0.5  # Lightning's are the initial weights


def test_every_n_steps() -> None:
    module, steps = fit(ExponentialMovingAverage(0.9, update_every_n_steps=3))
    np.testing.assert_allclose(module.weight.detach(), averaged(steps.weights[::3], 0.9, True), rtol=1e-5)
    assert module.mean.item() == NUM_STEPS - 2  # of the last update


def saved(folder: Path, averaging: Callback) -> Path:
    """A checkpoint after one epoch of two."""
    fit(averaging, ModelCheckpoint(folder, filename="epoch"), max_epochs=1)
    return folder / "epoch.ckpt"


def test_a_resumed_average_is_bitwise_that_of_one_piece(tmp_path: Path) -> None:
    whole, _ = fit(ExponentialMovingAverage(0.95), max_epochs=2)
    path = saved(tmp_path, ExponentialMovingAverage(0.95))
    resumed, steps = fit(ExponentialMovingAverage(0.95), ckpt=path, max_epochs=2)
    assert len(steps.weights) == NUM_STEPS
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_checkpoint_of_lightnings_class_goes_on(tmp_path: Path) -> None:
    """With its parameters; the table that it has damaged is that of the training again."""
    path = saved(tmp_path, EMAWeightAveraging(decay=0.9))
    damaged = torch.load(path, weights_only=True)
    assert damaged["state_dict"]["table"].tolist() != TABLE
    whole, steps = fit(EMAWeightAveraging(decay=0.9), max_epochs=2)
    averaging = ExponentialMovingAverage(0.9, warm_up=False)
    resumed, _ = fit(averaging, ckpt=path, max_epochs=2)
    np.testing.assert_allclose(resumed.weight.detach(), whole.weight.detach(), rtol=1e-6)
    assert resumed.table.tolist() == TABLE
    assert resumed.mean.item() == steps.means[-1]
    assert average_model(averaging).num_updates == 2 * NUM_STEPS
    unchanged, _ = fit(ExponentialMovingAverage(0.9, update_starting_at_step=10**6), ckpt=path, max_epochs=2)
    assert unchanged.table.tolist() == TABLE


def test_a_checkpoint_without_an_average_goes_on(tmp_path: Path) -> None:
    path = saved(tmp_path, Callback())
    resumed, steps = fit(ExponentialMovingAverage(0.9), ckpt=path, max_epochs=2)
    assert len(steps.weights) == NUM_STEPS
    np.testing.assert_allclose(resumed.weight.detach(), averaged(steps.weights, 0.9, True), rtol=1e-5)


# --- of force fields ---


@pytest.fixture(scope="module")
def data() -> EmbeddedAlloyDataModule:
    module = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, dtype="float64", seed=1
    )
    module.setup()
    return module


def train(data: EmbeddedAlloyDataModule, folder: Path, *callbacks: Callback, **options: Any) -> float:
    """Error of the forces of the last validation, in eV/Å."""
    train_metrics, ckpt = options.pop("train_metrics", None), options.pop("ckpt", None)
    module = alloy.build(data, train_metrics=train_metrics, optimizer=functools.partial(torch.optim.Adam, lr=0.05))
    settings = {"enable_checkpointing": bool(callbacks), **options}
    running = alloy.trainer(folder, callbacks=list(callbacks), **settings)
    running.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return float(running.callback_metrics["val0_epoch/forces_rmse"])


def test_a_short_training_is_not_validated_on_its_first_weights(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    plain = train(data, tmp_path, max_epochs=6)
    warm = train(data, tmp_path, ExponentialMovingAverage(0.999), max_epochs=6)
    cold = train(data, tmp_path, ExponentialMovingAverage(0.999, warm_up=False), max_epochs=6)
    assert warm < plain + 0.25 * (cold - plain)
    assert cold > 1.2 * plain


def test_an_average_goes_on_without_metrics_that_it_was_made_with(
    data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    metrics, saving = {"train_metrics": harness.EnergyForceMetrics}, ModelCheckpoint(tmp_path, filename="one")
    train(data, tmp_path, ExponentialMovingAverage(0.9), saving, max_epochs=1, **metrics)
    two = {"max_epochs": 2, "ckpt": tmp_path / "one.ckpt"}
    other = train(data, tmp_path, ExponentialMovingAverage(0.9), **two)
    assert other == train(data, tmp_path, ExponentialMovingAverage(0.9), **two, **metrics)
