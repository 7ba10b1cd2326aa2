"""Power cuts at any instant of a real load: what was acknowledged is on the disk, and both tiers are sound.

The daemon runs under recorder.c, which writes down every write and fsync; disk.py says what a disk may hold at an
instant of that order, and images.py holds each such image against what clients had been told. The controls break the
daemon on purpose: a judge that did not see them would prove nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from sessiond.testing import running_daemon
from sessiond.v1 import session_pb2, turn_pb2
from tests.crash import images
from tests.crash.disk import Disk, Recording, build_recorder
from tests.wire import Wire, assistant, user

SESSIONS = 5
WRITERS = 6
EDGE, CLOUD = turn_pb2.DURABILITY_EDGE, turn_pb2.DURABILITY_CLOUD
NEVER_MS = 3_600_000
PROCESSES = 2
JUDGE_TIMEOUT_S = 1800
DAEMON_EVERY = 50
# Of one writer.
REFUSED_MAX = 20
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Load:
    """What is asked of the daemon while it is recorded."""

    seed: int
    acks: int
    flush_interval_ms: int
    # At its end every session is released; else the daemon is killed.
    drained: bool = False


class Writers:
    """Clients that append to a few sessions at once, and what they were told and when."""

    def __init__(self, address: str, load: Load, recording: Recording) -> None:
        self.address = address
        self.load = load
        self.recording = recording
        self.lock = threading.Lock()
        self.acks: list[images.Ack] = []
        self.failures: list[str] = []

    def run(self) -> None:
        wire = Wire(self.address)
        for index in range(SESSIONS):
            wire.create(f"s{index}", user_id=f"u{index % 2}", metadata={"of": str(index)})
            self._note(f"s{index}", [], 0, 0)
        wire.close()
        threads = [threading.Thread(target=self._write, args=(writer,)) for writer in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.failures, self.failures

    def _note(self, session: str, turns: list[turn_pb2.AppendedTurn], version: int, cloud_seq: int) -> None:
        # Read after the answer: the trace's order up to here is what had happened when the client had it in hands.
        position = self.recording.position()
        rows = [(turn.turn_id, turn.position.epoch, turn.position.seq, turn.position.chain.hex()) for turn in turns]
        with self.lock:
            self.acks.append(images.Ack(session, position, rows, version, cloud_seq))

    def _write(self, writer: int) -> None:
        wire = Wire(self.address)
        try:
            rng = random.Random(f"{self.load.seed}:{writer}")
            number = refused = 0
            while len(self.acks) < self.load.acks:
                number += 1
                try:
                    self._call(wire, rng, f"s{rng.randrange(SESSIONS)}", f"w{writer}-{number}")
                except grpc.RpcError as error:
                    # No answer is no acknowledgement: on a busy machine, or of a broken daemon, a commit may come late.
                    refused += 1
                    if error.code() != grpc.StatusCode.UNAVAILABLE or refused > REFUSED_MAX:
                        raise
        except BaseException as error:
            self.failures.append(f"writer {writer}: {error!r}")
        finally:
            wire.close()

    def _call(self, wire: Wire, rng: random.Random, session: str, name: str) -> None:
        durability = CLOUD if rng.random() < 0.1 else EDGE
        if rng.random() < 0.08:
            change = turn_pb2.StateChange(mode=name, flags={"odd": rng.random() < 0.5}, metadata={"last": name})
            answer = wire.sessions.UpdateSession(
                session_pb2.UpdateSessionRequest(
                    session_id=session, turn_id=name, change=change, durability=durability
                ),
                timeout=30,
            )
            self._note(session, [answer.appended], 0, 0)
            return
        turns = []
        for order in range(rng.choice((1, 1, 1, 2, 3))):
            make = rng.choice((user, assistant))
            size = rng.choice((3, 40, 400, 400, 1500, 12_000 if rng.random() < 0.2 else 80))
            turns.append(make(f"{name}.{order}", f"{name} " + "x" * size))
        reply = wire.append(session, *turns, durability=durability)
        assert len(reply.turns) == len(turns)
        if durability == CLOUD:
            assert reply.cloud_seq >= max(turn.position.seq for turn in reply.turns)
        self._note(session, list(reply.turns), reply.checkpoint_version, reply.cloud_seq)


@pytest.fixture(scope="session")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_recorder(tmp_path_factory.mktemp("recorder"))


def record(folder: Path, load: Load, recorder: Path, broken: str = "") -> Path:
    """A run of the load against a real daemon, killed at its end. broken: Python that the daemon starts with."""
    folder.mkdir(parents=True)
    data = (folder / "data").resolve()
    data.mkdir()
    recording = Recording(folder / "trace", data, recorder)
    env = dict(recording.env)
    if broken:
        # Python imports sitecustomize before anything else: the product needs no switch to be broken by.
        (folder / "broken").mkdir()
        (folder / "broken" / "sitecustomize.py").write_text(broken)
        env["PYTHONPATH"] = os.pathsep.join([str(folder / "broken"), str(ROOT / "src")])
    settings = {"flush_interval_ms": load.flush_interval_ms, "map_size_bytes": images.MAP_SIZE_BYTES}
    with running_daemon(data, env=env, lease_ms=500, **settings) as daemon:
        writers = Writers(daemon.address, load, recording)
        writers.run()
        if load.drained:
            assert daemon.terminate() == 0
        else:
            daemon.kill()
    os.truncate(recording.path, recording.position())
    told = {"folder": str(data), "load": load.__dict__, "acks": [images.asdict(ack) for ack in writers.acks]}
    (folder / "run.json").write_text(json.dumps(told))
    return folder


@dataclass
class Judged:
    """What a process that judged images of a run said. died: the image at which it was ended by a signal."""

    report: images.Report
    died: str
    replay: str


def judge(run: Path, seed: int, count: int, *, daemon_every: int = 0, fail_fast: bool = False) -> Judged:
    """The images 0 to count - 1 of a run, in processes of their own."""
    total, died = images.Report(), ""
    with contextlib.ExitStack() as held:
        name = held.enter_context(tempfile.TemporaryDirectory(dir=images.fast_folder(), prefix="crash-images-"))
        started = []
        for share in range(PROCESSES):
            room = Path(name) / str(share)
            room.mkdir()
            argv = [sys.executable, "-m", "tests.crash.images", str(run), "--seed", str(seed), "--room", str(room)]
            argv += ["--count", str(count), "--share", str(share), "--shares", str(PROCESSES)]
            argv += ["--daemon-every", str(daemon_every), *(["--fail-fast"] if fail_fast else [])]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
            process = held.enter_context(subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
            held.callback(process.kill)
            started.append((room, process))
        for room, process in started:
            out, _ = process.communicate(timeout=JUDGE_TIMEOUT_S)
            if process.returncode < 0:
                image = (room / "image").read_text()
                died = f"image {image} ended its reader by {signal.Signals(-process.returncode).name}"
                continue
            assert out, f"a judge of images ended with exit code {process.returncode}"
            report = images.Report(**json.loads(out))
            total.images += report.images
            total.distinct += report.distinct
            total.sessions_checked += report.sessions_checked
            total.daemons += report.daemons
            total.acks = report.acks
            total.seconds = max(total.seconds, report.seconds)
            total.violations += [(int(number), sentence) for number, sentence in report.violations]
    replay = f"PYTHONPATH=src python -m tests.crash.images {run} --seed {seed} --only NUMBER --keep FOLDER"
    return Judged(total, died, replay)


def assert_sound(run: Path, judged: Judged, count: int) -> None:
    report = judged.report
    print(
        f"{report.images} images, {report.distinct} distinct, {report.acks} answers, {report.sessions_checked} states"
        f" of a session, {report.daemons} daemons, {report.seconds:.1f} s"
    )
    problems = [f"image {number}: {sentence}" for number, sentence in report.violations]
    if judged.died:
        problems.append(judged.died)
    assert not problems, "\n".join([*problems, f"to see one again: {judged.replay}"])
    assert report.images == count
    # Kept only where somebody has to look at it again.
    shutil.rmtree(run)


def assert_trace_is_whole(run: Path) -> None:
    """Everything recorded, applied, is what the daemon left on the disk, byte for byte: nothing went past the trace."""
    trace = images.Run.read(run).trace
    disk = Disk(trace)
    disk.advance(len(trace.events))
    recorded = disk.visible_files(trace.folder)
    left = {
        str(path): path.read_bytes()
        for path in Path(trace.folder).rglob("*")
        if path.is_file() and path.name != "lock.mdb"
    }
    known = {path: content for path, content in recorded.items() if content is not None}
    assert sorted(known) == sorted(path for path in left if recorded.get(path, b"") is not None)
    for path, content in known.items():
        assert left[path] == content, f"the trace gives other bytes for {path}"


# The promise ---------------------------------------------------------------------------------------------------------

LOADS = {
    # Manifests, segments and the rows that settle them are written between the appends.
    "flushing": Load(seed=20261120, acks=700, flush_interval_ms=20, drained=True),
    # Everything that the cloud tier has comes from CLOUD appends; the rest is in the hot tier alone.
    "unflushed": Load(seed=20261121, acks=700, flush_interval_ms=NEVER_MS),
}


@pytest.mark.parametrize("name", LOADS)
def test_1000_power_cuts_lose_no_acknowledged_turn_and_leave_both_tiers_clean(
    name: str, tmp_path: Path, recorder: Path
) -> None:
    load = LOADS[name]
    run = record(tmp_path / "run", load, recorder)
    assert_trace_is_whole(run)
    assert_sound(run, judge(run, load.seed, 1000, daemon_every=DAEMON_EVERY), 1000)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(10))
def test_10000_power_cuts_of_another_load_lose_no_acknowledged_turn(seed: int, tmp_path: Path, recorder: Path) -> None:
    load = Load(seed, acks=1000, flush_interval_ms=(20, 200, NEVER_MS)[seed % 3], drained=seed % 2 == 0)
    run = record(tmp_path / "run", load, recorder)
    assert_trace_is_whole(run)
    assert_sound(run, judge(run, seed, 10_000, daemon_every=DAEMON_EVERY), 10_000)


# Controls: daemons that are broken on purpose ------------------------------------------------------------------------

LMDB_OPENED_WITH = """
import lmdb
_open = lmdb.open
def open_carelessly(*arguments, **named):
    named[{flag!r}] = False
    return _open(*arguments, **named)
