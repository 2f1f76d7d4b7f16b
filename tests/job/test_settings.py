"""Settings that nothing reads, and swept ones that change nothing."""

from __future__ import annotations

import warnings

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from support.configs import CONF, composed

from harness.job import prepare
from harness.job.preflight import check_settings
from harness.runs import POINT, SweepPoint


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("max_epoch", "max_epochs"),
        ("epochs", "max_epochs"),
        ("Seed", "seed"),
        ("lr", "optimizer.lr"),
        ("batch_size", "data.batch_size"),
        ("check_val_every_n_epoch", "trainer.check_val_every_n_epoch"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused_if_another_is_meant(key: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} is a setting that nothing reads. Did you mean {meant}\?"):
        check_settings(composed(f"+{key}=3"))


def test_a_note_is_told() -> None:
    with pytest.warns(UserWarning, match="remark is a setting that nothing reads: it changes nothing"):
        check_settings(composed("+remark=first"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("+rate=0.1", "optimizer.lr=${rate}"),
        ("+mine={rate: 0.1}", "optimizer.lr=${mine.rate}"),
        ("+letters=ab", "name=x-${letters}-y"),
        ("+rate=0.1", "optimizer.lr=${oc.select:rate,0.2}"),
        ("+epochs=9", "max_epochs='${harness.part:${epochs},1}'"),
        ("experiment=alloy",),
        ("adaptive=softadapt", "lr_scheduler=none"),
    ],
)
def test_a_setting_that_others_refer_to_is_read(overrides: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_settings(composed(*overrides))


SMALL = (
    "data.num_frames=12",
    "data.split={val: 2, test: 2}",
    "logger=none",
    "dry_step=false",
    "trainer.accelerator=cpu",
)


@pytest.mark.parametrize(
    ("swept", "schedule", "number", "expected"),
    [
        ("loss.coeffs.forces", "linear", 0, "forces_mse"),
        ("loss.coeffs.total_energy", "linear", 0, "per_atom_energy_mse"),
        ("loss.coeffs.forces", "linear", 1, None),  # said once for the sweep
        ("loss.coeffs.forces", "constant", 0, None),
        ("optimizer.lr", "linear", 0, None),
    ],
)
def test_swept_coefficients_that_a_schedule_overwrites_are_told(
    swept: str, schedule: str, number: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (*SMALL, f"{swept}=0.5", f"schedule={schedule}", "output_dir=somewhere")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*own, "hydra.job.num=0", "hydra.job.id=0"], return_hydra_config=True)
    config.hydra.overrides.task = [*own]
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(config)
    typed = tuple(f"{swept}=0.5,0.6" if each.startswith(f"{swept}=") else each for each in own)
    monkeypatch.setenv(POINT, SweepPoint(number, "name", "sweep", ("-m", *typed)).to_json())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare(config)
    told = [str(each.message) for each in caught if "is swept" in str(each.message)]
    assert len(told) == (expected is not None)
    assert all(swept in each and f"coefficient of {expected}" in each for each in told)
