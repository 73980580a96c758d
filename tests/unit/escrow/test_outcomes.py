from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterd.core.settlement import Answer, AnswerKind, Reading, Release, ReleaseStatus
from meterd.escrow.documents import (
    BODY_BYTES_MAX,
    EXCERPT_CHARS_MAX,
    Mask,
    Nonsense,
    Received,
    error_text,
    read_money,
)
from meterd.escrow.outcomes import (
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
)

KEY = "pf_live_0a1B2c3D4e5F6g7H8i9J"
MASK = Mask(KEY)
WALL = 1_795_000_000_000  # 2026-11-18T11:06:40Z
# Asked: 0.10; released before: 0.20; so 0.30 after it.
RELEASE = Release("rel_77", "esc_1", 100_000, 200_000, ReleaseStatus.SENT, "amount", 0, 0, ())

SANDBOX = {
    "escrow_id": "esc_1",
    "status": "partially_released",
    "currency": "USDC",
    "amount": "10.00",
    "released_amount": "0.30",
    "remaining": "9.70",
    "refunded_amount": "0.00",
    "fee": "0.003",
    "net_released_amount": "0.297",
    "to_agent_id": "agent_provider",
    "releases": [],
    "release": {
        "release_id": "rel_2",
        "gross_amount": "0.10",
        "fee": "0.001",
        "net_amount": "0.099",
        "memo": "meterd rel_77",
        "idempotency_key": "rel_77",
    },
}
ERROR = {"error": "some_code", "message": "some words"}
HTML = b"<!DOCTYPE html><html><title>Bad gateway</title></html>"
OK, DOUBT = AnswerKind.CONFIRMED, AnswerKind.DOUBT


def sandbox(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (SANDBOX | changes).items() if value != "absent"}


def as_bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def ask(status: int, body: Any, headers: dict[str, str] | None = None, flaw: str = "") -> Answer:
    received = Received(status, headers or {}, as_bytes(body), flaw)
    return answer_to_release(RELEASE, received, MASK, WALL)


def line(**fields: Any) -> dict[str, Any]:
    return {"memo": "meterd rel_77", "gross_amount": "0.10", **fields}


