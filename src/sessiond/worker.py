"""One of a node's processes that answer calls: resumes and appends from LMDB alone, all the rest by asking the keeper.

It promises that what it does not answer goes to the keeper as it came, that a reply says CONFIRMED only if the lease
was valid, and its tenure the same, after the rows were read or committed, and that it never outlives the keeper. It
decides nothing about ownership, talks to no cloud tier and keeps nothing that anybody needs: it may be killed at any
moment.

Started by `keeper.Workers` as `python -m sessiond.worker LINK BLOCK FOLDER NUMBER PARENT`: descriptors of a socket to
the keeper, of the shared block, and of the folder of the keeper's own socket; which worker it is; the keeper's pid.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import grpc
import structlog

from sessiond import link, telemetry
from sessiond.core.layout import field_head
from sessiond.errors import SessiondError
from sessiond.link import Link
from sessiond.service.batches import REPLY_BYTES_MAX, Breaks, check_size
from sessiond.service.hotpath import HotPath
from sessiond.tiers.block import Block, ClockView, LeaseView
from sessiond.tiers.hot.environment import Environment
from sessiond.tokens import Tokenizer
from sessiond.transport.options import SERVICES, TENANT, rpcs_max, server_options
from sessiond.transport.relay import CHANNEL_OPTIONS, Context, Relay
from sessiond.transport.wire import split
from sessiond.v1 import admin_pb2, session_pb2

log = structlog.get_logger("sessiond")

# How often what was used and counted is told.
TOLD_S: Final = 0.1
# When the tokenizers are loaded, after the hot tier was opened, unless somebody needs them earlier.
WARM_AFTER_S: Final = 3.0
# Names of sessions that wait to be told; beyond it all of them count as changed.
UNTOLD_MAX: Final = 4096
# Sessions of which it is still to be told that they were used.
USED_MAX: Final = 65_536
SERVICE: Final = "sessiond.v1.SessionService"
HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
REFLECTION: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
# Exit codes: the hot tier failed, which ends the node; anything else is worth another start.
EXIT_FAILED: Final = 5
EXIT_ORPHANED: Final = 3
_PR_SET_PDEATHSIG: Final = 1


def now_ms() -> int:
    """Milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


class Telling:
    """What the keeper is still to be told. Any thread."""

    def __init__(self, to_keeper: Link) -> None:
        self._link = to_keeper
        self._lock = threading.Lock()
        self._changed: set[bytes] = set()
        self._all = False
        self._used: dict[bytes, None] = {}
        self.counts: Counter[str] = Counter()

    def changed(self, hashes: Collection[bytes]) -> None:
        """A commit changed these sessions; the keeper hears of it before anybody is answered."""
        with self._lock:
            self._changed.update(hashes)
            self._send_changed()

    def _send_changed(self) -> None:
        if len(self._changed) > UNTOLD_MAX:
            self._changed.clear()
            self._all = True
        if (self._changed or self._all) and self._link.send(
            link.CHANGED, hashes=list(self._changed), all_of_them=self._all
        ):
            self._changed.clear()
            self._all = False

    def used(self, h: bytes) -> None:
        """A caller here used a session."""
        if len(self._used) < USED_MAX:
            self._used[h] = None

    def tell(self, **more: int | bool) -> None:
        """Say what has gathered."""
        with self._lock:
            self._send_changed()
            used, self._used = self._used, {}
            counts, self.counts = self.counts, Counter()
            names = list(used)
            for start in range(0, max(1, len(names)), UNTOLD_MAX):
                part = names[start : start + UNTOLD_MAX]
                if not self._link.send(link.TOLD, used=part, counts=dict(counts), **more):
                    # The next time: what was used a moment longer ago is as good, and some may go untold.
                    self._used = dict.fromkeys(names[start : start + USED_MAX])
                    self.counts.update(counts)
                    return
                counts = Counter()


