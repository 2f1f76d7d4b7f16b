"""A training that goes on from a checkpoint with other settings: what is carried over, replaced, or made anew.

Weights, moments of the optimizer and counters are those of the checkpoint. Hyperparameters and the learning-rate
scheduler are those of the present command, and the scheduler is brought to the position of the training. Where nothing
differs, the checkpoint is left as it is.

The states in the checkpoint are changed before Lightning and its strategies load them, so it is the same for all.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from harness.checkpoints import COMPLETE
from harness.module.build import CODE, TARGET, asked_for
from harness.module.coefficient_control import controllers_of
from harness.module.horizon import HORIZON, Pace, Progress, TrainingLength, batches_of_epoch
from harness.support.lightning_private import training_loader

__all__ = ["RECORD", "Continuation", "describe", "parts_of"]

RECORD = "optimization"
"""Key in a checkpoint of the record that :func:`describe` makes."""

_SAME_MOMENTS = ({"torch.optim.adam.Adam", "torch.optim.adamw.AdamW"},)
"""Optimizers whose states mean the same."""
_RATES = ("lr", "initial_lr", "params")
_POSITION = "num_batches_done"
_PLACE = ("epoch", _POSITION)
"""Of the state of a loader of this package, whose other entries are the order of the data."""
_OF_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
_CYCLES = ("OneCycleLR", "CyclicLR")
_OF_CYCLES = ("betas", "momentum")
"""Settings that these schedulers move in the groups of an optimizer, where they also replace ``initial_lr``."""
_DEFAULT = "default"
_IN_PATHS = ("<lambda>", "<locals>")
_MOVING = ("base_lrs", "verbose", "last_epoch", *_OF_PLATEAU)


def describe(optimizer: Optimizer, options: Mapping[str, Any] | None, module: nn.Module) -> dict[str, Any]:
    """Record of an optimizer and a scheduler for a checkpoint, in plain data: what their states do not tell."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    record: dict[str, Any] = {
        "optimizer": _path(optimizer),
        "parameters": [[names.get(id(each), "") for each in group["params"]] for group in optimizer.param_groups],
    }
    if options is not None:
        pace = Pace.of(options)
        record["scheduler"] = {
            "class": _path(options["scheduler"]),
            "interval": pace.interval,
            "frequency": pace.frequency,
            "monitor": options.get("monitor") if isinstance(options["scheduler"], ReduceLROnPlateau) else None,
            "inner": _inner(options["scheduler"]),
        }
    return {**record, **asked_for(optimizer)}


def parts_of(made: Any) -> tuple[Optimizer, dict[str, Any] | None]:
    """Optimizer, and Lightning's dictionary of its scheduler or None, of what ``configure_optimizers`` makes."""
    return (made["optimizer"], made["lr_scheduler"]) if isinstance(made, Mapping) else (made, None)


