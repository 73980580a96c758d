"""The shape of the house: who may import whom, and what stands in no file.

The tables below are the rules. A room that is new says here whom it may import.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "meterd"

# Each of the core may import those before it, and nothing else of meterd.
CORE_ORDER = (
    "money",
    "flaws",
    "events",
    "envelopes",
    "paths",
    "meters",
    "feeds",
    "pricing",
    "caps",
    "plans",
    "settlement",
    "advice",
    "thresholds",
    "openings",
    "changes",
    "sequences",
    "keys",
    "accounts",
    "trial",
    "ledger",
    "discovery",
    "renewals",
    "statements",
    "holds",
    "quotes",
    "simulate",
)
# What the core may take from outside: none of these knows a clock, a file, a log or a network.
CORE_LIBRARIES = frozenset(
    {
        "__future__",
        "binascii",
        "bisect",
        "collections",
        "dataclasses",
        "datetime",
        "enum",
        "fractions",
        "functools",
        "hashlib",
        "heapq",
        "itertools",
        "jsonpath",
        "math",
        "msgspec",
        "re",
        "typing",
    }
)

# For each room, the rooms that it may import. A room may always import itself. `x.__init__` is the
# one module that a package opens with: the loops know a protocol and never its makers. `meterd` is
# the version.
ALLOWED: Mapping[str, frozenset[str]] = {
    room: frozenset(allowed.split())
    for room, allowed in {
        "__init__": "",
        "__main__": "cli",
        "errors": "",
        "logs": "",
        "core": "",  # See CORE_ORDER.
        "config": "core errors",
        # What the configuration says, as facts of the core.
        "parts": "config core producers",
        # Edges never know each other.
        "sources": "core config errors logs",
        "store": "core config errors logs",
        "escrow": "core config errors logs",
        "metrics": "core config errors logs meterd",
        # It shares nothing with what it audits but the scales of money.
        "audit": "core.money errors",
        # What a store knows of single events, for a simulation.
        "history": "audit core errors store",
        # The door to the money, and the loops on both sides of it.
        "signatures": "",
        "producers": "core sources.__init__",
        "receipts": "core.changes errors",
        "bookkeeper": "core errors logs receipts producers signatures sources.__init__",
        "intake": "bookkeeper core errors logs producers sources.__init__",
        "settler": "bookkeeper core errors logs",
        "reconciler": "bookkeeper core errors logs",
        "opener": "bookkeeper core errors logs",
        "listening": "config errors",
        "supervision": "",
        # What exporters of OpenTelemetry send, as events; it knows no HTTP.
        "otlp": "core sources.__init__",
        # Faces.
        "api": "bookkeeper core config errors logs mcp meterd otlp producers sources.__init__",
        # The way to `/mcp`, for those who bring tools; it knows the protocol and no money.
        "mcp": "",
        # `check --live` and `verify --live` ask the escrow service as the daemon would.
        "cli": "app audit config core demo errors escrow history listening meterd parts receipts"
        " sandbox",
        # It starts processes and looks at them from outside.
        "demo": "core errors sandbox meterd sdk",
        # Another party's server.
        "sandbox": "core.money errors logs mcp",
        # Runs inside other people's programs, and reads an answer as the daemon does.
        "sdk": "core.money core.settlement errors escrow.documents escrow.line escrow.outcomes",
        "app": "*",
    }.items()
}

# Where money and quantities are, `float(...)` needs a reason.
EXACT_ROOMS = (
    *("core", "escrow", "sandbox", "settler", "bookkeeper", "intake", "store", "audit"),
    "sdk",
)
FLOATS_ALLOWED = {
    "meterd/sandbox/faults.py": "probabilities and seconds of faults",
    "meterd/escrow/outcomes.py": "seconds of Retry-After",
}
# In the core `/` makes a float of two integers just as well.
DIVISIONS_ALLOWED = {"meterd/core/ledger.py": "the window of event times, in seconds"}


@dataclass(frozen=True, slots=True)
class Module:
    """One module of meterd: its name without `meterd.`, its file and its syntax tree."""

    name: str
    file: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The first part of the name."""
        return self.name.split(".")[0]


def modules() -> list[Module]:
    """Every module of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found.append(Module(name, str(path.relative_to(ROOT)), ast.parse(path.read_text())))
    return found


def module_of(name: str, text: str) -> Module:
    """A module that is not there, to see whether a rule would notice it."""
    return Module(name, f"meterd/{name.replace('.', '/')}.py", ast.parse(text))


def imports(tree: ast.Module) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Yield (line, module, names) of every import, also inside functions and TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.lineno, node.module or "", tuple(alias.name for alias in node.names)


def inner_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, module without `meterd.`) of meterd's own; `meterd` for the version."""
    for line, module, names in imports(tree):
        top, _, rest = module.partition(".")
        if top != "meterd":
            continue
        for name in names or ("",):
            yield line, _module_named(rest, name)


