"""The scripts in launch/, run as they are on this machine, and the files for containers, which are read.

Neither SLURM, Kubernetes nor an engine for containers is here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.commands import BIN, ROOT, TINY, Finished, read_csv, run, same, wait_for
from support.slurm import Job

from harness.strategies import cluster_plugins

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for pattern in ("*.sh", "*.sbatch", "env/*.sh") for path in LAUNCH.glob(pattern))
ARGUMENTS = (
    *TINY,
    "logger=csv",
    "trainer.enable_progress_bar=false",
    "trainer.timeout=60",
    "trainer.log_every_n_steps=1",
)


def test_scripts_let_a_process_have_a_connection_to_each_rank() -> None:
    program = f"set -eu; ulimit -S -n 256; source {LAUNCH / 'env/gloo.sh'}; ulimit -S -n; ulimit -H -n"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=20, check=True)
    soft, hard = done.stdout.split()
    assert int(soft) == min(65536, int(hard) if hard.isdigit() else 65536) > 256


def said_by(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a script prints, with as little in its environment as there can be."""
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_scripts_are_clean() -> None:
    """bash parses them, shellcheck finds nothing, and they stop at errors and unset variables."""
    assert len(SCRIPTS) >= 7
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
        if script.parent == LAUNCH:
            assert "\nset -euo pipefail\n" in script.read_text()
            assert '"$@"' in script.read_text()
    assert_clean("shellcheck", "-x", *map(str, SCRIPTS))


