"""Where the time of a resume and of an append goes: `python -m bench.where [resume|append]`, on real tiers, no gRPC.

It measures CPU, not waiting: steps by calling them alone, warm (again and again) and cold (after a pause, when caches
and branch predictors have forgotten; a daemon's call is nearer to that). Cold steps do not add up: each pays alone for
what they share. cProfile's own cost inflates small functions, so that it only says where to look. Nothing here is
compared with another side.
"""

from __future__ import annotations

import asyncio
import cProfile
import itertools
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bench import inside, talk, wire
from sessiond import core
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.service import context as contexts
from sessiond.service.ownership import Call, Parts
from sessiond.service.sessions import Sessions
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Transaction
from sessiond.tiers.hot.rows import encode_head
from sessiond.tokens import CONTEXT_TOKENS
from sessiond.transport.server import TENANT, _resume
from sessiond.transport.wire import parse, reply
from sessiond.v1 import context_pb2, session_pb2, turn_pb2

SESSION = "profiled"
TURNS = 1000
# How often a step is called; a quick run only sees that it works.
QUICK = "--quick" in sys.argv
CALLS = 50 if QUICK else 4000
# Long enough that the core has done other things: in the daemon that is the normal case between two calls.
PAUSE_S = 0.002
COLD_CALLS = 5 if QUICK else 400
BLOCKS = 1 if QUICK else 30
PROFILED_CALLS = 50 if QUICK else 2000
PROFILE_ROWS = 28


Cost = tuple[float, float]


def cost_us(step: Callable[[], object]) -> Cost:
    """CPU microseconds of a step: (again and again, after a pause in which the core did other things)."""

    async def again() -> object:
        return step()

    return asyncio.run(cost_us_async(again))


async def cost_us_async(step: Callable[[], Awaitable[object]]) -> Cost:
    """The same for a coroutine; CPU of the loop's thread. Medians."""
    empty: list[float] = []
    warm: list[float] = []
    cold: list[float] = []

    async def nothing() -> None:
        return None

    for each, work, pause_s, count in (
        (empty, nothing, 0.0, CALLS),
        (warm, step, 0.0, CALLS),
        (cold, step, PAUSE_S, COLD_CALLS),
    ):
        for _ in range(count):
            if pause_s:
                # Nothing else is on this loop, and the core shall do other things.
                time.sleep(pause_s)  # noqa: ASYNC251
            started = time.thread_time_ns()
            await work()
            each.append((time.thread_time_ns() - started) / 1000)
    none = statistics.median(empty)
    return max(0.0, statistics.median(warm) - none), max(0.0, statistics.median(cold) - none)


def table(title: str, rows: list[tuple[str, Cost]]) -> None:
    print(f"\n{title}\n  warm us  cold us")
    for name, (warm, cold) in rows:
        print(f"  {warm:7.1f}  {cold:7.1f}  {name}")


def profile(title: str, work: Callable[[], Awaitable[object]], calls: int) -> None:
    """cProfile of so many calls, by own time."""

    async def run() -> None:
        for _ in range(calls):
            await work()

    profiler = cProfile.Profile(time.thread_time)
    loop = asyncio.new_event_loop()
    profiler.enable()
    loop.run_until_complete(run())
    profiler.disable()
    loop.close()
    print(f"\n{title}: cProfile, {calls} calls, own time")
    stats: Any = pstats.Stats(profiler).strip_dirs()
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:PROFILE_ROWS]
    for (file, number, name), (_, count, own, whole, _) in rows:
        where = name if file == "~" else f"{file}:{number}({name})"
        print(
            f"  {own / calls * 1e6:7.1f} us own  {whole / calls * 1e6:7.1f} us in all  {count / calls:6.1f}x  {where}"
        )


