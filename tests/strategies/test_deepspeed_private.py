"""DeepSpeed has the undocumented attributes that whole checkpoints need; one that is lost is named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from support.commands import BIN, ROOT, run

from harness.strategies.deepspeed_private import PRIVATE, TESTED


@pytest.mark.timeout(300)
def test_every_attribute_is_there_and_missed(tmp_path: Path) -> None:
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])  # deepspeed looks for ninja there
    script = str(ROOT / "tests" / "support" / "deepspeed_parts.py")
    done = run([sys.executable, script], tmp_path, timeout=250, PATH=path)
    assert done.code == 0, done.err[-4000:]
    seen = json.loads(done.out.splitlines()[-1])
    missed = set()
    for stage, errors in seen.items():
        assert errors.pop("complete") is None, stage
        for name, error in errors.items():
            assert error is not None, f"nobody misses {name} of stage {stage}"
            assert f"has lost {name}, which" in error
            assert f"pip install deepspeed=={TESTED}" in error
        missed |= errors.keys()
    assert missed == {f"{name} ({what})" for what, names in PRIVATE.items() for name in names}
