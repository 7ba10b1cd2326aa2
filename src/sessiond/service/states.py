"""What StateService's calls mean: versioned blobs beside a session or a user, compared and set in the owner's rows.

It promises that of several writers over the same version one wins, that a write is applied once however often it is
sent, and that whatever may be missing is said. It knows no gRPC and starts no thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from sessiond.core import blobs as rules
from sessiond.core.blobs import Blob, Ledger
from sessiond.core.manifest import LIFECYCLE_ACTIVE
from sessiond.core.rules import session_hash, user_session
from sessiond.errors import Conflict, Corrupt, NotFound, SessiondError, Unavailable
from sessiond.service.ownership import (
    OWN_ATTEMPTS_MAX,
    REASON_UNREACHABLE,
    Call,
    Ownership,
    Parts,
    draining,
)
from sessiond.service.pages import open_page, seal_page
from sessiond.service.prepare import (
    LABEL_BYTES_MAX,
    LABELS_MAX,
    check_session_id,
    check_user_id,
    invalid,
)
from sessiond.service.sessions import ATTEMPTS_MAX, REPLY_MARGIN_MS, hot_tier_full, page_size, wait_until
from sessiond.tiers import blobs
from sessiond.tiers.hot import blobs as hot
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Transaction
from sessiond.tiers.hot.rows import (
    DURABILITY_CLOUD,
    DURABILITY_EDGE,
    PHASE_CLAIMING,
    PHASE_OWNED,
    PHASE_RELEASING,
    Head,
    decode_committed,
)
from sessiond.tiers.hydrate import Cold, first_manifest
from sessiond.v1 import context_pb2, state_pb2, turn_pb2

MEDIA_TYPE_BYTES_MAX: Final = 256
WRITE_ID_BYTES_MAX: Final = 128
PAGE_MAX: Final = 1000
PAGE_DEFAULT: Final = 100


@dataclass(frozen=True, slots=True)
class Scope:
    """Where blobs live. session: the id of the session, hidden for a user. user: whose it must be; empty for any."""

    h: bytes
    session: str
    user: str
    of_user: bool


@dataclass(frozen=True, slots=True)
class _Look:
    """Blobs as they were found. committed: versions that the cloud tier has, by key."""

    found: list[tuple[str, Blob]]
    committed: dict[str, list[Any]]
    loss: list[list[int]]
    rung: int
    ownership: int
    content: bytes | None = None
    unreachable: tuple[int, int] | None = None


class States:
    """StateService, without the wire."""

    def __init__(self, parts: Parts, ownership: Ownership) -> None:
        self._parts = parts
        self._hot = parts.hot
        self._own = ownership
        self._fetching: dict[tuple[bytes, int], asyncio.Task[bytes]] = {}

    def _scope(self, call: Call, scope: state_pb2.StateScope) -> Scope:
        owner = scope.WhichOneof("owner")
        if owner is None:
            raise invalid("INVALID_BLOB", "scope", "it names neither a session nor a user")
        if owner == "session_id":
            check_session_id(scope.session_id, "scope.session_id")
            check_user_id(scope.session_user_id, "scope.session_user_id")
            return self._scoped(call, scope.session_id, scope.session_user_id, False)
        if not scope.user_id:
            raise invalid("INVALID_USER_ID", "scope.user_id", "it is missing")
        check_user_id(scope.user_id, "scope.user_id")
        if scope.session_user_id:
            raise invalid("INVALID_BLOB", "scope.session_user_id", "it means nothing for a user's blobs")
        return self._scoped(call, user_session(scope.user_id), scope.user_id, True)

    def _scoped(self, call: Call, session: str, user: str, of_user: bool) -> Scope:
        return Scope(session_hash(self._parts.bucket.hash_key, call.tenant, session), session, user, of_user)

    # Reading ---------------------------------------------------------------------------------------------------------

    async def get(self, call: Call, request: state_pb2.GetStateRequest) -> state_pb2.GetStateResponse:
        """A blob, with its content unless the caller has that."""
        scope, key = self._scope(call, request.scope), _check_key(request.key)
        for attempt in range(ATTEMPTS_MAX):
            look = await self._look(call, scope, lambda name: name == key, key)
            if not look.found:
                raise _state_not_found(key, look)
            blob = look.found[0][1]
            response = state_pb2.GetStateResponse(
                header=_header(key, blob, look.committed),
                missing=_missing(look, blob.version),
                ownership=look.ownership,  # type: ignore[arg-type]
            )
            rung = look.rung
            if request.known_version == blob.version:
                response.not_modified = True
            elif look.content is not None:
                response.content = await self._own.counted(
                    blob.size, hot.check_content, scope.h, key, blob, look.content
                )
            else:
                try:
                    response.content = await self._fetched(scope.h, key, look)
                except Corrupt as error:
                    # Written over between the two reads, and then removed: there is a newer one.
                    if error.reason != "MISSING_BLOB" or attempt or await self._stands(call, scope, key, blob.version):
                        raise
                    continue
                rung = max(rung, context_pb2.RUNG_CLOUD)
            response.rung = context_pb2.RUNG_PARTIAL if response.missing else rung  # type: ignore[assignment]
            return response
        raise Unavailable("NOT_OWNER", f"The blob {key!r} keeps changing.", {"key": key})

    async def list_states(self, call: Call, request: state_pb2.ListStatesRequest) -> state_pb2.ListStatesResponse:
        """Headers of the blobs whose keys have a prefix, by key."""
        scope, prefix = self._scope(call, request.scope), request.key_prefix
        if len(prefix.encode()) > rules.KEY_BYTES_MAX:
            raise invalid("INVALID_BLOB", "key_prefix", f"over the limit of {rules.KEY_BYTES_MAX} bytes")
        size = page_size(request.page_size, PAGE_DEFAULT, PAGE_MAX)
        query = b"states" + scope.h + prefix.encode()
        after = ""
        if request.page_token:
            after = str(open_page(self._parts.bucket.hash_key, query, request.page_token)[0])
        if request.HasField("accept_missing"):
            await self._accept_missing(call, scope, request.accept_missing)
        look = await self._look(call, scope, lambda name: name.startswith(prefix))
        rows = [row for row in look.found if row[0].encode() > after.encode()]
        response = state_pb2.ListStatesResponse(
            headers=[_header(key, blob, look.committed) for key, blob in rows[:size]],
            missing=_missing(look, 0),
            ownership=look.ownership,  # type: ignore[arg-type]
        )
        if len(rows) > size:
            response.next_page_token = seal_page(self._parts.bucket.hash_key, query, [rows[size - 1][0]])
        response.rung = context_pb2.RUNG_PARTIAL if response.missing else look.rung  # type: ignore[assignment]
        return response

    async def _look(self, call: Call, scope: Scope, wanted: Callable[[str], bool], only: str | None = None) -> _Look:
        """The blobs that are wanted, from the rows of this node if it owns the session, else from the cloud tier.

        only: the one key that is; its content comes along if it is here. Raises NotFound, Unavailable, Corrupt.
        """
        await self._own.settle_doubt(scope.h)
        tenure = self._own.tenure()
        with self._hot.read() as transaction:
            head = log.read_head(transaction, scope.h)
            if head is not None and head.phase == PHASE_OWNED:
                self._own.admit(scope.session, head, scope.user)
                look = self._look_hot(transaction, scope.h, wanted, only, tenure)
                self._own.note_resumed(scope.h)
                return look
        try:
            cold = await self._own.cold(scope.h, scope.session, scope.user)
        except NotFound:
            if not scope.of_user:
                raise
            return _Look([], {}, [], context_pb2.RUNG_CLOUD, context_pb2.OWNERSHIP_CONFIRMED)
        return await self._look_cold(call, cold, wanted)

    def _look_hot(
        self, transaction: Transaction, h: bytes, wanted: Callable[[str], bool], only: str | None, tenure: int
    ) -> _Look:
        ledger = hot.read_ledger(transaction, h) or Ledger()
        content: bytes | None = None
        if only is None:
            found = [row for row in hot.read_blobs(transaction, h) if wanted(row[0])]
        else:
            blob = hot.read_blob(transaction, h, only)
            found = [] if blob is None else [(only, blob)]
            content = None if blob is None else hot.read_content(transaction, h, blob.version)
        committed = self._committed(transaction, h) if found else {}
        ownership = self._own.standing(tenure)
        return _Look(found, committed, ledger.loss, context_pb2.RUNG_HOT, ownership, content)

    def _committed(self, transaction: Transaction, h: bytes) -> dict[str, list[Any]]:
        manifest = decode_committed(h, transaction.get("manifests", h))
        return {str(row[0]): row for row in rules.rows(manifest.state_keys)}

    async def _look_cold(self, call: Call, cold: Cold, wanted: Callable[[str], bool]) -> _Look:
        """What the manifest says; the session is claimed behind the reply where no live node owns it."""
        manifest = cold.manifest
        succession = await self._own.succession(call, cold)
        state_keys = rules.with_loss(manifest.state_keys, succession.loss)
        committed = {str(row[0]): row for row in rules.rows(state_keys)}
        unreachable = None
        if not succession.takeable:
            unreachable = manifest.epoch, rules.last_of(state_keys)
        elif (
            self._own.lifecycle(manifest) == LIFECYCLE_ACTIVE and not self._own.draining and not self._parts.lease.lost
        ):
            self._own.start_claim(manifest.h, cold, succession.loss)
            self._own.note_resumed(manifest.h)
        return _Look(
            [(key, rules.blob_of(row)) for key, row in committed.items() if wanted(key)],
            committed,
            rules.ledger_of(state_keys).loss,
            context_pb2.RUNG_CLOUD,
            context_pb2.OWNERSHIP_CONFIRMED,
            unreachable=unreachable,
        )

    async def _fetched(self, h: bytes, key: str, look: _Look) -> bytes:
        """Content that is in the cloud tier only; callers that ask at the same time share one GET."""
        row = look.committed.get(key)
        if row is None or int(row[1]) != look.found[0][1].version:
            what = f"The content of blob {key!r} of session {h.hex()} is neither hot nor in the cloud tier."
            raise Corrupt("CORRUPT_HOT_ROW", what, {"table": "blobs", "key": key})
        name = h, int(row[1])
        task = self._fetching.get(name)
        if task is None:
            task = asyncio.ensure_future(self._own.off_loop(self._fetch, h, row))
            self._fetching[name] = task
            task.add_done_callback(lambda _: self._fetching.pop(name, None))
        return await asyncio.shield(task)

    def _fetch(self, h: bytes, row: list[Any]) -> bytes:
        content = blobs.fetch(self._parts.store, h, row)
        head = self._own.peek(h)
        if head is not None and head.phase == PHASE_OWNED and not self._hot.is_full():

            def operation(transaction: Transaction) -> None:
                hot.put_content(transaction, h, str(row[0]), int(row[1]), content)

            with contextlib.suppress(SessiondError):  # it is read all the same; the next reader fetches it again
                self._hot.run_blocking(operation, weight_bytes=1 + len(content))
        return content

    async def _stands(self, call: Call, scope: Scope, key: str, version: int) -> bool:
        """Whether a blob is at this version still."""
        look = await self._look(call, scope, lambda name: name == key, key)
        return bool(look.found) and look.found[0][1].version == version

    async def _accept_missing(self, call: Call, scope: Scope, epoch: int) -> None:
        now_ms = self._parts.clock_ms()

        def operation(transaction: Transaction) -> None:
            head = log.read_head(transaction, scope.h)
            if head is None or head.phase != PHASE_OWNED:
                return
            if hot.accept_loss(transaction, scope.h, lambda row: row[0] <= epoch):
                head.changes += 1
                log.write_head(transaction, scope.h, head, now_ms)

        try:
            await self._own.take(call, scope.h, scope.session, scope.user)
        except NotFound:
            if not scope.of_user:
                raise
            return
        await self._hot.run(operation)

    # Writing ---------------------------------------------------------------------------------------------------------

    async def put(self, call: Call, request: state_pb2.PutStateRequest) -> state_pb2.PutStateResponse:
        """Write a blob."""
        scope, key = self._scope(call, request.scope), _check_key(request.key)
        if len(request.content) > rules.CONTENT_BYTES_MAX:
            what = f"{len(request.content)} bytes, over the limit of {rules.CONTENT_BYTES_MAX}"
            raise invalid("BLOB_TOO_LARGE", "content", what)
        if len(request.media_type.encode()) > MEDIA_TYPE_BYTES_MAX:
            raise invalid("INVALID_BLOB", "media_type", f"over the limit of {MEDIA_TYPE_BYTES_MAX} bytes")
        labels = _check_labels(dict(request.labels))
        content = request.content
        sha256 = await self._own.counted(len(content), lambda: hashlib.sha256(content).digest())
        asked = hot.Write(
            key,
            rules.write_id_hash(scope.h, _check_write_id(request.write_id)),
            rules.write_digest(self._parts.bucket.hash_key, key, sha256, request.media_type, labels),
            content,
            sha256,
            request.media_type,
            labels,
            request.expected_version if request.HasField("expected_version") else None,
        )
        done = await self._write(call, scope, asked, request.durability, makes=True)
        assert done is not None
        blob = Blob(done.version, len(content), sha256, request.media_type, labels, done.time_ms)
        header = _header(key, blob, {})
        header.durability = self._durability(scope.h, done)  # type: ignore[assignment]
        return state_pb2.PutStateResponse(
            header=header,
            duplicate=done.duplicate,
            ownership=self._own.standing(done.tenure),
        )

    async def delete(self, call: Call, request: state_pb2.DeleteStateRequest) -> state_pb2.DeleteStateResponse:
        """Delete a blob."""
        scope, key = self._scope(call, request.scope), _check_key(request.key)
        asked = hot.Write(
            key,
            rules.write_id_hash(scope.h, _check_write_id(request.write_id)),
            rules.write_digest(self._parts.bucket.hash_key, key, b"", "", {}),
            None,
            b"",
            "",
            {},
            request.expected_version if request.HasField("expected_version") else None,
        )
        done = await self._write(call, scope, asked, request.durability, makes=False)
        if done is None:
            if asked.expected:
                raise _mismatch(key, asked.expected)
            # Nothing was ever written for this user, and nothing is.
            return state_pb2.DeleteStateResponse(
                durability=turn_pb2.DURABILITY_CLOUD, ownership=context_pb2.OWNERSHIP_CONFIRMED
            )
        return state_pb2.DeleteStateResponse(
            deleted=done.version > 0,
            durability=self._durability(scope.h, done),  # type: ignore[arg-type]
            ownership=self._own.standing(done.tenure),
            duplicate=done.duplicate,
        )

    async def _write(
        self, call: Call, scope: Scope, asked: hot.Write, durability: int, *, makes: bool
    ) -> hot.Written | None:
        """Make a write at the durability that is asked for, or that the policy wants. makes: a user's first write makes
        what holds it; else None is returned where there is nothing.
        """
        if durability not in (0, DURABILITY_EDGE, DURABILITY_CLOUD):
            raise invalid("INVALID_BLOB", "durability", f"{durability} is no durability")
        self._own.check_not_fenced()
        h, parts = scope.h, self._parts

        def operation(transaction: Transaction) -> hot.Written | None:
            return hot.write(
                transaction, h, scope.session, asked, parts.clock_ms(), parts.running_ms(), parts.expiry_ms
            )

        weight_bytes = 1 + len(asked.content or b"")
        for _ in range(OWN_ATTEMPTS_MAX):
            try:
                await self._own.take(call, h, scope.session, scope.user, writes=True)
            except NotFound as error:
                if not scope.of_user or error.reason != "SESSION_NOT_FOUND":
                    raise
                if not makes:
                    return None
                await self._make(call, scope)
                continue
            if self._hot.is_full():
                raise hot_tier_full(self._hot)
            tenure = self._own.tenure()
            done = await self._hot.run(operation, weight_bytes)
            if done is None:
                continue  # released in between
            done.tenure = tenure
            if max(durability, done.head.min_durability) >= DURABILITY_CLOUD:
                await self._reach(call, h, asked.key, done)
            return done
        raise Unavailable("NOT_OWNER", f"Session {scope.session!r} keeps changing hands.", {"key": asked.key})

    async def _make(self, call: Call, scope: Scope) -> None:
        """Make the hidden session that holds a user's blobs, unless somebody else does so first."""
        if self._own.draining:
            raise draining()
        known = self._own.peek(scope.h)
        if known is not None and known.phase != PHASE_CLAIMING:
            return
        now_ms = self._parts.latest_ms()
        birth: dict[str, Any] = {
            "created_ms": now_ms,
            "metadata": {},
            "forked_from": "",
            "forked_epoch": 0,
            "forked_seq": 0,
            "reset_of": "",
        }
        manifest = first_manifest(self._parts.node, call.tenant, scope.session, scope.user, scope.h, birth, {}, now_ms)
        creating = asyncio.ensure_future(self._own.off_loop(self._parts.claims.create, manifest))
        self._own.creating.add(creating)
        creating.add_done_callback(self._own.creating.discard)
        await asyncio.shield(creating)

    async def _reach(self, call: Call, h: bytes, key: str, done: hot.Written) -> None:
        """Wait until a write is committed in the cloud tier. Raises Unavailable CLOUD_NOT_COMMITTED; it stays."""
        detail, retry_after_ms = "the cloud tier did not confirm in time.", None
        remedy = "The write is safe on the node's disk only. Send the same write_id again to complete it."
        for _ in range(ATTEMPTS_MAX):
            head = self._own.peek(h)
            if self._is_flushed(head, done):
                return
            if head is None or head.epoch != done.head.epoch or head.phase not in (PHASE_OWNED, PHASE_RELEASING):
                detail = "the session changed hands."
                break
            left_ms = None
            if call.deadline_ms is not None:
                left_ms = max(0, call.deadline_ms - self._parts.boot_ms() - REPLY_MARGIN_MS)
            try:
                await wait_until(asyncio.wrap_future(self._parts.flusher.request(h)), left_ms)
            except TimeoutError:
                break
            except SessiondError as error:
                detail = error.message
                if isinstance(error, Corrupt):
                    remedy, retry_after_ms = error.remedy, 0
                break
        raise Unavailable(
            "CLOUD_NOT_COMMITTED",
            f"The write of {key!r} is not committed in the cloud tier: {detail}",
            {"key": key, "version": str(done.version), "durability": "DURABILITY_EDGE"},
            remedy=remedy,
            retry_after_ms=retry_after_ms,
        )

    def _is_flushed(self, head: Head | None, done: hot.Written) -> bool:
        return head is not None and head.epoch == done.head.epoch and head.changes_flushed >= done.head.changes

    def _durability(self, h: bytes, done: hot.Written) -> int:
        flushed = self._is_flushed(self._own.peek(h), done)
        return turn_pb2.DURABILITY_CLOUD if flushed else turn_pb2.DURABILITY_EDGE


