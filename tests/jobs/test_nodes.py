"""Several nodes: two hosts of their own network, joined by a cable, train what one host trains."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from support.commands import ROOT, TINY, Finished, read_csv, train
from support.hosts import train_on, two_hosts, why_not

from harness.data import AtomsDataModule, EmbeddedAlloyDataModule, embedded_alloy_file
from harness.job.consistency import difference, facts

REASON = why_not()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SIZES = tuple(each for each in TINY if not each.startswith("data.num_frames"))  # of data=file
QUIET = ("callbacks.progress=null", "trainer.timeout=60")


def on_two_hosts(overrides: list[list[str]], folder: Path, timeout: float = 240, **environment: str) -> list[Finished]:
    """The script in launch/ on both hosts, with arguments of each; folders of their own."""
    folders = [folder / f"node{node}" for node in range(2)]
    with two_hosts() as hosts:
        for node in range(2):
            train_on(hosts, node, overrides[node], folders[node], **environment)
        return hosts.finish(folders, timeout)


def left_in(folder: Path) -> list[str]:
    """What a training has left in a folder beside the output that the test itself keeps there."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("stdout", "stderr"))


def assert_refused(done: list[Finished], *words: str) -> None:
    """All hosts have ended with an error, rank 0 has said it, and nothing has been trained or written."""
    assert all(each.code != 0 for each in done)
    for word in words:
        assert word in done[0].err, done[0].err[-4000:]
    assert "error: " not in done[1].err
    assert not [path for each in done for path in each.folder.rglob("*") if path.suffix in (".ckpt", ".csv")]
    assert left_in(done[1].folder) == []
    assert "Initializing distributed" not in done[0].err  # not even a process group


@pytest.mark.slow
@needs_hosts
def test_two_hosts_train_as_one_host_with_as_many_ranks(tmp_path: Path) -> None:
    """Every value of every component, to the last bit; only rank 0 of node 0 writes."""
    arguments = [*SIZES, *QUIET, "logger=csv", "loss=energy_force_stress", "metrics=energy_force_stress", "data=file"]
    files = [tmp_path / f"disk{number}" / "alloy.xyz" for number in range(3)]  # each node has its own copy
    for file in files:
        file.parent.mkdir()
        shutil.copyfile(embedded_alloy_file(24, 0), file)
    nodes = on_two_hosts([[*arguments, f"data.train={file}"] for file in files[:2]], tmp_path)
    assert [each.code for each in nodes] == [0, 0], nodes[0].err[-4000:] + nodes[1].err[-4000:]
    one = train(*arguments, f"data.train={files[2]}", folder=tmp_path / "one", ranks=2)
    assert one.code == 0, one.err[-4000:]

    (together,), (alone,) = nodes[0].runs, one.runs
    left, right = read_csv(together), read_csv(alone)
    assert len(left) == len(right) > 5
    compared = 0
    for row, expected in zip(left, right, strict=True):
        assert row.keys() == expected.keys()
        for name, value in row.items():
            assert value == expected[name] or (math.isnan(value) and math.isnan(expected[name])), name
            compared += 1
    assert compared > 150

    assert left_in(nodes[0].folder) == ["outputs"]
    assert (together / "checkpoints" / "best.ckpt").is_file()
    assert left_in(nodes[1].folder) == []
    assert "weighted_sum" in nodes[0].out
    assert nodes[1].out.strip() == ""


@pytest.mark.slow
@needs_hosts
def test_nodes_with_other_settings_are_refused(tmp_path: Path) -> None:
    arguments = [*TINY, *QUIET, "logger=csv"]
    done = on_two_hosts([arguments, [*arguments, "loss.coeffs.forces=3"]], tmp_path)
    assert_refused(
        done,
        "error: the ranks disagree on the setting loss.coeffs.forces:",
        "10 on rank 0 (host node0)",
        "3 on rank 1 (host node1)",
        "same command line",
    )


@needs_hosts
@pytest.mark.slow
def test_nodes_with_other_data_are_refused(tmp_path: Path) -> None:
    """One byte of the file differs."""
    file = embedded_alloy_file(24, 0)
    copies = [tmp_path / f"disk{node}" / "alloy.xyz" for node in range(2)]
    for copy in copies:
        copy.parent.mkdir()
        shutil.copyfile(file, copy)
    content = bytearray(copies[1].read_bytes())
    last_digit = max(index for index, byte in enumerate(content) if chr(byte).isdigit())
    content[last_digit] = ord("1") if content[last_digit] != ord("1") else ord("2")
    copies[1].write_bytes(content)
    arguments = [[*SIZES, *QUIET, "logger=csv", "data=file", f"data.train={copy}"] for copy in copies]
    done = on_two_hosts(arguments, tmp_path)
    assert_refused(
        done, "error: the ranks disagree on the data train file 1:", "rank 0 (host node0)", "rank 1 (host node1)"
    )


