"""Bad inputs: each is told in one message, on one rank, before anything is trained or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bad_input import CASES, Said, expected, output_of, run_case, write_files
from commands import BIN, ROOT, run, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of the table."""
    made = tmp_path_factory.mktemp("bad")
    write_files(made)
    return made


def check_message(name: str, said: Said, folder: Path) -> None:
    """One message with all its words, and nothing else."""
    assert said.code != 0, said.out[-2000:]
    for word in expected(name, folder):
        assert word in said.err, said.err
    assert "Traceback" not in said.err + said.out, said.err
    assert said.err.count("\nerror: ") <= 1
    assert "Epoch 0" not in said.out + said.err


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ranks == 1])
def test_a_mistake_is_told_before_training(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    output = output_of(name, folder / "output")
    said = run_case(name, folder, output)
    check_message(name, said, folder)
    assert not [path for path in output.rglob("*") if path.is_file()]
    assert not (folder / "was_run").exists()


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Said]]:
    """What each of two ranks has said in every case of the table, in the same two processes."""
    script = str(ROOT / "tests" / "bad_input.py")
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--max-restarts", "0"]
    done = run([*command, script, str(folder)], folder / "launch", timeout=280)
    assert done.code == 0, done.err[-4000:]
    read = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return [{name: Said(**said) for name, said in each.items()} for each in read]


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_by_one_of_two_ranks(name: str, two_ranks: list[dict[str, Said]], folder: Path) -> None:
    first, second = (each[name] for each in two_ranks)
    check_message(name, first, folder)
    assert second.code != 0
    assert not second.out.strip()
    assert not second.err.strip(), second.err
    assert not [path for path in output_of(name, folder / "output of ranks").rglob("*") if path.is_file()]
    assert not (folder / "was_run").exists()


TINY = ("data.split={val: 3, test: 3}", "data.batch_size=4", "cutoff=3.5", "logger=none", "callbacks.parity=null")


def test_a_mistake_of_one_rank_alone(folder: Path, tmp_path: Path) -> None:
    """The file of rank 1 is missing: rank 0 says so, and does not wait for it."""
    own = "data.train=${oc.env:FOLDER_OF_DATA}/frames.xyz"
    (tmp_path / "rank.sh").write_text(
        f'if [ "$RANK" = 1 ]; then export FOLDER_OF_DATA=/nowhere; else export FOLDER_OF_DATA={folder}; fi\nexec "$@"\n'
    )
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--max-restarts", "0", "--no-python"]
    trained = [str(BIN / "python"), "-m", "harness.train", "data=file", own, *TINY]
    done = run([*launcher, "sh", str(tmp_path / "rank.sh"), *trained], tmp_path / "run")
    assert done.code != 0
    assert done.err.count("error: ") == 1
    assert "on rank 1 (host " in done.err
    assert "no file of structures at /nowhere/frames.xyz" in done.err
    assert "Epoch 0" not in done.out + done.err
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=ddp", "+strategy.process_group_backend=nccl", "trainer.accelerator=cpu"], ["nccl", "gloo"]),
        (["data.num_train=1"], ["1 samples", "2 ranks"]),
        (["model._target_=os.system"], ["os.system", "blocklisted"]),
    ],
)
def test_the_command_under_a_launcher(overrides: list[str], words: list[str], folder: Path, tmp_path: Path) -> None:
    done = train("data=file", f"data.train={folder}/frames.xyz", *TINY, *overrides, ranks=2, folder=tmp_path)
    assert done.code != 0
    assert done.err.count("error: ") == 1
    for word in words:
        assert word in done.err
    assert "harness/train.py" not in done.err  # no frame of a traceback
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_traceback_is_there_for_whoever_asks(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    said = run_case("missing file", folder, tmp_path)
    assert "Traceback" in said.err
    assert "FileNotFoundError" in said.err
