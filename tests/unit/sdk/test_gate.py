"""The gate's clients against a meterd that fails on cue; both of them, by the same tests."""

from __future__ import annotations

import asyncio
import inspect
import ssl
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest

from meterd.sdk import (
    AsyncGate,
    BadUsage,
    Denied,
    Gate,
    Meter,
    NotAnswered,
    Unreachable,
)
from tests.certificates import authority, signed
from tests.processes import free_port


class Asked:
    """A gate that waits, as one that is awaited."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def authorize(self, *args: Any, **named: Any) -> Any:
        return await asyncio.to_thread(self._gate.authorize, *args, **named)

    async def capture(self, *args: Any) -> None:
        await asyncio.to_thread(self._gate.capture, *args)

    @asynccontextmanager
    async def hold(self, *args: Any, **named: Any) -> Any:
        with self._gate.hold(*args, **named) as hold:
            yield hold

    async def aclose(self) -> None:
        self._gate.close()


@pytest.fixture(params=["waits", "awaited"])
async def make(request):
    """Make a gate of either sort."""
    made: list[Any] = []

    def make(url: str, **options: Any) -> Any:
        sort = AsyncGate if request.param == "awaited" else lambda *a, **o: Asked(Gate(*a, **o))
        made.append(sort(url, **options))
        return made[-1]

    yield make
    for gate in made:
        await gate.aclose()


async def done(result: Any) -> Any:
    """Await what is to be awaited."""
    return await result if inspect.isawaitable(result) else result


async def test_gate_says_yes_or_no_with_exact_figures(make, meterd):
    """A no is an answer and no error; nobody has no agreement."""
    gate = make(meterd.url)
    yes = await gate.authorize("c-1", "tokens", 10, {"kind": "output"})
    no = await gate.authorize("c-1", "tokens", "10.5")
    nobody = await gate.authorize("nobody", "tokens")

    assert (yes.allowed, yes.headroom, yes.needed, yes.hold) == (True, Decimal(10), Decimal(1), "")
    assert (no.allowed, no.asked, no.reason) == (False, True, "the headroom is too small")
    assert (nobody.allowed, nobody.reason) == (False, "there is no agreement 'nobody'")
    assert meterd.asked[0][2]["dimensions"] == {"kind": "output"}


@pytest.mark.parametrize("lost", ["lose", (503, {}), (500, {})])
async def test_question_that_was_lost_is_asked_again_with_its_key_and_makes_one_hold(
    make, meterd, lost
):
    """Whether or not the first one made it."""
    meterd.script.append(lost)
    verdict = await make(meterd.url).authorize("c-1", "tokens", hold=60)

    assert verdict.allowed
    assert list(meterd.holds) == [verdict.hold]
    assert len({headers["Idempotency-Key"] for _, headers, _ in meterd.asked}) == 1


@pytest.mark.parametrize("policy", ["allow", "deny"])
async def test_policy_answers_where_meterd_does_not(make, meterd, policy):
    """Nobody there, no answer in time, an answer that is none."""
    away = make(f"http://127.0.0.1:{free_port()}", on_unreachable=policy, timeout_s=0.5)
    here = make(meterd.url, on_unreachable=policy)
    meterd.script += [(503, {}), (503, {})]
    for gate in (away, here):
        verdict = await gate.authorize("c-1", "tokens")
        assert (verdict.allowed, verdict.asked) == (policy == "allow", False)
        assert "did not answer" in verdict.reason


@pytest.mark.parametrize("status", [400, 401, 403, 422])
async def test_question_that_is_refused_for_itself_is_an_error(make, meterd, status):
    """No policy hides a wrong token."""
    meterd.script.append((status, {}))
    with pytest.raises(NotAnswered) as caught:
        await make(meterd.url, on_unreachable="allow").authorize("c-1", "tokens")

    assert caught.value.status == status


async def test_hold_is_captured_with_what_was_used(make, meterd):
    """By a call where there is no meter; left alone, as it was asked for; 0 is a void."""
    gate = make(meterd.url)
    async with gate.hold("c-1", "tokens", 10) as hold:
        await done(hold.capture(7))
        with pytest.raises(BadUsage, match="before"):
            await done(hold.void())
    async with gate.hold("c-1", "tokens", 10):
        pass
    async with gate.hold("c-1", "tokens", 10) as hold:
        await done(hold.capture(0))

    assert list(meterd.holds.values()) == ["capture:7", "capture:all", "void:all"]


async def test_hold_is_voided_when_its_work_fails(make, meterd):
    """And the failure goes on."""
    with pytest.raises(ValueError, match="broken"):
        async with make(meterd.url).hold("c-1", "tokens", 10):
            raise ValueError("broken")

    assert list(meterd.holds.values()) == ["void:all"]


async def test_work_that_is_denied_is_not_begun(make, meterd):
    """The verdict goes with the error."""
    with pytest.raises(Denied) as caught:
        async with make(meterd.url).hold("c-1", "tokens", 11):
            raise AssertionError

    assert caught.value.verdict.headroom == Decimal(10)


async def test_capture_by_a_meter_waits_for_nobody(make, meterd):
    """It is an event that names the hold, under the hold's own id."""
    with Meter(meterd.url) as meter:
        gate = make(meterd.url, meter=meter)
        async with gate.hold("c-1", "tokens", 10, {"kind": "output"}) as hold:
            await done(hold.capture("7.5"))
        assert await asyncio.to_thread(meter.flush)

    (event,) = meterd.events.values()
    assert (event["id"], event["hold"], event["quantity"]) == (hold.id, hold.id, "7.5")
    assert event["dimensions"] == {"kind": "output"}


