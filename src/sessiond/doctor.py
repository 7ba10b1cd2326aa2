"""`sessiond doctor`: tries by hand everything that a daemon's start and its life depend on, one check after the other.

It promises that each result says what was seen and what to do, that one failure does not hide the next, and that it
works beside a running daemon. It changes nothing but its own probe objects and files, which it removes.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import resource
import secrets
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sessiond import core
from sessiond.client.failures import failure_of
from sessiond.config import Settings
from sessiond.core import envelope
from sessiond.errors import (
    Corrupt,
    Denied,
    Exhausted,
    Invalid,
    NotFound,
    SessiondError,
    Unavailable,
)
from sessiond.neighbours import DAMAGED, RENEWED, STILL, Neighbour, ask, neighbours
from sessiond.tiers.cloud.bucket import BUCKET_KEY, Bucket, lease_key, open_bucket, start_refusal
from sessiond.tiers.cloud.lease import is_alive, process_identity
from sessiond.tiers.cloud.open import folder_of, open_configured
from sessiond.tiers.cloud.probe import probe
from sessiond.tiers.cloud.s3 import S3Store
from sessiond.tiers.cloud.store import BucketMissing, ObjectNotFound, ObjectStore, StoreDenied, StoreError
from sessiond.tiers.hot.datafile import DATA_FILE, check_file, in_use
from sessiond.tiers.hot.environment import MAP_USED_MAX, META_STORE, Reader
from sessiond.tiers.hydrate import Node
from sessiond.tiers.local_disk import refuse_network
from sessiond.tokens import Tokenizer
from sessiond.transport.peers import Credentials, node_key
from sessiond.v1 import admin_pb2, admin_pb2_grpc

PASS: Final = "PASS"
WARN: Final = "WARN"
FAIL: Final = "FAIL"

# Below this a hot tier can hold next to nothing, and LMDB may not even begin a commit.
FREE_BYTES_MIN: Final = 64 * 1024**2
# An append is one such write; slower ones are felt by every caller.
FSYNC_SLOW_MS: Final = 50.0
STORE_SLOW_MS: Final = 500.0
FSYNC_ROUNDS: Final = 5
STORE_ROUNDS: Final = 3
PROBE_BYTES: Final = 4096
# What a daemon opens besides connections: LMDB, listeners, the store's pool, logs.
FILES_OWN: Final = 256
DAEMON_WAIT_S: Final = 3.0
# Renewals stamped by clocks this far apart still make sense to whoever reads the objects' dates.
CLOCK_APART_MS: Final = 30_000
# What lies under these is the only copy of history.
HISTORY: Final = ("m/", "s/", "o/", "b/")
# Without these a session is not found again: by its name, by its user, or by the day on which it expires.
NAMES: Final = (BUCKET_KEY, "u/", "x/")
LEASES: Final = "n/"
# A node that was away for less must still find its lease; docs/s3.md has a rule of 90 days.
LEASE_DAYS_MIN: Final = 30
CREDENTIALS: Final = (
    "Give the daemon credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role of the machine."
)
ENDPOINT: Final = "Check --s3-endpoint, DNS and the firewall."
# More are counted, not named.
NODES_SHOWN: Final = 12
PROBE_PREFIX: Final = "probe/doctor-"


@dataclass(frozen=True, slots=True)
class Check:
    """One result. outcome: PASS, WARN or FAIL. error: the refusal that a daemon would end with, of a FAIL."""

    name: str
    outcome: str
    seen: str
    remedy: str = ""
    error: SessiondError | None = None


def passed(name: str, seen: str) -> Check:
    """A check that found nothing to do."""
    return Check(name, PASS, seen)


def warned(name: str, seen: str, remedy: str) -> Check:
    """A check that found something that a daemon can live with."""
    return Check(name, WARN, seen, remedy)


def failed(name: str, error: SessiondError, remedy: str = "") -> Check:
    """A check that found what keeps a daemon from starting, or from keeping its promises."""
    return Check(name, FAIL, error.message, remedy or error.remedy, error)


def examine(settings: Settings) -> Iterator[Check]:
    """Every check, as its result becomes known. Raises nothing: what goes wrong is a result."""
    yield _core()
    yield _vocabularies()
    yield from _data_dir(settings)
    yield from _hot_tier(settings)
    yield _file_descriptors(settings)
    yield _listen(settings)
    if settings.unix_socket:
        yield _unix_socket(settings)
    if settings.workers:
        yield _workers(settings)
    yield from _cloud_tier(settings)


# The installation -----------------------------------------------------------------------------------------------------


def _core() -> Check:
    name = "compiled core"
    # The check value of CRC-32C, RFC 3720 B.4 in other words: of the nine digits.
    if core.crc32c(b"123456789") != 0xE3069283:
        return failed(name, Corrupt("INTERNAL", "The core computes a wrong CRC32C."), "Install sessiond again.")
    if not core.COMPILED:
        return warned(name, "the pure twin is in use, many times slower", "Unset SESSIOND_PURE.")
    return passed(name, "it loads and computes what it should")


def _vocabularies() -> Check:
    name = "vocabularies"
    try:
        Tokenizer().verify_vocabularies()
    except SessiondError as error:
        return failed(name, error)
    return passed(name, "both are as they were packed")


# The disk -------------------------------------------------------------------------------------------------------------


def _data_dir(settings: Settings) -> Iterator[Check]:
    name = "data folder"
    folder = Path(settings.data_dir).absolute()
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    what = f"{folder} is there" if place == folder else f"{folder} can be made in {place}"
    try:
        refuse_network(str(settings.hot_dir), "data_dir")
        times_ms = _timed_writes(place)
    except SessiondError as error:
        yield failed(name, error)
        return
    except OSError as error:
        why = error.strerror or type(error).__name__
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind: SessiondError = (
            Exhausted("DISK_FULL", f"The disk of {place} is full.")
            if full
            else Denied("UNWRITABLE_FOLDER", f"{place} can't be written: {why}.")
        )
        yield failed(name, kind)
        return
    yield passed(name, f"{what}, on a local disk, and can be written")
    yield _free_space(settings, place)
    typical = statistics.median(times_ms)
    seen = f"{typical:.1f} ms for {PROBE_BYTES} bytes, {max(times_ms):.1f} ms at worst of {FSYNC_ROUNDS}"
    if typical > FSYNC_SLOW_MS:
        yield warned("write and fsync", seen, "Every append waits for one of these: put data_dir on a faster disk.")
    else:
        yield passed("write and fsync", seen)


def _timed_writes(folder: Path) -> list[float]:
    path = folder / f".sessiond-doctor-{secrets.token_hex(8)}"
    times_ms = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(FSYNC_ROUNDS):
            begun = time.perf_counter()
            os.write(descriptor, bytes(PROBE_BYTES))
            os.fsync(descriptor)
            times_ms.append((time.perf_counter() - begun) * 1000)
    finally:
        os.close(descriptor)
        path.unlink()
    return times_ms


def _free_space(settings: Settings, place: Path) -> Check:
    name = "free space"
    free = shutil.disk_usage(place).free
    held = 0
    with contextlib.suppress(OSError):
        held = os.stat(settings.hot_dir / DATA_FILE).st_blocks * 512
    room = max(0, settings.map_size_bytes - held)
    seen = f"{free:,} bytes free; the map may grow by {room:,}"
    if free < FREE_BYTES_MIN:
        return failed(name, Exhausted("DISK_FULL", f"{place} has {free:,} bytes free, less than {FREE_BYTES_MIN:,}."))
    if free < room:
        return warned(name, seen, "Lower map_size_bytes or free space, so that the map fills before the disk does.")
    return passed(name, seen)


def _hot_tier(settings: Settings) -> Iterator[Check]:
    name = "hot tier"
    path = settings.hot_dir
    if not (path / DATA_FILE).exists():
        yield passed(name, f"{path} is not there; the first start makes it")
        return
    try:
        check_file(path)
        reader = Reader(path)
    except SessiondError as error:
        yield failed(name, error)
        return
    try:
        with reader.read() as transaction:
            sessions, dirty = transaction.entries("heads"), transaction.entries("dirty")
            bound = bytes(transaction.get("meta", META_STORE) or b"").hex()
        used, readers = reader.used_bytes(), reader.readers()
    finally:
        reader.close()
    owner = "a process has it open" if in_use(path) else "nobody has it open"
    yield passed(
        name, f"incarnation {reader.incarnation.hex()} of store {bound or '(none yet)'}, {sessions} sessions; {owner}"
    )
    share = used / settings.map_size_bytes
    seen = f"{used:,} of {settings.map_size_bytes:,} bytes ({share:.0%}), {dirty} sessions not flushed"
    if share > MAP_USED_MAX:
        full = Exhausted("HOT_TIER_FULL", f"The hot tier uses {seen}.")
        yield failed("map", full)
    elif share > MAP_USED_MAX / 2:
        yield warned("map", seen, "Raise map_size_bytes before appends are refused.")
    else:
        yield passed("map", seen)
    if readers > settings.readers_max / 2:
        remedy = "Raise readers_max, or end the processes that read this hot tier."
        yield warned("reader slots", f"{readers} of {settings.readers_max} are taken", remedy)
    else:
        yield passed("reader slots", f"{readers} of {settings.readers_max} are taken")


# This machine ---------------------------------------------------------------------------------------------------------


def _file_descriptors(settings: Settings) -> Check:
    name = "open files"
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    wanted = settings.concurrent_calls_max + FILES_OWN
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} may be open"
    if soft != resource.RLIM_INFINITY and soft < FILES_OWN:
        error = Exhausted("OVERLOADED", f"Only {soft} files may be open; the daemon alone takes up to {FILES_OWN}.")
        return failed(name, error, f"Raise the limit: LimitNOFILE={wanted}, or ulimit -n {wanted}.")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        remedy = f"Raise it (LimitNOFILE={wanted}), or lower concurrent_calls_max: each caller may take one."
        return warned(name, f"{limit}; {wanted:,} are wanted for {settings.concurrent_calls_max:,} calls", remedy)
    return passed(name, limit)


def _listen(settings: Settings) -> Check:
    """Whether the address is free, or taken by a daemon that serves this very data folder."""
    name = "listen address"
    trouble = _listen_trouble(settings.listen)
    if trouble is None:
        return passed(name, f"{settings.listen} is free")
    if trouble != errno.EADDRINUSE:
        # What a start says of it has the same reason.
        error = Unavailable("PORT_IN_USE", f"{settings.listen} can't be listened on: {_WHY_NOT.get(trouble, trouble)}.")
        return failed(name, error, "Correct --listen: an address of this machine, or 0.0.0.0, and a port above 1023.")
    found = _daemon_at(settings.listen)
    if found is None:
        error = Unavailable("PORT_IN_USE", f"{settings.listen} is taken by something that is no sessiond.")
        return failed(name, error)
    if isinstance(found, SessiondError):
        if found.reason == "NODE_STARTING":
            # Which node it is of it does not know before its bucket answers.
            seen = f"this node's daemon on {settings.listen} is not ready: {found.message.rstrip('.')}"
            remedy = (
                "Mend what the checks of the cloud tier say, and it goes on; if it is another node's, change --listen."
            )
            return warned(name, seen, remedy)
        return warned(name, f"a sessiond on {settings.listen} refuses its status: {found.message}", found.remedy)
    health, status = found
    if Path(status.hot.path) != settings.hot_dir:
        error = Unavailable(
            "PORT_IN_USE", f"{settings.listen} is taken by the daemon of node {status.node!r} on {status.hot.path}."
        )
        return failed(name, error)
    seen = f"this node's daemon {status.version} serves on {settings.listen}"
    if health != health_pb2.HealthCheckResponse.SERVING:
        phase = admin_pb2.NodePhase.Name(status.phase).removeprefix("NODE_PHASE_").lower()
        return warned(name, f"{seen}, and is not ready: {phase}", "Read sessiond stats and the daemon's log.")
    if not status.cloud.reachable:
        return warned(name, f"{seen}, and has no cloud tier: {status.cloud.last_error}", "See the checks below.")
    return passed(name, f"{seen} and is ready")


def _unix_socket(settings: Settings) -> Check:
    """Whether a socket can be made there, or this node's daemon listens on it."""
    name, path = "unix socket", Path(settings.unix_socket)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        error = Unavailable("PORT_IN_USE", f"There can be no socket in {path.parent}: it is no folder to write in.")
        return failed(name, error, "Make the folder, for the daemon's user.")
    if _listen_trouble(f"unix:{path}") is not None:
        found = _daemon_at(f"unix:{path}")
        if isinstance(found, tuple) and Path(found[1].hot.path) == settings.hot_dir:
            return passed(name, f"this node's daemon serves on {path}")
        return failed(name, Unavailable("PORT_IN_USE", f"{path} is taken by something else."), "Name another path.")
    if path.exists() and not path.is_socket():
        return failed(name, Unavailable("PORT_IN_USE", f"{path} is a file that is no socket."), "Name another path.")
    return passed(name, f"{path} is free")


