"""Every daemon of these tests answers by several processes, unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sessiond import testing

WORKERS = 2


@pytest.fixture(autouse=True, scope="module")
def with_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(testing.DEFAULTS, "workers", WORKERS)
        yield
