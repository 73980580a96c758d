"""Receipts: signed, hash-chained statements that a payer can check without meterd.

A receipt is made in the very commit that says that a release was paid, so that there is never
the one without the other. Its statement holds the `number` of this receipt in its agreement, from 1
without gaps, and in `previous` the hash of the one before (64 zeros for the first). What is hashed
(SHA-256) and signed (Ed25519, RFC 8032) is the statement in its canonical form: JSON in UTF-8, the
names of each object in ascending order, no blanks, characters outside ASCII as they are.

The rule kept here: one chain for each agreement. Two receipts of one agreement with one number and
different content are a fork: a store was put back from a copy, and lived on, after receipts had
been handed out that the copy does not have. `check` finds it when it sees both.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meterd.core.changes import ReceiptRow
from meterd.errors import StoreCorrupt, StoreFailed

KEY_NAME = "receipts.key"
GENESIS = "0" * 64
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_NUMBER_MAX = 2**53


def canonical(statement: Mapping[str, Any]) -> bytes:
    """Write a statement in the bytes that are hashed and signed."""
    text = json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace")


# -- Making --------------------------------------------------------------------------------------


class Notary:
    """Numbers, chains and signs. `heads`: the last number and hash of each agreement."""

    def __init__(self, key: Ed25519PrivateKey, heads: Mapping[str, tuple[int, bytes]]) -> None:
        self._key = key
        self._heads = dict(heads)
        self.public = key.public_key().public_bytes_raw().hex()

    def receipt(self, statement: Mapping[str, Any]) -> ReceiptRow:
        """Make the next receipt of the statement's agreement."""
        agreement = str(statement["agreement"])
        number, head = self._heads.get(agreement, (0, bytes(32)))
        whole = {**statement, "number": number + 1, "previous": head.hex(), "key": self.public}
        text = canonical(whole)
        hash_ = hashlib.sha256(text).digest()
        self._heads[agreement] = number + 1, hash_
        release = statement["release"]
        return ReceiptRow(
            agreement=agreement,
            number=number + 1,
            at=int(statement["at"]),
            release="" if release is None else str(release["id"]),
            statement=text.decode(),
            hash=hash_,
            signature=self._key.sign(text),
        )


def key_in(data_dir: Path) -> tuple[Ed25519PrivateKey, bool]:
    """Read the signing key of a state directory, or make it; whether it is new.

    Raises `StoreCorrupt` when what is there is no key, `StoreFailed` when it cannot be used.
    """
    path = data_dir / KEY_NAME
    try:
        with contextlib.suppress(FileNotFoundError):
            return _read_key(path), False
        key = Ed25519PrivateKey.generate()
        _write_key(path, key)
    except OSError as error:
        raise StoreFailed(f"{path} cannot be used: {error.strerror}") from None
    return key, True


def _read_key(path: Path) -> Ed25519PrivateKey:
    text = path.read_bytes().strip()
    try:
        return Ed25519PrivateKey.from_private_bytes(binascii.unhexlify(text))
    except ValueError:
        raise StoreCorrupt(
            f"{path} holds no key of 64 hexadecimal digits: put your copy of it back; or move it"
            " away, and receipts are signed with a new key from then on"
        ) from None