def _workers(settings: Settings) -> Check:
    """Whether there are cores for the processes that are asked for."""
    cores = len(os.sched_getaffinity(0))
    seen = f"{settings.workers} beside the daemon's own process, on {cores} cores"
    if settings.workers > cores:
        return warned("workers", seen, "More than there are cores only cost memory: lower workers.")
    return passed("workers", seen)


_WHY_NOT: Final = {
    errno.EADDRNOTAVAIL: "it is not an address of this machine",
    errno.EACCES: "this user may not take that port",
}


def _listen_trouble(listen: str) -> int | None:
    """The errno that keeps a daemon from listening there; None if nothing does."""
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:").removeprefix("//")
        with socket.socket(socket.AF_UNIX) as trial:
            return errno.EADDRINUSE if trial.connect_ex(path) == 0 else None
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        places = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return errno.EADDRNOTAVAIL
    found = set()
    for family, kind, number, _, address in places:
        try:
            with socket.socket(family, kind, number) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
                trial.listen(1)
        except OSError as error:
            found.add(error.errno or errno.EADDRNOTAVAIL)
        else:
            found.add(0)
    if errno.EADDRINUSE in found:
        return errno.EADDRINUSE
    # One of a name's addresses is enough to be reached.
    return None if 0 in found else min(found)


