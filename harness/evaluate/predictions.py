"""File of predictions: all frames in their order, with predictions beside their labels, each frame once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from ase import Atoms
from ase.io.extxyz import write_extxyz
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from harness.data.frames import FrameSet, as_frame_set
from harness.data.reading import Frame, has_key
from harness.distributed import broadcast_object, gather_to_first
from harness.fields import field_spec
from harness.support.files import replacing

__all__ = ["PredictionFile", "WritingFailedError", "with_predictions"]

Prediction = dict[str, np.ndarray]
"""Energy, forces, stress and further fields that a model predicts; float64, one row, or one for each atom."""

_FIELDS = {"energy": "total_energy", "forces": "forces", "stress": "stress"}
_ATOMS_AT_ONCE = 100_000
"""Atoms whose predictions are sent to rank 0 and written together."""


class WritingFailedError(RuntimeError):
    """The file of predictions could not be written; all ranks raise it with the same text."""

    on_all_ranks = True


class PredictionFile(Callback):
    """Keeps the predictions of this rank's frames, and writes those of all ranks in the end.

    A rank keeps its own alone, 1/R of them; rank 0 gets them in parts of 100,000 atoms, in the order of the frames.
    Energies are in eV, forces in eV/Å and stresses in eV/Å³, positive for tension; stresses are left out of frames that
    are not periodic in all three directions. Numbers of atoms have 8 decimals, as ASE writes them.

    Args:
        path: of the extended XYZ file.
        frames: all of them, in the order of the file.
        places: position in ``frames`` of each frame of each set.
        prefix: of the names of the predictions, such as ``predicted_``.
        further: fields that are written beside energy, forces and stress, where the model predicts them.

    Raises:
        ValueError: a frame has a label or array under such a name already.
    """

    def __init__(
        self,
        path: Path,
        frames: Sequence[Frame] | FrameSet,
        places: Sequence[Sequence[int]],
        prefix: str = "predicted_",
        further: Sequence[str] = (),
    ) -> None:
        self.path, self._frames, self._places, self._prefix = path, as_frame_set(frames), places, prefix
        self._fields = _FIELDS | {name: name for name in further}
        for frame in frames:
            taken = [name for name in self._fields if has_key([frame.atoms], f"{prefix}{name}")]
            if taken:
                raise ValueError(
                    f"{frame.location} has {prefix}{taken[0]} already, where the prediction would be written; give "
                    f"predictions other names, such as prefix=new_{prefix}"
                )
        self._own: dict[int, Prediction] = {}
        self.not_finite: list[int] = []
        """Positions of frames with predictions that are NaN or infinite; on rank 0, once written."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start without predictions."""
        self._own, self.not_finite = {}, []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions of a batch."""
        numbers = batch["frame_index"].tolist()
        ends = np.cumsum(batch["num_atoms"].tolist())[:-1]
        by_field: dict[str, Sequence[np.ndarray]] = {}
        for name, field in self._fields.items():
            if field in outputs and outputs[field] is not batch.get(field):
                values = outputs[field].detach().double().cpu().numpy()
                by_field[name] = np.split(values, ends) if field_spec(field).level == "node" else values
        for position, number in enumerate(numbers):
            own = {name: np.array(values[position]) for name, values in by_field.items()}
            if "energy" in own:
                own["energy"] = own["energy"].reshape(())
            self._own[self._places[dataloader_idx][number]] = own

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the predictions of all ranks.

        Raises:
            WritingFailedError: the file could not be written.
        """
        group = getattr(pl_module, "process_group", None)
        error: Exception | None = None
        with ExitStack() as opened:
            file: TextIO | None = None
            if trainer.is_global_zero:
                try:
                    file = opened.enter_context(opened.enter_context(replacing(self.path)).open("w", encoding="utf-8"))
                except OSError as failure:
                    error = failure
            for start, stop in _parts(self._frames.num_atoms().tolist()):
                own = {number: self._own.pop(number) for number in range(start, stop) if number in self._own}
                gathered = gather_to_first(own, group)  # by all, whatever has happened to the file
                if file is not None and error is None:
                    try:
                        self._write(file, gathered, start, stop)
                    except Exception as failure:
                        error = failure
            text = broadcast_object(None if error is None else f"{self.path} cannot be written: {error}", group)
            if text is not None:
                raise WritingFailedError(text) from error

    def _write(self, file: TextIO, gathered: Sequence[Mapping[int, Prediction]], start: int, stop: int) -> None:
        found = [number for own in gathered for number in own]
        if sorted(found) != list(range(start, stop)):
            raise RuntimeError(f"frames {start} to {stop - 1} were predicted {len(found)} times, expected once each")
        merged = {number: own[number] for own in gathered for number in own}
        for number in range(start, stop):
            if not all(np.isfinite(values).all() for values in merged[number].values()):
                self.not_finite.append(number)
            atoms = with_predictions(self._frames[number].atoms, merged[number], self._prefix)
            write_extxyz(file, [atoms])


def _parts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of frames with up to 100,000 atoms, or of one larger frame."""
    parts, start, atoms = [], 0, 0
    for number, size in enumerate(sizes):
        if number > start and atoms + size > _ATOMS_AT_ONCE:
            parts.append((start, number))
            start, atoms = number, 0
        atoms += size
    return [*parts, (start, len(sizes))]


def with_predictions(atoms: Atoms, prediction: Mapping[str, np.ndarray], prefix: str) -> Atoms:
    """Copy of a structure with predictions beside what it has.

    Args:
        atoms: with the labels as they were read.
        prediction: ``energy`` in eV, ``forces`` in eV/Å, ``stress`` in eV/Å³, positive for tension; those that there
            are, and further fields. The stress is left out unless the structure is periodic in all three directions.
        prefix: of their names. The stress is written as nine numbers xx xy xz yx yy yz zx zy zz, and so are other
            matrices, those of atoms as nine columns.
    """
    written = atoms.copy()
    written.calc = atoms.calc
    results = getattr(atoms.calc, "results", {})
    for place in (written.info, written.arrays):
        for name in set(place) & set(results):  # ASE writes those of the calculator, and refuses both
            del place[name]
    if "energy" in prediction:
        written.info[f"{prefix}energy"] = float(prediction["energy"])
    if "forces" in prediction:
        written.arrays[f"{prefix}forces"] = np.asarray(prediction["forces"])
    if "stress" in prediction and atoms.pbc.all():
        written.info[f"{prefix}stress"] = np.asarray(prediction["stress"]).reshape(9)  # of 3 x 3 ASE would make JSON
    for name in prediction.keys() - _FIELDS.keys():
        values = np.asarray(prediction[name])
        if field_spec(name).level == "node":
            rows = values.reshape(len(atoms), -1)
            written.arrays[f"{prefix}{name}"] = rows[:, 0] if rows.shape[1] == 1 else rows
        else:
            written.info[f"{prefix}{name}"] = values.reshape(-1) if values.size > 1 else float(values.reshape(()))
    return written