# (status, body, kind, amount, released); amounts in micros.
RELEASE_ROWS: tuple[tuple[int, Any, AnswerKind, int | None, int | None], ...] = (
    # The contract's own answer, and one thing changed at a time.
    (200, SANDBOX, OK, 100_000, 300_000),
    (201, SANDBOX, OK, 100_000, 300_000),
    (202, SANDBOX, OK, 100_000, 300_000),
    (200, sandbox(release="absent"), OK, None, 300_000),
    (200, sandbox(release=None), OK, None, 300_000),
    (200, sandbox(release="absent", releases=[line()]), OK, 100_000, 300_000),
    (200, sandbox(release="absent", releases=[line(memo="meterd rel_1")]), OK, None, 300_000),
    (200, sandbox(release=line(memo="meterd rel_1")), DOUBT, None, None),
    (200, sandbox(release=line(memo="by hand", idempotency_key="rel_1")), DOUBT, None, None),
    (200, sandbox(release=line(gross_amount="0.11")), DOUBT, None, None),
    (200, sandbox(release=line(gross_amount="0.099")), DOUBT, None, None),
    (200, sandbox(release=line(status="pending")), OK, None, 300_000),
    (200, sandbox(release=line(status="completed")), OK, 100_000, 300_000),
    (200, sandbox(escrow_id="esc_2"), DOUBT, None, None),
    (200, sandbox(escrow_id="absent"), OK, 100_000, 300_000),
    (200, sandbox(escrow_id="absent", id="esc_2"), DOUBT, None, None),
    (200, sandbox(escrow_id="absent", escrowId="esc_1"), OK, 100_000, 300_000),
    (200, sandbox(id="tx_9"), OK, 100_000, 300_000),
    (200, sandbox(status="absent"), OK, 100_000, 300_000),
    (200, sandbox(status="failed"), DOUBT, None, None),
    (200, sandbox(status="Declined"), DOUBT, None, None),
    (200, sandbox(status="pending"), OK, None, 300_000),
    (200, sandbox(error="oops"), DOUBT, None, None),
    (200, sandbox(error=None), OK, 100_000, 300_000),
    (200, sandbox(success=False), DOUBT, None, None),
    (200, sandbox(ok=False), DOUBT, None, None),
    (200, sandbox(success=True, data={"escrow": {}}), OK, 100_000, 300_000),
    # Figures that do not add up, or are missing, or are noisy.
    (200, sandbox(released_amount="11.00", remaining="0.00"), DOUBT, None, None),
    (200, sandbox(remaining="9.69"), DOUBT, None, None),
    (200, sandbox(refunded_amount="1.00"), DOUBT, None, None),
    (200, sandbox(refunded_amount="1.00", remaining="8.70"), OK, 100_000, 300_000),
    (200, sandbox(refunded_amount="absent"), OK, 100_000, 300_000),
    (200, sandbox(released_amount="absent"), OK, 100_000, 300_000),
    (200, sandbox(released_amount="absent", release="absent"), OK, None, 300_000),
    (200, sandbox(released_amount=0.3, remaining=9.7, amount=10), OK, 100_000, 300_000),
    (200, b'{"released_amount":0.30000000000000004,"remaining":9.7}', OK, None, 300_000),
    (200, b'{"released_amount":3e-1,"remaining":9.7}', OK, None, 300_000),
    (200, sandbox(released_amount="0.3000005", remaining="9.6999995"), DOUBT, None, None),
    (200, sandbox(released_amount="-0.30"), DOUBT, None, None),
    (200, sandbox(released_amount="0,30"), DOUBT, None, None),
    (200, sandbox(released_amount=True), OK, 100_000, 300_000),
    # Released, but not what was expected: the figure is handed on, and the core doubts.
    (200, sandbox(released_amount="0.20", remaining="9.80", release=None), OK, None, 200_000),
    (200, sandbox(released_amount="0.40", remaining="9.60"), OK, 100_000, 400_000),
    # Leaner answers.
    (200, {"released_total": "0.30"}, OK, None, 300_000),
    (200, {"total_released": "0.30", "amount": "0.099"}, OK, None, 300_000),
    (200, {"amount_released": "0.30", "remaining_amount": "9.7"}, OK, None, 300_000),
    (200, {"released": "0.30"}, OK, None, 300_000),
    (200, {"released": "0.10"}, OK, 100_000, None),
    (200, {"released": "0.20"}, OK, None, 200_000),
    (202, {"released": "0.10"}, DOUBT, None, None),
    (200, {"released": "0.10", "released_amount": "0.30"}, DOUBT, None, None),
    (200, {"gross_amount": "0.10", "net_amount": "0.099"}, OK, 100_000, None),
    (200, {"gross_amount": "0.10", "status": "queued"}, DOUBT, None, None),
    (200, {"amount": "0.10", "escrow_id": "esc_1"}, OK, 100_000, None),
    (200, {"amount": "0.10", "released": "0.30", "remaining": "9.70"}, OK, None, 300_000),
    (200, {"amount": "0.10", "status": "pending"}, DOUBT, None, None),
    (202, {"amount": "0.10"}, DOUBT, None, None),
    (200, {"amount": "0.099"}, DOUBT, None, None),
    (200, {"amount": "10.00"}, DOUBT, None, None),
    (200, {"amount": "0.10", "remaining": "9.70"}, DOUBT, None, None),
    (200, {"net_amount": "0.10", "fee": "0.001"}, DOUBT, None, None),
    (200, {"success": True, "amount": "0.10", "escrow": SANDBOX}, OK, 100_000, 300_000),
    (200, {"data": {"escrow": SANDBOX}}, OK, 100_000, 300_000),
    (200, {"success": True, "escrow": sandbox(escrow_id="esc_2")}, DOUBT, None, None),
    # 2xx that says nothing.
    (200, {}, DOUBT, None, None),
    (200, {"success": True}, DOUBT, None, None),
    (200, {"status": "ok", "escrow_id": "esc_1"}, DOUBT, None, None),
    (200, b"", DOUBT, None, None),
    (200, b" \n", DOUBT, None, None),
    (200, b"null", DOUBT, None, None),
    (200, b"[]", DOUBT, None, None),
    (200, b'"done"', DOUBT, None, None),
    (200, HTML, DOUBT, None, None),
    (204, b"", DOUBT, None, None),
    (206, json.dumps(SANDBOX).encode()[:100], DOUBT, None, None),
    (200, json.dumps(SANDBOX).encode() + b"{}", DOUBT, None, None),
    (200, json.dumps(SANDBOX).encode()[:-1], DOUBT, None, None),
    (200, b"\xef\xbb\xbf" + json.dumps(SANDBOX).encode(), DOUBT, None, None),
    (200, json.dumps(SANDBOX).encode("utf-16"), DOUBT, None, None),
    (200, b'{"released_total":"0.30","memo":"\xff"}', DOUBT, None, None),
    (200, b'{"released_total":"0.30","released_total":"0.20"}', DOUBT, None, None),
    (200, b'{"released_total":NaN}', DOUBT, None, None),
    (200, b'{"released_total":"0.30","x":Infinity}', DOUBT, None, None),
    (200, b'{"released_total":1e999999999}', DOUBT, None, None),
    (200, b'{"released_total":"0.30","x":' + b"9" * 5000 + b"}", DOUBT, None, None),
    (200, b"[" * 60_000, DOUBT, None, None),
    (200, b'{"released_total":"0.30","x":' + b"[" * 8 + b"]" * 8 + b"}", DOUBT, None, None),
    (200, b'{"released_total":"0.30","x":"' + b"[" * 99 + b'"}', OK, None, 300_000),
    (200, b'{"released_total":"0.30","x":"' + b"a" * BODY_BYTES_MAX + b'"}', DOUBT, None, None),
    # Refusals that the service documents.
    (400, ERROR, AnswerKind.DECLINED, None, None),
    (422, ERROR, AnswerKind.DECLINED, None, None),
    (402, ERROR, AnswerKind.EMPTY, None, None),
    (404, ERROR, AnswerKind.MISSING, None, None),
    (403, ERROR, AnswerKind.FORBIDDEN, None, None),
    (409, ERROR, AnswerKind.CONFLICT, None, None),
    (400, {"error": "only a code"}, AnswerKind.DECLINED, None, None),
    (400, {"error": {"code": "x", "message": "y"}}, AnswerKind.DECLINED, None, None),
    (400, {"error": {"message": "y"}}, AnswerKind.DECLINED, None, None),
    # The same statuses from somebody else.
    (400, HTML, DOUBT, None, None),
    (402, HTML, DOUBT, None, None),
    (403, HTML, DOUBT, None, None),
    (404, HTML, DOUBT, None, None),
    (409, HTML, DOUBT, None, None),
    (422, HTML, DOUBT, None, None),
    (404, b"", DOUBT, None, None),
    (404, {"message": "no Route matched with those values"}, DOUBT, None, None),
    (404, {"error": True}, DOUBT, None, None),
    (404, {"error": {}}, DOUBT, None, None),
    (404, {"error": " "}, DOUBT, None, None),
    (404, {"detail": "Not Found"}, DOUBT, None, None),
    (404, [ERROR], DOUBT, None, None),
    # Said before a request is passed on, by whoever says it.
    (401, ERROR, AnswerKind.KEY_REFUSED, None, None),
    (401, HTML, AnswerKind.KEY_REFUSED, None, None),
    (401, b"", AnswerKind.KEY_REFUSED, None, None),
    (429, ERROR, AnswerKind.LIMITED, None, None),
    (429, HTML, AnswerKind.LIMITED, None, None),
    (429, b"", AnswerKind.LIMITED, None, None),
    # Nobody knows.
    (301, ERROR, DOUBT, None, None),
    (302, HTML, DOUBT, None, None),
    (303, SANDBOX, DOUBT, None, None),
    (304, b"", DOUBT, None, None),
    (307, SANDBOX, DOUBT, None, None),
    (308, ERROR, DOUBT, None, None),
    (405, ERROR, DOUBT, None, None),
    (407, ERROR, DOUBT, None, None),
    (408, ERROR, DOUBT, None, None),
    (410, ERROR, DOUBT, None, None),
    (413, ERROR, DOUBT, None, None),
    (418, ERROR, DOUBT, None, None),
    (425, ERROR, DOUBT, None, None),
    (500, ERROR, DOUBT, None, None),
    (500, SANDBOX, DOUBT, None, None),
    (502, HTML, DOUBT, None, None),
    (503, ERROR, DOUBT, None, None),
    (504, b"", DOUBT, None, None),
    (599, ERROR, DOUBT, None, None),
)