def _daemon_at(listen: str) -> tuple[int, admin_pb2.GetStatusResponse] | SessiondError | None:
    """(its readiness, its status) if a sessiond answers there, or how it refuses to tell; None if none answers."""
    host, _, port = listen.rpartition(":")
    address = f"localhost:{port}" if host in ("0.0.0.0", "[::]") else listen
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            health = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="readiness"), timeout=DAEMON_WAIT_S
            )
        except grpc.RpcError:
            return None
        try:
            status = admin_pb2_grpc.AdminServiceStub(channel).GetStatus(
                admin_pb2.GetStatusRequest(), timeout=DAEMON_WAIT_S
            )
        except grpc.RpcError as error:
            return failure_of(error, listen).error
    return health.status, status


# The cloud tier -------------------------------------------------------------------------------------------------------


def _cloud_tier(settings: Settings) -> Iterator[Check]:
    name = "cloud tier"
    url = settings.cloud_url
    with contextlib.ExitStack() as opened:
        try:
            missing = _missing_folder(url)
            if missing is not None:
                # Opening a folder makes it. What can be known without it is known from one beside it.
                place = opened.enter_context(tempfile.TemporaryDirectory(prefix=".sessiond-doctor-", dir=missing))
                url = Path(place).as_uri()
                yield passed(name, f"{settings.cloud_url} is not there; the first start makes it in {missing}")
            store = opened.enter_context(contextlib.closing(_opened(settings, url)))
        except SessiondError as error:
            yield failed(name, error)
            return
        except OSError as error:
            yield failed(name, Denied("UNWRITABLE_FOLDER", f"{settings.cloud_url} can't be made: {error.strerror}."))
            return
        yield from _store(settings, store, told=missing is None)


