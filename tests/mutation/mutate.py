"""Mutants of the core against its unit tests: `python -m tests.mutation.mutate [MODULE ...]`.

mutmut makes the mutants and runs the tests; this stages a copy for it (the checkout stays as it
is), prints the score, and holds what survives against `survivors.toml`. It fails when the score is
below the floor, when a survivor is not listed with its reason, and when a mutant's run ended in any
way that is neither a failed test nor a time-out: that would count as killed what was never tried.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CORE = Path("meterd/core")
LISTED = Path(__file__).with_name("survivors.toml")
# The machine that tries at random takes a minute where nothing is wrong: mutants must fall without.
SLOW = ("--deselect=tests/unit/core/test_settlement.py::TestService",)
# Whose tests hold a module's promises too: the ledger counts what its feeds read and its caps let
# pass, and a cap is held by trying each event against it.
TOGETHER = {"ledger": ("caps", "feeds"), "trial": ("caps",)}
FLOOR = 95.0  # Percent of all mutants that were tried.
SURVIVED, FAILED = 0, 1
# Killed for using too much processor time, in the ways in which mutmut and the kernel say so.
TIMED_OUT = frozenset({24, -24, 36, 152})


@dataclass(frozen=True)
class Mutant:
    """One mutant: its name as mutmut gives it, how its tests ended, and what it changed."""

    name: str
    ended: int
    change: str

    @property
    def module(self) -> str:
        """The module of the core that it is in."""
        return self.name.split(".")[2]


def stage(directory: Path, modules: Sequence[str] = ()) -> None:
    """Put there what mutmut needs: the package, the tests of the core, the settings.

    With modules, these alone are mutated, and their own tests alone must notice it; where one of
    them has none of its own, all tests of the core.
    """
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "meterd", directory / "meterd", ignore=unwanted)
    tests = Path("tests/unit/core")
    shutil.copytree(ROOT / tests, directory / tests, ignore=unwanted)
    text = (ROOT / "pyproject.toml").read_text()
    if modules:
        text = _with(text, "only_mutate", [str(CORE / f"{module}.py") for module in modules])
        own = {module: _tests_of(ROOT / tests, module) for module in modules}
        if all(own.values()):
            chosen = [str(tests / path.name) for paths in own.values() for path in paths]
            text = _with(text, "pytest_add_cli_args_test_selection", chosen)
    (directory / "pyproject.toml").write_text(text)


def _tests_of(directory: Path, module: str) -> list[Path]:
    """The files that hold a module's own tests, found by its name."""
    names = (module, *TOGETHER.get(module, ()))
    return sorted(path for name in names for path in directory.glob(f"test_{name}*.py"))


def _with(text: str, key: str, values: Sequence[str]) -> str:
    """Give a key of mutmut's table, which stands on one line, another list."""
    changed, times = re.subn(rf"(?m)^{key} = .*$", f"{key} = {json.dumps(values)}", text)
    assert times == 1, f"{key} does not stand on one line of pyproject.toml"
    return changed


def mutate(directory: Path, names: Sequence[str], *, seconds: float | None = None) -> list[Mutant]:
    """Run the mutants of these names (patterns; none: all of the core) in a staged copy."""
    command = [str(Path(sys.executable).with_name("mutmut")), "run", *names]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"mutmut failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found = ended(directory)
    return [Mutant(name, code, change_of(directory, name, code)) for name, code in found.items()]


