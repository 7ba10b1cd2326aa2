"""Every daemon of these tests answers by several processes."""

from __future__ import annotations

import pytest

from sessiond import testing

WORKERS = 2


@pytest.fixture(autouse=True)
def with_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(testing.DEFAULTS, "workers", WORKERS)