@pytest.mark.parametrize(
    "row", RELEASE_ROWS, ids=[f"{n}-{row[0]}-{row[2]}" for n, row in enumerate(RELEASE_ROWS)]
)
def test_answer_to_a_release_is_read_by_the_table(row):
    """Each status and body means what the table says, and the doubtful ones are doubts."""
    status, body, kind, amount, released = row

    answer = ask(status, body)

    assert (answer.kind, answer.amount, answer.released) == (kind, amount, released), answer
    assert answer.detail.startswith(str(status))
    assert answer.detail != str(status)


def test_table_of_answers_is_large_enough_to_be_one():
    """The table keeps its rows."""
    assert len(RELEASE_ROWS) >= 60


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (200, DOUBT),
        (400, DOUBT),
        (401, AnswerKind.KEY_REFUSED),
        (404, DOUBT),
        (429, AnswerKind.LIMITED),
        (500, DOUBT),
    ],
)
def test_answer_that_broke_off_is_read_by_its_status_alone(status, kind):
    """A body that did not come whole proves nothing, however good its beginning is."""
    answer = ask(status, SANDBOX if status == 200 else ERROR, flaw="the connection broke off")

    assert (answer.kind, answer.detail) == (kind, f"{status} the connection broke off")


def test_first_release_of_an_escrow_is_confirmed_by_either_figure():
    """With nothing released before, the amount and the total are one figure."""
    first = Release("rel_1", "esc_1", 100_000, 0, ReleaseStatus.SENT, "amount", 0, 0, ())
    received = Received(200, {}, b'{"released":"0.1"}')

    answer = answer_to_release(first, received, MASK, WALL)

    assert (answer.kind, answer.released) == (OK, 100_000)