def assert_clean(tool: str, *arguments: str) -> None:
    """What ``make lint`` asks, where the tool is installed."""
    if (found := shutil.which(tool, path=os.pathsep.join([str(BIN), os.environ["PATH"]]))) is None:
        return
    done = subprocess.run([found, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_names_every_script() -> None:
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert str(path.relative_to(LAUNCH)) in text, path


def test_the_script_for_several_nodes_says_what_it_needs() -> None:
    script = "torchrun_multinode.sh"
    for settings, word in [({}, "HEAD"), ({"HEAD": "a"}, "NODES"), ({"HEAD": "127.0.0.1", "NODES": "two"}, "'two'")]:
        done = said_by(script, TORCHRUN="echo", **settings)
        assert done.returncode != 0
        assert word in done.stderr
    settings = {"HEAD": "127.0.0.1", "NODES": "2", "NODE_RANK": "1", "RANKS_PER_NODE": "4"}
    done = said_by(script, "a=b c", "d", TORCHRUN="echo", **settings)
    assert done.returncode == 0
    assert done.stdout.split("--nproc-per-node")[1] == " 4 -m harness.train a=b c d\n"


# --- SLURM ---


def test_slurm_script_says_what_it_needs(tmp_path: Path) -> None:
    for environment, words in [
        ({"SLURM_SUBMIT_DIR": str(tmp_path)}, f"{tmp_path}/launch has no slurm_task.sh"),
        ({"LAUNCH": "mpirun"}, "LAUNCH is torchrun or srun, found 'mpirun'"),
        ({"LAUNCH": "srun", "SLURM_NTASKS": "3", "SLURM_JOB_NUM_NODES": "2"}, "3 tasks on 2 nodes"),
    ]:
        done = Job(tmp_path / "job", **environment).run()
        assert done.code == 2
        assert words in done.err
    assert "run this script by sbatch" in said_by("slurm.sbatch").stderr


def test_slurm_script_passes_on_arguments_variables_and_exit_code(tmp_path: Path) -> None:
    """Exit code of a job that fails without preemption: it is not requeued; 75 is."""
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'printf "%s|" "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$LOCAL_WORLD_SIZE" "$NODE_RANK" "$MASTER_PORT" "$@"\n'
        'exit "$((CODE * (RANK == 2)))"\n'
    )
    python.chmod(0o755)
    options = {"nodes": 2, "tasks": 4, "LAUNCH": "srun", "PYTHON": str(python)}
    for code in (0, 3, 75):
        job = Job(tmp_path / str(code), "a=b c", "d='e'", CODE=str(code), **options)
        done = job.run()
        assert done.code == code
        assert job.requeues == (code == 75)
        for rank, place in enumerate(("0|4|2|0", "1|4|2|0", "0|4|2|1", "1|4|2|1")):
            assert f"{rank}|{place}|{10000 + job.number}|-m|harness.train|a=b c|d='e'|" in done.out
    assert Job(tmp_path / "75", CODE="75", **options).requeues == 1
    done = Job(tmp_path / "75", CODE="75", MAX_REQUEUES="1", **options).run()
    assert done.code == 75
    assert "not put back into the queue: that was done 1 times" in done.err


@pytest.mark.parametrize("launch", ["srun", "torchrun"])
@pytest.mark.parametrize("end", ["time limit", "scancel"])
def test_slurm_script_hands_signals_on(launch: str, end: str, tmp_path: Path) -> None:
    """To commands that stand for Python and for torchrun, and leave as ranks do."""
    command = tmp_path / "command"
    command.write_text(
        "#!/usr/bin/env bash\n"
        "trap 'exit 75' TERM\n"  # SIGUSR1 is ignored: it would kill a rank that does not listen yet
        'touch "$SIGN.$SLURM_PROCID"\n'
        "while true; do sleep 0.05; done\n"
    )
    command.chmod(0o755)
    sign = tmp_path / "sign"
    job = Job(
        tmp_path / "job",
        nodes=2,
        tasks=2,
        LAUNCH=launch,
        SIGN=str(sign),
        **{"PYTHON" if launch == "srun" else "TORCHRUN": str(command)},
    )
    with job.started() as process:
        wait_for(lambda: all(Path(f"{sign}.{task}").exists() for task in range(2)), 20, "the start")
        (job.near_its_time_limit if end == "time limit" else job.cancelled)(process)
        done = job.finish(process, 20)
    assert done.code == 75, done.err
    assert job.requeues == (end == "time limit")
    assert not re.search("slurm_script|slurm_task", done.err)  # bash names them in its own errors


def told_to_leave(folder: Path, **options: Any) -> tuple[Finished, Finished, Job]:
    """A job that comes near its time limit in the third step, and the same after it was put back into the queue."""
    sign = folder.parent / f"{folder.name}.sign"
    wait = f"+callbacks.wait={{_target_: support.failures_for_tests.WaitAt, step: 3, sign: {sign}}}"
    job = Job(folder, *ARGUMENTS, wait, **options)
    with job.started() as process:
        wait_for(sign.exists, 90, "the third step")
        job.near_its_time_limit(process)
        time.sleep(1)  # for the signal to arrive
        Path(f"{sign}.go").touch()
        stopped = job.finish(process)
    return stopped, job.run(), job


def assert_went_on(stopped: Finished, again: Finished, job: Job) -> None:
    assert stopped.code == 75, stopped.err[-4000:]
    assert "back into the queue" in stopped.out
    assert again.code == 0, again.err[-4000:]
    assert job.requeues == 1
    (folder,) = again.runs
    assert "saved step 3 of epoch 0" in stopped.out
    assert f"goes on from {folder}/checkpoints/last.ckpt" in again.out
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["ranks"] == 2
    # 4 steps in each of 2 epochs, all logged, each once
    assert [row["step"] for row in read_csv(folder) if "train_loss_step/forces_mse" in row] == list(range(8))


@pytest.fixture(scope="module")
def by_srun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Finished, Job]:
    return told_to_leave(tmp_path_factory.mktemp("srun") / "job", tasks=2, LAUNCH="srun")


@pytest.mark.slow
def test_slurm_job_of_two_tasks_goes_on_after_its_time_limit(by_srun: tuple[Finished, Finished, Job]) -> None:
    assert_went_on(*by_srun)
    assert "auto-requeueing" not in by_srun[0].err  # Lightning's own would put the job back beside the script


