"""What the models of the settings say about their own shape: which key holds what.

The rule: nothing in here knows a key by name. A key that is added to a model is at once open to the
environment, to a secret file and to the search for the nearest name.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from meterd.config.settings import Settings
from meterd.config.table import Place, Table
from meterd.config.values import Secret

FILE_SUFFIX = "_file"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a key holds.

    `tables` are the models of the table, or of each item, by their `kind` ("" where there is one).
    """

    container: type | None  # dict, tuple, or None for a single value or table.
    tables: Mapping[str, type[Table]]
    base: Any
    reads_text: bool  # A validator of its own makes the value from text.

    @property
    def is_secret(self) -> bool:
        """Whether the value must never be shown."""
        return self.base is Secret

    def table_for(self, given: object) -> type[Table] | None:
        """Choose the model of one table by the `kind` that was given; None where none fits."""
        if not isinstance(given, dict):
            return None
        kind = given.get("kind", "")
        return self.tables.get("") or self.tables.get(kind if isinstance(kind, str) else "")


def keys_of(model: type[Table]) -> dict[str, FieldInfo]:
    """Give the fields of a model by the keys of the file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def shape_of(field: FieldInfo) -> Shape:
    """Read off what a field holds."""
    return _shape(field.annotation, tuple(field.metadata))


def _shape(annotation: Any, metadata: tuple[Any, ...]) -> Shape:
    base, metadata = _bare(annotation, metadata)
    container: type | None = None
    if get_origin(base) in (dict, tuple):
        container = get_origin(base)
        item = get_args(base)[0 if container is tuple else 1]
        base, _ = _bare(item, ())
    return Shape(
        container=container,
        tables=_tables(base),
        base=base,
        reads_text=any(isinstance(part, BeforeValidator) for part in metadata),
    )


def _bare(annotation: Any, metadata: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Take off `Annotated` and `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata = (*metadata, *more)
            continue
        arms = [arm for arm in _arms(annotation) if arm is not types.NoneType]
        if len(arms) != 1 or arms[0] is annotation:
            return annotation, metadata
        annotation = arms[0]


def _arms(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _tables(base: Any) -> dict[str, type[Table]]:
    found = [arm for arm in _arms(base) if isinstance(arm, type) and issubclass(arm, Table)]
    if len(found) <= 1:
        return dict.fromkeys(("",), found[0]) if found else {}
    return {get_args(model.model_fields["kind"].annotation)[0]: model for model in found}


def tables_in(
    raw: dict[str, Any], model: type[Table] = Settings, place: Place = ()
) -> Iterator[tuple[Place, type[Table], dict[str, Any]]]:
    """Yield every table of a file that has a model, outermost first; pass over what has none."""
    yield place, model, raw
    for key, field in keys_of(model).items():
        shape = shape_of(field)
        if not shape.tables or key not in raw:
            continue
        for inner, item in _items(shape, raw[key]):
            table = shape.table_for(item)
            if table is not None:
                yield from tables_in(item, table, (*place, key, *inner))


def _items(shape: Shape, given: object) -> Iterator[tuple[Place, Any]]:
    if shape.container is None:
        yield (), given
    elif shape.container is tuple and isinstance(given, list):
        yield from (((index,), item) for index, item in enumerate(given))
    elif shape.container is dict and isinstance(given, dict):
        yield from (((name,), item) for name, item in given.items())