async def test_work_that_was_allowed_without_meterd_is_told_to_the_meter(make, meterd):
    """There is no hold then; without a meter the program must know."""
    away = f"http://127.0.0.1:{free_port()}"
    with Meter(meterd.url) as meter:
        async with make(away, meter=meter, on_unreachable="allow", timeout_s=0.2).hold(
            "c-1", "tokens", 10
        ) as hold:
            assert hold.id == ""
        assert await asyncio.to_thread(meter.flush)
    with pytest.raises(Unreachable, match="no hold to capture"):
        async with make(away, on_unreachable="allow", timeout_s=0.2).hold("c-1", "tokens"):
            pass

    assert [(one["quantity"], "hold" in one) for one in meterd.events.values()] == [("10", False)]


async def test_capture_of_a_hold_that_is_gone_is_an_error(make, meterd):
    """Its usage would be lost without a word."""
    with pytest.raises(NotAnswered):
        await make(meterd.url).capture("hold_9", 1)


async def test_many_ask_at_once_over_few_connections(make, meterd):
    """They wait for each other, and all are answered."""
    gate = make(meterd.url, connections=2, timeout_s=10)
    verdicts = await asyncio.gather(*(gate.authorize("c-1", "tokens") for _ in range(40)))

    assert all(verdict.allowed and verdict.asked for verdict in verdicts)


@pytest.mark.parametrize(
    "bad", [{"quantity": 0}, {"quantity": 0.5}, {"hold": 0}, {"hold": 86_401}, {"hold": 1.5}]
)
async def test_question_that_cannot_be_meant_is_not_sent(make, meterd, bad):
    """The program is to be corrected."""
    with pytest.raises(BadUsage):
        await make(meterd.url).authorize("c-1", "tokens", **bad)

    assert meterd.asked == []


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((200, {}, b"<html>"), Unreachable),
        ((200, {}, b"{}"), Unreachable),
        (
            (200, {}, b'{"accepted": 0, "rejected": [{"reason": "closed"}]}'),
            NotAnswered,
        ),
        ((503, {}, b""), Unreachable),
        ((200, {}, b'{"accepted": 1, "duplicates": 0, "rejected": []}'), None),
    ],
)
async def test_capture_is_done_when_meterd_says_so_and_not_before(
    make, meterd, monkeypatch, answer, error
):
    """A page of a proxy captures nothing, and a rejected usage is no usage."""
    monkeypatch.setattr(meterd, "answer", lambda *_: answer)
    gate = make(meterd.url)
    if error is None:
        await gate.capture("hold_1")
    else:
        with pytest.raises(error):
            await gate.capture("hold_1")


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"allowed": true, "needed": "much"}', b'{"allowed": 1}']
)
async def test_answer_that_is_not_meterds_allows_nothing(make, meterd, monkeypatch, body):
    """A proxy that says 200 to everything is no gate."""
    monkeypatch.setattr(meterd, "answer", lambda *_: (200, {}, body))
    verdict = await make(meterd.url).authorize("c-1", "tokens")

    assert (verdict.allowed, verdict.asked) == (False, False)


async def test_gate_and_meter_speak_tls_with_an_authority_of_ones_own(make, meterd, tmp_path):
    """And with nobody else's."""
    ca = authority(tmp_path)
    pair = signed(tmp_path, ca, "server", "IP:127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    meterd.server.socket = context.wrap_socket(meterd.server.socket, server_side=True)
    meterd.server.handle_error = lambda *_: None  # Who does not trust it goes away.
    url = meterd.url.replace("http:", "https:")
    own = ssl.create_default_context(cafile=str(ca.cert))

    assert (await make(url, token="secret", tls=own).authorize("c-1", "tokens")).asked
    assert not (await make(url, token="secret").authorize("c-1", "tokens")).asked
    with Meter(url, "secret", tls=own) as meter:
        meter.emit("c-1", "tokens")
        assert await asyncio.to_thread(meter.flush)
    assert len(meterd.events) == 1


@pytest.mark.parametrize(
    "bad", [{"on_unreachable": "maybe"}, {"timeout_s": 0}, {"connections": 0}, {"url": "x"}]
)
async def test_gate_that_cannot_be_meant_is_refused_at_once(make, meterd, bad):
    """Before the first customer comes."""
    with pytest.raises(BadUsage):
        make(**{"url": meterd.url, **bad})
