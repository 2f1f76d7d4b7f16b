"""Neighbour lists of whole batches, made on the device that the batch is on."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from harness.data.collate import collate, frame_to_sample
from harness.data.dataset import AtomsDataset
from harness.support.guest import guest
from harness.support.text import reason, some

__all__ = ["DeviceNeighbors", "EdgesOnDevice", "check_on_device", "checked_neighbors", "invertible_cells", "with_edges"]

_PACKAGE, _EXTRA = "nvalchemi-toolkit-ops", "neighbors"
_METHOD = "batch_cell_list"
"""Kernels whose time is proportional to the number of atoms. What the package chooses by itself took four times as long
for 500 atoms, on a CPU."""
_PLACES = ("workers", "device")
_SHIFT_BITS = 5
"""Bits of a shift by which edges of the same two atoms are put in order: fewer than 32 images are within the cutoff."""
_COMPARED = 8
"""Frames whose edges are compared before a training."""
_CLOSE = 1e-4  # Å from the cutoff, where rounded positions may have an edge that exact ones do not


def checked_neighbors(neighbors: Any) -> str:
    """``workers`` or ``device``.

    Raises:
        ValueError: if it is another value.
    """
    if neighbors not in _PLACES:
        raise ValueError(
            f"neighbors must be 'workers' (lists are made as samples are drawn) or 'device' (of whole batches, on the "
            f"GPU), found {neighbors!r}"
        )
    return str(neighbors)


class DeviceNeighbors:
    r"""Edges of all graphs of a batch at once, by the kernels of NVIDIA's ``nvalchemi-toolkit-ops``.

    They are those of :func:`~harness.data.neighbors.neighbor_list` of each graph, from the positions that the batch
    has, in double precision whatever their dtype: :math:`v_e = r_j - r_i + S_e h`, :math:`|v_e| < r_\mathrm{cut}`, each
    pair in both directions. They are ordered by centre, neighbour and shift, so that the same batch has the same order
    on every device. Gradients do not go through them; positions and cell of the batch stay as they are.

    The host waits for the device, for sizes of grids and for the number of edges, which is the length of the tensors.

    Args:
        cutoff: in Å.

    Raises:
        ModuleNotFoundError: the package is not installed, with the command that installs it.
    """

    def __init__(self, cutoff: float) -> None:
        self.cutoff = cutoff
        self._compute, self._overflow = _kernels()
        self._most: int | None = None  # neighbours of an atom that there is room for; None: as the package estimates

    def edges(
        self, positions: Tensor, cells: Tensor, pbc: Tensor, graphs: Tensor, num_atoms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Edges of all graphs, and the cell shifts of their neighbours.

        Args:
            positions: ``[num_atoms, 3]`` in Å, anywhere.
            cells: ``[num_graphs, 3, 3]`` in Å; vectors of directions without periodicity are not used.
            pbc: ``[num_graphs, 3]`` booleans.
            graphs: number of the graph of each atom, in order, ``[num_atoms]``.
            num_atoms: of each graph, ``[num_graphs]``.

        Returns:
            ``edge_index`` int64 ``[2, num_edges]`` and ``edge_cell_shift`` ``[num_edges, 3]`` in the dtype of the
            positions.
        """
        device, dtype = positions.device, positions.dtype
        if not len(num_atoms):
            return torch.zeros(2, 0, dtype=torch.int64, device=device), positions.new_zeros(0, 3)
        with torch.no_grad():
            starts = torch.zeros(len(num_atoms) + 1, dtype=torch.int32, device=device)
            starts[1:] = num_atoms.cumsum(0)
            found, shifts = self._pairs(
                positions.detach().double().contiguous(),
                invertible_cells(cells.detach().double(), pbc),
                pbc.contiguous(),
                graphs.to(torch.int32),
                starts,
            )
            order = _order(found, shifts, len(positions))
            return found.index_select(1, order), shifts.index_select(0, order).to(dtype)

    def with_edges(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its edges; everything else is as it was.

        Args:
            batch: with ``pos``, ``cell``, ``pbc``, ``batch`` and ``num_atoms``.
        """
        index, shifts = self.edges(batch["pos"], batch["cell"], batch["pbc"], batch["batch"], batch["num_atoms"])
        return {**batch, "edge_index": index, "edge_cell_shift": shifts}

    def _pairs(self, positions: Tensor, cells: Tensor, pbc: Tensor, graphs: Tensor, starts: Tensor) -> Any:
        """Pairs ``[2, num_edges]`` and shifts ``[num_edges, 3]`` in any order."""
        while True:
            try:
                found, _, shifts = self._compute(
                    positions,
                    self.cutoff,
                    cell=cells,
                    pbc=pbc,
                    batch_idx=graphs,
                    batch_ptr=starts,
                    max_neighbors=self._most,
                    return_neighbor_list=True,
                    method=_METHOD,
                )
            except self._overflow as error:  # denser than the package reckons with; nothing is left out
                self._most = max(error.num_neighbors, error.max_neighbors + 1)
                continue
            return found.long(), shifts.long()


def _kernels() -> tuple[Callable[..., Any], Any]:
    """Function that makes neighbour lists, and its error where there are more neighbours than it has room for."""
    try:
        with guest():
            from nvalchemiops.torch.neighbors import neighbor_list
            from nvalchemiops.torch.neighbors.neighbor_utils import NeighborOverflowError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data.neighbors=device needs the package {_PACKAGE}, and {error.name!r} is not installed: "
            f"pip install 'potential-harness[{_EXTRA}]'. data.neighbors=workers needs nothing.",
            name=error.name,
        ) from error
    return neighbor_list, NeighborOverflowError


def invertible_cells(cells: Tensor, pbc: Tensor) -> Tensor:
    """Cells with vectors of 1 Å, orthogonal to the others, for the directions without periodicity.

    Args:
        cells: ``[num_graphs, 3, 3]`` in Å, rows are lattice vectors; anything in directions without periodicity.
        pbc: ``[num_graphs, 3]`` booleans.

    Returns:
        ``[num_graphs, 3, 3]``, right-handed where a vector was replaced.
    """
    axes = torch.eye(3, dtype=cells.dtype, device=cells.device)
    vectors = list(torch.where(pbc[:, :, None], cells, 0.0).unbind(1))
    known = list(pbc.unbind(1))
    for k in range(3):
        first, second = (k + 1) % 3, (k + 2) % 3
        only = vectors[first] + vectors[second]  # if one of the two is known
        axis = axes[only.abs().argmin(1)]
        number = known[first].long() + known[second].long()
        new = torch.where((number == 1)[:, None], torch.linalg.cross(only, axis), axis)
        new = torch.where((number == 2)[:, None], torch.linalg.cross(vectors[first], vectors[second]), new)
        vectors[k] = torch.where(
            known[k][:, None], vectors[k], new / torch.linalg.vector_norm(new, dim=1, keepdim=True)
        )
        known[k] = torch.ones_like(known[k])
    return torch.stack(vectors, dim=1)


def _order(pairs: Tensor, shifts: Tensor, num_atoms: int) -> Tensor:
    """Order of edges by centre, neighbour and shift, int64 ``[num_edges]``."""
    key = pairs[0] * num_atoms + pairs[1]
    for axis in range(3):
        key = (key << _SHIFT_BITS) | (shifts[:, axis] & ((1 << _SHIFT_BITS) - 1))
    return key.argsort()


class EdgesOnDevice(LightningDataModule):
    """Data module whose batches get their edges once they are on the device, where ``neighbors`` says so.

    Attributes:
        neighbors: place where neighbour lists are made, ``workers`` or ``device``.
    """

    neighbors: str
    _device_neighbors: DeviceNeighbors | None

    def _set_neighbors(self, neighbors: str, cutoff: float) -> None:
        self.neighbors = checked_neighbors(neighbors)
        self._device_neighbors = DeviceNeighbors(cutoff) if self.neighbors == "device" else None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch, with edges if they are made on the device.

        Lightning calls it for every batch. Where you take batches from a loader yourself, call it on the device.
        """
        return batch if self._device_neighbors is None else self._device_neighbors.with_edges(batch)

    def _check_device(self, dataset: AtomsDataset, device: torch.device) -> None:
        if self._device_neighbors is not None:
            check_on_device(self._device_neighbors, dataset, device)


def with_edges(batch: dict[str, Tensor], datamodule: LightningDataModule) -> dict[str, Tensor]:
    """A batch that no trainer has brought to the device, as the model gets it.

    Args:
        batch: of samples of the data module, on any device.
        datamodule: any.
    """
    if not isinstance(datamodule, EdgesOnDevice):
        return batch
    completed: dict[str, Tensor] = datamodule.on_after_batch_transfer(batch, 0)
    return completed


def check_on_device(neighbors: DeviceNeighbors, dataset: AtomsDataset, device: torch.device) -> None:
    """Compare edges of frames of a data set, from the smallest to the largest, with vesin's; compiles the kernels.

    Edges within 10⁻⁴ Å of the cutoff may differ: vesin is given the positions of the file, and the kernels those of the
    batch, which may be rounded.

    Args:
        neighbors: of the training.
        dataset: its training frames.
        device: that batches are brought to.

    Raises:
        ValueError: they differ, or the kernels cannot be called.
    """
    order = dataset.num_atoms().argsort(kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(len(order), _COMPARED)).round().astype(int))
    frames = [dataset.frames[int(index)] for index in order[places]]
    leave = "Leave data.neighbors at workers, whose lists vesin makes."
    samples = [frame_to_sample(frame, dataset.type_names, dataset.cutoff, dtype=dataset.dtype) for frame in frames]
    expected = collate(samples)
    try:
        found = neighbors.with_edges({name: value.to(device) for name, value in expected.items()})
    except Exception as error:  # of a compiler, a driver, a directory that cannot be written
        raise ValueError(
            f"data.neighbors=device: {_PACKAGE} cannot make neighbour lists on {device}: {reason(error)}. {leave}"
        ) from error
    ours, theirs = (_edges({name: value.cpu() for name, value in batch.items()}) for batch in (found, expected))
    differing = ((ours - theirs) + (theirs - ours)).elements()
    number = sum(abs(_length(expected, edge) - dataset.cutoff) > _CLOSE for edge in differing)
    if number:
        version = importlib.metadata.version(_PACKAGE)
        raise ValueError(
            f"data.neighbors=device: {_PACKAGE} {version} finds {ours.total()} edges on {device} in "
            f"{some(frame.location for frame in frames)}, and vesin {theirs.total()}; {number} of them differ, "
            f"expected the same. {leave}"
        )


def _edges(batch: Mapping[str, Tensor]) -> Counter[tuple[int, ...]]:
    """Edges as centre, neighbour and shift, and how often each is there."""
    return Counter(map(tuple, torch.cat((batch["edge_index"].T, batch["edge_cell_shift"].long()), 1).tolist()))


def _length(batch: Mapping[str, Tensor], edge: Sequence[int]) -> float:
    """Length of an edge in Å."""
    centre, neighbour, *shift = edge
    cell = batch["cell"][batch["batch"][centre]]
    vector = batch["pos"][neighbour] - batch["pos"][centre] + torch.tensor(shift, dtype=cell.dtype) @ cell
    return float(vector.norm())
