"""From a file, the environment and secret files to settings, or to every mistake at once.

The rule: whoever repairs the list of mistakes is done. Each names its key as the file would write
it and what to write instead; none repeats a secret. The order is fixed: find, parse, override, read
secret files, check each table, check what lies between tables.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from meterd.config.checks import Good, key_of, mistakes_between, notes_on
from meterd.config.environment import (
    CONFIG_NAME,
    Draft,
    override,
    read_secret_files,
)
from meterd.config.plans import PlanSettings
from meterd.config.settings import (
    BUILT_IN_SOURCES,
    NOT_AVAILABLE,
    SOURCE_KINDS,
    AgreementSettings,
    DiscoverSettings,
    EscrowSettings,
    HttpSettings,
    MeterSettings,
    ProducerSettings,
    Settings,
    SourceSettings,
    WalletSettings,
)
from meterd.config.shape import keys_of, tables_in
from meterd.config.table import REQUIRED, Place, Table, nearest
from meterd.config.values import PATTERN_SENTENCES, REFUSED
from meterd.errors import ConfigurationError, Mistake

SEARCHED = (Path("meterd.toml"), Path("/etc/meterd/meterd.toml"))
FILE_BYTES_MAX = 4 * 1024 * 1024  # Ten thousand agreements; a larger file is something else.
START_HINT = "write one to begin with: meterd config example > meterd.toml"

Warn = Callable[[Mistake], None]
T = TypeVar("T")


def _say_nothing(note: Mistake) -> None:
    """Drop a note."""


def load(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    warn: Warn = _say_nothing,
    searched: Sequence[Path] = SEARCHED,
) -> Settings:
    """Read the configuration from `path`, else `$METERD_CONFIG`, else the first of `searched`.

    `warn` is given what is allowed but deserves a word (a secret file that everybody can read).
    Raises `ConfigurationError` with every mistake. Called again on SIGHUP; it changes nothing.
    """
    file = find(path, environ, searched)
    return parse(_text_of(file), environ, origin=str(file), warn=warn)


def find(
    path: Path | None, environ: Mapping[str, str], searched: Sequence[Path] = SEARCHED
) -> Path:
    """Choose the file that `load` reads. Raises `ConfigurationError` when there is none."""
    if path is not None:
        return path
    if environ.get(CONFIG_NAME):
        return Path(environ[CONFIG_NAME])
    for candidate in searched:
        if candidate.is_file():
            return candidate
    places = " nor ".join(str(candidate) for candidate in searched)
    raise ConfigurationError(
        [Mistake("configuration", f"there is no {places}; name a file with -c, or {START_HINT}")]
    )


def parse(
    text: str, environ: Mapping[str, str], *, origin: str = "", warn: Warn = _say_nothing
) -> Settings:
    """Read the configuration from the text of a file. Raises and warns as `load` does."""
    draft = Draft(_tables_of(text, origin))
    draft.raw.setdefault("escrow", {})  # What it lacks is its key, which the environment may give.
    override(draft, environ)
    read_secret_files(draft, warn)
    settings, errors = _try(TypeAdapter(Settings), draft.raw)
    draft.mistakes += _mistakes_of(errors, draft)
    good = _good_tables(draft.raw)
    draft.mistakes += mistakes_between(good)
    if draft.mistakes or settings is None:
        raise ConfigurationError(draft.mistakes, origin)
    for note in notes_on(good):
        warn(note)
    return settings


def _text_of(file: Path) -> str:
    sentence = ""
    content = b""
    try:
        with file.open("rb") as opened:
            content = opened.read(FILE_BYTES_MAX + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        sentence = f"cannot be read: {error.strerror}; name another with -c, or {START_HINT}"
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        sentence = f"is not UTF-8 in line {line}; save it as UTF-8"
    if len(content) > FILE_BYTES_MAX:
        sentence = (
            f"is larger than {FILE_BYTES_MAX // 1024**2} MiB; bind agreements by the API instead"
        )
    if sentence:
        raise ConfigurationError([Mistake(str(file), sentence)], str(file))
    return text


_PLACE_IN_TEXT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)\Z")
# What people mean when they make these mistakes.
_QUOTES_HINT = 'texts, durations and money stand in quotes, such as interval = "60s"'
_SYNTAX_HINTS = {
    "Invalid value": _QUOTES_HINT,
    "Unclosed inline table": _QUOTES_HINT,
    "Unclosed array": _QUOTES_HINT,
    "Expected newline or end of document after a statement": _QUOTES_HINT,
    "Illegal character '\\n'": "close the text with a quote on the line on which it begins",
    "Expected '=' after a key in a key/value pair": "write key = value",
    "Cannot overwrite a value": "this key stands here a second time; remove one",
    "Unescaped '\\' in a string": "write the text in single quotes, or each \\ twice",
}


def _tables_of(text: str, origin: str) -> dict[str, Any]:
    mistake: Mistake
    try:
        return tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        mistake = _syntax_mistake(str(error), text)
    except RecursionError:
        mistake = Mistake("configuration", "is nested too deeply; write it flatter")
    except (ValueError, ArithmeticError):
        mistake = Mistake(
            "configuration", "holds a number with too many digits; write a shorter one"
        )
    raise ConfigurationError([mistake], origin)


def _syntax_mistake(error: str, text: str) -> Mistake:
    found = _PLACE_IN_TEXT.search(error)
    said = _PLACE_IN_TEXT.sub("", error)
    hint = _SYNTAX_HINTS.get(said)
    sentence = f"this is no TOML: {said}; {hint}" if hint else f"this is no TOML: {said}"
    if found is not None and found[1]:
        return Mistake(f"line {found[1]}, column {found[2]}", sentence)
    return Mistake(f"line {text.count(chr(10)) + 1}", sentence)


def _try(adapter: TypeAdapter[T], given: object) -> tuple[T | None, list[ErrorDetails]]:
    """Check one value; errors leave as values, so that no traceback carries what was given."""
    try:
        return adapter.validate_python(given), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


# Good tables, for the checks between them


def _good_tables(raw: Mapping[str, Any]) -> Good:
    return Good(
        meter_names=frozenset(_dict(raw.get("meters"))),
        plan_names=frozenset(_dict(raw.get("plans"))),
        http=_try(TypeAdapter(HttpSettings), raw.get("http", {}))[0],
        escrow=_try(TypeAdapter(EscrowSettings), raw.get("escrow", {}))[0],
        wallet=_try(TypeAdapter(WalletSettings), raw.get("wallet", {}))[0],
        meters=_good_items(TypeAdapter(MeterSettings), _dict(raw.get("meters"))),
        sources=_good_items(TypeAdapter(SourceSettings), _numbered(raw.get("sources"))),
        producers=_good_items(TypeAdapter(ProducerSettings), _numbered(raw.get("producers"))),
        source_names=_source_names(raw.get("sources")),
        plans=_good_items(TypeAdapter(PlanSettings), _dict(raw.get("plans"))),
        agreements=_good_items(TypeAdapter(AgreementSettings), _numbered(raw.get("agreements"))),
        discover=_good_items(TypeAdapter(DiscoverSettings), _numbered(raw.get("discover"))),
    )


def _source_names(given: object) -> frozenset[str]:
    """The names of all sources, good or not: one without a name has its kind's."""
    tables = [item for item in _numbered(given).values() if isinstance(item, dict)]
    return frozenset(str(item.get("name", item.get("kind", ""))) for item in tables)


