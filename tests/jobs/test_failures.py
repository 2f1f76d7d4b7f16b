"""Trainings that are killed, stopped and continued end as the undisturbed one: bitwise, on the same number of ranks."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.commands import BIN, ROOT, TINY, Finished, kill_tree, read_csv, run, same, started, train, wait_for

TESTS = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
# 16 frames in batches of 4: 4 steps in each of 3 epochs; the learning rate is halved after the second
ARGUMENTS = (
    *TINY,
    "max_epochs=3",
    "data.dtype=float64",
    "trainer.precision=64-true",
    "trainer.log_every_n_steps=1",
    "train_metrics=${metrics}",
    "lr_scheduler=plateau",
    "lr_scheduler.scheduler.patience=0",
    "+lr_scheduler.scheduler.threshold=1e9",
    "callbacks=[default,ema]",
    "callbacks.ema.decay=0.7",
    "+callbacks.noise._target_=support.failure_callbacks.Noise",
    "+callbacks.weights={_target_: support.failure_callbacks.WeightsAtEnd, path: '${output_dir}/weights.pt'}",
    "trainer.enable_progress_bar=false",
    "logger=csv",
    "resume=auto",
)


def signal_at(step: int, name: str, folder: Path, ranks: str = "null") -> str:
    return (
        f"+callbacks.fault={{_target_: support.failure_callbacks.SignalAt, step: {step}, name: {name}, ranks: {ranks}, "
        f"marker: {folder}/done}}"
    )


def under_torchrun(*overrides: str, folder: Path, ranks: int = 2, restarts: int = 0) -> Finished:
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    return run([*launcher, "-m", "harness.train", *ARGUMENTS, *overrides], folder, **TESTS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of the training on two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = under_torchrun(folder=folder)
    assert done.code == 0, done.err[-4000:]
    return done.runs[0]


def assert_same_run(found: Path, expected: Path, tolerance: float = 0.0) -> None:
    """Every logged value of every step and epoch, the test metrics, and the weights."""
    rows, wanted = read_csv(found), read_csv(expected)
    assert len(wanted) > 20
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        for key in row:
            assert same(row[key], other[key], tolerance), (key, row["step"], row[key], other[key])
    weights, others = torch.load(found / "weights.pt"), torch.load(expected / "weights.pt")
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_kill_9_of_one_rank_under_torchrun(undisturbed: Path, tmp_path: Path) -> None:
    done = under_torchrun(signal_at(6, "SIGKILL", tmp_path, "[1]"), folder=tmp_path, restarts=1)
    assert done.code == 0, done.err[-4000:]
    assert (tmp_path / "done.1").is_file()
    (folder,) = done.runs  # the restarted ranks write to the same directory
    assert f"goes on from {folder}/checkpoints/last.ckpt" in done.out
    assert_same_run(folder, undisturbed)


def test_kill_9_after_a_checkpoint_within_an_epoch(undisturbed_alone: Path, tmp_path: Path) -> None:
    """The log has every step that the checkpoint has."""
    command = [*ARGUMENTS, "callbacks.last.every_n_steps=3", signal_at(7, "SIGKILL", tmp_path)]
    killed = train(*command, folder=tmp_path, **TESTS)
    assert killed.code == -signal.SIGKILL
    again = train(*command, folder=tmp_path, **TESTS)
    assert again.code == 0, again.err[-3000:]
    (folder,) = again.runs
    assert f"goes on from {folder}/checkpoints/last.ckpt" in again.out
    assert_same_run(folder, undisturbed_alone)


@pytest.mark.slow
def test_kill_9_of_the_whole_job(undisturbed: Path, tmp_path: Path) -> None:
    fault = signal_at(9, "SIGKILL", tmp_path)
    killed = under_torchrun(fault, folder=tmp_path)
    assert killed.code != 0
    (folder,) = killed.runs
    assert '"running"' in (folder / "run.json").read_text()
    again = under_torchrun(fault, folder=tmp_path)
    assert again.code == 0, again.err[-4000:]
    assert again.runs == [folder]
    assert f"goes on from {folder}/checkpoints/last.ckpt" in again.out
    assert_same_run(folder, undisturbed)
    assert '"finished"' in (folder / "run.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("told", ["[1]", "null"])
def test_sigterm_saves_within_the_step_and_the_same_command_goes_on(
    told: str, undisturbed: Path, tmp_path: Path
) -> None:
    """Ranks started one by one, so that each one's exit code is seen."""
    arguments = [*ARGUMENTS, signal_at(6, "SIGTERM", tmp_path, told)]
    with started(*arguments, folder=tmp_path, ranks=2, **TESTS) as processes:
        codes = [process.wait(timeout=120) for process in processes]
    said = (tmp_path / "stdout.0").read_text()
    assert codes == [75, 75], (tmp_path / "stderr.0").read_text()[-3000:]
    (folder,) = sorted(tmp_path.glob("outputs/*/*"))
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 7  # the signal came within step 7, number 6 from 0
    assert saved["epoch"] == 1
    assert "saved step 7 of epoch 1" in said
    assert '"preempted"' in (folder / "run.json").read_text()
    with started(*arguments, folder=tmp_path, ranks=2, **TESTS) as processes:
        codes = [process.wait(timeout=120) for process in processes]
    assert codes == [0, 0], (tmp_path / "stderr.0").read_text()[-3000:]
    assert f"goes on from {folder}/checkpoints/last.ckpt" in (tmp_path / "stdout.0").read_text()
    assert_same_run(folder, undisturbed)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Two ranks that left in their second epoch, without noise: the folder, a copy of it, and the overrides."""
    folder = tmp_path_factory.mktemp("left")
    overrides = [signal_at(5, "SIGTERM", folder), "callbacks.noise=null"]
    stopped = under_torchrun(*overrides, folder=folder / "stopped")
    assert stopped.code != 0
    assert "exitcode  : 75" in stopped.err
    shutil.copytree(folder, folder.parent / "copy of left")
    return folder, folder.parent / "copy of left", overrides


@pytest.fixture(scope="module")
def without_noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of that training where nobody leaves."""
    whole = under_torchrun("callbacks.noise=null", folder=tmp_path_factory.mktemp("whole"))
    assert whole.code == 0, whole.err[-4000:]
    return whole.runs[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_restart_on_another_number_of_ranks(
    ranks: int, left: tuple[Path, Path, list[str]], without_noise: Path
) -> None:
    place, copy, overrides = left
    shutil.rmtree(place)
    shutil.copytree(copy, place)  # as the ranks have left it, under its own paths
    again = under_torchrun(*overrides, folder=place / "stopped", ranks=ranks)
    assert again.code == 0, again.err[-4000:]
    (folder,) = again.runs
    assert "goes on from" in again.out
    assert_same_run(folder, without_noise, 1e-9)


@pytest.mark.slow
def test_sigterm_to_torchrun(undisturbed: Path, tmp_path: Path) -> None:
    """As a scheduler does it: the agent gets the signal and hands it on."""
    slow = "+callbacks.slow={_target_: support.failure_callbacks.Slow, seconds: 0.3}"
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "harness.train", *ARGUMENTS, slow]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **TESTS}
        agent = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: list(tmp_path.glob("outputs/*/*/checkpoints/last.ckpt")), 90, "the first epoch")
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(timeout=60) != 0
        finally:
            if agent.poll() is None:
                kill_tree(agent.pid)
            agent.wait()
    (folder,) = sorted(tmp_path.glob("outputs/*/*"))
    assert '"preempted"' in (folder / "run.json").read_text(), (tmp_path / "log").read_text()[-3000:]
    done = run(command, tmp_path, **TESTS)
    assert done.code == 0, done.err[-4000:]
    assert "goes on from" in done.out
    assert_same_run(folder, undisturbed)