def resume(sessions: Sessions, parts: Parts) -> None:
    """A hot resume, step by step."""
    raw = wire.resume_request(SESSION)
    call, request = Call(TENANT, None), session_pb2.ResumeSessionRequest.FromString(raw)
    h = rules.session_hash(parts.bucket.hash_key, TENANT, SESSION)
    hot_path = inside.hot_path(sessions, parts)
    served = _resume(sessions)
    answer = hot_path.resume(raw, TENANT)
    assert answer is not None, "the hot path has declined"

    async def whole() -> bytes | None:
        return hot_path.resume(raw, TENANT)

    async def general() -> bytes:
        return reply(await served(call, parse(session_pb2.ResumeSessionRequest, raw, 1 << 23)))

    with parts.hot.read() as transaction:
        head = log.read_head(transaction, h)
        assert head is not None
        state = states.decode(head.state)
        spec = hot_path._spec(request.context, head.policy)
        standing = contexts.Standing(
            context_pb2.RUNG_HOT, context_pb2.OWNERSHIP_CONFIRMED, parts.node.name, head.head_seq, head.cloud_seq
        )

        # A source is walked once.
        def source() -> contexts.HotSource:
            return contexts.HotSource(transaction, h, head)

        context = contexts.build(source(), h, state, spec, standing)
        exact = spec.budget - CONTEXT_TOKENS
        tail = exact - spec.budget // contexts.NEW_MESSAGE_SHARE
        fit = contexts._choose(source(), h, state, spec, tail, exact, 0, 0)

        def open_read() -> None:
            with parts.hot.read():
                pass

        steps = [
            ("the whole call, from request bytes to reply bytes", asyncio.run(cost_us_async(whole))),
            ("  parse the request", cost_us(lambda: session_pb2.ResumeSessionRequest.FromString(raw))),
            ("  session's hash", cost_us(lambda: rules.session_hash(parts.bucket.hash_key, TENANT, SESSION))),
            ("  open and close a read transaction", cost_us(open_read)),
            ("  read and decode the head row", cost_us(lambda: log.read_head(transaction, h))),
            (f"  decode the state ({len(head.state)} bytes)", cost_us(lambda: states.decode(head.state))),
            ("  find the spec, checked before", cost_us(lambda: hot_path._spec(request.context, head.policy))),
            ("  build the context", cost_us(lambda: contexts.build(source(), h, state, spec, standing))),
            ("    etag", cost_us(lambda: contexts._etag(state, spec, standing))),
            (
                f"    choose the window: walk the rows, fit, copy {len(fit[4]):,} bytes",
                cost_us(lambda: contexts._choose(source(), h, state, spec, tail, exact, 0, 0)),
            ),
            (
                f"      walk the rows for {exact:,} tokens (compiled)",
                cost_us(lambda: source().walk(state.last_live_seq, spec.slot, exact)),
            ),
            (f"  put {len(context):,} bytes into the reply", cost_us(lambda: core.encode_message((1, context)))),
            ("the same call by the general path", asyncio.run(cost_us_async(general))),
        ]
    table(f"hot resume, {TURNS:,} turns, budget 4,000", steps)
    profile("hot resume", whole, PROFILED_CALLS)


