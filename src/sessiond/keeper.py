"""A node's workers, as the process that keeps its state sees them: started, listened to, watched, started again, ended.

It promises that a worker that is gone is replaced, that one which holds up the others is ended within two seconds, and
that none is left when the keeper ends, whichever way it does. It answers no call.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from sessiond import link, telemetry
from sessiond.config import Settings
from sessiond.errors import Corrupt, SessiondError, Unavailable
from sessiond.link import Link
from sessiond.tiers.block import KEEPER_SLOT, Block, is_stuck
from sessiond.tiers.cloud.lease import boot_clock_ms
from sessiond.tiers.hot.environment import Environment
from sessiond.transport.sockets import SharedPort, in_use
from sessiond.v1 import admin_pb2

log = structlog.get_logger("sessiond")

LOOK_S: Final = 0.1
# A process that holds LMDB's write lock for so long outside of a commit keeps every other one waiting.
STUCK_MS: Final = 1000
# One that says nothing for so long answers nobody either, and has its share of new connections all the same.
SILENT_MS: Final = 10_000
# Between two looks; after a longer pause it is this process that stood still, and the others may have, too.
PAUSE_MS: Final = 500
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_LAST_S: Final = 5.0
# A worker that lived for so long is started again at once.
SETTLED_MS: Final = 30_000
START_S: Final = 60.0
# A killed process is gone at once, unless the disk holds it.
GONE_S: Final = 0.2
STARTS_MAX: Final = 3
# Beyond the grace that calls under way have.
STOP_MARGIN_S: Final = 1.0
MESSAGES_AT_ONCE: Final = 256
EXIT_FAILED: Final = 5


@dataclass
class Hears:
    """Whom the keeper tells what it hears of workers. All are called on its event loop.

    changed: sessions that a commit changed, None for any. used: sessions that callers used. counted: what a worker
    answered itself, by name. failed: the hot tier did.
    """

    changed: Callable[[Collection[bytes] | None], None] = lambda hashes: None
    used: Callable[[Collection[bytes]], None] = lambda hashes: None
    counted: Callable[[dict[str, int]], None] = lambda counts: None
    failed: Callable[[SessiondError], None] = lambda failure: None


@dataclass
class _Worker:
    """One worker's place; whichever process has it now."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    link: Link | None = None
    # It can be told to listen; it listens.
    ready: bool = False
    listens: bool = False
    started_ms: int = 0
    heard_ms: int = 0
    restarts: int = 0
    failures: int = 0
    again_ms: int = 0
    # The last word of its slot, and since when the keeper has seen it.
    seen: tuple[tuple[int, int], int] = ((0, 0), 0)
    # Totals of processes before, and of this one.
    before: Counter[str] = field(default_factory=Counter)
    now: Counter[str] = field(default_factory=Counter)
    group_max: int = 0


