"""What bench/RESULTS.md says: every promise, whatever came of it, and a peer that is faster is shown to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report
from bench.promises import PROMISES
from bench.ratio import Ledger


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(quick=False)


def written(ledger: Ledger, folder: Path) -> str:
    ledger.save(folder / "figures.json")
    assert report.main([str(folder / "figures.json"), str(folder / "out")]) == 0
    assert (folder / "out" / "RESULTS.json").read_bytes() == (folder / "figures.json").read_bytes()
    return (folder / "out" / "RESULTS.md").read_text()


def row(text: str, *cells: str) -> str:
    """The one line that has all of these cells."""
    found = [line for line in text.splitlines() if all(f"| {cell} |" in line for cell in cells)]
    assert len(found) == 1, found
    return found[0]


def test_every_promise_stands_there_also_without_a_figure(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add("a case", "p50", "bare handler", "s", [1.0], [1.0], "hot p50")
    text = written(ledger, tmp_path)
    for key, promise in PROMISES.items():
        lines = [line for line in text.splitlines() if line.startswith(f"| {promise.what} |")]
        assert any(("not measured here" in line) == (key != "hot p50") for line in lines), key


@pytest.mark.parametrize(
    ("key", "ours", "verdict"),
    [
        # At most 1.10 and at least 0.85 of the other side, which is 100.
        ("hot p50", [100.0, 105.0, 109.0], "reached"),
        ("hot p50", [109.0, 120.0, 125.0], "**not reached**, within the spread"),
        ("hot p50", [100.0, 105.0, 125.0], "reached, within the spread"),
        ("hot p50", [120.0, 121.0, 125.0], "**not reached**"),
        ("hot calls", [85.0, 90.0, 99.0], "reached"),
        ("hot calls", [50.0, 60.0, 70.0], "**not reached**"),
    ],
)
def test_a_verdict_goes_by_the_median_and_tells_of_a_spread(
    ledger: Ledger, tmp_path: Path, key: str, ours: list[float], verdict: str
) -> None:
    ledger.add("a case", "p50", "bare handler", "s", ours, [100.0] * len(ours), key)
    assert row(written(ledger, tmp_path), PROMISES[key].what).endswith(f"| {verdict} |")


def test_a_promise_of_seconds_is_judged_by_our_own_side(ledger: Ledger, tmp_path: Path) -> None:
    ledger.alone("a case", "p99", "s", [0.004, 0.0045, 0.006], "busy p99")
    line = row(written(ledger, tmp_path), PROMISES["busy p99"].what)
    assert line.endswith("| at most 5 ms | 4,500 us | 4,000 us - 6,000 us | reached, within the spread |")


def test_a_peer_is_compared_the_other_way_round_and_shown_where_it_is_faster(ledger: Ledger, tmp_path: Path) -> None:
    slow = ledger.add("a case", "p50", "a slow peer", "s", [0.002, 0.004], [0.004, 0.016], "redis 1000", faster=True)
    fast = ledger.add("a case", "p50", "a fast peer", "s", [0.004, 0.004], [0.001, 0.001], "redis best", faster=True)
    assert (slow.each, slow.ratio, fast.ratio) == ([2.0, 4.0], 3.0, 0.25)
    text = written(ledger, tmp_path)
    assert "- a fast peer: 1,000 us against our 4,000 us, 4.0 times as fast (a case)" in text
    assert "- a slow peer" not in text
    assert row(text, PROMISES["redis best"].what, "a fast peer").endswith("| reported |")


def test_what_failed_and_what_could_not_be_run_stand_there(ledger: Ledger, tmp_path: Path) -> None:
    ledger.failed.append("test_a_case (call): AssertionError")
    ledger.leave_out("a peer", "redis-server is missing; apt install redis-server")
    text = written(ledger, tmp_path)
    assert "0 cases passed, 1 failed, 1 sides or cases were not run." in text
    assert "- test_a_case (call): AssertionError" in text
    assert "- a peer: redis-server is missing; apt install redis-server" in text


def test_a_case_that_names_no_promise_that_there_is_fails_at_once(ledger: Ledger) -> None:
    with pytest.raises(AssertionError):
        ledger.add("a case", "p50", "bare handler", "s", [1.0], [1.0], "hot p51")


def test_a_run_says_whether_its_figures_mean_anything(tmp_path: Path) -> None:
    assert "figures mean nothing" in written(Ledger(quick=True), tmp_path)
    assert "figures mean nothing" not in written(Ledger(quick=False), tmp_path)