def _missing_folder(url: str) -> Path | None:
    """The folder that the folder store would be made in; None if it is there or the store is none."""
    folder = folder_of(url)
    if folder is None or folder.exists():
        return None
    return next(place for place in folder.parents if place.exists())


def _opened(settings: Settings, url: str) -> ObjectStore:
    return open_configured(settings, url)


def _store(settings: Settings, store: ObjectStore, told: bool) -> Iterator[Check]:
    """told: whether to say that the store is there."""
    name = "cloud tier"
    try:
        store.get(BUCKET_KEY)
        seen = f"{store.url} answers and has been used by sessiond"
    except ObjectNotFound:
        seen = f"{store.url} answers; the first start makes its {BUCKET_KEY}"
    except StoreDenied as error:
        if _is_unasked(store):
            yield failed(name, start_refusal(error), CREDENTIALS)
            return
        # Whether it is the credentials or one permission shows below.
        seen = f"{store.url} answers and refuses a read: {error.detail}"
    except StoreError as error:
        remedy = ""
        if _is_unasked(store):
            remedy = CREDENTIALS if "Credential" in error.detail.partition(":")[0] else ENDPOINT
        yield failed(name, _refusal(error), remedy)
        return
    if told:
        yield passed(name, seen)
    permissions = list(_permissions(store))
    yield from permissions
    if all(check.outcome == PASS for check in permissions):
        yield _conditional_writes(store)
        yield from _identity(settings, store)
    yield _clock(store)
    if isinstance(store, S3Store):
        yield from _bucket_advice(store)


