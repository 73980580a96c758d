"""Signing as a producer would: Standard Webhooks, in a few lines of its own."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from itertools import count

_numbers = count(1)


def key_of(word: str) -> str:
    """Make a key in the form of Standard Webhooks from a word that a test can look for."""
    return "whsec_" + base64.b64encode(word.encode().ljust(32, b"-")).decode()


def signed(
    key: str, body: bytes, *, at: int | None = None, msg: str = "", more: str = ""
) -> dict[str, str]:
    """Sign a body: the three headers, user properties or fields beside it."""
    msg = msg or f"msg_{next(_numbers)}"
    timestamp = str(int(time.time()) if at is None else at)
    secret = base64.b64decode(key.removeprefix("whsec_"))
    content = b".".join((msg.encode(), timestamp.encode(), body))
    digest = hmac.new(secret, content, hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(digest).decode()
    return {
        "webhook-id": msg,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"{more} {signature}".strip(),
    }