class Workers:
    """All workers of a node. Made before the node's address is taken; `start` once calls may come."""

    def __init__(self, settings: Settings, folder: int) -> None:
        """folder: a descriptor of the folder that the keeper's own socket is in. Raises Unavailable PORT_IN_USE."""
        self._settings = settings
        self._folder = folder
        self._port = SharedPort(settings.listen)
        self.port = self._port.port
        self.block = Block.create()
        self.hears = Hears()
        self._workers = [_Worker(number) for number in range(settings.workers)]
        self._hot: Environment | None = None
        self._hash_key = b""
        self._changed = asyncio.Event()
        self._trouble = ""
        # Whether those that are ready are told to listen.
        self._listening = False
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._looked_ms = 0
        # Killed, and not gone yet.
        self._dying: list[subprocess.Popen[bytes]] = []
        for worker in self._workers:
            # They import while the keeper opens what it needs.
            self._spawn(worker)

    @property
    def socket(self) -> str:
        """Where the keeper listens for them: by its folder's descriptor, since a socket's path must be short."""
        return f"unix:/proc/self/fd/{self._folder}/{link.SOCKET_NAME}"

    async def start(self) -> None:
        """Have them all listen. Raises Unavailable PORT_IN_USE, Corrupt INTERNAL if they don't come up."""
        if self._task is not None:
            return
        loop = asyncio.get_running_loop()
        for worker in self._workers:
            self._greet(worker)
        self._task = asyncio.create_task(self._watch())
        ends_s = loop.time() + START_S
        while not all(worker.listens for worker in self._workers):
            if not self._listening and all(worker.ready for worker in self._workers):
                # All at the same time: those who come back after a restart go to whoever listens, and stay there.
                self._listening = True
                for worker in self._workers:
                    self._have_listen(worker)
            if self._trouble:
                raise in_use(self._settings.listen, self._trouble)
            if loop.time() > ends_s or max(worker.failures for worker in self._workers) >= STARTS_MAX:
                raise Corrupt("INTERNAL", "The worker processes of this node do not start.")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK_S)

    def open(self, hot: Environment, hash_key: bytes) -> None:
        """Have them answer from the hot tier, as far as the block lets them."""
        self._hot, self._hash_key = hot, hash_key
        hot.on_lock = self.block.slot(KEEPER_SLOT, len(self._workers) + 1).note
        if self._task is not None:
            for worker in self._workers:
                self._have_open(worker)

    def status(self) -> list[admin_pb2.WorkerStatus]:
        """What they are doing."""
        told = []
        for worker in self._workers:
            totals = worker.before + worker.now
            pid = worker.process.pid if worker.process is not None else 0
            told.append(
                admin_pb2.WorkerStatus(
                    number=worker.number,
                    pid=pid,
                    restarts=worker.restarts,
                    resident_bytes=_resident_bytes(pid),
                    answered=totals["answered"],
                    relayed=totals["relayed"],
                    commits=totals["commits"],
                    appends=totals["appends"],
                    hand_overs=totals["hand_overs"],
                )
            )
        return told

    def group_size_max(self) -> int:
        """The most appends in one commit of any of them."""
        return max((worker.group_max for worker in self._workers), default=0)

    async def stop(self, grace_s: float) -> None:
        """Have them take no more calls, give those under way the grace, and see them end."""
        self._stopping = True
        for worker in self._workers:
            if worker.link is not None:
                worker.link.send(link.STOP, grace_ms=int(grace_s * 1000))
        if self._task is not None:
            self._task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_gone(), grace_s + STOP_MARGIN_S)
        for worker in self._workers:
            if worker.link is not None:
                asyncio.get_running_loop().remove_reader(worker.link.socket)
        self.close()

    async def _all_gone(self) -> None:
        while any(worker.link is not None for worker in self._workers):
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """End whatever still runs, at once. Nothing is started again."""
        self._stopping = True
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()
                worker.process.wait()
                worker.process = None
            if worker.link is not None:
                worker.link.close()
                worker.link = None
        self._port.close()

    # One worker ------------------------------------------------------------------------------------------------------

    def _spawn(self, worker: _Worker) -> None:
        """Start its process: by exec, on the thread that lives as long as this process (prctl(2), PR_SET_PDEATHSIG)."""
        mine, theirs = Link.pair()
        passed = (theirs.fileno(), self.block.file, self._folder)
        command = [sys.executable, "-m", "sessiond.worker", *map(str, (*passed, worker.number, os.getpid()))]
        try:
            worker.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=passed)
        except OSError as error:
            mine.close()
            log.error(telemetry.WORKER_FAILED, worker=worker.number, error=str(error))
            self._note_failure(worker)
            return
        finally:
            theirs.close()
        worker.link = mine
        worker.ready = worker.listens = False
        worker.started_ms = worker.heard_ms = boot_clock_ms()

    def _greet(self, worker: _Worker) -> None:
        """Begin to hear it, and give it the hot tier."""
        end = worker.link
        if end is None:
            return
        asyncio.get_running_loop().add_reader(end.socket, self._heard, worker, end)
        self._have_open(worker)

    def _have_listen(self, worker: _Worker) -> None:
        if worker.link is None:
            return
        settings = self._settings
        worker.link.send(
            link.LISTEN,
            address=self._port.address,
            concurrent_calls_max=settings.concurrent_calls_max,
            watchers_max=settings.watchers_max,
            request_bytes_max=settings.request_bytes_max,
            log_level=settings.log_level,
        )

    def _have_open(self, worker: _Worker) -> None:
        if self._hot is None or worker.link is None:
            return
        settings = self._settings
        worker.link.send(
            link.OPEN,
            path=str(self._hot.path),
            map_size_bytes=settings.map_size_bytes,
            readers_max=settings.readers_max,
            group_max=settings.commit_group_max,
            workers=settings.workers,
            hash_key=self._hash_key,
            node=settings.node,
            default_budget_tokens=settings.default_budget_tokens,
            serve_unconfirmed=settings.serve_unconfirmed,
            turn_bytes_max=settings.turn_bytes_max,
        )

    def _heard(self, worker: _Worker, end: Link) -> None:
        """Messages of a worker; its end."""
        try:
            for _ in range(MESSAGES_AT_ONCE):
                message = end.receive()
                if message is None:
                    return
                worker.heard_ms = boot_clock_ms()
                self._take(worker, *message)
        except EOFError:
            self._gone(worker)

    def _take(self, worker: _Worker, kind: str, content: dict[str, Any]) -> None:
        if kind == link.CHANGED:
            self.hears.changed(None if content["all_of_them"] else content["hashes"])
        elif kind == link.TOLD:
            if content.pop("disk_full", False) and self._hot is not None:
                self._hot.note_disk_full()
            self.hears.used(content.pop("used"))
            counts = content.pop("counts")
            worker.group_max = max(worker.group_max, content.pop("group_max", 0))
            worker.now.update({name: counts.get(name, 0) for name in ("answered", "relayed")})
            worker.now.update({name: value - worker.now[name] for name, value in content.items()})
            self.hears.counted(counts)
        elif kind == link.READY:
            worker.ready = True
            if self._listening:
                self._have_listen(worker)
            self._changed.set()
        elif kind == link.LISTENING:
            if content["trouble"]:
                self._trouble = content["trouble"]
                log.error(telemetry.WORKER_FAILED, worker=worker.number, error=content["trouble"])
                self._end(worker)
            else:
                worker.listens = True
                log.info(telemetry.WORKER_SERVES, worker=worker.number, pid=worker.process and worker.process.pid)
            self._changed.set()
        elif kind == link.FAILED:
            kind_of = Corrupt if content["reason"] != "HOT_TIER_FAILED" else Unavailable
            self.hears.failed(kind_of(content["reason"], content["message"]))

    def _end(self, worker: _Worker) -> None:
        if worker.process is not None:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGKILL)

    def _gone(self, worker: _Worker) -> None:
        """Its process has ended, or is about to: whatever it knew is gone."""
        if worker.link is not None:
            asyncio.get_running_loop().remove_reader(worker.link.socket)
            worker.link.close()
            worker.link = None
        process, worker.process = worker.process, None
        if process is None or self._stopping:
            worker.process = process
            self._changed.set()
            return
        process.kill()
        try:
            code = process.wait(GONE_S)
        except subprocess.TimeoutExpired:
            # A disk that does not answer holds it; nobody may wait for that here.
            code = -signal.SIGKILL
            self._dying.append(process)
        self.block.clear(worker.number + 1)
        worker.ready = worker.listens = False
        worker.before += worker.now
        worker.now = Counter()
        log.warning(telemetry.WORKER_GONE, worker=worker.number, pid=process.pid, exit_code=code)
        if code == EXIT_FAILED:
            self.hears.failed(Unavailable("HOT_TIER_FAILED", "The disk failed under a worker process."))
            return
        if self._hot is not None:
            with contextlib.suppress(SessiondError):
                self._hot.readers()  # frees the slots of processes that are gone
        # It may have committed and not said so.
        self.hears.changed(None)
        self._note_failure(worker)
        self._changed.set()

    def _note_failure(self, worker: _Worker) -> None:
        now_ms = boot_clock_ms()
        settled = worker.started_ms and now_ms - worker.started_ms >= SETTLED_MS
        worker.failures = 1 if settled else worker.failures + 1
        pause_s = min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2 ** (worker.failures - 1))
        worker.again_ms = now_ms + int(pause_s * 1000)

    async def _watch(self) -> None:
        """Start again what ended, and end what holds up the others."""
        while True:
            await asyncio.sleep(LOOK_S)
            now_ms = boot_clock_ms()
            self._dying = [process for process in self._dying if process.poll() is None]
            paused, self._looked_ms = now_ms - self._looked_ms > PAUSE_MS, now_ms
            locks = self.block.locks(len(self._workers) + 1)
            for worker in self._workers:
                if self._stopping:
                    return
                if worker.process is None:
                    if now_ms >= worker.again_ms:
                        worker.restarts += 1
                        self._spawn(worker)
                        self._greet(worker)
                    continue
                if paused:
                    worker.heard_ms = now_ms
                    worker.seen = locks[worker.number + 1], now_ms
                self._look(worker, locks[worker.number + 1], now_ms)

    def _look(self, worker: _Worker, lock: tuple[int, int], now_ms: int) -> None:
        assert worker.process is not None
        if worker.process.poll() is not None:
            self._gone(worker)
            return
        if lock != worker.seen[0]:
            worker.seen = lock, now_ms
        what, since_ms = lock[0], max(lock[1], worker.seen[1])
        why = ""
        if is_stuck(what, since_ms, now_ms, STUCK_MS, False) or (
            is_stuck(what, since_ms, now_ms, STUCK_MS, True) and _is_stopped(worker.process.pid)
        ):
            why = "it held LMDB's write lock"
        elif worker.listens and now_ms - worker.heard_ms > SILENT_MS:
            why = "it said nothing"
        if why:
            log.error(telemetry.WORKER_KILLED, worker=worker.number, pid=worker.process.pid, why=why)
            self._end(worker)
            self._gone(worker)


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal or a debugger."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] in (b"T", b"t")
    except OSError:
        return False


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
