"""No branch of the core is left that no unit test of the core takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.mutation.mutate import ROOT, SLOW


def test_core_is_tested_in_every_branch(tmp_path: Path):
    """100 %, by the tests of the core alone and without the slow ones that try at random."""
    command = [sys.executable, "-m", "pytest", "tests/unit/core", "-q", "-p", "no:cacheprovider"]
    options = ["--hypothesis-profile=ci", *SLOW, "--cov=meterd.core", "--cov-branch"]
    report = ["--cov-report=term-missing:skip-covered", "--cov-fail-under=100"]
    environ = {**os.environ, "COVERAGE_FILE": str(tmp_path / "coverage")}

    done = subprocess.run(
        [*command, *options, *report],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-4000:]