def _is_unasked(store: ObjectStore) -> bool:
    """Whether no reply ever came, so that the trouble lies on this side of the store or on the way to it."""
    return isinstance(store, S3Store) and store.clock_ms() is None


def _refusal(error: StoreError) -> SessiondError:
    if isinstance(error, BucketMissing):
        return NotFound("BUCKET_NOT_FOUND", f"There is no such bucket: {error.detail}.")
    return start_refusal(error)


def _permissions(store: ObjectStore) -> Iterator[Check]:
    """Each permission used by itself, on an object of the doctor's own."""
    key = f"{PROBE_PREFIX}{secrets.token_hex(16)}"
    body = secrets.token_bytes(PROBE_BYTES)
    etag = ""
    puts_ms: list[float] = []
    gets_ms: list[float] = []

    def put() -> str:
        nonlocal etag
        for _ in range(STORE_ROUNDS):
            begun = time.perf_counter()
            etag = store.put(key, body)
            puts_ms.append((time.perf_counter() - begun) * 1000)
        return _latency("a put takes", puts_ms)

    def get() -> str:
        for _ in range(STORE_ROUNDS):
            begun = time.perf_counter()
            found = store.get(key)
            gets_ms.append((time.perf_counter() - begun) * 1000)
            if found.body != body:
                raise Invalid("STORE_UNFIT", f"{len(found.body)} other bytes were read than the {len(body)} written.")
        return _latency("a get takes", gets_ms)

    def conditional() -> str:
        nonlocal etag
        etag = store.put(key, body, if_match=etag)
        return "a put with If-Match is taken"

    def listing() -> str:
        rows = list(store.list(PROBE_PREFIX, limit=1000))
        if key not in [row.key for row in rows] and len(rows) < 1000:
            raise Invalid("STORE_UNFIT", f"A listing of {PROBE_PREFIX} does not show an object that was just written.")
        return "a listing shows what was just written"

    def delete() -> str:
        store.delete(key)
        with contextlib.suppress(ObjectNotFound):
            store.get(key)
            raise Invalid("STORE_UNFIT", "An object that was deleted can still be read.")
        return "what was deleted is gone"

    steps: list[tuple[str, str, Callable[[], str]]] = [
        ("put", "s3:PutObject", put),
        ("get", "s3:GetObject", get),
        ("conditional put", "s3:PutObject with If-Match", conditional),
        ("list", "s3:ListBucket", listing),
        ("delete", "s3:DeleteObject", delete),
    ]
    wrote = True
    for what, permission, step in steps:
        name = f"permission to {what}"
        if not wrote:
            yield warned(name, "it can't be tried without a put", "Mend the permission to put first.")
            continue
        try:
            seen = step()
        except StoreDenied as error:
            wrote = what != "put"
            where = f"on {store.url}" if isinstance(store, S3Store) else "for the daemon's user on the folder"
            yield failed(name, start_refusal(error), f"Grant {permission} {where}, or correct the credentials.")
        except StoreError as error:
            wrote = what != "put"
            yield failed(name, _refusal(error))
        except SessiondError as error:
            yield failed(name, error)
        else:
            slow = [ms for ms in (puts_ms if what == "put" else gets_ms if what == "get" else []) if ms > STORE_SLOW_MS]
            if len(slow) > STORE_ROUNDS / 2:
                remedy = "Use a store nearer to the node: every CLOUD append and cold resume waits for it."
                yield warned(name, seen, remedy)
            else:
                yield passed(name, seen)


def _latency(what: str, times_ms: list[float]) -> str:
    return f"{what} {statistics.median(times_ms):.1f} ms, {max(times_ms):.1f} ms at worst of {len(times_ms)}"


