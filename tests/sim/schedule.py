"""One thread, one virtual clock, one dice: who runs next, and when.

Blocking code of the daemon runs in fibers (greenlets), its coroutines on a loop of their own per host. Both give way
only where the world makes them wait, and then the seed says who goes on. Nothing here reads a real clock.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import hashlib
import heapq
import itertools
import random
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import greenlet

# So many steps without an end mean that somebody spins.
STEPS_MAX = 2_000_000


class Killed(BaseException):
    """The process that this code runs in has ended."""


class Trace:
    """What happened, in order: always a digest, and the lines themselves if somebody reads them."""

    def __init__(self, keep: Callable[[str], None] | None = None) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self._keep = keep
        self.events = 0

    def note(self, at_us: int, who: str, what: str) -> None:
        self.events += 1
        line = f"{at_us / 1e6:11.6f} {who:<8} {what}"
        self._digest.update(line.encode() + b"\n")
        if self._keep is not None:
            self._keep(line)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


class Fiber:
    """Blocking code that runs until it waits. Its owner is a host: with it, it freezes and dies."""

    __slots__ = ("_greenlet", "host", "label", "turn", "value", "waits")

    def __init__(self, host: Host, label: str, work: Callable[[], object]) -> None:
        self.host = host
        self.label = label
        self.turn = 0
        self.waits = False
        self.value: Any = None

        def run() -> None:
            try:
                work()
            except Killed:
                pass
            except Exception as error:
                host.schedule.defect(host, f"{label} ended by {type(error).__name__}: {error}", error)
            finally:
                host.fibers.pop(self, None)

        self._greenlet = greenlet.greenlet(run, parent=host.schedule.hub)
        self._greenlet.gr_context = contextvars.Context()

    def run(self) -> None:
        schedule = self.host.schedule
        schedule.current = self
        self._greenlet.switch()
        schedule.current = None

    def kill(self) -> None:
        """Unwind it here and now. Whatever it tries to do to the world on its way is refused."""
        if not self._greenlet:
            # Not begun, or over.
            self.host.fibers.pop(self, None)
            return
        schedule = self.host.schedule
        schedule.current = self
        self._greenlet.throw(Killed())
        schedule.current = None


class Host:
    """A process and the machine under it: its fibers, its loop, its clocks. `kill` ends it for good."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        self.schedule = schedule
        self.name = name
        self.alive = True
        self.frozen = False
        self.disk_name = ""
        self.fibers: dict[Fiber, None] = {}
        self._parked: list[Fiber | Loop] = []
        # Clocks: boot = offset + rate * now; the wall clock is the boot clock and what administrators did to it.
        self.clock_rate = 1.0
        self.boot_offset_us = 0
        self.wall_offset_us = 0
        self.loop = Loop(self)

    def boot_us(self) -> int:
        return self.boot_offset_us + int(self.schedule.now_us * self.clock_rate)

    def boot_ms(self) -> int:
        return self.boot_us() // 1000

    def wall_ms(self) -> int:
        return (self.boot_us() + self.wall_offset_us) // 1000

    def at_boot_us(self, boot_us: float) -> int:
        """The world's time at which this host's boot clock shows so much."""
        return max(self.schedule.now_us, int((boot_us - self.boot_offset_us) / self.clock_rate) + 1)

    def spawn(self, label: str, work: Callable[[], object]) -> None:
        if not self.alive:
            return
        fiber = Fiber(self, label, work)
        self.fibers[fiber] = None
        self.ready(fiber)

    def ready(self, runnable: Fiber | Loop) -> None:
        if not self.alive:
            return
        if self.frozen:
            self._parked.append(runnable)
        else:
            self.schedule.runnable.append(runnable)

    def freeze(self) -> None:
        self.frozen = True
        schedule = self.schedule
        self._parked += [runnable for runnable in schedule.runnable if runnable.host is self]
        schedule.runnable = [runnable for runnable in schedule.runnable if runnable.host is not self]

    def thaw(self) -> None:
        self.frozen = False
        self.schedule.runnable += self._parked
        self._parked = []

    def kill(self) -> None:
        """The process is gone: no line of its code runs any more that anybody could notice."""
        assert self.schedule.current is None, "only the world ends a process"
        self.alive = self.frozen = False
        self._parked = []
        self.schedule.runnable = [runnable for runnable in self.schedule.runnable if runnable.host is not self]
        while self.fibers:
            next(iter(self.fibers)).kill()
        self.loop.kill()


class _Future(asyncio.Future[Any]):
    """A future whose place in a set is the same in every run."""

    def __init__(self, *, loop: Any) -> None:
        self.number = next(loop.host.schedule.numbers)
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number


class _Task(asyncio.Task[Any]):
    def __init__(self, work: Coroutine[Any, Any, Any], *, loop: Any, name: str | None = None) -> None:
        self.number = next(loop.host.schedule.numbers)
        super().__init__(work, loop=loop, name=name or "task")

    def __hash__(self) -> int:
        return self.number


