"""Several real daemons on one bucket, each with a disk, a name and, where a test asks, links that it can cut.

It promises that whatever a test does to its nodes (kill, freeze, partition, lost disks) is over when the block ends:
frozen processes are thawed before they are stopped, and every process is ended by its id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc

from sessiond import config
from sessiond.core import rules
from sessiond.core.manifest import Manifest
from sessiond.testing import HOST, Daemon
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.cloud.s3 import S3Store
from sessiond.tiers.cloud.store import ObjectStore
from sessiond.tiers.hydrate import load
from sessiond.v1 import admin_pb2
from sessiond.verify import verify
from tests.cluster.tcp import Link, Network, State
from tests.fault.world import HASH_KEY, environment
from tests.seaweed import Seaweed
from tests.wire import Wire

# Short, so that a steal takes some three seconds; not so short that two busy cores let a lease lapse by themselves.
LEASE_MS = 1000
STEAL_LEASES = 3
# What "writable again" may take beside three lease times: the issue, "What it must show", 2.
TAKE_OVER_S_MAX = 10.0
PATIENCE_S = 30.0
# A rescue that failed is tried again after so long at most, and takes its time.
RESCUE_S = 60.0
# The setting under which a node tells its peers another address than the one that it listens on.
ADVERTISE = "advertise"
Result = TypeVar("Result")


def hash_of(session: str) -> bytes:
    """The session's hash in every key."""
    return rules.session_hash(bytes.fromhex(HASH_KEY), "default", session)


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> float:
    """Wait for the condition; how long it took, in seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"after {seconds} s still not: {what}"
        time.sleep(0.02)
    return time.monotonic() - began


@dataclass
class Member:
    """One node. peers: the link that other nodes reach it through; store: the one that it reaches its store through."""

    name: str
    daemon: Daemon
    peers: Link
    store: Link | None
    frozen: bool = False
    wires: list[Wire] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where clients reach it; no link is in between."""
        return self.daemon.address

    @property
    def runs(self) -> bool:
        """Whether it has a process, frozen or not."""
        return self.daemon.process is not None

    def start(self) -> None:
        """Start it, and let its peers reach it."""
        self.daemon.start()
        self.peers.lead_to(HOST, self.daemon.port)

    def kill(self) -> None:
        """SIGKILL, frozen or not."""
        self.frozen = False
        self.daemon.kill()

    def terminate(self) -> int:
        """SIGTERM, so that it drains; its exit code."""
        return self.daemon.terminate()

    def freeze(self) -> None:
        """SIGSTOP: it holds its sockets and answers nothing."""
        os.kill(self.daemon.pid, signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.daemon.pid, signal.SIGCONT)
        self.frozen = False

    def lose_disk(self) -> None:
        """Everything that it had on its disk is gone. Its process has ended."""
        assert not self.runs
        shutil.rmtree(self.daemon.data_dir)

    def cut_off(self, state: State) -> None:
        """Both its links are in this state."""
        self.peers.set(state)
        if self.store is not None:
            self.store.set(state)

    def wire(self) -> Wire:
        """Stubs of it, closed with the cluster."""
        made = Wire(self.address)
        self.wires.append(made)
        return made

    def status(self) -> admin_pb2.GetStatusResponse:
        """What it says of itself."""
        with contextlib.closing(Wire(self.address)) as wire:
            return wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30)


