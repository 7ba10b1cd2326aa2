"""Where a call goes first, and where its next attempt goes: over the servers that were named, and to a session's owner.

It promises that a call follows at most REDIRECTS_MAX redirects, that an attempt after a refusal by one server goes to
another one at once while there is one that was not asked, and that an owner's address which can't be reached from here
is left aside for a while. It opens no channel and waits for nothing.
"""

from __future__ import annotations

import ipaddress
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from sessiond.client.ring import Ring
from sessiond.errors import Invalid, SessiondError

SESSION_HEADER: Final = "x-session-id"
# A server that is sent "1" says where a session is instead of forwarding the call.
REDIRECT_HEADER: Final = "x-sessiond-redirect"
REDIRECTS_MAX: Final = 3
# Sessions of which it is remembered where they are, when that is not where the ring has them.
OWNERS_MAX: Final = 16_384
# Nodes reached by redirects: a channel each, the one used longest ago is closed first.
CHANNELS_MAX: Final = 64
# A server that could not be asked is asked last for so long, twice as long each time.
AVOID_FIRST_S: Final = 0.5
AVOID_MAX_S: Final = 8.0
# An owner's address that never answered may be one of another network; one that did is restarting.
UNREACHABLE_S: Final = 30.0
AWAY_S: Final = 1.0
# Refusals of a node that another node need not share.
ELSEWHERE: Final = frozenset(
    (
        *("SERVER_UNREACHABLE", "NODE_DRAINING", "NODE_STARTING", "HOT_TIER_FAILED"),
        *("NOT_OWNER", "OWNER_UNREACHABLE", "EPOCH_FENCED"),
    )
)
# Of these the ones that say that the node takes no calls at all.
AWAY: Final = frozenset(("SERVER_UNREACHABLE", "NODE_DRAINING", "NODE_STARTING", "HOT_TIER_FAILED"))

# For a name behind which there may be several nodes: docs/routing/service-config.json without its retries, which are
# Attempts' here.
SERVICE_CONFIG: Final = {
    "loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": SESSION_HEADER}}],
    "healthCheckConfig": {"serviceName": "readiness"},
}
# gRPC reads it each time that a channel's service config is parsed, and ignores requestHashHeader without it.
RING_VARIABLE: Final = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"
# A connection that takes longer is none: the other servers are nearer than that.
CONNECT_MS: Final = 1000


def parse(server: str) -> list[str]:
    """The servers that a text names: HOST:PORT,HOST:PORT or one target of gRPC's. Raises Invalid INVALID_CONFIG."""
    if ":///" in server or server.startswith(("unix:", "ipv4:", "ipv6:", "vsock:", "xds:", "dns:")):
        return [server]
    servers = list(dict.fromkeys(name.strip() for name in server.split(",")))
    for name in servers:
        if not name or (len(servers) > 1 and not name.rpartition(":")[2].isdigit()):
            what = f"{server!r} is not HOST:PORT, HOST:PORT,HOST:PORT or a target of gRPC's"
            raise Invalid("INVALID_CONFIG", f"The server {what}.", {"server": server}, [("server", what)])
    return servers


def may_be_several(target: str) -> bool:
    """Whether a single target may lead to several nodes: a name may, an address or a socket does not."""
    if target.startswith(("unix:", "vsock:")):
        return False
    if target.startswith(("ipv4:", "ipv6:")):
        return "," in target
    host = target.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def ring_options() -> dict[str, Any]:
    """Channel arguments by which gRPC itself spreads sessions over the nodes behind a name.

    Sets the process's RING_VARIABLE if it is unset, once and for good: it changes nothing but whether
    requestHashHeader counts. Where somebody has switched that off, calls go to the nodes in turn.
    """
    config: dict[str, Any] = SERVICE_CONFIG
    if os.environ.get(RING_VARIABLE, "").lower() not in ("true", "1", "yes"):
        if RING_VARIABLE in os.environ:
            config = {**SERVICE_CONFIG, "loadBalancingConfig": [{"round_robin": {}}]}
        else:
            os.environ[RING_VARIABLE] = "true"
    return {"grpc.service_config": json.dumps(config), "grpc.min_reconnect_backoff_ms": CONNECT_MS}