_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f]")


def _check_key(key: str) -> str:
    size = len(key.encode())
    if not 1 <= size <= rules.KEY_BYTES_MAX:
        what = "it is missing" if not size else f"{size} bytes, over the limit of {rules.KEY_BYTES_MAX}"
        raise invalid("INVALID_BLOB", "key", what)
    if _CONTROL.search(key):
        raise invalid("INVALID_BLOB", "key", "it has control characters")
    return key


def _check_write_id(write_id: str) -> str:
    size = len(write_id.encode())
    if not 1 <= size <= WRITE_ID_BYTES_MAX:
        what = "it is missing" if not size else f"{size} bytes, over the limit of {WRITE_ID_BYTES_MAX}"
        raise invalid("INVALID_WRITE_ID", "write_id", what)
    return write_id


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    size = sum(len(key.encode()) + len(value.encode()) for key, value in labels.items())
    if len(labels) > LABELS_MAX or size > LABEL_BYTES_MAX:
        what = f"{len(labels)} labels of {size} bytes; the limits are {LABELS_MAX} and {LABEL_BYTES_MAX}"
        raise invalid("INVALID_BLOB", "labels", what)
    if "" in labels:
        raise invalid("INVALID_BLOB", "labels", "a name is empty")
    return labels


def _header(key: str, blob: Blob, committed: dict[str, list[Any]]) -> state_pb2.StateHeader:
    row = committed.get(key)
    in_cloud = row is not None and int(row[1]) == blob.version
    return state_pb2.StateHeader(
        key=key,
        version=blob.version,
        size_bytes=blob.size,
        sha256=blob.sha256,
        media_type=blob.media_type,
        updated_at_unix_ms=blob.updated_ms,
        labels=blob.labels,
        durability=turn_pb2.DURABILITY_CLOUD if in_cloud else turn_pb2.DURABILITY_EDGE,
    )