def test_old_total_that_equals_the_amount_is_no_echo():
    """A figure that was true before the release is no evidence of it."""
    second = Release("rel_2", "esc_1", 100_000, 100_000, ReleaseStatus.SENT, "amount", 0, 0, ())
    received = Received(200, {}, b'{"released":"0.1"}')

    answer = answer_to_release(second, received, MASK, WALL)

    assert (answer.amount, answer.released) == (None, 100_000)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": " 0 "}, 0.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "999999999999"}, 86_400.0),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "1e9"}, None),
        ({"Retry-After": "9" * 5000}, None),
        ({"Retry-After": "Wed, 18 Nov 2026 11:07:10 GMT"}, 30.0),
        ({"Retry-After": "Wed, 18 Nov 2026 11:00:00 GMT"}, 0.0),
        ({"Retry-After": "Wed, 18 Nov 99999 11:00:00 GMT"}, None),
        ({"X-RateLimit-Reset": "12"}, 12.0),
        ({"X-RateLimit-Reset": "1795000030"}, 30.0),
        ({"X-RateLimit-Reset": "1795000030000"}, 30.0),
        ({"X-RateLimit-Reset": "1694000030"}, 0.0),
        ({"RateLimit-Reset": "4"}, 4.0),
        ({"Retry-After": "3", "X-RateLimit-Reset": "12"}, 3.0),
        ({"Retry-After": "never", "X-RateLimit-Reset": "12"}, 12.0),
    ],
)
def test_wait_is_taken_from_the_headers_that_come(headers, seconds):
    """Seconds, an HTTP date or a reset, at most a day; what makes no sense is left out."""
    assert ask(429, ERROR, headers).retry_after == seconds


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("0", 0),
        ("0.0", 0),
        ("-0.0", 0),
        ("10", 10_000_000),
        ("10.00", 10_000_000),
        ("0.000001", 1),
        ("2e-06", 2),
        ("1E+2", 100_000_000),
        ("14.850000000000001", 14_850_000),
        ("14.849999999999998", 14_850_000),
        ("4.999999999999938", 5_000_000),
        ("0.30000000000000004", 300_000),
        ("-1.7763568394002505e-15", 0),
        ("1e-99", 0),
        ("0.000000999", 1),
        ("0.000001001", 1),
        ("999999999999999.999999", 999_999_999_999_999_999_999),
    ],
)
def test_amount_is_read_exactly(text, micros):
    """Strings, numbers and the noise of other people's floats become whole micros."""
    assert read_money(text) == micros


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            ".",
            "1.",
            ".5",
            "+1",
            " 1",
            "1\n",
            "1_000",
            "1,5",
            "$1",
            "0x10",
            "\u0661",
            "\uff11",
        ),
        *("NaN", "sNaN", "Infinity", "1e", "1e400", "1e999999999", "1e99", "--1", "1.2.3"),
        *("-1", "-0.000001", "0.0000005", "0.0000015", "0.000001002", "0.00000099"),
        *("1000000000000000", "9" * 25, "1" + "0" * 5000, "0." + "0" * 30 + "1"),
    ],
)
def test_amount_that_is_none_is_nonsense(text):
    """No sign, blank, exponent of a million or fraction of a micro is taken for money."""
    with pytest.raises(Nonsense):
        read_money(text)


def reading(**changes: Any) -> Reading:
    fields = {
        "escrow": "esc_1",
        "status": "partially_released",
        "total": 10_000_000,
        "released": 300_000,
        "remaining": 9_700_000,
        "refunded": 0,
        "currency": "USDC",
        "provider": "agent_provider",
        "deadline": None,
        "mono": 5.0,
    }
    return Reading(**(fields | changes))


