"""Documents that quote the program are held against it: keys, defaults, commands, metrics."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import typer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from meterd import config
from meterd.api.overview import AgreementFigures, Figures
from meterd.cli.main import tree
from meterd.config.environment import RESERVED, _names
from meterd.config.settings import Settings, Table
from meterd.config.shape import keys_of, shape_of
from meterd.core.feeds import GENAI_TYPE, USAGE_TYPE
from meterd.core.ledger import SPECIAL_TYPES
from meterd.core.plans import Pattern
from meterd.intake import SourceState
from meterd.metrics import Metrics, Reads
from meterd.otlp import genai
from tests.documents import DOCUMENTS, ROOT, Block, blocks, code_words, prose

ALL = (*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md")
each_document = pytest.mark.parametrize("document", ALL, ids=lambda path: path.name)

# Names with a dot that end so are files and no keys.
FILES = {"db", "key", "lock", "py", "reserve", "toml"}
# Types of events, and the attributes of OpenTelemetry that are read.
NO_KEYS = {"meterd.sdk", *SPECIAL_TYPES, USAGE_TYPE, GENAI_TYPE, genai.EVENT, *genai.WANTED}


# -- Keys and defaults -----------------------------------------------------------------------------


def models_at(key: str) -> list[type[Table]]:
    """The tables that a key with dots may stand for, NAME meaning any name; [] where it is none."""
    models: list[type[Table]] = [Settings]
    named = False  # The next part is a name that the user gave.
    for part in key.split("."):
        if named:
            named = False
            continue
        fields = [keys_of(model)[part] for model in models if part in keys_of(model)]
        if not fields:
            raise LookupError(key)
        shapes = [shape_of(field) for field in fields]
        named = any(shape.container is dict and shape.tables for shape in shapes)
        models = [model for shape in shapes for model in shape.tables.values()]
    return models


def keys_in(document: Path) -> list[str]:
    """The keys with dots that a document names, and nothing that only looks like one."""
    dotted = [word for word in code_words(document) if re.fullmatch(r"[a-z]\w*(\.\w+)+", word)]
    return [word for word in dotted if word.rpartition(".")[2] not in FILES and word not in NO_KEYS]


@each_document
def test_every_key_that_a_document_names_exists(document: Path) -> None:
    """So does every variable of the environment."""
    wrong = []
    for key in keys_in(document):
        try:
            models_at(key)
        except LookupError:
            wrong.append(key)
    known = {*RESERVED, *_names(), *variables_of_the_tests()}
    texts = "\n".join([prose(document), *(block.text for block in blocks(document))])
    unknown = set(re.findall(r"METERD_[A-Z_]+", texts)) - known

    assert wrong == []
    assert unknown == set()


def variables_of_the_tests() -> set[str]:
    """What a test reads of the environment, so that a run can be repeated or made longer."""
    texts = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    return {name for text in texts for name in re.findall(r'environ\.get\("(METERD_\w+)"', text)}


def test_the_page_of_ingest_lists_every_attribute_that_is_read() -> None:
    """In the order in which they count, and no other."""
    page = (ROOT / "docs" / "ingest.md").read_text()
    table = page.partition("### What is read")[2].partition("\n\n-")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    listed = [tuple(re.findall(r"`([^`]+)`", row)) for row in rows]
    tokens = ("input", "cached", "cache_creation", "output", "reasoning")

    assert listed == [
        *(genai.TOKENS[f"{kind}_tokens"] for kind in tokens),
        *genai.NAMES.values(),
        tuple(genai.OPERATION),
    ]
    assert set(re.findall(r"`([a-z_]+)`", page.partition("**Only calls")[2])) >= genai.COUNTED


def test_the_readme_names_keys_at_all() -> None:
    """A search that finds nothing would prove nothing."""
    assert len(keys_in(DOCUMENTS[0])) > 15


def _table_of_keys() -> Iterator[tuple[list[str], str, list[str]]]:
    """The README's rows of configuration: the keys, the default, the code words of the rest."""
    for line in prose(DOCUMENTS[0]).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            keys, default, text = (re.findall(r"`([^`]*)`", cell) for cell in cells)
            yield keys, default[0] if default else "", text


