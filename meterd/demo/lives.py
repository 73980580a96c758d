"""Seven short lives: what happens to an agreement under each billing pattern's example.

Each story tells usage, and books beside it what that usage costs, from the example's own prices.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from typing import Any

from rich.console import Console

from meterd.demo.scene import Scene
from meterd.demo.stage import Stage


async def live(stage: Stage, console: Console, name: str, example: str, *, seconds: int) -> bool:
    """Live through one example; whether every figure agrees. Raises `MeterdError`."""
    renewed = name == "subscription"
    scene = Scene(stage, console, name, example, seconds=seconds, renewed=renewed)
    await scene.begin()
    await LIVES[name](scene)
    await scene.close()
    return await scene.prove()


async def _pay_per_call(scene: Scene) -> None:
    price = _price(scene)
    asked = [await scene.ask_gate("calls", 1, hold=True) for _ in range(7)]
    await scene.step("7 calls may be served: each is reserved before it is")
    await _capture(scene, [answer["hold"] for answer in asked[:6]], price)
    await scene.step("6 were served: captured, and less than the wallet's minimum")
    await scene.end_hold(asked[6]["hold"], "void")
    await scene.step("1 failed: its hold is given back and costs nothing")
    more = [(await scene.ask_gate("calls", 1, hold=True))["hold"] for _ in range(4)]
    await _capture(scene, more, price)
    await scene.step("4 more make ten: gathered, they are worth a debit")
    await scene.count("calls", 12)
    scene.expected += 12 * price
    await scene.step("12 calls without a hold, told afterwards")


async def _capture(scene: Scene, holds: list[str], price: Decimal) -> None:
    for hold in holds:
        await scene.end_hold(hold, "capture")
        scene.note("calls", 1)
        scene.expected += price


async def _pay_per_token(scene: Scene) -> None:
    for kind, tokens in (("input", 42_000), ("cached", 150_000), ("output", 21_500)):
        await _tokens(scene, tokens, model="m-large", kind=kind)
    await scene.step("a long document: 42,000 input, 150,000 cached, 21,500 output")
    await _tokens(scene, 12_345, model="m-large", kind="reasoning")
    await scene.step("12,345 tokens of reasoning pass the threshold of 0.50")
    await _tokens(scene, 7_777, model="m-small", kind="output")
    await scene.step("7,777 tokens of a small model: the last rate prices them")
    lost = await _tokens(scene, 30_000, model="m-large", kind="output")
    await scene.step("30,000 tokens of an answer that the customer never got")
    await scene.send({"type": "meterd.void", "voids": lost})
    used = scene.usage[-1].pop()
    scene.expected -= _token_price(scene, used)
    await scene.step("that event is taken back; what was paid for it counts for later")
    await _tokens(scene, 100_001, model="m-large", kind="input")
    await scene.step("100,001 input tokens: the credit is used up first")


async def _tokens(scene: Scene, tokens: int, **dimensions: str) -> str:
    event = await scene.use("tokens", tokens, **dimensions)
    scene.expected += _token_price(scene, scene.usage[-1][-1])
    return event


def _token_price(scene: Scene, used: Mapping[str, Any]) -> Decimal:
    """The first rate whose `where` matches counts."""
    for rate in scene.plan["rates"]:
        if rate.get("where", {}).items() <= used["dimensions"].items():
            return Decimal(rate["price"]) * int(used["quantity"]) / int(rate.get("per", 1))
    raise AssertionError("the last rate matches everything")


async def _subscription(scene: Scene) -> None:
    fee, quota = Decimal(scene.plan["fee"]), scene.plan["quota"]["units"]
    await scene.count("requests", quota - 400)
    await scene.step(f"{quota - 400} requests cost nothing and count against the quota")
    await scene.count("requests", 400)
    answer = await scene.ask_gate("requests", 1)
    said = "yes" if answer["allowed"] else "no, the quota is used up"
    await scene.step(f"400 more; may another one be served? {said}")
    await scene.bind_next("main", await scene.lock("main"))
    scene.expected += fee
    scene.usage.append([])
    await scene.until(scene.owes_it, "the week does not end")
    await scene.step("the week is over: its fee is due and released; the next begins")
    answer = await scene.ask_gate("requests", 1)
    await scene.count("requests", 250)
    said = "allowed" if answer["allowed"] else "refused"
    await scene.step(f"a new quota: the first request is {said}, 250 are made")


async def _milestone(scene: Scene) -> None:
    amounts = {entry["name"]: Decimal(entry["amount"]) for entry in scene.plan["tranches"]}
    for number, (name, amount) in enumerate(amounts.items()):
        await scene.send({"type": "meterd.milestone", "name": name})
        scene.note("meterd.milestone", 1, name=name)
        scene.expected += amount
        await scene.step(f"milestone {name} is reached")
        if number == 0:
            answer = await scene.send({"type": "meterd.milestone", "name": name})
            reason = answer["rejected"][0]["reason"]
            await scene.step(f"milestone {name} once more, under another id: {reason}")


async def _streaming(scene: Scene) -> None:
    price = _price(scene)

    async def use(units: int, text: str) -> None:
        await scene.use("units", units)
        scene.expected += units * price
        await scene.step(text)

    await use(60, "60 units: less than a batch of 100, nothing is paid")
    await use(90, "90 more: a batch is full")
    await use(75, "75 units, which wait for the next batch")
    await scene.stage.daemon.kill()
    await scene.stage.restart_daemon()
    await scene.step("meterd is killed with SIGKILL and started again")
    await use(130, "130 units: what waited is still known")
    await use(17, "17 units, and the stream ends")


async def _performance(scene: Scene) -> None:
    score = Decimal("0.83")
    await scene.step("the task is given; the deposit waits for its score")
    await scene.send({"type": "meterd.outcome", "score": str(score)})
    scene.note("meterd.outcome", str(score))
    earned = [
        Decimal(step["share"]) for step in scene.plan["steps"] if Decimal(step["score"]) <= score
    ]
    scene.expected += max(earned, default=Decimal(0)) * Decimal(scene.plan["deposit"])
    await scene.step(f"the evaluator's score is {score}, which earns {max(earned)} of it")
    answer = await scene.send({"type": "meterd.outcome", "score": "1"})
    await scene.step(f"a second, better score is rejected: {answer['rejected'][0]['reason']}")


async def _hybrid(scene: Scene) -> None:
    price = _price(scene)
    free, used = scene.plan["rates"][0]["free_units"], 0

    async def use(units: int) -> None:
        nonlocal used
        before, used = used, used + units
        await scene.use("units", units)
        scene.expected += price * (max(0, used - free) - max(0, before - free))

    await use(free - 50)
    await scene.step(f"{free - 50} units are covered by the fee")
    await use(120)
    await scene.step("120 units, 50 of them covered: 70 are charged, from the overage")
    answer = await scene.ask_gate("units", 1000)
    said = "allowed" if answer["allowed"] else "refused"
    await scene.step(f"a job of 1,000 units would pass the overage's budget: {said}")
    await use(200)
    await scene.step("200 units more, all beyond the quota")


def _price(scene: Scene) -> Decimal:
    """The price of the plan's one rate."""
    return Decimal(scene.plan["rates"][0]["price"])


LIVES: Mapping[str, Callable[[Scene], Awaitable[None]]] = {
    "pay_per_call": _pay_per_call,
    "pay_per_token": _pay_per_token,
    "subscription": _subscription,
    "milestone": _milestone,
    "streaming": _streaming,
    "performance": _performance,
    "hybrid": _hybrid,
}
