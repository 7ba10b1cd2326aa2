"""One LMDB environment: opening it, its tables, and the group commit through which every write goes.

It promises that a write is answered after the fsync of the commit that holds it, and that a refused write leaves no
trace. It never holds a read transaction across a wait, and never assumes that this process is the only one here.

Tables (keys are bytes; h is a session's 16-byte hash; integers in keys are big-endian so that they sort):

    meta         format                     -> version of these tables (4)
                 incarnation                -> 16 random bytes: what owns sessions
                 store                      -> 16 bytes: the bucket that this hot tier belongs to
    heads        h                          -> Head row
    turns        h, first seq (8)           -> whole frames, at most ROW_BYTES_MAX unless one frame is larger
    ids          h, chunk (4)               -> 24-byte entries as in the manifest's turn_ids, 64 seqs a chunk
    checkpoints  h, version (8)             -> state bytes, the newest five
    manifests    h                          -> the manifest as last committed, without payload, state and turn ids
    users        tenant (16), user (16),
                 created ms (8), h          -> session id: the sessions of a user by age
    dirty        h                          -> when the session got turns that the cloud tier lacks, ms (8); then 1 if
                                               its newest exchange waits for an answer

Every value starts with CRC32C(h, table name, rest) in 4 bytes, but turns, whose frames carry their own; dirty, which
only says when to look; format and store, which are compared as a whole. Incarnation is checked with an empty h.
"""

from __future__ import annotations

import asyncio
import errno
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import lmdb

from sessiond.errors import Corrupt, Denied, Exhausted, Invalid, SessiondError, Unavailable
from sessiond.tiers.hot.rows import unwrap, wrap

FORMAT_VERSION: Final = 1
META_FORMAT: Final = b"format"
META_INCARNATION: Final = b"incarnation"
META_STORE: Final = b"store"
TABLES: Final = ("meta", "heads", "turns", "ids", "checkpoints", "manifests", "users", "dirty")
# Appends are refused above this share of the map; the rest is for flush and evict.
MAP_USED_MAX: Final = 0.85
# A queue longer than this means that the disk does not keep up.
QUEUE_MAX: Final = 16_384

Result = TypeVar("Result")


