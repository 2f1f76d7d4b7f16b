"""Lightning's W&B logger for jobs that are interrupted, and that nothing which happens to W&B can stop or slow down."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch.loggers as lightning_loggers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from harness.loggers.media import Media, copies
from harness.loggers.secrets import without_secrets
from harness.loggers.stand_ins import NoRun, StartingRun
from harness.loggers.summaries import axes_of
from harness.loggers.wandb_rows import STEP
from harness.loggers.wandb_run import WandbRun, plain
from harness.loggers.wandb_variables import mode, resume
from harness.support.warn import is_rank_zero

__all__ = ["WandbLogger"]

_LONGEST_TITLE = 63
"""Characters of an alert's title that W&B takes."""


class WandbLogger(lightning_loggers.WandbLogger):
    """Lightning's W&B logger, with every call into W&B on a thread of its own, and one run for a job that is restarted.

    The training hands values to a queue and never waits for W&B. Where W&B cannot start, fails or does not answer, one
    warning says so, and the training goes on without it: up to ``max_waiting`` calls wait, later ones are dropped. A
    run whose server cannot be reached is kept on disk. :meth:`finish` waits for the queue, up to a time limit. Until
    then all rows are in ``<save_dir>/wandb/rows.jsonl`` as well, written before they are handed over.

    The id of the run is kept in ``<save_dir>/wandb_run_id``: a job that was interrupted and is started again in the
    same directory continues that run, and values that the run already has are not logged again. Offline, each start
    makes a folder of its own with the same id; ``wandb sync <save_dir>/wandb`` uploads them as one run, in their order.

    :meth:`define_axes` ties values to the epoch or the step; :meth:`log_summary`, :meth:`log_table`,
    :meth:`log_bar_chart` and :meth:`alert` are W&B's, through the same queue.

    What is not given is as W&B's own variables say, such as ``WANDB_PROJECT`` and ``WANDB_RUN_ID``. In the mode
    ``disabled`` nothing is written and every call is ignored.

    Args:
        save_dir: output directory of the job; ``wandb/`` and the id of the run are in it.
        dir: folder of W&B's files, if they belong elsewhere; as ``WANDB_DIR`` elsewhere, ``wandb/`` is in it.
        offline: true keeps the run on disk, false uploads it; not given, ``WANDB_MODE`` says it, and without that
            variable a run is uploaded if W&B has a key.
        start_timeout: seconds that W&B may take to start.
        finish_timeout: seconds that :meth:`finish` waits for values to be written or uploaded.
        max_waiting: calls that wait for a W&B that is slower than the training.
        **options: the others of Lightning's logger and of ``wandb.init``, by name.
    """

    def __init__(
        self,
        save_dir: str | Path,
        *,
        dir: str | Path | None = None,
        offline: bool | None = None,
        start_timeout: float = 60.0,
        finish_timeout: float = 60.0,
        max_waiting: int = 5000,
        **options: Any,
    ) -> None:
        of_run = mode(options.pop("mode", None), offline)
        super().__init__(save_dir=save_dir, offline=of_run == "offline", **options)
        self._offline = False  # Lightning would set WANDB_MODE for this process and all that it starts
        files = save_dir if dir is None else Path(dir).expanduser()
        self._wandb_init |= {"mode": of_run, "resume": resume(options.get("resume")), "dir": str(files)}
        self.start_timeout = start_timeout
        self.finish_timeout = finish_timeout
        self.max_waiting = max_waiting
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)  # W&B warns of it even if it is None
        self._given_id = self._id
        self._run: WandbRun | None = None
        self._resumed_step: int | None = None
        self._last_step: int | None = None
        self._left_out: set[str] = set()
        self.reads_checkpoints = bool(self._log_model)
        """True if it takes checkpoint files as soon as they have been saved: they are not written in the background."""

    def __getstate__(self) -> dict[str, Any]:
        """State for another process, which has a run of its own."""
        return self.__dict__ | {"_experiment": None, "_run": None, "_resumed_step": None, "_last_step": None}

    # --- the run ---

    @property
    def experiment(self) -> Any:
        """The ``wandb.Run``. Reading an attribute of it waits until W&B has started, up to ``start_timeout``.

        Its methods run on the caller's thread, and can fail or hang as W&B does: use those of the logger where there is
        one. Off rank 0, and when W&B did not start, it is a dummy that takes every call.
        """
        if not is_rank_zero():
            return NoRun()
        run = self._begin()
        if isinstance(run, NoRun):
            return run
        return super().experiment if run.thread.is_current else StartingRun(run.wait)

    def _begin(self) -> WandbRun | NoRun:
        """The run, which starts now if it has not been started; a dummy if W&B is switched off."""
        if self._wandb_init["mode"] == "disabled":
            return NoRun()
        if self._run is None:
            self._run = WandbRun(
                Path(str(self.save_dir)),
                self._init,
                self._wandb_init,
                given_id=self._given_id,
                resumed_step=self._resumed_step,
                start_timeout=self.start_timeout,
                finish_timeout=self.finish_timeout,
                max_waiting=self.max_waiting,
            )
            self._run.begin()
        return self._run

    def _init(self) -> Any:
        """Call ``wandb.init`` as Lightning does."""
        self._id = self._wandb_init["id"]
        return cast(Any, super()).experiment

    @rank_zero_only
    def resume_from(self, step: int) -> None:
        """Continue the run of before, from a checkpoint of ``step`` optimizer steps.

        Rows that the run has of later steps stay in it, and are not logged again when that work is done again. Rows of
        earlier steps that it lacks, because the job was killed before W&B had written them, are logged now. Lost are
        values on a device that were still to be converted, and media other than tables of numbers and texts, bar
        charts, and images in files that are still the same. Call it before anything is logged.
        """
        if self._run is None:
            self._resumed_step = step
        self._begin()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values of a step, but for those that are left out."""
        kept = {key: value for key, value in metrics.items() if key not in self._left_out or not _is_nan(value)}
        self._log({key: _copied(value) for key, value in kept.items()}, step)

    def leave_out(self, names: Iterable[str]) -> None:
        """Leave values out as long as they are NaN, such as those of atom types that the data do not have.

        Args:
            names: of the values.
        """
        self._left_out.update(names)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Put settings into the run's config, without the secrets among them."""
        settings = without_secrets(vars(params) if isinstance(params, Namespace) else params)
        self._submit(lambda: super(WandbLogger, self).log_hyperparams(settings))

    @rank_zero_only
    def define_axes(self, epoch: Sequence[str], step: Sequence[str] = (), minimised: Sequence[str] = ()) -> None:
        """Define the axis of values: the epoch, or the optimizer step.

        The summary of a value is the last one; that of a value to be minimised is ``{"min": ..., "last": ...}`` over
        all starts of the run, where W&B's own minimum begins anew with each start and is NaN once a value is. Call it
        before the values are logged, in every start of a run; calling it again changes nothing.

        Args:
            epoch: names of values that are logged beside ``epoch``, as Lightning does with those of an epoch.
            step: names of values that are logged at a step.
            minimised: those among them whose minimum belongs in the summary.

        Raises:
            ValueError: a pattern instead of a name, or a name in ``minimised`` alone.
        """
        axes = axes_of(epoch, step, minimised, epoch_name=_prefixed(self, "epoch"), step_name=STEP)
        self._begin().define({_prefixed(self, name): axis for name, axis in axes.items()})

    @rank_zero_only
    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Put values that belong to the run as a whole into its summary."""
        given = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in values.items()}
        self._submit(lambda: self.experiment.summary.update({key: plain(value) for key, value in given.items()}))

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[Any] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Log a table: the names of its columns and its rows, or a data frame; and the epoch beside it.

        Numbers in the rows that are not finite are left empty.
        """
        self._log_media(key, Media.table(columns, data, dataframe), step, epoch)

    @rank_zero_only
    def log_bar_chart(
        self,
        key: str,
        labels: Sequence[str],
        values: Sequence[float],
        label_name: str = "name",
        value_name: str = "value",
        title: str = "",
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Log a bar chart; the table behind it is stored as ``<key>_table``.

        Args:
            key: name of the chart.
            labels: a label for each bar.
            values: their lengths; there is no bar for one that is not finite.
            label_name: name of the table's column of labels.
            value_name: name of its column of values.
            title: above the chart.
            step: optimizer step.
            epoch: logged beside it.

        Raises:
            ValueError: not as many labels as values.
        """
        self._log_media(key, Media.bar_chart(labels, values, label_name, value_name, title), step, epoch)

    @rank_zero_only
    def log_image(
        self, key: str, images: list[Any], step: int | None = None, epoch: int | None = None, **options: Any
    ) -> None:
        """Log images: paths, arrays, tensors or PIL images. A file is read soon after, by another thread.

        Args:
            key: name of the images.
            images: a list of them.
            step: optimizer step.
            epoch: logged beside them.
            **options: of ``wandb.Image``, such as ``caption``: a list each, with one for each image.

        Raises:
            TypeError: not a list.
            ValueError: an option that does not have one for each image.
        """
        self._log_media(key, Media.images(key, images, options), step, epoch)

    @rank_zero_only
    def alert(self, title: str, text: str) -> None:
        """Send a message through W&B, by mail or Slack as the user has set up there; a run on disk keeps it."""
        self._submit(lambda: self.experiment.alert(title[:_LONGEST_TITLE], text, level="WARN"))

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **options: Any) -> None:
        """Log sounds: paths or arrays."""
        self._log_files("log_audio", key, audios, step, options)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **options: Any) -> None:
        """Log videos: paths or arrays."""
        self._log_files("log_video", key, videos, step, options)

    def _log_files(self, method: str, key: str, items: list[Any], step: int | None, options: dict[str, Any]) -> None:
        given = copies(key, items, method)
        log = getattr(super(), method)
        at = self._step_of(step)
        self._submit(lambda: log(key, given, at, **options))

    def _log_media(self, key: str, media: Media, step: int | None, epoch: int | None) -> None:
        self._log({key: media} if epoch is None else {key: media, "epoch": epoch}, step)

    def _log(self, row: dict[str, Any], step: int | None) -> None:
        at = self._step_of(step)
        self._begin().log({_prefixed(self, key): value for key, value in row.items()}, at)

    def _step_of(self, step: int | None) -> int | None:
        """The step; without one that of the row before, as W&B does by itself in one start."""
        if step is not None:
            self._last_step = int(step)
        return self._last_step

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Log checkpoints as artifacts, if ``log_model`` asks for it."""
        if self._log_model:
            self._submit(lambda: super(WandbLogger, self).after_save_checkpoint(checkpoint_callback))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Log the checkpoints that are left; the run goes on until :meth:`finish`."""
        if self._run is None:
            return
        self._run.has_failed = status != "success"
        if self._log_model:
            self._submit(lambda: super(WandbLogger, self).finalize(status))

    @rank_zero_only
    def finish(self, exit_code: int | None = None) -> str | None:
        """End the run, waiting up to ``finish_timeout`` seconds for what has not been written or uploaded yet.

        Args:
            exit_code: not 0 for a run that has failed while its process goes on; W&B asks the process otherwise.

        Returns:
            Folder or address of the run; None if there is no run, or not all of it.
        """
        return None if self._run is None else self._run.finish(exit_code)

    @property
    def written_files(self) -> dict[str, str]:
        """Folder or address of a run that is complete, and the command that uploads a folder."""
        place = None if self._run is None or self._run.thread.is_lost else self._run.place
        if not place:
            return {}
        files = {"W&B run": place}
        if Path(place).is_dir():
            files["upload with"] = f"wandb sync {Path(place).parent}"
        return files

    # --- values ---

    def _submit(self, call: Callable[[], None]) -> None:
        self._begin().thread.submit(call)


def _prefixed(logger: WandbLogger, key: str) -> str:
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{key}" if logger._prefix else key


def _is_nan(value: Any) -> bool:
    """True for a NaN on the host; a tensor on a device is not asked, which would wait."""
    return isinstance(value, float) and math.isnan(value)


def _copied(value: Any) -> Any:
    """Copy of a value, which the training may change in place; a tensor on a device stays there: to fetch it waits."""
    if type(value) is Tensor and value.device.type == "cpu" and value.numel() == 1:
        return value.item()
    return value.detach().clone() if isinstance(value, Tensor) else value
