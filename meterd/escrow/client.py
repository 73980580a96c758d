"""The escrow service: what meterd asks it, each question in one function.

The rule kept here: this file decides what is asked and refuses what must never be asked; `line`
lets it leave at most once, and `outcomes` says what an answer means. A release of everything is a
function of its own with a name of its own: no amount, missing or zero, ever becomes "everything".
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from meterd.core.money import format_amount
from meterd.core.settlement import Answer, Reading, Release
from meterd.errors import Refused, Unavailable
from meterd.escrow.documents import Received
from meterd.escrow.line import (
    AGENT_ID,
    ServiceApi,
    ServiceClient,
    is_path_with_id,
    is_path_without_id,
)
from meterd.escrow.outcomes import (
    ESCROW_ID,
    RELEASE_ID,
    Created,
    CreateFailed,
    Listed,
    Page,
    Unread,
    Wanted,
    answer_to_create,
    answer_to_list,
    answer_to_read,
    answer_to_refund_rest,
    answer_to_release,
    answer_to_release_rest,
    payment,
)

PAGES_MAX = 200  # With 50 escrows on each, ten thousand of one agent.
PAGE_ESCROWS = 50
MEMO_CHARS_MAX = 200  # As much of a memo as is read back; an escrow is found by it.


@dataclass(frozen=True, slots=True)
class EscrowPaths:
    """What stands behind `base_url` for each call; `{id}` is the escrow's."""

    status: str = "/escrow/{id}"
    list: str = "/escrow"
    release_partial: str = "/escrow/{id}/release-partial"
    create: str = "/escrow"
    release: str = "/escrow/{id}/release"
    refund: str = "/escrow/{id}/refund"


@dataclass(frozen=True, slots=True)
class EscrowApi(ServiceApi):
    """Where the service is and how it is spoken to. Mistakes raise `ConfigurationError`."""

    TABLE: ClassVar[str] = "escrow"

    paths: EscrowPaths = EscrowPaths()

    def _own_checks(self) -> tuple[tuple[bool, str, str], ...]:
        paths = self.paths
        with_id = (paths.status, paths.release_partial, paths.release, paths.refund)
        return (
            (
                not all(map(is_path_with_id, with_id)),
                "paths",
                'must begin with / and have {id} once, such as "/escrow/{id}"',
            ),
            (
                not all(map(is_path_without_id, (paths.list, paths.create))),
                "paths",
                'must begin with /, such as "/escrow"',
            ),
            (
                paths.release in (paths.release_partial, paths.refund)
                or paths.refund == paths.release_partial,
                "paths",
                "release, release_partial and refund must be three paths: one of them pays all",
            ),
        )


@dataclass(frozen=True, slots=True)
class Listing:
    """An agent's escrows. `skipped` entries made no sense; `complete`: there were no more pages."""

    escrows: tuple[Listed, ...]
    skipped: int
    complete: bool

    def with_memo(self, memo: str) -> tuple[Listed, ...]:
        """The escrows whose payer wrote exactly this memo.

        None of them means that there is none only where nothing was skipped and the listing is
        complete; and a creation in doubt may still land for as long as a quarantine is.
        """
        return tuple(listed for listed in self.escrows if listed.memo == memo)