@pytest.mark.slow
def test_slurm_job_of_two_nodes_goes_on_after_its_time_limit(
    by_srun: tuple[Finished, Finished, Job], tmp_path: Path
) -> None:
    """One torchrun on each. Values are those of the job of two tasks, and of one that was not preempted."""
    stopped, again, job = told_to_leave(tmp_path / "job", nodes=2, RANKS_PER_NODE="1")
    assert_went_on(stopped, again, job)
    whole = Job(tmp_path / "whole", *ARGUMENTS, nodes=2, RANKS_PER_NODE="1").run()
    assert whole.code == 0, whole.err[-4000:]
    expected = read_csv(whole.runs[0])
    for found in (again, by_srun[1]):
        rows = read_csv(found.runs[0])
        assert len(rows) == len(expected) > 10
        for row, other in zip(rows, expected, strict=True):
            assert row.keys() == other.keys()
            assert all(same(row[key], other[key], 0.0) for key in row)


@pytest.mark.slow
def test_cancelled_slurm_job_is_saved_and_not_put_back(tmp_path: Path) -> None:
    """SIGTERM to the script and to all that runs in the step, twice to torchrun."""
    sign = tmp_path / "sign"
    wait = f"+callbacks.wait={{_target_: support.failures_for_tests.WaitAt, step: 3, sign: {sign}}}"
    job = Job(tmp_path / "job", *ARGUMENTS, wait, RANKS_PER_NODE="2")
    with job.started() as process:
        wait_for(sign.exists, 90, "the third step")
        job.cancelled(process)
        time.sleep(1)
        Path(f"{sign}.go").touch()
        stopped = job.finish(process)
    assert stopped.code not in (0, 75)
    assert job.requeues == 0
    assert json.loads((stopped.runs[0] / "run.json").read_text())["state"] == "preempted"