def _has_default(key: str, default: str) -> bool:
    """Whether the example file, which other tests hold against the program, says so."""
    leaf, value = key.rpartition(".")[2], re.escape(default.strip('"'))
    return bool(re.search(rf'^(?:# )?{leaf} = "?{value}"?$', config.example(), re.MULTILINE))


def test_the_readme_quotes_defaults_as_they_are() -> None:
    """Those of its table."""
    quoted = [(keys[0], default) for keys, default, _ in _table_of_keys() if default]
    wrong = [pair for pair in quoted if not _has_default(*pair)]

    assert len(quoted) >= 5
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_default_that_stands_behind_its_key_is_right(document: Path) -> None:
    """`escrow.release_max` (10.00), and durations as people write them."""
    quoted = re.findall(r"`(\w+(?:\.\w+)+)` \(([0-9][^)]*)\)", prose(document))
    plain = [(key, re.sub(r"(\d+) (\w)\w*", r"\1\2", value)) for key, value in quoted]
    wrong = [pair for pair in plain if not _has_default(*pair)]

    assert quoted
    assert wrong == []


@pytest.mark.parametrize("table", ["plans.NAME.rates", "plans.NAME.settle"])
def test_the_readme_names_keys_of_prices_and_thresholds_that_exist(table: str) -> None:
    """The words beside a table's name are its keys."""
    (words,) = [words for keys, _, words in _table_of_keys() if keys == [table]]
    known = {key for model in models_at(table) for key in keys_of(model)}

    assert words
    assert set(words) <= known


def test_the_readme_names_the_patterns_that_work() -> None:
    """Exactly those that the configuration takes."""
    said = prose(DOCUMENTS[0]).partition("## What works today")[2].partition("##")[0]
    before, _, after = said.partition("is not in this version")
    named = {pattern.value for pattern in Pattern if f"`{pattern.value}`" in before}

    assert named == set(Pattern)
    assert after


# -- Commands --------------------------------------------------------------------------------------


def _lines(block: Block) -> Iterator[str]:
    """The command lines of a shell block that call meterd."""
    for line in block.text.splitlines():
        if line.startswith("meterd "):
            yield re.split(r" [>|] ", line)[0]


def commands_in(document: Path) -> list[str]:
    """Everything that a document calls meterd with."""
    typed = [line for block in blocks(document) if block.language == "sh" for line in _lines(block)]
    return typed + [word for word in code_words(document) if word.startswith("meterd ")]


def _mistake(command: str) -> str:
    """What is wrong with one command line; "" for nothing."""
    found = typer.main.get_command(tree())
    words = shlex.split(command)[1:]
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    if hasattr(found, "commands") and not found.invoke_without_command:
        return f"{command}: there is no such command"
    known = {name for option in found.params for name in (*option.opts, *option.secondary_opts)}
    unknown = [word for word in words if re.match(r"--?[a-z]", word) and word not in known]
    return f"{command}: {', '.join(unknown)}" if unknown else ""


@each_document
def test_every_command_that_a_document_names_exists(document: Path) -> None:
    """With the options that it gives."""
    mistakes = [mistake for command in commands_in(document) if (mistake := _mistake(command))]

    assert mistakes == []


def test_the_readme_names_commands_at_all() -> None:
    """A search that finds nothing would prove nothing, and a made-up command is found."""
    assert len(commands_in(DOCUMENTS[0])) > 20
    assert _mistake("meterd frobnicate") != ""
    assert _mistake("meterd status --frobnicate") != ""


@each_document
def test_every_make_target_that_a_document_names_exists(document: Path) -> None:
    """In the list that `make help` prints."""
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for block in blocks(document) for line in block.text.splitlines()]
    named = {
        found[1]
        for text in (*code_words(document), *lines)
        if (found := re.match(r"\s*make ([a-z]+)", text))
    }

    assert named <= targets


# -- Proofs ----------------------------------------------------------------------------------------

GUARANTEES = ROOT / "docs" / "guarantees.md"


def proofs_in(document: Path) -> list[str]:
    """Every `make test` and `make soak` with arguments that a document names."""
    lines = [line.strip() for block in blocks(document) for line in block.text.splitlines()]
    return [
        text
        for text in (*code_words(document), *lines)
        if re.match(r"make (test|soak) ARGS=", text)
    ]


def _tests_of(path: Path) -> list[Path]:
    return sorted(path.rglob("test_*.py")) if path.is_dir() else [path]


