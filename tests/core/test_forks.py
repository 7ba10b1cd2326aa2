"""Frames of a parent in its fork: the same turns, states and windows under another session's checksum."""

from __future__ import annotations

import pytest

from sessiond import core
from sessiond.core import forks
from sessiond.core.layout import MODE_FULL, MODE_HYBRID
from sessiond.errors import Corrupt
from tests.core.loggen import HASH, random_log

OTHER = bytes(range(16))


@pytest.mark.parametrize("seed", range(20))
def test_frames_sealed_anew_are_the_same_turns_under_another_hash(seed: int) -> None:
    frames, headers, states = random_log(seed, 60)
    stream = b"".join(frames)
    scanned = core.scan_frames(HASH, stream)
    anew = forks.reseal(OTHER, stream, scanned)
    assert core.scan_frames(OTHER, anew) == scanned
    assert [header._replace(offset=0, end=0) for header in scanned] == [
        header._replace(offset=0, end=0) for header in headers
    ]
    assert core.replay(OTHER, states[0], anew) == states[-1]
    assert forks.reseal(HASH, anew, scanned) == stream
    assert forks.reseal(OTHER, stream, scanned[:7]) == anew[: scanned[6].end]
    with pytest.raises(Corrupt):
        core.scan_frames(HASH, anew)
    state = core.read_frame(HASH, frames[-1])
    for mode, room in ((MODE_FULL, 10**6), (MODE_HYBRID, 300)):
        last = max((header.seq for header in scanned if header.kind == 1 and header.role in (2, 3, 4)), default=0)
        if last != state.seq:
            continue
        fits = [
            core.fit_window(h, [rows], 0, last, 0, mode, 0, room, room, 75, 0)
            for h, rows in ((HASH, stream), (OTHER, anew))
        ]
        assert fits[0][:4] + fits[0][5:] == fits[1][:4] + fits[1][5:]
