"""`Idempotency-Key`: a call that is sent again with its key does its work once.

The header is that of the IETF draft "The Idempotency-Key HTTP Header Field". A key belongs to the
token that it comes with, so that nobody meets another's. It may stand in quotes or not.
"""

from __future__ import annotations

import hashlib

from aiohttp import web

from meterd.api.auth import ACTOR
from meterd.api.problems import Problem

HEADER = "Idempotency-Key"
KEY_CHARS_MAX = 255
HOLD_DIGITS = 24  # As many as a hold without a key has.


def read_key(request: web.Request) -> str | None:
    """Read the key of a request; None: it has none. Raises `Problem`."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    key = text.strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    fits = 1 <= len(key) <= KEY_CHARS_MAX and key.isascii() and key.isprintable()
    if not fits or len(request.headers.getall(HEADER)) > 1:
        detail = f"{HEADER}: one key of 1 to {KEY_CHARS_MAX} printable ASCII characters"
        raise Problem(400, "bad-key", detail)
    return key


def used_otherwise() -> Problem:
    """Say that a key came with another request before."""
    detail = f"this {HEADER} came with another request before; take a new key"
    return Problem(422, "key-reused", detail)


def hold_id_of(request: web.Request, key: str) -> str:
    """Make the id of the hold that a key stands for: the same one, also after a crash."""
    text = f"{request[ACTOR]}\0{key}".encode()
    return f"hold_{hashlib.sha256(text).hexdigest()[:HOLD_DIGITS]}"
