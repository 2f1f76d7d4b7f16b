"""The wheel, as the Dockerfile makes it: it brings its configs along, and trains from any directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import ROOT, TINY, Finished, run

import harness

pytestmark = pytest.mark.timeout(400)


def pip(*arguments: str, folder: Path) -> None:
    """pip without a network."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def allowed() -> list[str]:
    """What .dockerignore lets into an image: all else is not there when the wheel is made."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return [line[1:].rstrip("/") for line in lines if line.startswith("!")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for name in allowed():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", ".", folder=folder)
    (made,) = (folder / "wheels").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """The command as it is installed; this checkout is not on the path that it sees."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel), folder=target)

    def command(*arguments: str, folder: Path) -> Finished:
        script = str(target / "bin" / "harness-train")
        done = run([script, *arguments], folder, PYTHONPATH=os.pathsep.join([str(target), str(folder)]))
        assert done.code == 0, done.err[-4000:]
        return done

    command.target = target  # type: ignore[attr-defined]
    return command


def test_wheel_holds_the_package_and_its_configs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    packed = {f"harness/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    packed |= {
        str(path.relative_to(ROOT)) for folder in ("harness", "hydra_plugins") for path in (ROOT / folder).rglob("*.py")
    }
    assert packed <= names
    settings = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'"(\w+)"', settings.partition("\npackages = [")[2].partition("]")[0])
    assert {name.partition("/")[0] for name in names} == {
        *packages,
        f"potential_harness-{harness.__version__}.dist-info",
    }
    assert "harness-train = harness.train:main" in points
    assert "harness-sweep = harness.sweep:main" in points
    assert "harness-eval = harness.evaluate:main" in points
    assert "harness-data = harness.data_command:main" in points
    assert {"harness/conf/build.yaml", "harness/conf/data/store.yaml"} <= names


def test_version_has_one_source(installed: Callable[..., Finished], tmp_path: Path) -> None:
    """The package says the version; the metadata of the wheel, and of the package as it is installed, take it up."""
    target = installed.target  # type: ignore[attr-defined]
    code = "import importlib.metadata, harness; print(harness.__version__, harness.__file__)\n"
    code += "print(importlib.metadata.version('potential-harness'))"
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(target))
    package, metadata = done.out.splitlines()
    assert package == f"{metadata} {target / 'harness' / '__init__.py'}", done.err
    assert metadata == harness.__version__
    literals = [path for path in (ROOT / "pyproject.toml", *(ROOT / "harness").rglob("*.py")) if version_in(path)]
    assert literals == [ROOT / "harness" / "__init__.py"]


def version_in(path: Path) -> bool:
    return f'"{harness.__version__}"' in path.read_text()


def test_installed_command_explains_itself(installed: Callable[..., Finished], tmp_path: Path) -> None:
    done = installed("--help", folder=tmp_path)
    assert "trainer: cpu, debug, default, gpu, multinode" in done.out
    assert not list(tmp_path.iterdir())
    done = installed("hydra/launcher=torchrun", "--cfg", "hydra", "--package", "hydra.launcher", folder=tmp_path)
    assert "_target_: hydra_plugins.harness_launcher.TorchrunLauncher" in done.out


def test_installed_command_trains(installed: Callable[..., Finished], tmp_path: Path) -> None:
    done = installed("trainer=debug", "logger=csv", *TINY, folder=tmp_path)
    (folder,) = done.runs
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    target = installed.target  # type: ignore[attr-defined]
    assert f"path: {target}/harness/conf" in (folder / ".hydra" / "hydra.yaml").read_text()
    assert str(ROOT) not in (folder / ".hydra" / "hydra.yaml").read_text()


def test_installed_command_takes_configs_and_code_of_a_user(installed: Callable[..., Finished], tmp_path: Path) -> None:
    """A folder with an experiment of the user's own, and a callback beside it."""
    mine = tmp_path / "my_configs" / "experiment"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /trainer: debug\n  - override /logger: none\n"
        "name: mine\nloss: {coeffs: {forces: 7}}\ncallbacks: {hello: {_target_: my_code.Hello}}\n"
    )
    (tmp_path / "my_code.py").write_text(
        "from lightning.pytorch import Callback\n\n\nclass Hello(Callback):\n"
        "    def on_train_start(self, trainer, module):\n"
        "        print('coefficient', module.loss.given_coeffs['forces_mse'])\n"
    )
    done = installed("--config-dir", "my_configs", "experiment=mine", "test=false", *TINY, folder=tmp_path)
    assert "coefficient 7" in done.out
    assert [path.parent.name for path in done.runs] == ["mine"]
