"""What the environment and secret files put into a configuration, before it is checked.

The rule: the environment wins over the file, name by name, and a value from it is read by the type
of the key that it replaces. A name that replaces nothing is a mistake: a misspelt
`METERD_ESCROW__STRICT` must not pass for caution.
"""

from __future__ import annotations

import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from meterd.config.checks import key_of
from meterd.config.settings import NOT_AVAILABLE, Settings
from meterd.config.shape import FILE_SUFFIX, Shape, keys_of, shape_of, tables_in
from meterd.config.table import Place, Table, nearest
from meterd.config.values import SECRET_CHARS_MAX, Secret, Unread
from meterd.errors import Mistake

PREFIX = "METERD_"
CONFIG_NAME = "METERD_CONFIG"
# Names with the prefix that say something else: where the file is, and where a client finds a
# running daemon.
RESERVED = frozenset({CONFIG_NAME, "METERD_URL", "METERD_TOKEN", "METERD_TOKEN_FILE"})
# Kubernetes and container links put these beside every process when a service is named "meterd".
_LINK = re.compile(
    r"METERD_(?:[A-Z0-9]+_)*(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9]+)*|NAME"
    r"|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)\Z"
)


@dataclass(slots=True)
class Draft:
    """A configuration in the making: its tables, where a value came from, the mistakes so far."""

    raw: dict[str, Any]
    origins: dict[Place, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def override(draft: Draft, environ: Mapping[str, str]) -> None:
    """Put every `METERD_SECTION__KEY` into the draft; unknown names are mistakes."""
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in RESERVED and _LINK.match(name) is None:
            target = _target(draft.raw, name)
            if isinstance(target, Mistake):
                draft.mistakes.append(target)
            else:
                _put(draft, target, name, environ[name])


@dataclass(frozen=True, slots=True)
class _Target:
    table: dict[str, Any]
    place: Place  # Of the key itself.
    field: FieldInfo
    model: type[Table]


def _target(raw: dict[str, Any], name: str) -> _Target | Mistake:
    """Walk from the top to the key that `name` means."""
    model: type[Table] = Settings
    table = raw
    place: Place = ()
    parts = name.removeprefix(PREFIX).lower().split("__")
    while parts:
        key = parts.pop(0)
        found = keys_of(model).get(key)
        if found is None:
            return _unknown(name, place, key)
        place = (*place, key)
        if not parts:
            whole_section = model is Settings
            return _unknown(name, (), key) if whole_section else _Target(table, place, found, model)
        shape = shape_of(found)
        step = _step(table, key, shape, parts)
        if step is None:
            return _unknown(name, place, parts[0] if parts else "")
        inner, table, model = step
        place = (*place, *inner)
    raise AssertionError("a name has at least one part")


def _step(
    table: dict[str, Any], key: str, shape: Shape, parts: list[str]
) -> tuple[Place, dict[str, Any], type[Table]] | None:
    """Go one table deeper, by the next part where there are several; None: it is not there."""
    if not shape.tables:
        return None
    if shape.container is None:
        inner = table.setdefault(key, {})
        model = shape.table_for(inner)
        return None if model is None else ((), inner, model)
    for index, name, item in _named(table.get(key), shape):
        model = shape.table_for(item)
        if model is not None and len(parts) > 1 and _environment_form(name) == parts[0]:
            del parts[0]
            return (index,), item, model
    return None


def _named(given: object, shape: Shape) -> Iterator[tuple[str | int, str, Any]]:
    """Yield (place, name, item); an item of a list is named by its `name`, or else its `kind`."""
    if shape.container is dict and isinstance(given, dict):
        yield from ((name, name, item) for name, item in given.items())
    elif shape.container is tuple and isinstance(given, list):
        for index, item in enumerate(given):
            if isinstance(item, dict):
                yield index, str(item.get("name", item.get("kind", ""))), item


def _environment_form(name: str) -> str:
    """A name as an environment variable can hold it: svc.a-1 is SVC_A_1."""
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def _unknown(name: str, place: Place, key: str) -> Mistake:
    later = NOT_AVAILABLE.get(key_of((*place, key)))
    if later is not None:
        return Mistake(name, later)
    if place in {("sources",), ("meters",), ("plans",)}:
        return Mistake(name, f'the file has no entry of {place[0]} named "{key}" with such a key')
    return Mistake(name, f"there is no such setting; {nearest(name, tuple(_names()))}")


def _names(model: type[Table] = Settings, prefix: str = PREFIX) -> Iterator[str]:
    """Yield every name that replaces a key of a table that is always there."""
    for key, found in keys_of(model).items():
        shape = shape_of(found)
        if shape.container is None and shape.tables:
            yield from _names(shape.tables[""], f"{prefix}{key.upper()}__")
        elif prefix != PREFIX:
            yield prefix + key.upper()


def _put(draft: Draft, target: _Target, name: str, text: str) -> None:
    key = str(target.place[-1])
    twin = key.removesuffix(FILE_SUFFIX) if key.endswith(FILE_SUFFIX) else key + FILE_SUFFIX
    twin_place = (*target.place[:-1], twin)
    if twin in keys_of(target.model) and twin_place not in draft.origins:
        target.table.pop(twin, None)  # A secret and its file replace each other.
    target.table[key] = _read(text, shape_of(target.field))
    draft.origins[target.place] = f"given by {name}"


def _read(text: str, shape: Shape) -> object:
    """Read a value as the type of its key wants it; what cannot be read stays text."""
    structured = shape.container is not None or bool(shape.tables)
    if not structured and (shape.reads_text or shape.base not in (int, bool)):
        return text
    try:
        return tomllib.loads(f"value = {text}", parse_float=Decimal)["value"]
    except (ValueError, ArithmeticError, RecursionError):
        return text


def read_secret_files(draft: Draft, warn: Callable[[Mistake], None]) -> None:
    """Put what each `x_file` holds into its secret `x`; a required secret must be given."""
    for place, model, table in list(tables_in(draft.raw)):
        for key, found in keys_of(model).items():
            if shape_of(found).is_secret:
                _read_secret(draft, (*place, key), table, found, warn)


def _read_secret(
    draft: Draft,
    place: Place,
    table: dict[str, Any],
    found: FieldInfo,
    warn: Callable[[Mistake], None],
) -> None:
    key = str(place[-1])
    file_key = key + FILE_SUFFIX
    file_place = (*place[:-1], file_key)
    given = table.get(file_key)
    sentence = ""
    if given is not None and key in table:
        sentence = f"stands beside {key}; write one of the two"
    elif isinstance(given, str):
        path = Path(given)
        try:
            table[key] = Secret(_text_of(path))
        except (OSError, ValueError) as error:
            sentence = _why_unreadable(path, error)
        else:
            draft.origins[place] = f"read from {path}"
            _warn_if_open(path, file_place, warn)
    elif given is None and key not in table and found.is_required():
        file_place = place
        sentence = f"is required; write {file_key}, or {_other_way(place)}"
    if sentence:
        draft.mistakes.append(Mistake(key_of(file_place), sentence))
    if sentence or (given is not None and not isinstance(given, str)):
        # A stand-in that every kind of secret accepts, and no two alike: the rest of the table can
        # still be checked.
        table[key] = Unread(f"redis://unreadable/{key_of(place)}")


def _other_way(place: Place) -> str:
    if all(isinstance(part, str) for part in place):
        return "set " + PREFIX + "__".join(str(part).upper() for part in place)
    return f"{place[-1]} itself"


def _text_of(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(SECRET_CHARS_MAX + 3)
    text = content.decode().removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError("is empty; write the secret into it")
    if len(text) > SECRET_CHARS_MAX:
        raise ValueError(
            f"holds more than {SECRET_CHARS_MAX} characters; write only the secret into it"
        )
    return text


def _why_unreadable(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"cannot read {path}: {error.strerror}; write the path of a file with the secret"
    if isinstance(error, UnicodeDecodeError):
        return (
            f"{path} is no UTF-8 text; write only the secret into it"  # Its own text quotes bytes.
        )
    return f"{path} {error}"


def _warn_if_open(path: Path, place: Place, warn: Callable[[Mistake], None]) -> None:
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # It was read a moment ago; what can be said of it now is no reason to stop.
    if mode & stat.S_IROTH:
        warn(Mistake(key_of(place), f"{path} can be read by every user; run: chmod o-r {path}"))
