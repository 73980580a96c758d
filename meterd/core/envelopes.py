"""CloudEvents in binary mode: attributes beside the data, put together as the one JSON document.

What a dead letter keeps, and what the core reads, is the structured form of the same event. The
data stay the bytes that came; what is no JSON goes along as base64, for the core to refuse.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable

import msgspec

SPECVERSION = "specversion"  # Its presence is how a binary CloudEvent is known.
STRUCTURED = "application/cloudevents"
_ATTRIBUTE = re.compile(r"[a-z0-9_]{1,64}\Z", re.ASCII)
_DATA = frozenset({"data", "data_base64"})


def assemble(attributes: Iterable[tuple[str, str]], content_type: str, data: bytes) -> bytes:
    """Write one event. Raises `ValueError` with the reason when the attributes cannot be one's."""
    document: dict[str, str | msgspec.Raw] = {}
    for name, value in attributes:
        if name in document:
            raise ValueError(f"the attribute {name} is given twice")
        if name in _DATA or _ATTRIBUTE.match(name) is None:
            raise ValueError(f"{name[:80]!r} cannot be an attribute of a CloudEvent")
        document[name] = value
    if content_type:
        document["datacontenttype"] = content_type
    if data:
        try:
            document["data"] = msgspec.json.decode(data, type=msgspec.Raw)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            document["data_base64"] = binascii.b2a_base64(data, newline=False).decode()
    return msgspec.json.encode(document)