# --- files ---


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run on one rank that was killed in its third epoch, and its command."""
    folder = tmp_path_factory.mktemp("stopped")
    command = [sys.executable, "-m", "harness.train", *ARGUMENTS, signal_at(9, "SIGKILL", folder)]
    killed = run(command, folder, **TESTS)
    assert killed.code == -signal.SIGKILL, killed.err[-4000:]
    return folder, command


@pytest.fixture(scope="module")
def undisturbed_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = train(*ARGUMENTS, folder=tmp_path_factory.mktemp("alone"), **TESTS)
    assert done.code == 0, done.err[-4000:]
    return done.runs[0]


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def one_bit_flipped(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:  # in a tensor: between the files of the archive are bytes of no meaning
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 30 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [pytest.param(truncated, marks=pytest.mark.slow), one_bit_flipped, pytest.param(emptied, marks=pytest.mark.slow)],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: object, stopped: tuple[Path, list[str]], undisturbed_alone: Path, tmp_path: Path
) -> None:
    source, command = stopped
    shutil.copytree(source, tmp_path / "copy")
    (folder,) = (tmp_path / "copy").glob("outputs/*/*")
    checkpoints = folder / "checkpoints"
    steps = [
        torch.load(checkpoints / f"{name}.ckpt", weights_only=True)["global_step"] for name in ("previous", "last")
    ]
    assert steps == [4, 8]
    damage(checkpoints / "last.ckpt")  # type: ignore[operator]
    moved = [part.replace(str(source), str(tmp_path / "copy")) for part in command]
    record = folder / "run.json"
    record.write_text(record.read_text().replace(str(source), str(tmp_path / "copy")))
    done = run(moved, tmp_path / "copy", **TESTS)
    assert done.code == 0, done.err[-4000:]
    (warning,) = [line for line in done.err.splitlines() if "is damaged" in line]
    assert f"{checkpoints}/last.ckpt" in warning
    assert f"{checkpoints}/previous.ckpt" in warning
    assert f"goes on from {checkpoints}/previous.ckpt" in done.out
    assert_same_run(folder, undisturbed_alone)


@pytest.mark.slow
def test_kill_9_while_a_checkpoint_is_written(undisturbed_alone: Path, tmp_path: Path) -> None:
    """Onto another file system than that of temporary files."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    folder = elsewhere / f"harness-{os.getpid()}"
    ballast = "+callbacks.ballast={_target_: support.failure_callbacks.Ballast, megabytes: 400}"
    command = [*ARGUMENTS, ballast, "callbacks.best=null"]
    try:
        with started(*command, folder=folder, ranks=1, **TESTS) as (process,):
            wait_for(lambda: list(folder.glob("outputs/*/*/checkpoints/last.ckpt")), 120, "the first checkpoint")

            def half_written() -> list[Path]:
                parts = folder.glob("outputs/*/*/checkpoints/.next.ckpt.*.part")
                return [part for part in parts if 10 * 2**20 < part.stat().st_size < 380 * 2**20]

            wait_for(half_written, 120, "a checkpoint that is being written")
            process.kill()
            process.wait()
        (run_folder,) = folder.glob("outputs/*/*")
        left = sorted(path.name for path in (run_folder / "checkpoints").iterdir())
        assert any(name.endswith(".part") for name in left), left
        with started(*command, folder=folder, ranks=1, **TESTS) as (process,):
            assert process.wait(timeout=180) == 0, (folder / "stderr.0").read_text()[-3000:]
        assert "damaged" not in (folder / "stderr.0").read_text()
        assert not list((run_folder / "checkpoints").glob(".*"))  # what was torn is gone
        assert_same_run(run_folder, undisturbed_alone)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder]).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_while_checkpoints_are_written(small_disk: Path, undisturbed_alone: Path, tmp_path: Path) -> None:
    ballast = "+callbacks.ballast={_target_: support.failure_callbacks.Ballast, megabytes: 1}"
    done = train(*ARGUMENTS, ballast, f"hydra.run.dir={small_disk}/run", folder=tmp_path / "job", **TESTS)
    assert done.code == 0, done.err[-4000:]
    (warning,) = [line for line in done.err.splitlines() if "cannot be written" in line]
    assert "No space left on device" in warning
    assert ".ckpt" in warning
    assert_same_run(small_disk / "run", undisturbed_alone)


