"""The other side of a ratio: a handler of the daemon's own server that takes bytes and returns bytes, nothing else.

`python -m bench.bare CONFIG` serves until it is killed. The server is `sessiond.transport.server.Server` with its
options, methods and health; only what a method does is replaced, so that both sides differ in nothing but that. CONFIG
is JSON: `listen`; `reply`, a file whose bytes every call returns; and optionally, for what is done before it returns,

    rows, lmdb       a file with the rows of appends as `inside.record_appends` makes it, and the environment to commit
                     them to: one transaction and one fsync a call
    store            arguments of `open_store`: the object named by the request's bytes is fetched, on a thread as in
                     the daemon
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from sessiond import daemon
from sessiond.service.node import CallCounts
from sessiond.tiers.cloud.open import open_store
from sessiond.transport.server import Server

Handler = Callable[[bytes, Any], Awaitable[bytes]]
REQUEST_BYTES_MAX = 8 * 1024**2
CALLS_MAX = 4096


class BareServer(Server):
    """The daemon's server, every method of which is the one handler."""

    handler: Handler

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        super().__init__(daemon.now_ms, CallCounts(), REQUEST_BYTES_MAX, CALLS_MAX)

    def _handler(self, service: str, name: str, streams: bool) -> Any:
        # Nothing of the daemon's own is around it, whichever way the daemon goes for a method.
        return (
            super()._handler(service, name, streams) if streams else grpc.unary_unary_rpc_method_handler(self.handler)
        )


def returns(reply: bytes) -> Handler:
    """Nothing but the reply."""

    async def handler(raw: bytes, context: Any) -> bytes:
        del raw, context
        return reply

    return handler


def commits(reply: bytes, rows: Path, path: Path) -> Handler:
    """One LMDB transaction with the rows of one append, on the disk when the reply leaves.

    On the loop's own thread: for one caller nothing is quicker, and this is the side that must not be made slow.
    """
    import lmdb
    import msgpack

    from sessiond.tiers.hot.environment import TABLES

    environment = lmdb.open(str(path), map_size=1 << 30, max_dbs=len(TABLES), max_readers=1024, lib_version=0)
    tables = {name: environment.open_db(name.encode()) for name in TABLES}
    appends = itertools.cycle(msgpack.unpackb(rows.read_bytes()))

    async def handler(raw: bytes, context: Any) -> bytes:
        del raw, context
        with environment.begin(write=True) as transaction:
            for table, key, value in next(appends):
                if value is None:
                    transaction.delete(key, db=tables[table])
                else:
                    transaction.put(key, value, db=tables[table])
        return reply

    return handler


def fetches(reply: bytes, store_arguments: dict[str, Any]) -> Handler:
    """One GET through the same store class, on a thread of a pool like the daemon's."""
    store = open_store(**{"url": "", **store_arguments})
    pool = ThreadPoolExecutor(max_workers=daemon.STORE_THREADS)

    async def handler(raw: bytes, context: Any) -> bytes:
        del context
        await asyncio.get_running_loop().run_in_executor(pool, store.get, raw.decode())
        return reply

    return handler


def handler_of(settings: dict[str, Any]) -> Handler:
    """The handler that the settings ask for."""
    reply = Path(settings["reply"]).read_bytes()
    if "rows" in settings:
        return commits(reply, Path(settings["rows"]), Path(settings["lmdb"]))
    if "store" in settings:
        return fetches(reply, settings["store"])
    return returns(reply)


async def serve(listen: str, handler: Handler) -> None:
    """Bind, serve, until killed."""
    server = BareServer(handler)
    server.bind(listen)
    await server.start()
    await asyncio.Event().wait()


def main() -> None:
    settings = json.loads(sys.argv[1])
    asyncio.run(serve(settings["listen"], handler_of(settings)))


if __name__ == "__main__":
    main()
