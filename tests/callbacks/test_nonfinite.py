"""NonFiniteGuard in real trainings: what it says, what it leaves behind, and that a skipped step changes nothing."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from support.alloy import LOSS, build, data, trainer  # noqa: F401 - a fixture
from support.commands import BIN, ROOT, SIZES, run, started
from support.failure_callbacks import Spoil
from support.lightning_ranks import Ranks
from support.spawning import spawn
from support.step_cost import Operators

import harness
from harness.callbacks import NonFiniteError, NonFiniteGuard, ResumeCheckpoint
from harness.callbacks.nonfinite_diagnosis import find_nonfinite_fields
from harness.data import EmbeddedAlloyDataModule
from harness.distributed import gather_objects
from harness.module import ForceFieldModule, Step


def guarded(
    data: EmbeddedAlloyDataModule,  # noqa: F811
    folder: Path,
    guard: NonFiniteGuard,
    *callbacks: Callback,
    module: ForceFieldModule | None = None,
    **options: Any,
) -> ForceFieldModule:
    """Train under a guard; 4 steps an epoch."""
    module = module or build(data, train_metrics=harness.EnergyForceMetrics)
    checkpoint = options.pop("ckpt_path", None)
    fit = trainer(folder, callbacks=[guard, *callbacks], **options)
    fit.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


def message_of(data: EmbeddedAlloyDataModule, folder: Path, *callbacks: Callback, **options: Any) -> str:  # noqa: F811
    guard = options.pop("guard", None) or NonFiniteGuard(output_dir=folder)
    with pytest.raises(NonFiniteError) as caught:
        guarded(data, folder, guard, *callbacks, **options)
    return str(caught.value)


class Weights(Callback):
    """Copies of weights and optimizer before and after each step; what the loss was made of."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.after: dict[int, Any] = {}
        self.steps: list[tuple[int, Any, Any]] = []

    def on_train_values(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> None:
        predictions = {name: value.detach() for name, value in step.predictions.items()}
        self.steps.append((trainer.global_step, predictions, step.batch))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.setdefault(trainer.global_step, self._copy(trainer, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after[trainer.global_step - 1] = self._copy(trainer, pl_module)

    @staticmethod
    def _copy(trainer: Trainer, pl_module: Any) -> Any:
        return copy.deepcopy([pl_module.model.state_dict(), trainer.optimizers[0].state_dict()])


def equal(left: Any, right: Any) -> bool:
    """Bitwise, at any depth."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


# --- stop ---


def test_labels_are_found_and_nothing_is_trained_on_them(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    weights = Weights()
    message = message_of(data, tmp_path, Spoil([5]), weights)
    saved = torch.load(tmp_path / "nonfinite" / "epoch1_step5_rank0.pt", weights_only=True)
    frame = int(saved["batch"]["frame_index"][0])
    kind = data.type_names[int(saved["batch"]["atom_types"][0])]
    total = saved["batch"]["forces"].numel()
    assert message.startswith(
        "The loss is nan in step 5 of epoch 1 (batch 1 of it; all counted from 0) because of forces_mse = nan.\n"
        f"  rank 0: labels of forces: 3 of {total} numbers NaN, of atoms of type {kind}, in training frame {frame} ("
    )
    assert data.train_set.frames[frame].location in message
    assert "ignore_nan" in message
    assert "loss.ignore_nan.forces=true" in message
    assert saved["predictions"]["forces"].isfinite().all()
    assert saved["batch"]["forces"].isnan().sum() == 3
    assert (tmp_path / "nonfinite" / "epoch1_step5.txt").read_text() == f"{message}\n"
    checkpoint = torch.load(tmp_path / "nonfinite" / "epoch1_step5.ckpt", weights_only=True)
    before, _ = weights.before[5]
    assert all(equal(value, checkpoint["state_dict"][f"model.{name}"]) for name, value in before.items())
    assert checkpoint["global_step"] == 5
    additive = checkpoint["state_dict"]["loss._extra_state"]["additive"]
    assert additive.isfinite().all()
    assert 5 not in weights.after


def test_a_training_goes_on_behind_the_batch(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    message_of(data, tmp_path, Spoil([5]))
    whole, rest = Weights(), Weights()
    guarded(data, tmp_path, NonFiniteGuard(), whole)
    guarded(data, tmp_path, NonFiniteGuard(), rest, ckpt_path=tmp_path / "nonfinite" / "epoch1_step5.ckpt")
    assert sorted(rest.after) == [5, 6]
    assert equal(rest.before[5], whole.before[5])
    expected = [batch["frame_index"] for step, _, batch in whole.steps if step > 5]
    assert equal([batch["frame_index"] for _, _, batch in rest.steps], expected)


@pytest.mark.parametrize("step", [5, 7])  # 7 is the last of its epoch
def test_a_late_number_is_that_of_the_right_step(
    data: EmbeddedAlloyDataModule,  # noqa: F811
    tmp_path: Path,
    step: int,
) -> None:
    guard = NonFiniteGuard(output_dir=tmp_path)
    guard.loss.delayed = guard.gradient.delayed = True  # as on a GPU
    weights, resume = Weights(), ResumeCheckpoint(tmp_path / "checkpoints", every_n_steps=1)
    options = {"guard": guard, "enable_checkpointing": True, "max_epochs": 3}
    message = message_of(data, tmp_path, Spoil([step]), weights, resume, **options)
    assert f"in step {step} of epoch 1 (batch {step - 4} of it" in message
    assert "are now, after the optimizer has stepped with it: model." in message
    assert "labels of forces: 3 of" in message
    assert "ckpt_path" not in message
    saved = torch.load(tmp_path / "nonfinite" / f"epoch1_step{step}_rank0.pt", weights_only=True)
    assert equal(saved["batch"]["frame_index"], next(b["frame_index"] for s, _, b in weights.steps if s == step))
    # the newest checkpoint is of finite weights
    kept = torch.load(resume.newest(), weights_only=True)
    assert kept["global_step"] == step
    assert equal(
        {name: kept["state_dict"][f"model.{name}"] for name in weights.before[step][0]}, weights.before[step][0]
    )


def test_predictions_and_outliers(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    message = message_of(data, tmp_path / "a", Spoil([1], "pos"), gradient_clip_val=7.0)
    assert "because of forces_mse = nan; stress_mse = nan.\n" in message
    for field in ("forces", "stress"):
        assert f"  rank 0: predictions of {field}: " in message
    assert "Likely fix: a lower learning rate, clipped gradients" in message
    assert "now the learning rate is 0.005, trainer.gradient_clip_val is 7.0, trainer.precision is 32-true" in message
    saved = torch.load(tmp_path / "a" / "nonfinite" / "epoch0_step1_rank0.pt", weights_only=True)
    largest = saved["batch"]["forces"].norm(dim=1).max()
    assert f"largest |force| label there is {largest:.3g} eV/Å (training frame " in message

    # a label that is finite, and whose square is not
    message = message_of(data, tmp_path / "b", Spoil([1], value=1e200))
    assert "because of forces_mse = inf.\n  rank 0: errors of forces: 3 of " in message
    assert " numbers infinite" in message
    assert "largest |force| label there is 1.73e+200 eV/Å (training frame " in message


def test_predictions_without_a_label_are_told_too() -> None:
    """They do not count in the loss, but a frame of theirs is no better than the others."""
    loss = harness.EnergyForceLoss(ignore_nan={"forces": True}, type_names=["H", "O"])
    batch = {
        "num_atoms": torch.tensor([2, 2]),
        "batch": torch.tensor([0, 0, 1, 1]),
        "atom_types": torch.tensor([0, 0, 1, 1]),
        "forces": torch.tensor([[torch.nan] * 3, [torch.nan] * 3, [1.0] * 3, [1.0] * 3]),
        "total_energy": torch.zeros(2, 1),
    }
    (found,) = find_nonfinite_fields(loss, ["forces_mse"], {"forces": torch.full((4, 3), torch.nan)}, batch)
    assert (found.number, found.total, found.types, found.everywhere) == (12, 12, ["H", "O"], True)


def test_frames_that_do_not_count_are_not_to_blame() -> None:
    """By their weight, or since they are of a set that the component does not count."""
    entry = {"name": "mse", "field": "forces", "metric": harness.MeanSquaredError(), "coeff": 1, "sets": ["crystals"]}
    loss = harness.MetricsManager([entry], ["H", "O"], set_names=["crystals", "molecules"])
    batch = {
        "num_atoms": torch.tensor([1, 1, 1]),
        "batch": torch.tensor([0, 1, 2]),
        "atom_types": torch.tensor([0, 0, 1]),
        "forces": torch.full((3, 3), torch.nan),
        "set_index": torch.tensor([0, 1, 0]),
        "forces_weight": torch.tensor([0.0, 1.0, 2.0]),
    }
    (found,) = find_nonfinite_fields(loss, ["mse"], {"forces": torch.zeros(3, 3)}, batch)
    assert (found.side, found.number, found.types) == ("labels", 3, ["O"])


def test_weights_that_are_not_finite(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    message = message_of(data, tmp_path / "a", Spoil([2], "weights"))
    module = build(data)
    name = f"model.{next(name for name, _ in module.model.named_parameters())}"
    assert f"weights that are NaN or infinite were so before this step: {name}\n" in message
    assert "a gradient that is not finite where the loss is comes from the root or norm of a zero" in message
    assert "in all 4 frames" in message

    guard = NonFiniteGuard("skip", output_dir=tmp_path / "b")
    with pytest.raises(NonFiniteError, match="were so before this step"):
        guarded(data, tmp_path / "b", guard, Spoil([2], "weights"))
    assert guard.num_skipped == 0


def test_one_micro_batch_spoils_its_step(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    message = message_of(data, tmp_path, Spoil([1], micro_batch=0), accumulate_grad_batches=2)
    assert "in step 1 of epoch 0 (batch 2 of it, in 2 micro-batches; all counted from 0)" in message
    assert "  rank 0: micro-batch 0, labels of forces: 3 of " in message
    saved = torch.load(tmp_path / "nonfinite" / "epoch0_step1_rank0.pt", weights_only=True)
    assert saved["micro_batch"] == 0
    assert saved["batch"]["forces"].isnan().any()


def test_all_ranks_stop_at_one_sample_of_one_of_them(tmp_path: Path) -> None:
    overrides = (
        "experiment=alloy",
        *SIZES,
        "logger=[wandb]",
        "dry_step=false",
        "trainer.timeout=60",
        "+callbacks.spoil={_target_: support.failure_callbacks.Spoil, steps: [5], rank: 1}",
        f"+callbacks.note={{_target_: support.failure_callbacks.NoteError, path: {tmp_path}/error}}",
        f"hydra.run.dir={tmp_path}/run",
    )
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    with started(*overrides, folder=tmp_path, ranks=2, WANDB_MODE="offline", PYTHONPATH=paths) as processes:
        assert [process.wait(150) for process in processes] == [1, 1]
    first, second = ((tmp_path / f"error.{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.startswith(
        "NonFiniteError in step 5: The loss is nan in step 5 of epoch 1 (batch 1 of it; all counted"
    )
    assert "\n  rank 1: labels of forces: 3 of " in first
    assert "rank 0:" not in first
    message = first.removeprefix("NonFiniteError in step 5: ")
    said, silent = ((tmp_path / f"stderr.{rank}").read_text() for rank in range(2))
    assert said.count(f"\nerror: {message}\n") == 1
    assert "The loss is nan" not in silent
    assert "Traceback" not in said + silent
    found = {path.name for path in (tmp_path / "run" / "nonfinite").iterdir()}
    assert found == {f"epoch1_step5{ending}" for ending in (".txt", ".ckpt", "_rank1.pt")}
    assert torch.load(tmp_path / "run" / "nonfinite" / "epoch1_step5.ckpt", weights_only=True)["global_step"] == 5
    (run,) = (tmp_path / "run").rglob("*.wandb")
    inspected = subprocess.run(
        [BIN / "wandb", "leet", "inspect", "--json", run], capture_output=True, text=True, check=True, timeout=60
    )
    records = [json.loads(line) for line in inspected.stdout.splitlines()]
    assert [record["alert"]["text"] for record in records if record["type"] == "alert"] == [message]
    assert any(record["type"] == "exit" for record in records)  # nobody was in a hurry


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_strategy_stops_and_those_that_can_skip(tmp_path: Path) -> None:
    cases = ["ddp,skip", "fsdp,skip", "fsdp,stop", "zero2,stop", "zero3,stop"]
    environment = {
        "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),  # of the compiler's helper, for DeepSpeed
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    command = [
        str(BIN / "torchrun"),
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "tests/support/nonfinite_ranks.py"),
    ]
    done = run([*command, str(tmp_path), *cases], tmp_path, timeout=500, **environment)
    assert done.code == 0, done.err[-6000:]
    for case in cases:
        seen = [torch.load(tmp_path / f"{case}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert seen[0] == seen[1]
        endings = {".txt", "_rank1.pt"} if case.endswith("skip") else {".txt", "_rank1.pt", ".ckpt"}
        found = {path.name for path in (tmp_path / case / "nonfinite").iterdir()}
        assert found == {f"epoch0_step2{ending}" for ending in endings}
        if case.endswith("skip"):
            assert seen[0] == {"moved": [True, True, False, True], "message": ""}
        else:
            assert seen[0]["moved"] == [True, True]
            assert "\n  rank 1: labels of forces: 3 of " in seen[0]["message"]
            checkpoint = torch.load(tmp_path / case / "nonfinite" / "epoch0_step2.ckpt", weights_only=True)
            weights = [value for name, value in checkpoint["state_dict"].items() if name.startswith("model.")]
            assert all(value.isfinite().all() for value in weights if value.is_floating_point())


# --- gradients ---


class ZeroRoot(torch.nn.Module):
    """A model with finite predictions, whose energy of one training frame has a gradient of 0/0."""

    def __init__(self, model: torch.nn.Module, frame: int) -> None:
        super().__init__()
        self.model, self.frame = model, frame
        self.slope = torch.nn.Parameter(torch.tensor(1e-3))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        predictions = self.model(batch)
        distance = (batch["frame_index"].reshape(-1, 1) - self.frame).to(self.slope.dtype)
        return {**predictions, "total_energy": predictions["total_energy"] + ((self.slope * distance) ** 2).sqrt()}


def zero_root(data: EmbeddedAlloyDataModule, frame: int) -> ForceFieldModule:  # noqa: F811
    module = build(data)
    module.model = ZeroRoot(module.model, frame)
    return module


def frames_of_epoch(data: EmbeddedAlloyDataModule, folder: Path) -> list[list[int]]:  # noqa: F811
    """Training frames of each batch of an epoch."""
    seen = Weights()
    guarded(data, folder, NonFiniteGuard(), seen, max_epochs=1)
    return [batch["frame_index"].reshape(-1).tolist() for _, _, batch in seen.steps]


def test_a_gradient_that_is_not_finite_is_not_trained_on(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    frame = frames_of_epoch(data, tmp_path)[2][1]
    weights = Weights()
    message = message_of(data, tmp_path, weights, module=zero_root(data, frame))
    assert message.startswith(
        "The gradient of the loss is NaN or infinite in step 2 of epoch 0 (batch 2 of it; all counted from 0), of the "
        "parameters model.slope. The loss is 0."
    )
    assert (
        f"\n  rank 0: gradient of per_atom_energy_mse: 1 of {len_of(data)} numbers NaN, in training frame {frame} ("
        in message
    )
    assert "comes from the root or norm of a zero in the model" in message
    checkpoint = torch.load(tmp_path / "nonfinite" / "epoch0_step2.ckpt", weights_only=True)
    before, _ = weights.before[2]
    assert all(equal(value, checkpoint["state_dict"][f"model.{name}"]) for name, value in before.items())
    assert torch.load(tmp_path / "nonfinite" / "epoch0_step2_rank0.pt", weights_only=True)["found"]


def len_of(data: EmbeddedAlloyDataModule) -> int:  # noqa: F811
    """Number of the numbers in a gradient."""
    return sum(each.numel() for each in zero_root(data, 0).model.parameters())


def stop_on_rank(rank: int, world_size: int, folder: Path) -> tuple[str, int]:
    own = EmbeddedAlloyDataModule(num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, seed=1)
    own.setup()
    first, *_ = own.train_dataloader()
    second_rank = gather_objects(int(first["frame_index"][-1]))[1]
    options = {"devices": 2, "strategy": DDPStrategy(cluster_environment=Ranks(rank, world_size))}
    return message_of(own, folder, module=zero_root(own, second_rank), **options), second_rank


def test_all_ranks_stop_at_a_gradient_of_one_of_them(tmp_path: Path) -> None:
    """The averaged gradient is NaN on all ranks; the frame is found by the rank that has it."""
    (message, frame), (other, _) = spawn(2, stop_on_rank, tmp_path, timeout=120)
    assert message == other
    assert message.startswith("The gradient of the loss is NaN or infinite in step 0 of epoch 0 (batch 0 of it")
    assert f"\n  rank 1: gradient of per_atom_energy_mse: 1 of 1194 numbers NaN, in training frame {frame} (" in message
    assert "rank 0: gradient" not in message
    found = {path.name for path in (tmp_path / "nonfinite").iterdir()}
    assert found == {f"epoch0_step0{ending}" for ending in (".txt", ".ckpt", "_rank1.pt")}


def test_a_step_with_such_a_gradient_is_skipped(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    frame = frames_of_epoch(data, tmp_path)[2][1]
    weights, guard = Weights(), NonFiniteGuard("skip", output_dir=tmp_path)
    with pytest.warns(UserWarning, match="gradient of per_atom_energy_mse"):
        guarded(data, tmp_path, guard, weights, module=zero_root(data, frame), max_epochs=1)
    assert guard.num_skipped == 1
    assert equal(weights.before[2], weights.after[2])
    assert not equal(weights.before[3][0], weights.after[3][0])
    assert all(value.isfinite().all() for value in weights.after[3][0].values() if value.is_floating_point())


@pytest.mark.parametrize("late", [False, True])  # late as on a GPU
def test_weights_that_are_not_finite_are_never_saved(
    data: EmbeddedAlloyDataModule,  # noqa: F811
    tmp_path: Path,
    late: bool,
) -> None:
    """The last gradient of a training is not finite; and an optimizer that makes weights infinite by itself."""
    frame = frames_of_epoch(data, tmp_path)[3][1]
    guard = NonFiniteGuard(output_dir=tmp_path)
    guard.loss.delayed = guard.gradient.delayed = late
    resume = ResumeCheckpoint(tmp_path / "checkpoints", every_n_steps=1)
    options = {"guard": guard, "enable_checkpointing": True, "max_epochs": 1}
    message = message_of(data, tmp_path, resume, module=zero_root(data, frame), **options)
    expected = "The weights are NaN or infinite after" if late else "The gradient of the loss is NaN or infinite in"
    assert message.startswith(f"{expected} step 3 of epoch 0")
    kept = torch.load(resume.newest(), weights_only=True)
    assert kept["global_step"] == 3
    assert all(value.isfinite().all() for name, value in kept["state_dict"].items() if name.startswith("model."))


class Explode(Callback):
    """An optimizer that is wrong in its last step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4:
            next(pl_module.model.parameters()).data.fill_(torch.inf)


def test_weights_that_an_optimizer_has_spoilt_are_not_saved(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    resume = ResumeCheckpoint(tmp_path / "checkpoints", every_n_steps=1)
    message = message_of(data, tmp_path, Explode(), resume, enable_checkpointing=True, max_epochs=1)
    assert message.startswith("The weights are NaN or infinite after step 3 of epoch 0")
    assert "weights that are NaN or infinite are now, after the optimizer has stepped with it: model." in message
    assert torch.load(resume.newest(), weights_only=True)["global_step"] == 3


# --- skip ---


@pytest.mark.parametrize("k", [1, 2])
def test_a_skipped_step_changes_nothing(data: EmbeddedAlloyDataModule, tmp_path: Path, k: int) -> None:  # noqa: F811
    """Weights and Adam's moments keep their bits, and the epoch's averages are of the other steps."""
    bad = 2 // k
    guard, weights = NonFiniteGuard("skip", output_dir=tmp_path), Weights()
    logger = CSVLogger(tmp_path, name="", version="csv")
    module = build(data, train_metrics=functools.partial(harness.EnergyForceMetrics, coeffs={"forces_rmse": 1}))
    options = {"accumulate_grad_batches": k, "max_epochs": 1, "logger": logger, "gradient_clip_val": 10.0}
    with pytest.warns(UserWarning, match="forces_mse = nan") as told:
        guarded(data, tmp_path, guard, Spoil([bad], micro_batch=0), weights, module=module, **options)
    assert len([each for each in told if "The step is skipped." in str(each.message)]) == 1
    assert equal(weights.before[bad], weights.after[bad])
    assert not equal(weights.before[0][0], weights.after[0][0])
    assert not equal(weights.before[bad - 1][1], weights.after[bad - 1][1])
    assert guard.num_skipped == 1
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    table = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    assert [(row["step"], row["nonfinite/skipped"]) for row in table if row["nonfinite/skipped"]] == [(str(bad), "1")]

    expected = [LOSS(type_names=data.type_names), harness.EnergyForceMetrics(coeffs={"forces_rmse": 1})]
    for step, predictions, batch in weights.steps:
        if step != bad:
            for manager in expected:
                manager(predictions, batch)
    for manager, what in zip(expected, ("train_loss", "train_metric"), strict=True):
        for name, value in manager.compute().items():
            assert module.reports[what].values[name] == pytest.approx(float(value), rel=1e-12), name
    assert len(weights.steps) == 4


def test_too_many_in_a_row(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    guard = NonFiniteGuard("skip", output_dir=tmp_path, max_skipped=2)
    with (
        pytest.warns(UserWarning, match="more than 2 in a row end the training"),
        pytest.raises(NonFiniteError, match=r"2 steps in a row were skipped before it \(max_skipped=2\)"),
    ):
        guarded(data, tmp_path, guard, Spoil([0, 1, 3, 4, 5]))
    assert guard.num_skipped == 4
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == [
        *(f"epoch0_step0{ending}" for ending in (".txt", "_rank0.pt")),
        *(f"epoch1_step5{ending}" for ending in (".ckpt", ".txt", "_rank0.pt")),
    ]
    again = NonFiniteGuard("skip")
    again.load_state_dict(
        torch.load(tmp_path / "nonfinite" / "epoch1_step5.ckpt", weights_only=True)["callbacks"][guard.state_key]
    )
    assert again.num_skipped == 4


# --- what it costs, and what it refuses ---


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_the_guard_waits_for_no_number(data: EmbeddedAlloyDataModule, tmp_path: Path, action: str) -> None:  # noqa: F811
    counts = []
    for guards in ([], [NonFiniteGuard(action)]):
        module = build(data)
        fit = trainer(tmp_path, callbacks=guards, max_epochs=1)
        with Operators() as operators:
            fit.fit(module, datamodule=data)
        counts.append(operators)
    without, guarding = counts
    assert guarding.waits == without.waits
    # the loss and the predictions without their graph: no kernel; the sum of each gradient
    more, num_gradients = guarding.names - without.names, len(list(module.parameters()))
    assert set(more) <= {"aten::detach", "aten::view", "aten::sum", "aten::stack", "aten::_to_copy", "aten::cat"}
    assert more.total() <= 4 * (14 + num_gradients)


def test_what_cannot_be_skipped_is_refused(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    class Lion(torch.optim.Optimizer):
        pass

    weight = [torch.nn.Parameter(torch.zeros(1))]
    skip = NonFiniteGuard("skip")
    with pytest.raises(ValueError, match="DeepSpeed, whose engine"):
        skip.check(DeepSpeedStrategy.__new__(DeepSpeedStrategy), [])
    with pytest.raises(ValueError, match="Lion is not known to change nothing"):
        skip.check("auto", [Lion(weight, {})])
    module = build(data, optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="LBFGS is not known to change nothing then; expected an optimizer of torch"):
        guarded(data, tmp_path, skip, module=module)
    skip.check("auto", [torch.optim.SGD(weight), torch.optim.AdamW(weight), torch.optim.Adam(weight)])
    NonFiniteGuard().check(DeepSpeedStrategy.__new__(DeepSpeedStrategy), [])
    with pytest.raises(TypeError, match="found BoringModel"):
        trainer(tmp_path, callbacks=[NonFiniteGuard()]).fit(BoringModel())
    with pytest.raises(ValueError, match="stop or skip, found 'ignore'"):
        NonFiniteGuard("ignore")
    with pytest.raises(ValueError, match="max_skipped is a whole number, at least 0, found -1"):
        NonFiniteGuard(max_skipped=-1)
