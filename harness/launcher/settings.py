"""Settings of ``hydra/launcher=torchrun``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from harness.support.checks import is_whole_number, whole_number

__all__ = ["Settings", "SettingsError"]


class SettingsError(CompactHydraException, ValueError):
    """A setting of ``hydra.launcher`` is wrong; Hydra shows the message without a traceback."""


@dataclass(frozen=True)
class Settings:
    """Settings of ``conf/hydra/launcher/torchrun.yaml``.

    Args:
        nproc_per_node: ranks of a point on each node; ``auto`` for one for each GPU, or one without GPUs.
        parallel: points side by side; ``auto`` for as many as there are GPUs, or cores without GPUs, for their ranks.
        fail_fast: whether a point that fails ends the sweep.
        omp_num_threads: threads of a rank; None for ``OMP_NUM_THREADS``, or the cores divided by the ranks on them.
        max_restarts: how often the ranks of a point are started again after one has failed.
        nnodes: nodes of a point, or ``MIN:MAX``.
        node_rank: of this node, with a fixed number of them.
        local_addr: address of this node that the others can reach.
        rdzv_backend: ``static`` or ``c10d``; None for the first with a fixed number of nodes.
        rdzv_endpoint: ``HOST:PORT`` of node 0; None for a free port, on one node.
        rdzv_id: with the number of the point, what its nodes meet by.
        rdzv_conf: further options of the rendezvous.

    Raises:
        SettingsError: a setting is not of its kind, or several nodes are asked for without an address to meet at.
    """

    nproc_per_node: int | str = "auto"
    parallel: int | str = 1
    fail_fast: bool = False
    omp_num_threads: int | None = None
    max_restarts: int = 0
    nnodes: int | str = 1
    node_rank: int = 0
    local_addr: str | None = None
    rdzv_backend: str | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str = "harness"
    rdzv_conf: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """From a section of a config, whose nested parts may be of OmegaConf's types."""
        names = [each.name for each in fields(cls)]
        for key in given:
            if key not in names:
                raise SettingsError(f"hydra.launcher has no setting {key!r}; it has {', '.join(names)}.")
        plain: dict[str, Any] = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in given.items()
        }
        return cls(**plain)

    def __post_init__(self) -> None:
        for name in ("nproc_per_node", "parallel"):
            value = getattr(self, name)
            if value != "auto" and (not is_whole_number(value) or value < 1):
                raise SettingsError(f"hydra.launcher.{name} is a number, at least 1, or auto, found {value!r}.")
        for name, least in {"max_restarts": 0, "node_rank": 0, "omp_num_threads": 1}.items():
            if getattr(self, name) is not None or name != "omp_num_threads":
                whole_number(f"hydra.launcher.{name}", getattr(self, name), least, SettingsError)
        most = self.node_range[1]
        if most > 1 and not self.rdzv_endpoint:
            raise SettingsError(
                f"hydra.launcher.nnodes={self.nnodes} needs an address where the nodes meet: "
                f"hydra.launcher.rdzv_endpoint=HOST:PORT of this node."
            )
        if most > 1 and self.parallel not in (1, "auto"):
            raise SettingsError(
                f"hydra.launcher.parallel={self.parallel} with nnodes={self.nnodes}: points on several nodes run one "
                f"after the other, since they meet at one address. Use parallel=1."
            )

    @property
    def node_range(self) -> tuple[int, int]:
        """Smallest and largest number of nodes."""
        least, _, most = str(self.nnodes).partition(":")
        if not least.isdigit() or not (most or least).isdigit() or not 1 <= int(least) <= int(most or least):
            raise SettingsError(f"hydra.launcher.nnodes is a number of nodes, or MIN:MAX, found {self.nnodes!r}.")
        return int(least), int(most or least)