def _conditional_writes(store: ObjectStore) -> Check:
    name = "conditional writes"
    try:
        probe(store)
    except SessiondError as error:
        return failed(name, error)
    except StoreError as error:
        return failed(name, start_refusal(error))
    return passed(name, "of writes at the same time exactly one won, every time")


def _identity(settings: Settings, store: ObjectStore) -> Iterator[Check]:
    name = "bucket and key"
    bucket: Bucket | None = None
    try:
        bucket = open_bucket(store, bytes.fromhex(settings.hash_key), 0, make=False)
    except NotFound:
        yield passed(name, f"there is no {BUCKET_KEY} yet; the first start makes it")
    except SessiondError as error:
        yield failed(name, error)
        return
    if bucket is not None:
        whose = "as configured" if settings.hash_key else "kept in the bucket"
        yield passed(name, f"store {bucket.store_id.hex()}; the hash key is {whose}")
    yield from _belongs(settings, bucket)
    yield _lease(settings, store)
    if bucket is not None:
        yield from _several(settings, store, bucket)


def _belongs(settings: Settings, bucket: Bucket | None) -> Iterator[Check]:
    """Whether the hot tier is this bucket's; of none that was not founded yet."""
    if not (settings.hot_dir / DATA_FILE).exists():
        return
    name = "hot tier's store"
    try:
        check_file(settings.hot_dir)
        reader = Reader(settings.hot_dir)
    except SessiondError:
        return  # told by the check of the hot tier itself
    try:
        with reader.read() as transaction:
            bound = bytes(transaction.get("meta", META_STORE) or b"")
    finally:
        reader.close()
    if bound and (bucket is None or bound != bucket.store_id):
        here = "there is no store here" if bucket is None else f"here is store {bucket.store_id.hex()}"
        what = f"The hot tier belongs to store {bound.hex()}, and {here}."
        yield failed(name, Invalid("WRONG_STORE", what))
    else:
        yield passed(name, "the hot tier belongs to this bucket")


def _lease(settings: Settings, store: ObjectStore) -> Check:
    name = "node name"
    key = lease_key(settings.node)
    try:
        holder = envelope.unseal(store.get(key).body, envelope.KIND_LEASE, key)[0]
    except ObjectNotFound:
        return passed(name, f"{settings.node!r} is new on this bucket")
    except Corrupt as error:
        return failed(name, error, "Stop the daemon of this name and run sessiond repair.")
    except StoreError as error:
        return failed(name, start_refusal(error))
    who = f"{settings.node!r}, incarnation {bytes(holder.get('incarnation', b'')).hex()} at {holder.get('address')}"
    if holder.get("released"):
        return passed(name, f"{who}: released, a start need not wait")
    alive = is_alive(holder)
    if alive is False:
        return passed(name, f"{who}: its process {holder.get('pid')} is gone, a start need not wait")
    if alive:
        ours = (settings.hot_dir / DATA_FILE).exists() and in_use(settings.hot_dir)
        told = f"{who}: held by the live process {holder.get('pid')}"
        if ours:
            return passed(name, f"{told}, which has this hot tier open")
        what = f"The node name is taken: {told}, which has another hot tier."
        return failed(name, Unavailable("NODE_NAME_IN_USE", what))
    remedy = "If that daemon is gone, a start waits for three lease times; if not, give this node another node_name."
    return warned(name, f"{who}: written on another boot or in another container, it may be alive", remedy)


# Several nodes --------------------------------------------------------------------------------------------------------


def _several(settings: Settings, store: ObjectStore, bucket: Bucket) -> Iterator[Check]:
    """The other nodes, whether this one can call them, and whether they can call it."""
    name = "other nodes"
    try:
        found = neighbours(store, settings.node)
    except StoreError as error:
        yield failed(name, start_refusal(error))
        return
    seen = ", ".join(str(node) for node in found[:NODES_SHOWN]) or "none"
    if len(found) > NODES_SHOWN:
        seen += f" and {len(found) - NODES_SHOWN} more"
    if any(node.state in (STILL, DAMAGED) for node in found):
        remedy = "Start what is gone again, or let it be: others take its sessions over as they are asked for."
        yield warned(name, seen, remedy)
    else:
        yield passed(name, seen)
    living = [node for node in found if node.state == RENEWED]
    if living:
        yield _calls(settings, bucket, living)
    yield _advertised(settings, living)


