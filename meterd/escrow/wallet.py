"""A payer's wallet, settled by the same state table as an escrow.

A debit is a delta call like a release: sent twice, it pays twice. The rule kept here: meterd pays
from a wallet only by level, so it needs the service's own cumulative figure of what this payee has
debited from this payer. To the state table a wallet is an escrow whose id is the payer's:

| a reading's | of a wallet                                                                |
|-------------|----------------------------------------------------------------------------|
| `released`  | what this payee has debited from this payer in all, by the service's figure|
| `remaining` | the balance                                                                |
| `total`     | both together: it grows when the payer tops up, and shrinks when the payer |
|             | spends elsewhere                                                           |
| `refunded`  | 0                                                                          |

A wallet without that figure cannot be paid from exactly: after a lost answer nobody could say
whether the debit took place, since a balance moves for other reasons too. Such a reading is
nonsense, and nothing is ever debited.

An answer to a debit is read as one to a release (`outcomes`), by its status and then:

| the body of a 2xx has                     | it is taken for                                    |
|-------------------------------------------|----------------------------------------------------|
| `debited`, `debited_total`, ...           | the total; or this debit's amount, where it is what|
|                                           | was asked and is not the total from before         |
| `gross_amount`, ...; also in `debit` and  | this debit's amount; if it is not what was asked,  |
| in our line of `debits`                   | a doubt                                            |
| `amount`, exactly what was asked          | an echo: enough with a 200 or 201, not with a 202  |
| `balance`, `fee`, any other `amount`      | nothing                                            |
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from meterd.core.money import format_amount
from meterd.core.settlement import Answer, AnswerKind, Reading, Release
from meterd.errors import Refused, Unavailable
from meterd.escrow.documents import (
    Mask,
    Nonsense,
    Received,
    agreed,
    named_money,
    named_text,
    object_of,
    unwrapped,
)
from meterd.escrow.line import (
    AGENT_ID,
    ServiceApi,
    ServiceClient,
    is_path_with_id,
    is_path_without_id,
)
from meterd.escrow.outcomes import (
    NOT_YET,
    RELEASE_ID,
    Figures,
    Unread,
    answer_by_evidence,
    gross_of,
    history,
    ids_of_ours,
    is_done,
    our_id,
    payment,
    status_word,
    unread,
    words_of_success,
)

ROWS = ("debits", "debit_history")
NO_LEVEL = (
    "the wallet does not say how much was debited in all (`debited`): meterd cannot pay exactly "
    "from such a wallet; draw on an escrow"
)

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True, slots=True)
class WalletPaths:
    """What stands behind `base_url` for each call; `{id}` is the payer's."""

    debit: str = "/wallet/debit"
    status: str = "/wallet/{id}"


@dataclass(frozen=True, slots=True)
class WalletApi(ServiceApi):
    """Where the wallets are and how they are spoken to. Mistakes raise `ConfigurationError`."""

    TABLE: ClassVar[str] = "wallet"

    paths: WalletPaths = WalletPaths()
    minimum_micros: int = 10_000  # The service takes no smaller debit.

    def _own_checks(self) -> tuple[tuple[bool, str, str], ...]:
        return (
            (
                not is_path_with_id(self.paths.status),
                "paths",
                'status must begin with / and have {id} once, such as "/wallet/{id}"',
            ),
            (
                not is_path_without_id(self.paths.debit),
                "paths",
                'debit must begin with /, such as "/wallet/debit"',
            ),
            (self.minimum_micros < 1, "minimum", "must be more than 0"),
        )


# --------------------------------------------------------------------------------------------------
# Client


class WalletClient(ServiceClient[WalletApi]):
    """The service of the wallets. Set up and opened as every `ServiceClient`.

    Its calls are counted as `wallet_read`, `debit` and `probe`.
    """

    async def read(self, agent: str) -> Reading | Unread:
        """Read a payer's wallet. What went wrong is a value: only a cancellation is raised."""
        if AGENT_ID.match(agent) is None:
            return Unread(
                "missing", "no agent can have this id: it is not 1 to 64 of A-Za-z0-9_.:-"
            )
        mono = self._mono()
        address = self._api.address(self._api.paths.status, agent)
        exchange = await self._line.get("wallet_read", address)
        if exchange.received is None:
            return Unread("unavailable", exchange.flaw)
        return answer_to_wallet(exchange.received, self._mask, mono, self._wall())

    async def debit(self, release: Release) -> Answer:
        """Ask for a debit from the wallet of `release.escrow`: at most one request leaves.

        Everything that `EscrowClient.release_partial` promises and raises holds. An amount below
        the wallet's minimum is DECLINED here, before anything is sent, as the service would.
        """
        if release.amount <= 0:
            raise ValueError("a debit must be of more than 0")
        if AGENT_ID.match(release.escrow) is None or RELEASE_ID.match(release.id) is None:
            raise ValueError("an agent's or a release's id has a character that it may not have")
        if release.amount < self._api.minimum_micros:
            return Answer(
                AnswerKind.DECLINED,
                f"nothing was sent: {format_amount(release.amount)} is below the wallet's minimum "
                f"of {format_amount(self._api.minimum_micros)}; raise min_release of the plan",
            )
        exchange = await self._line.post(
            "debit",
            self._api.address(self._api.paths.debit),
            _debit(release.escrow, release.amount, release.id),
            release.id,
        )
        if exchange.received is None:
            return exchange.silence
        return answer_to_debit(release, exchange.received, self._mask, self._wall())

    async def probe(self, agent: str) -> str:
        """Check without moving money that a wallet can be paid from exactly.

        Comes back with what was found, for a person: the key reads this payer's wallet, the wallet
        has a cumulative figure, and the call that debits exists. That call is asked for an agent
        that is made up here, so that nothing can be paid. Raises as `EscrowClient.probe`.
        """
        # 1. The key, and the figure without which nothing is paid.
        read = await self.read(agent)
        if isinstance(read, Unread):
            raise _reason(read)
        # 2. The call that debits, and one beside it that cannot exist.
        path = self._api.paths.debit
        payer = f"agent_meterd_probe_{secrets.token_hex(8)}"
        real = await self._probe_call(path, payer)
        control = await self._probe_call(f"{path}-{secrets.token_hex(4)}", payer)
        if real == control:
            raise Refused(
                f"the service answers {path} as it answers a call that does not exist ({real}); "
                "check wallet.paths.debit"
            )
        return (
            f"the key reads the wallet of {agent}: {format_amount(read.remaining)} left, "
            f"{format_amount(read.released)} debited so far; {path} exists: {real}"
        )

    async def _probe_call(self, path: str, payer: str) -> str:
        document = _debit(payer, self._api.minimum_micros, f"rel_probe_{secrets.token_hex(8)}")
        return await self._line.probe_refusal(
            path,
            payer,
            document,
            of_what="a debit from an agent that does not exist: do not let meterd debit there",
        )