@dataclass
class Continuation:
    """A training that goes on from a checkpoint.

    Args:
        checkpoint: whose states are changed in place by :meth:`apply`.
        trainer: of the training that goes on.

    Attributes:
        lines: differences, as ``name: before → now``, and what was made anew.
        horizons: lengths of the whole training that schedulers have asked for.
    """

    checkpoint: dict[str, Any]
    trainer: Trainer
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.progress = Progress.of(self.checkpoint)
        self.length = TrainingLength.of(self.trainer)
        self.record: Mapping[str, Any] = self.checkpoint.get(RECORD) or {}
        self.horizons: dict[Pace, int] = {}
        self._callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._sizes: list[int] = []  # numbers of parameters in the groups of now

    @property
    def _states(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.checkpoint.get("lr_schedulers") or []
        return found

    def horizon(self, pace: Pace) -> int:
        """Turns of a scheduler in the whole training, those that it has taken included."""
        self.horizons[pace] = self._position(pace) + self.length.turns_left(pace, self.progress)
        return self.horizons[pace]

    def check(self) -> None:
        """Refuse a continuation that has no meaning.

        Raises:
            ValueError: the training is longer than the length that is asked for, or the checkpoint is of the middle of
                an epoch, and its batches are not those of now.
        """
        done, trainer = self.progress, self.trainer
        epochs, steps = trainer.max_epochs, trainer.max_steps
        if epochs not in (None, -1) and done.epochs > epochs:  # type: ignore[operator]
            raise ValueError(
                f"max_epochs={epochs}, but the checkpoint has {done.epochs} epochs behind it. Epochs are counted from "
                f"the beginning of the training that goes on: choose max_epochs={done.epochs + 1} or more, or start "
                f"from its weights alone, with init_from in place of ckpt_path."
            )
        if steps != -1 and done.steps > steps:
            raise ValueError(
                f"max_steps={steps}, but the checkpoint has {done.steps} steps behind it. Steps are counted from the "
                f"beginning of the training that goes on: choose trainer.max_steps={done.steps + 1} or more, or start "
                f"from its weights alone, with init_from in place of ckpt_path."
            )
        if done.batches:
            self._check_batches()

    def _check_batches(self) -> None:
        done, accumulate = self.progress, self.length.accumulate_in(self.progress.epochs)
        where = f"The checkpoint was made within epoch {done.epochs}, after {done.batches} of its batches"
        remedy = (
            "Continue from a checkpoint of the end of an epoch (such as previous.ckpt beside it, or best.ckpt), or "
            "change it later."
        )
        now, before = batches_of_epoch(self.trainer), self.record.get("num_batches")
        if before is not None and now is not None and before != now:
            raise ValueError(
                f"{where}, of which an epoch had {before} then and has {now} now (batch size, data or "
                f"limit_train_batches): their frames are others. {remedy}"
            )
        if done.batches % accumulate and self.record.get("accumulate") not in (None, accumulate):
            raise ValueError(
                f"{where}, which is no multiple of accumulate_grad_batches={accumulate}: its next step would lack "
                f"batches. {remedy}"
            )

    # --- all of it ---

    def apply(self, module: LightningModule, make: Callable[[Callable[[Pace], int]], Any]) -> None:
        """Change the states of the checkpoint to those that the training goes on with.

        Args:
            module: of the training that goes on.
            make: what ``configure_optimizers`` returns, from the length of the training in turns of a scheduler.

        Raises:
            ValueError: it cannot go on.
        """
        self.check()
        self._take_trained_weights()
        self._release_coefficients(module)
        self._follow_early_stopping()
        self._begin_epoch_with_other_batches()
        self._tell_of_cut_epoch()
        saved = self.checkpoint.get("optimizer_states") or []
        if len(saved) == 1 and saved[0].get("param_groups") and len(self._states) <= 1:
            made = make(self.horizon)
            optimizer, options = parts_of(made)
            self._change_optimization(module, saved[0], optimizer, options)
            if options is not None and isinstance(options["scheduler"], ReduceLROnPlateau):
                self._take_turn_of_epoch(options["scheduler"], Pace.of(options), options.get("monitor"))

    @property
    def _is_over(self) -> bool:
        """True if no step is left to be made."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        is_last = epochs not in (None, -1) and self.progress.epochs >= epochs  # type: ignore[operator]
        return is_last or -1 < steps <= self.progress.steps

    def _tell_of_cut_epoch(self) -> None:
        """Say that an epoch that ``max_steps`` has cut is not finished."""
        if COMPLETE not in self.checkpoint or self._is_over or self.progress.batches:
            return
        # by the record: at the end, Lightning's counts are those of the next epoch already
        done, whole = self.record.get("batches"), self.record.get("num_batches")
        if done is not None and whole is not None and 0 < done < whole:
            self.lines.append(
                f"the training ended within epoch {self.progress.epochs - 1}, after {done} of its {whole} batches: the "
                f"other {whole - done} are left out, and it goes on with epoch {self.progress.epochs}"
            )

    def _take_trained_weights(self) -> None:
        """Go on from the weights that were trained, and not from their average, where nothing averages any more."""
        trained = self.checkpoint.get("current_model_state")
        if trained is not None and COMPLETE in self.checkpoint and self._is_over:
            self.checkpoint["current_model_state"] = trained = dict(self.checkpoint["state_dict"])  # as it had ended
        if trained is not None and not any(isinstance(each, WeightAveraging) for each in self._callbacks):
            self.checkpoint["state_dict"] = trained
            self.lines.append("averaged weights → none: the weights that were trained go on, not their average")
        elif trained is None and any(isinstance(each, WeightAveraging) for each in self._callbacks):
            self.lines.append("no averaged weights → averaged weights: the average begins with the weights as they are")

    def _release_coefficients(self, module: LightningModule) -> None:
        """Give the loss its configured coefficients back if what moved them is gone."""
        before = self.record.get("controllers")
        loss = getattr(module, "loss", None)
        now = controllers_of(loss, self._callbacks)
        if before is None or before == now:
            return
        self.lines.append(f"coefficients moved by: {', '.join(before) or 'nothing'} → {', '.join(now) or 'nothing'}")
        state = self.checkpoint["state_dict"].get("loss._extra_state")
        if isinstance(state, dict) and "coeffs" in state:
            state["coeffs"]["given"] = dict(state["coeffs"]["configured"])

    def _follow_early_stopping(self) -> None:
        """Let the patience be that of the command, and a training that was stopped wait anew."""
        states = self.checkpoint.get("callbacks") or {}
        for callback in self._callbacks:
            state = states.get(callback.state_key) if isinstance(callback, EarlyStopping) else None
            if state is None:
                continue
            if COMPLETE in self.checkpoint and state["wait_count"] >= state["patience"]:
                self.lines.append(
                    f"EarlyStopping had ended the training in epoch {state['stopped_epoch']}: it waits anew, and keeps "
                    f"its best value"
                )
                state["wait_count"], state["stopped_epoch"] = 0, 0
            if state["patience"] != callback.patience:
                self.lines.append(f"patience of EarlyStopping: {state['patience']} → {callback.patience}")
                state["patience"] = callback.patience

    def _begin_epoch_with_other_batches(self) -> None:
        """Leave out the loaders' position in an epoch that has not begun, if it is one in other batches."""
        loops = self.checkpoint["loops"]["fit_loop"].get("state_dict") or {}
        states = loops.get("combined_loader") or []
        if self.progress.batches or len(states) != 1 or _POSITION not in states[0]:
            return
        loader: Any = training_loader(self.trainer)
        now = loader.state_dict() if hasattr(loader, "state_dict") else {}
        order = [{name: value for name, value in each.items() if name not in _PLACE} for each in (states[0], now)]
        if order[0] != order[1]:
            loops["combined_loader"] = []
            for name in order[1]:
                self.lines += _changes(f"{name} of the training data", [order[0].get(name)], [order[1][name]])

    # --- optimizer and scheduler ---

    def _change_optimization(
        self, module: LightningModule, saved: dict[str, Any], optimizer: Optimizer, options: dict[str, Any] | None
    ) -> None:
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        now = describe(optimizer, options, module)
        before = self._record_before(saved, optimizer, options, now)
        scheduler = None if options is None else options["scheduler"]
        position = "" if options is None else self._replay(scheduler, Pace.of(options))
        state = None if scheduler is None else scheduler.state_dict()
        carried = self._carried_states(saved, before, optimizer, now)
        old, new = saved["param_groups"], [_without_parameters(group) for group in optimizer.param_groups]
        is_same = before["optimizer"] == now["optimizer"] and carried is saved["state"]
        has_same_groups = self._has_same_groups(old, before, now)
        settings: list[Any] = [each.get("settings") for each in (before, now)]
        hyperparameters: list[str] = []
        moved: list[str] = []
        if has_same_groups and before["optimizer"] == now["optimizer"] and all(settings):
            names = [name for name in settings[1][0] if name not in _RATES]
            hyperparameters = _changes_of_groups("optimizer", names, *settings)
        elif has_same_groups and before["optimizer"] == now["optimizer"]:  # of a checkpoint that does not tell
            names = [name for name in new[0] if name not in _RATES]
            own = [name for name in names if name in optimizer.defaults and name not in _moved_by(before, now)]
            hyperparameters = _changes_of_groups("optimizer", own, old, new)
            others = [name for name in names if name not in optimizer.defaults]
            moved = _changes_of_groups("lr_scheduler.scheduler", others, old, new)
        elif before["optimizer"] == now["optimizer"] and all(settings):
            hyperparameters = _changes_of_parameters(before, now)
        compared: Sequence[Any] = settings if all(settings) else (old, new)
        bases = [[_base(group) for group in groups] for groups in compared]
        rates = ["other groups"]
        if has_same_groups:
            labels = [group.get("name", number) for number, group in enumerate(new)]
            rates = (
                _changes("optimizer.lr", bases[0], bases[1], labels)
                if all(settings) or not _moved_by(before, now)
                else []
            )
        arguments = self._changed_scheduler(before, now, state, moved)
        if not arguments and not rates:
            arguments = self._other_rates(before, now, scheduler, state)
        self.lines += [*hyperparameters, *(rates if has_same_groups else []), *arguments]
        if "warm_up" in before or "warm_up" in now:
            leaves = [_leaves("lr_scheduler.warm_up", each.get("warm_up") or {"length": 0}) for each in (before, now)]
            self.lines += _changed_leaves(*leaves)[0]
        if not arguments and not rates:  # the rate and what moves it stay as they are
            if hyperparameters or not is_same:
                for group, other in zip(new, old, strict=True):
                    group.update({name: other[name] for name in _RATES if name in other and name != "params"})
                self._put(saved, new, carried, self._states)
            return
        if isinstance(scheduler, ReduceLROnPlateau):
            kept = old if not rates else self._reduced(before, now, old, new)
            position = self._take_plateau(before, now, scheduler, state or {}, new, kept)
        elif scheduler is not None and not isinstance(scheduler, LRScheduler):
            raise ValueError(
                f"{type(scheduler).__name__} is none of torch's schedulers, which are brought to the position of the "
                f"training by letting them take its turns: it cannot go on with other settings "
                f"({', '.join([*rates, *arguments])}). Continue with the same, or start from the weights alone, with "
                f"init_from in place of ckpt_path."
            )
        shown = ", ".join(f"{float(group['lr']):.6g}" for group in new if "lr" in group)
        self.lines.append(f"the learning rate goes on with {shown}{position}")
        self._put(saved, new, carried, [] if state is None else [state])

    def _has_same_groups(
        self, old: Sequence[Mapping[str, Any]], before: Mapping[str, Any], now: Mapping[str, Any]
    ) -> bool:
        """True if each group has the parameters that it had; by their numbers where their names are not known."""
        if [len(group["params"]) for group in old] != self._sizes:
            return False
        names = before.get("parameters")
        return names is None or [set(group) for group in names] == [set(group) for group in now["parameters"]]

    def _reduced(
        self,
        before: Mapping[str, Any],
        now: Mapping[str, Any],
        old: Sequence[Mapping[str, Any]],
        new: Sequence[Mapping[str, Any]],
    ) -> list[dict[str, Any]]:
        """Rates of other groups, or with other factors, reduced as before; none for another rate of the optimizer."""
        if "rate" not in before or not _equal(before["rate"], now.get("rate")):
            return []
        parts = [float(group["lr"]) / float(_base(group)) for group in old if "lr" in group and _base(group)]
        if len(parts) != len(old) or not all(math.isclose(part, parts[0], rel_tol=1e-9) for part in parts):
            return []  # such as at the lower limits of groups
        return [{"lr": parts[0] * float(_base(group))} for group in new]

    def _put(
        self,
        saved: dict[str, Any],
        groups: Sequence[dict[str, Any]],
        states: Mapping[int, Any],
        scheduler_states: list[dict[str, Any]],
    ) -> None:
        """Replace what Lightning will load."""
        first = 0
        numbered = []
        for group, size in zip(groups, self._sizes, strict=True):
            numbered.append({**group, "params": list(range(first, first + size))})
            first += size
        self.checkpoint["optimizer_states"] = [{**saved, "state": dict(states), "param_groups": numbered}]
        self.checkpoint["lr_schedulers"] = scheduler_states

    def _record_before(
        self, saved: dict[str, Any], optimizer: Optimizer, options: dict[str, Any] | None, now: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Record of the checkpoint; of one without, such as those of version 0.1.0, as its states suggest."""
        if self.record:
            return dict(self.record)
        names = set(saved["param_groups"][0]) - {*_RATES}
        flag = "decoupled_weight_decay"
        is_same = names >= set(optimizer.defaults) - {*_RATES} and (
            saved["param_groups"][0].get(flag) == optimizer.param_groups[0].get(flag)
        )
        record: dict[str, Any] = {"optimizer": now["optimizer"] if is_same else _guess(names, saved["param_groups"][0])}
        if self._states:
            record["scheduler"] = None if options is None else self._guess_scheduler(options, now)
        return record

    def _guess_scheduler(self, options: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        """Record of the scheduler of a state without one."""
        states = (self._states[0], options["scheduler"].state_dict())
        before, own = ({name for name in each if not name.startswith("_")} - {*_MOVING} for each in states)
        guessed = {**now["scheduler"], "class": now["scheduler"]["class"] if before == own else "another one"}
        for interval, count in (("epoch", self.progress.epochs), ("step", self.progress.steps)):
            if states[0].get("last_epoch") == count and self.progress.epochs != self.progress.steps:
                guessed |= {"interval": interval, "frequency": 1}
        return guessed

    # --- the optimizer's state ---

    def _carried_states(
        self, saved: dict[str, Any], before: Mapping[str, Any], optimizer: Optimizer, now: Mapping[str, Any]
    ) -> Mapping[int, Any]:
        """State of each parameter by its number in the optimizer of now."""
        state: Mapping[int, Any] = saved["state"]
        kinds = {before["optimizer"], now["optimizer"]}
        if len(kinds) > 1:
            pair = f"{_short(before['optimizer'])} → {_short(now['optimizer'])}"
            if not any(kinds <= same for same in _SAME_MOMENTS):
                self.lines.append(f"optimizer: {pair}, whose state is made anew: the other's means nothing to it")
                return {}
            self.lines.append(f"optimizer: {pair}, whose moments are the same and go on")
        state = self._renumbered(state, saved, before, now)
        needed = _needed_state(optimizer)
        lacking = sorted({key for key in needed for each in state.values() if key not in each})
        if not lacking:
            return state
        like = {number: _tensor_of(each) for number, each in state.items()}
        if all(needed[key] for key in lacking) and all(each is not None for each in like.values()):
            self.lines.append(f"state of the optimizer: {', '.join(lacking)}, which it did not have, begins at 0")
            zeros = {number: {key: torch.zeros_like(like[number]) for key in lacking} for number in state}  # type: ignore[arg-type]
            return {number: {**zeros[number], **each} for number, each in state.items()}
        self.lines.append(f"state of the optimizer: made anew, since the one before has no {', '.join(lacking)}")
        return {}

    def _renumbered(
        self, state: Mapping[int, Any], saved: dict[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
    ) -> Mapping[int, Any]:
        """State with the numbers that the parameters have now, by their names."""
        old, new = before.get("parameters"), now["parameters"]
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if old is None or not all(name for group in old for name in group):
            if sizes != self._sizes:
                raise ValueError(
                    f"The checkpoint's optimizer has {sizes} parameters in its groups, this one {self._sizes}: "
                    f"it cannot be told which are which. Give the same model and groups, or start from the weights "
                    f"alone, with init_from in place of ckpt_path."
                )
            return state
        if old == new:
            return state
        numbers = {
            name: number
            for names, group in zip(old, saved["param_groups"], strict=True)
            for name, number in zip(names, group["params"], strict=True)
        }
        flat = [name for group in new for name in group]
        anew, gone = [name for name in flat if name not in numbers], [name for name in numbers if name not in flat]
        if gone:
            self.lines.append(f"not trained any more: {_listed(gone)}")
        if anew:
            self.lines.append(f"state of the optimizer: made anew for {_listed(anew)}")
        kept = [[name for name in group if name in numbers] for group in new]
        if [set(group) - set(gone) for group in old] != [set(group) for group in kept]:
            self.lines.append(f"groups of parameters: {sizes} → {self._sizes} parameters")
        return {number: state[numbers[name]] for number, name in enumerate(flat) if numbers.get(name, -1) in state}

    # --- the scheduler ---

    def _position(self, pace: Pace) -> int:
        """Turns that a scheduler of this pace has taken."""
        before = self.record.get("scheduler") or {}
        state = self._states[0] if self._states else {}
        if not isinstance(state.get("last_epoch"), int) or "num_bad_epochs" in state:
            return self.length.turns_done(pace, self.progress)
        if not before:  # of version 0.1.0
            counts = {Pace("epoch"): self.progress.epochs, Pace("step"): self.progress.steps}
            return (
                int(state["last_epoch"])
                if counts.get(pace) == state["last_epoch"]
                else self.length.turns_done(pace, self.progress)
            )
        return int(state["last_epoch"]) if Pace.of(before) == pace else self.length.turns_done(pace, self.progress)

    def _replay(self, scheduler: Any, pace: Pace) -> str:
        """Let a new scheduler take the turns that the training has had; returns the position in words."""
        if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
            return ""
        turns = self._position(pace)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler that moves without its optimizer
            for _ in range(turns):
                scheduler.step()
        return f", {type(scheduler).__name__} at {pace.interval} {turns * pace.frequency}"

    def _changed_scheduler(
        self,
        before: Mapping[str, Any],
        now: Mapping[str, Any],
        new_state: Mapping[str, Any] | None,
        moved: Sequence[str],
    ) -> list[str]:
        """Lines for another scheduler, or other arguments of the same; ``moved`` are those that groups tell."""
        had, has = self._states[0] if self._states else None, now.get("scheduler")
        old = before.get("scheduler") or ({"class": "another one"} if had is not None else None)
        if old is None or has is None or old["class"] != has["class"]:
            if old is None and has is None:
                return []
            return [f"lr_scheduler: {_short((old or {}).get('class'))} → {_short((has or {}).get('class'))}"]
        lines = []
        for name in ("interval", "frequency", "monitor"):
            lines += _changes(f"lr_scheduler.{name}", [old.get(name)], [has.get(name)])
        name = "lr_scheduler.scheduler"
        inner = _changed_inner(name, old["inner"], has["inner"]) if "inner" in old else []
        by_state = _changed_arguments(name, had or {}, new_state or {})
        if "recipe" not in before or "recipe" not in now:
            return _once([*lines, *inner, *by_state, *moved])
        leaves = [_leaves(name, each["recipe"]) for each in (before, now)]
        asked, codes = _changed_leaves(*leaves)
        if asked:  # beside them, the state tells of lengths alone
            lengths = {leaf for each in leaves for leaf, value in each.items() if value == HORIZON}
            by_state = [line for line in by_state if line.partition(":")[0] in lengths]
        found = _once([*lines, *inner, *asked, *by_state])
        return found or codes

    def _other_rates(
        self,
        before: Mapping[str, Any],
        now: Mapping[str, Any],
        scheduler: Any,
        state: Mapping[str, Any] | None,
    ) -> list[str]:
        """A line if the scheduler of now has other rates at the position of the one before.

        Only where no record tells what was asked for, or where that depends on the length of the training.
        """
        recipes = [each.get("recipe") for each in (before, now)]
        is_told = all(recipes) and HORIZON not in _leaves("", recipes[1]).values()
        if is_told or isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
            return []
        had, has = (each.get("_last_lr") for each in (self._states[0] if self._states else {}, state or {}))
        if not had or not has or len(had) != len(has):
            return []
        if all(math.isclose(float(one), float(other), rel_tol=1e-9) for one, other in zip(had, has, strict=True)):
            return []
        shown = (_shown([float(rate) for rate in rates]) for rates in (had, has))
        return [f"lr_scheduler: another schedule, whose rate at this position is {' → '.join(shown)}"]

    def _take_plateau(
        self,
        before: Mapping[str, Any],
        now: Mapping[str, Any],
        scheduler: ReduceLROnPlateau,
        state: dict[str, Any],
        groups: Sequence[dict[str, Any]],
        with_rates: Sequence[Mapping[str, Any]],
    ) -> str:
        """Keep what a plateau scheduler has seen, and the rates of groups before; returns that in words."""
        old = before.get("scheduler") or {}
        was_plateau = old.get("class") == now["scheduler"]["class"] and bool(self._states)
        if not was_plateau:
            return f", {type(scheduler).__name__} begins"
        if with_rates:
            for group, other in zip(groups, with_rates, strict=True):
                group["lr"] = other["lr"]
            state["_last_lr"] = [other["lr"] for other in with_rates]
        if old.get("monitor") != now["scheduler"]["monitor"] or self._states[0].get("mode") != state.get("mode"):
            return f", {type(scheduler).__name__} begins anew, since it follows another value"
        state.update({key: self._states[0][key] for key in _OF_PLATEAU})
        return f", {type(scheduler).__name__} goes on from its best value, {state['best']:.6g}"

    def _take_turn_of_epoch(self, scheduler: ReduceLROnPlateau, pace: Pace, monitor: str | None) -> None:
        """Give a plateau scheduler the turn of the epoch that a checkpoint of its end was made before.

        Lightning saves after a validation, lets the scheduler see its value later, and leaves that out in a restart.
        """
        loops, state = self.checkpoint["loops"]["fit_loop"], self._states[0] if self._states else {}
        epoch = self.progress.epochs
        validated = loops.get("epoch_loop.val_loop.batch_progress", {}).get("total", {}).get("processed")
        is_due = pace.interval == "epoch" and not self.progress.batches and epoch > 0 and epoch % pace.frequency == 0
        is_taken = loops["epoch_progress"]["current"].get("completed", epoch) >= epoch or "num_bad_epochs" not in state
        turns = self.length.turns_done(pace, self.progress) if is_due else 0
        if not is_due or is_taken or not validated or state["last_epoch"] >= turns:
            return
        states: Mapping[str, Any] = self.checkpoint.get("callbacks") or {}
        saving = [each for each in states.values() if isinstance(each, Mapping) and "best_model_path" in each]
        value = saving[0].get("current_score") if len(saving) == 1 and saving[0].get("monitor") == monitor else None
        name = type(scheduler).__name__
        if value is None:  # with more than one it may be of an epoch before
            self.lines.append(
                f"{name} has not seen {monitor} of epoch {epoch - 1}, which the checkpoint does not tell: its turn is "
                f"left out"
            )
            return
        saved = self.checkpoint["optimizer_states"][0]
        groups = [dict(group) for group in saved["param_groups"]]
        for own, group in zip(scheduler.optimizer.param_groups, groups, strict=True):
            own["lr"] = group["lr"]
        scheduler.load_state_dict(copy.deepcopy(state))
        scheduler.step(float(value))
        for own, group in zip(scheduler.optimizer.param_groups, groups, strict=True):
            group["lr"] = own["lr"]
        self.checkpoint["optimizer_states"] = [{**saved, "param_groups": groups}]
        self.checkpoint["lr_schedulers"] = [scheduler.state_dict()]
        rates = ", ".join(_shown(float(group["lr"])) for group in groups)
        self.lines.append(
            f"{name} takes its turn of epoch {epoch - 1}, with {monitor} = {float(value):.6g}: the checkpoint was made "
            f"before it; the learning rate is {rates}"
        )


def _inner(scheduler: Any) -> list[Any]:
    """Class of each scheduler within another, beside those within it."""
    # of an attribute that torch has no public name for; the states in checkpoints have it, too
    return [[_path(each), _inner(each)] for each in vars(scheduler).get("_schedulers", ())]


def _changed_inner(name: str, old: Sequence[Any], new: Sequence[Any]) -> list[str]:
    """Lines for schedulers within others that are of another class."""
    if len(old) != len(new):
        pair = (", ".join(_short(path) for path, _ in each) or "none" for each in (old, new))
        return [f"{name}: {' → '.join(pair)}"]
    lines = []
    for number, (before, now) in enumerate(zip(old, new, strict=True)):
        if before[0] != now[0]:
            lines.append(f"{name}.{number}: {_short(before[0])} → {_short(now[0])}")
        else:
            lines += _changed_inner(f"{name}.{number}", before[1], now[1])
    return lines


def _leaves(name: str, made: Any) -> dict[str, Any]:
    """Values of a recipe by their dotted names; a callable has its path by its own name."""
    if isinstance(made, Mapping):
        pairs: Iterable[tuple[Any, Any]] = made.items()
    elif isinstance(made, list) and any(isinstance(each, Mapping | list) for each in made):
        pairs = enumerate(made)
    else:
        return {name: made}
    found: dict[str, Any] = {}
    for key, value in pairs:
        found |= _leaves(name if key == TARGET else f"{name}.{key}", value)
    return found


def _changed_leaves(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Lines for what was asked for otherwise, and for functions of the same name with other code."""
    asked, codes = [], []
    for name in dict.fromkeys((*old, *new)):
        before, now = old.get(name, _DEFAULT), new.get(name, _DEFAULT)
        if before == now or HORIZON in (before, now):  # the number that it stands for is in the state
            continue
        function, _, key = name.rpartition(".")
        if key != CODE:
            values = [_short(each) if _is_path(each) else _shown(each) for each in (before, now)]
            asked.append(f"{name}: {' → '.join(values)}")
        elif function in old and old[function] == new.get(function):
            versions = {str(each).partition(":")[0] for each in (before, now)}
            if len(versions) == 1:  # another Python compiles the same function otherwise
                codes.append(f"{function}: {_short(old[function])} → another function of this name")
    return asked, codes


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and all(part.isidentifier() or part in _IN_PATHS for part in value.split("."))


def _moved_by(*records: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings of an optimizer that a scheduler of one of these records moves; the rate is among them, then."""
    classes = {(record.get("scheduler") or {}).get("class") for record in records}
    return _OF_CYCLES if any(_short(each) in _CYCLES for each in classes) else ()


def _once(lines: Sequence[str]) -> list[str]:
    """The first line of each name, and none of a part of a scheduler that is another one."""
    found: dict[str, str] = {}
    for line in lines:
        name = line.partition(":")[0]
        if name not in found and not any(name.startswith(f"{other}.") and other[-1:].isdigit() for other in found):
            found[name] = line
    return list(found.values())


def _path(thing: object) -> str:
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def _short(path: str | None) -> str:
    return "none" if not path else path.rpartition(".")[2] if " " not in path else path


def _guess(names: set[str], group: Mapping[str, Any]) -> str:
    """Optimizer whose groups have such hyperparameters."""
    if {"betas", "amsgrad"} <= names:
        return "torch.optim.adamw.AdamW" if group.get("decoupled_weight_decay") else "torch.optim.adam.Adam"
    return "another one"


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _base(group: Mapping[str, Any]) -> Any:
    """Learning rate that was asked for."""
    return group.get("initial_lr", group.get("lr"))


def _tensor_of(state: Mapping[str, Any]) -> Tensor | None:
    """A tensor of the parameter's shape in the state of a parameter; None if there is none."""
    return next((value for key, value in state.items() if isinstance(value, Tensor) and key != "step"), None)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return bool(torch.equal(torch.as_tensor(left), torch.as_tensor(right)))
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)


def _changes(name: str, old: Sequence[Any], new: Sequence[Any], labels: Sequence[Any] = ()) -> list[str]:
    """A line for each group of parameters with another value, or one if all groups have the same."""
    pairs = [(_shown(before), _shown(now)) for before, now in zip(old, new, strict=True)]
    differ = [number for number, values in enumerate(zip(old, new, strict=True)) if not _equal(*values)]
    if len(set(pairs)) == 1:
        return [f"{name}: {pairs[0][0]} → {pairs[0][1]}"] if differ else []
    labels = labels or range(len(pairs))
    return [f"{name} of group {labels[number]}: {pairs[number][0]} → {pairs[number][1]}" for number in differ]


def _changes_of_groups(
    prefix: str, names: Sequence[str], old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Lines for the settings of these names that groups of parameters have otherwise than before."""
    labels = [group.get("name", number) for number, group in enumerate(new)]
    return [
        line
        for name in names
        if all(name in group for group in (*old, *new))
        for line in _changes(f"{prefix}.{name}", [group[name] for group in old], [group[name] for group in new], labels)
    ]


def _changes_of_parameters(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines for settings of an optimizer that parameters in other groups have otherwise than before."""
    old, new = (
        {name: settings for names, settings in zip(each["parameters"], each["settings"], strict=True) for name in names}
        for each in (before, now)
    )
    found: Counter[str] = Counter()
    for parameter in new.keys() & old.keys():
        for name, value in new[parameter].items():
            if name not in (*_RATES, "name") and name in old[parameter] and not _equal(old[parameter][name], value):
                found[f"optimizer.{name}: {_shown(old[parameter][name])} → {_shown(value)}"] += 1
    return [f"{line}, of {number} parameters" for line, number in sorted(found.items())]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + " …" * (len(names) > 5)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Counter):  # milestones
        value = sorted(value.elements())
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_shown(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _changed_arguments(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines for the arguments of a scheduler that differ between two states of the same position."""
    lines: list[str] = []
    for key, value in new.items():
        if key in _MOVING or key not in old or (key.startswith("_") and key not in ("_schedulers", "_milestones")):
            continue
        if key == "_schedulers":
            if len(value) != len(old[key]):
                lines.append(f"{name}: {len(old[key])} schedulers → {len(value)} schedulers")
                continue
            for number, (before, now) in enumerate(zip(old[key], value, strict=True)):
                lines += _changed_arguments(f"{name}.{number}", before, now)
        elif not _equal(old[key], value):
            lines.append(f"{name}.{key.lstrip('_')}: {_shown(old[key])} → {_shown(value)}")
    return lines


def _needed_state(optimizer: Optimizer) -> dict[str, bool]:
    """Names in the state of a parameter that steps with the optimizer's hyperparameters read; True if they begin at 0.

    Found by a step on a parameter of zeros, without any influence on the optimizer of the training. Empty where that is
    not possible, such as for an optimizer of GPUs.
    """
    tried = nn.Parameter(torch.zeros(3, 3))
    tried.grad = torch.zeros(3, 3)
    try:
        trial = type(optimizer)([tried])  # type: ignore[call-arg]
        trial.param_groups[0].update(_without_parameters(optimizer.param_groups[0]))
        trial.step()
        state = trial.state[tried]
    except Exception:  # of optimizers with other arguments, or a closure
        return {}
    return {
        key: isinstance(value, Tensor) and value.shape == tried.shape and not bool(value.any())
        for key, value in state.items()
        if value is not None
    }
