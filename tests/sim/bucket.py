"""The object store of a simulated region: flat keys, ETags and conditional writes, by the rules of cloud/store.py.

A request leaves its host, is carried out at the store whatever becomes of the host meanwhile, and is answered, or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sessiond.tiers.cloud.store import (
    Ambiguous,
    Listed,
    ObjectNotFound,
    ObjectStore,
    PreconditionLost,
    Stored,
    StoreError,
    StoreUnavailable,
)
from tests.sim.schedule import Host, Schedule
from tests.sim.weather import Weather

START_MS = 1_800_000_000_000


class Witness(Protocol):
    """Is told what changes at the store, in the order in which it does."""

    def put(self, host: Host, key: str, body: bytes, late: bool) -> None: ...

    def deleted(self, host: Host, key: str) -> None: ...


@dataclass(slots=True)
class Region:
    """What the store holds."""

    schedule: Schedule
    weather: Weather
    # Some stores make an etag of the content alone: then the same bytes have the same etag again.
    by_content: bool
    tells_time: bool
    objects: dict[str, Stored]
    witness: Witness | None = None
    writes: int = 0

    def put(self, host: Host, key: str, body: bytes, if_absent: bool, if_match: str | None, late: bool = False) -> str:
        found = self.objects.get(key)
        if (if_absent and found is not None) or (if_match is not None and (found is None or found.etag != if_match)):
            raise PreconditionLost(key, "412")
        self.writes += 1
        name = hashlib.md5(body).hexdigest() if self.by_content else f"v{self.writes}"
        self.objects[key] = Stored(body, name)
        if self.witness is not None:
            self.witness.put(host, key, body, late)
        return name

    def get(self, key: str) -> Stored:
        found = self.objects.get(key)
        if found is None:
            raise ObjectNotFound(key, "404")
        return found

    def delete(self, host: Host, key: str) -> None:
        if self.objects.pop(key, None) is not None and self.witness is not None:
            self.witness.deleted(host, key)

    def list(self, prefix: str, start_after: str, limit: int) -> list[Listed]:
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > start_after)
        return [Listed(key, len(self.objects[key].body)) for key in keys[:limit]]


class Direct(ObjectStore):
    """The store as the checker sees it: at once and without fault."""

    url = "sim:direct"

    def __init__(self, region: Region) -> None:
        self._region = region

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        return self._region.get(key)

    def list(self, prefix: str, start_after: str = "", limit: int = 1000) -> Iterator[Listed]:
        yield from self._region.list(prefix, start_after, limit)


class Link(ObjectStore):
    """One host's way to the store. Every call waits for its answer, by the weather."""

    url = "sim:store"
    reachable = True
    last_error = ""

    def __init__(self, region: Region, host: Host) -> None:
        self._region = region
        self._host = host

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        stored = self._call("get", key, lambda late: self._region.get(key))
        assert isinstance(stored, Stored)
        if first_byte is None or last_byte is None:
            return stored
        return Stored(stored.body[first_byte : last_byte + 1], stored.etag)

    def put(self, key: str, body: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        host = self._host
        etag = self._call(
            "put", key, lambda late: self._region.put(host, key, body, if_absent, if_match, late), writes=True
        )
        return str(etag)

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda late: self._region.delete(self._host, key))

    def list(self, prefix: str, start_after: str = "", limit: int = 1000) -> Iterator[Listed]:
        yield from self._call("list", prefix, lambda late: self._region.list(prefix, start_after, limit))

    def clock_ms(self) -> int | None:
        return START_MS + self._region.schedule.now_us // 1000 if self._region.tells_time else None

    def close(self) -> None:
        """There is nothing to let go of."""

    def _call(self, kind: str, key: str, carry_out: Callable[[bool], Any], writes: bool = False) -> Any:
        region, host = self._region, self._host
        schedule = region.schedule
        fiber, turn = schedule.arm()
        plan = region.weather.store(host.name, key, writes)
        name = f"{kind} {short(key)}"
        sent_us = schedule.now_us
        outcome: list[Any] = []

        def land() -> None:
            # Nobody waits for it any more: its time is up, or it was carried out before.
            late = bool(outcome) or schedule.now_us - sent_us > region.weather.store_timeout_us
            try:
                result, told = carry_out(late), "ok"
            except StoreError as error:
                result, told = error, type(error).__name__
            schedule.note("store", f"{host.name} {name} {told}{' LATE' if late else ''}")
            if not outcome:
                outcome.append(result)
                if plan.answers is not None:
                    schedule.after(plan.answers, lambda: schedule.wake(fiber, turn, plan.says or "truth"))

        if plan.lands is not None:
            schedule.after(plan.lands, land)
            if plan.again is not None:
                schedule.after(plan.lands + plan.again, land)
        elif plan.answers is not None:
            schedule.after(plan.answers, lambda: schedule.wake(fiber, turn, plan.says))
        schedule.after(region.weather.store_timeout_us, lambda: schedule.wake(fiber, turn, "timeout"))
        said = schedule.park()
        if said == "truth":
            if isinstance(outcome[0], StoreError):
                raise outcome[0]
            return outcome[0]
        schedule.note(host.name, f"{name} -> {said}")
        if said == "unsent" or not writes:
            raise StoreUnavailable(key, said)
        raise Ambiguous(key, said)


def short(key: str) -> str:
    """A key as a reader of a trace can bear it."""
    parts = key.split("/")
    return "/".join(part if len(part) <= 12 else part[:8] for part in parts)