def read(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reading | Unread:
    return answer_to_read(Received(status, headers or {}, as_bytes(body)), MASK, 5.0, WALL)


OURS = [line(), {"idempotency_key": "rel_9"}, {"memo": "meterd rel_8", "status": "failed"}]
READ_ROWS: tuple[tuple[Any, Reading], ...] = (
    (SANDBOX, reading()),
    ({"data": SANDBOX}, reading()),
    ({"escrow": SANDBOX, "success": True}, reading()),
    (sandbox(escrow_id="absent", id="esc_1"), reading()),
    (sandbox(escrow_id="absent", escrowId="esc_1"), reading()),
    (sandbox(escrow_id="esc_2"), reading(escrow="esc_2")),
    (sandbox(status="Funded"), reading(status="funded")),
    (sandbox(status="DISPUTED"), reading(status="disputed")),
    (sandbox(status="On Hold\x00"), reading(status="On Hold")),
    (sandbox(amount="absent", amount_usd=10), reading()),
    (sandbox(amount="absent", amount_usdc="10"), reading()),
    (sandbox(amount="10", amount_usd="10.000"), reading()),
    (sandbox(released_amount="absent", released="0.3"), reading()),
    (sandbox(released_amount="absent", amount_released=0.3), reading()),
    (sandbox(released=False), reading()),
    (sandbox(released_amount="absent"), reading()),
    (sandbox(remaining="absent"), reading()),
    (sandbox(remaining="absent", remaining_amount="9.70"), reading()),
    (
        sandbox(remaining="absent", refunded_amount="1"),
        reading(remaining=8_700_000, refunded=10**6),
    ),
    (sandbox(refunded_amount="absent"), reading()),
    (sandbox(remaining="9.00"), reading(remaining=9_000_000)),
    (
        sandbox(released_amount="11", remaining="absent"),
        reading(released=11_000_000, remaining=-1_000_000),
    ),
    (
        sandbox(status="refunded", refunded_amount="absent", remaining="0"),
        reading(status="refunded", refunded=9_700_000, remaining=0),
    ),
    (
        sandbox(status="funded", refunded_amount="absent", remaining="0"),
        reading(status="funded", refunded=0, remaining=0),
    ),
    (sandbox(currency="usdc"), reading()),
    (sandbox(currency="absent"), reading(currency=None)),
    (sandbox(currency="absent", asset="USDT"), reading(currency="USDT")),
    (sandbox(to_agent_id="absent"), reading(provider=None)),
    (sandbox(to_agent_id="absent", provider="agent_x"), reading(provider="agent_x")),
    (sandbox(auto_release_at=None), reading()),
    (sandbox(auto_release_at="2026-11-18T11:06:40.000Z"), reading(deadline=WALL)),
    (sandbox(auto_release_at="2026-11-18T12:06:40+01:00"), reading(deadline=WALL)),
    (sandbox(auto_release_at="2026-11-18T11:06:40"), reading(deadline=WALL)),
    (sandbox(auto_release_at=WALL // 1000), reading(deadline=WALL)),
    (sandbox(auto_release_at=WALL), reading(deadline=WALL)),
    (sandbox(auto_release_at=str(WALL // 1000) + ".25"), reading(deadline=WALL + 250)),
    (sandbox(deadline=WALL), reading(deadline=WALL)),
    (sandbox(releases=OURS), reading(release_ids=frozenset({"rel_77", "rel_9"}))),
    (sandbox(releases=[{"memo": "rel_77"}, {"memo": "meterd a/b"}, 3, None]), reading()),
    (sandbox(releases=[{"release_id": "rel_5", "memo": None}]), reading()),
)


@pytest.mark.parametrize("row", READ_ROWS, ids=range(len(READ_ROWS)))
def test_escrow_is_read_whatever_its_fields_are_called(row):
    """A reading has the service's own figures, exact, under any of the known names."""
    body, expected = row

    assert read(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        HTML,
        sandbox(escrow_id="absent"),
        sandbox(escrow_id="../admin"),
        sandbox(escrow_id="a\r\nb"),
        sandbox(escrow_id="x" * 65),
        sandbox(escrow_id=KEY),
        sandbox(escrow_id=None),
        sandbox(status="absent"),
        sandbox(status=""),
        sandbox(status=3),
        sandbox(amount="absent"),
        sandbox(amount="ten"),
        sandbox(amount="10", amount_usd="11"),
        sandbox(amount="-10"),
        sandbox(released_amount="absent", remaining="absent"),
        sandbox(released_amount="0.3000005"),
        sandbox(released_total="0.40"),
        sandbox(auto_release_at="tomorrow"),
        sandbox(auto_release_at=-1),
        sandbox(auto_release_at={"at": 1}),
        sandbox(auto_release_at="9" * 24),
    ],
)
def test_escrow_that_makes_no_sense_is_nonsense(body):
    """A figure that is missing, doubled or unreadable is never guessed."""
    got = read(body)

    assert isinstance(got, Unread)
    assert (got.kind, got.retry_after) == ("nonsense", None)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, ERROR, "key_refused"),
        (401, HTML, "key_refused"),
        (403, ERROR, "forbidden"),
        (403, HTML, "unavailable"),
        (404, ERROR, "missing"),
        (404, HTML, "unavailable"),
        (410, ERROR, "missing"),
        (429, ERROR, "limited"),
        (429, b"", "limited"),
        (204, b"", "unavailable"),
        (301, ERROR, "unavailable"),
        (307, SANDBOX, "unavailable"),
        (400, ERROR, "unavailable"),
        (408, ERROR, "unavailable"),
        (500, SANDBOX, "unavailable"),
        (502, HTML, "unavailable"),
        (503, ERROR, "unavailable"),
    ],
)
def test_reading_that_gave_nothing_says_why(status, body, kind):
    """Each status of a failed reading has its kind, and a wait where the service asked for one."""
    got = read(body, status, {"Retry-After": "9"})

    assert isinstance(got, Unread)
    assert (got.kind, got.retry_after) == (kind, 9.0)


def list_of(body: Any, status: int = 200) -> Page | Unread:
    return answer_to_list(Received(status, {}, as_bytes(body)), MASK, 5.0, WALL)


@pytest.mark.parametrize(
    ("body", "ids", "skipped", "cursor"),
    [
        ({"escrows": [SANDBOX], "next_cursor": "7"}, ["esc_1"], 0, "7"),
        ({"escrows": [SANDBOX], "next_cursor": None}, ["esc_1"], 0, None),
        ({"items": [SANDBOX, 3, {}, sandbox(amount="x")]}, ["esc_1"], 3, None),
        ([SANDBOX], ["esc_1"], 0, None),
        ({"data": [], "next": 7}, [], 0, "7"),
    ],
)
def test_list_is_read_entry_by_entry(body, ids, skipped, cursor):
    """One entry that makes no sense does not spoil its page, and is counted."""
    page = list_of(body)

    assert isinstance(page, Page)
    assert ([row.reading.escrow for row in page.escrows], page.skipped, page.cursor) == (
        ids,
        skipped,
        cursor,
    )


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, {}, "nonsense"),
        (200, b"3", "nonsense"),
        (200, {"escrows": [], "next_cursor": "a b\r\n"}, "nonsense"),
        (200, {"escrows": [], "next_cursor": {"a": 1}}, "nonsense"),
        (401, ERROR, "key_refused"),
        (500, ERROR, "unavailable"),
    ],
)
def test_list_that_cannot_be_read_says_why(status, body, kind):
    """A list without entries, or with a cursor that cannot stand in an address, is nonsense."""
    got = list_of(body, status)

    assert isinstance(got, Unread)
    assert got.kind == kind


