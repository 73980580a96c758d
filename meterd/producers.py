"""Who sends usage, how one proves it, and for which agreements one may.

A producer is known by its token (HTTP), by its source (a broker's user that only it has), or by its
signature. Signatures are Standard Webhooks 1.0: base64 of HMAC-SHA256 over

    webhook-id "." webhook-timestamp "." payload

with the payload's bytes as they came. One or two keys are live, so that a key can be changed
without a gap: the new one is added here first, then at the producer, then the old one is removed.

The rules kept here: of a signed delivery nothing counts that the signature does not cover, so its
`webhook-id` stands in for a broker's own id, and its topic fills nothing in. How long a comparison
takes tells nothing of a key. A replayed delivery is no matter of the signature but of the memory of
identities, so what waited at a broker may be as old as that memory; what comes by HTTP did not
wait, and may be five minutes old.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from meterd.core.caps import Caps
from meterd.core.events import Reason
from meterd.sources import Deliveries, Fault, Proof

TOLERANCE_S = 5 * 60
TIMESTAMP_DIGITS_MAX = 12
ID_CHARS_MAX = 256
SIGNATURES_MAX = 8
SIGNATURE_CHARS_MAX = 1024
VERSION = "v1,"

# Fields under which a dead letter keeps who sent it, so that it is tried again as his.
PRODUCER_FIELD = "producer"
PROOF_FIELDS = ("webhook-id", "webhook-timestamp", "webhook-signature")

# The producer of the HTTP request under way, so that no call can forget to hand it on.
CALLER: ContextVar[str] = ContextVar("producer", default="")


@dataclass(frozen=True, slots=True)
class Producer:
    """One sender of usage. No keys: it need not sign. No agreements: all of them.

    `caps` bound what it may make each agreement accrue.
    """

    name: str
    token: str = ""
    sources: tuple[str, ...] = ()
    keys: tuple[bytes, ...] = field(default=(), repr=False)
    agreements: tuple[str, ...] = ()
    caps: Caps | None = None

    def may_send_for(self, agreement: str) -> bool:
        """Whether usage of an agreement is this producer's to tell."""
        allowed = self.agreements
        return not allowed or any(fnmatchcase(agreement, pattern) for pattern in allowed)


class Producers:
    """All producers of the configuration; without any, everything is as if there were none.

    `required`: what comes from nobody who is known is refused.
    """

    def __init__(self, producers: Iterable[Producer] = (), *, required: bool = False) -> None:
        listed = list(producers)
        self.required = required
        self._by_name = {producer.name: producer for producer in listed}
        self._by_token = {producer.token: producer for producer in listed if producer.token}
        self._by_source: dict[str, list[Producer]] = {}
        for producer in listed:
            for source in producer.sources:
                self._by_source.setdefault(source, []).append(producer)

    def __bool__(self) -> bool:
        return self.required or bool(self._by_name)

    def by_token(self, token: str) -> Producer | None:
        """Find the producer that comes with a token of this name."""
        return self._by_token.get(token)

    def senders(
        self, source: str, deliveries: Deliveries, now: int, age_max: int | None
    ) -> list[Producer | None]:
        """Tell who sent each delivery; who cannot prove it is a fault of the delivery.

        `now` in wall ms; a signature may be `age_max` ms old (None: of any age, for what a person
        tries again).
        """
        candidates = self._by_source.get(source)
        if not candidates:
            sender = self._by_name.get(deliveries.producer)
            if sender is None and self.required:
                detail = f"no producer is known for {source}: give it to one, in its sources"
                fault = Fault(Reason.NOT_ALLOWED, detail)
                everything = dict.fromkeys(range(len(deliveries.payloads)), fault)
                deliveries.faults = {**everything, **deliveries.faults}
            return [sender] * len(deliveries.payloads)
        if len(candidates) == 1 and not candidates[0].keys:
            return [candidates[0]] * len(deliveries.payloads)
        return self._signed(candidates, deliveries, now, age_max)

    def _signed(
        self,
        candidates: Sequence[Producer],
        deliveries: Deliveries,
        now: int,
        age_max: int | None,
    ) -> list[Producer | None]:
        faults: dict[int, Fault] = {}
        found: list[Producer | None] = []
        for index, payload in enumerate(deliveries.payloads):
            proof, flaw, sender = deliveries.proofs.get(index), "", None
            for candidate in candidates:
                flaw = flaw_of(proof, payload, candidate.keys, now, age_max)
                if not flaw:
                    sender = candidate
                    break
            if sender is None:
                faults[index] = Fault(Reason.BAD_SIGNATURE, flaw)
            found.append(sender)
        deliveries.ids = [
            "" if proof is None else proof.id
            for proof in map(deliveries.proofs.get, range(len(deliveries.payloads)))
        ]
        deliveries.faults = {**faults, **deliveries.faults}
        return found


