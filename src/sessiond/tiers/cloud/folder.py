"""A folder as an object store: of several racing conditional writes exactly one wins, and a finished write is on disk.

It never stands on a network filesystem, never makes its root again once it is open, and never says that an object is
absent when it is the folder that is gone.

Layout below the root, beside the objects themselves:

    .locks/00 .. 3f   one file per shard of the keys; its flock covers etag check, fsync, rename and directory fsync
    .tmp/<shard>-*    bodies on their way in; valid only while that shard's lock is held

Rules:

1. Whoever changes a name holds the flock of the key's shard from the etag check until the directory is fsynced.
   Check-then-rename without it lost 9,532 of 24,206 updates (DESIGN.md, "The cloud tier and ownership").
2. A temp of a shard whose lock is free is left over from a crash. So it can be told from a live one without asking for
   process ids, which mean nothing across containers.
3. Before a name changes, its folder is noted in the lock file, and the note is emptied after the folder's fsync. A note
   that is found means that somebody was killed in between: what he wrote is visible but perhaps not on disk, so the
   next holder fsyncs that folder first. The note needs no fsync: after a power loss the visible is the durable.
4. Readers take no lock: files are replaced by rename and never changed, so a reader has one whole version.
5. After a failed fsync the kernel may have dropped the pages, and a second fsync would lie. Nothing more is written
   through this store until it is opened again, and a key whose rename is in doubt is not read either.
6. Folders are never removed: another process may count on their names being on disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

from sessiond import errors
from sessiond.tiers.cloud.keys import COMPONENT, check_key, check_prefix, check_range
from sessiond.tiers.cloud.store import (
    Ambiguous,
    BucketMissing,
    Listed,
    ObjectNotFound,
    ObjectStore,
    PreconditionLost,
    Stored,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from sessiond.tiers.local_disk import refuse_network, settle_names

# Part of the layout: releases that share a folder have to agree on which lock guards a key.
SHARDS = 64
# Longer than two fsyncs take on any disk that still works; a stopped holder must not hang the whole node.
LOCK_WAIT_MS = 10_000
LOCK_POLL_MS_MAX = 5
# Folders that this process knows to be on disk; forgetting one costs one extra fsync.
DURABLE_FOLDERS_MAX = 8_192
ETAG_BYTES = 16

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_REFUSED = (errno.EACCES, errno.EPERM)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class _FsyncFailed(Exception):
    """What was written may or may not be on disk; the store has stopped writing."""


class FolderStore(ObjectStore):
    """The object store in a folder of a local disk, for any number of threads and processes at once.

    root is made if it is absent. An etag is the hex of blake2b-16 of the content, so that writing the same bytes again
    changes nothing that If-Match could see. A key cannot also be a folder of
    another key, as it can on S3: such a put raises StoreDenied. A put or delete waits at most lock_wait_ms for others
    on the same shard. An object that is replaced during a listing can be missed by it on tmpfs and btrfs, never on
    ext4 and xfs.

    Raises Invalid NETWORK_FILESYSTEM, Denied UNWRITABLE_FOLDER, Exhausted DISK_FULL or TOO_MANY_FILES, Unavailable
    STORE_UNAVAILABLE.
    """

    def __init__(self, root: Path, *, lock_wait_ms: int = LOCK_WAIT_MS) -> None:
        self._root = os.path.realpath(root)
        self._locks = os.path.join(self._root, ".locks")
        self._temps = os.path.join(self._root, ".tmp")
        self._lock_wait_ms = lock_wait_ms
        # Threads queue here, so that only processes have to poll for the flock.
        self._queues = tuple(threading.Lock() for _ in range(SHARDS))
        self._durable = {self._root}
        self._broken = ""
        self._doubtful: set[str] = set()
        self.url = Path(self._root).as_uri()
        refuse_network(self._root, "cloud")
        try:
            self._lay_out()
            self._clear_leftovers()
        except OSError as error:
            raise self._unopened(error) from error

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        """Read the file whole, without a lock; also for a range, whose etag is the whole object's."""
        check_key(key)
        span = check_range(first_byte, last_byte)
        if key in self._doubtful:
            raise StoreUnavailable(key, self._broken)
        try:
            body = _read(self._path(key))
        except _ABSENT as error:
            raise self._root_gone(key) or ObjectNotFound(key, "no such file") from error
        except OSError as error:
            raise self._explain(key, error) from error
        # 4 MiB, the largest object, are hashed in 4 ms.
        return Stored(body[span] if span else body, _etag(body))

    def put(self, key: str, body: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """One flock, an fsync of the file, a rename, an fsync of its folder; one more where the folder is new to us."""
        check_key(key)
        if if_absent and if_match is not None:
            raise ValueError("a put has at most one condition")
        path = self._path(key)
        folder = os.path.dirname(path)
        shard = _shard(key)
        with self._locked(key, shard) as lock:
            self._require(key, path, if_absent, if_match)
            try:
                self._make_folder(folder)
                with self._temp(shard, body) as temp, self._noted(lock, key, folder):
                    os.rename(temp, path)
            except _FsyncFailed as failed:
                raise Ambiguous(key, self._broken) from failed
        return _etag(body)

    def delete(self, key: str) -> None:
        """Unlink the file and fsync its folder, which stays."""
        check_key(key)
        path = self._path(key)
        with self._locked(key, _shard(key)) as lock:
            try:
                # The folder is fsynced even if the file is absent: an earlier attempt may have got just so far.
                with self._noted(lock, key, os.path.dirname(path)), suppress(*_ABSENT):
                    os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return  # not even the folder is there; the root is, or there would be no lock
            except _FsyncFailed as failed:
                raise StoreUnavailable(key, self._broken) from failed

    def list(self, prefix: str, start_after: str = "", limit: int = 1000) -> Iterator[Listed]:
        """Read the folders that the prefix and start_after leave, and no others; sizes only of the rows returned."""
        check_prefix(prefix)
        if limit < 1:
            raise ValueError(f"a listing needs a limit of at least 1, not {limit}")
        return self._rows(prefix, start_after, limit)

    def close(self) -> None:
        """Nothing is held open between calls."""

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _lock_path(self, shard: int) -> str:
        return f"{self._locks}/{shard:02x}"

    # Opening

    def _lay_out(self) -> None:
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        for folder in (self._locks, self._temps):
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
        for shard in range(SHARDS):
            os.close(os.open(self._lock_path(shard), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._marker = _identity(os.stat(self._locks))
        # A folder that can only be read shows it here and not at the first put. A full disk may be opened all the
        # same: what it holds can still be read.
        trial = self._new_temp_path(0)
        try:
            os.close(_create(trial))
            with suppress(FileNotFoundError):
                os.unlink(trial)
        except OSError as error:
            if error.errno not in _FULL:
                raise
        settle_names(self._root)

    def _clear_leftovers(self) -> None:
        """Remove the temps and settle the notes of the killed; shards locked by the living are left alone."""
        temps: dict[int, list[str]] = {}
        for name in os.listdir(self._temps):
            if named := re.fullmatch(r"([0-9a-f]{2})-[0-9a-f]+", name):
                temps.setdefault(int(named[1], 16), []).append(f"{self._temps}/{name}")
        for shard in range(SHARDS):
            if shard not in temps and not os.stat(self._lock_path(shard)).st_size:
                continue
            lock = os.open(self._lock_path(shard), os.O_RDWR | os.O_CLOEXEC)
            try:
                if _flocked(lock):
                    self._settle(lock)
                    for temp in temps.get(shard, ()):
                        with suppress(FileNotFoundError):
                            os.unlink(temp)
            finally:
                os.close(lock)

    def _unopened(self, error: OSError) -> errors.SessiondError:
        why = error.strerror or type(error).__name__
        message = f"The cloud tier's folder {self._root} can't be opened: {why}."
        metadata = {"folder": self._root}
        if error.errno in (*_REFUSED, *_NO_FOLDER, errno.EROFS):
            return errors.Denied("UNWRITABLE_FOLDER", message, metadata, [("cloud", why)])
        if error.errno in _FULL:
            return errors.Exhausted("DISK_FULL", message, metadata)
        if error.errno in _TOO_MANY_FILES:
            return errors.Exhausted("TOO_MANY_FILES", message, metadata)
        return errors.Unavailable("STORE_UNAVAILABLE", message, metadata)

    # Writing

    @contextmanager
    def _locked(self, key: str, shard: int) -> Iterator[int]:
        """The shard's lock file with its flock held. An OSError inside leaves as what it means to the caller."""
        deadline = time.monotonic() + self._lock_wait_ms / 1000
        late = f"lock {shard:02x} of {self._root} was not free within {self._lock_wait_ms} ms; nothing was written"
        queue = self._queues[shard]
        if not queue.acquire(timeout=self._lock_wait_ms / 1000):
            raise StoreUnavailable(key, late)
        lock = -1
        try:
            if self._broken:
                raise StoreUnavailable(key, self._broken)
            lock = os.open(self._lock_path(shard), os.O_RDWR | os.O_CLOEXEC)
            pause_ms = 0.5
            while not _flocked(lock):
                if time.monotonic() >= deadline:
                    raise StoreUnavailable(key, late)
                time.sleep(pause_ms / 1000)
                pause_ms = min(2 * pause_ms, LOCK_POLL_MS_MAX)
            if gone := self._root_gone(key):
                raise gone
            held = os.fstat(lock)
            if not held.st_nlink:
                # Others may lock a new file of this name: the one that is held here excludes nobody.
                raise StoreUnavailable(key, f"lock {shard:02x} of {self._root} was removed; nothing was written")
            if held.st_size:
                self._settle(lock)
            yield lock
        except OSError as error:
            raise self._explain(key, error) from error
        finally:
            if lock >= 0:
                # The close alone would not do: a child between fork and exec holds the same open file. Neither may
                # fail a write that is done.
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_UN)
                with suppress(OSError):
                    os.close(lock)
            queue.release()

    def _settle(self, lock: int) -> None:
        """Fsync the folder that a killed holder of this lock noted, then empty the note (rule 3)."""
        note = os.pread(lock, os.fstat(lock).st_size, 0)
        folder = os.path.join(self._root, os.fsdecode(note))
        # The note is never fsynced: a power cut may leave zeros in its place, or a piece of it, which names no folder
        # or one whose fsync does no harm. What it stood for is on disk then, or was never visible.
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            at = _open_folder(folder)
            try:
                os.fsync(at)
            except OSError as error:
                self._stop_writing(folder, error)
                raise
            finally:
                os.close(at)
        os.ftruncate(lock, 0)

    @contextmanager
    def _noted(self, lock: int, key: str, folder: str) -> Iterator[None]:
        """Whatever is done to the key's name inside is on disk afterwards. Raises _FsyncFailed where that is unknown.

        The folder is opened first, so that after the change of name nothing but the fsync itself can fail.
        """
        at = _open_folder(folder)
        try:
            os.pwrite(lock, os.path.relpath(folder, self._root).encode(), 0)
            yield
            try:
                os.fsync(at)
            except OSError as error:
                self._doubtful.add(key)
                raise self._stop_writing(folder, error) from error
        finally:
            with suppress(OSError):
                os.close(at)
        with suppress(OSError):  # a note too many costs an fsync, and the write is done
            os.ftruncate(lock, 0)

    def _require(self, key: str, path: str, if_absent: bool, if_match: str | None) -> None:
        if if_match is not None:
            try:
                found = _etag(_read(path))
            except _ABSENT as error:
                raise PreconditionLost(key, "there is no object to match") from error
            if found != if_match:
                raise PreconditionLost(key, f"the object's etag is {found}, not {if_match}")
        elif if_absent:
            with suppress(FileNotFoundError, NotADirectoryError):
                # A folder is no object; the rename finds out.
                if not stat.S_ISDIR(os.stat(path).st_mode):
                    raise PreconditionLost(key, "the object exists")

    def _make_folder(self, folder: str) -> None:
        """Make the folder and see to it that its name is on disk; never the root.

        One that is there already is not for that reason on disk: its maker may not have come to the fsync yet.
        """
        if folder in self._durable:
            return
        parent = os.path.dirname(folder)
        self._make_folder(parent)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        at = _open_folder(parent)
        try:
            self._fsync(at, parent)
        finally:
            os.close(at)
        if len(self._durable) >= DURABLE_FOLDERS_MAX:
            self._durable = {self._root}
        self._durable.add(folder)

    @contextmanager
    def _temp(self, shard: int, body: bytes) -> Iterator[str]:
        """A file with the body, on disk and not yet under its name; gone afterwards unless it was renamed."""
        temp = self._new_temp_path(shard)
        out = _create(temp)
        try:
            try:
                rest = memoryview(body)
                while rest:
                    rest = rest[os.write(out, rest) :]
                self._fsync(out, temp)
            finally:
                os.close(out)
            yield temp
        except BaseException:
            with suppress(OSError):
                os.unlink(temp)
            raise

    def _new_temp_path(self, shard: int) -> str:
        return f"{self._temps}/{shard:02x}-{secrets.token_hex(8)}"

    def _fsync(self, descriptor: int, name: str) -> None:
        """For what comes before the change of name, where a full disk is a plain error: nothing was written."""
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise self._stop_writing(name, error) from error

    def _stop_writing(self, name: str, error: OSError) -> _FsyncFailed:
        self._broken = (
            f"fsync of {name} failed: {error.strerror}; nothing more is written to {self._root} until the daemon is "
            f"restarted on a sound disk"
        )
        return _FsyncFailed(self._broken)

    # Listing

    def _rows(self, prefix: str, start_after: str, limit: int) -> Iterator[Listed]:
        left = limit
        try:
            for key in self._walk(prefix[: prefix.rfind("/") + 1], prefix, start_after):
                try:
                    size_bytes = os.stat(self._path(key)).st_size
                except FileNotFoundError:
                    continue  # deleted meanwhile
                yield Listed(key, size_bytes)
                left -= 1
                if not left:
                    return
        except OSError as error:
            raise self._explain(prefix, error) from error
        # Asked last, because only the end of a listing says that there is nothing more.
        if gone := self._root_gone(prefix):
            raise gone

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[str]:
        """Keys in the folder ('' or 'a/b/') and below, in the byte order of whole keys.

        A folder sorts as 'name/', so that 'a-b' comes before 'a/b' and 'a0' after it.
        """
        names = []
        try:
            with os.scandir(self._path(folder)) as entries:
                for entry in entries:
                    if not COMPONENT.fullmatch(entry.name) or (not folder and entry.name.startswith(".")):
                        continue  # not an object: lost+found, or our own files
                    if entry.is_dir(follow_symlinks=False):
                        name = f"{folder}{entry.name}/"
                        wanted = name > start_after or start_after.startswith(name)
                    else:
                        name = folder + entry.name
                        wanted = name > start_after
                    if wanted and name.startswith(prefix):
                        names.append(name)
        except (FileNotFoundError, NotADirectoryError):
            return
        names.sort()
        for name in names:
            if name.endswith("/"):
                yield from self._walk(name, prefix, start_after)
            else:
                yield name

    # What an error means

    def _root_gone(self, key: str) -> StoreError | None:
        """BucketMissing unless the root is still the folder that was opened.

        An empty mount point, or a folder that somebody else made in its place, holds none of our objects; to say
        that they do not exist would be a lie.
        """
        try:
            found = _identity(os.stat(self._locks))
        except (FileNotFoundError, NotADirectoryError):
            return BucketMissing(key, f"{self._root} is gone, or is no longer a store")
        except OSError as error:
            return StoreUnavailable(key, f"{self._root} can't be read: {error.strerror}")
        if found != self._marker:
            return BucketMissing(key, f"{self._root} is another folder than the one that was opened")
        return None

    def _explain(self, key: str, error: OSError) -> StoreError:
        """What an OSError means that was raised before any name changed: nothing was written."""
        detail = f"{error.strerror or error} ({self._root})"
        if error.errno in (errno.ENOENT, *_NO_FOLDER):
            # Somebody changed folders by hand: what was known of them is not known any more.
            self._durable = {self._root}
        if error.errno == errno.ENOENT:
            return self._root_gone(key) or StoreUnavailable(key, detail)
        if error.errno in _NO_FOLDER:
            return self._root_gone(key) or StoreDenied(key, f"the key collides with a folder or a file: {detail}")
        if error.errno in _REFUSED:
            return StoreDenied(key, detail)
        if error.errno in _FULL:
            return StoreUnavailable(key, f"the disk of {self._root} is full; nothing was written")
        if error.errno in _TOO_MANY_FILES:
            return StoreUnavailable(key, f"{detail}; raise the limit of open files")
        return StoreUnavailable(key, detail)


def _shard(key: str) -> int:
    return zlib.crc32(key.encode()) % SHARDS


def _etag(body: bytes) -> str:
    return blake2b(body, digest_size=ETAG_BYTES).hexdigest()


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _open_folder(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _flocked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