class Cluster:
    """The nodes, their bucket, and the store past every link."""

    def __init__(self, members: list[Member], network: Network, store: ObjectStore, options: dict[str, str]) -> None:
        self.members = members
        self.network = network
        self.store = store
        self._options = options

    def __getitem__(self, number: int) -> Member:
        return self.members[number]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    @property
    def addresses(self) -> list[str]:
        """Every node's own."""
        return [member.address for member in self.members]

    @property
    def by_name(self) -> dict[str, Member]:
        """The nodes by their names."""
        return {member.name: member for member in self.members}

    def manifest(self, session: str) -> Manifest:
        """The session's manifest as the store has it, whatever the links do."""
        cold = load(self.store, hash_of(session))
        assert cold is not None, f"{session} has no manifest"
        return cold.manifest

    def owner(self, session: str) -> str:
        """The node that the manifest names; empty for none."""
        owner = self.manifest(session).owner
        return str(owner[1]) if owner else ""

    def together(self, work: Callable[[Member], Result], members: Sequence[Member] | None = None) -> list[Result]:
        """What the work returns for each node, all at the same time."""
        with ThreadPoolExecutor(len(self.members)) as pool:
            return list(pool.map(work, self.members if members is None else members))

    def heal(self) -> None:
        """Every link passes, every frozen node goes on, every ended one is started again."""
        self.network.heal()
        for member in self.members:
            if member.frozen:
                member.thaw()
        ended = [member for member in self.members if not member.runs or member.daemon.process.poll() is not None]
        for member in ended:
            if member.runs:
                member.daemon.kill()  # it ended by itself; this only takes note of that
        self.together(Member.start, ended)

    def flush(self) -> None:
        """The cloud tier has everything that the nodes own."""

        def flushed(member: Member) -> bool:
            with contextlib.closing(Wire(member.address)) as wire:
                try:
                    reply = wire.admin.Flush(admin_pb2.FlushRequest(), timeout=60)
                except grpc.RpcError:
                    return False
                return not reply.failed_sessions and not member.status().hot.dirty_sessions

        for member in self.members:
            until(lambda member=member: flushed(member), f"nothing of {member.name} is unflushed")

    def rescue(self) -> None:
        """No node has turns any more of a session that another took from it: they are in the log, or listed."""
        for member in self.members:
            until(
                lambda member=member: not member.status().ownership.fenced_sessions,
                f"nothing of {member.name} waits for its rescue",
                RESCUE_S,
            )

    def stop(self) -> list[int]:
        """Drain and end every node, one after the other; their exit codes."""
        return [member.terminate() for member in self.members if member.runs]

    def check_clean(self) -> None:
        """Every invariant holds in the cloud tier and on every disk that is left. The nodes have ended."""
        for member in self.members:
            options = {**self._options, "data_dir": str(member.daemon.data_dir), "node_name": member.name}
            settings = config.load(None, {}, options)
            assert verify(settings, lambda *_: None) == [], f"{member.name} has violations"


@contextlib.contextmanager
def running_cluster(
    seaweed: Seaweed | None = None,
    size: int = 3,
    links: bool = True,
    prefix: str = "",
    endpoints: Mapping[str, str] | None = None,
    **settings: str | int | bool,
) -> Iterator[Cluster]:
    """Nodes n1, n2, ... that serve; on a folder, or on a prefix of their own in the server's bucket.

    links: nodes reach each other and their store through links. prefix: in the bucket, instead of one by chance.
    endpoints: where single nodes find the store, by name. settings: keys of sessiond.toml, for every node.
    """
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="sessiond-cluster-")))
        network = opened.enter_context(Network())
        store: ObjectStore
        options = {"hash_key": HASH_KEY}
        env: dict[str, str] = {}
        if seaweed is None:
            options["cloud"] = f"file://{folder / 'cloud'}"
            store = FolderStore(folder / "cloud")
        else:
            prefix = prefix or f"cluster-{secrets.token_hex(8)}"
            env = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}
            opened.enter_context(environment(env))
            options["cloud"] = f"s3://{seaweed.bucket}/{prefix}"
            options["s3_endpoint"] = seaweed.endpoint
            store = S3Store(seaweed.bucket, prefix, endpoint=seaweed.endpoint, path_style=True)
        opened.callback(store.close)
        defaults: dict[str, str | int | bool] = {
            "lease_ms": LEASE_MS,
            "flush_interval_ms": 50,
            "store_connect_timeout_ms": 1000,
            "store_read_timeout_ms": 1000,
        }
        members: list[Member] = []
        for number in range(1, size + 1):
            name = f"n{number}"
            own = dict(options)
            to_store: Link | None = None
            if seaweed is not None and links:
                host, _, port = seaweed.endpoint.removeprefix("http://").rpartition(":")
                to_store = network.link(host, int(port))
                own["s3_endpoint"] = f"http://{to_store.address}"
            if endpoints and name in endpoints:
                own["s3_endpoint"] = endpoints[name]
            # The port that the daemon will listen on is known only once it has it; the link's stays.
            peers = network.link(HOST, 9)
            if links and ADVERTISE in config.Settings.__struct_fields__:
                own[ADVERTISE] = peers.address
            cloud = own.pop("cloud")
            room = folder / name
            room.mkdir()
            made = {**defaults, **own, "node_name": name, **settings}
            members.append(Member(name, Daemon(room, room / "data", cloud, 0, env, made), peers, to_store))
        cluster = Cluster(members, network, store, options)
        opened.callback(_end, cluster)
        # The first makes the bucket; the others join it.
        members[0].start()
        cluster.together(Member.start, members[1:])
        yield cluster


def _end(cluster: Cluster) -> None:
    """Nothing runs any more, whatever state it was in."""
    for member in cluster:
        for wire in member.wires:
            wire.close()
        if member.runs:
            member.kill()
