"""docs/errors.md and the code agree: every reason, its kind, status, delay and remedy, and where each is raised."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from sessiond import errors
from sessiond.errors import REASONS, SessiondError
from sessiond.transport.status import status_code

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for path in (ROOT / "src/sessiond").rglob("*.py") if path.name != "errors.py" and path.parent.name != "v1"
)
KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, SessiondError) and kind is not SessiondError
}
# Functions that take a reason and raise, with the kind that they raise; the reason is their parameter of that name.
HELPERS = {
    "invalid": errors.Invalid,
    "_check_message": errors.Invalid,
    "_check_strategy": errors.Invalid,
    "check_metadata": errors.Invalid,
}
REASON = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|INTERNAL|OVERLOADED")


def table() -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for line in (ROOT / "docs/errors.md").read_text().splitlines():
        if line.startswith("| `"):
            reason, *rest = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert reason.strip("` ") not in rows, f"{reason} stands twice"
            rows[reason.strip("` ")] = rest
    return rows


def strings(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and REASON.fullmatch(inner.value):
            yield inner.value


def raised() -> Iterator[tuple[str, type[SessiondError], str]]:
    """(reason, kind that it is raised as, where) of every reason that is written down in the sources."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        # A reason that is chosen first and raised below.
        chosen = {
            target.id: list(strings(node.value))
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id == "reason"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in HELPERS:
                for default in node.args.defaults:
                    for reason in strings(default):
                        yield reason, HELPERS[node.name], f"{path.name}:{node.lineno}"
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            kind = KINDS.get(name) or HELPERS.get(name)
            if kind is None or not node.args:
                continue
            named = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            places = [*(node.args if name in HELPERS else node.args[:1]), *named]
            for place in places:
                known = chosen.get(place.id, []) if isinstance(place, ast.Name) else strings(place)
                for reason in known:
                    yield reason, kind, f"{path.name}:{node.lineno}"


def test_the_table_lists_exactly_the_reasons_of_the_code() -> None:
    assert list(table()) == list(REASONS)


@pytest.mark.parametrize("reason", REASONS)
def test_the_table_says_what_the_code_does(reason: str) -> None:
    known = REASONS[reason]
    kind, status, retry, meaning, remedy = table()[reason]
    assert kind == known.kind.__name__
    assert status == f"`{known.status}`"
    assert retry == (f"after {known.retry_after_ms} ms" if known.retry_after_ms else "no")
    assert remedy == known.remedy
    assert meaning.endswith(".")
    assert len(meaning) > 20


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_a_status_of_grpc_and_a_remedy_in_one_or_two_sentences(reason: str) -> None:
    known = REASONS[reason]
    assert isinstance(status_code(known.kind(reason, "Something happened.")), grpc.StatusCode)
    assert status_code(known.kind(reason, "Something happened.")) not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
    assert known.remedy[0].isupper()
    assert known.remedy.endswith(".")


def test_every_reason_that_is_raised_exists_and_is_of_the_kind_that_raises_it() -> None:
    found = list(raised())
    assert len(found) > 100, "the sources were not read as they should be"
    for reason, kind, where in found:
        assert reason in REASONS, f"{where} raises {reason}, which is no reason"
        assert REASONS[reason].kind is kind, f"{where} raises {reason} as {kind.__name__}"


def test_every_reason_is_used_somewhere() -> None:
    unused = set(REASONS)
    for path in SOURCES:
        unused -= set(strings(ast.parse(path.read_text())))
    assert not unused


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_reason_of_another_kind_is_refused(kind: type[SessiondError]) -> None:
    other = next(reason for reason, known in REASONS.items() if not issubclass(kind, known.kind))
    with pytest.raises(TypeError, match=other):
        kind(other, "Something happened.")