class Routes:
    """What one client knows of its servers and of who owns its sessions. Thread-safe."""

    def __init__(self, server: str, redirects: bool, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.servers = parse(server)
        self.redirects = redirects
        self.uses_ring_of_grpc = len(self.servers) == 1 and may_be_several(self.servers[0])
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._ring: Ring | None = None
        self._owners: OrderedDict[str, str] = OrderedDict()
        # Server -> (until when it is left out, for how long next time).
        self._avoided: dict[str, tuple[float, float]] = {}
        self._unreachable: dict[str, float] = {}
        # Owners' addresses that have answered.
        self._reached: OrderedDict[str, None] = OrderedDict()

    @property
    def several(self) -> bool:
        """Whether another attempt may reach another node."""
        return len(self.servers) > 1 or self.uses_ring_of_grpc

    def order(self, session_id: str) -> list[str]:
        """The servers to ask, one after the other: by the ring, those that were away a moment ago last."""
        if self.uses_ring_of_grpc:
            # The same name again is another node, if gRPC knows by now that the first is gone.
            return self.servers * 2
        if len(self.servers) == 1:
            return self.servers
        with self._lock:
            if self._ring is None:
                self._ring = Ring(self.servers)
            now_s = self._clock_s()
            avoided = {server for server, (until_s, _) in self._avoided.items() if now_s < until_s}
        order = self._ring.order(session_id) if session_id else self.servers
        return sorted(order, key=avoided.__contains__) if avoided else order

    def owner(self, session_id: str) -> str:
        """Where the session was found, if that is not where the ring has it; empty if nothing is known."""
        with self._lock:
            address = self._owners.get(session_id, "")
            if address:
                self._owners.move_to_end(session_id)
            return address

    def learn(self, session_id: str, address: str) -> bool:
        """Somebody said where the session is; whether it may be asked there."""
        with self._lock:
            until_s = self._unreachable.get(address, 0.0)
            if self._clock_s() < until_s:
                return False
            self._unreachable.pop(address, None)
            self._owners[session_id] = address
            self._owners.move_to_end(session_id)
            if len(self._owners) > OWNERS_MAX:
                self._owners.popitem(last=False)
            return True

    def forget(self, session_id: str, address: str, unreachable: bool) -> None:
        """The session is not there, or nobody answers there."""
        with self._lock:
            if self._owners.get(session_id) == address:
                del self._owners[session_id]
            if unreachable:
                if len(self._unreachable) >= CHANNELS_MAX:
                    self._unreachable.pop(next(iter(self._unreachable)))
                self._unreachable[address] = self._clock_s() + (AWAY_S if address in self._reached else UNREACHABLE_S)

    def reached(self, address: str) -> None:
        """An owner answered there."""
        if address in self._reached:
            return
        with self._lock:
            self._reached[address] = None
            if len(self._reached) > CHANNELS_MAX:
                self._reached.popitem(last=False)

    def avoid(self, server: str) -> None:
        """Leave a server out for a while."""
        with self._lock:
            now_s = self._clock_s()
            until_s, next_s = self._avoided.get(server, (0.0, AVOID_FIRST_S))
            if now_s >= until_s:  # else by a call that was on its way when another one found out
                self._avoided[server] = now_s + next_s, min(2 * next_s, AVOID_MAX_S)

    def answered(self, server: str) -> None:
        """The server takes calls."""
        if server in self._avoided:
            with self._lock:
                self._avoided.pop(server, None)


class Route:
    """The way of one call: `address` is where its next attempt goes."""

    __slots__ = ("_left", "_redirects", "_routes", "_session_id", "address", "direct", "one_node")

    def __init__(self, routes: Routes, session_id: str, one_node: bool = False) -> None:
        """one_node: the call is about the first server itself, and goes nowhere else."""
        self._routes = routes
        self._session_id = session_id
        self.one_node = one_node
        # How often it may still be told where the session is.
        self._redirects = REDIRECTS_MAX if routes.redirects and session_id and not one_node else 0
        self._left: list[str] = []
        owner = routes.owner(session_id) if self._redirects else ""
        self.direct = bool(owner)
        self.address = owner or self._next()

    def _next(self) -> str:
        if not self._left:
            self._left = self._routes.servers[:1] if self.one_node else list(self._routes.order(self._session_id))
        return self._left.pop(0)

    @property
    def several(self) -> bool:
        """Whether another attempt may reach another node."""
        return self.direct or (self._routes.several and not self.one_node)

    @property
    def more(self) -> bool:
        """Whether there is another server that was not asked."""
        return self.direct or bool(self._left)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a router needs to find the session's node, and what a node is asked for."""
        if not self._session_id:
            return ()
        if self._redirects:
            return (SESSION_HEADER, self._session_id), (REDIRECT_HEADER, "1")
        return ((SESSION_HEADER, self._session_id),)

    def answered(self) -> None:
        """The attempt was answered."""
        if self.direct:
            self._routes.reached(self.address)
        else:
            self._routes.answered(self.address)

    def redirected(self, error: SessiondError) -> bool:
        """Whether a refusal says where to go instead, and the next attempt goes there. It is no failure."""
        owner = error.metadata.get("owner_address", "")
        if error.reason != "NOT_OWNER" or not self._redirects:
            return False
        if self.direct:
            self._routes.forget(self._session_id, self.address, unreachable=False)
        self._redirects -= 1
        if owner and owner != self.address and self._routes.learn(self._session_id, owner):
            self.address, self.direct = owner, True
        else:
            # Nowhere that can be asked from here: have the call forwarded.
            self._redirects = 0
            self._back()
        return True

    def _back(self) -> None:
        if self.direct:
            self.direct, self._left = False, []
            self.address = self._next()

    def moved(self, reason: str) -> bool:
        """Whether the next attempt goes elsewhere, and so need not wait. Called after each failure."""
        if reason not in ELSEWHERE:
            return False
        if self.direct:
            lost = reason == "SERVER_UNREACHABLE"
            self._routes.forget(self._session_id, self.address, unreachable=lost)
            if lost:
                self._redirects = 0
            self._back()
            return True
        if reason in AWAY:
            self._routes.avoid(self.address)
        fresh = bool(self._left)
        self.address = self._next()
        return fresh
