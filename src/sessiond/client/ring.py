"""Which of several servers a session belongs to: the ring of gRPC's policy `ring_hash`, in the same places.

It promises that a client of this package and a gRPC channel with docs/routing/service-config.json choose the same
server for a session where both know the servers by the same IP addresses, and go on to the same next one. It sends
nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Final

# gRPC's default of min_ring_size: "A42: xDS Ring Hash LB Policy". Its max_ring_size of 4,096 needs as many servers.
POINTS_MIN: Final = 1024

_MASK: Final = 2**64 - 1
# The five primes of XXH64: "xxHash fast digest algorithm", 0.1.1.
_P1: Final = 0x9E3779B185EBCA87
_P2: Final = 0xC2B2AE3D27D4EB4F
_P3: Final = 0x165667B19E3779F9
_P4: Final = 0x85EBCA77C2B2AE63
_P5: Final = 0x27D4EB2F165667C5


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0, by its specification: what gRPC places servers and requests on the ring by."""
    size = len(data)
    at = 0
    if size >= 32:
        lanes = [(_P1 + _P2) & _MASK, _P2, 0, -_P1 & _MASK]
        while size - at >= 32:
            for lane in range(4):
                word = int.from_bytes(data[at + 8 * lane : at + 8 * lane + 8], "little")
                lanes[lane] = _round(lanes[lane], word)
            at += 32
        mixed = sum(_rotated(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            mixed = ((mixed ^ _round(0, lane)) * _P1 + _P4) & _MASK
    else:
        mixed = _P5
    mixed = (mixed + size) & _MASK
    while size - at >= 8:
        mixed = (_rotated(mixed ^ _round(0, int.from_bytes(data[at : at + 8], "little")), 27) * _P1 + _P4) & _MASK
        at += 8
    if size - at >= 4:
        word = int.from_bytes(data[at : at + 4], "little")
        mixed = (_rotated(mixed ^ (word * _P1 & _MASK), 23) * _P2 + _P3) & _MASK
        at += 4
    for byte in data[at:]:
        mixed = _rotated(mixed ^ (byte * _P5 & _MASK), 11) * _P1 & _MASK
    mixed = (mixed ^ mixed >> 33) * _P2 & _MASK
    mixed = (mixed ^ mixed >> 29) * _P3 & _MASK
    return mixed ^ mixed >> 32


def _rotated(value: int, by: int) -> int:
    return (value << by | value >> 64 - by) & _MASK


def _round(lane: int, word: int) -> int:
    return _rotated((lane + word * _P2) & _MASK, 31) * _P1 & _MASK


class Ring:
    """Servers of equal weight on a ring."""

    def __init__(self, servers: Sequence[str]) -> None:
        self._servers = list(dict.fromkeys(servers))
        each = -(-POINTS_MIN // len(self._servers))
        points = sorted(
            (xxh64(f"{server}_{number}".encode()), index)
            for index, server in enumerate(self._servers)
            for number in range(each)
        )
        self._places = [place for place, _ in points]
        self._owners = [index for _, index in points]

    def order(self, key: str) -> list[str]:
        """All servers: the one that the key belongs to, then those that take over from it, one after the other."""
        start = bisect.bisect_left(self._places, xxh64(key.encode()))
        order: dict[str, None] = {}
        for step in range(len(self._owners)):
            order.setdefault(self._servers[self._owners[(start + step) % len(self._owners)]])
            if len(order) == len(self._servers):
                break
        return list(order)
