"""One LMDB environment: opening it, its tables, and the group commit through which every write goes.

It promises that a write is answered after the fsync of the commit that holds it, that a refused write leaves no trace,
and that a full disk is told from a failed one: the first is waited out, nothing is retried over the second. It never
holds a read transaction across a wait, never assumes that this process is the only one here, and never touches a page
that the file has lost.

Tables (keys are bytes; h is a session's 16-byte hash; integers in keys are big-endian so that they sort):

    meta         format                     -> version of these tables (4)
                 incarnation                -> 16 random bytes: what owns sessions
                 store                      -> 16 bytes: the bucket that this hot tier belongs to
                 opened                     -> how often it was opened to be written (8)
    heads        h                          -> Head row
    turns        h, first seq (8)           -> whole frames, at most ROW_BYTES_MAX unless one frame is larger
    ids          h, chunk (4)               -> 24-byte entries as in the manifest's turn_ids, 64 seqs a chunk
    checkpoints  h, version (8)             -> state bytes, the newest five
    manifests    h                          -> the manifest as last committed, without payload, state and turn ids
    users        tenant (16), user (16),
                 created ms (8), h          -> session id: the sessions of a user by age
    states       h                          -> what is known of all blobs of a session together
                 h, key (1 to 256)          -> one blob without its content, see core/blobs.py
    blobs        h, version (8)             -> a blob's content, where it is not in the cloud tier only
    dirty        h                          -> when the session got turns that the cloud tier lacks, ms (8); then 1 if
                                               its newest exchange waits for an answer

Every value starts with CRC32C(h, table name, rest) in 4 bytes, but turns, whose frames carry their own; blobs, whose
sha256 is in states; dirty, which only says when to look; format and store, which are compared as a whole; and opened,
which nobody reads. Incarnation is checked with an empty h.

The file is always at least as long as its newest page, and kept allocated somewhat beyond (Environment._reserve). So a
file that is shorter was truncated by somebody, which is refused: a page of the map that the file has lost ends the
process by SIGBUS.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, cast

import lmdb

from sessiond.errors import Corrupt, Denied, Exhausted, Invalid, SessiondError, Unavailable
from sessiond.tiers.hot.datafile import check_file
from sessiond.tiers.hot.rows import unwrap, wrap
from sessiond.tiers.local_disk import settle_names

FORMAT_VERSION: Final = 1
# The folder in which an environment is made.
UNFINISHED: Final = ".new"
META_FORMAT: Final = b"format"
META_INCARNATION: Final = b"incarnation"
META_STORE: Final = b"store"
META_OPENED: Final = b"opened"
TABLES: Final = ("meta", "heads", "turns", "ids", "checkpoints", "manifests", "users", "dirty", "states", "blobs")
# Tables that an environment of an older release lacks until it is opened to be written.
LATER_TABLES: Final = frozenset({"states", "blobs"})
# Appends are refused above this share of the map; the rest is for flush and evict.
MAP_USED_MAX: Final = 0.85
# A queue longer than this means that the disk does not keep up.
QUEUE_MAX: Final = 16_384
# Before a commit, so long is waited for more writes where that brought this many more the last time; where it did not,
# it is tried again after some commits, twice as many each time. A caller alone hardly meets it; where there are many,
# they share what a commit costs in thread switches (bench/README.md, "What was tried").
GATHER_S: Final = 0.002
GATHERED_MIN: Final = 4
GATHER_AGAIN: Final = (4, 1024)
# A group of so many is enough of one.
GATHERED_ENOUGH: Final = 16
# The map's use is measured at most this often: every so many commits, or sooner if they were large.
MEASURED_EVERY_COMMITS: Final = 16
MEASURED_EVERY_SHARE: Final = 1 / 256
# Disk space is taken ahead in such steps, the last of a disk in small ones; and this much of it is left alone by writes
# that add turns, so that flush, release and evict still commit on a full disk.
RESERVE_STEP_BYTES: Final = 4 * 1024**2
RESERVE_STEP_BYTES_MIN: Final = 64 * 1024
RESERVE_KEPT_BYTES: Final = 1024**2
# So many times what a group needs must be free inside the file to go on without space behind it.
FREED_SHARE: Final = 4
# Pages that one write changes besides what it adds: a path through each of the tables.
WRITE_BYTES_MAX: Final = 32 * 1024
# What a process does with LMDB's write lock, as `Environment.on_lock` is told.
LOCK_FREE: Final = 0
LOCK_WAITS: Final = 1
LOCK_HELD: Final = 2
LOCK_COMMITS: Final = 3

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY_FILES: Final = (errno.EMFILE, errno.ENFILE)

Result = TypeVar("Result")


class Transaction:
    """One LMDB transaction with the tables at hand. Buffers read from it end with it.

    changed: sessions whose head row was written; whatever becomes of a session changes it. known_ids: what this
    process remembers of sessions that it appended to, for writing: (head seq, chain there, entries of turn ids).
    """

    __slots__ = ("changed", "known_ids", "lmdb", "tables")

    def __init__(
        self, transaction: Any, tables: dict[str, Any], known_ids: dict[bytes, tuple[int, bytes, bytes]] | None = None
    ) -> None:
        self.lmdb = transaction
        self.tables = tables
        self.known_ids = known_ids
        self.changed: set[bytes] = set()

    def remember_ids(self, h: bytes, head_seq: int, chain: bytes, entries: bytes) -> None:
        """Remember a session's turn ids as they will be; of one that comes to nothing no head has the chain."""
        known = self.known_ids
        if known is not None:
            known.pop(h, None)
            known[h] = head_seq, chain, entries
            if len(known) > KNOWN_IDS_MAX:
                del known[next(iter(known))]

    def end_read(self) -> None:
        """End a read transaction."""
        self.lmdb.abort()
        # The binding gives the reader's slot back only when its object goes, and whoever still has ours may wait for
        # the store next: a thousand cold sessions at once would take every slot there is.
        self.lmdb = None

    def get(self, table: str, key: bytes) -> Any:
        """The value, or None."""
        return self.lmdb.get(key, db=self.tables[table])

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Write the value over what is there."""
        if table == "heads":
            self.changed.add(key)
        self.lmdb.put(key, value, db=self.tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        """Whether there was such a key."""
        if table == "heads":
            self.changed.add(key)
        return bool(self.lmdb.delete(key, db=self.tables[table]))

    def cursor(self, table: str) -> Any:
        """A cursor over the table."""
        return self.lmdb.cursor(db=self.tables[table])

    def scan(self, table: str, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, Any]]:
        """(key, value) of every key with the prefix, from `start` on, ascending."""
        cursor = self.cursor(table)
        found = cursor.set_range(max(prefix, start)) if prefix or start else cursor.first()
        while found:
            key = bytes(cursor.key())
            if not key.startswith(prefix):
                return
            yield key, cursor.value()
            found = cursor.next()

    def entries(self, table: str) -> int:
        """How many keys the table has."""
        return int(self.lmdb.stat(self.tables[table])["entries"])


# Sessions whose turn ids are remembered: 28 KiB each at most.
KNOWN_IDS_MAX: Final = 256

# What reading may raise besides; `Environment.read` says what it means.
ReadFailed: Final = lmdb.Error


class _Older(Transaction):
    """A read transaction of an environment in which tables are missing: there is nothing in them."""

    __slots__ = ()

    def get(self, table: str, key: bytes) -> Any:
        return super().get(table, key) if table in self.tables else None

    def scan(self, table: str, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, Any]]:
        return super().scan(table, prefix, start) if table in self.tables else iter(())

    def entries(self, table: str) -> int:
        return super().entries(table) if table in self.tables else 0


class _Work:
    """One write that waits for its commit."""

    __slots__ = ("error", "loop", "operation", "result", "settle", "weight_bytes")

    def __init__(self, operation: Callable[[Transaction], Any], loop: Any, settle: Any, weight_bytes: int) -> None:
        self.operation = operation
        self.loop = loop
        self.settle = settle
        self.weight_bytes = weight_bytes
        self.result: Any = None
        self.error: BaseException | None = None


class Driver(Protocol):
    """What commits in place of the commit thread, by calling `Environment.commit_next`: a clock of somebody else's."""

    def queued(self) -> None:
        """A write waits for its commit; called on the thread that asked for it."""

    def wait(self, done: threading.Event) -> None:
        """Return once a commit has set this; called by whoever may wait."""


