"""An event loop without time: when nothing is ready, the clock goes on to the next timer.

Each step runs one callback of those that are ready, chosen by the seed, so that whatever asyncio
does not promise about order is tried. Callbacks belong to the world or to one life of the daemon: a
life can end at any of its steps, and then nothing of it ever runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import random
from collections.abc import Callable
from typing import Any

STEP_S = 1e-7  # A step takes time, so that a timer that is nearly due comes to be due.
STILL_MAX = 20_000  # Steps at one moment: more than any work here takes.


class Deadlock(Exception):
    """Nothing is ready and no timer is set, or the same is done again and again without time."""


class Life:
    """One process of the daemon, from its start to its end. `dead`: nothing of it runs any more."""

    def __init__(self) -> None:
        self.dead = False
        self.tasks: list[asyncio.Task[Any]] = []
        self.context = contextvars.copy_context()
        self.context.run(LIFE.set, self)


LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("life", default=None)
WORLD = contextvars.Context()  # For what goes on when the daemon dies: the network, the brokers.


class _Numbered:
    """Tasks and futures stand in sets here and there: let their order be that of their making."""

    _loop: SimLoop
    _number: int

    def __hash__(self) -> int:
        return self._number


class SimTask(_Numbered, asyncio.Task[Any]):
    """A task whose hash does not depend on where it lies in memory."""


class SimFuture(_Numbered, asyncio.Future[Any]):
    """A future whose hash does not depend on where it lies in memory."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module. `crash_in` counts the daemon's steps down; at 0 `on_crash` is called."""

    def __init__(self, seed: str) -> None:
        super().__init__()
        self.now = 0.0
        self.steps = 0
        self._still = 0  # Steps since the time last went on.
        self.crash_in = -1
        self.on_crash: Callable[[], None] = lambda: None
        self.failure: BaseException | None = None
        self._choice = random.Random(seed)
        self._numbers = 0
        self.set_exception_handler(self._unexpected)

    # -- What asyncio asks of a loop ---------------------------------------------------------------

    def time(self) -> float:
        return self.now

    def _process_events(self, event_list: object) -> None:
        """There are none: nothing comes from outside."""

    def _write_to_self(self) -> None:
        """There is no other thread to be woken by."""

    def create_future(self) -> SimFuture:
        self._numbers += 1
        future = SimFuture.__new__(SimFuture)
        future._number = self._numbers
        future.__init__(loop=self)  # type: ignore[misc]  # The number must be there first.
        return future

    def create_task(self, coro: Any, *, name: object = None, context: Any = None) -> SimTask:
        self._numbers += 1
        task = SimTask.__new__(SimTask)
        task._number = self._numbers
        task.__init__(coro, loop=self, name=name, context=context)  # type: ignore[misc]
        life = (context or contextvars.copy_context()).get(LIFE)
        if life is not None:
            life.tasks.append(task)
        return task

    def _run_once(self) -> None:  # noqa: C901  # One step, in order.
        """Run one callback, or let the time go on."""
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        if not ready and scheduled:
            self.now = max(self.now, scheduled[0]._when)
            self._still = 0
        while scheduled and scheduled[0]._when <= self.now:
            ready.append(heapq.heappop(scheduled))
        if not ready:
            raise Deadlock
        if len(ready) > 1:
            place = self._choice.randrange(len(ready))
            ready[0], ready[place] = ready[place], ready[0]
        handle = ready.popleft()
        if handle._cancelled:
            return
        life = handle._context.get(LIFE)
        if life is not None:
            if life.dead:
                return
            self.crash_in -= 1
            if self.crash_in == 0:
                WORLD.run(self.on_crash)
                return
        self.steps += 1
        self.now += STEP_S
        self._still += 1
        if self._still > STILL_MAX:
            raise Deadlock(f"it turns in circles: {handle}")
        handle._run()
        if self.failure is not None:
            raise self.failure

    # -- Ends --------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """End the run with this, the first time it is called, once the present step is over."""
        self.failure = self.failure or error

    def bury(self, life: Life) -> None:
        """Take apart what a dead life left, without letting any of it reach the world."""
        assert life.dead
        for task in life.tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with contextlib.suppress(BaseException):
                    life.context.copy().run(task.get_coro().close)  # type: ignore[union-attr]
        life.tasks.clear()

    def _unexpected(self, _: object, context: dict[str, Any]) -> None:
        if "never retrieved" in str(context.get("message")):
            return  # Nobody is left to ask, or a cancelled reader did not look.
        error = context.get("exception")
        if error is not None and not isinstance(error, asyncio.CancelledError):
            self.fail(error)
