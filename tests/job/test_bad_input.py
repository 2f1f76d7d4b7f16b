"""Bad inputs: each is told in one message, on one rank, before anything is trained or written."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from support.bad_input import BASE, CASES, Said, composed, expected, output_of, run_case, write_files
from support.commands import BIN, ROOT, run, train

from harness.config.bad_input import BAD_INPUT
from harness.config.explain import message
from harness.job import prepare


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


@pytest.mark.slow
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
    script = str(ROOT / "tests" / "support" / "bad_input.py")
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--max-restarts", "0"]
    done = run([*command, script, str(folder)], folder / "launch", timeout=280)
    assert done.code == 0, done.err[-4000:]
    read = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return [{name: Said(**said) for name, said in each.items()} for each in read]


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- beyond the table: anything else ends in a start or in one of the errors that are told in one message ---


def keys_of(config: DictConfig, prefix: str = "") -> list[str]:
    """Every key of a config that a user may set, of sections too."""
    found = []
    for key in config:
        node = config._get_node(key)
        found.append(f"{prefix}{key}")
        if OmegaConf.is_dict(node) and not node._is_none():
            found += keys_of(node, f"{prefix}{key}.")
    return [key for key in found if key not in ("output_dir", "trainer.default_root_dir")]


# numbers are small: sizes of a model are among the keys
GARBAGE = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([0.5, 2.5, -1.0, 1e-12, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "text", "fit", "nan", "1", "null", "${seed}", "${no.such}", "Cu", "../..", "é\n"]),
    st.none(),
    st.booleans(),
    st.lists(st.one_of(st.integers(-1, 3), st.text("aCu", max_size=2)), max_size=2),
    st.dictionaries(st.sampled_from(["val", "Cu", "x", "_target_"]), st.integers(-1, 3), max_size=2),
)
NUMBERS = ["nan", "-nan", "inf", "-inf", "1e400", "text", '"', "", "0", "-1", "1e5", "T", "1.0.0", "\x00"]


def starts_or_is_refused(config: DictConfig) -> None:
    """`prepare` ends well, or with one of the errors that are told in one message; any other is a bug."""
    said = "it starts"
    with contextlib.suppress(*BAD_INPUT):
        try:
            prepare(config)
        except Exception as error:
            said = message(error)
            raise
    assert said.strip()


def base_config(folder: Path, *overrides: str) -> DictConfig:
    config = composed([*BASE, f"data.train={folder}/frames.xyz", *overrides])
    config.output_dir = str(folder / "nothing")
    return config


def check_garbage(data: st.DataObject, folder: Path) -> None:
    config = base_config(folder)
    key = data.draw(st.sampled_from(keys_of(config)))
    try:
        OmegaConf.update(config, key, data.draw(GARBAGE), merge=False)
    except ValueError:  # text that is no interpolation
        return
    starts_or_is_refused(config)


def check_corruption(data: st.DataObject, folder: Path, name: str) -> None:
    content = (folder / "frames.xyz").read_text()
    kind = data.draw(st.sampled_from(["cut", "number", "column", "line", "byte"]))
    lines = content.splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    words = lines[number].split(" ")
    filled = [index for index, word in enumerate(words) if word]
    place = data.draw(st.sampled_from(filled))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif kind == "byte":
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.sampled_from('0 -.eE="\n:XT\x00é')) + content[at + 1 :]
    else:
        if kind == "number":
            words[place] = data.draw(st.sampled_from(NUMBERS))
        elif kind == "column":
            del words[place]
        changed = [] if kind == "line" else [" ".join(words)]
        content = "\n".join([*lines[:number], *changed, *lines[number + 1 :]]) + "\n"
    path = folder / f"{name}.xyz"
    path.write_text(content)
    starts_or_is_refused(base_config(folder, f"data.train={path}"))


QUICK = settings(max_examples=15, suppress_health_check=list(HealthCheck))
THOROUGH = settings(max_examples=250, suppress_health_check=list(HealthCheck))


@QUICK
@given(data=st.data())
def test_garbage_in_any_key(folder: Path, data: st.DataObject) -> None:
    check_garbage(data, folder)


@QUICK
@given(data=st.data())
def test_any_corruption_of_a_file(folder: Path, data: st.DataObject) -> None:
    check_corruption(data, folder, "corrupted")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@THOROUGH
@given(data=st.data())
def test_much_garbage(folder: Path, data: st.DataObject) -> None:
    check_garbage(data, folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@THOROUGH
@given(data=st.data())
def test_many_corruptions(folder: Path, data: st.DataObject) -> None:
    check_corruption(data, folder, "corrupted often")
