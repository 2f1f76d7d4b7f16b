"""Trainings whose loss takes its coefficients as given, beside those in which they are normalised."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from support.configs import composed
from support.linear import Linear, batches, plain, trainer

import harness
from harness.adaptive import GradientBalance, SoftAdapt, UncertaintyWeighting
from harness.callbacks import CoefficientCurve, LinearLossCoefficientScheduler, LossCoefficientScheduler
from harness.data import look_ahead
from harness.job.preflight import check_controllers
from harness.module import ForceFieldModule
from harness.preview import main
from harness.schedules import PiecewiseConstant

NAMES = ("per_atom_energy_mse", "forces_mse", "stress_mse")
GIVEN = np.array([2.0, 40.0, 3.0])
MASKED = {"total_energy": True, "forces": True, "stress": True}
MICRO = [[0, 1], [2], [3, 4], [5, 6], [7]]
KINDS = ("normalised", "as_given")


class Seen(Callback):
    """Coefficients and weighted sum of every step."""

    def __init__(self) -> None:
        self.coeffs: list[list[float]] = []
        self.sums: list[float] = []

    def on_train_values(self, trainer: Any, pl_module: Any, step: Any) -> None:
        if step.is_whole:
            report = step.values.to_report()
            assert sum(report.contributions.values()) == pytest.approx(report.values["weighted_sum"], rel=1e-12)
            self.coeffs.append([report.coeffs[name] for name in NAMES])
            self.sums.append(report.values["weighted_sum"])


def run(
    kind: Any,
    folder: Path,
    callbacks: list[Callback] | None = None,
    weighting: Any = None,
    schedule: Any = None,
    k: int = 1,
    optimizer: Any = None,
) -> tuple[ForceFieldModule, Seen]:
    seen = Seen()
    coeffs = dict(zip(("total_energy", "forces", "stress"), GIVEN.tolist(), strict=True))
    loss = functools.partial(
        harness.EnergyForceStressLoss, coeffs, ignore_nan=MASKED, schedule=schedule, coefficients=kind
    )
    # without an epsilon the scale of a gradient is no matter to Adam
    adam = functools.partial(torch.optim.Adam, lr=0.02, eps=1e-300)
    module = ForceFieldModule(Linear(), loss, optimizer=optimizer or adam, weighting=weighting, type_names=["H"])
    loaded = batches(MICRO)
    loader = look_ahead(loaded, k) if k > 1 else plain(MICRO)
    running = trainer(
        callbacks=[*(callbacks or []), seen], max_epochs=4, default_root_dir=folder, accumulate_grad_batches=k
    )
    running.fit(module.double(), loader)
    return module, seen


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "constant": dict,
    "accumulated": lambda: {"k": 2},
    "stages": lambda: {"schedule": PiecewiseConstant({0: {"forces_mse": 40}, 2: {"forces_mse": 1}})},
    "nequip": lambda: {"callbacks": [LossCoefficientScheduler({2: {"forces_mse": 1}})]},
    "softadapt": lambda: {"callbacks": [SoftAdapt(1.1, "batch", 2)]},
    "softadapt by epoch": lambda: {"callbacks": [SoftAdapt(1.1, "epoch", 1)]},
    "gradient balance": lambda: {"callbacks": [GradientBalance(every_n_steps=3, rate=0.5, limit=50)]},
    "uncertainty": lambda: {"weighting": UncertaintyWeighting(speed=20)},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_ratios_are_those_of_a_normalised_loss_and_the_sum_is_that_given(way: str, tmp_path: Path) -> None:
    (normalised, before), (module, now) = (run(kind, tmp_path, **WAYS[way]()) for kind in KINDS)
    totals = np.full(len(now.sums), GIVEN.sum())
    if way in ("stages", "nequip"):
        totals[2 * len(MICRO) :] = 6
    np.testing.assert_allclose(now.coeffs, np.array(before.coeffs) * totals[:, None], rtol=1e-9)
    np.testing.assert_allclose(np.sum(now.coeffs, 1), totals, rtol=1e-12)
    if way not in ("stages", "nequip"):  # a jump of the scale meets Adam's moments there
        np.testing.assert_allclose(now.sums, np.array(before.sums) * totals, rtol=1e-9)
        torch.testing.assert_close(module.model.theta, normalised.model.theta, rtol=1e-8, atol=1e-10)
    if way not in ("constant", "accumulated"):
        assert now.coeffs[-1] != now.coeffs[0]


def test_a_jump_of_the_sum_reaches_the_optimizer(tmp_path: Path) -> None:
    """As published recipes have it: the second stage of 1 : 0 : 0 has the gradient of the plain energy term."""
    schedule = PiecewiseConstant({0: {"forces_mse": 40}, 2: {"forces_mse": 0, "stress_mse": 0}})
    optimizer = functools.partial(torch.optim.SGD, lr=1e-4)
    moved = [run(kind, tmp_path, schedule=schedule, optimizer=optimizer)[0].model.theta for kind in KINDS]
    model, manager = Linear(), harness.EnergyForceStressLoss(ignore_nan=MASKED, coefficients="as_given")
    for epoch in range(4):
        manager.set_coeffs(dict(zip(NAMES, (2, 40, 3) if epoch < 2 else (2, 0, 0), strict=True)))
        for batch in batches(MICRO):
            model.zero_grad()
            manager(model(batch), batch)["weighted_sum"].backward()
            with torch.no_grad():
                model.theta -= 1e-4 * model.theta.grad
    torch.testing.assert_close(moved[1], model.theta, rtol=1e-12, atol=1e-14)
    assert float((moved[0] - moved[1]).abs().max()) > 1e-4


def test_a_ramp_of_nequips_callback_is_one_of_the_given_numbers(tmp_path: Path) -> None:
    ramp = LinearLossCoefficientScheduler({"forces_mse": 10, "stress_mse": 5}, transition_epochs=2, start_epoch=1)
    curve = CoefficientCurve(tmp_path)
    module, seen = run("as_given", tmp_path, [ramp, curve])
    by_epoch = np.array(seen.coeffs)[:: len(MICRO)]
    np.testing.assert_allclose(by_epoch, [[2, 40, 3], [2, 40, 3], [2, 25, 4], [2, 10, 5]], rtol=1e-12)
    assert module.reports["train_loss"].coeffs == pytest.approx(dict(zip(NAMES, (2, 10, 5), strict=True)))
    assert (tmp_path / "coefficients.png").is_file()


def test_nequips_own_callbacks_that_normalise_are_refused() -> None:
    soft_adapt = type("SoftAdapt", (Callback,), {"__module__": "nequip.train.callbacks.softadapt"})()
    for kind in KINDS:
        module = ForceFieldModule(Linear(), functools.partial(harness.EnergyForceLoss, coefficients=kind))
        if kind == "normalised":
            check_controllers(module, [soft_adapt])
        else:
            with pytest.raises(ValueError, match=r"loss\.coefficients=as_given.*NequIP's SoftAdapt"):
                check_controllers(module, [soft_adapt])


def test_a_config_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for loss in ("energy", "energy_force", "energy_force_stress"):
        assert composed(f"loss={loss}").loss.coefficients == "normalised"
    overrides = ["schedule=linear", "max_epochs=3", "loss.coefficients=as_given", "data.type_names=[H]"]
    main([*overrides, "--output", str(tmp_path / "curve.png")])
    told = capsys.readouterr().out
    assert told.startswith("Linear: coefficients as given")
    rows = [re.findall(r"[\d.]+", line) for line in told.splitlines() if line.startswith("│")]
    assert [list(map(float, row)) for row in rows] == [[0, 1, 10], [1, 1, 7], [2, 1, 4]]