@needs_hosts
@pytest.mark.slow
def test_nodes_with_other_versions_are_refused(tmp_path: Path) -> None:
    """A copy of the package with another version on node 1."""
    shutil.copytree(ROOT / "harness", tmp_path / "other" / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "other" / "conf")
    init = tmp_path / "other" / "harness" / "__init__.py"
    text = init.read_text()
    line = next(line for line in text.splitlines() if line.startswith("__version__"))
    init.write_text(text.replace(line, '__version__ = "99.0"'))
    arguments = [*TINY, *QUIET, "logger=csv"]
    folders = [tmp_path / f"node{node}" for node in range(2)]
    with two_hosts() as hosts:
        train_on(hosts, 0, arguments, folders[0])
        train_on(hosts, 1, arguments, folders[1], PYTHONPATH=str(tmp_path / "other"))
        done = hosts.finish(folders, 240)
    assert_refused(
        done, "error: the ranks disagree on the version harness:", "99.0 on rank 1 (host node1)", "same environment"
    )


@needs_hosts
@pytest.mark.slow
def test_nodes_that_come_and_go_meet_by_c10d(tmp_path: Path) -> None:
    arguments = [*TINY, *QUIET, "logger=csv", "max_epochs=1", "test=false"]
    done = on_two_hosts([arguments, arguments], tmp_path, nodes="2:2", JOB="elastic")
    assert [each.code for each in done] == [0, 0], done[0].err[-4000:] + done[1].err[-4000:]
    written = [each.folder for each in done if left_in(each.folder)]
    assert len(written) == 1  # whichever node has become the first


# --- what is compared ---


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", ["output_dir=somewhere", *overrides])


def test_settings_are_compared_but_for_what_may_differ_by_node() -> None:
    first = facts(composed("logger=csv"), None)
    assert (
        difference(first, facts(composed("logger=csv", "output_dir=/elsewhere", "data.cache_dir=/disk"), None)) is None
    )
    assert difference(first, facts(composed("logger=csv", "seed=1"), None)) == ["setting", "seed", "0", "1"]
    added = difference(first, facts(composed("logger=csv", "+trainer.max_time=00:01:00:00"), None))
    assert added == ["setting", "trainer.max_time", "not set", "'00:01:00:00'"]
    assert {"harness", "torch", "lightning", "python"} <= first["version"].keys()


def test_paths_are_compared_for_data_without_a_fingerprint() -> None:
    module = object()
    one, other = (facts(composed("data=file", f"data.train={name}.xyz"), module) for name in "ab")  # type: ignore[arg-type]
    assert difference(one, other) == ["data", "data.train", "'a.xyz'", "'b.xyz'"]


def test_fingerprint_is_of_content_split_types_and_cutoff(tmp_path: Path) -> None:
    def alloy(**options: object) -> dict[str, str]:
        defaults = {"num_frames": 24, "cutoff": 4.5, "batch_size": 4}
        return EmbeddedAlloyDataModule(**{**defaults, **options}).fingerprint()  # type: ignore[arg-type]

    def changed(other: dict[str, str]) -> set[str]:
        return {name for name in first if first[name] != other[name]}

    first = alloy()
    assert first == alloy()
    assert changed(alloy(cutoff=5.0)) == {"cutoff"}
    assert changed(alloy(split_seed=1)) == {"split, part val", "split, part test", "split, part train"}
    assert changed(alloy(type_names=["Au", "Ag", "Pd", "Cu"])) == {"type names"}
    copy = tmp_path / Path(embedded_alloy_file(24, 0)).name
    shutil.copyfile(embedded_alloy_file(24, 0), copy)
    split = {"val": 0.1, "test": 0.1}
    assert changed(AtomsDataModule(copy, cutoff=4.5, batch_size=4, split=split).fingerprint()) == set()
    copy.write_text(copy.read_text() + "\n")
    assert changed(AtomsDataModule(copy, cutoff=4.5, batch_size=4, split=split).fingerprint()) == {"train file 1"}
