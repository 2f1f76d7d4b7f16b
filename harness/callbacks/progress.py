"""A progress bar with the weighted sum and the components that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from harness.support.text import did_you_mean

__all__ = ["LossProgressBar"]


class LossProgressBar(TQDMProgressBar):
    """Lightning's progress bar with values of the loss.

    The values are those of the last logged step, since reading others would make the host wait for the device.

    Args:
        components: names of components or per-type values to show, or one name; unknown names are errors when training
            starts.
        monitor: key of an epoch value to show beside them, such as ``val0_epoch/weighted_sum``.
        refresh_rate: steps between redraws.

    Raises:
        TypeError: ``components`` is no list of names.
    """

    def __init__(
        self, components: Sequence[str] | str = ("weighted_sum",), monitor: str | None = None, refresh_rate: int = 1
    ) -> None:
        super().__init__(refresh_rate=refresh_rate)
        if not isinstance(components, Sequence):
            raise TypeError(f"components is a list of names, such as [weighted_sum], found {components!r}.")
        self.components = (components,) if isinstance(components, str) else tuple(components)
        self.monitor = monitor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the names."""
        super().setup(trainer, pl_module, stage)
        self.check_job(trainer, pl_module, stage)

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse names of values that the loss does not have.

        Raises:
            ValueError: with the valid names.
        """
        valid: list[str] = cast(Any, pl_module).loss.value_names
        for name in self.components:
            if name not in valid:
                raise ValueError(
                    f"The progress bar cannot show {name!r}. {did_you_mean(str(name), valid)}Values of the loss: "
                    f"{', '.join(valid)}."
                )

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Values behind the bar."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        latest: dict[str, float] = cast(Any, pl_module).step_log.latest
        items |= {name: f"{latest[name]:.4g}" for name in self.components if name in latest}
        if self.monitor in trainer.callback_metrics:
            items[self.monitor] = f"{float(trainer.callback_metrics[self.monitor]):.4g}"
        return items
