"""`sessiond import`: conversations of the OpenAI chat format into sessions, each message exactly once.

It promises that running it again after any interruption, also after the loss of a hot tier, adds what is missing and
nothing else: sessions and turns are named after the conversation and its content, every append says which turn it
follows, and a session that holds something else is left alone. It reads one line at a time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

from sessiond.cli import connect, exits, output
from sessiond.cli.lines import Conversation, Malformed, Source, TurnIds, first_time_ms, session_id_of, session_metadata
from sessiond.errors import Conflict, Exhausted, Invalid, NotFound, SessiondError, Unavailable
from sessiond.v1 import context_pb2, session_pb2, turn_pb2

if TYPE_CHECKING:
    from sessiond.client import Client

THREADS: Final = 8
# Parsed and waiting, or under way: what bounds memory.
IN_FLIGHT_MAX: Final = 16
BATCH_TURNS_MAX: Final = 64
BATCH_BYTES_MAX: Final = 1024**2
# A daemon that is being restarted is back by then; one that is not should be heard of soon.
RETRY_S: Final = 5.0
FAILURES_KEPT_MAX: Final = 100
PROGRESS_EVERY_S: Final = 1.0
BUDGET_TOKENS_MAX: Final = 2**31 - 1
REDRAW_EVERY_S: Final = 0.1
# A claim behind a cold reply takes two writes.
SETTLE_ATTEMPTS_MAX: Final = 40
SETTLE_WAIT_S: Final = 0.05
# Unavailable, and yet no reason to give up on other sessions.
OF_ONE_SESSION: Final = ("NOT_OWNER", "PREDECESSOR_UNCERTAIN")


@dataclass
class Tally:
    """What was done so far; every change is under the lock."""

    conversations: int = 0
    imported: int = 0
    continued: int = 0
    unchanged: int = 0
    failed: int = 0
    turns_added: int = 0
    turns_present: int = 0
    possibly_missing: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, count: int = 1) -> None:
        """Add to the named count."""
        with self.lock:
            setattr(self, name, getattr(self, name) + count)

    def fail(self, place: str, reason: str, line: str) -> None:
        """One conversation failed. line: the failure as people read it."""
        with self.lock:
            self.failed += 1
            self.reasons[reason] += 1
            if len(self.failures) < FAILURES_KEPT_MAX:
                self.failures.append({"place": place, "reason": reason, "message": line})

    def as_json(self) -> dict[str, Any]:
        """The counts, and the first failures."""
        return {
            "conversations": self.conversations,
            "imported": self.imported,
            "continued": self.continued,
            "unchanged": self.unchanged,
            "failed": self.failed,
            "turns_added": self.turns_added,
            "turns_present": self.turns_present,
            "possibly_missing": self.possibly_missing,
            "reasons": dict(sorted(self.reasons.items())),
            "failures": self.failures,
        }

    def line(self) -> str:
        """The counts as one line."""
        return (
            f"{self.conversations} conversations: {self.imported} imported, {self.continued} continued,"
            f" {self.unchanged} unchanged, {self.failed} failed;"
            f" {self.turns_added} turns added, {self.turns_present} there before"
        )


@click.command(name="import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--user", default="", metavar="U", help="The user of conversations that name none.")
@click.option("--session-prefix", default="", metavar="P", help="Put before each conversation's id.")
@click.option("--into", metavar="SESSION", help="Chain all conversations into this one session, in file order.")
@click.option(
    "--durability",
    type=click.Choice(["edge", "cloud"]),
    default="edge",
    show_default=True,
    help="How safe each turn must be before the next is sent.",
)
@click.option("--accept-missing", is_flag=True, help="Go on without turns that were lost with a hot tier.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@connect.options
def command(
    files: tuple[str, ...],
    user: str,
    session_prefix: str,
    into: str | None,
    durability: str,
    accept_missing: bool,
    as_json: bool,
    server: str | None,
    timeout: float,
) -> int:
    """Import conversations: one JSON object {"id", "messages"} a line, or a plain list of messages; - is stdin.

    Each becomes a session. Run it again after any interruption: what is there stays, what is missing is added. A line
    or message that is refused is told with its place, and the others go on.

    Exit code 0 if everything is in; 9 if some conversation failed or may lack turns; 5 if the daemon went away: run the
    same command again and it continues.
    """
    if into is not None and session_prefix:
        raise click.UsageError("--into names the session; --session-prefix has no meaning beside it.")
    sources = [Source(path) for path in files]
    tally = Tally()
    try:
        with connect.client(server, timeout, RETRY_S) as client, _progress(tally, sources):
            importer = Importer(client, tally, session_prefix, user, durability.upper(), accept_missing)
            lines = (line for source in sources for line in source)
            if into is None:
                importer.run(lines)
            else:
                importer.run_into(into, lines)
    except SessiondError as error:
        if isinstance(error, Unavailable):
            error.remedy += " Run the same command again: it continues from here."
        _finish(tally, as_json)
        raise
    finally:
        for source in sources:
            source.close()
    _finish(tally, as_json)
    return exits.INCOMPLETE if tally.failed or tally.possibly_missing else exits.OK


def _finish(tally: Tally, as_json: bool) -> None:
    if as_json:
        output.print_json(tally.as_json())
    else:
        print(tally.line())
    if tally.possibly_missing:
        say(
            f"{tally.possibly_missing} sessions may still lack turns that were lost with a hot tier. Import files that"
            " hold those turns, or go on without them: run this command with --accept-missing."
        )


def say(text: str) -> None:
    """One line on standard error."""
    print(f"sessiond: {output.printable(text)}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Item:
    """One message on its way. place, at: where it stands. outcome: what its conversation counts as once it is in."""

    turn: turn_pb2.TurnInput
    place: str
    at: int
    outcome: str = ""


class Importer:
    """One run of the command. Errors of a conversation are told and counted; others end the run."""

    def __init__(
        self, client: Client, tally: Tally, prefix: str, user: str, durability: str, accept_missing: bool
    ) -> None:
        self._client = client
        self.tally = self._tally = tally
        self._prefix = prefix
        self._user = user
        self._durability = durability
        self._accept_missing = accept_missing
        self._stop = threading.Event()
        self._fatal: SessiondError | None = None
        # Sessions under way: a second conversation of the same id waits for the first.
        self._busy: set[str] = set()
        self._changed = threading.Condition()

    # Conversations side by side ----------------------------------------------------------------------------------

    def run(self, lines: Iterable[Conversation | Malformed]) -> None:
        """Import each line into a session of its own. Raises Unavailable, Exhausted; and Invalid for the file."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="import") as pool:
            try:
                for line in lines:
                    self._tally.add("conversations")
                    if isinstance(line, Malformed):
                        self._failed(line.place, line.error)
                        continue
                    session_id = session_id_of(self._prefix, line.key)
                    if not self._take(session_id):
                        break
                    pool.submit(self._work, session_id, line)
            except BaseException:
                self._stop.set()
                raise
        if self._fatal is not None:
            raise self._fatal

    def _take(self, session_id: str) -> bool:
        """Wait until the session is nobody's and there is room; False once the run is over."""
        with self._changed:
            while not self._stop.is_set() and (session_id in self._busy or len(self._busy) >= IN_FLIGHT_MAX):
                self._changed.wait()
            self._busy.add(session_id)
            return not self._stop.is_set()

    def _work(self, session_id: str, conversation: Conversation) -> None:
        try:
            if not self._stop.is_set():
                self._one(session_id, conversation)
        except SessiondError as error:
            if isinstance(error, (Unavailable, Exhausted)) and error.reason not in OF_ONE_SESSION:
                self._end(error)
            else:
                self._failed(conversation.place, error)
        except Exception as error:
            self._end(exits.defect(error))
        finally:
            with self._changed:
                self._busy.discard(session_id)
                self._changed.notify_all()

    def _end(self, error: SessiondError) -> None:
        with self._changed:
            self._fatal = self._fatal or error
            self._stop.set()

    def _failed(self, place: str, error: SessiondError) -> None:
        line = exits.line_of(error)
        line = line if place in line else f"{place}: {line}"
        self._tally.fail(place, error.reason, line)
        say(line)

    def _one(self, session_id: str, conversation: Conversation) -> None:
        turn_ids, place = TurnIds(conversation.key), conversation.place
        items = [
            Item(to_turn(message, turn_ids.next(message), place, at), place, at)
            for at, message in enumerate(conversation.messages)
        ]
        if conversation.dropped:
            say(f"{place}: too large to keep, left out: {', '.join(conversation.dropped)}")
        session, is_new = self._session(
            session_id,
            conversation.user or self._user,
            session_metadata(conversation, session_id),
            conversation.created_ms,
        )
        present = min(session.head.seq, len(items))
        if present:
            self.check_same(session_id, present, items[present - 1].turn.turn_id, place)
        self._tally.add("turns_present", present)
        if items:
            items[-1].outcome = "unchanged" if present == len(items) else "continued" if present else "imported"
        missing = list(session.missing)
        while present < len(items):
            if self._stop.is_set():
                return
            batch = items[present : present + batch_size(items[present : present + BATCH_TURNS_MAX])]
            missing = self.append(session_id, batch, present)
            present += len(batch)
        if not items or items[-1].outcome == "unchanged":
            self._tally.add("unchanged" if items or not is_new else "imported")
        self.settle(session_id, missing, len(items))

    def _session(
        self, session_id: str, user: str, metadata: dict[str, str], created_ms: int
    ) -> tuple[session_pb2.Session, bool]:
        """The session, and whether it had to be made. Raises Conflict if it is another user's."""
        try:
            # Asked first: to make one that is there costs two writes of the cloud tier.
            return self._client.get_session(session_id, user_id=user), False
        except NotFound as error:
            if error.reason != "SESSION_NOT_FOUND":
                raise
        made = self._client.create_session(session_id, user_id=user, metadata=metadata, created_at_unix_ms=created_ms)
        return made, True

    # One session after the other ---------------------------------------------------------------------------------

    def run_into(self, session_id: str, lines: Iterable[Conversation | Malformed]) -> None:
        """Chain all lines into one session. Raises as the daemon does; a line that is refused ends it, and is told."""
        session, _ = self._session(session_id, self._user, {}, 0)
        chain = _Chain(self, session_id, session)
        for line in lines:
            self._tally.add("conversations")
            try:
                if isinstance(line, Malformed):
                    raise line.error
                chain.add(line)
            except Invalid as error:
                chain.send_rest()
                self._failed(line.place, error)
                say("the chain ends before this line; correct it and run the same command again")
                return
        try:
            chain.send_rest()
        except Invalid as error:
            self._failed(session_id, error)
            return
        chain.check_end()
        self.settle(session_id, chain.missing, chain.count)

    # What both ways need -----------------------------------------------------------------------------------------

    def check_same(self, session_id: str, seq: int, turn_id: str, place: str) -> None:
        """Raises Conflict if that turn of the session is not the one that it would be if it came from this file."""
        found = self._client.list_turns_page(session_id, first_seq=seq, last_seq=seq).turns
        if len(found) == 1 and found[0].turn_id == turn_id:
            return
        raise Conflict(
            "SESSION_EXISTS",
            f"{place}: session {session_id!r} holds something else: its turn {seq} is not of this conversation.",
            {"session_id": session_id, "seq": str(seq), "turn_id": found[0].turn_id if found else ""},
            remedy="It was left as it is. Import under another id, prefix or --into.",
        )

    def append(self, session_id: str, batch: Sequence[Item], present: int) -> list[context_pb2.MissingRange]:
        """Append messages after turn `present`; the ranges that may be missing. A refusal names the message."""
        try:
            return self._send(session_id, batch, present)
        except Invalid as error:
            if len(batch) == 1:
                raise _of_message(error, batch[0]) from error
        # Nothing of the batch was appended, and the refusal need not say which message it is about.
        missing: list[context_pb2.MissingRange] = []
        for item in batch:
            try:
                missing = self._send(session_id, [item], present)
            except Invalid as error:
                raise _of_message(error, item) from error
            present += 1
        return missing

    def _send(self, session_id: str, batch: Sequence[Item], present: int) -> list[context_pb2.MissingRange]:
        done = self._client.append(
            session_id, [item.turn for item in batch], expected=(0, present), durability=self._durability
        )
        self._tally.add("turns_added", len(batch))
        for item in batch:
            if item.outcome:
                self._tally.add(item.outcome)
        return list(done.missing)

    def settle(self, session_id: str, missing: Sequence[context_pb2.MissingRange], count: int) -> None:
        """Clear what may be missing where the first `count` turns, now all there, reach into it; else count it."""
        if not missing:
            return
        if self._accept_missing:
            for epoch in sorted({lost.epoch for lost in missing}):
                self._resume(session_id, accept_missing=epoch)
        back = [lost for lost in missing if lost.first_seq <= count]
        for _ in range(SETTLE_ATTEMPTS_MAX):
            if back and not self._accept_missing:
                acked = turn_pb2.TurnPosition(
                    epoch=min(lost.epoch for lost in back), seq=count, chain=self._chain(session_id, count)
                )
                self._resume(session_id, highest_acked=acked)
            missing = self._client.get_session(session_id).missing
            back = [lost for lost in missing if lost.first_seq <= count]
            if not back or self._accept_missing:
                break
            # Served from the cloud tier, with the claim behind the reply: only an owner can clear it.
            time.sleep(SETTLE_WAIT_S)
        if missing:
            self._tally.add("possibly_missing")

    def _chain(self, session_id: str, seq: int) -> bytes:
        """The chain at a turn that is the file's: proof of all up to it, whatever their epochs. Empty if not there."""
        found = self._client.list_turns_page(session_id, first_seq=seq, last_seq=seq).turns
        return found[0].chain if found else b""

    def _resume(self, session_id: str, **what: Any) -> None:
        # The smallest context that can be asked for: it is thrown away.
        self._client.resume(session_id, BUDGET_TOKENS_MAX, strategy="LAST_N", last_exchanges=1, **what)