class Worker:
    """One worker: `run` until the keeper says so, or is gone."""

    def __init__(self, to_keeper: Link, block: Block, folder: int, number: int) -> None:
        self._link = to_keeper
        self._block = block
        self._lease = LeaseView(block)
        self._folder = folder
        self._number = number
        self._telling = Telling(to_keeper)
        self._hot: Environment | None = None
        self._server: grpc.aio.Server | None = None
        self._hot_path: HotPath | None = None
        self._rungs: Counter[str] = Counter()
        self._in_flight = self._calls_max = 0
        self._slot = block.slot(number + 1)
        self._stop_ms: asyncio.Future[int] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._request_bytes_max = 0

    async def run(self) -> int:
        """Serve; the exit code."""
        loop = asyncio.get_running_loop()
        self._stop_ms = loop.create_future()
        loop.add_reader(self._link.socket, self._heard)
        self._link.send(link.READY)
        grace_ms = await self._stop_ms
        if self._server is not None:
            await self._server.stop(grace_ms / 1000)
        self._tell()
        if self._hot is not None:
            await asyncio.to_thread(self._hot.close)
        return 0

    def _heard(self) -> None:
        """Messages of the keeper; its end is ours."""
        try:
            while (message := self._link.receive()) is not None:
                kind, content = message
                if kind == link.LISTEN:
                    self._begin(self._listen(**content))
                elif kind == link.OPEN:
                    self._begin(self._open(**content))
                elif kind == link.STOP and self._stop_ms is not None and not self._stop_ms.done():
                    self._stop_ms.set_result(content["grace_ms"])
        except EOFError:
            os._exit(EXIT_ORPHANED)

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error(telemetry.WORKER_FAILED, worker=self._number, error=f"{type(error).__name__}: {error}")
            os._exit(1)

    # Calls -----------------------------------------------------------------------------------------------------------

    async def _listen(
        self, address: str, concurrent_calls_max: int, watchers_max: int, request_bytes_max: int, log_level: str
    ) -> None:
        telemetry.set_up_logs(log_level)
        self._request_bytes_max = request_bytes_max
        channel = grpc.aio.insecure_channel(
            f"unix:/proc/self/fd/{self._folder}/{link.SOCKET_NAME}", options=CHANNEL_OPTIONS
        )
        names = [
            f"/{service.full_name}/{method.name}"
            for service in SERVICES
            for method in service.methods
            if not method.client_streaming and not method.server_streaming
        ]
        relay = Relay(channel, [*names, HEALTH_CHECK], [REFLECTION], self._count_relayed)
        rpcs = rpcs_max(concurrent_calls_max, watchers_max)
        self._server = grpc.aio.server(options=server_options(rpcs, True), maximum_concurrent_rpcs=rpcs)
        self._calls_max = concurrent_calls_max
        own = {
            "ResumeSession": self._own(self._resume),
            "BatchResumeSessions": self._batch_resume,
            "AppendTurn": self._append,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(make(relay.unary(f"/{SERVICE}/{name}")))
            for name, make in own.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers), relay))
        trouble = ""
        try:
            if not self._server.add_insecure_port(address):
                trouble = "gRPC says no more"
        except RuntimeError as error:
            trouble = str(error)
        if not trouble:
            await self._server.start()
        self._begin(self._tell_often())
        self._link.send(link.LISTENING, trouble=trouble)

    def _count_relayed(self) -> None:
        self._telling.counts["relayed"] += 1

    def _own(self, work: Callable[[HotPath, bytes], bytes | None]) -> Callable[[Any], Any]:
        """What makes the handler of a method that is read at once, or passed on. work: its reply, or None."""

        def make(relayed: Any) -> Any:
            async def call(raw: bytes, context: Context) -> bytes:
                hot_path = self._hot_path
                if hot_path is not None and self._serves():
                    try:
                        answer = work(hot_path, raw)
                    except Exception as error:
                        answer = None
                        self._unforeseen(error)
                    if answer is not None:
                        return answer
                return bytes(await relayed(raw, context))

            return call

        return make

    def _append(self, relayed: Any) -> Any:
        """The handler of AppendTurn."""

        async def call(raw: bytes, context: Context) -> bytes:
            hot_path = self._hot_path
            if hot_path is not None and self._in_flight < self._calls_max and self._serves():
                self._in_flight += 1
                try:
                    answer = await hot_path.append(raw, TENANT)
                except asyncio.CancelledError:
                    self._telling.counts["cancelled:AppendTurn"] += 1
                    raise
                except Exception as error:
                    # What became of it nobody knows: the keeper does it, or finds it done, by its turn ids.
                    answer = None
                    self._unforeseen(error)
                finally:
                    self._in_flight -= 1
                if answer is not None:
                    self._count("AppendTurn")
                    return answer
            return bytes(await relayed(raw, context))

        return call

    def _unforeseen(self, error: Exception) -> None:
        """An error of the hot path's own: the general path answers, and says what is wrong if it meets it, too."""
        log.error(telemetry.HOT_PATH_FAILED, worker=self._number, exc_info=error)
        self._rungs.clear()

    def _count(self, name: str) -> None:
        counts = self._telling.counts
        counts[f"call:{name}"] += 1
        counts["answered"] += 1

    def _note_appended(self, h: bytes, turns: int) -> None:
        self._telling.used(h)
        self._telling.counts["turns"] += turns

    def _serves(self) -> bool:
        """Whether the node does nothing but serve: while it starts, drains or fails, the keeper answers."""
        return self._lease.serves(admin_pb2.NODE_PHASE_SERVING)

    def _resume(self, hot_path: HotPath, raw: bytes) -> bytes | None:
        answer = hot_path.resume(raw, TENANT)
        self._count_rungs(answer is not None)
        if answer is not None:
            self._count("ResumeSession")
        return answer

    def _batch_resume(self, relayed: Any) -> Any:
        """The handler of BatchResumeSessions."""

        async def call(raw: bytes, context: Context) -> bytes:
            hot_path = self._hot_path
            if hot_path is not None and self._in_flight < self._calls_max:
                self._in_flight += 1
                try:
                    answer = await self._resume_all(hot_path, raw)
                finally:
                    self._in_flight -= 1
                if answer is not None:
                    return answer
            return bytes(await relayed(raw, context))

        return call

    async def _resume_all(self, hot_path: HotPath, raw: bytes) -> bytes | None:
        """All of a batch, or nothing of it."""
        try:
            items = split(session_pb2.BatchResumeSessionsRequest, "requests", raw, self._request_bytes_max)
            check_size(len(items), len(raw), self._request_bytes_max)
        except SessiondError:
            return None
        pieces: list[bytes] = []
        size_bytes, rungs, breaks = 0, Counter[str](), Breaks()
        for item in items:
            answer = hot_path.resume(item, TENANT) if self._serves() else None
            # Taken at once: other calls count theirs in the breaks.
            rungs.update(self._rungs)
            self._count_rungs(False)
            # Where there is no room for all, the keeper says for which.
            if answer is None or (size_bytes := size_bytes + len(answer)) > REPLY_BYTES_MAX:
                return None
            pieces += (field_head(1, len(answer)), answer)
            await breaks.give_way()
        self._rungs.update(rungs)
        self._count_rungs(True)
        self._count("BatchResumeSessions")
        self._telling.counts["call:BatchResumeSessions/item"] += len(items)
        return b"".join(pieces)

    def _count_rungs(self, answered: bool) -> None:
        """Count the rungs of what is answered here; what is passed on is counted there."""
        if answered:
            for rung, count in self._rungs.items():
                self._telling.counts[f"rung:{rung}"] += count
        self._rungs.clear()

    async def _open(
        self,
        path: str,
        map_size_bytes: int,
        readers_max: int,
        group_max: int,
        workers: int,
        hash_key: bytes,
        node: str,
        default_budget_tokens: int,
        serve_unconfirmed: bool,
        turn_bytes_max: int,
    ) -> None:
        """Open the hot tier, and answer from it from now on."""
        self._slot = self._block.slot(self._number + 1, workers + 1)
        try:
            hot = await asyncio.to_thread(Environment, Path(path), map_size_bytes, readers_max, group_max)
        except SessiondError as error:
            self._failed(error)
            return
        hot.on_lock = self._slot.note
        hot.on_commit = self._telling.changed
        hot.on_failed = self._failed
        self._hot = hot
        tokenizer, clock = Tokenizer(), ClockView(self._block, now_ms)
        self._hot_path = HotPath(
            hot,
            hash_key,
            tokenizer,
            self._lease,
            node,
            default_budget_tokens=default_budget_tokens,
            serve_unconfirmed=serve_unconfirmed,
            turn_bytes_max=turn_bytes_max,
            clock_ms=now_ms,
            expiry_ms=clock,
            latest_ms=clock.latest_ms,
            running_ms=clock.running_ms,
            note_resumed=self._telling.used,
            note_appended=self._note_appended,
            rungs=self._rungs,
        )
        # As in the keeper: loading the vocabularies holds the interpreter for a quarter of a second.
        warm = threading.Timer(WARM_AFTER_S, tokenizer.warm)
        warm.daemon = True
        warm.start()
        # What was imported stays for good: collections need not walk it.
        gc.collect()
        gc.freeze()

    def _failed(self, failure: SessiondError) -> None:
        """The disk failed: nothing is answered from it any more, by any process of the node."""
        log.error(telemetry.HOT_TIER_FAILED, worker=self._number, reason=failure.reason, message=str(failure))
        self._link.send(link.FAILED, reason=failure.reason, message=failure.message)
        os._exit(EXIT_FAILED)

    # What is told ----------------------------------------------------------------------------------------------------

    async def _tell_often(self) -> None:
        while True:
            await asyncio.sleep(TOLD_S)
            self._tell()

    def _tell(self) -> None:
        hot = self._hot
        if hot is None:
            self._telling.tell()
            return
        self._telling.tell(
            commits=hot.commits,
            appends=hot.appends,
            group_max=hot.group_size_max,
            hand_overs=self._slot.hand_overs,
            disk_full=hot.disk_full,
        )


def main(arguments: list[str]) -> int:
    """Be a worker; the exit code."""
    to_keeper, block, folder, number, parent = map(int, arguments)
    # The keeper has the last word on signals: whoever stops a group of processes stops them by the keeper.
    for ignored in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return EXIT_ORPHANED
    faulthandler.enable()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    end = Link(socket.socket(fileno=to_keeper))
    return asyncio.run(Worker(end, Block(block), folder, number).run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