def _module_named(rest: str, name: str) -> str:
    """What `from meterd.rest import name` imports: a module where there is one, else `rest`."""
    inside = ".".join(part for part in (rest, name) if part)
    path = PACKAGE.joinpath(*inside.split("."))
    if path.with_suffix(".py").is_file():
        return inside
    if path.is_dir():
        return f"{inside}.__init__"
    if not rest:
        return "meterd"
    return f"{rest}.__init__" if PACKAGE.joinpath(*rest.split(".")).is_dir() else rest


def wrong_imports(module: Module) -> list[str]:
    """List the imports of meterd's own modules that point the wrong way."""
    wrong = []
    for line, target in inner_imports(module.tree):
        if not may_import(module, target):
            wrong.append(f"{module.file}:{line}: {module.name} may not import {target}")
    return wrong


def may_import(module: Module, target: str) -> bool:
    """Whether the tables allow it."""
    room = target.split(".", maxsplit=1)[0]
    if module.room == "core":
        return may_import_in_core(module.name, target)
    if room == module.room:
        return True
    allowed = ALLOWED.get(module.room, frozenset())
    return bool({"*", target, room} & allowed)


def may_import_in_core(name: str, target: str) -> bool:
    """Whether the order of the core allows it."""
    order = [f"core.{part}" for part in CORE_ORDER]
    return name in order and target in order[: order.index(name)]


def foreign_imports_of_core(module: Module) -> list[str]:
    """List what a module of the core imports from outside and should not."""
    return [
        f"{module.file}:{line}: the core may not import {name}"
        for line, name, _ in imports(module.tree)
        if name.split(".")[0] not in CORE_LIBRARIES | {"meterd"}
    ]


CLOCKS = frozenset({"now", "utcnow", "today"})
OUTSIDE = frozenset({"open", "print", "input"})


def impurities_of_core(module: Module) -> list[str]:
    """List calls by which the core would ask a clock, open a file or print; and awaits."""
    found = []
    for node in ast.walk(module.tree):
        called = node.func if isinstance(node, ast.Call) else None
        asks = isinstance(called, ast.Attribute) and called.attr in CLOCKS
        touches = isinstance(called, ast.Name) and called.id in OUTSIDE
        if asks or touches or isinstance(node, ast.AsyncFunctionDef | ast.Await):
            found.append(f"{module.file}:{node.lineno}: the core is pure")  # type: ignore[attr-defined]
    return found


def floats(module: Module) -> list[str]:
    """List calls of `float` in a module, and true divisions in the core, which make one."""
    found = []
    for node in ast.walk(module.tree):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if called and node.func.id == "float":
            found.append(f"{module.file}:{node.lineno}: float(...)")
        divides = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        if divides and module.room == "core" and module.file not in DIVISIONS_ALLOWED:
            found.append(f"{module.file}:{node.lineno}: / makes a float; use // or Fraction")
    return found


# -- Imports -------------------------------------------------------------------------------------


def test_every_room_stands_in_the_table() -> None:
    """A new room says whom it may import before it imports anybody."""
    rooms = {module.room for module in modules()}

    assert rooms - set(ALLOWED) == set()


def test_imports_point_one_way() -> None:
    """No module imports one that the table does not allow it, not even inside a function."""
    wrong = [line for module in modules() for line in wrong_imports(module)]

    assert wrong == []


def test_nobody_imports_the_composition_root_or_the_command_line() -> None:
    """`app` knows all others, so only the command line knows it; and only `__main__` knows that."""
    knowing = {
        (module.room, room)
        for module in modules()
        for _, target in inner_imports(module.tree)
        if (room := target.split(".")[0]) in {"app", "cli"} and room != module.room
    }

    assert knowing <= {("cli", "app"), ("__main__", "cli")}


def test_core_takes_nothing_from_outside_but_pure_libraries() -> None:
    """The core imports msgspec and what of the standard library knows no clock, file or network."""
    foreign = [
        line
        for module in modules()
        if module.room == "core"
        for line in foreign_imports_of_core(module)
    ]

    assert foreign == []


def test_core_is_pure() -> None:
    """The core asks no clock, opens nothing, prints nothing and awaits nothing."""
    impure = [
        line for module in modules() if module.room == "core" for line in impurities_of_core(module)
    ]

    assert impure == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("core.money", "from meterd.core.events import UsageEvent"),
        ("core.events", "from meterd import errors"),
        ("core.events", "def f():\n    from meterd.core import ledger"),
        ("store.sqlite", "from meterd.sources import Source"),
        ("sources.mqtt", "from meterd.store import identities"),
        ("escrow.client", "import meterd.bookkeeper"),
        ("bookkeeper", "from meterd.sources.redis_streams import RedisStreamSource"),
        ("api.server", "from meterd.app import run"),
        ("bookkeeper", "from meterd.cli import main"),
        ("sandbox.store", "from meterd.core import settlement"),
        ("sandbox.store", "from meterd.escrow import outcomes"),
        ("config.checks", "from meterd.sources import Source"),
        ("new_room", "from meterd.core import money"),
        ("audit.checks", "from meterd.core.pricing import RateCard"),
        ("audit.records", "from meterd.store import schema"),
        ("sdk.blocking", "from meterd.escrow.client import EscrowClient"),
    ],
)
def test_an_import_the_wrong_way_is_found(name: str, text: str) -> None:
    """The rule is not asleep: each of these imports is reported."""
    wrong = wrong_imports(module_of(name, text))

    assert len(wrong) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("core.ledger", "from meterd.core.settlement import Escrow"),
        ("core.events", "from meterd.core import money"),
        ("bookkeeper", "from meterd.sources import Deliveries"),
        ("sandbox.store", "from meterd.core.money import MICROS"),
        ("cli.local", "from meterd import __version__, app"),
        ("app", "from meterd.store.sqlite import SqliteStore"),
    ],
)
def test_an_import_the_right_way_is_let_pass(name: str, text: str) -> None:
    """Neither does the rule cry at what is allowed."""
    wrong = wrong_imports(module_of(name, text))

    assert wrong == []


