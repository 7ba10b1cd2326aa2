"""The house is in order: nothing stray at the top, no trace of a build machine, a docstring on every room."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TOP = {
    ".ci",
    ".dockerignore",
    ".gitignore",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "Dockerfile",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "bench",
    "docs",
    "examples",
    "ext",
    "helm",
    "proto",
    "pyproject.toml",
    "sessiond.toml",
    "setup.py",
    "src",
    "systemd",
    "tests",
}

# Folders that exist on one machine and not on the next: homes, and the work folder of a build.
MACHINE_PATH = re.compile(rb"(?<![\w.~$}/*-])/(?:work|root|Users/\w+|home/[a-z]\w*|builds|github/workspace)/[\w.]")

ROOMS = sorted(
    path
    for path in [*ROOT.glob("src/sessiond/*.py"), *ROOT.glob("src/sessiond/*/__init__.py")]
    if path.parent.name != "v1"  # generated
)


# What a working folder holds beside what is under version control, where git cannot tell.
MADE_HERE = {".git", ".venv", "build", "dist", "sessiond-data", "__pycache__"}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file under version control that is still there; of an unpacked archive, every file that came with it."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        files = [ROOT / name for name in done.stdout.split("\0") if name]
    except (FileNotFoundError, subprocess.CalledProcessError):
        files = [
            file
            for file in ROOT.rglob("*")
            if not any(
                part in MADE_HERE or part.endswith((".egg-info", "_cache", ".so")) or part.startswith(".hypothesis")
                for part in file.relative_to(ROOT).parts
            )
        ]
    assert ROOT / "pyproject.toml" in files
    return [file for file in files if file.is_file()]


def test_the_top_level_holds_only_what_belongs_there(tracked):
    assert {file.relative_to(ROOT).parts[0] for file in tracked} <= TOP


def test_no_file_names_a_folder_of_the_machine_that_made_it(tracked):
    found = {
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]!r}"
        for file in tracked
        for number, line in enumerate(file.read_bytes().splitlines(), 1)
        if MACHINE_PATH.search(line)
    }
    assert found == set()


def test_nothing_that_is_built_is_tracked(tracked):
    built = {".so", ".pyc", ".o", ".whl", ".egg-info"}
    assert [file for file in tracked if file.suffix in built] == []


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_every_room_says_what_it_promises(room):
    assert ast.get_docstring(ast.parse(room.read_text())), f"{room} has no docstring"