class Loop(asyncio.AbstractEventLoop):
    """A host's asyncio loop on virtual time. One callback at a time; between two, anybody else may run."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._ready: deque[asyncio.Handle] = deque()
        self._queued = False
        self._closed = False
        self._tasks: dict[_Task, None] = {}

    def time(self) -> float:
        return self.host.boot_us() / 1e6

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self._closed

    def is_closed(self) -> bool:
        return self._closed

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._add(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.host.schedule.at(self.host.at_boot_us(when * 1e6), lambda: self._add(handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def create_future(self) -> Any:
        return _Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        task = _Task(coro, loop=self, name=name)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        return asyncio.wrap_future(executor.submit(func, *args), loop=self)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # What a garbage collector tells comes at any time, and would make two runs differ.
        if self.host.alive and "handle" in context:
            self.host.schedule.defect(self.host, f"a callback ended by {type(error).__name__}: {error}", error)

    def _add(self, handle: asyncio.Handle) -> None:
        if self._closed or handle.cancelled():
            return
        self._ready.append(handle)
        if not self._queued:
            self._queued = True
            self.host.ready(self)

    def run(self) -> None:
        self._run_one()
        self._queued = bool(self._ready)
        if self._queued:
            self.host.ready(self)

    def _run_one(self) -> None:
        handle = self._ready.popleft()
        if handle.cancelled():
            return
        events._set_running_loop(self)
        try:
            handle._run()
        finally:
            events._set_running_loop(None)

    def kill(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for _ in range(100_000):
            if not self._ready:
                break
            self._run_one()
        self._closed = True
        self._ready.clear()
        self._tasks.clear()


class Schedule:
    """The world's clock and dice; `run` until a condition holds."""

    def __init__(self, rng: random.Random, trace: Trace) -> None:
        self.rng = rng
        self.trace = trace
        self.now_us = 0
        self.hub = greenlet.getcurrent()
        self.current: Fiber | None = None
        self.runnable: list[Fiber | Loop] = []
        self._timers: list[tuple[int, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self.numbers = itertools.count(1)
        self.steps = 0
        self.defects: list[str] = []

    def note(self, who: str, what: str) -> None:
        self.trace.note(self.now_us, who, what)

    def defect(self, host: Host, what: str, error: BaseException | None) -> None:
        """Code of the daemon failed for a reason that nobody foresaw."""
        where = ""
        frame = error.__traceback__ if error is not None else None
        while frame is not None:
            where = f" ({frame.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.tb_lineno})"
            frame = frame.tb_next
        self.note(host.name, f"DEFECT {what}{where}")
        self.defects.append(f"{host.name}: {what}{where}")

    def at(self, at_us: int, work: Callable[[], object]) -> None:
        """Do something at a time, on nobody's behalf: no host can stop it."""
        heapq.heappush(self._timers, (at_us, next(self._order), work))

    def after(self, delay_us: int, work: Callable[[], object]) -> None:
        self.at(self.now_us + delay_us, work)

    def run(self, done: Callable[[], bool], until_us: int) -> bool:
        """Go on until the condition holds; False if the time came first."""
        rng, timers = self.rng, self._timers
        while not done():
            self.steps += 1
            if self.steps > STEPS_MAX:
                raise RuntimeError(f"the world spins: {self.steps} steps by {self.now_us / 1e6:.3f} s")
            runnable = self.runnable
            if runnable:
                index = int(rng.random() * len(runnable)) if len(runnable) > 1 else 0
                runnable[index], runnable[-1] = runnable[-1], runnable[index]
                runnable.pop().run()
                continue
            if not timers or timers[0][0] > until_us:
                self.now_us = max(self.now_us, until_us)
                return False
            at_us, _, work = heapq.heappop(timers)
            self.now_us = max(self.now_us, at_us)
            work()
        return True

    # What fibers do ---------------------------------------------------------------------------------------------------

    def arm(self) -> tuple[Fiber, int]:
        """The fiber that runs, and the number of the wait that it is about to begin."""
        fiber = self.current
        if fiber is None:
            raise RuntimeError("only blocking code may wait here, and it must not run on a loop")
        if not fiber.host.alive:
            raise Killed
        fiber.turn += 1
        fiber.waits = True
        return fiber, fiber.turn

    def park(self) -> Any:
        """Wait until somebody wakes this fiber; what they hand over."""
        fiber = self.current
        assert fiber is not None
        self.hub.switch()
        if not fiber.host.alive:
            raise Killed
        value, fiber.value = fiber.value, None
        return value

    def wake(self, fiber: Fiber, turn: int, value: Any = None) -> None:
        """Let a fiber go on, if it still waits for this."""
        if fiber.waits and fiber.turn == turn and fiber.host.alive:
            fiber.waits = False
            fiber.value = value
            fiber.host.ready(fiber)

    def sleep_us(self, delay_us: int) -> None:
        fiber, turn = self.arm()
        self.after(delay_us, lambda: self.wake(fiber, turn))
        self.park()

    def sleep(self, seconds: float) -> None:
        """What the daemon's `wait` is here: by the host's own clock."""
        fiber, turn = self.arm()
        host = fiber.host
        self.at(host.at_boot_us(host.boot_us() + seconds * 1e6), lambda: self.wake(fiber, turn))
        self.park()


class FiberFuture(concurrent.futures.Future[Any]):
    """A future that a fiber may wait for."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self._schedule = schedule

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            fiber, turn = self._schedule.arm()
            self.add_done_callback(lambda _: self._schedule.wake(fiber, turn))
            self._schedule.park()
        return super().result(0)


class FiberPool(concurrent.futures.Executor):
    """Threads, as far as the daemon can tell."""

    def __init__(self, host: Host, label: str, width: int) -> None:
        self._host = host
        self._label = label
        self._width = width
        self._running = 0
        self._queue: deque[tuple[FiberFuture, Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        future = FiberFuture(self._host.schedule)
        self._queue.append((future, lambda: fn(*args, **kwargs)))
        if self._running < self._width:
            self._running += 1
            self._host.spawn(self._label, self._work)
        return future

    def _work(self) -> None:
        while self._queue:
            future, work = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except Killed:
                raise
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        self._running -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Its work ends with its host."""
