"""README.md and docs/*.md as tests read them: their blocks, and the code words of their prose."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_EXPECTED = re.compile(r"^(?:#|//) -> (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block. Its first line names it; lines that begin with `# -> ` are what it says."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Its first line."""
        return self.text.splitlines()[0]

    @property
    def place(self) -> str:
        """Where a person finds it."""
        return f"{self.document.name}:{self.line}"

    @property
    def expected(self) -> list[str]:
        """What the document says that it prints, in order."""
        return _EXPECTED.findall(self.text)


def blocks(document: Path) -> list[Block]:
    """Every fenced block of a document, in order."""
    text = document.read_text()
    return [
        Block(document, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in _FENCE.finditer(text)
    ]


def prose(document: Path) -> str:
    """A document without its blocks."""
    return _FENCE.sub("", document.read_text())


def code_words(document: Path) -> list[str]:
    """What stands between backticks in the prose of a document."""
    return _SPAN.findall(prose(document))