K = TypeVar("K")


def _good_items(adapter: TypeAdapter[T], given: Mapping[K, object]) -> dict[K, T]:
    tried = ((key, _try(adapter, item)[0]) for key, item in given.items())
    return {key: item for key, item in tried if item is not None}


def _dict(given: object) -> dict[str, object]:
    return given if isinstance(given, dict) else {}


def _numbered(given: object) -> dict[int, object]:
    return dict(enumerate(given)) if isinstance(given, list) else {}


# Pydantic's errors, in our words


def _mistakes_of(errors: Sequence[ErrorDetails], draft: Draft) -> Iterator[Mistake]:
    models = {place: model for place, model, _ in tables_in(draft.raw)}
    for error in errors:
        if _is_echo(error):
            continue
        place = _place_of(error)
        sentence = _sentence_of(error, place, models)
        origin = draft.origins.get(place)
        yield Mistake(key_of(place), f"{sentence} ({origin})" if origin else sentence)


def _is_echo(error: ErrorDetails) -> bool:
    """Whether a list only seems too short because pydantic did not count its bad items."""
    given = error["input"]
    return error["type"] == "too_short" and isinstance(given, list) and len(given) > 0


def _place_of(error: ErrorDetails) -> Place:
    place = error["loc"]
    if place[:1] == ("sources",) and len(place) > 2:
        place = place[:2] + place[3:]  # Pydantic names the kind of the source there.
    if place[-1:] == ("[key]",):
        place = place[:-1]
    at = error.get("ctx", {}).get("at")
    return (*place, at) if at else place