def _missing(look: _Look, version: int) -> Iterable[state_pb2.MissingWrites]:
    """What a caller must be told who reads a blob of this version; 0 for a list."""
    lacking = [
        state_pb2.MissingWrites(epoch=epoch, after_version=after, reason=reason)  # type: ignore[arg-type]
        for epoch, after, reason, _ in (row[:4] for row in rules.may_lack(look.loss, version))
    ]
    if look.unreachable is not None:
        epoch, after = look.unreachable
        lacking.append(state_pb2.MissingWrites(epoch=epoch, after_version=after, reason=REASON_UNREACHABLE))
    return lacking


def _state_not_found(key: str, look: _Look) -> SessiondError:
    where = {"key": key}
    missing = list(_missing(look, 0))
    what = f"There is no blob {key!r}."
    if any(lost.reason == REASON_UNREACHABLE for lost in missing):
        # An owner that can't be asked may have one.
        return Unavailable("OWNER_UNREACHABLE", f"{what[:-1]} that could be read: its owner does not answer.", where)
    if missing:
        where["missing_epoch"] = str(missing[-1].epoch)
        what = f"There is no blob {key!r}; a write of it may be missing since epoch {missing[-1].epoch}."
    return NotFound("STATE_NOT_FOUND", what, where)


def _mismatch(key: str, expected: int) -> Conflict:
    return Conflict(
        "STATE_VERSION_MISMATCH",
        f"The blob {key!r} is at version 0, not {expected}.",
        {"key": key, "version": "0", "expected_version": str(expected)},
        [("expected_version", "it is at version 0")],
    )
