"""Lightning on the ranks of ``spawn``."""

from __future__ import annotations

from lightning.pytorch.plugins.environments import ClusterEnvironment


class Ranks(ClusterEnvironment):
    """The ranks of ``spawn``, which have met already: ``DDPStrategy(cluster_environment=Ranks(rank, world_size))``."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 0

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0