def ended(directory: Path) -> dict[str, int]:
    """How the tests of each mutant ended that was tried."""
    found: dict[str, int] = {}
    for meta in sorted((directory / "mutants" / CORE).glob("*.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        found |= {name: code for name, code in codes.items() if code is not None}
    odd = {name: code for name, code in found.items() if code not in {0, 1, *TIMED_OUT}}
    assert not odd, f"these were not tried: {odd}"
    return found


def change_of(directory: Path, name: str, code: int) -> str:
    """The lines that a survivor took away and put there, without blanks at their ends."""
    if code != SURVIVED:
        return ""
    command = [str(Path(sys.executable).with_name("mutmut")), "show", name]
    shown = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    lines = shown.stdout.splitlines()
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in {"+++", "---"}]
    return "\n".join(f"{line[0]} {line[1:].strip()}" for line in changed)


def sample(directory: Path, count: int, seed: int) -> list[str]:
    """Choose so many mutants of a staged copy, the same for the same seed and code."""
    return sorted(random.Random(seed).sample(make(directory), count))


def make(directory: Path) -> list[str]:
    """Have mutmut write the mutants of a staged copy; their names, in a fixed order.

    A run after this finds them made: parsing a module and writing a thousand variants of it takes
    longer than the tests of a sample do.
    """
    code = (
        "from mutmut.__main__ import copy_src_dir, create_mutants\n"
        "copy_src_dir(); create_mutants(1)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"mutmut made no mutants:\n{done.stdout}\n{done.stderr}"
    metas = sorted((directory / "mutants" / CORE).glob("*.meta"))
    return [name for meta in metas for name in json.loads(meta.read_text())["exit_code_by_key"]]


def listed() -> dict[tuple[str, str], str]:
    """The survivors that are known, by function and change: why each may live."""
    rows = tomllib.loads(LISTED.read_text())["survivor"]
    return {(row["in"], row["change"].strip()): row["reason"] for row in rows}


def unlisted(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Survivors that nobody has looked at."""
    known = listed()
    alive = [mutant for mutant in mutants if mutant.ended == SURVIVED]
    return [mutant for mutant in alive if (function_of(mutant.name), mutant.change) not in known]


def function_of(name: str) -> str:
    """`settlement.step` of `meterd.core.settlement.x_step__mutmut_7`."""
    module, _, rest = name.removeprefix("meterd.core.").partition(".")
    mangled = rest.rpartition("__mutmut_")[0]
    parts = mangled.strip("x").split("ǁ") if "ǁ" in mangled else [mangled.removeprefix("x_")]
    return ".".join([module, *(part for part in parts if part)])


def score(mutants: Sequence[Mutant]) -> float:
    """Percent that some test noticed."""
    killed = sum(mutant.ended != SURVIVED for mutant in mutants)
    return 100 * killed / len(mutants)


def told(mutants: Sequence[Mutant]) -> str:
    """The score of each module and of all."""
    counts = Counter(mutant.module for mutant in mutants)
    lines = []
    for module, tried in sorted(counts.items()):
        own = [mutant for mutant in mutants if mutant.module == module]
        killed = sum(mutant.ended != SURVIVED for mutant in own)
        lines.append(f"{module:<12}{tried:>6} mutants {killed:>6} killed {score(own):>7.1f} %")
    killed = sum(mutant.ended != SURVIVED for mutant in mutants)
    lines.append(
        f"{'all':<12}{len(mutants):>6} mutants {killed:>6} killed {score(mutants):>7.1f} %"
    )
    return "\n".join(lines)


def entry(mutant: Mutant) -> str:
    """A survivor as `survivors.toml` would hold it, to be completed with a reason."""
    head = f'[[survivor]]\nin = "{function_of(mutant.name)}"\n'
    return f"{head}change = '''\n{mutant.change}'''\nreason = \"\"\n"


def main() -> int:
    """Run, print, and say by the exit code whether all is well."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        stage(directory, sys.argv[1:])
        if not make(directory):
            print("Nothing can be mutated there: facts alone, and no line that does something.")
            return 0
        mutants = mutate(directory, [])
    print(told(mutants))
    new = unlisted(mutants)
    for mutant in new:
        print(f"\n{entry(mutant)}", end="")
    if new:
        print(f"\n{len(new)} survivors are not in {LISTED.relative_to(ROOT)}: kill or explain them")
    return int(bool(new) or score(mutants) < FLOOR)


if __name__ == "__main__":
    sys.exit(main())
