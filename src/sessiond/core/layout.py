"""Owns the bytes of a turn: where each field of a frame stands, and when a frame, a row and a state are valid.

It never reads a file or a clock. The cloud tier's envelope and manifest are owned by `envelope.py` and `manifest.py`.

FRAME. One turn. It is the wire form of protobuf field 1 (`repeated Turn turns = 1` of every reply), so that a reply
that repeats turns is a copy of frames. All integers are little-endian, as protobuf has them.

    offset  bytes  what                                               protobuf
         0      1  0x0A                                               tag of field 1, length-delimited
         1      5  length L of what follows, varint padded to 5       bytes 1-4 with the high bit set, byte 5 below 8
         6      9  0x09 seq                                           1: fixed64
        15      5  0x15 epoch                                         2: fixed32
        20      9  0x19 append time, ms since 1970                    3: fixed64
        29      2  0x20 kind                                          4: enum, one byte, written even when 0
        31      2  0x28 role                                          5: enum, likewise
        33      2  0x30 status                                        6: enum, likewise
        35      5  0x3D flags                                         7: fixed32
        40      9  0x41 prev_live_seq                                 8: fixed64
        49     18  0x4A 16 (0x09 cumulative 0x15 tokens 0x18 source)  9: TokenCount, o200k_base
        67     18  0x52 16 (likewise)                                 10: TokenCount, cl100k_base
        85     18  0x5A 16 (likewise)                                 11: TokenCount, one encoding to come
       103     19  0x82 0x01 16 body digest                           16: bytes
       122     19  0x8A 0x01 16 chain                                 17: bytes
       141      6  0x95 0x01 crc32c                                   18: fixed32
       147   L-141 body                                               20 to 27

The body is what was received, serialized deterministically (fields 20 to 26), then, for a rewind and for a state turn
that pins facts, field 27 with what the daemon derived (MessagePack). Unknown fields of a newer writer stay as they are.

A frame is valid if and only if
  1. it lies inside its buffer: L >= 141 and 6 + L bytes are there;
  2. every tag and inner length above has its value;
  3. kind is 1..5, role 0..5, status 0..3, each source 0..2;
  4. crc32c is the CRC32C of: the session's hash (16 bytes), frame bytes 0..143, frame bytes 147..end.
Seeding the checksum with the session's hash makes a frame of another session invalid, wherever it turns up.

    body digest = BLAKE2b-16(key = hash key, data = kind, role, status (a byte each), fields 20 to 25 of the body)
    chain       = BLAKE2b-16(previous turn's chain, body digest); the chain before turn 1 is the session's hash
    session's hash h = BLAKE2b-16(key = hash key, data = len(tenant) as 2 bytes, tenant, session id), person "session"

The digest covers what was said, not field 26 (what the caller knew about it, which may differ on a retry) nor field 27.
A body can be redacted (flag 32) without breaking the chain: texts, arguments and URIs go, while turn_id, the kinds and
order of parts, call ids, covered ranges, rewind targets and field 27 stay, so that a replay gives what it gave.
Bits 24 to 31 of flags are the version of the replay rule under which the turn was appended, less 1.

Token columns. `cumulative` counts every user, assistant and tool message ever appended, superseded ones too; it never
falls. System, developer, summary, state, milestone and rewind turns add 0 to it and still carry their own `tokens`.
`prev_live_seq` links each turn to the newest message before it that is in force, instructions left out: following it
from the head visits exactly the messages that a window may hold, however much was rewound or changed in between. This
replaces a skip list of rewound ranges, and bounds the rows that a resume reads by the window instead of the history.

ROW. A value of the hot tier's `turns` table: consecutive whole frames, at most ROW_BYTES_MAX unless a single frame is
larger. SEGMENT. Consecutive whole frames, at most SEGMENT_BYTES_MAX unless a single frame is larger.

STATE. The fold of a log, one MessagePack array with these places (later rules only append places):

     0 rule             1        5 last_live_seq      10 instructions  15 metadata {key: text}
     1 replay_cursor    seq      6 live_messages      11 summary       16 open_calls [[seq, call id], ...]
     2 epoch                     7 live_tokens [3]    12 pins          17 state_at [epoch, seq]
     3 chain            16 B     8 exchanges          13 flags {..}    18 boundary [epoch, seq, time ms]
     4 cumulative       [3]      9 exchange_seq       14 mode          19 milestone [seq, label] or nil
                                                                       20 superseded [[first, last], ...]
                                                                       21 append time of the newest turn, ms

    instructions: [seq, tokens x3] or nil.   pins: {key: [value, epoch, seq, tokens x3]}.
    summary: [[seq, first, last, tokens x3], ...]: summary turns in effect; together they cover 1..last without a gap.
    Maps are written in ascending key order.

A checkpoint is the state at a boundary, and these very bytes. The same rule over the same log gives the same bytes,
in any batching, in either twin.

Caveats. A frame's length is believed before its checksum is known, so a reader bounds it first. Offsets are of this
frame version; a change of any of them is a new format version in the envelope and in the hot tier's meta table.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from sessiond.errors import Corrupt

FRAME_TAG: Final = 0x0A
PREFIX_BYTES: Final = 6
HEADER_BYTES: Final = 147
CRC_OFFSET: Final = 143
CRC_END: Final = 147

SEQ_OFFSET: Final = 7
EPOCH_OFFSET: Final = 16
TIME_OFFSET: Final = 21
KIND_OFFSET: Final = 30
ROLE_OFFSET: Final = 32
STATUS_OFFSET: Final = 34
FLAGS_OFFSET: Final = 36
PREV_LIVE_OFFSET: Final = 41
CUMULATIVE_OFFSETS: Final = (52, 70, 88)
TOKENS_OFFSETS: Final = (61, 79, 97)
SOURCE_OFFSETS: Final = (66, 84, 102)
DIGEST_OFFSET: Final = 106
CHAIN_OFFSET: Final = 125

ENCODING_SLOTS: Final = 3
DIGEST_BYTES: Final = 16

# LMDB stores a value of more than about half a page less its header on overflow pages: 4,096 takes two pages.
ROW_BYTES_MAX: Final = 4080
# One PUT without multipart, and one ranged GET away from any turn in it.
SEGMENT_BYTES_MAX: Final = 4 * 1024 * 1024
# The padded varint holds 31 bits, protobuf's own limit for a message.
FRAME_BYTES_MAX: Final = 64 * 1024 * 1024

KIND_MESSAGE: Final = 1
KIND_SUMMARY: Final = 2
KIND_STATE: Final = 3
KIND_MILESTONE: Final = 4
KIND_REWIND: Final = 5

ROLE_SYSTEM: Final = 1
ROLE_USER: Final = 2
ROLE_ASSISTANT: Final = 3
ROLE_TOOL: Final = 4
ROLE_DEVELOPER: Final = 5

STATUS_COMPLETE: Final = 1
STATUS_INTERRUPTED: Final = 2
STATUS_CANCELLED: Final = 3

FLAG_CUT: Final = 1
FLAG_EXCHANGE: Final = 2
FLAG_BOUNDARY: Final = 4
FLAG_CALLS: Final = 8
FLAG_RESULTS: Final = 16
FLAG_REDACTED: Final = 32
FLAG_INSTRUCTIONS: Final = 64
FLAG_APPLIES: Final = 128

# Field numbers of a turn's body and of what the core reads inside it; see turn.proto.
BODY_TURN_ID: Final = 20
BODY_MESSAGE: Final = 21
BODY_SUMMARY: Final = 22
BODY_STATE: Final = 23
BODY_MILESTONE: Final = 24
BODY_REWIND: Final = 25
BODY_META: Final = 26
BODY_DERIVED: Final = 27

RULE_VERSION: Final = 1
# A window never reaches back over this many separate rewinds in practice; older ones only blur receipts.
SUPERSEDED_RANGES_MAX: Final = 64
# Summaries that extend one another before one has to cover everything anew.
SUMMARIES_MAX: Final = 32
# Calls that wait for a result at one time.
OPEN_CALLS_MAX: Final = 1024

# How fit_window chooses; equal to the Strategy enum of turn.proto.
MODE_FULL: Final = 1
MODE_LAST_N: Final = 2
MODE_SUMMARY: Final = 3
MODE_HYBRID: Final = 4

# First element of fit_window's answer.
FIT_OK: Final = 0
FIT_MORE: Final = 1
FIT_NOTHING: Final = 2

HEADER_STRUCT: Final = struct.Struct("<B5sBQBIBQBBBBBBBIBQ" + "BBBQBIBB" * ENCODING_SLOTS + "BBB16sBBB16sBBI")
assert HEADER_STRUCT.size == HEADER_BYTES


class Header(NamedTuple):
    """A frame's fixed fields, and where the frame and its body lie in the buffer that it was read from."""

    offset: int
    end: int
    seq: int
    epoch: int
    time_ms: int
    kind: int
    role: int
    status: int
    flags: int
    prev_live_seq: int
    cumulative: tuple[int, int, int]
    tokens: tuple[int, int, int]
    sources: tuple[int, int, int]
    digest: bytes
    chain: bytes


def newer_rule(offset: int, flags: int) -> Corrupt:
    """The error both twins raise for a turn of a replay rule that this release does not know."""
    return Corrupt(
        "NEWER_FORMAT",
        f"The turn frame at byte {offset} was appended under replay rule {(flags >> 24) + 1};"
        f" this release knows {RULE_VERSION}.",
    )


def corrupt_frame(offset: int, what: str) -> Corrupt:
    """The error both twins raise for bytes that break a rule above; `offset` is the frame's in its buffer."""
    return Corrupt("CORRUPT_FRAME", f"The turn frame at byte {offset} is damaged: {what}.")


def field_head(number: int, size: int) -> bytes:
    """What stands before a length-delimited protobuf field's payload of so many bytes: tag and length."""
    head = bytearray()
    for value in (number << 3 | 2, size):
        while value > 0x7F:
            head.append(value & 0x7F | 0x80)
            value >>= 7
        head.append(value)
    return bytes(head)
