"""Where a payment goes: to an escrow's service or to a payer's wallet, by the role of its id.

The rule kept here: the role decides, and never the look of an id. The settler and the state table
know one kind of thing that is drawn on; only this file knows that there are two.
"""

from __future__ import annotations

from meterd.core.settlement import WALLET, Answer, AnswerKind, Reading, Release
from meterd.escrow.client import EscrowClient
from meterd.escrow.outcomes import Unread
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
