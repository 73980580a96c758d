from __future__ import annotations

import inspect
import json
import pickle
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.escrow.documents import Received
from meterd.sdk import AsyncEscrowClient, EscrowClient, contract
from meterd.sdk.contract import PAGES_MAX, Contract, Done, Look, Lost, Move, Walk, new_key
from meterd.sdk.errors import (
    BadArgument,
    Conflict,
    EscrowError,
    InDoubt,
    KeyRefused,
    Limited,
    NotFound,
    NotSent,
    Refused,
    Unavailable,
)

D = Decimal
KEY = "pf_live_0a1B2c3D4e5F6g7H8i9J"
URL = "https://escrow.example/api/v1/"
SERVICE = Contract(URL, KEY, 30.0)
SHOWN = {
    "escrow_id": "esc_1",
    "status": "partially_released",
    "amount": "10.00",
    "released_amount": "0.30",
    "remaining": "9.70",
    "memo": "spec:42",
}
ERROR = {"error": "some_code", "message": "some words"}


def came(body: Any, status: int = 200, **headers: str) -> Received:
    """An answer; `_` in a header's name stands for `-`."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Received(status, {n.replace("_", "-"): v for n, v in headers.items()}, text)


def release(**changes: Any) -> Move[Done]:
    """A request for 0.10 of esc_1."""
    told = {"memo": None, "idempotency_key": "rel_1", "released_before": None, **changes}
    return SERVICE.release_partial("esc_1", "0.10", **told)


# -- What is sent ----------------------------------------------------------------------------------


def test_each_call_is_the_one_request_of_the_contract() -> None:
    """Paths and bodies, money as plain text; what was not asked for is not in a body."""
    memo = {"memo": "meterd rel_1"}
    rows = [
        (release(), "/escrow/esc_1/release-partial", {"amount": "0.10", **memo}),
        (release(memo="x"), "/escrow/esc_1/release-partial", {"amount": "0.10", "memo": "x"}),
        (SERVICE.release_all("esc_1", None), "/escrow/esc_1/release", {}),
        (SERVICE.refund_all("esc_1", None), "/escrow/esc_1/refund", {}),
        (
            SERVICE.refund_part("esc_1", D("2E-6"), None),
            "/escrow/esc_1/refund",
            {"amount": "0.000002"},
        ),
        (
            SERVICE.lock("a", "10", "m", None, None),
            "/escrow",
            {"to_agent_id": "a", "amount": "10.00", "memo": "m"},
        ),
        (
            SERVICE.lock("a", "10", "m", 168, None),
            "/escrow",
            {"to_agent_id": "a", "amount": "10.00", "memo": "m", "auto_release_hours": 168},
        ),
    ]

    for question, path, body in rows:
        assert (question.path, question.document) == (path, body)
    status, first = SERVICE.status("esc_1"), SERVICE.list("agent:1").look
    assert (status.path, status.query) == ("/escrow/esc_1", {})
    assert first is not None
    assert (first.path, first.query) == ("/escrow", {"agent_id": "agent:1", "limit": "50"})


def test_key_is_made_where_none_was_given() -> None:
    """Two calls never share a key by accident."""
    made = [SERVICE.release_all("esc_1", None).key for _ in range(2)]

    assert release().key == "rel_1"
    assert len({*made, new_key()}) == 3


# What cannot be meant, in each argument beside the amount.
BAD_CALLS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("status", ("",)),
    ("status", ("../wallet",)),
    ("status", ("esc_1?x",)),
    ("status", (None,)),
    ("release_all", ("", None)),
    ("release_all", ("esc_1", "")),
    ("release_all", ("esc_1", "k" * 65)),
    ("release_all", ("esc_1", "a\r\nb")),
    ("refund_all", ("esc/1", None)),
    ("refund_part", ("esc/1", "1.00", None)),
    ("release_partial", ("esc_1", "0.10", "", None, None)),
    ("release_partial", ("esc_1", "0.10", "meterd rel_1", None, None)),
    ("release_partial", ("esc_1", "0.10", None, None, 0.2)),
    ("lock", ("", "1.00", "m", None, None)),
    ("lock", ("a b", "1.00", "m", None, None)),
    ("lock", ("a", "1.00", "", None, None)),
    ("lock", ("a", "1.00", "m" * 201, None, None)),
    ("lock", ("a", "1.00", "two  blanks", None, None)),
    ("lock", ("a", "1.00", "a\nb", None, None)),
    ("lock", ("a", "1.00", f"key {KEY}", None, None)),
    ("lock", ("a", "1.00", None, None, None)),
    ("lock", ("a", "1.00", "m", 0, None)),
    ("lock", ("a", "1.00", "m", -1, None)),
    ("lock", ("a", "1.00", "m", True, None)),
    ("lock", ("a", "1.00", "m", 1.5, None)),
    ("list", ("",)),
    ("list", ("a&b",)),
)


@pytest.mark.parametrize(("method", "args"), BAD_CALLS)
def test_argument_that_cannot_be_meant_makes_no_question(
    method: str, args: tuple[Any, ...]
) -> None:
    """Where there is no question, nothing can be sent; no message repeats the key."""
    with pytest.raises(BadArgument) as raised:
        getattr(SERVICE, method)(*args)

    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://escrow.example/api/v1",
        "http://127.0.0.1.example/",
        "ftp://127.0.0.1/",
        "https://user:secret@escrow.example/",
        "https://escrow.example/?a=b",
        "https://escrow.example/#a",
        "https://escrow.example:x/",
        "https:///api",
        "escrow.example",
        "",
    ],
)
def test_address_to_which_no_key_may_be_sent_is_refused(url: Any) -> None:
    """By both clients, before they do anything."""
    for client in (EscrowClient, AsyncEscrowClient):
        with pytest.raises(BadArgument, match="https"):
            client(url, KEY)


@pytest.mark.parametrize("key", ["", "a b", "a\r\nb", "\u00e9", "k" * 513, None])
def test_key_that_is_none_is_refused_and_not_repeated(key: Any) -> None:
    """A header can hold any other."""
    with pytest.raises(BadArgument, match="api_key"):
        EscrowClient(URL, key)


def test_http_is_taken_for_loopback_alone() -> None:
    """For sandboxes."""
    for host in ("localhost", "127.0.0.1:8788", "[::1]:8788"):
        assert Contract(f"http://{host}/api/v1", KEY, 1.0).api.base_url.startswith("http:")


def test_time_out_of_nothing_is_refused() -> None:
    """It would make a doubt of every call."""
    with pytest.raises(BadArgument, match="timeout_s"):
        EscrowClient(URL, KEY, timeout_s=0)


# -- What is read ----------------------------------------------------------------------------------

DONE = None
OURS = {"release": {"gross_amount": "0.10", "idempotency_key": "rel_1"}}

# (answer, released_before, what comes of a release of 0.10)
ANSWERS: tuple[tuple[Received | Lost, str | None, type[EscrowError] | None], ...] = (
    (came(SHOWN | OURS), None, DONE),
    (came(SHOWN | OURS, 202), None, DONE),
    (came({"escrow_id": "esc_1", "amount": "0.10"}), None, DONE),
    (came({"escrow_id": "esc_1", "amount": "0.10"}, 202), None, InDoubt),
    (came({"escrow_id": "esc_1", "amount": "0.099"}), None, InDoubt),
    (came({"escrow_id": "esc_1", "net_amount": "0.099"}), None, InDoubt),
    (came({"ok": True}), None, InDoubt),
    # The total alone.
    (came(SHOWN), None, InDoubt),
    (came(SHOWN), "0.20", DONE),
    (came(SHOWN), "0.30", InDoubt),
    (came(SHOWN), "0.10", InDoubt),
    (came({"released_total": "0.10"}), "0", DONE),
    (came({"released_total": "0.10"}), None, InDoubt),
    # Contradictions.
    (came(SHOWN | {"release": {"gross_amount": "10.00"}}), None, InDoubt),
    (came(SHOWN | {"release": {"gross_amount": "10.00"}}), "0.20", InDoubt),
    (came(SHOWN | OURS | {"released_amount": "0.05", "remaining": "9.95"}), None, InDoubt),
    (came(SHOWN | OURS | {"escrow_id": "esc_2"}), None, InDoubt),
    (came(SHOWN | OURS | {"error": "no"}), None, InDoubt),
    (came(SHOWN | OURS | {"status": "failed"}), None, InDoubt),
    # Refusals.
    (came(ERROR, 400), None, Refused),
    (came(ERROR, 402), None, Refused),
    (came(ERROR, 422), None, Refused),
    (came(ERROR, 404), None, NotFound),
    (came(ERROR, 409), None, Conflict),
    (came(ERROR, 403), None, Refused),
    (came(b"<html>", 401), None, KeyRefused),
    (came(b"<html>", 429), None, Limited),
    (came(b"<html>", 400), None, InDoubt),
    (came(b"<html>", 403), None, InDoubt),
    (came(b"<html>", 404), None, InDoubt),
    (came(ERROR, 408), None, InDoubt),
    (came(ERROR, 500), None, InDoubt),
    (came(SHOWN | OURS, 307), None, InDoubt),
    # No answer.
    (Lost(left=False, flaw="refused"), None, NotSent),
    (Lost(left=True, flaw="reset"), None, InDoubt),
    (Received(200, {}, json.dumps(SHOWN | OURS).encode(), "cut off"), None, InDoubt),
)


@pytest.mark.parametrize(
    ("answer", "before", "expected"), ANSWERS, ids=[str(n) for n in range(len(ANSWERS))]
)
def test_release_is_done_where_the_answer_shows_it_and_else_says_what_is_known(
    answer: Received | Lost, before: str | None, expected: type[EscrowError] | None
) -> None:
    """Only what names the amount, or gives the total to be expected, is taken for paid."""
    question = release(released_before=before)
    if expected is None:
        done = question.read(answer)
        assert (done.escrow_id, done.amount, done.key) == ("esc_1", D("0.10"), "rel_1")
        return

    with pytest.raises(EscrowError) as raised:
        question.read(answer)

    assert type(raised.value) is expected
    if isinstance(raised.value, InDoubt):
        doubt = raised.value
        told = (doubt.call, doubt.escrow_id, doubt.amount, doubt.key)
        assert told == ("release_partial", "esc_1", D("0.10"), "rel_1")


def test_doubt_about_a_total_says_how_it_can_be_believed() -> None:
    """Who reads the error learns of the parameter."""
    with pytest.raises(InDoubt, match="hand over released_before"):
        release().read(came(SHOWN))


ENDED = SHOWN | {"status": "released", "released_amount": "10.00", "remaining": "0.00"}
# (answer, whether a release of everything is done)
ENDINGS: tuple[tuple[Received, bool], ...] = (
    (came(ENDED), True),
    (came(SHOWN), False),
    (came(ENDED | {"status": "refunded"}), False),
    (came(ENDED | {"escrow_id": "esc_2"}), False),
    (came({"escrow_id": "esc_1", "status": "released"}), False),
    (came({}), False),
)


@pytest.mark.parametrize(("answer", "done"), ENDINGS)
def test_release_of_everything_is_done_where_nothing_is_left(answer: Received, done: bool) -> None:
    """And where it did not go the other way."""
    question = SERVICE.release_all("esc_1", "rel_1")
    if done:
        assert question.read(answer).amount is None
        return
    with pytest.raises(InDoubt) as raised:
        question.read(answer)

    assert raised.value.amount is None


# (answer, whether a refund of 0.10 was taken)
REFUNDS: tuple[tuple[Received, bool], ...] = (
    (came(SHOWN), True),
    (came(SHOWN, 202), True),
    (came({"escrow": SHOWN, "refund": {"amount": "0.1"}}), True),
    (came({"id": "esc_1", "status": "refund_requested"}, 202), True),
    (came(SHOWN | {"refund": {"amount": "9.70"}}), False),
    (came(SHOWN | {"refund": {"amount": "much"}}), False),
    (came(SHOWN | {"success": False}), False),
    (came(SHOWN | {"escrow_id": "esc_2"}), False),
    (came(SHOWN | {"released_amount": "11.00"}), False),
    (came({"ok": True}), False),
    (came([SHOWN]), False),
)


@pytest.mark.parametrize(("answer", "taken"), REFUNDS)
def test_refund_is_taken_where_the_answer_names_the_escrow(answer: Received, taken: bool) -> None:
    """A refund of another amount than was asked for is a doubt."""
    question = SERVICE.refund_part("esc_1", "0.10", "rel_1")
    if taken:
        assert question.read(answer).amount == D("0.10")
        return

    with pytest.raises(InDoubt):
        question.read(answer)


def test_lock_believes_an_answer_with_the_id_alone_and_none_that_contradicts() -> None:
    """The contract promises no more than an id; another amount or provider is a doubt."""
    question = SERVICE.lock("agent_a", "5.00", "m", None, "rel_1")

    escrow = question.read(came({"escrow_id": "esc_9"}, 201))

    assert (escrow.id, escrow.total, escrow.released, escrow.remaining, escrow.memo) == (
        "esc_9",
        D("5.00"),
        D(0),
        D("5.00"),
        "m",
    )
    for wrong in ({"amount": "50.00"}, {"to_agent_id": "agent_b"}, {"error": "x"}):
        with pytest.raises(InDoubt, match="look for the memo 'm'"):
            question.read(came({"escrow_id": "esc_9", **wrong}, 201))


def test_money_of_an_answer_is_read_exactly_from_texts_and_numbers() -> None:
    """No figure passes through a float, and noise of floats is taken off."""
    numbers = b'{"id": "esc_1", "status": "Weird", "amount": 14.850000000000001, "released": 2e-06}'

    escrow = SERVICE.status("esc_1").read(came(numbers))

    assert (escrow.total, escrow.released) == (D("14.85"), D("0.000002"))
    assert (escrow.remaining, escrow.refunded) == (D("14.849998"), D(0))
    assert (escrow.status, escrow.currency, escrow.deadline) == ("Weird", None, None)


# (answer, what a reading raises)
READINGS: tuple[tuple[Received | Lost, type[EscrowError]], ...] = (
    (came(ERROR, 404), NotFound),
    (came(ERROR, 403), Refused),
    (came(ERROR, 401), KeyRefused),
    (came(ERROR, 429), Limited),
    (came(b"<html>", 404), Unavailable),
    (came(ERROR, 500), Unavailable),
    (came(SHOWN, 302), Unavailable),
    (came(SHOWN | {"escrow_id": "esc_2"}), Unavailable),
    (came(SHOWN | {"released_amount": "11.00"}), Unavailable),
    (came({"escrow_id": "esc_1"}), Unavailable),
    (came(b"{"), Unavailable),
    (Lost(left=True, flaw="reset"), Unavailable),
    (Lost(left=False, flaw="refused"), NotSent),
)


@pytest.mark.parametrize(("answer", "expected"), READINGS)
def test_reading_that_cannot_be_relied_on_is_an_error_and_never_a_doubt(
    answer: Received | Lost, expected: type[EscrowError]
) -> None:
    """A reading moves nothing."""
    with pytest.raises(EscrowError) as raised:
        SERVICE.status("esc_1").read(answer)

    assert type(raised.value) is expected


def test_no_error_shows_the_key() -> None:
    """Not in its text and not in what hangs on it, whoever echoes it."""
    body = {"error": f"bad {KEY}", "message": f"Bearer {KEY}", "escrow_id": KEY}
    answers = [came(body, status) for status in (200, 400, 401, 404, 409, 429, 500)]
    questions: list[Move[Any] | Look[Any]] = [
        release(),
        SERVICE.lock("a", "1.00", "m", None, None),
        SERVICE.refund_all("esc_1", None),
        SERVICE.release_all("esc_1", None),
        SERVICE.status("esc_1"),
    ]
    for question in questions:
        for answer in [*answers, Lost(left=True, flaw="reset")]:
            with pytest.raises(EscrowError) as raised:
                question.read(answer)
            assert KEY not in f"{raised.value!r} {vars(raised.value)}"
        assert KEY not in repr(question)


@given(st.binary(max_size=300) | st.from_regex(rb'\{"(escrow_id|id|amount)": ?"?[0-9a-z.]*"?\}'))
def test_bytes_of_any_kind_end_in_an_answer_or_a_typed_error(body: bytes) -> None:
    """Nothing a service sends can raise anything else."""
    questions: list[Move[Any] | Look[Any]] = [release(), SERVICE.refund_all("esc_1", None)]
    questions += [SERVICE.release_all("esc_1", None), SERVICE.status("esc_1")]
    questions += [SERVICE.lock("a", "1.00", "m", None, None)]
    for question in questions:
        for status in (200, 400, 404, 409, 500):
            try:
                question.read(came(body, status))
            except EscrowError:
                continue


# -- Lists -----------------------------------------------------------------------------------------


def row(number: int) -> dict[str, Any]:
    """An escrow of a list."""
    return SHOWN | {"escrow_id": f"esc_{number}"}


def walked(*pages: Any) -> list[str]:
    """The ids of a walk that is answered with these pages."""
    walk = SERVICE.list("agent_a")
    found: list[str] = []
    for page in pages:
        assert walk.look is not None
        found += [escrow.id for escrow in walk.take(walk.look.read(came(page)))]
    assert walk.look is None
    walk.end()
    return found


def test_list_follows_its_cursor_to_the_end() -> None:
    """The cursor goes back as it came, and nothing else of the service names an address."""
    walk = SERVICE.list("agent_a")
    assert walk.look is not None
    walk.take(walk.look.read(came({"escrows": [row(1)], "next_cursor": "50&x=/"})))

    assert walk.look is not None
    assert walk.look.query == {"agent_id": "agent_a", "limit": "50", "cursor": "50&x=/"}
    assert walked([row(1), row(2)]) == ["esc_1", "esc_2"]
    assert walked({"escrows": [row(1)], "next_cursor": "1"}, {"items": [row(2)]}) == [
        "esc_1",
        "esc_2",
    ]


def test_list_that_leads_in_a_circle_is_no_list() -> None:
    """Neither back to the same page nor on for ever."""
    walk = SERVICE.list("agent_a")
    page = {"escrows": [row(1)], "next_cursor": "1"}
    assert walk.look is not None
    walk.take(walk.look.read(came(page)))
    with pytest.raises(Unavailable, match="no end"):
        walk.take(walk.look.read(came(page)))

    endless = SERVICE.list("agent_a")
    for number in range(PAGES_MAX - 1):
        _turn(endless, number)
    with pytest.raises(Unavailable, match="no end"):
        _turn(endless, PAGES_MAX)


def _turn(walk: Walk, number: int) -> None:
    """Turn over an empty page that names a further one."""
    assert walk.look is not None
    walk.take(walk.look.read(came({"escrows": [], "next_cursor": str(number)})))


def test_list_with_entries_that_make_no_sense_says_so_at_the_end() -> None:
    """What can be read is handed over first."""
    walk = SERVICE.list("agent_a")
    assert walk.look is not None
    found = walk.take(walk.look.read(came([row(1), {"escrow_id": "esc_2"}, 7])))

    assert [escrow.id for escrow in found] == ["esc_1"]
    with pytest.raises(Unavailable, match="2 of its entries"):
        walk.end()


# -- Readings again, and the two clients -----------------------------------------------------------


def test_reading_is_put_again_where_that_may_help() -> None:
    """Twice more, after a pause, or after the one that the service asks for if it is short."""
    # (error, looks) -> whether it is put again
    rows: list[tuple[EscrowError, int, bool]] = [
        (Unavailable(), 1, True),
        (Unavailable(), 2, True),
        (Unavailable(), 3, False),
        (NotSent(), 1, True),
        (Limited(), 1, True),
        (Limited(retry_after=5.0), 1, True),
        (Limited(retry_after=0.0), 1, True),
        (Limited(retry_after=5.1), 1, False),
        (NotFound(), 1, False),
        (KeyRefused(), 1, False),
    ]

    for error, looks, again in rows:
        pause = contract.pause_before_next(error, looks)
        assert (pause is not None) is again
        assert pause is None or 0 <= pause <= 5


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    """Who knows one knows the other."""

    def face(client: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(client, inspect.isfunction)
        shown = {name: method for name, method in methods if not name.startswith("_")}
        return {
            name: [str(part) for part in inspect.signature(method).parameters.values()]
            for name, method in shown.items()
        }

    assert face(EscrowClient) == face(AsyncEscrowClient)
    assert list(face(EscrowClient)) == [
        "list",
        "lock",
        "refund_all",
        "refund_part",
        "release_all",
        "release_partial",
        "status",
    ]


def test_error_survives_being_pickled() -> None:
    """Programs hand errors from one process to another."""
    with pytest.raises(InDoubt) as raised:
        release().read(Lost(left=True, flaw="reset"))

    copy = pickle.loads(pickle.dumps(raised.value))

    assert (str(copy), vars(copy)) == (str(raised.value), vars(raised.value))


async def test_client_that_was_not_entered_says_what_comes_first() -> None:
    """Instead of an error about None."""
    with pytest.raises(RuntimeError, match="async with"):
        await AsyncEscrowClient(URL, KEY).status("esc_1")
