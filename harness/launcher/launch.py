"""Sweeps whose points are jobs of several ranks: ``hydra/launcher=torchrun``.

    python -m harness.train --multirun hydra/launcher=torchrun hydra.launcher.nproc_per_node=2 loss.coeffs.forces=1,10

Hydra composes in one process, which writes the resolved configuration of a point to a file and starts an agent of
torch's elastic launcher on it, in a process of its own. The agent starts the ranks; what came out of them is read from
``run.json`` and ``result.json`` in the directory of the point. This module is also what these processes run:

    python -m harness.launcher FILE                        # the agent of a point
    python -m harness.launcher SWEEP_DIR --node-rank 1     # the agents of another node, for each point as it comes
"""

from __future__ import annotations

import atexit
import json
import logging
import os
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
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, env_override, setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from harness.launcher.agent import _AGENT_TO_LEAVE, _ALIVE, _BEAT, _END, _FILES, _LOOK, _PARENT, _STALE, _agent, main
from harness.launcher.settings import Settings, SettingsError
from harness.runs import (
    COMPOSED,
    FAILED,
    TYPED,
    Command,
    Interrupted,
    PointFailedError,
    as_typed,
    finished_result,
    goes_on,
    label,
    note_failure,
    objective,
    point_name,
    read,
    typed,
)

__all__ = ["launch"]

log = logging.getLogger(__name__)
_LEAVE = 60.0  # for an agent to leave: its ranks get 30 s to save what they have
_TOLD_BY = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@dataclass
class _Point:
    """A point of the sweep, composed."""

    number: int
    name: str | None
    folder: Path
    command: Command
    config: DictConfig
    returns: JobReturn
    file: Path | None = None
    console: Path | None = None
    slot: dict[str, str] = field(default_factory=dict)
    started: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    """Variables that ``hydra.job.env_set`` gives to its ranks."""
    before: Mapping[str, Any] = field(default_factory=dict)
    """What its directory held of an earlier run."""

    @property
    def label(self) -> str:
        return label(self.number, self.name)


