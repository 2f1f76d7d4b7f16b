"""Arguments that Hydra cannot read, directories that cannot be written, and the one directory of a run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from support.commands import TINY, run, train

from harness.config.explain import explain
from harness.data.embedded import embedded_alloy_file
from harness.runs import with_run_dir
from harness.runs.command import Command
from harness.runs.resuming import interrupted_stamp

GRAMMAR = "mismatched input\nSee https://hydra.cc/docs/1.2/advanced/override_grammar/basic for details"
QUIET = (*TINY, "max_epochs=1", "logger=none", "trainer.enable_progress_bar=false")


@pytest.mark.parametrize(
    "name",
    [
        *("T=300/tr.xyz", "a[1].xyz", "a(1).xyz", "my file (1).xyz", "a#b.xyz", "it's.xyz", 'a"b".xyz', "~/a.xyz"),
        *("é.xyz", "a;b.xyz", "a&b.xyz", "a!.xyz", "x'y\"z=1", "{a}=1", "a,b=c.xyz", 'a"b\'c\\"d.xyz', "a=1\\"),
    ],
)
def test_an_argument_is_named_and_quoted(name: str) -> None:
    """What is shown, typed in a shell, gives Hydra that name."""
    argument = f"data.train={name}"
    text = explain(GRAMMAR, ["seed=1", "model.n=[1,2]", argument])
    assert text.startswith(f"the argument {shlex.quote(argument)} ")
    if name[0] == "{":  # may be meant for a dictionary
        return
    (typed,) = shlex.split(text.splitlines()[-1])
    assert OverridesParser.create().parse_override(typed).value() == name


def test_an_entry_of_a_list_is_quoted() -> None:
    text = explain(GRAMMAR, ["data.train=[a.xyz, T=3.xyz,b(1).xyz]"])
    (typed,) = shlex.split(text.splitlines()[-1])
    assert OverridesParser.create().parse_override(typed).value() == ["a.xyz", "T=3.xyz", "b(1).xyz"]


@pytest.mark.parametrize(
    ("argument", "words"),
    [("data.train", "has no value"), ("loss.coeffs={a:1", "is none that Hydra can read"), ("da ta=1", "is none that")],
)
def test_an_argument_that_quotes_do_not_help(argument: str, words: str) -> None:
    assert f"the argument {shlex.quote(argument)} {words}" in explain(GRAMMAR, [argument])


# --- one directory ---


def test_hydra_follows_the_output_directory() -> None:
    assert with_run_dir(["a=1", "output_dir='x y'"], is_sweep=False) == [
        "a=1",
        "output_dir='x y'",
        "hydra.run.dir='x y'",
    ]
    for same in (["a=1"], ["hydra.run.dir=x"], ["output_dir=x", "hydra.run.dir=x"]):
        assert with_run_dir(same, is_sweep=False) == same
    with pytest.raises(ValueError, match="two directories for one run"):
        with_run_dir(["output_dir=x", "hydra.run.dir=y"], is_sweep=False)
    with pytest.raises(ValueError, match=r"of every point of the sweep.*hydra\.sweep\.dir=x"):
        with_run_dir(["output_dir=x"], is_sweep=True)


STAMP = "2026-01-02_03-04-05"


@pytest.mark.parametrize(
    ("argument", "folder", "found"),
    [
        ("seed=1", f"outputs/train/{STAMP}", STAMP),
        ("hydra.run.dir=mine/${name}/${harness.run_stamp:}", f"mine/train/{STAMP}", STAMP),
        ("hydra.run.dir='run-${name}/${harness.run_stamp:}/x'", f"run-train/{STAMP}/x", STAMP),
        ("hydra.run.dir=mine", "mine", None),
    ],
)
def test_an_interrupted_run_is_found_where_it_is(
    argument: str,
    folder: str,
    found: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is said before the directory is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_COMMAND", raising=False)
    monkeypatch.setattr(sys, "argv", ["harness-train", argument, "resume=auto"])
    place = tmp_path / folder
    place.mkdir(parents=True)
    assert interrupted_stamp(is_sweep=False) is None
    entry = {"command": list(Command((argument,), ()).identity), "overrides": [], "state": "preempted"}
    (place / "run.json").write_text(json.dumps(entry))
    assert interrupted_stamp(is_sweep=False) == found
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_in_a_directory_of_its_own(tmp_path: Path) -> None:
    """All of it in one place, and what is said of a resume is true."""
    arguments = (*QUIET, "output_dir=my run/a", "resume=auto")
    fresh = train(*arguments, folder=tmp_path)
    assert fresh.code == 0, fresh.err[-3000:]
    folder = tmp_path / "my run" / "a"
    assert {"run.json", "result.json", ".hydra", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert not (tmp_path / "outputs").exists()
    assert f"resume: no interrupted run of this command; it starts anew in {folder}" in fresh.out
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "state": "preempted"}))
    again = train(*arguments, folder=tmp_path)
    assert again.code == 0, again.err[-3000:]
    assert "starts anew" not in again.out
    assert f"training is complete in {folder}/checkpoints/last.ckpt" in again.out
    refused = train(*arguments, "--multirun", "seed=0,1", folder=tmp_path)
    assert refused.code == 1
    assert "hydra.sweep.dir=my run/a" in refused.err
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text("# @package _global_\noutput_dir: elsewhere\n")
    refused = train("--config-dir", "conf", *QUIET, "experiment=own", folder=tmp_path)
    assert refused.code == 1
    assert "error: output_dir is elsewhere, but Hydra writes" in refused.err
    assert not (tmp_path / "elsewhere").exists()


# --- what cannot be written ---


def without_write_access() -> list[str]:
    """Command before another one that takes root's right to write everywhere away."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root can write everywhere, and there is no setpriv")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]


def test_the_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder of the home directory would be, which stops root, too."""
    monkeypatch.delenv("HARNESS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").touch()
    with pytest.raises(OSError, match=r"cannot be written .*variable HARNESS_CACHE, or data\.cache_dir="):
        embedded_alloy_file(2)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "mine"))
    assert embedded_alloy_file(2).is_file()


@pytest.mark.slow
def test_a_working_directory_that_cannot_be_written(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    command = [*without_write_access(), sys.executable, "-m", "harness.train", *QUIET]
    alone = run(command, closed)
    sweep = run([*command, "--multirun", "seed=0,1"], closed)
    (tmp_path / "file").touch()
    in_file = train(*QUIET, f"output_dir={tmp_path}/file/run", folder=tmp_path)
    for done, words in [
        (alone, f"the output directory cannot be made: outputs in {closed} (Permission denied)"),
        (sweep, f"the directory of the sweep cannot be made: {closed}/multirun"),
        (in_file, "(Not a directory). Start where you may write"),
    ]:
        assert done.code == 1
        assert done.err.strip().startswith("error: ")
        assert words in done.err
        assert len(done.err.strip().splitlines()) == 1
    home = run(command, tmp_path / "open", HOME=str(closed), HARNESS_CACHE="")
    assert home.code == 1
    assert "by the variable HARNESS_CACHE" in home.err
    assert "Traceback" not in home.err
