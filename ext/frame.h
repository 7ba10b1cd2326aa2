/* The fixed bytes of a turn's frame, and reading and writing at its offsets. sessiond/core/layout.py owns them.
 *
 * Nothing here checks a bound: a caller has compared the frame's length before.
 */
#ifndef SESSIOND_FRAME_H
#define SESSIOND_FRAME_H

#include <assert.h>
#include <stdint.h>
#include <string.h>

#define FRAME_HEADER_BYTES 147
/* Whole words that hold every tag; the checksum's four bytes come after the last of them but one. */
#define FRAME_TAG_WORDS 18

/* Every tag and inner length. None of them is 0, so a 0 stands for a byte that is free. */
static const uint8_t frame_template[FRAME_HEADER_BYTES] = {
    [0] = 0x0A, [6] = 0x09, [15] = 0x15, [20] = 0x19, [29] = 0x20, [31] = 0x28, [33] = 0x30, [35] = 0x3D, [40] = 0x41,
    [49] = 0x4A, [50] = 16, [51] = 0x09, [60] = 0x15, [65] = 0x18,
    [67] = 0x52, [68] = 16, [69] = 0x09, [78] = 0x15, [83] = 0x18,
    [85] = 0x5A, [86] = 16, [87] = 0x09, [96] = 0x15, [101] = 0x18,
    [103] = 0x82, [104] = 0x01, [105] = 16, [122] = 0x8A, [123] = 0x01, [124] = 16, [141] = 0x95, [142] = 0x01,
};
static uint64_t frame_tags[FRAME_TAG_WORDS], frame_mask[FRAME_TAG_WORDS];

static void frame_init(void)
{
    uint8_t mask[8 * FRAME_TAG_WORDS];
    for (int index = 0; index < 8 * FRAME_TAG_WORDS; index++)
        mask[index] = frame_template[index] ? 0xFF : 0;
    memcpy(frame_tags, frame_template, sizeof frame_tags);
    memcpy(frame_mask, mask, sizeof frame_mask);
}

static inline uint32_t load_u32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

static inline uint64_t load_u64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, 8);
    return value;
}

static inline void store_u32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, 4);
}

static inline void store_u64(uint8_t *at, uint64_t value)
{
    memcpy(at, &value, 8);
}

/* Rule 2 of a valid frame, all 31 bytes at once: 18 masked words, which the compiler turns into vectors. */
static inline int frame_tags_right(const uint8_t *at)
{
    uint64_t wrong = 0;
    for (int index = 0; index < FRAME_TAG_WORDS; index++)
        wrong |= (load_u64(at + 8 * index) ^ frame_tags[index]) & frame_mask[index];
    return wrong == 0;
}

/* Rule 3: the enums. */
static inline int frame_enums_right(const uint8_t *at)
{
    return at[30] - 1u < 5 && at[32] <= 5 && at[34] <= 3 && at[66] <= 2 && at[84] <= 2 && at[102] <= 2;
}

#endif