# --- who may write ---


@pytest.mark.slow
def test_two_jobs_cannot_share_a_directory(tmp_path: Path) -> None:
    slow = "+callbacks.slow={_target_: support.failure_callbacks.Slow, seconds: 30}"
    command = [*ARGUMENTS, "hydra.run.dir=one"]
    with started(*command, slow, folder=tmp_path, ranks=1, **TESTS):
        wait_for(lambda: (tmp_path / "one" / "run.json").exists(), 90, "the first job")
        second = train(*command, folder=tmp_path, **TESTS)
    assert second.code == 1
    assert "still going on" in second.err
    assert "hydra.run.dir" in second.err
    assert "Traceback" not in second.err


@pytest.mark.slow
def test_a_finished_run_is_not_continued(tmp_path: Path) -> None:
    for _ in range(2):
        done = train(*ARGUMENTS, "max_epochs=1", folder=tmp_path, **TESTS)
        assert done.code == 0, done.err[-3000:]
        assert "goes on from" not in done.out
    first, second = (read_csv(folder) for folder in done.runs)
    assert first == second


@pytest.mark.slow
def test_another_command_in_the_same_directory_starts_anew(tmp_path: Path) -> None:
    """Also where a launcher says that it is a restart; what the other one has left is not taken for its own."""
    first = train(*ARGUMENTS, "max_epochs=1", "hydra.run.dir=one", folder=tmp_path, **TESTS)
    assert first.code == 0, first.err[-3000:]
    again = {"TORCHELASTIC_RESTART_COUNT": "1", **TESTS}
    second = train(*ARGUMENTS, "max_epochs=1", "optimizer.lr=1e-3", "hydra.run.dir=one", folder=tmp_path, **again)
    assert second.code == 0, second.err[-3000:]
    assert "goes on from" not in second.out
    left = sorted(path.name for path in (tmp_path / "one" / "checkpoints").iterdir())
    assert left == ["best.before", "best.ckpt", "last.before", "last.ckpt"]
    own = f"ckpt_path={tmp_path}/one/checkpoints/last.ckpt"
    third = train(*ARGUMENTS, "max_epochs=2", own, "hydra.run.dir=one", folder=tmp_path, **TESTS)
    assert third.code == 0, third.err[-3000:]
    assert "goes on from" in third.out