# A test puts something else here.
pause: Callable[[float], None] = time.sleep


class Gathering:
    """Whether it pays to wait for more writes before a commit, learnt from what waiting brought."""

    __slots__ = ("_left", "_pause")

    def __init__(self) -> None:
        self._pause = self._left = GATHER_AGAIN[0]

    def is_due(self) -> bool:
        """Whether to wait this time; asked once a commit."""
        self._left = max(0, self._left - 1)
        return not self._left

    def learn(self, came: int) -> None:
        """So many more writes came while it waited."""
        if came >= GATHERED_MIN:
            self._pause = GATHER_AGAIN[0]
        else:
            self._left = self._pause
            self._pause = min(2 * self._pause, GATHER_AGAIN[1])


class Environment:
    """The node's LMDB environment, opened once per process."""

    def __init__(
        self, path: Path, map_size_bytes: int, readers_max: int, group_max: int, driver: Driver | None = None
    ) -> None:
        """Open or make it. driver: None for a thread of its own.

        Raises Denied UNWRITABLE_FOLDER, Corrupt NEWER_FORMAT, CORRUPT_HOT_ROW or HOT_TIER_TRUNCATED, Exhausted
        DISK_FULL, TOO_MANY_FILES or OVERLOADED, Unavailable HOT_TIER_FAILED.
        """
        self.path = path
        self.group_max = group_max
        try:
            path.mkdir(parents=True, exist_ok=True)
            _make_if_absent(path, map_size_bytes)
            # LMDB fsyncs the file and not its name, without which the file is nothing.
            settle_names(str(path))
            check_file(path)
            self._env = lmdb.open(
                str(path),
                map_size=map_size_bytes,
                max_dbs=len(TABLES),
                max_readers=readers_max,
                sync=True,
                metasync=True,
                writemap=False,
                lock=True,
                # Lets the binding take whatever data version its LMDB writes; see py-lmdb 3.
                lib_version=0,
            )
        except (OSError, lmdb.Error) as error:
            raise _open_error(path, error) from error
        self.commits = self.appends = self.group_size_max = 0
        # The disk had no room for turns when they were written last; upkeep makes some.
        self.disk_full = False
        self.disk_full_at_s = -math.inf
        # Why nothing is read or written any more, once the disk has failed; on_failed is called once then.
        self.failed: SessiondError | None = None
        self.on_failed: Callable[[SessiondError], None] = lambda error: None
        # Called with the sessions that a commit changed, after its fsync and before whoever asked for it is answered.
        self.on_commit: Callable[[Collection[bytes]], None] = lambda changed: None
        # Called with LOCK_ values as the write lock is asked for, held, about to be given back by a commit, and free:
        # other processes of the node look at it, and at nothing else, to tell a writer that is stuck.
        self.on_lock: Callable[[int], None] = lambda what: None
        # Of the commit thread alone.
        self._gathering = Gathering()
        self._known_ids: dict[bytes, tuple[int, bytes, bytes]] = {}
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._driver = driver
        self._thread: threading.Thread | None = None
        self._closed = False
        self._file = -1
        try:
            # Held open from before the first write, so that it hears of every failed writeback (see _is_out_of_room).
            self._file = os.open(path / "data.mdb", os.O_RDWR | os.O_CLOEXEC)
            _check_length(self._env, self._file, path)
            info = self._env.info()
            self._page_bytes = int(self._env.stat()["psize"])
            self._map_bytes = int(info["map_size"])
            self._reserved_bytes = 0
            # The newest commit that was found: what the lease's is compared with.
            self.opened_at = int(info["last_txnid"])
            self._env.reader_check()
            self._tables = {name: self._env.open_db(name.encode()) for name in TABLES}
            self.incarnation = _settle_meta(self._env, self._tables, path)
            self._commits_unmeasured = self._bytes_unmeasured = 0
            with self._env.begin() as raw:
                self._used_bytes = self._measured(raw)
        except (OSError, lmdb.Error) as error:
            self._release()
            raise _open_error(path, error) from error
        except BaseException:
            self._release()
            raise
        if driver is None:
            self._thread = threading.Thread(target=self._commit_loop, name="commit", daemon=True)
            self._thread.start()

    def _release(self) -> None:
        self._env.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def check_store(self, store_id: bytes) -> None:
        """Have everything that can be read on the disk, and check that this hot tier is of that bucket. It commits
        nothing: whether this is an older copy of the disk is told by the number of its newest commit, which a start
        that fails must not raise.

        Raises Invalid WRONG_STORE if it is tied to another, Unavailable HOT_TIER_FAILED.
        """
        try:
            # A process that was killed between its last write and the fsync leaves pages that can be seen and are not
            # on the disk.
            self._env.sync(True)
        except lmdb.Error as error:
            raise self._judge(error) from error
        with self.read() as transaction:
            self._check_bound(transaction, store_id)

    def bind_store(self, store_id: bytes) -> None:
        """Tie this hot tier to its bucket at first use, and note that it was opened. Before anything is served.

        Raises Invalid WRONG_STORE if it is tied to another; nothing is written then.
        """

        def operation(transaction: Transaction) -> None:
            if not self._check_bound(transaction, store_id):
                transaction.put("meta", META_STORE, store_id)
            # A commit that changes something, at every start: it finds a disk that takes no writes before anybody
            # relies on it.
            opened = int.from_bytes(transaction.get("meta", META_OPENED) or b"", "big") + 1
            transaction.put("meta", META_OPENED, opened.to_bytes(8, "big"))

        self.run_blocking(operation)

    def _check_bound(self, transaction: Transaction, store_id: bytes) -> bool:
        """Whether it is tied to a bucket yet. Raises Invalid WRONG_STORE if that is another."""
        known = transaction.get("meta", META_STORE)
        if known is not None and bytes(known) != store_id:
            raise Invalid(
                "WRONG_STORE",
                f"The hot tier in {self.path} belongs to store {bytes(known).hex()}, not to {store_id.hex()}.",
                {"path": str(self.path)},
            )
        return known is not None

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A read transaction; its buffers are memoryviews that end with it."""
        transaction = self.begin_read()
        try:
            yield transaction
        except lmdb.Error as error:
            raise self._judge(error) from error
        finally:
            transaction.end_read()

    def begin_read(self) -> Transaction:
        """The same for whoever sees to `end_read` and ReadFailed by himself."""
        if self.failed is not None:
            raise self.failed
        try:
            return Transaction(self._env.begin(buffers=True), self._tables)
        except lmdb.ReadersFullError as error:
            raise Exhausted("OVERLOADED", "The hot tier has no free reader slot.") from error
        except lmdb.Error as error:
            raise self._judge(error) from error

    @property
    def transaction_id(self) -> int:
        """The number of the newest commit; it only falls when an older copy of the environment was put in its place."""
        return int(self._env.info()["last_txnid"])

    def mint_incarnation(self) -> bytes:
        """Become another hot tier than the one that this copy was taken from."""
        fresh = os.urandom(16)
        self.run_blocking(lambda transaction: _put_incarnation(transaction, fresh))
        self.incarnation = fresh
        return fresh

    async def run(self, operation: Callable[[Transaction], Result], weight_bytes: int = 0) -> Result:
        """Do one write in the next group; returns what it returned, after the fsync. Raises what it raised.

        weight_bytes: what it adds to the tier; 0 for a write that moves things on, which a full disk should not stop.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._submit(_Work(operation, loop, future, weight_bytes))
        return cast(Result, await future)

    def run_blocking(self, operation: Callable[[Transaction], Result], weight_bytes: int = 0) -> Result:
        """The same for a thread that may wait."""
        done = threading.Event()
        work = _Work(operation, None, done, weight_bytes)
        self._submit(work)
        if self._driver is None:
            done.wait()
        else:
            self._driver.wait(done)
        if work.error is not None:
            raise work.error
        return cast(Result, work.result)

    def _submit(self, work: _Work) -> None:
        if self.failed is not None:
            raise self.failed
        if self._closed:
            raise Unavailable("NODE_DRAINING", "The hot tier is closed.")
        if self._queue.qsize() >= QUEUE_MAX:
            raise Exhausted("OVERLOADED", f"{QUEUE_MAX} writes wait for the disk.")
        self._queue.put(work)
        if self._driver is not None:
            self._driver.queued()

    def _commit_loop(self) -> None:
        while self.commit_next():
            pass

    def commit_next(self) -> bool:
        """Wait for writes and commit the next group of them; False once the environment is being closed."""
        group: list[_Work] = []
        try:
            if not self._take(group):
                return False
            self._commit(group)
            _settle(group)
        except Exception as error:
            # Without memory, for one. A thread that ended here would leave everybody waiting for ever; what became of
            # this group nobody knows, so the node ends as after a crash.
            self._fail(Corrupt("INTERNAL", f"The commit thread failed: {type(error).__name__}: {error}."))
            for work in group:
                work.error = work.error or self.failed
            with suppress(Exception):
                _settle(group)
        return True

    def _take(self, group: list[_Work]) -> bool:
        """Wait for work and put the next group into `group`; False at the end."""
        work = self._queue.get()
        if work is None:
            return False
        group.append(work)
        weight_bytes = work.weight_bytes
        waiting = self._queue.qsize()
        if self._driver is None and waiting < min(self.group_max, GATHERED_ENOUGH) - 1 and self._gathering.is_due():
            pause(GATHER_S)
            self._gathering.learn(self._queue.qsize() - waiting)
        # Bounded groups: without a bound, two processes starve each other (DESIGN.md, "Processes").
        while len(group) < self.group_max and weight_bytes < 4 * 1024**2:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                self._queue.put(None)
                break
            group.append(following)
            weight_bytes += following.weight_bytes
        return True

    def _commit(self, group: list[_Work]) -> None:
        """One transaction for the group; if something unforeseen breaks it, each alone, so that none spoils another."""
        failed = self.failed
        if failed is not None:
            for work in group:
                work.error = failed
            return
        try:
            self.on_lock(LOCK_WAITS)
            try:
                with self._env.begin(write=True) as raw:
                    self.on_lock(LOCK_HELD)
                    _check_length(self._env, self._file, self.path)
                    full = self._reserve(group)
                    transaction = Transaction(raw, self._tables, self._known_ids)
                    for work in group:
                        if full is not None and work.weight_bytes:
                            work.error = full
                            continue
                        try:
                            work.result = work.operation(transaction)
                        except SessiondError as refused:
                            # Operations check before they write: a refusal has written nothing.
                            work.error = refused
                    self._measure(raw, group)
                    self.on_lock(LOCK_COMMITS)
            finally:
                self.on_lock(LOCK_FREE)
        except Exception as error:
            failure = self._judge(error)
            if self.failed is not None:
                # Nothing is retried over a failed fsync.
                for work in group:
                    work.result, work.error = None, self.failed
                return
            if len(group) > 1:
                for work in group:
                    work.result = work.error = None
                    self._commit([work])
                return
            group[0].result = None
            group[0].error = failure
            return
        self.commits += 1
        self.appends += len(group)
        self.group_size_max = max(self.group_size_max, len(group))
        if transaction.changed:
            self.on_commit(transaction.changed)

    def _judge(self, error: Exception) -> Exception:
        """What an error of LMDB, or of the system under it, means to whoever asked; stops the node if that is due."""
        code = _errno(error)
        if isinstance(error, Corrupt) and error.reason == "HOT_TIER_TRUNCATED":
            self._fail(error)
        elif isinstance(error, lmdb.PanicError) or (code == errno.EIO and not self._is_out_of_room()):
            self._fail(_disk_failed(self.path, error))
        elif code == errno.EIO or code in _FULL:
            # Room that ran out in the middle of a write is a short write, which LMDB reports as EIO. The transaction
            # is gone, and none of its pages is referred to; the next one writes anew whatever it refers to.
            if not self._is_usable():
                self._fail(_disk_failed(self.path, error))
            else:
                return _disk_full(self.path)
        elif isinstance(error, lmdb.MapFullError):
            return Exhausted("HOT_TIER_FULL", "The hot tier's map is full.")
        elif isinstance(error, MemoryError | lmdb.MemoryError) or code == errno.ENOMEM:
            return Exhausted("OVERLOADED", "The hot tier was given no memory.")
        elif isinstance(error, lmdb.Error):
            return Corrupt("CORRUPT_HOT_ROW", f"The hot tier in {self.path} can't be used: {error}.")
        return self.failed or error

    def _fail(self, failure: SessiondError) -> None:
        """Read and write nothing any more, and tell the daemon, once."""
        if self.failed is None:
            self.failed = failure
            self.on_failed(failure)

    def _is_usable(self) -> bool:
        """False once LMDB has given up on the environment: the newest meta page could not be written."""
        try:
            self._env.begin().abort()
        except lmdb.PanicError:
            return False
        return True

    def _is_out_of_room(self) -> bool:
        """Whether an EIO of LMDB's was a short write on a full disk, and nothing was lost on the way to the disk."""
        try:
            # Linux tells every open file of each failed writeback once: silence means that there was none.
            os.fsync(self._file)
            os.posix_fallocate(self._file, os.fstat(self._file).st_size, RESERVE_STEP_BYTES)
        except OSError as error:
            return error.errno in _FULL
        return False

    def _top_bytes(self) -> int:
        """Where the file's newest page ends."""
        return (int(self._env.info()["last_pgno"]) + 1) * self._page_bytes

    def _reserve(self, group: list[_Work]) -> Exhausted | None:
        """Take the disk space for a group before it is written; the refusal for those that add turns if there is none.

        So a full disk is found while nothing is half written, and the writes that make room keep what was taken before.
        """
        weight_bytes = sum(work.weight_bytes for work in group)
        # Twice, because the pages that a row leaves may be held by a reader.
        needed = self._top_bytes() + RESERVE_KEPT_BYTES + 2 * weight_bytes + len(group) * WRITE_BYTES_MAX
        needed = min(-(-needed // RESERVE_STEP_BYTES_MIN) * RESERVE_STEP_BYTES_MIN, self._map_bytes)
        if needed <= self._reserved_bytes:
            return None
        wanted = min(needed + RESERVE_STEP_BYTES, self._map_bytes)
        start = self._reserved_bytes or self._top_bytes()
        for end in (wanted, needed):
            try:
                os.posix_fallocate(self._file, start, end - start)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise
                if error.errno not in _FULL:
                    self._reserved_bytes = self._map_bytes  # this filesystem takes no space ahead
                    break
            else:
                self._reserved_bytes = end
                self.disk_full = False
                return None
        # What was freed inside the file is as good as space behind it; if readers still hold those pages, the write
        # runs into the full disk, which costs it nothing but its turn (see _judge).
        with self._env.begin() as raw:
            self._used_bytes = self._measured(raw)
        if self._top_bytes() - self._used_bytes >= RESERVE_KEPT_BYTES + FREED_SHARE * (needed - self._top_bytes()):
            self.disk_full = False
            return None
        # Length costs no space. A page that a transaction takes and drops again is never written, and counts all the
        # same: without this the file would look cut.
        if os.fstat(self._file).st_size < needed:
            os.ftruncate(self._file, needed)
        self.disk_full = self._reserved_bytes < needed
        if not self.disk_full:
            return None
        self.disk_full_at_s = time.monotonic()
        return _disk_full(self.path)

    def _measure(self, raw: Any, group: list[_Work]) -> None:
        """Measure the map's use, now and then: it is asked for before every append."""
        self._commits_unmeasured += 1
        self._bytes_unmeasured += sum(work.weight_bytes for work in group)
        if (
            self._commits_unmeasured >= MEASURED_EVERY_COMMITS
            or self._bytes_unmeasured >= self._map_bytes * MEASURED_EVERY_SHARE
        ):
            self._commits_unmeasured = self._bytes_unmeasured = 0
            self._used_bytes = self._measured(raw)

    def _measured(self, raw: Any) -> int:
        """Bytes of the pages that hold something; those that were freed are taken again and do not count."""
        # The two meta pages, and the root of the table of tables.
        pages = 3
        for table in self._tables.values():
            stat = raw.stat(table)
            pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        # LMDB's own list of free pages has 8 bytes for each, and can't be asked for its size.
        free = max(0, int(self._env.info()["last_pgno"]) + 1 - pages)
        return int(pages + 8 * free // self._page_bytes + 1) * self._page_bytes

    def used_bytes(self) -> tuple[int, int]:
        """(bytes of the map in use, bytes of the map), measured now. Falls when rows are removed."""
        with self.read() as transaction:
            self._used_bytes = self._measured(transaction.lmdb)
        return self._used_bytes, self._map_bytes

    def readers(self) -> int:
        """Reader slots in use, by any process."""
        self._env.reader_check()
        return max(0, len(str(self._env.readers()).splitlines()) - 1)

    def reader_rows(self) -> list[tuple[int, str, int]]:
        """(pid, thread, number of the commit that it sees) of every open read transaction, of any process."""
        rows = (line.split() for line in str(self._env.readers()).splitlines()[1:])
        return [(int(row[0]), row[1], int(row[2])) for row in rows if len(row) == 3 and row[2].isdigit()]

    def note_disk_full(self) -> None:
        """Another process of the node had no room for turns."""
        self.disk_full = True
        self.disk_full_at_s = time.monotonic()

    def give_up(self, failure: SessiondError) -> None:
        """Read and write nothing any more: the disk failed under another process of the node."""
        self._fail(failure)

    def is_full(self) -> bool:
        """Whether appends must be refused so that flush and evict keep room."""
        full_bytes = self._map_bytes * MAP_USED_MAX
        # What was measured may be some commits old: nobody is refused before another look.
        return self._used_bytes > full_bytes and self.used_bytes()[0] > full_bytes

    def close(self) -> None:
        """Finish what is queued and close. Nothing is accepted afterwards."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        self._release()


class Reader:
    """An environment opened to read only, beside a daemon or without one. It never makes or changes anything."""

    def __init__(self, path: Path) -> None:
        """Raises Denied UNWRITABLE_FOLDER, Corrupt NEWER_FORMAT, CORRUPT_HOT_ROW or HOT_TIER_TRUNCATED, and as a disk
        does.
        """
        check_file(path)
        try:
            self._env = lmdb.open(
                str(path), readonly=True, create=False, max_dbs=len(TABLES), max_readers=1024, lock=True, lib_version=0
            )
        except (OSError, lmdb.Error) as error:
            raise _open_error(path, error) from error
        try:
            file = os.open(path / "data.mdb", os.O_RDONLY | os.O_CLOEXEC)
            try:
                _check_length(self._env, file, path)
            finally:
                os.close(file)
            self._tables = {}
            for name in TABLES:
                try:
                    self._tables[name] = self._env.open_db(name.encode(), create=False)
                except lmdb.NotFoundError:
                    if name not in LATER_TABLES:
                        raise
            with self.read() as transaction:
                self.incarnation = _incarnation(transaction, path)
        except (OSError, lmdb.Error) as error:
            self._env.close()
            raise _open_error(path, error) from error
        except BaseException:
            self._env.close()
            raise

    @property
    def transaction_id(self) -> int:
        """The number of the newest commit, as Environment.transaction_id."""
        return int(self._env.info()["last_txnid"])

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A read transaction, as Environment.read."""
        raw = self._env.begin(buffers=True)
        try:
            yield (Transaction if len(self._tables) == len(TABLES) else _Older)(raw, self._tables)
        finally:
            raw.abort()

    def used_bytes(self) -> int:
        """Bytes of the map in use."""
        return int((self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"])

    def readers(self) -> int:
        """Reader slots in use, by any process."""
        return max(0, len(str(self._env.readers()).splitlines()) - 1)

    def close(self) -> None:
        """Close it."""
        self._env.close()


def _make_if_absent(path: Path, map_size_bytes: int) -> None:
    """Make an environment under another name, and give it its own once it is whole and on disk.

    LMDB writes its first pages without an fsync: a power cut in that moment would leave a file that never opens again.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Whoever makes it is alone: one that is renamed over one in use would take its turns with it.
        fcntl.flock(folder, fcntl.LOCK_EX)
        fresh = path / UNFINISHED
        _remove(fresh)
        if (path / "data.mdb").exists():
            return
        fresh.mkdir()
        env = lmdb.open(str(fresh), map_size=map_size_bytes, max_dbs=len(TABLES), lib_version=0)
        try:
            _settle_meta(env, {name: env.open_db(name.encode()) for name in TABLES}, path)
        finally:
            env.close()
        os.rename(fresh / "data.mdb", path / "data.mdb")
        _remove(fresh)
    finally:
        os.close(folder)


def _remove(fresh: Path) -> None:
    with suppress(FileNotFoundError):
        for name in os.listdir(fresh):
            (fresh / name).unlink()
        fresh.rmdir()


def _settle_meta(env: Any, tables: dict[str, Any], path: Path) -> bytes:
    """Write format and incarnation where there are none yet; whose the environment is."""
    with env.begin(write=True) as raw:
        transaction = Transaction(raw, tables)
        if transaction.get("meta", META_FORMAT) is None:
            transaction.put("meta", META_FORMAT, FORMAT_VERSION.to_bytes(4, "big"))
            _put_incarnation(transaction, os.urandom(16))
        return _incarnation(transaction, path)


def _incarnation(transaction: Transaction, path: Path) -> bytes:
    """Whose the environment is, once its format is known. Raises Corrupt NEWER_FORMAT or CORRUPT_HOT_ROW."""
    version = int.from_bytes(transaction.get("meta", META_FORMAT) or b"", "big")
    if version > FORMAT_VERSION:
        what = f"The hot tier in {path} has format {version}; this release reads {FORMAT_VERSION}."
        raise Corrupt("NEWER_FORMAT", what, {"path": str(path)})
    incarnation = unwrap(b"", "meta", transaction.get("meta", META_INCARNATION) or b"")
    if version != FORMAT_VERSION or len(incarnation) != 16:
        raise Corrupt("CORRUPT_HOT_ROW", f"The hot tier in {path} has no identity.", {"path": str(path)})
    return incarnation


def _put_incarnation(transaction: Transaction, incarnation: bytes) -> None:
    transaction.put("meta", META_INCARNATION, wrap(b"", "meta", incarnation))


def _settle(group: list[_Work]) -> None:
    loops: dict[Any, list[_Work]] = {}
    for work in group:
        if work.loop is None:
            work.settle.set()
        else:
            loops.setdefault(work.loop, []).append(work)
    for loop, works in loops.items():
        try:
            loop.call_soon_threadsafe(_settle_futures, works)
        except RuntimeError:  # the loop is closed: nobody waits any more
            continue


def _settle_futures(works: list[_Work]) -> None:
    for work in works:
        if work.settle.done():
            continue
        if work.error is not None:
            work.settle.set_exception(work.error)
        else:
            work.settle.set_result(work.result)


def _check_length(env: Any, file: int, path: Path) -> None:
    """Raises Corrupt HOT_TIER_TRUNCATED if the file lacks pages that its newest commit may refer to."""
    # The commit is looked at first: a live daemon beside us only makes the file longer.
    due_bytes = (int(env.info()["last_pgno"]) + 1) * int(env.stat()["psize"])
    found_bytes = os.fstat(file).st_size
    if found_bytes < due_bytes:
        raise Corrupt(
            "HOT_TIER_TRUNCATED",
            f"The file {path / 'data.mdb'} was cut: it has {found_bytes} bytes of {due_bytes}.",
            {"path": str(path), "bytes": str(found_bytes), "bytes_due": str(due_bytes)},
        )


def _errno(error: BaseException) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    if not isinstance(error, lmdb.Error):
        return 0
    text = str(error)
    for code in (errno.EIO, *_FULL, *_TOO_MANY_FILES, errno.ENOMEM, errno.EACCES, errno.EROFS):
        if os.strerror(code) in text:
            return code
    return 0


def _disk_full(path: Path) -> Exhausted:
    return Exhausted("DISK_FULL", f"The disk of {path} is full.", {"path": str(path)})


def _disk_failed(path: Path, error: Exception) -> Unavailable:
    return Unavailable("HOT_TIER_FAILED", f"The disk of {path} failed: {error}.", {"path": str(path)})


def _open_error(path: Path, error: Exception) -> SessiondError:
    code = _errno(error)
    where = {"path": str(path)}
    if code in _FULL:
        return _disk_full(path)
    if code == errno.EIO or isinstance(error, lmdb.PanicError):
        return _disk_failed(path, error)
    if code in _TOO_MANY_FILES:
        return Exhausted("TOO_MANY_FILES", f"The hot tier in {path} can't be opened: {error}.", where)
    if code == errno.ENOMEM:
        return Exhausted("OVERLOADED", f"The hot tier in {path} was given no memory: {error}.", where)
    denied = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
    if code in denied or isinstance(error, lmdb.ReadonlyError):
        return Denied(
            "UNWRITABLE_FOLDER", f"The folder {path} can't be written: {error}.", where, [("data_dir", str(error))]
        )
    if isinstance(error, lmdb.VersionMismatchError):
        return Corrupt("NEWER_FORMAT", f"The hot tier in {path} is of another LMDB version: {error}.", where)
    if isinstance(error, OSError):
        return Denied(
            "UNWRITABLE_FOLDER", f"The folder {path} can't be used: {error}.", where, [("data_dir", str(error))]
        )
    return Corrupt("CORRUPT_HOT_ROW", f"The hot tier in {path} can't be opened: {error}.", where)
