"""Groups of parameters and frozen ones: what is trained and how, against plain torch loops; what is refused."""

from __future__ import annotations

import copy
import csv
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from support.alloy import LOSS, build, data
from support.alloy import trainer as make_trainer
from support.configs import composed
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau

import harness
from harness.adaptive import UncertaintyWeighting
from harness.callbacks import ExponentialMovingAverage, ResumeCheckpoint
from harness.data import EmbeddedAlloyDataModule
from harness.job import build_module
from harness.metrics import step_together
from harness.models.references import connected_zero
from harness.module import ForceFieldModule, freeze
from harness.module.build import build_optimizer
from harness.module.parameters import ParameterGroups, parameter_names, parameter_table

alloy = data  # the fixture

GROUPS = [
    {"match": ["*.bias"], "lr_factor": 0.1, "weight_decay": 0.0, "name": "biases"},
    {"match": ["*.interactions.*.weight"], "weight_decay": 0.5},
]
ADAM = {"_target_": "torch.optim.Adam", "lr": 5e-3, "weight_decay": 0.01, "eps": 1e-4}
EXPONENTIAL = functools.partial(ExponentialLR, gamma=0.5)
FROZEN = ["*.embedding.*", "*.lin2.*"]


class Small(nn.Module):
    """Names as models have them: nested, numbered, shared, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.readout = nn.Linear(4, 1)
        self.alias = self.layers[0].weight
        self.register_buffer("scale", torch.ones(1))


def module_of(model: nn.Module, optimizer: Any = None, **options: Any) -> ForceFieldModule:
    return ForceFieldModule(model, harness.EnergyForceLoss, optimizer=optimizer, **options)


def grouped(groups: Any, **options: Any) -> dict[str, list[str]]:
    """Names of the parameters in each group of the optimizer."""
    module = module_of(Small(), {**ADAM, "groups": groups}, **options)
    names = {id(each): name for name, each in module.named_parameters()}
    made = module.configure_optimizers()
    return {group["name"]: [names[id(each)] for each in group["params"]] for group in made.param_groups}


def test_every_parameter_is_in_one_group() -> None:
    found = grouped(
        [{"match": ["*.bias"]}, {"match": ["layers.?.weight"], "name": "layers"}],
        weighting=UncertaintyWeighting(),
    )
    assert found == {
        "rest": ["model.embedding.weight", "model.readout.weight", "loss.weighting.log_variances"],
        "group1": ["model.layers.0.bias", "model.layers.1.bias", "model.readout.bias"],
        "layers": ["model.alias", "model.layers.1.weight"],  # the first by another of its names
    }
    assert list(grouped([{"match": ["*"], "name": "all"}])) == ["all"]  # nothing is left for a rest
    compiled = torch.compile(Small())
    assert list(parameter_names(compiled)) == list(parameter_names(Small()))


def test_groups_have_their_settings_and_the_rest_those_of_the_optimizer() -> None:
    groups = [{"match": ["layers.*"], "lr_factor": 0.1}, {"match": ["readout.*"], "weight_decay": 0.5, "lr_factor": 2}]
    optimizer = module_of(Small(), OmegaConf.create({**ADAM, "groups": groups})).configure_optimizers()
    assert [(each["lr"], each["weight_decay"]) for each in optimizer.param_groups] == [
        (5e-3, 0.01),
        (pytest.approx(5e-4), 0.01),
        (1e-2, 0.5),
    ]
    assert [each["initial_lr"] for each in optimizer.param_groups] == [each["lr"] for each in optimizer.param_groups]
    plain = module_of(Small(), {**ADAM, "groups": []}).configure_optimizers()
    assert len(plain.param_groups) == 1
    assert "name" not in plain.param_groups[0]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (
            [{"match": ["*.bias"]}, {"match": ["readout.*"]}],
            r"readout\.bias is matched by the groups 'group1'.*'group2'",
        ),
        ([{"match": ["reedout.*"]}], r"groups\[0\]\.match.*'reedout\.\*' matches no parameter.*Did you mean readout\?"),
        ([{"match": ["model.readout.*"]}], r"within the model, without `model\.`: 'readout\.\*'"),
        ([{"match": ["scale"]}], r"scale is a buffer"),
        ([{"match": ["zzz"]}], r"Expected some of alias, embedding\.weight, .* and 2 more"),
        ([{"match": "*.bias"}], r"groups\[0\]\.match is a list of patterns"),
        ([{"lr_factor": 2}], r"with `match`"),
        ([{"match": ["*"], "lr": 1}], r"unknown key 'lr'.*Valid keys: name, match, lr_factor, weight_decay"),
        ([{"match": ["*"], "lr_factor": 0}], r"lr_factor is a number above 0, found 0.*freeze"),
        ([{"match": ["*"], "weight_decay": -1}], r"weight_decay is a number of at least 0"),
        ([{"match": ["*.bias"], "name": "rest"}], r"two groups are named 'rest'"),
        ({"match": ["*"]}, r"is a list of groups"),
    ],
)
def test_groups_that_are_refused(groups: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        grouped(groups)


def test_settings_that_the_optimizer_or_the_scheduler_does_not_take() -> None:
    groups = [{"match": ["*.bias"], "weight_decay": 0.1}]
    with pytest.raises(ValueError, match=r"Rprop has no setting weight_decay, which the group 'group1' gives"):
        module_of(Small(), {"_target_": "torch.optim.Rprop", "groups": groups}).configure_optimizers()
    with pytest.raises(ValueError, match=r"The optimizer, LBFGS .*cannot be made"):
        module_of(Small(), {"_target_": "torch.optim.LBFGS", "groups": groups}).configure_optimizers()
    module = module_of(Small(), {**ADAM, "groups": [{"match": ["*.bias"], "lr_factor": 0.1}]})
    cycle = functools.partial(OneCycleLR, total_steps=10)
    with pytest.raises(ValueError, match=r"not in the ratio of their factors \(rest 1, group1 0\.1\).*0\.005, 0\.0005"):
        build_optimizer(module, module._optimizer, functools.partial(cycle, max_lr=0.1))
    made = build_optimizer(module, module._optimizer, functools.partial(cycle, max_lr=[0.1, 0.01]))["optimizer"]
    assert made.param_groups[1]["max_lr"] == 0.01


# --- trainings ---


class Seen(Callback):
    """Batches of every epoch, and parameters that the last step had no gradient of."""

    def __init__(self) -> None:
        self.batches: dict[int, list[Any]] = {}
        self.without_gradient: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.setdefault(trainer.current_epoch, []).append(dict(batch))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        found = pl_module.get_submodule("model").named_parameters()
        self.without_gradient = [name for name, each in found if each.grad is None]


def fit(
    folder: Path,
    alloy: EmbeddedAlloyDataModule,
    groups: Any = (),
    frozen: Any = (),
    start: Path | None = None,
    scheduler: Any = EXPONENTIAL,
    optimizer: Any = None,
    module: ForceFieldModule | None = None,
    **options: Any,
) -> tuple[ForceFieldModule, Trainer]:
    settings = {**ADAM, "groups": list(groups)}
    monitored = {"scheduler": scheduler, "interval": "epoch", "monitor": "val0_epoch/weighted_sum"}
    module = module or build(alloy, optimizer=optimizer or settings, lr_scheduler=monitored)
    freeze(module.model, frozen)
    callbacks = [*options.pop("callbacks", []), ResumeCheckpoint(folder, signals=())]
    running = make_trainer(folder, callbacks=callbacks, enable_checkpointing=True, **options)
    running.fit(module, datamodule=alloy, ckpt_path=start, weights_only=True)
    return module, running


def plain_loop(
    alloy: EmbeddedAlloyDataModule, module: ForceFieldModule, seen: Seen, frozen: Any = ()
) -> dict[str, torch.Tensor]:
    """Weights after two epochs of torch's own Adam with groups made by hand."""
    manager = LOSS(type_names=alloy.type_names)
    parameters = dict(module.model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(not any(part in name for part in frozen))
    biases = [each for name, each in parameters.items() if name.endswith(".bias")]
    filters = [each for name, each in parameters.items() if ".interactions." in name and name.endswith(".weight")]
    rest = [each for each in parameters.values() if not any(each is other for other in (*biases, *filters))]
    sections = [
        {"params": rest},
        {"params": biases, "lr": 5e-4, "weight_decay": 0.0},
        {"params": filters, "weight_decay": 0.5},
    ]
    optimizer = torch.optim.Adam(sections, lr=5e-3, weight_decay=0.01, eps=1e-4)
    module.model.train()
    for loaded in seen.batches.values():
        for batch in loaded:
            optimizer.zero_grad()
            (values,) = step_together(manager, preds=module.model(batch), target=batch)
            values.weighted_sum.backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        manager.reset()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def weights_of(module: ForceFieldModule) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def test_a_training_steps_each_group_by_its_own_settings(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="csv")
    seen = Seen()
    module, running = fit(tmp_path, alloy, GROUPS, logger=logger, callbacks=[LearningRateMonitor(), seen])
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lr-Adam/rest"]]
    logged = [[float(row[f"lr-Adam/{name}"]) for name in ("rest", "biases", "group2")] for row in rows]
    assert logged == [pytest.approx([5e-3, 5e-4, 5e-3]), pytest.approx([2.5e-3, 2.5e-4, 2.5e-3])]
    assert [group["name"] for group in running.optimizers[0].param_groups] == ["rest", "biases", "group2"]
    twin = build(alloy)
    assert_same(weights_of(module), plain_loop(alloy, twin, seen), 1e-10)
    table = parameter_table(module.model, running.optimizers[0])
    total = sum(each.numel() for each in module.model.parameters())
    assert table[0].startswith(f"parameters: {total} trained in ")
    assert table[0].endswith("none frozen")
    assert [line.split(":")[0].strip() for line in table[1:]] == ["rest", "biases", "group2"]
    assert table[2].endswith("lr 0.0005, weight_decay 0")


def test_frozen_parameters_do_not_move_and_cost_nothing(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    start = weights_of(build(alloy))
    seen = Seen()
    module, running = fit(tmp_path, alloy, GROUPS, FROZEN, callbacks=[ExponentialMovingAverage(decay=0.5), seen])
    frozen = [name for name in start if ".embedding." in name or ".lin2." in name]
    assert len(frozen) > 2
    assert seen.without_gradient == frozen
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, start[name]) == (name in frozen)
    held = [each for group in running.optimizers[0].param_groups for each in group["params"]]
    assert len(held) == len(start) - len(frozen)
    assert "frozen in" in parameter_table(module.model, running.optimizers[0])[0]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for states in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        for name in frozen:
            assert torch.equal(states[f"model.{name}"], start[name])
    trained, _ = fit(tmp_path / "plain", alloy, GROUPS, FROZEN)
    assert_same(weights_of(trained), plain_loop(alloy, build(alloy), seen, (".embedding.", ".lin2.")), 1e-10)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["*"], r"leaves no parameter of the model to train"),
        (["*", "scale"], r"'scale' matches no parameter.*is a buffer"),
        (["embeding.*"], r"freeze: the pattern 'embeding\.\*'.*Did you mean embedding\?"),
        ("embedding.*", r"freeze is a list of patterns"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything(patterns: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        freeze(Small(), patterns)


def test_freezing_leaves_buffers_and_groups_of_frozen_parameters_are_refused() -> None:
    model = Small()
    assert freeze(model, ["embedding.*", "alias"]) == ["embedding.weight", "alias"]
    assert not model.layers[0].weight.requires_grad
    assert torch.equal(model.scale, torch.ones(1))
    with pytest.raises(ValueError, match=r"'embedding\.\*' matches frozen parameters alone: embedding\.weight"):
        ParameterGroups(module_of(model), [{"match": ["embedding.*"]}])
    groups = ParameterGroups(module_of(model), [{"match": ["layers.*"], "name": "layers"}]).for_optimizer()
    assert [len(each["params"]) for each in groups] == [2, 3]


def test_a_config_freezes_and_groups(alloy: EmbeddedAlloyDataModule) -> None:
    config = composed(
        "freeze=['*.embedding.*']", "optimizer.groups=[{match: ['*.bias'], lr_factor: 0.1}]", "cutoff=4.0"
    )
    module = build_module(config, alloy)
    assert [name for name, each in module.model.named_parameters() if not each.requires_grad] == [
        "energy_model.energy_model.schnet.embedding.weight"
    ]
    made = module.configure_optimizers()["optimizer"]
    assert [group["lr"] for group in made.param_groups] == [5e-3, pytest.approx(5e-4)]


# --- going on with others ---


def test_a_resumed_training_is_the_undisturbed_one(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", alloy, GROUPS, FROZEN, max_epochs=3)
    fit(tmp_path / "half", alloy, GROUPS, FROZEN, max_epochs=2)
    again, running = fit(tmp_path / "rest", alloy, GROUPS, FROZEN, tmp_path / "half" / "last.ckpt", max_epochs=3)
    assert_same(weights_of(again), weights_of(whole))
    assert [group["name"] for group in running.optimizers[0].param_groups] == ["rest", "biases", "group2"]


CHANGES: dict[str, tuple[Any, Any, list[str]]] = {
    "groups": (
        GROUPS,
        (),
        ["groups of parameters:", "optimizer.weight_decay: 0.01 → 0.5, of", "goes on with 0.00125, 0.000125, 0.00125"],
    ),
    "freeze": ((), FROZEN, ["not trained any more: model.energy_model.energy_model.schnet.embedding.weight"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_moments_are_carried_to_other_groups_by_names(
    change: str, alloy: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    groups, frozen, words = CHANGES[change]
    fit(tmp_path / "before", alloy)
    start = tmp_path / "before" / "last.ckpt"
    checkpoint = torch.load(start, weights_only=True)
    module = build(alloy, optimizer={**ADAM, "groups": list(groups)}, lr_scheduler=EXPONENTIAL)
    freeze(module.model, frozen)
    changed = copy.deepcopy(checkpoint)
    lines = module.go_on_from(changed, make_trainer(tmp_path, max_epochs=3))
    text = "\n".join(lines)
    assert all(word in text for word in words), text
    seen = Seen()
    after, _ = fit(tmp_path / "after", alloy, groups, frozen, start, max_epochs=3, callbacks=[seen])
    # torch's own Adam, with the moments of each parameter and the settings of its group
    twin = build(alloy).model
    twin.load_state_dict(
        {n.removeprefix("model."): v for n, v in checkpoint["state_dict"].items() if n.startswith("model.")}
    )
    names = [name.removeprefix("model.") for name in checkpoint["optimization"]["parameters"][0]]
    states = {name: checkpoint["optimizer_states"][0]["state"][number] for number, name in enumerate(names)}
    sections = []
    for name, parameter in twin.named_parameters():
        if any(part in name for part in (".embedding.", ".lin2.")) and frozen:
            parameter.requires_grad_(False)
            continue
        is_bias, is_filter = name.endswith(".bias"), ".interactions." in name and name.endswith(".weight")
        decay = 0.01 if not groups else 0.0 if is_bias else 0.5 if is_filter else 0.01
        rate = 1.25e-3 * (0.1 if groups and is_bias else 1)
        sections.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.Adam(sections, eps=1e-4)
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = copy.deepcopy(states[name])
    manager = LOSS(type_names=alloy.type_names)
    twin.train()
    for batch in seen.batches[2]:
        optimizer.zero_grad()
        (values,) = step_together(manager, preds=twin(batch), target=batch)
        values.weighted_sum.backward()
        optimizer.step()
    assert_same(weights_of(after), {n: p.detach() for n, p in twin.named_parameters()}, 1e-10)


def test_what_is_trained_again_begins_without_moments(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    fit(tmp_path / "before", alloy, (), FROZEN)
    module = build(alloy, optimizer={**ADAM, "groups": []}, lr_scheduler=EXPONENTIAL)
    checkpoint = torch.load(tmp_path / "before" / "last.ckpt", weights_only=True)
    text = "\n".join(module.go_on_from(checkpoint, make_trainer(tmp_path, max_epochs=3)))
    assert "made anew for model.energy_model.energy_model.schnet.embedding.weight" in text
    assert "groups of parameters" not in text
    after, running = fit(tmp_path / "after", alloy, (), (), tmp_path / "before" / "last.ckpt", max_epochs=3)
    steps = {int(state["step"]) for state in running.optimizers[0].state.values()}
    assert steps == {4, 12}
    assert all(each.requires_grad for each in after.model.parameters())


def test_a_reduced_rate_of_a_plateau_is_kept_in_other_groups(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    plateau = functools.partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.999999)
    _, before = fit(tmp_path / "before", alloy, scheduler=plateau, max_epochs=3)
    rate = before.optimizers[0].param_groups[0]["lr"]
    assert rate < 5e-3
    start = tmp_path / "before" / "last.ckpt"
    _, after = fit(tmp_path / "after", alloy, GROUPS, (), start, plateau, max_epochs=3)
    found = [group["lr"] for group in after.optimizers[0].param_groups]
    assert math.log2(5e-3 / found[0]) == pytest.approx(round(math.log2(5e-3 / found[0])))
    assert found == pytest.approx([found[0], 0.1 * found[0], found[0]])
    assert found[0] <= rate


def test_a_rank_without_frames_reaches_trained_parameters_alone() -> None:
    model = Small()
    freeze(model, ["embedding.*"])
    connected_zero(model, torch.zeros(())).backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == ["embedding.weight"]
    assert not any(each.grad.any() for each in model.parameters() if each.grad is not None)