class _Chain:
    """Conversations on their way into one session: what is there is compared, the rest sent in full batches."""

    def __init__(self, importer: Importer, session_id: str, session: session_pb2.Session) -> None:
        self.missing = list(session.missing)
        self._importer = importer
        self._tally = importer.tally
        self._session_id = session_id
        self._head = session.head.seq
        self._sent = session.head.seq
        self._turn_ids = TurnIds(session_id)
        self._newest_id = ""
        self._place = ""
        self._pending: list[Item] = []

    @property
    def count(self) -> int:
        """Messages so far."""
        return self._turn_ids.count

    def add(self, line: Conversation) -> None:
        """Take one conversation. Raises Invalid if one of its messages is refused, Conflict if the session differs."""
        self._place = line.place
        items: list[Item] = []
        for at, message in enumerate(line.messages):
            self._newest_id = self._turn_ids.next(message)
            if self.count > self._head:
                items.append(Item(to_turn(message, self._newest_id, line.place, at), line.place, at))
            elif self.count == self._head:
                self._importer.check_same(self._session_id, self._head, self._newest_id, line.place)
        there = len(line.messages) - len(items)
        self._tally.add("turns_present", there)
        if items:
            items[-1].outcome = "continued" if there else "imported"
        else:
            self._tally.add("unchanged")
        self._pending += items
        while (size := batch_size(self._pending)) < len(self._pending):
            self._send(size)

    def send_rest(self) -> None:
        """Send what is pending."""
        while self._pending:
            self._send(batch_size(self._pending))

    def check_end(self) -> None:
        """Where the session has more turns than the files: that it began as they do. Raises Conflict."""
        if 0 < self.count < self._head:
            self._importer.check_same(self._session_id, self.count, self._newest_id, self._place)

    def _send(self, size: int) -> None:
        batch, self._pending = self._pending[:size], self._pending[size:]
        self.missing = self._importer.append(self._session_id, batch, self._sent)
        self._sent += len(batch)


