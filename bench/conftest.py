"""Options, sizes and the table of the benchmarks. `python -m pytest bench --benchmark-only -q -p no:cacheprovider`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.ratio import Ledger
from sessiond import core
from tests.seaweed import Seaweed, running_seaweed

RESULTS = Path("build/bench/ratios.json")
QUICK_RESULTS = Path("build/bench/ratios-quick.json")
_LEDGER = pytest.StashKey[Ledger]()


@dataclass(frozen=True)
class Size:
    """How much a run does. quick: enough to see that a case works; its figures mean nothing."""

    quick: bool

    def of(self, full: int, quick: int) -> int:
        """A number that depends on it."""
        return quick if self.quick else full


def _is_quick(config: pytest.Config) -> bool:
    # `make bench SMOKE=1` comes in through the environment, as make passes on what its command line set.
    return bool(config.getoption("--quick")) or any(os.environ.get(name) for name in ("BENCH_QUICK", "SMOKE"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sessiond benchmarks")
    group.addoption("--quick", action="store_true", help="only see that the benchmarks work (also BENCH_QUICK=1)")
    group.addoption("--ratios", metavar="PATH", help=f"where the ratios are written as JSON (default {RESULTS})")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEDGER] = Ledger(_is_quick(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _is_quick(config):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _path(config: pytest.Config) -> Path:
    return Path(config.getoption("--ratios") or config.rootpath / (QUICK_RESULTS if _is_quick(config) else RESULTS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    ledger = item.config.stash[_LEDGER]
    if report.failed:
        # Its kind only: what it says may name paths of this machine, and stands in the output.
        ledger.failed.append(f"{item.name} ({report.when}): {call.excinfo.typename if call.excinfo else ''}")
    elif report.skipped:
        ledger.leave_out(item.name, str(call.excinfo.value) if call.excinfo else "")
    elif report.when == "call":
        ledger.passed += 1
    # After every case, so that a run that is killed in its last one has lost nothing but that.
    if report.when == "teardown":
        ledger.save(_path(item.config))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ledger = config.stash[_LEDGER]
    if not ledger.ratios and not ledger.notes and not ledger.failed and not ledger.left_out:
        return
    path = _path(config)
    ledger.save(path)
    quick = " (quick: the figures mean nothing)" if ledger.quick else ""
    terminalreporter.section(f"ratios{quick}")
    for line in ledger.table():
        terminalreporter.write_line(line)
    for case, text in ledger.notes:
        terminalreporter.write_line(f"{case}: {text}")
    for case, why in ledger.left_out:
        terminalreporter.write_line(f"{case}: not run: {why}")
    terminalreporter.write_line(f"compiled core: {core.COMPILED}; written to {path}")


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> Size:
    return Size(_is_quick(pytestconfig))


@pytest.fixture(scope="session")
def ledger(pytestconfig: pytest.Config) -> Ledger:
    return pytestconfig.stash[_LEDGER]


@pytest.fixture(scope="session")
def seaweed() -> Iterator[Seaweed]:
    with running_seaweed() as server:
        yield server