lmdb.open = open_carelessly
"""

# Whoever waits is answered inside the transaction, which then waits a moment for company, as a lazy commit does.
ANSWERED_BEFORE_THE_COMMIT = """
import time
from sessiond.errors import SessiondError
from sessiond.tiers.hot import environment
def commit(self, group):
    with self._env.begin(write=True) as raw:
        transaction = environment.Transaction(raw, self._tables)
        for work in group:
            try:
                work.result = work.operation(transaction)
            except SessiondError as refused:
                work.error = refused
        environment._settle(group)
        until = time.monotonic() + 0.02
        while self._queue.empty() and time.monotonic() < until:
            time.sleep(0.0005)
environment.Environment._commit = commit
"""

# An object gets its name before its bytes are on disk.
NAMED_BEFORE_THE_FSYNC = """
from sessiond.tiers.cloud.folder import FolderStore
FolderStore._fsync = lambda self, descriptor, name: None
"""

# (what the daemon starts with, what the judge says). Without any fsync the hot tier's file itself is torn, so that its
# reader may see anything, or come to grief.
CONTROLS = {
    "metasync": (LMDB_OPENED_WITH.format(flag="metasync"), "an answer does not hold"),
    "sync": (LMDB_OPENED_WITH.format(flag="sync"), ""),
    "answer before the commit": (ANSWERED_BEFORE_THE_COMMIT, "an answer does not hold"),
    "object before its bytes": (NAMED_BEFORE_THE_FSYNC, "is damaged"),
}
CONTROL_LOAD = Load(seed=20261122, acks=100, flush_interval_ms=20)
CONTROL_IMAGES = 300


@pytest.mark.parametrize("name", CONTROLS)
def test_a_daemon_that_acknowledges_too_early_is_caught(
    name: str, tmp_path: Path, recorder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, said = CONTROLS[name]
    run = record(tmp_path / "run", CONTROL_LOAD, recorder, broken)
    assert_trace_is_whole(run)
    judged = judge(run, CONTROL_LOAD.seed, CONTROL_IMAGES, fail_fast=True)
    sentences = [sentence for _, sentence in judged.report.violations]
    with capsys.disabled():
        print(f"caught within {judged.report.images} images: {judged.died} {sentences[:1]}")
    if said:
        assert not judged.died
        caught = [row for row in judged.report.violations if said in row[1]]
        assert caught
        # Any image can be made again by its number.
        number, sentence = caught[0]
        assert images.main([str(run), "--seed", str(CONTROL_LOAD.seed), "--only", str(number)]) == 1
        again = json.loads(capsys.readouterr().out)["violations"]
        assert [number, sentence] in again
    else:
        assert judged.died or sentences


def test_the_daemon_of_the_controls_is_sound_if_it_is_not_broken(tmp_path: Path, recorder: Path) -> None:
    run = record(tmp_path / "run", CONTROL_LOAD, recorder, "# nothing is broken")
    assert_trace_is_whole(run)
    judged = judge(run, CONTROL_LOAD.seed, CONTROL_IMAGES)
    assert_sound(run, judged, CONTROL_IMAGES)
