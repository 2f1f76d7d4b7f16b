"""The door for a second person: hooks that run what CI runs, forms that GitHub takes, commands that exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import BIN, ROOT

HOOKS: list[dict[str, Any]] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def recipe(target: str) -> str:
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert found is not None, f"the Makefile has no target {target}"
    return found[1]


def test_hooks_run_what_lint_runs() -> None:
    targets = [hook["entry"].removeprefix("make --no-print-directory ") for hook in HOOKS]
    assert recipe("lint").split("--no-print-directory")[1].split() == targets
    assert all(hook["language"] == "system" for hook in HOOKS), "a hook would download its tool"
    assert "make lint " in (ROOT / ".ci" / "run").read_text()
    checked = {
        "lint-code": "harness/fields.py",
        "lint-format": "tests/conftest.py",
        "lint-shell": "launch/slurm.sbatch",
        "lint-docker": "Dockerfile",
    }
    for target, hook in zip(targets, HOOKS, strict=True):
        assert (ROOT / checked[target]).is_file()
        assert re.search(hook["files"], checked[target])


def test_pre_commit_passes_a_clean_tree_and_stops_a_badly_formatted_file(tmp_path: Path) -> None:
    if importlib.util.find_spec("pre_commit") is None:
        pytest.skip("pre-commit is not installed; the extra dev has it")
    for name in (".pre-commit-config.yaml", "Makefile", "pyproject.toml", "Dockerfile", "README.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in ("launch", ".ci", "hydra_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", tmp_path / "benchmarks")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(BIN)
    (tmp_path / ".gitignore").write_text(".venv\n.ruff_cache\n")
    (tmp_path / "user.py").write_text('"""A module."""\n\nNUMBER = 1\n')
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
        "PRE_COMMIT_HOME": str(tmp_path / "home"),
        # nothing may be downloaded
        "HTTPS_PROXY": "http://127.0.0.1:1",
        "PIP_NO_INDEX": "1",
        "NO_COLOR": "1",
    }

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    def hooks() -> subprocess.CompletedProcess[str]:
        assert call("git", "add", "-A").returncode == 0
        return call(sys.executable, "-m", "pre_commit", "run", "--all-files", "--color", "never")

    assert call("git", "init", "-q").returncode == 0
    clean = hooks()
    assert clean.returncode == 0, clean.stdout + clean.stderr
    assert clean.stdout.count("Passed") == len(HOOKS) == 4
    (tmp_path / "user.py").write_text('"""A module."""\nNUMBER   =  1\n')
    bad = hooks()
    assert bad.returncode == 1
    assert "user.py" in bad.stdout
    assert "1 file would be reformatted" in bad.stdout
    assert (bad.stdout.count("Passed"), bad.stdout.count("Failed")) == (3, 1)
    assert (tmp_path / "user.py").read_text() == '"""A module."""\nNUMBER   =  1\n', "hooks check, as CI does"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_have_what_github_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(form)
    identities = [item["id"] for item in form["body"] if item["type"] != "markdown"]
    assert len(set(identities)) == len(identities)
    for item in form["body"]:
        assert item["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert ("value" if item["type"] == "markdown" else "label") in item["attributes"]
        assert item["type"] != "dropdown" or all(isinstance(option, str) for option in item["attributes"]["options"])


def test_bug_form_asks_for_what_is_needed_to_repeat_it() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert {item["id"] for item in form["body"] if "id" in item} == {
        "what", "command", "run", "input", "versions", "launcher", "strategy", "ranks",
    }  # fmt: skip
    (versions,) = [item for item in form["body"] if item.get("id") == "versions"]
    commands = re.findall(r"^python -m .*$", versions["attributes"]["description"], flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert importlib.util.find_spec(command.split()[2]) is not None, command


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/releasing.md", "README.md"])
def test_make_targets_of_the_documents_exist(page: str) -> None:
    lines = re.findall(r"(?:^|`)make ([a-z -]+?)(?:`|  #|$)", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert lines
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word for line in lines for word in line.split()} <= targets


def check_dist(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / ".ci" / "check_dist.py"), *arguments],
        cwd=root, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / ".ci").mkdir()
    shutil.copyfile(ROOT / ".ci" / "check_dist.py", tmp_path / ".ci" / "check_dist.py")
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.3] - 2026-01-31\n\n## [1.2.2] - unreleased\n")
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, timeout=60)
    author = ["-c", "user.name=Author", "-c", "user.email=author@example.org"]
    subprocess.run(["git", *author, "commit", "-qm", "All"], cwd=tmp_path, check=True, timeout=60)
    return tmp_path


def test_release_without_changelog_date_tag_or_commit_is_refused(checkout: Path) -> None:
    done = check_dist("--release", root=checkout)
    assert "checkout   clean, tag v1.2.3 is free" in done.stdout
    assert done.stderr.startswith("error: dist/ holds []; expected potential_harness-1.2.3.tar.gz and")

    (checkout / "notes.txt").write_text("lies about")
    assert "changes that are not committed: notes.txt" in check_dist("--release", root=checkout).stderr
    (checkout / "notes.txt").unlink()

    subprocess.run(["git", "tag", "v1.2.3"], cwd=checkout, check=True, timeout=60)
    assert "the tag v1.2.3 exists" in check_dist("--release", root=checkout).stderr

    package = checkout / "harness" / "__init__.py"
    package.write_text('__version__ = "1.2.2"\n')
    assert "dates 1.2.2 'unreleased'; expected the day" in check_dist("--release", root=checkout).stderr
    assert "1.2.2, in CHANGELOG.md: unreleased" in check_dist(root=checkout).stdout
    package.write_text('__version__ = "1.3.0"\n')
    found = check_dist(root=checkout)
    assert found.returncode == 1
    assert "no section '## [1.3.0] - ...'; versions there: ['1.2.3', '1.2.2']" in found.stderr
