"""Nodes in network namespaces of their own: a partition that drops packets without a word, as a real one does.

`python -m tests.cluster.namespaces FOLDER`, itself started by `unshare -rn`: all that is made here is in a namespace of
its own, and nothing of the machine's network changes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

from tests.cluster.history import CLOUD_ACK, EDGE_ACK, History, orphans_of, read_logs
from tests.cluster.load import append
from tests.cluster.nodes import until
from tests.fault.world import answer
from tests.wire import Refusal, Wire, user

NET = "10.213.77"
PORT = 7443
LEASE_MS = 1000
RUN_S_MAX = 120
NODES = (1, 2)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


def are_allowed() -> bool:
    """Whether this machine lets a test make namespaces with a link between them."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        return False
    script = "ip link add one type veth peer name two && ip link add mid type bridge"
    tried = subprocess.run(["unshare", "-rn", "sh", "-c", script], capture_output=True, check=False, timeout=10)
    return tried.returncode == 0


@contextlib.contextmanager
def room(number: int) -> Iterator[int]:
    """A namespace with one address on the bridge; the process id that holds it."""
    holder = subprocess.Popen(["unshare", "-n", "sleep", str(RUN_S_MAX)])
    try:
        mine = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != mine, "the namespace is there", 10)
        ip("link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        ip("link", "set", f"v{number}", "master", "mid", "up")
        inside = ["nsenter", "-t", str(holder.pid), "-n", "ip"]
        for command in (
            ["addr", "add", f"{NET}.{number}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            subprocess.run([*inside, *command], check=True, capture_output=True, timeout=10)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


@contextlib.contextmanager
def node(number: int, holder: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon in a namespace. All nodes share a folder as cloud tier, which no partition cuts off."""
    config = folder / f"n{number}.toml"
    settings = {
        "data_dir": str(folder / f"n{number}"),
        "cloud": f"file://{folder / 'cloud'}",
        "listen": f"{NET}.{number}:{PORT}",
        "node_name": f"n{number}",
    }
    config.write_text("".join(f'{key} = "{value}"\n' for key, value in settings.items()) + f"lease_ms = {LEASE_MS}\n")
    with (folder / f"n{number}.log").open("wb") as log:
        process = subprocess.Popen(
            ["nsenter", "-t", str(holder), "-n", sys.executable, "-m", "sessiond", "serve", "--config", str(config)],
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def scenario(folder: Path) -> None:
    """A node that loses its packets, and nothing else: others are told that it does not answer, and take nothing."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "mid", "type", "bridge")
    ip("addr", "add", f"{NET}.254/24", "dev", "mid")
    ip("link", "set", "mid", "up")
    history = History()
    with contextlib.ExitStack() as opened:
        holders = {number: opened.enter_context(room(number)) for number in NODES}
        for number in NODES:
            opened.enter_context(node(number, holders[number], folder))
        one, two = (opened.enter_context(contextlib.closing(Wire(f"{NET}.{number}:{PORT}"))) for number in NODES)
        until(lambda: made(one), "n1 serves", 60)
        history.appended("s", CLOUD_ACK, append(one, "s", user("t1", "hello"), CLOUD_ACK))
        until(lambda: forwarded(two, "t2", history), "n2 serves, and sends on", 60)

        # Packets of n1 vanish. Its lease moves on, through the folder: it is alive, and keeps its session.
        ip("link", "set", "v1", "down")
        refused = answer(lambda: append(two, "s", user("t3", "?"), timeout_s=10))
        assert isinstance(refused, Refusal), refused
        assert refused.reason in ("OWNER_UNREACHABLE", "NOT_OWNER"), refused.reason
        ip("link", "set", "v1", "up")
        until(lambda: forwarded(two, "t3", history), "n2 reaches n1 again", 60)
        history.check(read_logs(f"{NET}.2:{PORT}", ["s"]), {"s": {turn.turn_id for turn in orphans_of(two, "s")}})
        assert {ack.place[0] for ack in history.acks} == {1}, "the session moved, though its owner was alive"


def made(wire: Wire) -> bool:
    """Whether the session is made."""
    try:
        wire.create("s")
    except grpc.RpcError:
        return False
    return True


def forwarded(wire: Wire, turn_id: str, history: History) -> bool:
    """Whether an append through the other node is acknowledged."""
    try:
        reply = append(wire, "s", user(turn_id, "hello"), EDGE_ACK, 5)
    except grpc.RpcError:
        return False
    history.appended("s", EDGE_ACK, reply)
    return True


if __name__ == "__main__":
    scenario(Path(sys.argv[1]))