def to_turn(message: Any, turn_id: str, place: str, at: int) -> turn_pb2.TurnInput:
    """A message as a turn. Raises Invalid, naming place and message."""
    from sessiond.client.formats import openai

    created_ms = first_time_ms(message) if isinstance(message, dict) else 0
    meta = turn_pb2.TurnMeta(created_at_unix_ms=created_ms) if created_ms else None
    try:
        return openai.message_to_turn(message, turn_id=turn_id, meta=meta, path=f"messages[{at}]")
    except Invalid as error:
        error.message = f"{place}: {error.message}"
        raise


def _of_message(error: Invalid, item: Item) -> Invalid:
    """A refusal of the daemon, with the place of the message in the file instead of in the request."""
    here = f"messages[{item.at}]"

    def placed(text: str) -> str:
        return text.replace("turns[0].message", here).replace("turns[0]", here)

    message = placed(error.message)
    error.message = f"{item.place}: {message if here in message else f'{here}: {message}'}"
    error.fields = [(placed(name), placed(what)) for name, what in error.fields]
    error.metadata = {**error.metadata, "place": item.place, "message": str(item.at)}
    return error


def batch_size(items: Sequence[Item]) -> int:
    """How many of the items go into the next append: at least one, within BATCH_TURNS_MAX and BATCH_BYTES_MAX."""
    size_bytes = 0
    for index, item in enumerate(items[:BATCH_TURNS_MAX]):
        size_bytes += item.turn.ByteSize()
        if index and size_bytes > BATCH_BYTES_MAX:
            return index
    return min(len(items), BATCH_TURNS_MAX)


# Progress ------------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(tally: Tally, sources: Sequence[Source]) -> Iterator[None]:
    """Counts on standard error while the block runs: a moving bar on a terminal, a line a second elsewhere."""
    over = threading.Event()
    show = _rich_progress if sys.stderr.isatty() else _plain_progress
    thread = threading.Thread(target=show, args=(tally, sources, over), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _plain_progress(tally: Tally, sources: Sequence[Source], over: threading.Event) -> None:
    del sources
    while not over.wait(PROGRESS_EVERY_S):
        print(tally.line(), file=sys.stderr, flush=True)


def _rich_progress(tally: Tally, sources: Sequence[Source], over: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # Standard input has no size; a bar that can't say how far it is moves to and fro.
    total = sum(source.size_bytes for source in sources) if all(source.size_bytes for source in sources) else None
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, soft_wrap=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        while not over.wait(REDRAW_EVERY_S):
            read = sum(source.position_bytes() for source in sources)
            failed = f", {tally.failed} failed" if tally.failed else ""
            done = f"{tally.conversations} conversations{failed}, {tally.turns_added} turns added"
            shown.update(task, completed=read if total else 0, description=done)
