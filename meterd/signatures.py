"""Whether an outcome was signed by its evaluator: whoever may send usage may not set its score.

A signature is Ed25519 (RFC 8032) over the ASCII or UTF-8 bytes of

    agreement "." id "." score

the agreement's own id (also where the event names an escrow), the event's id, and the score as a
plain decimal without needless zeros: `1`, `0`, `0.85`, not `.85`, `0.850` or `8.5e-1`. In the event
it stands in `signature`, as base64, with either alphabet and with or without padding.

The rule kept here: one text stands for one outcome alone. Ids may have dots, so `a.x.0.1` could be
the outcome `x` with the score 0.1, or `x.0` with the score 1: a signature for a poor score would
serve for the best one. Hence the id of a signed outcome has no dot and is not `0`; then the text
can be read from its end in one way only.
"""

from __future__ import annotations

import base64
import binascii

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE_BYTES = 64
SIGNATURE_CHARS_MAX = 128  # 88 are enough; more is never decoded.

UNSIGNED = "the plan wants outcomes signed by their evaluator: signature is missing"
NOT_BASE64 = "signature: write the 64 bytes of an Ed25519 signature as base64"
ID_MISREAD = 'the id of a signed outcome may have no dot and not be "0"; sign it under another id'
NOT_THE_EVALUATORS = "signature: not by the plan's outcome_key over {text!r}"


def outcome_flaw(key: bytes, agreement: str, event_id: str, score: str, signature: str) -> str:
    """Say why an outcome is not the evaluator's; "" when it is.

    `key` is his public key, 32 bytes; `score` is in the spelling that is signed.
    """
    if not signature:
        return UNSIGNED
    if "." in event_id or event_id == "0":
        return ID_MISREAD
    signed = _decoded(signature)
    if len(signed) != SIGNATURE_BYTES:
        return NOT_BASE64
    text = f"{agreement}.{event_id}.{score}"
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signed, text.encode())
    except InvalidSignature:
        return NOT_THE_EVALUATORS.format(text=text[:120])
    return ""


def _decoded(signature: str) -> bytes:
    """Read base64 of either alphabet; nothing where it is none."""
    if len(signature) > SIGNATURE_CHARS_MAX:
        return b""
    bare = signature.rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except (binascii.Error, ValueError):
        return b""