def listed(**changes: Any) -> Listed:
    page = list_of({"escrows": [sandbox(**changes)]})
    assert isinstance(page, Page)
    [row] = page.escrows
    return row


def test_listed_escrow_has_what_its_payer_is_found_by():
    """Memo, payer, time and figures, each None where the service gives none."""
    row = listed(memo="m", from_agent_id="agent_payer", created_at="2026-11-18T11:06:40Z")

    assert (row.id, row.total, row.memo, row.provider, row.creator, row.status) == (
        *("esc_1", 10_000_000, "m", "agent_provider", "agent_payer", "partially_released"),
    )
    assert (row.created_at, row.deadline) == (WALL, None)
    bare = listed()
    assert (bare.memo, bare.creator, bare.created_at) == (None, None, None)


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        (WALL, WALL),
        (WALL // 1000, WALL),
        ("2026-11-18", 1_794_960_000_000),
        ("soon", None),
        ({}, None),
    ],
)
def test_time_of_a_creation_is_read_in_any_form_and_never_in_the_way(created, expected):
    """A time that is none does not spoil the entry: nothing depends on it."""
    assert listed(created_at=created).created_at == expected


WANTED = Wanted("agent_provider", 10_000_000, "m k")
NEW = {
    "escrow_id": "esc_1",
    "status": "funded",
    "amount": "10.00",
    "released_amount": "0.00",
    "remaining": "10.00",
    "to_agent_id": "agent_provider",
    "from_agent_id": "agent_payer",
    "memo": "m k",
}


