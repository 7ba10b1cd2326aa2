"""`sessiond dump`: bytes of either tier as people read them, without a daemon. It changes nothing it reads.

What users wrote (message bodies, pinned facts, metadata) is shown only on request; ids, sizes and sums always are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from sessiond.cli import exits, output, settings
from sessiond.config import Settings
from sessiond.errors import Corrupt, Invalid, NotFound, SessiondError

KIND_NAMES: Final = {
    1: "manifest",
    2: "segment",
    3: "orphan",
    4: "user index",
    5: "segment index",
    6: "lease",
    7: "expiry",
    8: "state blob",
    9: "rows moved aside",
}
PHASE_NAMES: Final = {1: "claiming", 2: "owned", 3: "releasing", 4: "released", 5: "fenced", 6: "doubted"}
FLAG_NAMES: Final = {
    1: "cut",
    2: "exchange",
    4: "boundary",
    8: "calls",
    16: "results",
    32: "redacted",
    64: "instructions",
    128: "applies",
}
BUCKET_SHOWN: Final = frozenset({"format", "store_id", "hash_key_check", "created_unix_ms", "checksum"})
# An object is at most a segment with its envelope; anything larger is another file.
FILE_BYTES_MAX: Final = 256 * 1024**2


@click.command()
@click.argument("path", required=False, metavar="[PATH]")
@click.option("--session", metavar="ID", help="The session whose rows to show; without it, the list of sessions.")
@click.option("--bodies", is_flag=True, help="Show what users wrote, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings.options(*settings.TIERS)
@click.pass_context
def command(
    context: click.Context,
    /,
    path: str | None,
    session: str | None,
    bodies: bool,
    as_json: bool,
    config_path: str | None,
    **given: Any,
) -> int:
    """Decode PATH, an object file of the cloud tier: manifest, segment, lease, user index, bucket.json; or a file of
    rows that repair moved aside.

    Without PATH, decode the hot tier in --data-dir, which is opened to read only: the list of its sessions, or with
    --session the head row, the rows, the turn ids and the checkpoints of one. With --cloud and --session, decode that
    session's manifest in the cloud tier as well. Exit code 6 if something does not verify; what does is still shown.
    """
    shown: dict[str, Any]
    if path is not None:
        if session is not None:
            raise click.UsageError("Give either PATH or --session.", context)
        shown = object_file(Path(path), bodies)
    else:
        loaded = settings.load(config_path, given)
        shown = {}
        if settings.has_hot_tier(loaded) or not loaded.cloud or not session:
            settings.require_hot_tier(loaded)
            shown["hot"] = _hot_session(loaded, session, bodies) if session else _hot_list(loaded)
        if loaded.cloud and session:
            settings.require_cloud_tier(loaded)
            shown["cloud"] = _cloud_session(loaded, session, bodies)
        if all(part is None for part in shown.values()):
            raise NotFound("SESSION_NOT_FOUND", f"There is no session {session!r} here.", {"session_id": str(session)})
    if as_json:
        output.print_json(shown)
    else:
        _show(shown, 0)
    return exits.CORRUPT if _damaged(shown) else exits.OK


# Objects -------------------------------------------------------------------------------------------------------------


def object_file(path: Path, bodies: bool) -> dict[str, Any]:
    """An object file, decoded as far as it verifies. Raises Invalid if it can't be read."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise Invalid("INVALID_INPUT_FILE", f"{path} is larger than any object.", fields=[("PATH", "too large")])
        stored = path.read_bytes()
    except OSError as error:
        what = error.strerror or type(error).__name__
        remedy = "Name a file of the cloud tier's folder, or one that was downloaded from it."
        raise Invalid(
            "INVALID_INPUT_FILE", f"{path} can't be read: {what}.", fields=[("PATH", what)], remedy=remedy
        ) from error
    return {"file": str(path), "stored_bytes": len(stored), **decode_object(stored, str(path), bodies)}


