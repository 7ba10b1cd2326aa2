"""What the folder store keeps beyond the contract: locks, crashes, failing disks, and a root that goes away."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sessiond import errors
from sessiond.tiers import local_disk
from sessiond.tiers.cloud import folder
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.cloud.store import (
    Ambiguous,
    BucketMissing,
    ObjectNotFound,
    PreconditionLost,
    StoreDenied,
    StoreUnavailable,
)

# Every method that may find that the root is gone.
CALLS: list[Callable[[FolderStore], object]] = [
    lambda store: store.get("m/1"),
    lambda store: store.get("m/never"),
    lambda store: store.put("m/1", b"new"),
    lambda store: store.put("m/1", b"new", if_absent=True),
    lambda store: store.put("m/1", b"new", if_match="x"),
    lambda store: store.delete("m/1"),
    lambda store: list(store.list("")),
    lambda store: list(store.list("m/")),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that opens stores; the script has the prelude's names, and the arguments as `args`."""
    prelude = (
        "import os, sys, signal\nfrom pathlib import Path\n"
        "from sessiond.tiers.cloud.folder import FolderStore\n"
        "from sessiond.tiers.cloud.store import PreconditionLost\nargs = sys.argv[1:]\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status
    return out


def temps(root: Path) -> list[str]:
    return os.listdir(root / ".tmp")


def notes(root: Path) -> list[str]:
    return [text for file in sorted((root / ".locks").iterdir()) if (text := file.read_text())]


@pytest.fixture
def fsynced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of every fsync that this test makes."""
    seen: list[str] = []
    fsync = os.fsync

    def recording(descriptor: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    return seen


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, at: Callable[[str], bool]) -> None:
    """Let os.<name> fail with the errno from now on, for descriptors and paths that `at` says yes to."""
    real = getattr(os, name)

    def fail(target: int | str, *rest: object, **named: object) -> object:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        if at(path):
            raise OSError(number, os.strerror(number), path)
        return real(target, *rest, **named)

    monkeypatch.setattr(os, name, fail)


# Conditional writes among processes

INCREMENT = """
store = FolderStore(Path(args[0]))
print("open", flush=True)
sys.stdin.readline()
won = 0
for number in range(200):
    stored = store.get("m/counter")
    try:
        store.put("m/counter", b"%d" % (int(stored.body) + 1), if_match=stored.etag)
        won += 1
    except PreconditionLost:
        pass
print(won)
"""


def test_no_update_is_lost_among_four_processes_that_increment_one_counter(root: Path):
    store = FolderStore(root)
    store.put("m/counter", b"0")
    processes = [start(INCREMENT, root) for _ in range(4)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    won = [int(finish(process)) for process in processes]
    assert int(store.get("m/counter").body) == sum(won)
    assert all(won)
    # They did meet: had they come one after the other, nobody would have lost.
    assert sum(won) < 800
    assert temps(root) == notes(root) == []


def test_threads_on_many_keys_do_not_disturb_each_other(root: Path):
    store = FolderStore(root)

    def chain(number: int) -> None:
        etag = store.put(f"s/{number}/x", b"0", if_absent=True)
        for value in range(1, 20):
            etag = store.put(f"s/{number}/x", b"%d" % value, if_match=etag)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(chain, range(32)))
    assert {store.get(f"s/{number}/x").body for number in range(32)} == {b"19"}
    assert temps(root) == notes(root) == []


def test_a_reader_never_sees_half_a_write_nor_a_listing_without_the_object(root: Path):
    store = FolderStore(root)
    bodies = [bytes([letter]) * 300_000 for letter in b"ab"]
    store.put("m/1", bodies[0])
    for number in range(50):
        store.put(f"m/other-{number}", b"")
    over = threading.Event()

    def replace() -> None:
        for number in range(100):
            store.put("m/1", bodies[number % 2])
        over.set()

    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(replace)
        while not over.is_set() and not replacing.done():
            assert store.get("m/1").body in bodies
            assert len(list(store.list("m/"))) == 51
        replacing.result()


def test_a_lock_that_stays_taken_is_given_up_on_and_nothing_is_written(root: Path):
    store = FolderStore(root, lock_wait_ms=30)
    store.put("m/1", b"one")
    held = [os.open(file, os.O_RDWR) for file in (root / ".locks").iterdir()]
    for descriptor in held:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StoreUnavailable, match="was not free within 30 ms"):
        store.put("m/1", b"two")
    with pytest.raises(StoreUnavailable, match="was not free within 30 ms"):
        store.delete("m/1")
    assert store.get("m/1").body == b"one"  # readers do not wait
    for descriptor in held:
        os.close(descriptor)
    store.put("m/1", b"two")


def test_a_thread_gives_up_on_a_thread_of_its_own_process_too(root: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(root, lock_wait_ms=30)
    entered, leave = threading.Event(), threading.Event()
    rename = os.rename

    def stuck(source: str, target: str) -> None:
        entered.set()
        assert leave.wait(30)
        rename(source, target)

    monkeypatch.setattr(os, "rename", stuck)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(store.put, "m/1", b"one")
        assert entered.wait(30)
        with pytest.raises(StoreUnavailable, match="was not free"):
            store.put("m/1", b"two")
        leave.set()
        first.result(30)
    assert store.get("m/1").body == b"one"


# Durability


def test_a_put_costs_one_fsync_of_the_file_and_one_of_its_folder(root: Path, fsynced: list[str]):
    store = FolderStore(root)
    store.put("m/1", b"one")
    fsynced.clear()
    etag = store.put("m/1", b"two")
    store.put("m/1", b"three", if_match=etag)
    store.put("m/2", b"four", if_absent=True)
    assert [path.startswith(f"{root}/.tmp/") for path in fsynced[::2]] == [True] * 3
    assert fsynced[1::2] == [f"{root}/m"] * 3


def test_every_new_folder_is_on_disk_before_a_put_returns(root: Path, fsynced: list[str]):
    FolderStore(root / "deeper")
    assert {f"{root}/deeper", f"{root}", f"{root.parent}"} <= set(fsynced)
    store = FolderStore(root)
    fsynced.clear()
    store.put("u/a/b/1", b"one")
    assert [path for path in fsynced if ".tmp" not in path] == [f"{root}", f"{root}/u", f"{root}/u/a", f"{root}/u/a/b"]


def test_a_folder_that_another_process_made_is_put_on_disk_too(root: Path, fsynced: list[str]):
    store = FolderStore(root)
    (root / "s" / "ab").mkdir(parents=True)
    fsynced.clear()
    store.put("s/ab/1", b"one")
    assert {f"{root}", f"{root}/s", f"{root}/s/ab"} <= set(fsynced)


def test_a_delete_is_on_disk_when_it_returns_even_if_the_file_was_gone(root: Path, fsynced: list[str]):
    store = FolderStore(root)
    store.put("m/1", b"one")
    for _ in range(2):
        fsynced.clear()
        store.delete("m/1")
        assert fsynced == [f"{root}/m"]


def test_what_is_known_of_folders_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch, fsynced: list[str]):
    monkeypatch.setattr(folder, "DURABLE_FOLDERS_MAX", 4)
    store = FolderStore(root)
    for number in range(10):
        store.put(f"s/{number}/x", b"")
        assert len(store._durable) <= 4
    fsynced.clear()
    store.put("s/0/x", b"")
    assert f"{root}/s" in fsynced


def test_only_the_daemons_user_can_read_what_is_stored(root: Path):
    store = FolderStore(root)
    store.put("m/1", b"one")
    for path in (root, root / ".locks", root / ".tmp", root / "m"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (root / ".locks" / "00", root / "m" / "1"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


# Crashes

KILLED_BEFORE_RENAME = """
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
FolderStore(Path(args[0])).put("m/1", b"never renamed")
"""

KILLED_AFTER_RENAME = """
store = FolderStore(Path(args[0]))
rename = os.rename
def renaming(*paths):
    rename(*paths)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = renaming
store.put("m/1", b"renamed")
"""

STOPPED_BEFORE_RENAME = """
store = FolderStore(Path(args[0]))
rename = os.rename
def renaming(*paths):
    print("ready", flush=True)
    sys.stdin.readline()
    rename(*paths)
os.rename = renaming
store.put("m/1", b"late")
"""


def test_what_a_killed_put_left_is_removed_at_the_next_opening_and_never_listed(root: Path):
    store = FolderStore(root)
    store.put("m/1", b"one")
    finish(start(KILLED_BEFORE_RENAME, root), -signal.SIGKILL)
    assert len(temps(root)) == 1
    assert [row.key for row in store.list("")] == ["m/1"]
    (root / ".tmp" / "not-ours").write_bytes(b"")
    FolderStore(root)
    assert temps(root) == ["not-ours"]
    assert store.get("m/1").body == b"one"
    store.put("m/1", b"two")


def test_the_temp_of_a_living_process_is_left_alone(root: Path):
    process = start(STOPPED_BEFORE_RENAME, root)
    assert process.stdout
    assert process.stdin
    assert process.stdout.readline() == "ready\n"
    store = FolderStore(root)
    assert len(temps(root)) == 1
    process.stdin.write("go\n")
    finish(process)
    assert store.get("m/1").body == b"late"
    assert temps(root) == []


def open_again(store: FolderStore) -> None:
    FolderStore(Path(store.url.removeprefix("file://")))


def create_in_vain(store: FolderStore) -> None:
    with pytest.raises(PreconditionLost):
        store.put("m/1", b"mine", if_absent=True)


@pytest.mark.parametrize("settle", [open_again, create_in_vain])
def test_a_rename_whose_writer_was_killed_is_put_on_disk_by_whoever_comes_next(
    root: Path, fsynced: list[str], settle: Callable[[FolderStore], None]
):
    store = FolderStore(root)
    store.put("m/2", b"two")
    finish(start(KILLED_AFTER_RENAME, root), -signal.SIGKILL)
    assert notes(root) == ["m"]
    assert store.get("m/1").body == b"renamed"
    fsynced.clear()
    settle(store)
    assert fsynced.count(f"{root}/m") == 1
    assert notes(root) == []


def test_a_note_of_a_folder_that_is_gone_is_dropped(root: Path):
    store = FolderStore(root)
    finish(start(KILLED_AFTER_RENAME, root), -signal.SIGKILL)
    (root / "m" / "1").unlink()
    (root / "m").rmdir()
    store.put("m/1", b"again")
    assert notes(root) == []


@pytest.mark.parametrize("left", [bytes(40), b"m\0\0\0", b"\xff\xfe"], ids=["zeros", "a piece", "other bytes"])
def test_a_note_that_a_power_cut_left_torn_is_dropped(root: Path, left: bytes):
    FolderStore(root).put("m/1", b"one")
    for lock in (root / ".locks").iterdir():
        lock.write_bytes(left)
    store = FolderStore(root)
    assert store.get("m/1").body == b"one"
    assert notes(root) == []


# A root that goes away


@pytest.mark.parametrize("call", CALLS)
def test_a_root_that_vanished_is_missing_and_is_not_made_again(root: Path, call: Callable[[FolderStore], object]):
    store = FolderStore(root)
    store.put("m/1", b"one")
    root.rename(root.with_name("away"))
    with pytest.raises(BucketMissing):
        call(store)
    assert not root.exists()
    root.with_name("away").rename(root)
    assert store.get("m/1").body == b"one"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("refill", [lambda root: root.mkdir(), lambda root: FolderStore(root)], ids=["empty", "new"])
def test_another_folder_in_the_roots_place_is_not_taken_for_it(
    root: Path, call: Callable[[FolderStore], object], refill: Callable[[Path], object]
):
    store = FolderStore(root)
    store.put("m/1", b"one")
    root.rename(root.with_name("away"))
    refill(root)
    with pytest.raises(BucketMissing):
        call(store)
    assert not (root / "m").exists()


def test_a_root_that_became_a_file_is_missing(root: Path):
    store = FolderStore(root)
    root.rename(root.with_name("away"))
    root.write_bytes(b"")
    for call in CALLS:
        with pytest.raises(BucketMissing):
            call(store)


def test_a_lock_file_that_was_removed_excludes_nobody_and_so_lets_nobody_write(root: Path):
    store = FolderStore(root)
    for file in (root / ".locks").iterdir():
        file.unlink()
    with pytest.raises(StoreUnavailable):
        store.put("m/1", b"one")
    assert not (root / "m").exists()


def test_a_lock_got_on_a_file_that_was_removed_meanwhile_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(root)
    take = folder._flocked

    def remove_then_take(descriptor: int) -> bool:
        os.unlink(os.readlink(f"/proc/self/fd/{descriptor}"))
        return take(descriptor)

    monkeypatch.setattr(folder, "_flocked", remove_then_take)
    with pytest.raises(StoreUnavailable, match="was removed"):
        store.put("m/1", b"one")
    assert not (root / "m").exists()


def test_a_folder_removed_by_hand_is_made_again_and_put_on_disk_again(root: Path, fsynced: list[str]):
    store = FolderStore(root)
    store.put("m/1", b"one")
    store.delete("m/1")
    (root / "m").rmdir()
    with pytest.raises(StoreUnavailable):
        store.put("m/1", b"two")
    fsynced.clear()
    store.put("m/1", b"two")
    assert str(root) in fsynced
    assert store.get("m/1").body == b"two"


# Disks that fail


def test_a_full_disk_is_named_and_nothing_is_written(root: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(root)
    store.put("m/1", b"one")
    for name in ("write", "fsync"):
        for number in (errno.ENOSPC, errno.EDQUOT):
            with monkeypatch.context() as patch:
                failing(patch, name, number, lambda path: "/.tmp/" in path)
                with pytest.raises(StoreUnavailable, match=rf"disk of {root} is full; nothing was written"):
                    store.put("m/1", b"two")
            assert store.get("m/1").body == b"one"
            assert temps(root) == []
    store.put("m/1", b"two")


def test_a_failed_fsync_of_the_file_is_ambiguous_and_stops_writing(root: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(root)
    store.put("m/1", b"one")
    with monkeypatch.context() as patch:
        failing(patch, "fsync", errno.EIO, lambda path: "/.tmp/" in path)
        with pytest.raises(Ambiguous, match="Input/output error"):
            store.put("m/1", b"two")
    assert temps(root) == []
    with pytest.raises(StoreUnavailable, match="until the daemon is restarted"):
        store.put("m/1", b"two")
    with pytest.raises(StoreUnavailable, match="until the daemon is restarted"):
        store.delete("m/1")
    assert store.get("m/1").body == b"one"
    FolderStore(root).put("m/1", b"two")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_fsync_of_the_folder_leaves_the_key_in_doubt(root: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    store = FolderStore(root)
    store.put("m/1", b"one")
    store.put("m/2", b"one")
    with monkeypatch.context() as patch:
        failing(patch, "fsync", number, lambda path: path == f"{root}/m")
        with pytest.raises(Ambiguous):
            store.put("m/1", b"two")
    # Whoever read it now would take for committed what a power loss may still undo.
    with pytest.raises(StoreUnavailable):
        store.get("m/1")
    assert store.get("m/2").body == b"one"
    assert notes(root) == ["m"]
    assert FolderStore(root).get("m/1").body == b"two"
    assert notes(root) == []


def test_a_failed_fsync_after_a_delete_is_not_success(root: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(root)
    store.put("m/1", b"one")
    failing(monkeypatch, "fsync", errno.EIO, lambda path: path == f"{root}/m")
    with pytest.raises(StoreUnavailable):
        store.delete("m/1")
    with pytest.raises(StoreUnavailable):
        store.get("m/1")


def test_a_failed_fsync_while_settling_is_unavailable_because_nothing_was_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    store = FolderStore(root)
    store.put("m/2", b"two")
    finish(start(KILLED_AFTER_RENAME, root), -signal.SIGKILL)
    failing(monkeypatch, "fsync", errno.EIO, lambda path: path == f"{root}/m")
    with pytest.raises(StoreUnavailable):
        store.put("m/1", b"mine")
    assert notes(root) == ["m"]


def test_a_read_error_is_not_absence(root: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(root)
    store.put("m/1", b"one")
    broken = PermissionError(errno.EACCES, "no")

    def fail(path: str) -> bytes:
        raise broken

    monkeypatch.setattr(folder, "_read", fail)
    with pytest.raises(StoreDenied):
        store.get("m/1")
    broken = OSError(errno.EIO, "Input/output error")
    with pytest.raises(StoreUnavailable):
        store.get("m/1")
    with pytest.raises(StoreUnavailable):
        store.put("m/1", b"two", if_match="x")


# Names


def test_a_key_that_collides_with_a_folder_is_refused_and_harms_nothing(root: Path):
    store = FolderStore(root)
    store.put("m/1", b"one")
    for key in ("m", "m/1/x", "m/1/x/y"):
        for condition in ({}, {"if_absent": True}):
            with pytest.raises(StoreDenied, match="collides"):
                store.put(key, b"two", **condition)
        with pytest.raises(ObjectNotFound):
            store.get(key)
        store.delete(key)
    assert [row.key for row in store.list("")] == ["m/1"]
    assert temps(root) == []
    store.put("m/1", b"two")


def test_a_listing_is_in_the_byte_order_of_whole_keys_as_on_s3(root: Path):
    store = FolderStore(root)
    keys = [
        "l-",
        "l-/x",
        "l.",
        "l./x",
        "l/B",
        "l/a-b",
        "l/a-b0/x",
        "l/a.c",
        "l/a/x",
        "l/a/y/z",
        "l/a0",
        "l/b",
        "l0",
        "lA",
    ]
    put = [key for key in keys if not any(other.startswith(key + "/") for other in keys)]
    for key in reversed(put):
        store.put(key, b"")
    assert put == sorted(put)
    assert [row.key for row in store.list("")] == put
    for start_after in [*keys, "l", "l/", "l/a", "l/a/", "l/a/y", "z"]:
        listed = [row.key for row in store.list("", start_after)]
        assert listed == [key for key in put if key > start_after], start_after
        listed = [row.key for row in store.list("l/a", start_after, limit=3)]
        assert listed == [key for key in put if key > start_after and key.startswith("l/a")][:3], start_after


def test_a_listing_reads_only_the_folders_that_it_needs(root: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(root)
    for key in ("m/1", "s/a/1", "s/b/1", "s/c/1", "u/t/v/1", "u/t/w/1"):
        store.put(key, b"")
    read: list[str] = []
    scandir = os.scandir

    def recording(path: str) -> object:
        read.append(os.path.relpath(path, root))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", recording)

    def folders(prefix: str, start_after: str = "", limit: int = 1000) -> list[str]:
        read.clear()
        list(store.list(prefix, start_after, limit))
        return list(read)

    assert folders("u/t/v/") == ["u/t/v"]
    assert folders("s/b") == ["s", "s/b"]
    assert folders("s/", "s/b/1") == ["s", "s/b", "s/c"]
    assert folders("", "t") == [".", "u", "u/t", "u/t/v", "u/t/w"]
    assert folders("s/", limit=1) == ["s", "s/a"]


def test_a_listing_leaves_out_what_is_not_an_object(root: Path):
    store = FolderStore(root)
    store.put("m/1", b"one")
    (root / "lost+found").mkdir()
    (root / "lost+found" / "x").write_bytes(b"")
    (root / "m" / "a b").write_bytes(b"")
    assert [row.key for row in store.list("")] == ["m/1"]


def test_a_listing_leaves_out_what_is_deleted_while_it_is_read(root: Path):
    store = FolderStore(root)
    for key in ("m/1", "m/2", "m/3"):
        store.put(key, b"")
    rows = store.list("m/")
    assert next(rows).key == "m/1"
    store.delete("m/2")
    assert [row.key for row in rows] == ["m/3"]


# Opening


def refused(root: Path) -> errors.SessiondError:
    with pytest.raises(errors.SessiondError) as caught:
        FolderStore(root)
    assert str(root) in caught.value.message
    return caught.value


def test_a_path_that_is_a_file_or_leads_through_one_is_unwritable(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        error = refused(path)
        assert (type(error), error.reason) == (errors.Denied, "UNWRITABLE_FOLDER")
        assert error.fields[0][0] == "cloud"


@pytest.mark.parametrize(
    ("name", "number", "reason"),
    [
        ("makedirs", errno.EACCES, "UNWRITABLE_FOLDER"),
        ("makedirs", errno.EROFS, "UNWRITABLE_FOLDER"),
        ("makedirs", errno.ENOSPC, "DISK_FULL"),
        ("makedirs", errno.EIO, "STORE_UNAVAILABLE"),
        ("open", errno.EROFS, "UNWRITABLE_FOLDER"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, reason: str
):
    FolderStore(root).put("m/1", b"one")
    failing(monkeypatch, name, number, lambda path: str(path).startswith(str(root)))
    assert refused(root).reason == reason


def test_a_full_disk_can_be_opened_for_what_is_on_it(root: Path, monkeypatch: pytest.MonkeyPatch):
    FolderStore(root).put("m/1", b"one")
    failing(monkeypatch, "open", errno.ENOSPC, lambda path: "/.tmp/" in path)
    assert FolderStore(root).get("m/1").body == b"one"


MOUNTS = """\
22 1 0:21 / /proc rw - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 27 0:50 / /srv/nfs\\040share rw - nfs4 server:/x rw
31 27 0:51 / /srv/a rw - autofs systemd-1 rw
32 31 0:52 / /srv/a rw - cifs //server/x rw
33 27 0:53 / /srv/a/local rw master:2 propagate_from:3 - xfs /dev/vdb rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/data", "ext4"),
        ("/srv/nfs share", "nfs4"),
        ("/srv/nfs share/deep/er", "nfs4"),
        ("/srv/nfs shared", "ext4"),
        ("/srv/a/x", "cifs"),
        ("/srv/a/local/x", "xfs"),
        ("/", "ext4"),
    ],
)
def test_the_filesystem_of_a_path_is_that_of_its_innermost_newest_mount(path: str, kind: str):
    assert local_disk.filesystem_of(path, MOUNTS) == kind
    assert local_disk.filesystem_of(path, "") == ""


@pytest.mark.parametrize(
    ("kind", "fine"),
    [(kind, False) for kind in ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "fuse")]
    + [(f"fuse.{name}", False) for name in ("sshfs", "s3fs", "gcsfuse", "rclone", "glusterfs", "never-heard-of")]
    + [(kind, True) for kind in ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", "fuse.fuse-overlayfs")],
)
def test_network_filesystems_are_refused_before_anything_is_made(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fine: bool
):
    mounts = root.with_name("mountinfo")
    mounts.write_text(f"27 1 254:0 / / rw - ext4 x rw\n30 27 0:50 / {root.parent} rw - {kind} x rw\n")
    monkeypatch.setattr(local_disk, "MOUNTINFO", str(mounts))
    if fine:
        FolderStore(root)
        return
    error = refused(root)
    assert (type(error), error.reason) == (errors.Invalid, "NETWORK_FILESYSTEM")
    assert error.metadata["filesystem"] == kind
    assert not root.exists()


def test_a_system_that_does_not_list_its_mounts_is_let_in(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_disk, "MOUNTINFO", str(root / "nowhere"))
    FolderStore(root).put("m/1", b"one")