def launch(
    context: HydraContext, config: DictConfig, settings: Settings, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Run points of a sweep as jobs of several ranks, one after the other or side by side.

    Args:
        context: of Hydra, which composes.
        config: of the whole sweep.
        settings: how the ranks are started.
        job_overrides: the overrides of each point.
        first: number of the first of them.

    Returns:
        The objective of each point that has finished, an error for each that has failed, in order.

    Raises:
        PointFailedError: a point has failed, with ``fail_fast``.
        SystemExit: this process was told to leave, and all that it has started has left.
    """
    COMPOSED.set()
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    os.environ.setdefault(TYPED, json.dumps(typed()))
    sweep_dir = Path(str(config.hydra.sweep.dir)).absolute()
    on_cpus = OmegaConf.select(config, "trainer.accelerator") == "cpu"
    settings, slots = _slots(settings, [] if on_cpus else _visible_gpus(), _cores())
    if first == 0:
        _begin(sweep_dir)
    side_by_side = f", {len(slots)} side by side" if len(slots) > 1 else ""
    ranks = f"{settings.nproc_per_node} rank(s)" + (" on each node" if settings.node_range[1] > 1 else "")
    log.info(f"Launching {len(job_overrides)} point(s) of {ranks}{side_by_side}")

    waiting, free = deque(enumerate(job_overrides, start=first)), deque(slots)
    running: dict[subprocess.Popen[bytes], _Point] = {}
    returns: dict[int, JobReturn] = {}
    try:
        with _told_to_leave() as told:
            while (waiting or running) and not told:
                while waiting and free and not told:
                    number, overrides = waiting.popleft()
                    point = _composed(context, config, overrides, number)
                    returns[number] = point.returns
                    if point.returns.status == JobStatus.UNKNOWN:
                        point.slot = free.popleft()
                        running[_start(point, settings, sweep_dir, show=len(slots) == 1)] = point
                    elif point.returns.status == JobStatus.COMPLETED:
                        context.callbacks.on_job_end(config=point.config, job_return=point.returns)
                time.sleep(_LOOK if running else 0)
                for agent in [each for each in running if each.poll() is not None]:
                    point = running.pop(agent)
                    free.append(point.slot)
                    _finish(point, agent.returncode)
                    context.callbacks.on_job_end(config=point.config, job_return=point.returns)
                if settings.fail_fast and any(each.status == JobStatus.FAILED for each in returns.values()):
                    failed = next(each for each in returns.values() if each.status == JobStatus.FAILED)
                    raise PointFailedError(f"{failed._return_value}\nThe sweep ends here, since fail_fast is true.")
            if told:
                _leave(running, told)
    finally:
        _end(running)
    return [returns[number] for number in sorted(returns)]


def _begin(sweep_dir: Path) -> None:
    """Clear what a sweep before has left in the directory, and show to other nodes that this one is alive."""
    folder = sweep_dir / _FILES
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    ended = Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with suppress(OSError):
                (folder / _ALIVE).write_text(str(time.time()))

    def end() -> None:
        ended.set()
        with suppress(OSError):
            (folder / _END).touch()

    Thread(target=beat, name="sign of life of the sweep", daemon=True).start()
    atexit.register(end)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _visible_gpus() -> list[str]:
    """Those of this process, as ``CUDA_VISIBLE_DEVICES`` names them."""
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


def _composed(context: HydraContext, config: DictConfig, overrides: Sequence[str], number: int) -> _Point:
    """A point, with its directory and Hydra's files in it, as Hydra's own launcher would make it.

    It has failed already if it cannot be composed, and finished if that was done before and the sweep is to go on.
    """
    returns = JobReturn(overrides=list(overrides), working_dir=os.getcwd(), task_name=JobRuntime.instance().get("name"))
    point = _Point(number, None, Path(), Command(typed(), tuple(overrides), number), config, returns)
    before = HydraConfig.instance().cfg
    try:
        composed = context.config_loader.load_sweep_config(config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        HydraConfig.instance().set_config(composed)
        point.folder = Path(str(composed.hydra.sweep.dir), str(composed.hydra.sweep.subdir)).absolute()
        with read_write(composed.hydra.runtime), open_dict(composed.hydra.runtime):
            composed.hydra.runtime.output_dir = str(point.folder)
        HydraConfig.instance().set_config(composed)
        point.name = point_name()
        returns.hydra_cfg = cast(DictConfig, HydraConfig.instance().cfg)
        returns.cfg = deepcopy(composed)
        with read_write(returns.cfg), open_dict(returns.cfg):
            del returns.cfg["hydra"]
        returns.overrides = list(as_typed(composed.hydra.overrides.task))
        point.command = Command(typed(), tuple(returns.overrides), number)
        point.config = composed
        _write_hydra_files(point, returns)
        point.environment = cast(dict[str, Any], OmegaConf.to_container(_settled(composed.hydra.job.env_set)))
        with env_override({key: str(value) for key, value in composed.hydra.job.env_set.items()}):
            context.callbacks.on_job_start(config=composed, task_function=_job())
            returns.cfg = _settled(returns.cfg)
    except (HydraException, OmegaConfBaseException, OSError) as error:
        _fail(point, f"{type(error).__name__}: {error}")
        return point
    finally:
        HydraConfig.instance().cfg = before
    result = finished_result(point.folder, point.command) if goes_on(returns.cfg) else None
    if result:
        log.info(f"\t{point.label}: finished before, in {point.folder}")
        returns.return_value, returns.status = objective(returns.cfg, result["values"]), JobStatus.COMPLETED
    return point


def _job() -> Any:
    from harness.train import run_job

    return run_job


def _write_hydra_files(point: _Point, returns: JobReturn) -> None:
    subdir = point.config.hydra.output_subdir
    point.folder.mkdir(parents=True, exist_ok=True)
    if subdir is None:
        return
    (point.folder / subdir).mkdir(exist_ok=True)
    contents = {"config": returns.cfg, "hydra": returns.hydra_cfg, "overrides": point.config.hydra.overrides.task}
    for name, content in contents.items():
        (point.folder / subdir / f"{name}.yaml").write_text(OmegaConf.to_yaml(content))


def _settled(config: DictConfig) -> DictConfig:
    """Values as all ranks are to see them. What is made of their number, or of the environment, stays as it is written.

    The environment of another node may differ, and its secrets must not get into a file.
    """
    from harness.config.resolvers import register_resolvers

    asked: list[None] = []
    register_resolvers(lambda: asked.append(None))
    try:
        return OmegaConf.create(_plain(config, asked))
    finally:
        register_resolvers()


def _plain(config: DictConfig | ListConfig, asked: list[None]) -> Any:
    def value(key: Any) -> Any:
        node: Any = config._get_node(key)
        if node._is_none() or node._is_missing():
            return node._value()
        if not node._is_interpolation():
            return _plain(node, asked) if OmegaConf.is_config(node) else node._value()
        asked.clear()
        found = config[key]
        if OmegaConf.is_config(found):
            found = OmegaConf.to_container(found, resolve=True)
        return node._value() if asked else _literal(found)

    if isinstance(config, DictConfig):
        return {key: value(key) for key in config}
    return [value(index) for index in range(len(config))]


def _literal(value: Any) -> Any:
    """Such that it is not resolved once more."""
    if isinstance(value, dict):
        return {key: _literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_literal(each) for each in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _start(point: _Point, settings: Settings, sweep_dir: Path, show: bool) -> subprocess.Popen[bytes]:
    """Write the file of a point, and start its agent."""
    hydra = point.config.hydra
    content = {
        "number": point.number,
        "folder": str(point.folder),
        "typed": list(point.command.typed),
        "overrides": list(point.command.overrides),
        "settings": asdict(settings),
        "environment": {"OMP_NUM_THREADS": point.slot["OMP_NUM_THREADS"], **point.environment},
        "chdir": bool(hydra.job.chdir),
        "job_logging": OmegaConf.to_container(hydra.job_logging, resolve=True) if hydra.job_logging else None,
        "config": OmegaConf.to_container(point.returns.cfg),
    }
    point.file = sweep_dir / _FILES / f"{point.number}.yaml"
    part = point.file.with_suffix(".part")
    OmegaConf.save(OmegaConf.create(content), part)
    os.replace(part, point.file)
    environment = {key: value for key, value in os.environ.items() if key not in _STALE}
    # kills ranks that are stopped; see launch/env/gloo.sh
    environment.setdefault("TORCHELASTIC_ENABLE_FILE_TIMER", "1")
    environment |= {**point.slot, **{str(key): str(value) for key, value in hydra.job.env_set.items()}}
    environment[_PARENT] = str(os.getpid())
    point.before = read(point.folder)
    point.started = time.monotonic()
    if show:
        log.info(f"\t{point.label}: starts")
        sys.stdout.flush()
        return subprocess.Popen(_agent(point.file), env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    point.console = point.folder / "console.log"
    log.info(f"\t{point.label}: starts, and writes to {point.console}")
    with point.console.open("ab") as console:
        return subprocess.Popen(
            _agent(point.file),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _finish(point: _Point, code: int) -> None:
    """What came out of a point whose agent has ended."""
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
        what = "its ranks were told to leave"
    else:
        what = f"its agent was killed by signal {-code}" if code < 0 else f"its agent ended with exit code {code}"
        note_failure(point.folder, point.command, what, has_begun=bool(state))
    _fail(point, what)


def _shown(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.4g}"


def _fail(point: _Point, what: str) -> None:
    where = f"\n(what its ranks have said: {point.console})" if point.console else ""
    print(f"\nerror: {point.label} failed: {what}{where}", file=sys.stderr, flush=True)
    FAILED.append(point.label)
    if point.folder != Path():
        with suppress(OSError):
            if read(point.folder).get("state") != "failed" and point.file is None:
                note_failure(point.folder, point.command, what)
    point.returns.return_value = PointFailedError(f"{point.label} failed: {what}")
    point.returns.status = JobStatus.FAILED


@contextmanager
def _told_to_leave() -> Iterator[list[signal.Signals]]:
    """A list that signals put themselves into, which would otherwise end this process and leave its agents behind."""
    told: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(signal.Signals(number))
        if len(told) > 1:
            raise KeyboardInterrupt  # whoever says it twice does not want to wait

    before: dict[signal.Signals, Any] = {}
    for each in (signal.Signals[name] for name in _TOLD_BY if hasattr(signal, name)):
        if signal.getsignal(each) in (signal.SIG_IGN, None):  # as nohup has it; None: somebody else's
            continue
        with suppress(ValueError):  # Python gives signals to the main thread alone
            before[each] = signal.signal(each, note)
    try:
        yield told
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _leave(running: dict[subprocess.Popen[bytes], _Point], told: Sequence[signal.Signals]) -> None:
    _end(running)
    print(f"\nstopped: {told[0].name} came. The same command with resume=auto goes on.", flush=True)
    if told[0] == signal.SIGINT:
        raise Interrupted
    sys.exit(_AGENT_TO_LEAVE)


def _end(running: dict[subprocess.Popen[bytes], _Point]) -> None:
    """End all agents, and with them their ranks, which save where they are. None of them is left."""
    try:
        for agent in running:
            agent.terminate()
        deadline = time.monotonic() + _LEAVE
        for agent in running:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(max(deadline - time.monotonic(), 0.0))
    finally:
        for agent in running:
            if agent.poll() is None:
                agent.kill()  # its ranks end with it, see _end_with_parent
            agent.wait()
        running.clear()


if __name__ == "__main__":
    main()
