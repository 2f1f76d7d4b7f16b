"""Check the sdist and the wheel in dist/: their files, their metadata, and a training from the installed wheel.

Run by `make dist` and, with --release, by `make release`. Needs no network: the wheel is installed without its
dependencies into an environment outside of this checkout, which borrows those of the environment that runs this file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
TINY = (
    *("trainer=debug", "logger=csv", "callbacks.parity=null", "max_epochs=2"),
    *("data.num_frames=24", "data.split={val:4,test:4}", "data.batch_size=4"),
    *("model.hidden_channels=8", "model.num_filters=8", "model.num_interactions=1", "model.num_gaussians=8"),
)


def refuse(message: str) -> NoReturn:
    """End with an error."""
    sys.exit(f"error: {message}")


def run(*command: str, folder: Path = ROOT, seconds: float = 300, **environment: str) -> str:
    """Output of a command; its failure ends this one."""
    done = subprocess.run(
        command, cwd=folder, env=environment or None, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        refuse(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def source_version() -> str:
    """The version in harness/__init__.py."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "harness" / "__init__.py").read_text(), flags=re.MULTILINE)
    if found is None:
        refuse('harness/__init__.py has no line __version__ = "..."')
    return found[1]


def check_changelog(version: str, *, dated: bool) -> str:
    """The changelog has a section of the version; that of a release has its date."""
    text = (ROOT / "CHANGELOG.md").read_text()
    found = re.search(rf"^## \[{re.escape(version)}\] - (.+)$", text, flags=re.MULTILINE)
    if found is None:
        refuse(f"CHANGELOG.md has no section '## [{version}] - ...'; versions there: {re.findall(r'## .(.+?)]', text)}")
    if dated and not re.fullmatch(r"\d{4}-\d\d-\d\d", found[1]):
        refuse(f"CHANGELOG.md dates {version} {found[1]!r}; expected the day of the release, such as 2026-01-31")
    return found[1]


def check_checkout(version: str) -> None:
    """Nothing is uncommitted, and the tag is free."""
    changed = run("git", "status", "--porcelain").splitlines()
    if changed:
        refuse(f"the checkout has changes that are not committed: {', '.join(line[3:] for line in changed[:5])}")
    if run("git", "tag", "--list", f"v{version}").strip():
        refuse(f"the tag v{version} exists; expected a version in harness/__init__.py that has not been released")


def tracked(*folders: str) -> set[str]:
    """Files that git knows, and that have not been deleted."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def check_files(sdist: Path, wheel: Path) -> tuple[int, int]:
    """Both hold what git knows: nothing is missing, and nothing lay about in the checkout."""
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    strange, missing = packed - tracked() - {"PKG-INFO"}, tracked() - packed
    if strange or missing:
        refuse(f"{sdist.name} differs from the checkout. Beside it: {sorted(strange)}. Missing: {sorted(missing)}")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = tracked("harness", "hydra_plugins") | {f"harness/{name}" for name in tracked("conf")}
    if names != expected:
        refuse(
            f"{wheel.name} differs from the checkout. Beside it: {sorted(names - expected)}. "
            f"Missing: {sorted(expected - names)}"
        )
    return len(packed), len(names)


def install(wheel: Path, folder: Path) -> Path:
    """The wheel in an environment of its own; the folder of its commands."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    # editable packages of that environment are not taken over: their .pth files count in its own directory only
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin"


def check_installed(commands: Path, version: str, folder: Path) -> str:
    """Import, help and a training of seconds; what came of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    code = (
        "import harness, importlib.metadata as m; print(harness.__version__, m.version('potential-harness'));"
        "print(harness.__file__)"
    )
    versions, place = run(str(commands / "python"), "-c", code, folder=folder, **environment).splitlines()
    if versions != f"{version} {version}" or Path(place).is_relative_to(ROOT):
        refuse(f"the installed package has the versions {versions} (package, metadata) at {place}; expected {version}")
    helps = {"harness-train": "Configuration groups"}
    helps |= {name: f"usage: {name}" for name in ("harness-sweep", "harness-eval")}
    for command, expected in helps.items():
        if expected not in run(str(commands / command), "--help", folder=folder, **environment):
            refuse(f"{command} --help does not show {expected!r}")
    run(str(commands / "harness-train"), *TINY, folder=folder, **environment)
    (results,) = folder.glob("outputs/*/*/result.json")
    result = json.loads(results.read_text())
    return f"{result['monitor']} = {result['objective']:.6g}"


def main() -> None:
    """Check, and print a line for each check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", action="store_true", help="also what a release needs: a clean checkout, a date")
    release = parser.parse_args().release
    version = source_version()
    date = check_changelog(version, dated=release)
    print(f"version    {version}, in CHANGELOG.md: {date}")
    if release:
        check_checkout(version)
        print(f"checkout   clean, tag v{version} is free")
    sdist, wheel = DIST / f"potential_harness-{version}.tar.gz", DIST / f"potential_harness-{version}-py3-none-any.whl"
    found = sorted(path.name for path in DIST.glob("*"))
    if found != sorted((sdist.name, wheel.name)):
        refuse(f"dist/ holds {found}; expected {sdist.name} and {wheel.name}")
    in_sdist, in_wheel = check_files(sdist, wheel)
    print(f"sdist      {sdist.name}: {in_sdist} files, those of the checkout")
    print(f"wheel      {wheel.name}: {in_wheel} files, the package with its configs")
    run(sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel))
    print("metadata   twine check --strict passed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = install(wheel, folder / "environment")
        result = check_installed(commands, version, folder)
    print(f"installed  imports, shows its help, and trains: {result}")
    if release:
        print(f"\nTo release:\n  git tag v{version}\n  git push origin v{version}\n  twine upload dist/*")


if __name__ == "__main__":
    main()