def decode_object(stored: bytes, name: str, bodies: bool) -> dict[str, Any]:
    """An object's header, meta and frames. Raises Invalid if it is no object of sessiond."""
    from sessiond.core import envelope

    if stored[:1] == b"{":
        return _bucket_json(stored, name)
    if stored[:8] != envelope.MAGIC or len(stored) < 64:
        what = f"it does not start with {envelope.MAGIC.decode()!r}"
        raise Invalid("INVALID_INPUT_FILE", f"{name} is no object of sessiond: {what}.", fields=[("PATH", what)])
    kind = stored[12]
    # Offsets as the table in core/envelope.py has them; shown before anything is believed.
    header = {
        "version": int.from_bytes(stored[8:10], "little"),
        "oldest_reader": int.from_bytes(stored[10:12], "little"),
        "kind": KIND_NAMES.get(kind, str(kind)),
        "codec": stored[13],
        "cipher": stored[14],
        "key_id": stored[16:32].hex(),
        "chunk_bytes": int.from_bytes(stored[32:36], "little"),
        "chunks": int.from_bytes(stored[36:40], "little"),
        "plaintext_bytes": int.from_bytes(stored[40:48], "little"),
        "meta_bytes": int.from_bytes(stored[56:60], "little"),
    }
    try:
        meta, payload = envelope.unseal(stored, kind, name)
    except Corrupt as error:
        return {"header": header, "damage": exits.line_of(error)}
    h = meta.get("h")
    decoded: dict[str, Any] = {"header": header, "meta": _readable_meta(meta, bodies)}
    if kind == envelope.KIND_MANIFEST and isinstance(h, bytes):
        cut = int(meta.get("kept_bytes", 0))
        decoded["kept_frames"] = _frames(h, payload[:cut], bodies)
        decoded["inline_frames"] = _frames(h, payload[cut:], bodies)
    elif kind == envelope.KIND_STATE_BLOB:
        decoded["content_bytes"] = len(payload)
        if bodies:
            decoded["content"] = payload.decode(errors="replace")
    elif kind == envelope.KIND_ROWS and isinstance(h, bytes):
        decoded["rows"] = _aside_rows(h, payload, bodies)
    elif payload and isinstance(h, bytes):
        decoded["frames"] = _frames(h, payload, bodies)
    elif payload:
        decoded["payload_bytes"] = len(payload)
    return decoded


def _aside_rows(h: bytes, payload: bytes, bodies: bool) -> list[dict[str, Any]]:
    """The rows of a session that repair moved aside, each as far as it verifies."""
    from sessiond.tiers.hot.blobs import blob_of_row, ledger_of_row
    from sessiond.tiers.hot.rows import decode_committed, decode_head, unwrap
    from sessiond.tiers.hot.survey import read_rows

    shown: list[dict[str, Any]] = []
    for table, rows in read_rows(payload).items():
        for key, value in rows:
            row: dict[str, Any] = {"table": table, "key": key.hex(), "bytes": len(value)}
            try:
                if table == "heads":
                    head = decode_head(h, value)
                    fields = {name: _readable(getattr(head, name)) for name in head.__struct_fields__}
                    row["head"] = {**fields, "state": _state(head.state, bodies)}
                elif table == "turns":
                    row["frames"] = _frames(h, value, bodies, behind_damage=True)
                elif table == "ids":
                    row["turn_ids"] = _turn_ids(unwrap(h, table, value))
                elif table == "checkpoints":
                    row["state"] = _state(unwrap(h, table, value), bodies)
                elif table == "manifests":
                    from sessiond.core.manifest import encode_meta

                    row["manifest"] = _readable_meta(encode_meta(decode_committed(h, value)), bodies)
                elif table == "states" and len(key) > len(h):
                    row["blob"] = {"key": key[len(h) :].decode(errors="replace")}
                    row["blob"].update(_blob(blob_of_row(h, value), bodies))
                elif table == "states":
                    row["writes"] = _writes(ledger_of_row(h, value).writes)
                elif table == "users":
                    row["session"] = unwrap(h, table, value).decode(errors="replace")
            except SessiondError as error:
                row["damage"] = exits.line_of(error)
            shown.append(row)
    return shown


