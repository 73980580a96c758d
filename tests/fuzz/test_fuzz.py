"""Every decoder of what comes from outside, under a coverage-guided fuzzer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent.parent
# A few seconds each; what is slower to decode is tried less often.
RUNS = {"configuration": 1_500, "answers": 2_000}
RUNS_USUAL = 5_000
SOAK_RUNS = int(os.environ.get("METERD_FUZZ_RUNS", "10000000"))
INPUT_BYTES_MAX = 4096
INPUT_S_MAX = 10  # An input that takes longer hangs; how long the others took is only told.

fuzzed = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris has no wheel for this machine: its corpus was tried, no more",
)


def seed() -> int:
    """One that is the same at every run, so that a finding comes again; METERD_SEED overrides."""
    return int(os.environ.get("METERD_SEED", "20261124"))


def fuzz(target: str, runs: int, directory: Path) -> None:
    """Run a target under the fuzzer in a process of its own, which prints what it found."""
    corpus.write(target, directory)
    options = (
        f"-seed={seed()}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-timeout={INPUT_S_MAX}",
        f"-artifact_prefix={directory}/",
        "-verbosity=0",
    )
    command = [sys.executable, "-m", "tests.fuzz.run", target, str(runs), str(directory), *options]
    # Sets and dictionaries in one order, or the same seed would not find the same again.
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"target"')]
    print(line)
    assert json.loads(line)["runs"] == runs


@pytest.mark.parametrize("target", TARGETS)
def test_decoder_rejects_and_never_raises_when_it_is_given_what_was_thought_of(target):
    """Good inputs and every bad one of the corpus: a verdict for each, on every machine."""
    for data in corpus.seeds(target):
        TARGETS[target](data)


@fuzzed
@pytest.mark.parametrize("target", TARGETS)
def test_decoder_rejects_and_never_raises_when_a_fuzzer_writes_its_input(target, tmp_path):
    """Whatever bytes come: a rejection, mistakes or an outcome, exact, and soon."""
    fuzz(target, RUNS.get(target, RUNS_USUAL), tmp_path)


@fuzzed
@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("target", TARGETS)
def test_decoder_rejects_and_never_raises_in_ten_million_inputs(target, tmp_path):
    """The same for as long as METERD_FUZZ_RUNS says: 10 million inputs unless it is set."""
    fuzz(target, SOAK_RUNS, tmp_path)