def _calls(settings: Settings, bucket: Bucket, living: list[Neighbour]) -> Check:
    """Whether each living node can be called by this one, which is how calls for its sessions get there."""
    name = "calls to other nodes"
    key = node_key(bytes.fromhex(settings.node_key), bucket.hash_key)
    credentials = Credentials(key, Node(bytes(16), settings.node, settings.address()))
    troubles = [(node, trouble) for node in living if (trouble := ask(node.address, credentials)) is not None]
    for node, trouble in troubles:
        if trouble.reason == "NODE_UNVERIFIED":
            error: SessiondError = Denied("NODE_UNVERIFIED", f"{node.name} at {node.address} has another node_key.")
            return failed(name, error, "Give all nodes of the bucket the same node_key, or none.")
    if troubles:
        told = ", ".join(f"{node.name} at {node.address}" for node, _ in troubles)
        error = Unavailable("SERVER_UNREACHABLE", f"No answer from {told}, although it renews its lease.")
        return failed(name, error, "Check what that node advertises, and the network between the two.")
    return passed(name, f"{len(living)} of {len(living)} answer and know the key")


def _advertised(settings: Settings, living: list[Neighbour]) -> Check:
    """Whether the other nodes can reach this one at what its lease tells them."""
    name = "advertise"
    address = settings.address()
    if not living:
        return passed(name, f"{address}, which nobody needs: no other node lives on this bucket")
    remedy = "Set advertise to HOST:PORT at which the other nodes reach this one."
    for node in living:
        if node.address == address:
            what = f"{address} is what node {node.name!r} advertises"
            return failed(name, Invalid("INVALID_CONFIG", f"{what}.", fields=[("advertise", what)]), remedy)
    host = address.rpartition(":")[0].strip("[]")
    here = address.startswith("unix:")
    try:
        places = [] if here else socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        what = f"{host!r} is no host that this machine knows: {error.strerror}"
        return failed(name, Invalid("INVALID_CONFIG", f"{what}.", fields=[("advertise", what)]), remedy)
    here = here or all(ipaddress.ip_address(str(place[4][0]).partition("%")[0]).is_loopback for place in places)
    far = [node.name for node in living if node.boot_id != process_identity().get("boot_id")]
    if here and far:
        what = f"{address} is reached from this machine only, and node {far[0]!r} runs on another"
        return failed(name, Invalid("INVALID_CONFIG", f"{what}.", fields=[("advertise", what)]), remedy)
    if not _is_ours(settings, _daemon_at(settings.listen)):
        return passed(name, f"{address}; this node's daemon is not running, so it can't be tried")
    if _is_ours(settings, _daemon_at(address)):
        return passed(name, f"this node answers at {address}")
    what = f"This node does not answer at {address}, which its lease tells the others."
    return failed(name, Unavailable("SERVER_UNREACHABLE", what), remedy)


def _is_ours(settings: Settings, found: tuple[int, admin_pb2.GetStatusResponse] | SessiondError | None) -> bool:
    return isinstance(found, tuple) and Path(found[1].hot.path) == settings.hot_dir


def _clock(store: ObjectStore) -> Check:
    name = "clock"
    try:
        begun = time.time_ns() // 1_000_000
        theirs = store.clock_ms()
        ended = time.time_ns() // 1_000_000
    except StoreError as error:
        return warned(name, f"the store's clock can't be read: {error.detail}", "See the checks above.")
    if theirs is None:
        return passed(name, "the store has none of its own")
    apart = max(begun - theirs, theirs - ended, 0)
    seen = f"{apart:,} ms apart from the store's"
    if apart > CLOCK_APART_MS:
        return warned(name, seen, "Set this machine's clock: expiry is judged by the store's, dates in logs by ours.")
    return passed(name, seen)


# Settings of a bucket -------------------------------------------------------------------------------------------------


def _bucket_advice(store: S3Store) -> Iterator[Check]:
    for name, read, judge in (
        ("versioning", "get_bucket_versioning", _versioning),
        ("object lock", "get_object_lock_configuration", _object_lock),
        ("lifecycle rules", "get_bucket_lifecycle_configuration", _lifecycle),
        ("public access", "get_public_access_block", _public_access),
    ):
        try:
            found = store.bucket_setting(read)
        except StoreError as error:
            yield warned(name, f"it could not be read: {error.detail}", f"Allow s3:{_action(read)}, or look by hand.")
        else:
            yield judge(name, found, store.key_prefix)