def _bucket_json(stored: bytes, name: str) -> dict[str, Any]:
    from sessiond.tiers.cloud.bucket import BUCKET_KEY, check_bytes

    shown: dict[str, Any] = {}
    try:
        fields = json.loads(stored)
        # By name, for a flipped bit may be in the name of the key.
        kept = {key: "(kept here, not shown)" for key, value in fields.items() if key not in BUCKET_SHOWN and value}
        shown["bucket"] = {**fields, **kept}
    except ValueError as error:
        if Path(name).name != BUCKET_KEY:
            raise Invalid("INVALID_INPUT_FILE", f"{name} is no object of sessiond: {error}.") from error
    try:
        check_bytes(stored, name)
    except Corrupt as error:
        shown["damage"] = exits.line_of(error)
    return shown


def _readable_meta(meta: dict[str, Any], bodies: bool) -> dict[str, Any]:
    readable: dict[str, Any] = {}
    for name, value in meta.items():
        if name == "state" and value:
            readable[name] = _state(value, bodies)
        elif name == "checkpoints":
            readable[name] = [{"version": _version(v), "state": _state(state, bodies)} for v, state in value]
        elif name == "turn_ids" and isinstance(value, bytes):
            readable[name] = _turn_ids(value)
        elif name == "state_keys" and isinstance(value, dict) and value:
            readable[name] = _state_keys(value, bodies)
        elif name == "birth" and isinstance(value, dict):
            readable[name] = {**value, "metadata": _withheld(value.get("metadata", {}), bodies)}
        else:
            readable[name] = _readable(value)
    return readable


def _readable(value: Any) -> Any:
    if isinstance(value, (bytes, memoryview)):
        return bytes(value).hex()
    if isinstance(value, dict):
        return {str(key): _readable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(inner) for inner in value]
    return value


def _withheld(values: dict[str, Any], bodies: bool) -> dict[str, Any]:
    if bodies:
        return {key: _readable(value) for key, value in values.items()}
    return {key: f"({len(str(value).encode())} bytes)" for key, value in values.items()}


def _version(version: int) -> str:
    return f"{version >> 32}:{version & 0xFFFFFFFF}"


def _state(raw: bytes, bodies: bool) -> Any:
    from sessiond.core import state as states

    try:
        places = states.decode(raw)._asdict()
    except SessiondError as error:
        return {"damage": exits.line_of(error)}
    readable = {name: _readable(value) for name, value in places.items()}
    readable["pins"] = {
        key: {
            "value": value[0] if bodies else f"({len(value[0].encode())} bytes)",
            "at": value[1:3],
            "tokens": value[3:],
        }
        for key, value in places["pins"].items()
    }
    readable["metadata"] = _withheld(places["metadata"], bodies)
    return readable


def _turn_ids(entries: bytes) -> list[dict[str, Any]]:
    return [
        {
            "seq": int.from_bytes(entries[at + 16 : at + 24], "big"),
            "turn_id_hash": entries[at : at + 8].hex(),
            "body_digest_start": entries[at + 8 : at + 16].hex(),
        }
        for at in range(0, len(entries), 24)
    ]


def _state_keys(state_keys: dict[str, Any], bodies: bool) -> dict[str, Any]:
    """What a manifest says of blobs."""
    from sessiond.core import blobs

    rows = [
        {
            "key": row[0],
            **_blob(blobs.blob_of(row), bodies),
            "object_sha256": bytes(row[7]).hex(),
            "stored_bytes": row[8],
        }
        for row in blobs.rows(state_keys)
    ]
    writes = _writes(bytes(state_keys.get("writes", b"")))
    return {**_readable(state_keys), "rows": rows, "writes": writes}


def _blob(blob: Any, bodies: bool) -> dict[str, Any]:
    return {
        "version": _version(blob.version),
        "size": blob.size,
        "sha256": blob.sha256.hex(),
        "media_type": blob.media_type,
        "updated_ms": blob.updated_ms,
        "labels": _withheld(blob.labels, bodies),
    }


def _writes(entries: bytes) -> list[dict[str, Any]]:
    return [
        {
            "write_id_hash": entries[at : at + 8].hex(),
            "version": _version(int.from_bytes(entries[at + 24 : at + 32], "big")),
            "time_unix_ms": int.from_bytes(entries[at + 32 : at + 40], "big"),
        }
        for at in range(0, len(entries), 40)
    ]