def test_lightning_looks_for_no_launcher_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for SLURM either: it would requeue the job by itself, and take the job's script for one of its tasks."""
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "x"}.items():
        monkeypatch.setenv(name, value)
    (alone,) = cluster_plugins()
    assert (alone.global_rank(), alone.world_size()) == (0, 1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    (plugin,) = cluster_plugins()
    assert plugin.creates_processes_externally
    assert (plugin.global_rank(), plugin.world_size(), plugin.local_rank()) == (3, 4, 1)
    assert not hasattr(plugin, "auto_requeue")


# --- DeepSpeed ---


def test_deepspeed_script_says_what_it_needs(tmp_path: Path) -> None:
    for tool in ("g++", "ninja"):
        (tmp_path / tool).touch(mode=0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = said_by("deepspeed.sh", "a=b c", PATH=path, TORCHRUN="echo", STAGE="3")
    assert done.stdout.endswith("-m harness.train strategy=deepspeed_zero3 a=b c\n")
    several = {"HEAD": "127.0.0.1", "NODES": "2", "NODE_RANK": "1"}
    done = said_by("deepspeed.sh", PATH=path, TORCHRUN="echo", **several)
    assert "--nnodes 2 --node-rank 1" in done.stdout
    assert "strategy=deepspeed_zero2" in done.stdout
    assert "STAGE is 1, 2 or 3, found '4'" in said_by("deepspeed.sh", PATH=path, STAGE="4").stderr
    (tmp_path / "bash").symlink_to("/bin/bash")
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    (tmp_path / "ninja").unlink()
    done = subprocess.run(
        ["/bin/bash", str(LAUNCH / "deepspeed.sh")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert "DeepSpeed needs ninja on PATH" in done.stderr


@pytest.mark.slow
def test_deepspeed_script_trains(tmp_path: Path) -> None:
    """The real DeepSpeed on two ranks, by the class for tests that runs on CPUs."""
    done = run(
        [str(LAUNCH / "deepspeed.sh"), *ARGUMENTS, "strategy._target_=support.cpu_deepspeed.CpuZero"],
        tmp_path,
        timeout=280,
        PATH=os.pathsep.join([str(BIN), os.environ["PATH"]]),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        RANKS_PER_NODE="2",
    )
    assert done.code == 0, done.err[-4000:]
    assert "stage: 2" in (done.runs[0] / ".hydra" / "config.yaml").read_text()
    assert any("test0_epoch/forces_rmse" in row for row in read_csv(done.runs[0]))


# --- containers ---


def test_kubernetes_job() -> None:
    """Fields of TrainJob, and a command that composes; the whole was read once with Kubeflow's own models, 2.3."""
    job = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert spec.keys() == {"runtimeRef", "trainer", "runtimePatches"}
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    trainer = spec["trainer"]
    assert trainer["numNodes"] == 2
    assert trainer["command"] == ["torchrun"]
    options, _, overrides = " ".join(trainer["args"]).partition("-m harness.train ")
    assert options.split() == ["--max-restarts=3"]  # PET_* variables say the rest
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("train", overrides.split())
    # a quantity or a variable that YAML takes for a number is refused by Kubernetes
    assert all(isinstance(each.get("value", ""), str) for each in trainer["env"])
    assert not any("value" in each and re.search("KEY|TOKEN|SECRET", each["name"]) for each in trainer["env"])
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert node["name"] == container["name"] == "node"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # as in the image
    assert ("WORKDIR", "/workspace") in instructions()
    assert "/workspace" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert ("USER", "1000:1000") in instructions()
    assert pod["securityContext"]["runAsUser"] == 1000


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: name and arguments, without comments."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.split(None, 1) for line in whole.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def test_dockerfile() -> None:
    """Several stages, of which the last has the installed wheel alone; pinned, without rights and without secrets."""
    found = instructions()
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}
    assert {name for name, _ in found} == known
    arguments = dict(rest.partition("=")[::2] for name, rest in found if name == "ARG")
    assert arguments == {
        "VARIANT": "cpu",
        "PYTHON_IMAGE": arguments["PYTHON_IMAGE"],
        "TORCH_INDEX": '""',
    }
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", arguments["PYTHON_IMAGE"])
    stages = [rest for name, rest in found if name == "FROM"]
    assert stages == [
        *(f"${{PYTHON_IMAGE}} AS {stage}" for stage in ("wheel", "environment", "runtime")),
        "runtime AS runtime-cpu",
        "runtime AS runtime-cuda",
        "runtime-${VARIANT}",
    ]
    last = found[found.index(("FROM", stages[2])) :]
    assert [rest for name, rest in last if name == "COPY"] == ["--from=environment /opt/harness /opt/harness"]
    assert [rest for name, rest in last if name == "USER"] == ["1000:1000"]
    assert last[-1] == ("ENTRYPOINT", '["harness-train"]')
    (smoke,) = [rest for name, rest in last if name == "RUN" and "harness-train" in rest]
    assert last.index(("RUN", smoke)) > last.index(("USER", "1000:1000"))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("train", [word for word in smoke.partition("&&")[0].split()[1:] if not word.startswith("hydra.")])
    for name, rest in found:
        if name == "RUN" and "pip install" in rest:
            assert "--constraint" in rest
        if name in ("ARG", "ENV", "RUN"):
            assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)\w*=|://", rest, re.IGNORECASE)
    copied = {word for name, rest in found if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert_clean("hadolint", "Dockerfile")


def test_the_image_has_exact_versions() -> None:
    """Of all that the package needs, and the same as those of development."""
    lines = [line for line in (ROOT / "constraints-image.txt").read_text().splitlines() if not line.startswith("#")]
    exact = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert all(exact.values())
    for requirement in map(Requirement, requires("potential-harness") or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(exact[canonicalize_name(requirement.name)], prereleases=True)
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line[0] != "#" and canonicalize_name(Requirement(line).name) in exact:
            assert Requirement(line).specifier.contains(exact[canonicalize_name(Requirement(line).name)])