@pytest.mark.parametrize("text", ["import asyncio", "from time import monotonic", "import os.path"])
def test_an_impure_library_in_the_core_is_found(text: str) -> None:
    """The core's list of libraries is a list of what is allowed, so that nothing new slips in."""
    foreign = foreign_imports_of_core(module_of("core.money", text))

    assert len(foreign) == 1


# -- Texts ---------------------------------------------------------------------------------------


def test_every_module_says_why_it_exists() -> None:
    """Every module opens with a docstring."""
    silent = [module.file for module in modules() if not ast.get_docstring(module.tree)]

    assert silent == []


def test_no_float_comes_near_money() -> None:
    """Where amounts and quantities are, a float needs a reason in the table."""
    found = [
        line
        for module in modules()
        if module.room in EXACT_ROOMS and module.file not in FLOATS_ALLOWED
        for line in floats(module)
    ]

    assert found == []


def test_every_exception_for_floats_is_still_needed() -> None:
    """An exception without a use would hide the next mistake."""
    used = {module.file for module in modules() if floats(module)}

    assert set(FLOATS_ALLOWED) - used == set()


def kept_files() -> list[Path]:
    """Every file that is, or will be, under version control; all files where there is none."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        names = {name for name in answer.stdout.split("\0") if name}
        return sorted(ROOT / name for name in names if (ROOT / name).is_file())
    return sorted(_walk())


def _walk() -> Iterator[Path]:
    for folder, inside, names in os.walk(ROOT):
        inside[:] = [name for name in inside if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(folder, name) for name in names)


def texts() -> Iterator[tuple[str, int, str]]:
    """Yield (file, line number, line) of every text that is kept."""
    for path in kept_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            yield str(path.relative_to(ROOT)), number, line


# Put together here, so that this file is no find of its own.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
HOSTS = (
    "py" + "pi.org",
    "pythonhosted" + ".org",
    "npmjs" + ".org",
    "debian" + ".org",
    "golang" + ".org",
)
PLACES = ("wo" + "rk", "ro" + "ot", "ho" + "me", "tm" + "p", "opt/py" + "pi", "opt/whe" + "els")
HERE = re.compile(
    "|".join([*map(re.escape, HOSTS), r"(?<![\w.\-/}*])/(?:" + "|".join(PLACES) + r")(?:/|\b)"])
)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [(UNFINISHED, "unfinished"), (HERE, "an address of a registry or a path of one machine")],
)
def test_nothing_kept_is_unfinished_or_belongs_to_one_machine(
    pattern: re.Pattern[str], what: str
) -> None:
    """What is to be done stands in no comment; where something was built stands nowhere."""
    found = [f"{name}:{number}: {what}" for name, number, line in texts() if pattern.search(line)]

    assert found == []


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_a_lock_names_packages_and_hashes_alone(lock: str) -> None:
    """Every package is pinned with hashes, and nothing says where it comes from."""
    lines = [
        line for line in (ROOT / lock).read_text().splitlines() if not line.startswith("    #")
    ]
    pinned = [line for line in lines if not line.startswith(" ")]

    assert [line for line in pinned if "==" not in line or not line.endswith("\\")] == []
    assert [line for line in lines if "://" in line or line.startswith("-")] == []


def test_both_locks_agree() -> None:
    """The tests run on the very versions that users install."""
    users = pins("requirements.lock")

    assert users - pins("requirements-dev.lock") == set()


def pins(lock: str) -> set[str]:
    """The pinned packages of a lock file, for whatever platform."""
    lines = (ROOT / lock).read_text().splitlines()
    return {re.split(r"[ ;\\]", line)[0] for line in lines if re.match(r"[a-z0-9]", line)}


def test_meterd_refuses_to_start_without_its_assertions() -> None:
    """Under -O the invariants would be switched off, so nothing runs."""
    command = [sys.executable, "-O", "-m", "meterd", "version"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert (answer.returncode, answer.stdout) == (2, "")
    assert "-O" in answer.stderr