def _frames(h: bytes, buffer: bytes, bodies: bool, behind_damage: bool = False) -> list[dict[str, Any]]:
    """Every frame up to the first that does not verify, and what is wrong with it; those behind it too if asked."""
    from sessiond import core
    from sessiond.v1 import turn_pb2

    frames: list[dict[str, Any]] = []
    offset = 0
    while offset < len(buffer):
        try:
            header = core.read_frame(h, buffer, offset)
        except Corrupt as error:
            frames.append({"offset": offset, "damage": exits.line_of(error)})
            if not behind_damage:
                break
            from sessiond.tiers.hot.survey import next_frame

            following = next_frame(h, buffer, offset)
            if following is None:
                break
            offset = following
            continue
        turn = turn_pb2.Turn.FromString(buffer[offset + 6 : header.end])
        frame: dict[str, Any] = {
            "offset": offset,
            "bytes": header.end - offset,
            "seq": header.seq,
            "epoch": header.epoch,
            "time_unix_ms": header.time_ms,
            "kind": output.enum_text(turn_pb2.TurnKind, header.kind, "TURN_KIND_"),
            "role": output.enum_text(turn_pb2.Role, header.role, "ROLE_") if header.role else "",
            "status": output.enum_text(turn_pb2.TurnStatus, header.status, "TURN_STATUS_") if header.status else "",
            "flags": [name for bit, name in FLAG_NAMES.items() if header.flags & bit],
            "prev_live_seq": header.prev_live_seq,
            "tokens": list(header.tokens),
            "cumulative": list(header.cumulative),
            "body_digest": header.digest.hex(),
            "chain": header.chain.hex(),
            "turn_id": turn.turn_id,
        }
        if bodies:
            frame["body"] = _body(turn)
        frames.append(frame)
        offset = header.end
    return frames


def _body(turn: Any) -> dict[str, Any]:
    which = turn.WhichOneof("body")
    body = {which: output.plain(getattr(turn, which))} if which else {}
    if turn.HasField("meta"):
        body["meta"] = output.plain(turn.meta)
    return body


# Tiers ---------------------------------------------------------------------------------------------------------------


def _hot_list(loaded: Settings) -> dict[str, Any]:
    from sessiond.tiers.hot.environment import TABLES, Reader
    from sessiond.tiers.hot.rows import decode_head

    reader = Reader(loaded.hot_dir)
    try:
        with reader.read() as transaction:
            sessions: list[dict[str, Any]] = []
            for h, value in transaction.scan("heads", b""):
                try:
                    head = decode_head(h, value)
                except Corrupt as error:
                    sessions.append({"h": h.hex(), "damage": exits.line_of(error)})
                    continue
                sessions.append(
                    {
                        "session": head.session,
                        "user": head.user,
                        "tenant": head.tenant,
                        "h": h.hex(),
                        "phase": PHASE_NAMES.get(head.phase, str(head.phase)),
                        "epoch": head.epoch,
                        "head_seq": head.head_seq,
                        "cloud_seq": head.cloud_seq,
                    }
                )
            return {
                "path": str(loaded.hot_dir),
                "incarnation": reader.incarnation.hex(),
                "entries": {name: transaction.entries(name) for name in TABLES},
                "sessions": sessions,
            }
    finally:
        reader.close()


def _hot_session(loaded: Settings, session: str, bodies: bool) -> dict[str, Any] | None:
    """Everything that the hot tier holds of a session; None if there is nothing. No hash key is needed."""
    from sessiond.tiers.hot.environment import Reader
    from sessiond.tiers.hot.rows import decode_head

    reader = Reader(loaded.hot_dir)
    try:
        with reader.read() as transaction:
            for h, value in transaction.scan("heads", b""):
                try:
                    head = decode_head(h, value)
                except Corrupt:
                    if h.hex() == session:
                        return {"h": session, "damage": "The head row does not match its checksum."}
                    continue
                if session in (head.session, h.hex()):
                    return _hot_rows(transaction, h, head, bodies)
        return None
    finally:
        reader.close()