def _flaw(command: str) -> str:
    """What is wrong with a command that runs tests; "" for nothing."""
    target, arguments = shlex.split(command)[1:3]
    words = shlex.split(arguments.removeprefix("ARGS="))
    paths = [word for word in words if "/" in word]
    missing = [path for path in paths if not (ROOT / path).exists()]
    if target not in {"test", "soak"} or missing or not paths:
        return f"{command}: {', '.join(missing) or 'no tests'}"
    texts = [file.read_text() for path in paths for file in _tests_of(ROOT / path)]
    names = " ".join(name for text in texts for name in re.findall(r"def (test_\w+)", text))
    chosen = words[words.index("-k") + 1] if "-k" in words else ""
    unknown = {word for word in chosen.split() if word not in {"and", "or", "not"}}
    unknown = {word for word in unknown if word not in names}
    if target == "soak" and not any("mark.soak" in text for text in texts):
        return f"{command}: none of them is long"
    return f"{command}: no test is named {', '.join(sorted(unknown))}" if unknown else ""


@each_document
def test_every_proof_that_a_document_names_exists(document: Path) -> None:
    """Its files are there, and tests with the names that it chooses."""
    flaws = [flaw for command in proofs_in(document) if (flaw := _flaw(command))]

    assert flaws == []


def test_the_page_of_guarantees_has_a_proof_for_every_promise() -> None:
    """No row of its first table is without one, and a made-up proof is found."""
    table = GUARANTEES.read_text().partition("## The promises")[2].partition("\n\nA call")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]

    assert len(rows) >= 8
    assert [row for row in rows if "make test ARGS=" not in row] == []
    assert _flaw('make test ARGS="tests/unit/test_nothing.py"') != ""
    assert _flaw("make test ARGS=\"tests/test_documents.py -k 'proof or nonesuch'\"") != ""
    assert _flaw('make soak ARGS="tests/test_architecture.py"') != ""
    assert _flaw('make test ARGS="tests/test_documents.py -k proof"') == ""


# -- Metrics, output, links ------------------------------------------------------------------------


def families() -> dict[str, tuple[str, set[str], str]]:
    """Every family by its name: its type, its labels and its help text."""
    metrics = Metrics(CollectorRegistry(), meters=["tokens"], sources=["redis"])
    source = SourceState("redis", "redis", "")
    one = AgreementFigures("customer-1", Fraction(0), 0, 0, 0, 0, 0)
    figures = Figures(by_agreement=(one,))
    metrics.watch(Reads(lambda: figures, lambda: [source], lambda: 0, lambda: 0, lambda: 0))
    found = text_string_to_metric_families(metrics.exposition("")[0].decode())
    return {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels if label != "le"},
            family.documentation,
        )
        for family in found
        if not family.name.endswith("_created")
    }


@each_document
def test_every_metric_that_a_document_names_exists(document: Path) -> None:
    """By the name that a scraper sees."""
    named = {word for word in code_words(document) if re.fullmatch(r"meterd_\w+", word)}

    assert named <= families().keys()


def test_the_table_of_metrics_is_that_of_the_program() -> None:
    """Each family once, with its type, its labels and its help text."""
    rows = re.findall(
        r"^\| `(meterd_\w+)` \| (\w+) \| (.*?) \| (.*) \|$",
        (ROOT / "docs" / "metrics.md").read_text(),
        re.MULTILINE,
    )
    table = {
        name: (kind, set(re.findall(r"\w+", labels)), text) for name, kind, labels, text in rows
    }

    assert len(table) == len(rows)
    assert table == families()


def test_the_readme_shows_what_the_demo_prints() -> None:
    """The headings and the last line are those of the program."""
    (shown,) = [block.text for block in blocks(DOCUMENTS[0]) if "Difference 0" in block.text]
    program = (ROOT / "meterd" / "demo" / "story.py").read_text()
    quoted = [
        "used (the service)",
        "accrued (meterd)",
        "released (the escrow)",
        "Difference 0: paid is exactly what was used.",
    ]

    assert [text for text in quoted if text not in shown or text not in program] == []


@each_document
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    """Links inside the repository."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", prose(document))
    broken = [link for link in links if not (document.parent / link).exists()]

    assert broken == []