class EscrowClient(ServiceClient[EscrowApi]):
    """The escrow service. Set up and opened as every `ServiceClient`."""

    async def read(self, escrow: str) -> Reading | Unread:
        """Read an escrow. What went wrong is a value: only a cancellation is raised."""
        if ESCROW_ID.match(escrow) is None:
            return Unread("missing", "no escrow can have this id: it is not 1 to 64 of A-Za-z0-9_-")
        mono = self._mono()
        address = self._api.address(self._api.paths.status, escrow)
        exchange = await self._line.get("read", address)
        if exchange.received is None:
            return Unread("unavailable", exchange.flaw)
        return answer_to_read(exchange.received, self._mask, mono, self._wall())

    async def release_partial(self, release: Release) -> Answer:
        """Ask for a release: at most one request leaves, whatever happens.

        The caller has made the intention durable. NOT_SENT promises that not a byte left; whatever
        is not certain is a DOUBT. A cancellation is raised as it is: the caller must then take the
        release for in doubt. Raises `ValueError` before anything is sent for an amount of zero or
        less, which some services take for "everything", and for ids that cannot stand in an address
        or a header.
        """
        if release.amount <= 0:
            raise ValueError("a release must be of more than 0: zero would be taken for everything")
        if ESCROW_ID.match(release.escrow) is None or RELEASE_ID.match(release.id) is None:
            raise ValueError("an escrow's or a release's id is not 1 to 64 of A-Za-z0-9_-")
        address = self._api.address(self._api.paths.release_partial, release.escrow)
        document = payment(release.amount, release.id)
        exchange = await self._line.post("release_partial", address, document, release.id)
        if exchange.received is None:
            return exchange.silence
        return answer_to_release(release, exchange.received, self._mask, self._wall())

    async def create(
        self, to_agent_id: str, amount: int, memo: str, auto_release_hours: int | None, key: str
    ) -> Created | CreateFailed:
        """Lock an amount, in micros, out of the key's own wallet for an agent.

        At most one request leaves, as with a release. A creation cannot be repeated: sent twice, it
        locks twice. So the memo must be one that no other escrow has: after a DOUBT (or a
        cancellation) the caller reads `list_escrows(...)` until `with_memo(memo)` shows the escrow
        or the quarantine has passed, and only then may ask again. Raises `ValueError` before
        anything is sent for an amount that is no whole number above 0 and for what cannot be read
        back as it was written.
        """
        wanted = self._wanted(to_agent_id, amount, memo)
        if RELEASE_ID.match(key) is None:
            raise ValueError("a key is 1 to 64 of A-Za-z0-9_-")
        document: dict[str, object] = {
            "to_agent_id": to_agent_id,
            "amount": format_amount(amount),
            "memo": memo,
        }
        if auto_release_hours is not None:
            if type(auto_release_hours) is not int or auto_release_hours < 1:
                raise ValueError("auto_release_hours is a whole number from 1")
            document["auto_release_hours"] = auto_release_hours
        mono = self._mono()
        address = self._api.address(self._api.paths.create)
        exchange = await self._line.post("create", address, document, key)
        if exchange.received is None:
            return CreateFailed(exchange.silence.kind, exchange.silence.detail)
        return answer_to_create(wanted, exchange.received, self._mask, mono, self._wall())

    async def refund_rest(self, escrow: str, key: str) -> Answer:
        """Request that all that remains of an escrow goes back to its payer.

        At most one request leaves. Its outcome may be a DOUBT, but unlike a release it is safe to
        repeat: it goes by level (leave nothing), not by delta (move so much), so the second of two
        finds nothing left to move. What is not safe is a release after it: a refund in doubt may
        land first, or last. CONFIRMED says that nothing remains; a service that only takes note of
        the request is a DOUBT until a reading shows it. Raises `ValueError` before anything is sent
        for ids that cannot stand in an address or a header.
        """
        received = await self._rest("refund_rest", self._api.paths.refund, escrow, key)
        if isinstance(received, Answer):
            return received
        return answer_to_refund_rest(escrow, received, self._mask, self._wall())

    async def release_rest(self, escrow: str, key: str) -> Answer:
        """Pay all that remains of an escrow to its provider, however much that is when it lands.

        Never a way to pay an amount: that is `release_partial`. At most one request leaves; a DOUBT
        is decided by a reading. Raises as `refund_rest`.
        """
        received = await self._rest("release_rest", self._api.paths.release, escrow, key)
        if isinstance(received, Answer):
            return received
        return answer_to_release_rest(escrow, received, self._mask, self._wall())

    async def list_escrows(self, agent_id: str) -> Listing | Unread:
        """Read an agent's escrows, page by page, at most 200 pages.

        Raises `ValueError` for an id of no agent.
        """
        if AGENT_ID.match(agent_id) is None:
            raise ValueError("an agent's id is 1 to 64 of A-Za-z0-9_.:-")
        address = self._api.address(self._api.paths.list)
        query = {"agent_id": agent_id, "limit": str(PAGE_ESCROWS)}
        escrows: list[Listed] = []
        skipped = 0
        for _ in range(PAGES_MAX):
            page = await self._page(address, query)
            if isinstance(page, Unread):
                return page
            escrows += page.escrows
            skipped += page.skipped
            if page.cursor is None:
                return Listing(tuple(escrows), skipped, complete=True)
            if page.cursor == query.get("cursor"):
                return Unread("nonsense", "the list's cursor leads back to the same page")
            query["cursor"] = page.cursor
        return Listing(tuple(escrows), skipped, complete=False)

    async def probe(self) -> str:
        """Check without moving money that the key reads and that release-partial exists.

        Comes back with what was found, for a person. Asks for an escrow that is made up here, so
        that nothing can be paid: by GET, by release-partial, and by a call that no service has. A
        service that answers the last two alike has no release-partial. Raises `Unavailable` when it
        does not answer, `Refused` when it must not be used as it is configured.
        """
        escrow = f"esc_meterd_probe_{secrets.token_hex(8)}"
        # 1. The key, and what the service says of an escrow that does not exist.
        read = await self.read(escrow)
        if isinstance(read, Reading):
            raise Refused("the service shows an escrow that does not exist; check escrow.base_url")
        if read.kind == "key_refused":
            raise Refused(f"the service refused the key ({read.detail}); check escrow.api_key")
        if read.kind != "missing":
            raise Unavailable(f"an unknown escrow was not answered with 404: {read.detail}")
        # 2. The call that releases, and one beside it that cannot exist.
        path = self._api.paths.release_partial
        beside = path + ("/" if path.endswith("{id}") else "-") + secrets.token_hex(4)
        real = await self._probe_call(path, escrow)
        control = await self._probe_call(beside, escrow)
        if real == control:
            raise Refused(
                f"the service answers {path} as it answers a call that does not exist ({real}); "
                "check escrow.paths.release_partial, and never use /release in its place"
            )
        return f"the key reads, and {path} exists: {real}"

    async def _probe_call(self, path: str, escrow: str) -> str:
        return await self._line.probe_refusal(
            path,
            escrow,
            payment(1, f"rel_probe_{secrets.token_hex(8)}"),
            of_what=(
                "a release from an escrow that does not exist: do not let meterd release there"
            ),
        )

    # -- One request -------------------------------------------------------------------------------

    def _wanted(self, to_agent_id: str, amount: int, memo: str) -> Wanted:
        """Raises `ValueError` for a creation that must not be asked for."""
        if AGENT_ID.match(to_agent_id) is None:
            raise ValueError("an agent's id is 1 to 64 of A-Za-z0-9_.:-")
        if type(amount) is not int or amount <= 0:
            raise ValueError("an escrow's amount is whole micros, more than 0")
        if not memo or len(memo) > MEMO_CHARS_MAX or self._mask.excerpt(memo) != memo:
            raise ValueError(
                f"a memo is 1 to {MEMO_CHARS_MAX} printable characters with single blanks, and "
                "has nothing of a key: the escrow is found by it"
            )
        return Wanted(to_agent_id, amount, memo)

    async def _rest(self, call: str, path: str, escrow: str, key: str) -> Received | Answer:
        """What came back of a call about the whole remainder, or what its silence means."""
        if ESCROW_ID.match(escrow) is None or RELEASE_ID.match(key) is None:
            raise ValueError("an escrow's id or a key is not 1 to 64 of A-Za-z0-9_-")
        exchange = await self._line.post(call, self._api.address(path, escrow), {}, key)
        return exchange.silence if exchange.received is None else exchange.received

    async def _page(self, address: str, query: Mapping[str, str]) -> Page | Unread:
        mono = self._mono()
        exchange = await self._line.get("list", address, query)
        if exchange.received is None:
            return Unread("unavailable", exchange.flaw)
        return answer_to_list(exchange.received, self._mask, mono, self._wall())
