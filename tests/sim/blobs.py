"""Worlds whose devices write blobs, too: of their session, and of a user. Their seeds are their own.

python -m tests.sim.blobs --seeds 0 200
python -m tests.sim.blobs --seed 7
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sessiond.core import blobs as rules
from sessiond.core.manifest import LIFECYCLE_DELETED
from sessiond.core.rules import session_hash, user_session
from sessiond.errors import SessiondError
from sessiond.tiers.blobs import fetch, object_key
from sessiond.v1 import context_pb2, state_pb2
from tests.sim import world as worlds
from tests.sim.devices import EDGE, Device
from tests.sim.history import CLOUD
from tests.sim.node import TENANT
from tests.sim.schedule import Trace
from tests.sim.world import SECOND, Result, World

USER = "ann"
KEYS = ("n", "m", "d")
CONFIRMED = context_pb2.OWNERSHIP_CONFIRMED
worlds.REPLIES |= {
    "GetState": state_pb2.GetStateResponse,
    "PutState": state_pb2.PutStateResponse,
    "DeleteState": state_pb2.DeleteStateResponse,
    "ListStates": state_pb2.ListStatesResponse,
}


@dataclass
class Told:
    """One answer to a call about blobs. version: of the blob; 0 where there is none."""

    kind: str
    place: tuple[str, str]
    sent_us: int
    done_us: int
    node: str
    reason: str = ""
    version: int = 0
    ownership: int = 0
    durability: int = 0
    expected: int | None = None
    write_id: str = ""
    content: bytes = b""
    missing: bool = False
    duplicate: bool = False


class Writer(Device):
    """A device that writes blobs of one scope. It goes by dice of its own."""

    def __init__(self, world: BlobWorld, name: str, scope: str) -> None:
        super().__init__(world, name, scope)
        self.rng = random.Random(f"{world.seed} blobs {name}")
        self.home = self.rng.choice(world.machine_names)
        self.told = world.told
        self.scope = state_pb2.StateScope(session_id=scope) if scope else state_pb2.StateScope(user_id=USER)
        self.seen: dict[str, int] = {}
        self.requests: list[Any] = []

    async def live(self, first: bool, actions: int) -> None:
        for _ in range(actions):
            await self.sleep(self.rng.choice((0.001, 0.05, 0.3, 1.0, 3.0)) * (0.5 + self.rng.random()))
            dice, key = self.rng.random(), self.rng.choice(KEYS)
            if dice < 0.5:
                await self.put(key)
            elif dice < 0.58 and self.requests:
                await self.send(self.rng.choice(self.requests))
            elif dice < 0.66:
                await self.delete()
            else:
                await self.get(key)

    def answered(self, kind: str, key: str, answer: Any, node: str, sent_us: int) -> Told:
        told = Told(kind, (self.session, key), sent_us, self.world.schedule.now_us, node)
        if isinstance(answer, SessiondError):
            told.reason = answer.reason
            told.missing = "missing_epoch" in answer.metadata
            self.op(kind, sent_us, node, answer)
        self.told.append(told)
        return told

    async def put(self, key: str) -> bool:
        self.number += 1
        write_id = f"{self.name}-{self.number}"
        request = state_pb2.PutStateRequest(
            scope=self.scope,
            key=key,
            content=write_id.encode() * self.rng.choice((1, 1, 50)),
            write_id=write_id,
            durability=CLOUD if self.rng.random() < 0.35 else EDGE,
        )
        if self.rng.random() < 0.6:
            request.expected_version = self.seen.get(key, 0)
        self.requests.append(request)
        return await self.send(request)

    async def send(self, request: Any) -> bool:
        method = "PutState" if isinstance(request, state_pb2.PutStateRequest) else "DeleteState"
        answer, node, sent_us = await self.call(method, request, 12.0, self.rng.choice((0.3, 2.0, 5.0)))
        told = self.answered(method[:-5].lower(), request.key, answer, node, sent_us)
        told.write_id = request.write_id
        if request.HasField("expected_version"):
            told.expected = request.expected_version
        if told.reason == "STATE_VERSION_MISMATCH":
            self.seen[request.key] = int(answer.metadata["version"])
        if not told.reason:
            told.ownership, told.duplicate = answer.ownership, answer.duplicate
            if method == "PutState":
                told.version, told.durability = answer.header.version, answer.header.durability
                told.content = request.content
                self.seen[request.key] = told.version
        return not told.reason

    async def delete(self) -> None:
        self.number += 1
        request = state_pb2.DeleteStateRequest(scope=self.scope, key="d", write_id=f"{self.name}-{self.number}")
        self.requests.append(request)
        await self.send(request)
        self.seen.pop("d", None)

    async def get(self, key: str, patience_s: float = 8.0) -> Told:
        request = state_pb2.GetStateRequest(scope=self.scope, key=key)
        answer, node, sent_us = await self.call("GetState", request, patience_s, self.rng.choice((0.3, 2.0, 5.0)))
        told = self.answered("get", key, answer, node, sent_us)
        if not told.reason:
            told.version, told.ownership = answer.header.version, answer.ownership
            told.content, told.missing = answer.content, bool(answer.missing)
            self.seen[key] = told.version
        return told


class BlobWorld(World):
    """A world with writers of blobs beside its devices."""

    def __init__(self, seed: int, folder: Path, trace: Trace, nodes: int | None = None) -> None:
        super().__init__(seed, folder, trace, nodes)
        self.told: list[Told] = []
        self.writers: list[Writer] = []
        self.probing = False
        put, deleted = self.history.put, self.history.deleted

        def noted(host: Any, key: str, body: bytes, late: bool) -> None:
            put(host, key, body, late)
            if key.startswith("b/") and late:
                told = self.history._by_hash.get(bytes.fromhex(key[2:34]))
                if told is None or (told.present is not None and told.present.lifecycle == LIFECYCLE_DELETED):
                    self.history.stragglers.add(key)

        def gone(host: Any, key: str) -> None:
            deleted(host, key)
            told = self.history._by_hash.get(bytes.fromhex(key[2:34])) if key.startswith("b/") else None
            if told is not None and told.present is not None:
                named = {object_key(told.h, row) for row in rules.rows(told.present.state_keys)}
                if key in named:
                    self.history.broken("I10", f"{told.name}: {host.name} deleted {key}, which the manifest names")

        self.history.put, self.history.deleted = noted, gone  # type: ignore[method-assign]

    def plan_faults(self) -> None:
        super().plan_faults()
        key = worlds.open_bucket(self.direct, b"", 0).hash_key
        hidden = user_session(USER)
        self.history.add(hidden, session_hash(key, TENANT, hidden), False)
        for scope in ("", *self.knobs.sessions[:1]):
            self.writers += [Writer(self, f"{scope or 'user'}-{name}", scope) for name in "xy"]
        for writer in self.writers:
            self._task(writer.live(False, self.knobs.actions))

    def _probe(self, devices: list[Device]) -> None:
        super()._probe(devices)

        async def probe(writer: Writer) -> None:
            writer.seen.clear()
            request = state_pb2.PutStateRequest(scope=writer.scope, key="probe", content=b"x", write_id=writer.name)
            if not await writer.send(request) and not writer.session:
                self.history.broken("I15", f"blobs of {writer.name} can't be written: {self.told[-1].reason}")

        for writer in self.writers:
            self._task(probe(writer))
        if not self.schedule.run(lambda: self._living == 0, self.schedule.now_us + 200 * SECOND):
            self.history.broken("I15", "probes of blobs do not come to an end")

    def _check(self, bucket: Any) -> None:
        super()._check(bucket)
        for scope in {writer.session for writer in self.writers}:
            for key in KEYS:
                self._check_blob(scope, key, [told for told in self.told if told.place == (scope, key)])

    def _check_blob(self, scope: str, key: str, told: list[Told]) -> None:
        broken, name = self.history.broken, f"blob {key} of {scope or 'the user'}"
        puts = [op for op in told if op.kind == "put" and not op.reason]
        contents: dict[int, tuple[str, bytes]] = {}
        by_id: dict[str, Told] = {}
        for op in puts:
            if contents.setdefault(op.version, (op.write_id, op.content))[0] != op.write_id:
                broken("I7", f"{name}: version {op.version:x} was given to {contents[op.version][0]} and {op.write_id}")
            first = by_id.setdefault(op.write_id, op)
            if op.version != first.version and op.version >> 32 == first.version >> 32:
                broken("I3", f"{name}: {op.write_id} was applied at {first.version:x} and at {op.version:x}")
            if op.version != first.version and CLOUD in (first.durability, op.durability) and self._in_horizon(told):
                durable = first if first.durability == CLOUD else op
                if durable.done_us < op.sent_us:
                    broken("I3", f"{name}: {op.write_id} was committed at {first.version:x}, and at {op.version:x}")
        over: dict[int, Told] = {}
        for op in by_id.values():
            if op.expected:
                other = over.setdefault(op.expected, op)
                if other is not op and other.version >> 32 == op.version >> 32:
                    broken("I8", f"{name}: {other.write_id} and {op.write_id} both won over {op.expected:x}")
        for op in told:
            if op.kind == "get" and op.version in contents and op.content != contents[op.version][1]:
                broken("I8", f"{name}: version {op.version:x} reads {op.content[:20]!r}")
        accepted = scope and any(op.accepts is not None for op in self.history.sessions[scope].ops)
        deleted = any(op.kind == "delete" for op in told)
        for op in told:
            if op.kind != "get" or op.missing or op.reason not in ("", "STATE_NOT_FOUND") or accepted:
                continue
            if deleted or (not op.reason and op.ownership != CONFIRMED):
                continue
            for before in puts:
                seen = before.done_us < op.sent_us and before.ownership == CONFIRMED
                if seen and before.version > op.version:
                    broken("I9", f"{name}: {op.node} reads {op.version:x} after {before.version:x} was acknowledged")
        present = self.history.sessions[scope or user_session(USER)].present
        if present is None or present.lifecycle == LIFECYCLE_DELETED or deleted:
            return
        row = next((row for row in rules.rows(present.state_keys) if row[0] == key), None)
        last = int(row[1]) if row is not None else 0
        committed = max((op.version for op in puts if op.durability == CLOUD), default=0)
        if last < committed:
            broken("I2", f"{name}: it ends at {last:x}, and {committed:x} was committed")
        if row is not None and last in contents and fetch(self.direct, present.h, row) != contents[last][1]:
            broken("I11", f"{name}: version {last:x} is stored with another content")

    def _in_horizon(self, told: list[Told]) -> bool:
        return sum(op.kind in ("put", "delete") for op in self.told) < rules.WRITES_MAX


def run_seed(seed: int, nodes: int | None = None, keep: Callable[[str], None] | None = None) -> Result:
    """Run one such world in a folder of its own, and remove it."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="sim-", dir=shm if shm.is_dir() and os.access(shm, os.W_OK) else None))
    try:
        return BlobWorld(seed, folder, Trace(keep), nodes).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.blobs")
    parser.add_argument("--seed", type=int, help="replay this seed and print what happens")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "COUNT"), help="run these and count")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        found = run_seed(arguments.seed, keep=print).violations
        print(*found, sep="\n")
        return bool(found)
    first, count = arguments.seeds
    began_s, bad = time.process_time(), 0
    for seed in range(first, first + count):
        result = run_seed(seed)
        bad += bool(result.violations)
        for invariant, what in result.violations:
            print(f"seed {seed}: {invariant} {what}", flush=True)
    print(f"{count} seeds, {bad} with violations, {(time.process_time() - began_s) / count:.3f} s of a core each")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