class Transaction:
    """One LMDB transaction with the tables at hand. Buffers read from it end with it."""

    __slots__ = ("lmdb", "tables")

    def __init__(self, transaction: Any, tables: dict[str, Any]) -> None:
        self.lmdb = transaction
        self.tables = tables

    def get(self, table: str, key: bytes) -> Any:
        """The value, or None."""
        return self.lmdb.get(key, db=self.tables[table])

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Write the value over what is there."""
        self.lmdb.put(key, value, db=self.tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        """Whether there was such a key."""
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


class Environment:
    """The node's LMDB environment, opened once per process."""

    def __init__(self, path: Path, map_size_bytes: int, readers_max: int, group_max: int) -> None:
        """Open or make it. Raises Denied UNWRITABLE_FOLDER, Corrupt NEWER_FORMAT or CORRUPT_HOT_ROW, DISK_FULL."""
        self.path = path
        self.group_max = group_max
        try:
            path.mkdir(parents=True, exist_ok=True)
            # lib_version=0 lets the binding take whatever data version its LMDB writes; see py-lmdb 3.
            self._env = lmdb.open(
                str(path),
                map_size=map_size_bytes,
                max_dbs=len(TABLES),
                max_readers=readers_max,
                sync=True,
                metasync=True,
                writemap=False,
                lock=True,
                lib_version=0,
            )
        except (OSError, lmdb.Error) as error:
            raise _open_error(path, error) from error
        self._env.reader_check()
        self.commits = self.appends = self.group_size_max = 0
        self.failed: SessiondError | None = None
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        try:
            self._tables = {name: self._env.open_db(name.encode()) for name in TABLES}
            self.incarnation = self._settle_meta()
        except lmdb.Error as error:
            self._env.close()
            raise _open_error(path, error) from error
        except BaseException:
            self._env.close()
            raise
        self._thread = threading.Thread(target=self._commit_loop, name="commit", daemon=True)
        self._thread.start()

    def _settle_meta(self) -> bytes:
        with self._env.begin(write=True) as raw:
            transaction = Transaction(raw, self._tables)
            version = transaction.get("meta", META_FORMAT)
            if version is None:
                transaction.put("meta", META_FORMAT, FORMAT_VERSION.to_bytes(4, "big"))
                _put_incarnation(transaction, os.urandom(16))
            return _incarnation(transaction, self.path)

    def bind_store(self, store_id: bytes) -> None:
        """Tie this hot tier to its bucket at first use. Raises Invalid WRONG_STORE if it is tied to another."""

        def operation(transaction: Transaction) -> None:
            known = transaction.get("meta", META_STORE)
            if known is None:
                transaction.put("meta", META_STORE, store_id)
            elif bytes(known) != store_id:
                raise Invalid(
                    "WRONG_STORE",
                    f"The hot tier in {self.path} belongs to store {bytes(known).hex()}, not to {store_id.hex()}.",
                    {"path": str(self.path)},
                )

        self.run_blocking(operation)

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A read transaction; its buffers are memoryviews that end with it."""
        if self.failed is not None:
            raise self.failed
        try:
            raw = self._env.begin(buffers=True)
        except lmdb.ReadersFullError as error:
            raise Exhausted("OVERLOADED", "The hot tier has no free reader slot.") from error
        try:
            yield Transaction(raw, self._tables)
        finally:
            raw.abort()

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
        """Do one write in the next group; returns what it returned, after the fsync. Raises what it raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._submit(_Work(operation, loop, future, weight_bytes))
        return cast(Result, await future)

    def run_blocking(self, operation: Callable[[Transaction], Result], weight_bytes: int = 0) -> Result:
        """The same for a thread that may wait."""
        done = threading.Event()
        work = _Work(operation, None, done, weight_bytes)
        self._submit(work)
        done.wait()
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

    def _commit_loop(self) -> None:
        while True:
            work = self._queue.get()
            if work is None:
                return
            group = [work]
            weight_bytes = work.weight_bytes
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
            self._commit(group)
            _settle(group)

    def _commit(self, group: list[_Work]) -> None:
        """One transaction for the group; if something unforeseen breaks it, each alone, so that none spoils another."""
        if self.failed is not None:
            for work in group:
                work.error = self.failed
            return
        try:
            with self._env.begin(write=True) as raw:
                transaction = Transaction(raw, self._tables)
                for work in group:
                    try:
                        work.result = work.operation(transaction)
                    except SessiondError as refused:
                        # Operations check before they write: a refusal has written nothing.
                        work.error = refused
        except Exception as error:
            failure = self._write_error(error)
            if isinstance(failure, SessiondError) and failure.reason == "HOT_TIER_FAILED":
                # Nothing is retried over a failed fsync.
                for work in group:
                    work.result, work.error = None, failure
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

    def _write_error(self, error: Exception) -> BaseException:
        if isinstance(error, lmdb.MapFullError):
            return Exhausted("HOT_TIER_FULL", "The hot tier's map is full.")
        code = _errno(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            return Exhausted("DISK_FULL", f"The disk of {self.path} is full.", {"path": str(self.path)})
        if code == errno.EIO:
            # After a failed fsync nobody knows what is on the disk: nothing is retried over it.
            self.failed = Unavailable("HOT_TIER_FAILED", f"The disk of {self.path} failed: {error}.")
            return self.failed
        if isinstance(error, lmdb.Error):
            return Corrupt("CORRUPT_HOT_ROW", f"The hot tier in {self.path} refused a write: {error}.")
        return error

    def used_bytes(self) -> tuple[int, int]:
        """(bytes of the map in use, bytes of the map)."""
        info = self._env.info()
        return int((info["last_pgno"] + 1) * self._env.stat()["psize"]), int(info["map_size"])

    def readers(self) -> int:
        """Reader slots in use, by any process."""
        self._env.reader_check()
        return max(0, len(str(self._env.readers()).splitlines()) - 1)

    def is_full(self) -> bool:
        """Whether appends must be refused so that flush and evict keep room."""
        used, size = self.used_bytes()
        return used > size * MAP_USED_MAX

    def close(self) -> None:
        """Finish what is queued and close. Nothing is accepted afterwards."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        self._env.close()


class Reader:
    """An environment opened to read only, beside a daemon or without one. It never makes or changes anything."""

    def __init__(self, path: Path) -> None:
        """Raises Denied UNWRITABLE_FOLDER, Corrupt NEWER_FORMAT or CORRUPT_HOT_ROW."""
        try:
            self._env = lmdb.open(
                str(path), readonly=True, create=False, max_dbs=len(TABLES), max_readers=1024, lock=True, lib_version=0
            )
            self._tables = {name: self._env.open_db(name.encode(), create=False) for name in TABLES}
        except (OSError, lmdb.Error) as error:
            raise _open_error(path, error) from error
        try:
            with self.read() as transaction:
                self.incarnation = _incarnation(transaction, path)
        except BaseException:
            self._env.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A read transaction, as Environment.read."""
        raw = self._env.begin(buffers=True)
        try:
            yield Transaction(raw, self._tables)
        finally:
            raw.abort()

    def close(self) -> None:
        """Close it."""
        self._env.close()


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


def _errno(error: BaseException) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    text = str(error)
    for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS):
        if os.strerror(code) in text:
            return code
    return 0


def _open_error(path: Path, error: Exception) -> SessiondError:
    code = _errno(error)
    where = {"path": str(path)}
    if code == errno.ENOSPC:
        return Exhausted("DISK_FULL", f"The disk of {path} is full.", where)
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