def _write_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write it whole and durable before it has its name, for its owner alone."""
    new = path.with_name(f"{KEY_NAME}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, key.private_bytes_raw().hex().encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    new.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# -- Checking ------------------------------------------------------------------------------------


class NoReceipts(ValueError):
    """A document that holds no receipts; the message says why."""


@dataclass(slots=True)
class Chain:
    """What was found in the receipts of one agreement, up to the first that breaks."""

    agreement: str
    first: int = 0
    last: int = 0
    released: str = "0.00"
    accrued: str = "0.00"
    broken: str = ""  # What breaks, and where.


@dataclass(slots=True)
class Checked:
    """All chains by agreement, and the keys that signed them."""

    chains: dict[str, Chain] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)

    @property
    def broken(self) -> bool:
        """Whether any chain breaks."""
        return any(chain.broken for chain in self.chains.values())


def read(text: bytes) -> list[dict[str, Any]]:
    """Read receipts: an answer of the API, a list of receipts, one of them, or one a line.

    Raises `NoReceipts`.
    """
    try:
        found = [json.loads(text, parse_float=_no_float)]
    except (ValueError, RecursionError):
        try:
            lines = text.splitlines()
            found = [json.loads(line, parse_float=_no_float) for line in lines if line.strip()]
        except (ValueError, RecursionError) as error:
            raise NoReceipts(f"no JSON: {error}") from None
    receipts: list[dict[str, Any]] = []
    for document in found:
        items = document
        if isinstance(document, dict):
            items = document.get("items", [document])
        if not isinstance(items, list):
            raise NoReceipts("neither a receipt nor a list of them")
        receipts += items
    for place, receipt in enumerate(receipts, 1):
        if not isinstance(receipt, dict) or not isinstance(receipt.get("statement"), dict):
            raise NoReceipts(f"item {place} is no receipt: it has no statement")
    return receipts


def _no_float(text: str) -> object:
    raise ValueError(f"{text[:40]} is no number of a receipt")


def check(receipts: Iterable[Mapping[str, Any]], keys: Sequence[str] = ()) -> Checked:
    """Follow each agreement's chain. `keys`: who may have signed; none: whoever is named."""
    by_agreement: dict[str, list[Mapping[str, Any]]] = {}
    for receipt in receipts:
        by_agreement.setdefault(str(receipt["statement"].get("agreement")), []).append(receipt)
    checked = Checked()
    for agreement, own in sorted(by_agreement.items()):
        chain = checked.chains[agreement] = Chain(agreement)
        _follow(chain, sorted(own, key=_number), keys, checked.keys)
    return checked


def _number(receipt: Mapping[str, Any]) -> int:
    """Its number; 0 for what has none."""
    number = receipt["statement"].get("number")
    usable = isinstance(number, int) and not isinstance(number, bool) and 0 < number < _NUMBER_MAX
    return number if usable else 0


def _follow(
    chain: Chain, receipts: Sequence[Mapping[str, Any]], keys: Sequence[str], seen: set[str]
) -> None:
    before: Mapping[str, Any] | None = None
    head = GENESIS
    for receipt in receipts:
        number, statement = _number(receipt), receipt["statement"]
        hash_ = hashlib.sha256(canonical(statement)).hexdigest()
        if before is not None and number == chain.last and hash_ == head:
            continue  # The same receipt twice.
        flaw = _flaw(receipt, hash_, keys) or _misfit(chain, before, head, number, statement, hash_)
        if flaw:
            chain.broken = f"receipt {number} of {chain.agreement}: {flaw}"
            return
        seen.add(str(statement["key"]))
        chain.first = chain.first or number
        chain.last, head, before = number, hash_, statement
        chain.released, chain.accrued = statement["released"], statement["accrued"]


def _flaw(receipt: Mapping[str, Any], hash_: str, keys: Sequence[str]) -> str:
    """Say what is wrong with a receipt by itself; "" when nothing is."""
    statement = receipt["statement"]
    key = statement.get("key")
    if not isinstance(key, str) or _HEX.match(key) is None:
        return "its statement names no key"
    if receipt.get("hash") != hash_:
        return f"its hash should be {hash_}: the statement was changed"
    if keys and key not in keys:
        return f"it is signed with another key, {key}"
    try:
        signature = base64.b64decode(str(receipt.get("signature")), validate=True)
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(
            signature, canonical(statement)
        )
    except (ValueError, InvalidSignature):
        return "its signature is not by the key that it names"
    return ""


def _misfit(
    chain: Chain,
    before: Mapping[str, Any] | None,
    head: str,
    number: int,
    statement: Mapping[str, Any],
    hash_: str,
) -> str:
    """Say why a receipt cannot stand behind the one before; "" when it can."""
    if not number:
        return "it has no number"
    if before is None:
        starts = number > 1 or statement.get("previous") == GENESIS
        return "" if starts else "it is the first and names one before it"
    if number == chain.last:
        return f"a fork: there is another receipt of this number, {head} and {hash_}"
    if number != chain.last + 1:
        return f"receipt {chain.last + 1} is missing"
    if statement.get("previous") != head:
        return (
            f"a fork or a change: it follows {statement.get('previous')}, and {head} is before it"
        )
    return _shrinks(before, statement)


def _shrinks(before: Mapping[str, Any], statement: Mapping[str, Any]) -> str:
    """What was released only ever grows, by a release at least by its amount."""
    try:
        grown = Decimal(str(statement["released"])) - Decimal(str(before["released"]))
        paid = Decimal(0)
        if statement["kind"] == "release":
            paid = Decimal(str(statement["release"]["amount"]))
    except (KeyError, TypeError, InvalidOperation):
        return "its amounts cannot be read"
    return "" if grown >= paid else f"released grows by {grown}, and {paid} was paid"