def append(sessions: Sessions, parts: Parts) -> None:
    """An EDGE append, step by step; the folder should be in memory, so that fsync costs nothing."""
    hot_path = inside.hot_path(sessions, parts)
    h = rules.session_hash(parts.bucket.hash_key, TENANT, SESSION)
    numbers = itertools.count(100_001)
    template = [wire.append_request(SESSION, talk.turn(number, supplied=False)) for number in (1, 2)]
    raws = [bytes(request.SerializeToString()) for request in template]
    at = raws[0].index(b"turn-") + len(b"turn-")

    def next_raw() -> bytes:
        number = next(numbers)
        raw = raws[(number + 1) % 2]
        return raw[:at] + b"%012d" % number + raw[at + 12 :]

    async def whole() -> bytes:
        answer = await hot_path.append(next_raw(), TENANT)
        assert answer is not None, "the hot path has declined"
        return answer

    turns = list(template[1].turns)

    def count(encoding: int) -> Callable[[], object]:
        return lambda: parts.tokenizer.count_message(turns[0].message, encoding)

    def in_the_log() -> tuple[float, float]:
        """(CPU us of the log's part, on the commit thread; CPU us around it: queue, wake-ups, begin, commit)."""
        inner: list[float] = []
        outer: list[float] = []
        for _ in range(PROFILED_CALLS):
            ready = hot_path.prepare(next_raw(), TENANT)
            assert ready is not None

            def operation(transaction: Transaction, ready: Any = ready) -> object:
                started = time.thread_time_ns()
                done = ready.operation(transaction)
                inner.append((time.thread_time_ns() - started) / 1000)
                return done

            started = time.process_time_ns()
            assert parts.hot.run_blocking(operation, ready.weight_bytes) is not None
            outer.append((time.process_time_ns() - started) / 1000)
        return statistics.median(inner), statistics.median(outer) - statistics.median(inner)

    async def whole_process() -> float:
        blocks = []
        for _ in range(BLOCKS):
            started = time.process_time_ns()
            for _ in range(100):
                await whole()
            blocks.append((time.process_time_ns() - started) / 100 / 1000)
        return statistics.median(blocks)

    ready = hot_path.prepare(next_raw(), TENANT)
    assert ready is not None
    done = parts.hot.run_blocking(ready.operation, ready.weight_bytes)
    assert done is not None
    with parts.hot.read() as transaction:
        head = log.read_head(transaction, h)
        assert head is not None
        held = states.decode(head.state).cursor
        chunks = log.id_chunks(transaction, h)
        asked = [rules.turn_id_hash(h, turns[0].turn_id)]
        id_steps = cost_us(
            lambda: core.seek_turn_ids(core.join_turn_ids(h, chunks, head.head_seq, log.TURN_IDS_MAX), asked)
        )
        head_step = cost_us(lambda: log.read_head(transaction, h))
    nan = float("nan")
    in_log, around = in_the_log()
    steps = [
        ("the whole call, from request bytes to reply bytes, all threads", (asyncio.run(whole_process()), nan)),
        ("  prepare: all that needs no lock", cost_us(lambda: hot_path.prepare(raws[0], TENANT))),
        ("    parse the request", cost_us(lambda: session_pb2.AppendTurnRequest.FromString(raws[0]))),
        ("    count o200k_base", cost_us(count(turn_pb2.ENCODING_O200K_BASE))),
        ("    count cl100k_base", cost_us(count(turn_pb2.ENCODING_CL100K_BASE))),
        ("  append in the log, inside the transaction", (in_log, nan)),
        ("    read and decode the head row", head_step),
        (f"    look for the turn id in {len(chunks)} rows (compiled)", id_steps),
        ("    encode the head row", cost_us(lambda: encode_head(h, head))),
        ("  queue, wake-ups, begin, commit", (around, nan)),
        ("  fill the reply", cost_us(lambda: hot_path.finish(ready, done))),
    ]
    table(f"append EDGE of {len(raws[0])} bytes to a session of {held:,} turns", steps)
    profile("append EDGE, the loop's thread", whole, PROFILED_CALLS)


def main() -> None:
    which = [name for name in sys.argv[1:] if name != "--quick"] or ["resume", "append"]
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(prefix="bench-where-", dir=memory if memory.is_dir() else None) as name,
        inside.running(Path(name), flushes=False) as (sessions, parts),
    ):

        async def populate() -> None:
            await sessions.create(Call(TENANT, None), session_pb2.CreateSessionRequest(session_id=SESSION))
            for request in talk.calls(SESSION, TURNS):
                await sessions.append(Call(TENANT, None), request)

        asyncio.run(populate())
        print(f"compiled core: {core.COMPILED}")
        if "resume" in which:
            resume(sessions, parts)
        if "append" in which:
            append(sessions, parts)


if __name__ == "__main__":
    main()