def _debit(payer: str, micros: int, key: str) -> dict[str, object]:
    return {"agent_id": payer, **payment(micros, key)}


def _reason(read: Unread) -> Refused | Unavailable:
    """Why a wallet cannot be paid from, with what to do about it."""
    todo: Mapping[str, str] = {
        "key_refused": "the service refused the key ({}); check wallet.api_key",
        "forbidden": "the key may not read this wallet ({}); ask its payer",
        "missing": "the service knows no wallet of this agent ({}); check payer of the agreement",
        "nonsense": "the wallet cannot be used: {}",
    }
    if read.kind in todo:
        return Refused(todo[read.kind].format(read.detail))
    return Unavailable(f"the wallet was not answered: {read.detail}")


# --------------------------------------------------------------------------------------------------
# Answers


def answer_to_wallet(received: Received, mask: Mask, mono: float, wall: int) -> Reading | Unread:
    """What `GET /wallet/:id` said, by the table at the top; never raises."""
    if received.status != 200:
        return unread(received, mask, wall)
    try:
        return _reading(unwrapped(object_of(received), "payer"), mask, mono)
    except Nonsense as error:
        return Unread("nonsense", mask.excerpt(f"200 {error}"))


def _reading(body: Mapping[str, object], mask: Mask, mono: float) -> Reading:
    payer = named_text(body, "payer")
    if payer is None or AGENT_ID.match(payer) is None or mask.excerpt(payer) != payer:
        raise Nonsense("the body names no agent")
    balance, debited = named_money(body, "balance"), named_money(body, "debited")
    if balance is None:
        raise Nonsense("the body has no balance")
    if debited is None:
        raise Nonsense(NO_LEVEL)
    currency, payee = named_text(body, "currency"), named_text(body, "provider")
    return Reading(
        escrow=payer,
        status=status_word(body, mask) if body.get("status") else "active",
        total=debited + balance,
        released=debited,
        remaining=balance,
        refunded=0,
        currency=None if currency is None else mask.excerpt(currency).upper(),
        provider=None if payee is None else mask.excerpt(payee),
        deadline=None,
        mono=mono,
        release_ids=ids_of_ours(history(body, ROWS)),
    )


def answer_to_debit(release: Release, received: Received, mask: Mask, wall: int) -> Answer:
    """What an answer means for this debit, by the tables; never raises."""

    def evidence(document: Mapping[str, object], echo_counts: bool) -> Figures:
        return _evidence(release, document, echo_counts=echo_counts)

    return answer_by_evidence(received, mask, wall, evidence)


def _evidence(release: Release, document: Mapping[str, object], *, echo_counts: bool) -> Figures:
    """This debit's gross amount and the total debited, at least one. Raises `Nonsense`."""
    # 1. What contradicts a payment whatever the figures say.
    body = unwrapped(document, "payer")
    words = words_of_success(document, body)
    rows = _debit_rows(release, document, body)
    echo_counts = echo_counts and not words & NOT_YET
    # 2. Amounts that can only be this debit's.
    amount = gross_of(release, rows)
    amount = None if words & NOT_YET else amount
    # 3. The total debited, and what only looks like it.
    debited = agreed("debited", *(named_money(row, "debited") for row in rows))
    levels = (release.before, release.before + release.amount)
    echoed = any(named_money(row, "total") == release.amount for row in rows)
    if debited == release.amount and debited not in levels:
        debited, echoed = None, True
    if amount is None and debited is None and echo_counts and echoed:
        amount = release.amount
    if amount is None and debited is None:
        raise Nonsense("the body names neither the amount nor the total debited")
    return amount, debited


def _debit_rows(
    release: Release, document: Mapping[str, object], body: Mapping[str, object]
) -> list[Mapping[str, object]]:
    """What may speak of this debit: the body, its `debit`, our line of its history."""
    rows = [body] if body is document else [document, body]
    for part in tuple(rows):
        if named_text(part, "payer") not in (None, release.escrow):
            raise Nonsense("the body is about another agent's wallet")
        nested = part.get("debit")
        named = [part, nested] if isinstance(nested, dict) else [part]
        if any(our_id(row) not in (None, release.id) for row in named):
            raise Nonsense("the body is about another debit")
        rows += [row for row in named[1:] if is_done(row)]
        rows += [row for row in history(part, ROWS) if our_id(row) == release.id and is_done(row)]
    return rows