def _action(read: str) -> str:
    names = {
        "get_bucket_versioning": "GetBucketVersioning",
        "get_object_lock_configuration": "GetBucketObjectLockConfiguration",
        "get_bucket_lifecycle_configuration": "GetLifecycleConfiguration",
        "get_public_access_block": "GetBucketPublicAccessBlock",
    }
    return names[read]


def _versioning(name: str, found: dict[str, Any] | None, prefix: str) -> Check:
    del prefix
    if (found or {}).get("Status") == "Enabled":
        return passed(name, "on: a damaged or deleted object has an older version to go back to")
    return warned(name, "off: nothing brings a deleted object back", "Turn versioning on, or keep backups.")


def _object_lock(name: str, found: dict[str, Any] | None, prefix: str) -> Check:
    del prefix
    settings = (found or {}).get("ObjectLockConfiguration", {})
    if settings.get("ObjectLockEnabled") != "Enabled":
        return passed(name, "off")
    retention = settings.get("Rule", {}).get("DefaultRetention")
    if not retention:
        return passed(name, "on, without a default retention")
    length = f"{retention.get('Days') or retention.get('Years')} {'days' if retention.get('Days') else 'years'}"
    remedy = "Deleted and expired sessions keep their bytes for so long, and each manifest's old versions too."
    return warned(name, f"every object is kept for {length} ({retention.get('Mode')})", remedy)


def _lifecycle(name: str, found: dict[str, Any] | None, prefix: str) -> Check:
    dangerous: list[tuple[bool, str]] = []
    short = []
    for rule in (found or {}).get("Rules", ()):
        if rule.get("Status") != "Enabled" or not {"Expiration", "Transitions"} & set(rule):
            continue
        expires = rule.get("Expiration", {})
        if not (expires.get("Days") or expires.get("Date")) and "Transitions" not in rule:
            continue  # only removes delete markers that nothing stands behind
        condition = rule.get("Filter", {})
        both = condition.get("And", {})
        if condition.get("Tag") or both.get("Tags"):
            continue  # objects of ours carry no tags that somebody else chose
        covered = str(rule.get("Prefix") or condition.get("Prefix") or both.get("Prefix") or "")

        def is_hit(kind: str, covered: str = covered) -> bool:
            return f"{prefix}{kind}".startswith(covered) or covered.startswith(prefix + kind)

        hit = [kind for kind in (*HISTORY, *NAMES) if is_hit(kind)]
        if not hit and expires and is_hit(LEASES) and expires.get("Days", 0) < LEASE_DAYS_MIN:
            short.append(f"rule {rule.get('ID', '')!r} deletes leases within {LEASE_DAYS_MIN} days")
        if hit:
            what = "deletes" if expires else "moves to another storage class"
            dangerous.append((bool(expires), f"rule {rule.get('ID', '')!r} {what} what lies under {' '.join(hit)}"))
    if any(deletes for deletes, _ in dangerous):
        told = "; ".join(text for _, text in dangerous)
        error = Invalid("STORE_UNFIT", f"A lifecycle rule would destroy sessions: {told}.")
        return failed(name, error, "Remove the rule, or limit it to old versions and unfinished uploads.")
    if dangerous:
        remedy = "Classes that answer only after hours make cold resumes fail; use instant ones."
        return warned(name, "; ".join(text for _, text in dangerous), remedy)
    if short:
        remedy = f"Give it more than {LEASE_DAYS_MIN} days: a node without its lease looks every session up again."
        return warned(name, "; ".join(short), remedy)
    return passed(name, "none touches a session, an index or the bucket's identity")


def _public_access(name: str, found: dict[str, Any] | None, prefix: str) -> Check:
    del prefix
    blocked = (found or {}).get("PublicAccessBlockConfiguration", {})
    wanted = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    lacking = [key for key in wanted if not blocked.get(key)]
    if lacking:
        remedy = "Block public access: conversations lie in this bucket."
        return warned(name, f"it is not blocked: {', '.join(lacking)}", remedy)
    return passed(name, "blocked")
