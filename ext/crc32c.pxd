# CRC32C over raw states; see crc32c.h. Declarations only.

from libc.stdint cimport uint8_t, uint32_t


cdef extern from "crc32c.h" nogil:
    void crc32c_init()
    uint32_t crc32c_raw(uint32_t state, const uint8_t* at, size_t size)
    uint32_t crc32c_raw_two(
        uint32_t state, const uint8_t* first, size_t first_size, const uint8_t* second, size_t second_size
    )
