"""Where a payment goes: to an escrow's service or to a payer's wallet, by the role of its id.

The rule kept here: the role decides, and never the look of an id. The settler and the state table
know one kind of thing that is drawn on; only this file knows that there are two. And only it knows
that what is locked may be locked with another key than the daemon's own.
"""

from __future__ import annotations

from meterd.core.openings import Census, Found, Locked, Opening
from meterd.core.settlement import LIVE, WALLET, Answer, AnswerKind, Reading, Release
from meterd.escrow.client import EscrowClient
from meterd.escrow.outcomes import CreateFailed, Listed, Unread
from meterd.escrow.wallet import WalletClient

NO_WALLET = "no wallet is configured; write [wallet]"


class PaymentService:
    """The settler's `EscrowService`: an escrow client and, where there is one, a wallet client."""

    def __init__(self, escrow: EscrowClient, wallet: WalletClient | None = None) -> None:
        self._escrow = escrow
        self._wallet = wallet

    async def read(self, escrow: str, role: str) -> Reading | Unread:
        """Read an escrow or a wallet. Raises only a cancellation."""
        if role != WALLET:
            return await self._escrow.read(escrow)
        if self._wallet is None:
            return Unread("unavailable", NO_WALLET)
        return await self._wallet.read(escrow)

    async def release_partial(self, release: Release, role: str) -> Answer:
        """Draw an amount: at most one request leaves, in all of this release's life."""
        if role != WALLET:
            return await self._escrow.release_partial(release)
        if self._wallet is None:
            return Answer(AnswerKind.NOT_SENT, NO_WALLET)
        return await self._wallet.debit(release)

    async def refund_rest(self, escrow: str) -> Answer:
        """Ask for the refund of what is left of an escrow; asked again, nothing more goes back."""
        return await self._escrow.refund_rest(escrow, f"refund_{escrow}"[:64])


class OpeningService:
    """Where openings are sent, and where they are found again: the opener's `LockService`.

    The payer's key locks, where there is one; whose list is read says the opener. It is read with
    the daemon's own key: that is the one that meterd always has.
    """

    def __init__(self, own: EscrowClient, payer: EscrowClient | None = None) -> None:
        self._own = own
        self._payer = payer

    async def lock(self, opening: Opening) -> Locked | Answer:
        """Lock an escrow: at most one request leaves, in all of this opening's life."""
        client = self._payer or self._own
        created = await client.create(
            opening.provider, opening.amount, opening.memo, opening.hours, opening.id
        )
        if isinstance(created, CreateFailed):
            return Answer(created.kind, created.detail, retry_after=created.retry_after)
        return Locked(created.escrow.id, created.escrow.creator or "")

    async def list_escrows(self, agent_id: str) -> Census | Unread:
        """Read an agent's escrows. Raises only a cancellation."""
        listing = await self._own.list_escrows(agent_id)
        if isinstance(listing, Unread):
            return listing
        return Census(
            tuple(map(_found, listing.escrows)), whole=listing.complete and not listing.skipped
        )


def _found(listed: Listed) -> Found:
    return Found(
        escrow=listed.id,
        memo=listed.memo or "",
        creator=listed.creator or "",
        provider=listed.provider or "",
        total=listed.total,
        live=listed.reading.status in LIVE and listed.reading.remaining > 0,
        created_at=listed.created_at or 0,
    )
