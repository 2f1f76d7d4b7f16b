"""Sweeps whose points are jobs of several ranks: ``hydra/launcher=torchrun``.

    python -m harness.train --multirun hydra/launcher=torchrun hydra.launcher.nproc_per_node=2 loss.coeffs.forces=1,10

A point is the command that a user would type: the process of the sweep writes its arguments to a file and starts an
agent of torch's elastic launcher on it, in a process of its own, which starts ``python -m harness.train`` with them on
every rank, as torchrun does. The result is read from ``run.json`` and ``result.json`` in the directory of the point.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from omegaconf.resolvers import oc

from harness.launcher.agent import (
    ALIVE,
    BEAT,
    END,
    FILES,
    POLL,
    PointFile,
    agent_command,
    agent_environment,
)
from harness.launcher.settings import Settings, SettingsError
from harness.runs import (
    POINT,
    REQUEUE_EXIT_CODE,
    RUN_STAMP,
    Command,
    Interrupted,
    PointFailedError,
    SweepPoint,
    as_typed,
    config_options,
    current_session,
    finished_result,
    goes_on,
    label,
    note_failure,
    objective,
    point_name,
    read,
    typed,
)
from harness.support.files import write_text_whole

__all__ = ["launch"]

log = logging.getLogger(__name__)
_END_LIMIT = 60.0  # seconds for an agent to end: its ranks get 30 s to save
_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@dataclass
class _Point:
    """A point of the sweep, composed."""

    number: int
    name: str | None
    folder: Path
    command: Command
    config: DictConfig
    returns: JobReturn
    variables: Mapping[str, str] = field(default_factory=dict)
    """Variables of ``hydra.job.env_set``, see :func:`_variables`."""
    file: Path | None = None
    console: Path | None = None
    slot: dict[str, str] = field(default_factory=dict)
    """Environment of the place where it runs: its GPUs, and the threads of a rank."""
    started: float = 0.0
    before: Mapping[str, Any] = field(default_factory=dict)
    """Record of an earlier run in its directory."""
    failure: str | None = None

    @property
    def label(self) -> str:
        return label(self.number, self.name)


def launch(
    context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    settings: Settings,
    job_overrides: Sequence[Sequence[str]],
    first: int,
) -> list[JobReturn]:
    """Run points of a sweep as jobs of several ranks, one after the other or side by side.

    Args:
        context: of Hydra, which composes.
        task_function: the job, for callbacks of Hydra's.
        config: of the whole sweep.
        settings: how the ranks are started.
        job_overrides: the overrides of each point.
        first: number of the first of them.

    Returns:
        The objective of each point that has finished, an error for each that has failed, in order.

    Raises:
        PointFailedError: a point has failed, with ``fail_fast``.
        SystemExit: this process was asked to stop, and all that it has started has ended.
    """
    current_session().has_composed = True
    folder = Path(str(config.hydra.sweep.dir)).absolute()
    on_cpus = OmegaConf.select(config, "trainer.accelerator") == "cpu"
    settings, slots = _slots(settings, [] if on_cpus else _visible_gpus(), _cores())
    if first == 0:
        _begin(folder)
    side_by_side = f", {len(slots)} side by side" if len(slots) > 1 else ""
    ranks = f"{settings.nproc_per_node} rank(s)" + (" on each node" if settings.node_range[1] > 1 else "")
    log.info(f"Launching {len(job_overrides)} point(s) of {ranks}{side_by_side}")

    waiting, free = deque(enumerate(job_overrides, start=first)), deque(slots)
    running: dict[subprocess.Popen[bytes], _Point] = {}
    returns: dict[int, JobReturn] = {}
    failures: list[str] = []
    try:
        with _stop_signals() as received:
            while (waiting or running) and not received:
                while waiting and free and not received:
                    number, overrides = waiting.popleft()
                    point = _composed(context, task_function, config, overrides, number)
                    returns[number] = point.returns
                    failures += [point.failure] if point.failure else []
                    if point.returns.status == JobStatus.UNKNOWN:
                        point.slot = free.popleft()
                        running[_start(point, settings, folder, show=len(slots) == 1)] = point
                    elif point.returns.status == JobStatus.COMPLETED:
                        context.callbacks.on_job_end(config=point.config, job_return=point.returns)
                time.sleep(POLL if running else 0)
                for agent in [process for process in running if process.poll() is not None]:
                    point = running.pop(agent)
                    free.append(point.slot)
                    _finish(point, agent.returncode)
                    failures += [point.failure] if point.failure else []
                    context.callbacks.on_job_end(config=point.config, job_return=point.returns)
                if settings.fail_fast and failures:
                    raise PointFailedError(f"{failures[0]}\nThe sweep ends here, since fail_fast is true.")
            if received:
                _stop(running, received)
    finally:
        _end(running)
    return [returns[number] for number in sorted(returns)]


def _begin(folder: Path) -> None:
    """Clear what an earlier sweep has left in the directory, and show to other nodes that this one is alive."""
    files = folder / FILES
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir(parents=True, exist_ok=True)
    ended = Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):
                (files / ALIVE).write_text(str(time.time()))

    def end() -> None:
        ended.set()
        with suppress(OSError):
            (files / END).touch()

    Thread(target=beat, name="sign of life of the sweep", daemon=True).start()
    atexit.register(end)


def _cores() -> int:
    """Number of cores that this process may use; of all cores where the system does not restrict it."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _visible_gpus() -> list[str]:
    """GPUs of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [each.strip() for each in given.split(",")] if given else list(map(str, range(number)))
    return names[:number]  # CUDA leaves out the first that is not there, and all that follow


def _slots(settings: Settings, gpus: Sequence[str], cores: int) -> tuple[Settings, list[dict[str, str]]]:
    """Settings with numbers instead of ``auto``, and the environment of each place where a point can run.

    Raises:
        SettingsError: there are not enough GPUs.
    """
    ranks = settings.nproc_per_node if isinstance(settings.nproc_per_node, int) else max(1, len(gpus))
    most = settings.node_range[1]
    fit = 1 if most > 1 else max(1, (len(gpus) if gpus else cores) // ranks)
    number = settings.parallel if isinstance(settings.parallel, int) else fit
    if gpus and number * ranks > len(gpus):
        raise SettingsError(
            f"hydra.launcher: {number} point(s) of {ranks} rank(s) side by side need {number * ranks} GPUs, found "
            f"{len(gpus)}. Use parallel=auto, fewer ranks (nproc_per_node), or trainer.accelerator=cpu."
        )
    threads = settings.omp_num_threads or os.environ.get("OMP_NUM_THREADS") or max(1, cores // (ranks * number))
    slots = [{"OMP_NUM_THREADS": str(threads)} for _ in range(number)]
    if gpus and number > 1:
        for index, slot in enumerate(slots):
            slot["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * ranks : (index + 1) * ranks])
    return replace(settings, nproc_per_node=ranks, parallel=number), slots


def _composed(
    context: HydraContext, task_function: TaskFunction, config: DictConfig, overrides: Sequence[str], number: int
) -> _Point:
    """Compose a sweep point: its directory, its name, and the arguments of its ranks.

    It has failed already if it cannot be composed, and finished if that was done before and the sweep is to go on.
    """
    returns = JobReturn(overrides=list(overrides), working_dir=os.getcwd(), task_name=JobRuntime.instance().get("name"))
    point = _Point(number, None, Path(), Command(typed(), tuple(overrides), number), config, returns)
    before = HydraConfig.instance().cfg
    numbered = [*overrides, f"hydra.job.num={number}", f"hydra.job.id='{number}'"]
    try:
        composed = context.config_loader.load_sweep_config(config, numbered)
        HydraConfig.instance().set_config(composed)
        point.folder = Path(str(composed.hydra.sweep.dir), str(composed.hydra.sweep.subdir)).absolute()
        with read_write(composed.hydra.runtime), open_dict(composed.hydra.runtime):
            composed.hydra.runtime.output_dir = str(point.folder)
        HydraConfig.instance().set_config(composed)
        point.config, point.name = composed, point_name()
        returns.hydra_cfg, returns.cfg = cast(DictConfig, HydraConfig.instance().cfg), deepcopy(composed)
        with read_write(returns.cfg), open_dict(returns.cfg):
            del returns.cfg["hydra"]
        point.variables = _variables(composed)
        returns.overrides = list(as_typed(composed.hydra.overrides.task))
        point.command = Command(typed(), tuple(returns.overrides), number)
        point.folder.mkdir(parents=True, exist_ok=True)
        context.callbacks.on_job_start(config=composed, task_function=task_function)
        result = finished_result(point.folder, point.command) if goes_on(returns.cfg) else None
        if result:
            log.info(f"\t{point.label}: finished before, in {point.folder}")
            returns.return_value, returns.status = objective(returns.cfg, result["values"]), JobStatus.COMPLETED
    except (HydraException, OmegaConfBaseException, OSError) as error:
        _fail(point, f"{type(error).__name__}: {error}")
    finally:
        HydraConfig.instance().cfg = before
    return point


def _variables(composed: DictConfig) -> dict[str, str]:
    """Variables of ``hydra.job.env_set`` that refer to settings outside of ``hydra``, which Hydra cannot resolve.

    Their values are resolved but for ``${oc.env:...}``, which may be a secret, and differ on other nodes.
    """
    found, alone = {}, deepcopy(cast(DictConfig, HydraConfig.instance().cfg))  # as Hydra makes it
    OmegaConf.register_new_resolver("oc.env", _as_written, replace=True)
    try:
        for name in composed.hydra.job.env_set:
            try:
                alone.hydra.job.env_set[name]
            except InterpolationResolutionError:
                found[str(name)] = str(composed.hydra.job.env_set[name])
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return found


def _as_written(*arguments: Any) -> str:
    return f"${{oc.env:{','.join('null' if each is None else _quoted(str(each)) for each in arguments)}}}"


def _arguments(point: _Point) -> list[str]:
    """Arguments of ``python -m harness.train`` for the ranks of a sweep point.

    The overrides of the point as Hydra has them, those of ``hydra.launcher`` and ``hydra.sweep`` too, since values may
    refer to them; after them what makes a run of the point. Callbacks of Hydra's have been called by the sweep.
    """
    hydra, (options, _) = point.config.hydra, config_options(point.command.typed)
    if "config_dir" in options:
        options["config_dir"] = str(Path(options["config_dir"]).absolute())
    run = {
        "hydra.mode": "RUN",
        "hydra.run.dir": quoted(str(point.folder)),
        "hydra.sweep.dir": quoted(str(Path(str(hydra.sweep.dir)).absolute())),
        **{f"hydra.job.env_set.{name}": _quoted(value, '"') for name, value in point.variables.items()},
    }
    return [
        *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()),
        *as_typed(hydra.overrides.hydra),
        *as_typed(hydra.overrides.task),
        *(f"{name}={value}" for name, value in run.items()),
        *(f"~hydra.callbacks.{name}" for name in hydra.callbacks),
    ]


def quoted(text: str) -> str:
    """Text as a quoted value of an override, in which nothing has a meaning for Hydra or OmegaConf."""
    return _quoted(text).replace("${", "\\${")


def _quoted(text: str, mark: str = "'") -> str:
    """Text between quotation marks, in which only interpolations have a meaning."""
    escaped = re.sub(rf"(\\*)(?={mark}|$)", r"\1\1", text)  # backslashes before a quotation mark
    return mark + escaped.replace(mark, f"\\{mark}") + mark


def _start(point: _Point, settings: Settings, folder: Path, show: bool) -> subprocess.Popen[bytes]:
    """Write the file of a sweep point, and start its agent."""
    described = SweepPoint(point.number, point.name, str(folder), point.command.typed)
    shared = {POINT: described.to_json(), "OMP_NUM_THREADS": point.slot["OMP_NUM_THREADS"]}
    content = PointFile(
        number=point.number,
        folder=str(point.folder),
        typed=point.command.typed,
        overrides=point.command.overrides,
        arguments=_arguments(point),
        environment={**shared, RUN_STAMP: os.environ[RUN_STAMP]} if RUN_STAMP in os.environ else shared,
        settings=asdict(settings),
    )
    point.file = folder / FILES / f"{point.number}.json"
    write_text_whole(point.file, content.to_json())
    point.before = read(point.folder)
    point.started = time.monotonic()
    options: dict[str, Any] = {"env": agent_environment(**point.slot), "stdin": subprocess.DEVNULL}
    if show:
        log.info(f"\t{point.label}: starts")
        sys.stdout.flush()
        return subprocess.Popen(agent_command(point.file), start_new_session=True, **options)
    point.console = point.folder / "console.log"
    log.info(f"\t{point.label}: starts, and writes to {point.console}")
    with point.console.open("ab") as console:
        options |= {"stdout": console, "stderr": subprocess.STDOUT}
        return subprocess.Popen(agent_command(point.file), start_new_session=True, **options)


def _finish(point: _Point, code: int) -> None:
    """Read the result of a sweep point whose agent has ended, and set its ``JobReturn``."""
    seconds = time.monotonic() - point.started
    if point.file:  # nodes that join later have nothing to do with it
        os.replace(point.file, point.file.with_suffix(".done"))
    state = read(point.folder)
    if state == point.before:  # it has written nothing
        state = {}
    if code == 0 and state.get("state") == "finished":
        values = read(point.folder, "result.json").get("values", {})
        config = point.returns.cfg or point.config
        point.returns.return_value, point.returns.status = objective(config, values), JobStatus.COMPLETED
        shown = ", ".join(f"{key} {_shown(values.get(key))}" for key in config.get("objectives") or [config.monitor])
        log.info(f"\t{point.label}: finished in {seconds:.0f} s, {shown}")
        return
    if state.get("state") == "failed":
        what = str(state.get("error"))
    elif state.get("state") in ("preempted", "interrupted"):
        what = "its ranks were asked to stop"
    else:
        what = f"its agent was killed by signal {-code}" if code < 0 else f"its agent ended with exit code {code}"
        note_failure(point.folder, point.command, what, has_begun=bool(state))
    _fail(point, what)


def _shown(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.4g}"


def _fail(point: _Point, what: str) -> None:
    """Report that a sweep point has failed, and record it."""
    where = f"\n(output of its ranks: {point.console})" if point.console else ""
    print(f"\nerror: {point.label} failed: {what}{where}", file=sys.stderr, flush=True)
    current_session().failed.append(point.label)
    if point.folder != Path():
        with suppress(OSError):
            if read(point.folder).get("state") != "failed" and point.file is None:
                note_failure(point.folder, point.command, what)
    point.failure = f"{point.label} failed: {what}"
    point.returns.return_value = PointFailedError(point.failure)
    point.returns.status = JobStatus.FAILED


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """List of the signals received, which would otherwise end this process and leave its agents behind."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if len(received) > 1:
            raise KeyboardInterrupt  # the second signal does not wait

    before: dict[signal.Signals, Any] = {}
    for number in (signal.Signals[name] for name in _STOP_SIGNALS if hasattr(signal, name)):
        if signal.getsignal(number) in (signal.SIG_IGN, None):  # as nohup has it; None: somebody else's
            continue
        with suppress(ValueError):  # Python gives signals to the main thread alone
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(running: dict[subprocess.Popen[bytes], _Point], received: Sequence[signal.Signals]) -> None:
    _end(running)
    print(f"\nstopped: {received[0].name} came. The same command with resume=auto goes on.", flush=True)
    if received[0] == signal.SIGINT:
        raise Interrupted
    sys.exit(REQUEUE_EXIT_CODE)


def _end(running: dict[subprocess.Popen[bytes], _Point]) -> None:
    """End all agents, and with them their ranks, which save their state; returns when all have ended."""
    try:
        for agent in running:
            agent.terminate()
        deadline = time.monotonic() + _END_LIMIT
        for agent in running:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(max(deadline - time.monotonic(), 0.0))
    finally:
        for agent in running:
            if agent.poll() is None:
                agent.kill()  # its ranks end with it, see end_with_parent
            agent.wait()
        running.clear()
