# Where everything in a frame stands, as C constants; frame.h's loads and checks. Declarations only.
#
# The numbers are layout.py's, under the same names; tests/core/test_format.py compares the two files.

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum:
    FRAME_TAG = 0x0A
    PREFIX_BYTES = 6
    HEADER_BYTES = 147
    CRC_OFFSET = 143
    CRC_END = 147

    SEQ_OFFSET = 7
    EPOCH_OFFSET = 16
    TIME_OFFSET = 21
    KIND_OFFSET = 30
    ROLE_OFFSET = 32
    STATUS_OFFSET = 34
    FLAGS_OFFSET = 36
    PREV_LIVE_OFFSET = 41
    DIGEST_OFFSET = 106
    CHAIN_OFFSET = 125

    ENCODING_SLOTS = 3
    DIGEST_BYTES = 16
    FRAME_BYTES_MAX = 67108864

    KIND_MESSAGE = 1
    KIND_SUMMARY = 2
    KIND_STATE = 3
    KIND_MILESTONE = 4
    KIND_REWIND = 5

    ROLE_SYSTEM = 1
    ROLE_USER = 2
    ROLE_DEVELOPER = 5

    FLAG_CUT = 1
    FLAG_EXCHANGE = 2
    FLAG_BOUNDARY = 4
    FLAG_CALLS = 8
    FLAG_RESULTS = 16
    FLAG_APPLIES = 128

    BODY_MESSAGE = 21
    BODY_SUMMARY = 22
    BODY_STATE = 23
    BODY_MILESTONE = 24
    BODY_REWIND = 25
    BODY_DERIVED = 27

    SUPERSEDED_RANGES_MAX = 64

    MODE_FULL = 1
    MODE_LAST_N = 2
    MODE_SUMMARY = 3
    MODE_HYBRID = 4

    FIT_OK = 0
    FIT_MORE = 1
    FIT_NOTHING = 2

cdef enum:
    # Of slot 0; each slot is SLOT_BYTES after the one before.
    CUMULATIVE_OFFSET = 52
    TOKENS_OFFSET = 61
    SOURCE_OFFSET = 66
    SLOT_BYTES = 18


cdef extern from "frame.h" nogil:
    const uint8_t[147] frame_template
    void frame_init()
    uint32_t load_u32(const uint8_t* at)
    uint64_t load_u64(const uint8_t* at)
    void store_u32(uint8_t* at, uint32_t value)
    void store_u64(uint8_t* at, uint64_t value)
    bint frame_tags_right(const uint8_t* at)
    bint frame_enums_right(const uint8_t* at)
    # C's own assert: alive in a debug build only.
    void c_assert "assert"(bint condition)