# -- Signatures --------------------------------------------------------------------------------

UNSIGNED = "not signed: send webhook-id, webhook-timestamp and webhook-signature"
BAD_ID = f"webhook-id: 1 to {ID_CHARS_MAX} printable characters without a dot"
BAD_TIMESTAMP = "webhook-timestamp: whole seconds since 1970"
TOO_OLD = "webhook-timestamp: signed {seconds} s ago; sign again when you send again"
TOO_NEW = "webhook-timestamp: {seconds} s ahead; check the clock"
NO_MATCH = "webhook-signature: none of this producer's keys made it over these bytes"


def flaw_of(
    proof: Proof | None,
    payload: bytes,
    keys: Sequence[bytes],
    now: int,
    age_max: int | None = TOLERANCE_S * 1000,
) -> str:
    """Say why a payload is not signed by one of these keys, at wall ms `now`; "" when it is."""
    if proof is None:
        return UNSIGNED
    flaw = _flaw_of_its_names(proof)
    if flaw or not _matches(proof, payload, keys):
        return flaw or NO_MATCH
    # Only who has the key is told about the clock.
    age = now - int(proof.timestamp) * 1000
    if age < -TOLERANCE_S * 1000:
        return TOO_NEW.format(seconds=-age // 1000)
    if age_max is not None and age > age_max:
        return TOO_OLD.format(seconds=age // 1000)
    return ""


def _flaw_of_its_names(proof: Proof) -> str:
    if not 0 < len(proof.id) <= ID_CHARS_MAX or "." in proof.id or not proof.id.isprintable():
        return BAD_ID
    digits = proof.timestamp
    if not (0 < len(digits) <= TIMESTAMP_DIGITS_MAX and digits.isascii() and digits.isdecimal()):
        return BAD_TIMESTAMP
    return ""


def _matches(proof: Proof, payload: bytes, keys: Sequence[bytes]) -> bool:
    """Whether one of its signatures is one of the keys'; all pairs are looked at, always."""
    if len(proof.signature) > SIGNATURE_CHARS_MAX or not proof.signature.isascii():
        return False
    given = [
        text.removeprefix(VERSION).encode()
        for text in proof.signature.split(" ")[:SIGNATURES_MAX]
        if text.startswith(VERSION)
    ]
    content = f"{proof.id}.{proof.timestamp}.".encode() + payload
    matches = False
    for key in keys:
        wanted = base64.b64encode(hmac.digest(key, content, "sha256"))
        for signature in given:
            matches |= hmac.compare_digest(wanted, signature)
    return matches


# -- What a dead letter keeps ------------------------------------------------------------------


def kept(sender: Producer | None, proof: Proof | None) -> dict[str, str]:
    """Write who sent a delivery, and how he proved it, as fields of its dead letter."""
    fields = {} if sender is None else {PRODUCER_FIELD: sender.name}
    if proof is not None:
        fields |= zip(PROOF_FIELDS, (proof.id, proof.timestamp, proof.signature), strict=True)
    return fields


def taken_out(fields: Mapping[str, str]) -> tuple[dict[str, str], str, Proof | None]:
    """Part a dead letter's fields: what the address said, the producer's name, its proof."""
    rest = {
        name: value
        for name, value in fields.items()
        if name != PRODUCER_FIELD and name not in PROOF_FIELDS
    }
    return rest, fields.get(PRODUCER_FIELD, ""), Proof.of(fields.items())
