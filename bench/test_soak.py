"""The short version of `make soak`: two minutes in a whole run, some seconds in a quick one."""

from __future__ import annotations

from typing import Any

from bench.soak import soak


def test_mixed_load(benchmark: Any, ledger: Any, size: Any) -> None:
    minutes, slice_s = (0.1, 2) if size.quick else (2, 5)
    benchmark.pedantic(lambda: soak(ledger, minutes, slice_s), rounds=1, iterations=1)
    assert any(figure.promise == "soak" for figure in ledger.ratios)