def _sentence_of(error: ErrorDetails, place: Place, models: Mapping[Place, type[Table]]) -> str:
    """Say what to write instead; a value is looked at only where it names a kind."""
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            sentence = _unknown_key(place, models)
        case "union_tag_invalid" | "union_tag_not_found":
            sentence = _no_such_source(error["input"])
        case "missing":
            sentence = f"is required; write {REQUIRED[str(place[-1])]}"
        case "string_pattern_mismatch":
            sentence = PATTERN_SENTENCES[context["pattern"]]
        case "literal_error":
            sentence = "write " + str(context["expected"]).replace("'", '"')
        case kind if kind in _SENTENCES:
            sentence = _SENTENCES[kind].format_map(context)
        case _:
            sentence = f"cannot be used: {error['msg']}"
    return sentence


_SENTENCES = {
    REFUSED: "{sentence}",
    "string_type": "write text in quotes",
    "int_type": "write a whole number without quotes",
    "bool_type": "write true or false without quotes",
    "tuple_type": "write a list in [ ]",
    "dict_type": "write a table of key = value",
    "model_type": "write a table of key = value",
    "greater_than_equal": "write at least {ge}",
    "less_than_equal": "write at most {le}",
    "too_short": "write at least {min_length} of them",
    "too_long": "write at most {max_length} of them",
    "string_too_short": "must not be empty",
}


def _unknown_key(place: Place, models: Mapping[Place, type[Table]]) -> str:
    later = NOT_AVAILABLE.get(_general_form(place))
    if later is not None:
        return later
    known = keys_of(models[place[:-1]])
    return f"there is no such key; {nearest(str(place[-1]), tuple(known))}"


def _general_form(place: Place) -> str:
    """Write a place with `*` for the names that users choose: `plans.*.rates[].tiers`."""
    parts = [
        "*" if index == 1 and place[0] in {"plans", "meters"} else part
        for index, part in enumerate(place)
    ]
    return ".".join("[]" if isinstance(part, int) else part for part in parts).replace(".[]", "[]")


def _no_such_source(given: object) -> str:
    kind = given.get("kind") if isinstance(given, dict) else None
    choice = " or ".join(f'kind = "{known}"' for known in SOURCE_KINDS)
    if not isinstance(kind, str):
        return f"write {choice}"
    if kind in BUILT_IN_SOURCES:
        return f'kind "{kind}" {BUILT_IN_SOURCES[kind]}'
    return f'there is no kind "{kind[:64]}"; {nearest(kind, SOURCE_KINDS)}'