@pytest.mark.slow
def test_an_interrupted_run_goes_on_when_resume_is_added(tmp_path: Path) -> None:
    """In its last step, too: it leaves before the test, and an early stop is not decided anew."""
    stopping = (
        "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: '${monitor}', patience: 1, "
        "min_delta: 1e9}"
    )
    command = [each for each in ARGUMENTS if each != "resume=auto"]
    command += [stopping, signal_at(7, "SIGTERM", tmp_path)]
    told = train(*command, folder=tmp_path, **TESTS)
    assert told.code == 75, told.err[-3000:]
    assert "preempted before the test" in told.out
    again = train(*command, "resume=auto", folder=tmp_path, **TESTS)
    assert again.code == 0, again.err[-3000:]
    (folder,) = again.runs
    assert f"training is complete in {folder}/checkpoints/last.ckpt" in again.out
    rows = read_csv(folder)
    assert sum("val0_epoch/weighted_sum" in row for row in rows) == 2  # the second is no better, by so much
    assert sum("test0_epoch/weighted_sum" in row for row in rows) == 1


def test_a_run_that_has_saved_at_its_end_can_be_prolonged(undisturbed_alone: Path, tmp_path: Path) -> None:
    done = train(
        *ARGUMENTS,
        "max_epochs=4",
        f"ckpt_path={undisturbed_alone}/checkpoints/last.ckpt",
        folder=tmp_path,
        **TESTS,
    )
    assert done.code == 0, done.err[-3000:]
    rows = [row for row in read_csv(done.runs[0]) if "train_loss_step/weighted_sum" in row]
    assert [row["epoch"] for row in rows] == [3] * 4
    assert [int(row["step"]) for row in rows] == list(itertools.islice(itertools.count(12), 4))