def create(body: Any, status: int = 201) -> Created | CreateFailed:
    return answer_to_create(WANTED, Received(status, {}, as_bytes(body)), MASK, 5.0, WALL)


@pytest.mark.parametrize(
    "body",
    [
        NEW,
        {"escrow_id": "esc_1"},
        {"id": "esc_1", "status": "pending"},
        {"escrow": NEW, "success": True},
        {"data": {"escrow": NEW}},
        NEW | {"amount": 10, "released_amount": None, "memo": None},
        {"escrowId": "esc_1", "amount_usd": 10.0, "remaining": "10.000000000000001"},
    ],
    ids=range(7),
)
def test_creation_that_contradicts_nothing_is_created_as_it_was_wanted(body):
    """What the answer leaves out is as it was asked; a reading follows before anything is paid."""
    made = create(body)

    assert isinstance(made, Created), made
    row = made.escrow
    assert (row.id, row.total, row.memo, row.reading.remaining) == (
        *("esc_1", 10_000_000, "m k", 10_000_000),
    )
    assert row.provider in (None, "agent_provider")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (201, {}, DOUBT),
        (201, {"success": True}, DOUBT),
        (201, NEW | {"amount": "9.90"}, DOUBT),
        (201, NEW | {"released_amount": "1.00", "remaining": "9.00"}, DOUBT),
        (201, NEW | {"to_agent_id": "agent_other"}, DOUBT),
        (201, NEW | {"memo": "m"}, DOUBT),
        (201, NEW | {"status": "failed"}, DOUBT),
        (201, NEW | {"status": "queued"}, DOUBT),
        (201, NEW | {"error": "x"}, DOUBT),
        (201, NEW | {"escrow_id": "../x"}, DOUBT),
        (201, NEW | {"escrow_id": KEY}, DOUBT),
        (202, NEW, DOUBT),
        (204, b"", DOUBT),
        (201, HTML, DOUBT),
        (400, ERROR, AnswerKind.DECLINED),
        (400, HTML, DOUBT),
        (401, b"", AnswerKind.KEY_REFUSED),
        (402, ERROR, AnswerKind.EMPTY),
        (409, ERROR, AnswerKind.CONFLICT),
        (429, b"", AnswerKind.LIMITED),
        (500, NEW, DOUBT),
        (307, NEW, DOUBT),
    ],
)
def test_creation_that_is_not_certain_is_a_doubt(status, body, kind):
    """Only what names the escrow that was wanted is created; refusals have their kinds."""
    got = create(body, status)

    assert isinstance(got, CreateFailed)
    assert got.kind is kind
    assert KEY not in got.detail


REST = sandbox(released_amount="10.00", remaining="0.00", status="released", release="absent")
GONE = sandbox(refunded_amount="9.70", remaining="0.00", status="refunded", release="absent")


@pytest.mark.parametrize(
    ("body", "refund", "release"),
    [
        (GONE, OK, DOUBT),
        (REST, DOUBT, OK),
        ({"remaining": "0"}, OK, OK),
        ({"escrow": {"id": "esc_1", "remaining": 0}}, OK, OK),
        (SANDBOX, DOUBT, DOUBT),
        ({"success": True}, DOUBT, DOUBT),
        ({"status": "refunded"}, DOUBT, DOUBT),
        ({"remaining": "0", "status": "pending"}, DOUBT, DOUBT),
        ({"remaining": "0", "success": False}, DOUBT, DOUBT),
        ({"remaining": "0", "escrow_id": "esc_2"}, DOUBT, DOUBT),
        ({"remaining": "0", "released": "1", "released_total": "2"}, DOUBT, DOUBT),
        ({"remaining": "0.0000001"}, DOUBT, DOUBT),
        (b"", DOUBT, DOUBT),
    ],
    ids=range(13),
)
def test_rest_is_done_only_where_the_body_says_that_nothing_remains(body, refund, release):
    """A bare success is a doubt, and so is a rest that went the other way."""
    received = Received(200, {}, as_bytes(body))

    assert answer_to_refund_rest("esc_1", received, MASK, WALL).kind is refund
    assert answer_to_release_rest("esc_1", received, MASK, WALL).kind is release


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (409, AnswerKind.CONFLICT),
        (404, AnswerKind.MISSING),
        (503, DOUBT),
        (429, AnswerKind.LIMITED),
    ],
)
def test_refusal_of_a_rest_is_read_as_that_of_a_release(status, kind):
    """One table for all that pays; a wait is handed on."""
    received = Received(status, {"Retry-After": "3"}, as_bytes(ERROR))
    answer = answer_to_refund_rest("esc_1", received, MASK, WALL)

    assert (answer.kind, answer.retry_after) == (kind, 3.0 if status == 429 else None)