def _hot_rows(transaction: Any, h: bytes, head: Any, bodies: bool) -> dict[str, Any]:
    import msgspec

    from sessiond.core.blobs import Ledger
    from sessiond.core.manifest import encode_meta
    from sessiond.tiers.hot import blobs, log
    from sessiond.tiers.hot.rows import decode_committed

    def guarded(work: Any) -> Any:
        try:
            return work()
        except SessiondError as error:
            return {"damage": exits.line_of(error)}

    fields = {name: getattr(head, name) for name in head.__struct_fields__}
    readable = {name: _readable(value) for name, value in fields.items() if value is not msgspec.UNSET}
    readable["phase"] = PHASE_NAMES.get(head.phase, str(head.phase))
    readable["state"] = _state(head.state, bodies)
    committed = transaction.get("manifests", h)
    rows = []
    for key, value in transaction.scan("turns", h):
        row = bytes(value)
        rows.append(
            {"first_seq": int.from_bytes(key[16:], "big"), "bytes": len(row), "frames": _frames(h, row, bodies)}
        )
    dirty = transaction.get("dirty", h)
    return {
        "h": h.hex(),
        "head": readable,
        "dirty_since_unix_ms": int.from_bytes(bytes(dirty), "big") if dirty is not None else None,
        "committed_manifest": guarded(lambda: _readable_meta(encode_meta(decode_committed(h, committed)), bodies))
        if committed is not None
        else None,
        "rows": rows,
        "blobs": guarded(
            lambda: [
                {"key": key, **_blob(blob, bodies), "hot": blobs.read_content(transaction, h, blob.version) is not None}
                for key, blob in blobs.read_blobs(transaction, h)
            ]
        ),
        "writes": guarded(lambda: _writes((blobs.read_ledger(transaction, h) or Ledger()).writes)),
        "turn_ids": guarded(lambda: _turn_ids(log.turn_ids(transaction, h))),
        "checkpoints": guarded(
            lambda: [
                {"version": _version(version), "state": _state(state, bodies)}
                for version, state in log.checkpoints(transaction, h)
            ]
        ),
    }


def _cloud_session(loaded: Settings, session: str, bodies: bool) -> dict[str, Any] | None:
    from sessiond.core import rules
    from sessiond.tiers.cloud.bucket import manifest_key, open_bucket, refusal
    from sessiond.tiers.cloud.open import open_configured
    from sessiond.tiers.cloud.store import ObjectNotFound, StoreError

    store = open_configured(loaded)
    try:
        bucket = open_bucket(store, bytes.fromhex(loaded.hash_key), 0, make=False)
        key = manifest_key(rules.session_hash(bucket.hash_key, "default", session))
        try:
            stored = store.get(key).body
        except ObjectNotFound:
            return None
        except StoreError as error:
            raise refusal(error) from error
    finally:
        store.close()
    return {"object": key, "stored_bytes": len(stored), **decode_object(stored, key, bodies)}


# Showing -------------------------------------------------------------------------------------------------------------


def _damaged(value: Any) -> bool:
    if isinstance(value, dict):
        return "damage" in value or any(_damaged(inner) for inner in value.values())
    return isinstance(value, list) and any(_damaged(inner) for inner in value)


def _show(value: dict[str, Any], depth: int) -> None:
    indent = "  " * depth
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            print(f"{indent}{name}:")
            _show(inner, depth + 1)
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            print(f"{indent}{name}: {len(inner)}")
            for item in inner:
                _show_item(item, depth + 1)
        else:
            print(f"{indent}{name}: {_inline(inner)}")


def _show_item(item: dict[str, Any], depth: int) -> None:
    """One of a list: what is short on one line, what is nested below it."""
    nested = {name: inner for name, inner in item.items() if isinstance(inner, dict) or _is_rows(inner)}
    flat = " ".join(f"{name}={_inline(inner)}" for name, inner in item.items() if name not in nested and inner != "")
    print("  " * depth + flat)
    _show(nested, depth + 1)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _inline(value: Any) -> str:
    if isinstance(value, str):
        return output.printable(value)
    return json.dumps(value, ensure_ascii=False)
