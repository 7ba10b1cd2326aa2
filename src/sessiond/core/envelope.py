"""Owns the bytes of an object in the cloud tier: the envelope around a manifest, a segment, an index.

It never looks inside the payload and never talks to a store.

    offset  bytes  what (integers little-endian)
         0      8  "SESSIOND"
         8      2  version of the writer's envelope: 1
        10      2  oldest reader that may read it: 1
        12      1  kind: 1 manifest, 2 segment, 3 orphan, 4 user index, 5 segment index, 6 lease, 7 expiry,
                   8 state blob, 9 rows of the hot tier that were moved aside (a file, not an object)
        13      1  codec of each chunk: 0 none (1 zstd, later)
        14      1  cipher of each chunk: 0 none (1 AES-256-GCM, later)
        15      1  0
        16     16  key id; zeros without a cipher
        32      4  chunk size C: plaintext bytes of every chunk but the last, 65,536
        36      4  number of chunks n
        40      8  plaintext length
        48      8  nonce prefix; zeros without a cipher
        56      4  meta length M
        60      4  CRC32C of bytes 0..60 and the chunk table
        64    4*n  chunk table: stored bytes of each chunk, its seal included
    64+4*n     ..  chunks: coded bytes, then the seal: without a cipher 4 bytes CRC32C of (bytes 60..64, chunk number as
                   4 bytes, coded bytes); with one its 16-byte tag

    plaintext = meta (a MessagePack map of M bytes), then the payload (turn frames, for a manifest or segment)

An object is valid if and only if its magic, version, lengths and table add up, the table's CRC matches, every chunk's
seal matches, and the plaintext has the stated length. Each chunk is sealed alone, so a ranged GET of the header and of
some chunks can be checked without the rest. Unknown keys of the meta map are kept and written back by older writers.
A version above ours is read if its oldest reader is not.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

import msgpack

from sessiond import core
from sessiond.errors import Corrupt

MAGIC: Final = b"SESSIOND"
VERSION: Final = 1
CHUNK_BYTES: Final = 64 * 1024
CHUNKS_MAX: Final = 2048

KIND_MANIFEST: Final = 1
KIND_SEGMENT: Final = 2
KIND_ORPHAN: Final = 3
KIND_USER_INDEX: Final = 4
KIND_SEGMENT_INDEX: Final = 5
KIND_LEASE: Final = 6
KIND_EXPIRY: Final = 7
KIND_STATE_BLOB: Final = 8
KIND_ROWS: Final = 9

_HEADER: Final = struct.Struct("<8sHHBBBB16sIIQ8sI")
_CRC_AT: Final = 60
_TABLE_AT: Final = 64
assert _HEADER.size == _CRC_AT


def seal(kind: int, meta: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """An object's stored bytes. meta: text keys. Raises ValueError if it is too large for the chunk table."""
    packed = msgpack.packb(dict(meta), use_bin_type=True)
    assert isinstance(packed, bytes)
    plain = packed + payload
    count = (len(plain) + CHUNK_BYTES - 1) // CHUNK_BYTES
    if count > CHUNKS_MAX:
        raise ValueError(f"an object of {len(plain)} bytes is too large")
    chunks = [plain[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES] for index in range(count)]
    head = _HEADER.pack(
        *(MAGIC, VERSION, 1, kind, 0, 0, 0, bytes(16), CHUNK_BYTES, count, len(plain), bytes(8), len(packed))
    )
    table = struct.pack(f"<{count}I", *(len(chunk) + 4 for chunk in chunks))
    crc = core.crc32c(head + table).to_bytes(4, "little")
    pieces = [head, crc, table]
    for index, chunk in enumerate(chunks):
        pieces += (chunk, _chunk_crc(crc, index, chunk))
    return b"".join(pieces)


def _chunk_crc(header_crc: bytes, index: int, chunk: bytes) -> bytes:
    return core.crc32c(chunk, core.crc32c(header_crc + index.to_bytes(4, "little"))).to_bytes(4, "little")


def unseal(stored: bytes, kind: int, name: str) -> tuple[dict[str, Any], bytes]:
    """(meta, payload) of an object. name: its key, for the error.

    Raises Corrupt: NEWER_FORMAT for a version this release must not read, else CORRUPT_MANIFEST, CORRUPT_SEGMENT or
    CORRUPT_BLOB.
    """
    reason = "CORRUPT_SEGMENT" if kind in (KIND_SEGMENT, KIND_SEGMENT_INDEX, KIND_ORPHAN) else "CORRUPT_MANIFEST"
    if kind == KIND_STATE_BLOB:
        reason = "CORRUPT_BLOB"

    def damaged(what: str) -> Corrupt:
        return Corrupt(reason, f"The object {name} is damaged: {what}.", {"object": name})

    if len(stored) < _TABLE_AT:
        raise damaged("it is cut short")
    (magic, version, oldest, found, codec, cipher, _, _, chunk_bytes, count, length, _, meta_length) = (
        _HEADER.unpack_from(stored)
    )
    if magic != MAGIC:
        raise damaged("it does not start with the magic bytes")
    table_end = _TABLE_AT + 4 * count
    if count > CHUNKS_MAX or len(stored) < table_end:
        raise damaged("its chunk table is out of bounds")
    crc = stored[_CRC_AT:_TABLE_AT]
    if core.crc32c(stored[:_CRC_AT] + stored[_TABLE_AT:table_end]).to_bytes(4, "little") != crc:
        raise damaged("its header's checksum does not match")
    # Only a header that verifies may claim to be newer: a flipped version bit is damage.
    if oldest > VERSION or codec or cipher:
        raise Corrupt(
            "NEWER_FORMAT",
            f"The object {name} has envelope version {version}, codec {codec}, cipher {cipher};"
            f" this release reads version {VERSION}.",
            {"object": name},
        )
    if found != kind:
        raise damaged(f"it is of kind {found}, not {kind}")
    sizes = struct.unpack_from(f"<{count}I", stored, _TABLE_AT)
    if sum(sizes) != len(stored) - table_end or min(sizes, default=4) < 4 or meta_length > length:
        raise damaged("its lengths do not add up")
    pieces, offset = [], table_end
    for index, size in enumerate(sizes):
        chunk = stored[offset : offset + size - 4]
        if _chunk_crc(crc, index, chunk) != stored[offset + size - 4 : offset + size]:
            raise damaged(f"the checksum of chunk {index} does not match")
        if len(chunk) > chunk_bytes:
            raise damaged(f"chunk {index} is too long")
        pieces.append(chunk)
        offset += size
    plain = b"".join(pieces)
    if len(plain) != length:
        raise damaged("its length does not match")
    try:
        meta = msgpack.unpackb(plain[:meta_length], raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise damaged("its meta map does not decode") from error
    if not isinstance(meta, dict):
        raise damaged("its meta is no map")
    return meta, plain[meta_length:]