@pytest.mark.parametrize(
    "echo",
    [
        KEY,
        f"Bearer {KEY}",
        f"rejected header: Authorization: Bearer {KEY}!",
        f"key {KEY[:20]}... is unknown",
        f"no such key: ...{KEY[-14:]}",
        KEY.upper(),
        f"x{KEY}{KEY}y",
        "İ" * 3 + KEY,
        f"bearer\tabc {KEY}",
        "a" * 190 + KEY,
    ],
)
def test_key_that_the_service_echoes_is_masked(echo):
    """Neither the key nor a long part of it is in a detail, whatever call it came back from."""
    body = {"error": "internal", "message": echo}
    details = [
        ask(500, body).detail,
        ask(401, body).detail,
        ask(400, {"error": echo}).detail,
        str(read(body, 401)),
        str(read(sandbox(status=echo, to_agent_id=echo, currency=echo))),
        str(list_of({"escrows": [sandbox(memo=echo)]})),
    ]

    lowered, key = " ".join(details).lower(), KEY.lower()
    assert not [start for start in range(len(key) - 12) if key[start : start + 12] in lowered]
    assert "bearer a" not in lowered


def test_detail_is_short_and_printable():
    """What the service says cannot forge a line of a log or fill it."""
    detail = ask(400, {"error": "a\r\nb\x1b[31m\u202e\ud800", "message": "m" * 5000}).detail

    assert detail.isprintable()
    assert len(detail) <= EXCERPT_CHARS_MAX
    assert detail.startswith("400 a b [31m")


def test_mask_without_a_key_hides_nothing_else():
    """An empty key masks nothing, and a short one only itself."""
    assert Mask("").excerpt("as it is") == "as it is"
    assert Mask("abc").excerpt("xabcx ABC") == "x***x ***"


def test_error_is_told_from_what_is_none():
    """Only the documented form is an error."""
    assert error_text(Received(404, {}, as_bytes(ERROR))) == "some_code: some words"
    assert error_text(Received(404, {}, HTML)) is None


NAMES = st.sampled_from([*SANDBOX, "released", "gross_amount", "released_total", "error", "id"])
LEAVES = st.none() | st.booleans() | st.text(max_size=8) | st.integers() | st.floats(allow_nan=True)
VALUES = st.recursive(
    LEAVES | st.sampled_from(["0.10", "0.30", "9.70", "esc_1", 0.1, 0.3]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)
BODIES = st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode())


@given(st.integers(100, 999), BODIES, st.dictionaries(st.just("Retry-After"), st.text(max_size=30)))
def test_no_answer_raises(status, body, headers):
    """Whatever a service sends, it becomes a value."""
    received = Received(status, headers, body)

    assert isinstance(answer_to_release(RELEASE, received, MASK, WALL), Answer)
    assert isinstance(answer_to_read(received, MASK, 0.0, WALL), Reading | Unread)
    assert isinstance(answer_to_list(received, MASK, 0.0, WALL), Page | Unread)
    created = answer_to_create(WANTED, received, MASK, 0.0, WALL)
    assert isinstance(created, Created | CreateFailed)
    assert isinstance(answer_to_refund_rest("esc_1", received, MASK, WALL), Answer)
    assert isinstance(answer_to_release_rest("esc_1", received, MASK, WALL), Answer)


@given(VALUES)
def test_confirmation_names_a_figure_and_never_another_amount(value):
    """A confirmation has an amount or a total, and the amount is the one that was asked."""
    answer = ask(200, value)

    if answer.kind is OK:
        assert answer.amount in (None, RELEASE.amount)
        assert answer.amount is not None or answer.released is not None


@pytest.mark.parametrize(
    "body",
    [
        b"[" * BODY_BYTES_MAX,
        b'"' + b'\\"' * (BODY_BYTES_MAX // 2 - 1),
        b'{"a":"' + b"\\" * (BODY_BYTES_MAX - 6),
        b"{" + b",".join(b'"k%d":1' % n for n in range(6000)) + b"}",
        b"9" * BODY_BYTES_MAX,
        b'{"error":"' + b"pf_live_" * 8000 + b'"}',
    ],
)
@pytest.mark.timeout(20)
def test_hostile_answer_is_read_in_one_pass(body):
    """Nothing in a body makes reading it slower than its length deserves."""
    kinds = {AnswerKind.DOUBT, AnswerKind.DECLINED}

    assert ask(400, body[:BODY_BYTES_MAX]).kind in kinds
