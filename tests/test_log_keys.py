"""Keys of logged values, against the texts that users have in their W&B runs, configurations and scripts."""

from __future__ import annotations

import pytest

from harness.module import LogKeys
from harness.support.log_keys import TRAIN, TRAIN_LOSS, TRAIN_METRIC, is_of_evaluation, stage_of_set


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (LogKeys(TRAIN_LOSS, "step"), "train_loss_step/x"),
        (LogKeys(TRAIN_LOSS), "train_loss_epoch/x"),
        (LogKeys(TRAIN_METRIC, "step"), "train_metric_step/x"),
        (LogKeys(TRAIN_METRIC), "train_metric_epoch/x"),
        (LogKeys(stage_of_set("val", 0)), "val0_epoch/x"),
        (LogKeys(stage_of_set("test", 12)), "test12_epoch/x"),
        (LogKeys(TRAIN_LOSS, "step", "coefficient"), "loss_coeff_step/x"),
        (LogKeys(TRAIN_LOSS, section="coefficient"), "loss_coeff/x"),
        (LogKeys("val1", section="coefficient"), "val1_coeff/x"),
        (LogKeys(TRAIN_LOSS, "step", "contribution"), "loss_contribution_step/x"),
        (LogKeys(TRAIN_LOSS, section="contribution"), "loss_contribution_epoch/x"),
        (LogKeys("test0", section="contribution"), "test0_contribution/x"),
        (LogKeys(TRAIN, section="report"), "train_report/x"),
        (LogKeys("val0", section="report"), "val0_report/x"),
    ],
)
def test_texts(keys: LogKeys, text: str) -> None:
    assert keys.key("x") == text
    assert keys.prefix == text.removesuffix("x")
    assert keys.keys(["x", "y"]) == [text, f"{keys.prefix}y"]
    assert keys.row({"x": 0.5}) == {text: 0.5}


@pytest.mark.parametrize("stage", [TRAIN_LOSS, TRAIN_METRIC, "val0", "test3"])
def test_a_key_of_an_error_is_taken_apart(stage: str) -> None:
    assert LogKeys.of_error(LogKeys(stage).key("forces_mae_H")) == (LogKeys(stage), "forces_mae_H")


@pytest.mark.parametrize(
    "key", ["lr-Adam", "loss_coeff/x", "loss_contribution_epoch/x", "val0_contribution/x", "epoch"]
)
def test_other_keys_are_none_of_an_error(key: str) -> None:
    assert LogKeys.of_error(key) is None


def test_the_name_in_a_key() -> None:
    keys = LogKeys("test0")
    assert keys.name_in("test0_epoch/forces_mae_a_b") == "forces_mae_a_b"
    assert keys.name_in("test01_epoch/forces_mae") is None
    assert keys.name_in("test0_contribution/forces_mae") is None
    assert [is_of_evaluation(key) for key in ("val0_epoch/a", "test1_contribution/a", "train_loss_epoch/a")] == [
        1,
        1,
        0,
    ]
