"""The demonstration, step by step. It leaves no process behind and deletes nothing but what its own last run left."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sessiond import __version__
from sessiond.cli import output
from sessiond.cli.export import missing_text, read_messages
from sessiond.cli.import_ import to_turn
from sessiond.client import Client, Context, Invalid, Unavailable, assistant, context_spec, user
from sessiond.demo import picture, sample
from sessiond.demo.figures import (
    AFTER_DRAIN,
    AFTER_KILL,
    AFTER_LOSS,
    FIRST,
    UNDER_LOAD,
    Figures,
    Growth,
    Latency,
    Promise,
)
from sessiond.demo.load import Load
from sessiond.demo.screen import Screen
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import context_pb2, turn_pb2

BUDGET_TOKENS: Final = 4000
CALL_S: Final = 30.0
# A turn of the write load.
LOAD_CHARACTERS_MAX: Final = 2000
CLAIM_S: Final = 60.0
POLL_S: Final = 0.02
COMMAND_S: Final = 600.0
# Says that a folder is the demonstration's own, so that the next run may clear it.
MARK: Final = ".sessiond-demo"
DATA: Final = "data"
LOG: Final = "daemon.log"
SAMPLE: Final = "conversations.jsonl"
FIGURES: Final = "figures.json"
PICTURE: Final = "summary.svg"
GROWING: Final = "demo:growing"
CAREFUL: Final = "demo:cloud-only"


class Refused(Exception):
    """The demonstration can't go on. code: the exit code."""

    def __init__(self, message: str, remedy: str, code: int = 2) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.code = code


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything."""

    growing_turns_max: int = 2000
    writers: int = 8
    load_sessions: int = 48
    kills: int = 5
    acks_between_kills: int = 1500

    @classmethod
    def quick(cls) -> Plan:
        """The same steps with less in them."""
        return cls(growing_turns_max=240, load_sessions=16, kills=1, acks_between_kills=200)


def prepare(out: Path) -> None:
    """Make the folder, without what the run before left in it. Raises Refused."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        mark = out / MARK
        if any(out.iterdir()) and not mark.exists():
            raise Refused(
                f"{out} holds files that are not the demonstration's.", "Name an empty or new folder: --out DIR"
            )
        mark.touch()
        for pid in _users_of(out / DATA):
            raise Refused(
                f"Process {pid} still uses {out / DATA}.", f"Stop it (kill {pid}), or name another folder: --out DIR"
            )
        if (out / DATA).exists():
            shutil.rmtree(out / DATA)
        for name in (LOG, FIGURES, PICTURE, SAMPLE):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise Refused(
            f"{out} can't be used: {error.strerror}.", "Name a folder that you may write to: --out DIR"
        ) from error


def _users_of(folder: Path) -> Iterator[int]:
    """Processes with a file of that folder open, as far as we may see them."""
    start = f"{folder.absolute()}{os.sep}"
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            links = list((entry / "fd").iterdir())
        except OSError:
            continue
        if any(_target(link).startswith(start) for link in links):
            yield int(entry.name)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def run(screen: Screen, files: tuple[str, ...], out: Path, plan: Plan) -> Figures:
    """Show everything. Raises Refused, SessiondError, StartFailed; the daemon is gone then, its log in the folder."""
    figures = Figures(Growth(BUDGET_TOKENS))
    started, began_at = time.monotonic(), datetime.now(UTC)
    if "-" in files:
        raise Refused("Standard input can be read only once, and here it is read twice.", "Name a file.")
    if not files:
        made = out / SAMPLE
        made.write_text("".join(f"{line}\n" for line in sample.lines()), encoding="utf-8")
        files = (os.path.relpath(made),)
    screen.step("Start a daemon on embedded defaults: no configuration, the cloud tier is a folder")
    before = time.monotonic()
    with running_daemon(out / DATA) as daemon:
        _add(figures.restarts, FIRST, time.monotonic() - before)
        screen.note(f"process {daemon.pid} on {daemon.address}, data in {_short(out / DATA)}")
        try:
            _Show(screen, figures, daemon, files, plan).all_steps()
        finally:
            if daemon.log_path.exists():
                shutil.copyfile(daemon.log_path, out / LOG)
    figures.facts = {
        "sessiond": __version__,
        "started_at": began_at.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "quick": plan != Plan(),
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "files": list(files),
        **figures.facts,
    }
    return figures


class _Show:
    """The steps, and what one hands to the next."""

    def __init__(self, screen: Screen, figures: Figures, daemon: Daemon, files: tuple[str, ...], plan: Plan) -> None:
        self._screen = screen
        self._figures = figures
        self._daemon = daemon
        self._files = files
        self._plan = plan
        self._expected: list[sample.Expected] = []
        self._messages: list[dict[str, Any]] = []
        self._load_ids = [f"demo:load-{number:02}" for number in range(1, plan.load_sessions + 1)]
        # Where the newest exchange alone is larger than the budget: the least that it needs.
        self._budgets: dict[str, int] = {}
        self._contexts: dict[str, bytes] = {}
        self._largest_over = 0
        self._restarted_at = 0.0

    def all_steps(self) -> None:
        """Every step, in order."""
        self._import()
        self._grow()
        self._crash_under_load()
        self._resume_hot()
        self._lose_disk_after_drain()
        self._lose_disk_after_crash()
        self._end()

    # The steps -------------------------------------------------------------------------------------------------------

    def _import(self) -> None:
        screen = self._screen
        self._expected = sample.expected(self._files)
        if not self._expected:
            raise Refused(
                f"There is no conversation in {', '.join(self._files)}.",
                'Each line must be a JSON object {"id", "messages"} of the OpenAI chat format, or a list of messages.',
            )
        screen.step(f"Import {len(self._expected)} conversations: sessiond import {' '.join(map(_short, self._files))}")
        seconds, tally = self._run_import()
        failed = {failure["place"] for failure in tally["failures"]}
        for failure in tally["failures"]:
            screen.note(f"left out: {failure['message']}")
        self._expected = [known for known in self._expected if known.place not in failed]
        if not self._expected:
            raise Refused("No conversation could be imported.", "The lines above say why.")
        self._messages = sample.growing(
            self._files, {known.place for known in self._expected}, self._plan.growing_turns_max
        )
        turns = sum(known.count for known in self._expected)
        screen.note(f"{len(self._expected)} sessions, {turns:,} turns in {seconds:.1f} s")
        self._facts(conversations=len(self._expected), imported_turns=turns, import_s=round(seconds, 2))
        with self._client() as client:
            wrong = [known.session_id for known in self._expected if not self._is_there(client, known)]
        self._promise("what was imported comes back equal, message by message", not wrong, _some(wrong))

    def _grow(self) -> None:
        messages = self._messages
        self._screen.step(
            f"Let a conversation grow to {len(messages):,} turns, as a gateway does: before each call of the model one"
            f" AppendTurn, which returns the context of at most {BUDGET_TOKENS:,} tokens"
        )
        spec = context_spec(BUDGET_TOKENS)
        growth = self._figures.growth
        growth.turns = len(messages)
        pending: list[turn_pb2.TurnInput] = []
        with self._client() as client, self._screen.progress("turns", len(messages)) as advance:
            client.create_session(GROWING, user_id="demo")
            for at, message in enumerate(messages):
                # What the model says next is an answer to everything before it.
                if message.get("role") == "assistant" and pending:
                    self._call_model(client, pending, at, spec, growth)
                    advance(len(pending))
                    pending = []
                pending.append(to_turn(message, f"grow-{at}", "the growing conversation", at))
            if pending:
                client.append(GROWING, pending)
        if not growth.points:
            raise Refused("The conversations hold no assistant message.", "Name a file with whole conversations.")
        self._screen.note(
            f"{len(growth.points):,} calls, {growth.context_tokens:,} input tokens in all; with the full transcript"
            f" each time {growth.transcript_tokens:,}, so {100 * growth.share:.1f} % of it"
        )
        self._screen.note(f"append with the context in the reply: p50 {_ms(self._figures.turn_calls.p50_ms)}")

    def _call_model(
        self, client: Client, turns: list[turn_pb2.TurnInput], at: int, spec: context_pb2.ContextSpec, growth: Growth
    ) -> None:
        before = time.perf_counter()
        result = client.append(GROWING, turns, context=spec)
        self._figures.turn_calls.add_s(time.perf_counter() - before)
        context = result.context
        if context is None:
            # A single message larger than the budget: an answer of its own, with what it would take.
            context = self._resume(client, GROWING)
        self._check_budget(GROWING, context)
        tokens = context.tokens
        growth.points.append((at, tokens.total, tokens.transcript + tokens.framing))

    def _crash_under_load(self) -> None:
        plan, screen, daemon, figures = self._plan, self._screen, self._daemon, self._figures
        screen.step(
            f"SIGKILL the daemon in the middle of a write load ({plan.writers} threads, {plan.load_sessions} sessions)"
            f" and start it again{f', {plan.kills} times' if plan.kills > 1 else ''}"
        )
        with self._client() as client:
            for session_id in self._load_ids:
                client.create_session(session_id, user_id="demo")
            client.create_session(CAREFUL, user_id="demo", policy={"min_durability": "CLOUD"})
            client.append(CAREFUL, [user("Is this kept?"), assistant("In the cloud tier, before I said so.")])
        contents = [message.get("content") for message in self._messages]
        texts = [text for text in contents if isinstance(text, str) and 0 < len(text) <= LOAD_CHARACTERS_MAX]
        load = Load(daemon.address, self._load_ids, texts or ["Hello."], plan.writers, seed=7)
        load.start()
        try:
            with screen.progress("kills", plan.kills) as advance:
                for _ in range(plan.kills):
                    load.wait_for(plan.acks_between_kills)
                    killed_at = time.monotonic()
                    daemon.kill()
                    self._start(UNDER_LOAD)
                    figures.outage.add_s(load.wait_for(1) - killed_at)
                    advance(1)
                load.wait_for(plan.acks_between_kills)
        finally:
            load.stop()
        restart, outage = figures.restarts[UNDER_LOAD], figures.outage
        screen.note(
            f"{load.acks:,} turns acknowledged, {load.cloud_acks:,} of them at CLOUD durability; {load.answers_lost}"
            " had been written when a crash took the answer, and were recognised when they were sent again"
        )
        screen.note(
            f"start to serving p50 {_ms(restart.p50_ms)}, worst {_ms(restart.max_ms)};"
            f" kill to the next acknowledged append p50 {_ms(outage.p50_ms)}, worst {_ms(outage.max_ms)}"
        )
        self._facts(kills=plan.kills, acknowledged_turns=load.acks, acknowledged_again=load.answers_lost)
        with self._client() as client, screen.progress("sessions checked", len(self._load_ids)) as advance:
            wrong = []
            for session_id in self._load_ids:
                wrong += _wrong_turns(client, session_id, load.acked[session_id])
                advance(1)
        self._promise("every acknowledged turn is there exactly once, in its place", not wrong, _some(wrong))

    def _resume_hot(self) -> None:
        self._screen.step(f"SIGKILL it once more, start it, resume all {len(self._all_ids())} sessions")
        self._daemon.kill()
        self._start(AFTER_KILL)
        wrong = []
        for session_id, context in self._resume_all("HOT", AFTER_KILL):
            self._contexts[session_id] = _served(context)
            wrong += [] if context.rung == "HOT" and not context.missing else [f"{session_id}: {context.rung}"]
        self._promise("after the crash every session is served HOT", not wrong, _some(wrong))

    def _lose_disk_after_drain(self) -> None:
        screen, daemon = self._screen, self._daemon
        screen.step("Drain the daemon (SIGTERM), delete its hot tier, start it again, resume all from the cloud tier")
        before = time.monotonic()
        code = daemon.terminate()
        seconds = time.monotonic() - before
        screen.note(f"drained in {seconds:.1f} s")
        self._facts(drain_s=round(seconds, 2))
        self._promise("the drain puts every turn into the cloud tier and releases every session", code == 0, "")
        daemon.lose_hot_tier()
        self._start(AFTER_DRAIN)
        wrong, other = [], []
        for session_id, context in self._resume_all("CLOUD", AFTER_DRAIN):
            wrong += [] if context.rung == "CLOUD" and not context.missing else [f"{session_id}: {context.rung}"]
            other += [] if _served(context) == self._contexts[session_id] else [session_id]
        self._promise("with an empty disk every session is served CLOUD", not wrong, _some(wrong))
        self._promise("the contexts are the same, byte by byte", not other, _some(other))
        with self._client() as client:
            other = [
                session_id
                for session_id in self._all_ids()
                if _served(self._until_hot(client, session_id)) != self._contexts[session_id]
            ]
        self._promise("once claimed they are HOT again, with the same contexts", not other, _some(other))
        _, tally = self._run_import()
        added = tally["turns_added"]
        self._promise("the same import, run again, adds nothing", added == 0, f"{added} turns added" if added else "")

    def _lose_disk_after_crash(self) -> None:
        screen, daemon = self._screen, self._daemon
        lost_id, kept_id = self._load_ids[:2]
        screen.step(
            "SIGKILL the daemon right after two exchanges, and delete its hot tier: what was not flushed is gone"
        )
        with self._client(resend=True) as keeper, self._client() as client:
            acked = client.append(lost_id, _exchange("lost"))
            kept = keeper.append(kept_id, _exchange("kept"))
            daemon.kill()
            daemon.lose_hot_tier()
            self._start(AFTER_LOSS)
            silent, epochs = [], {}
            for session_id, context in self._resume_all("PARTIAL", AFTER_LOSS):
                if session_id == CAREFUL:
                    whole = context.rung == "CLOUD" and not context.missing
                    careful = f"{context.rung}" if not whole else ""
                elif context.rung == "PARTIAL" and context.missing and context.notice:
                    epochs[session_id] = max(gap.epoch for gap in context.missing)
                else:
                    silent.append(f"{session_id}: {context.rung}")
            told = self._resume(client, lost_id, highest_acked=acked)
            screen.note(f"{lost_id} says: {told.notice}")
            for gap in told.missing:
                screen.note(f"{lost_id} lacks: {missing_text(gap)}")
            self._promise("no reply looks complete: each names what may be missing", not silent, _some(silent))
            self._promise("a session of CLOUD appends only is whole", not careful, careful)
            self._repair(client, keeper, lost_id, kept_id, acked.turns, kept.turns, epochs)

    def _repair(
        self,
        client: Client,
        keeper: Client,
        lost_id: str,
        kept_id: str,
        lost: Iterable[Any],
        kept: Iterable[Any],
        epochs: dict[str, int],
    ) -> None:
        """Send the turns of one session again, go on without those of the others."""
        context = keeper.resend(kept_id, self._budget(kept_id))
        there = {turn.turn_id for turn in client.list_turns(kept_id)}
        back = not context.missing and all(turn.turn_id in there for turn in kept)
        self._promise(f"{kept_id} is whole after its client sent its turns again", back, "" if back else context.rung)
        wrong = []
        for session_id, epoch in epochs.items():
            if session_id == kept_id:
                continue
            self._resume(client, session_id, accept_missing=epoch)
            context = self._until_hot(client, session_id)
            wrong += [f"{session_id}: {context.rung}"] if context.missing else []
            if session_id != lost_id and _served(context) != self._contexts[session_id]:
                wrong.append(f"{session_id}: another context")
        there = {turn.turn_id for turn in client.list_turns(lost_id)}
        gone = sum(turn.turn_id not in there for turn in lost)
        self._screen.note(
            f"accepted for the others; of the turns that nobody sent again {gone} are gone, as the reply had said"
            if gone
            else "accepted for the others; as it turned out, nothing was lost: the flush was faster than the kill"
        )
        self._facts(edge_turns_lost_with_the_disk=gone)
        self._promise("accepted, every session goes on HOT", not wrong, _some(wrong))

    def _end(self) -> None:
        self._screen.step("Drain, and run the invariants over both tiers: sessiond verify")
        sessions = len(self._all_ids())
        code = self._daemon.terminate()
        checked = _run_cli("verify", "--json", "--data-dir", str(self._daemon.data_dir), codes=(0, 1))
        found = json.loads(checked)
        broken = [f"{row['invariant']} {row['session_id']}: {row['explanation']}" for row in found["violations"]]
        self._screen.note(f"{found['checked_sessions']} sessions checked, {len(broken)} violations")
        whole = code == 0 and not broken and found["checked_sessions"] >= sessions
        self._promise("every invariant holds", whole, _some(broken))
        over = f"by up to {self._largest_over} tokens" if self._largest_over else ""
        asked = f"{BUDGET_TOKENS:,} tokens" + (", or the least that was possible" if self._budgets else "")
        self._promise(f"no context was larger than its budget: {asked}", not over, over)
        for session_id, budget in self._budgets.items():
            self._screen.note(f"{session_id}: its newest exchange alone needs {budget:,} tokens, so it got those")
        longest = max(self._expected, key=lambda known: known.count)
        self._facts(sessions=sessions, longest_session=longest.session_id)

    # What steps are made of ------------------------------------------------------------------------------------------

    def _promise(self, promise: str, kept: bool, detail: str) -> None:
        self._figures.promises.append(Promise(promise, kept, detail))
        self._screen.promise(promise, kept, detail)

    def _facts(self, **facts: Any) -> None:
        self._figures.facts.update(facts)

    def _all_ids(self) -> list[str]:
        imported = dict.fromkeys(known.session_id for known in self._expected)
        return [*imported, GROWING, CAREFUL, *self._load_ids]

    @contextmanager
    def _client(self, resend: bool = False) -> Iterator[Client]:
        # A connection of its own: gRPC would share one between clients of one process.
        options = {"grpc.use_local_subchannel_pool": 1}
        with Client(self._daemon.address, timeout_s=CALL_S, channel_options=options, resend=resend) as client:
            yield client

    def _start(self, found: str) -> None:
        """Start the daemon and wait until it serves. found: what it finds."""
        self._restarted_at = time.monotonic()
        self._daemon.start()
        _add(self._figures.restarts, found, time.monotonic() - self._restarted_at)

    def _run_import(self) -> tuple[float, dict[str, Any]]:
        before = time.monotonic()
        told = _run_cli("import", "--json", "--server", self._daemon.address, *self._files, codes=(0, 9))
        tally: dict[str, Any] = json.loads(told)
        if tally["failed"] > len(tally["failures"]):
            raise Refused(
                f"{tally['failed']} conversations could not be imported.", "Name a file of the OpenAI chat format."
            )
        return time.monotonic() - before, tally

    def _is_there(self, client: Client, known: sample.Expected) -> bool:
        messages, missing = read_messages(client, known.session_id)
        return not missing and sample.digest(messages) == known.digest

    def _budget(self, session_id: str) -> int:
        return self._budgets.get(session_id, BUDGET_TOKENS)

    def _resume(self, client: Client, session_id: str, **what: Any) -> Context:
        """The context within the budget, or within the least that its newest exchange needs."""
        while True:
            try:
                context = client.resume(session_id, self._budget(session_id), **what)
            except Invalid as error:
                needed = int(error.metadata.get("minimum_budget_tokens", 0))
                if error.reason != "BUDGET_TOO_SMALL" or needed <= self._budget(session_id):
                    raise
                self._budgets[session_id] = needed
            else:
                self._check_budget(session_id, context)
                return context

    def _check_budget(self, session_id: str, context: Context) -> None:
        self._largest_over = max(self._largest_over, context.tokens.total - self._budget(session_id))

    def _resume_all(self, rung: str, found: str) -> Iterator[tuple[str, Context]]:
        """Each session, resumed over a new connection; the time counts for the rung that the reply names.

        The first one after the restart counts for the restart. The others follow the first append, for which a daemon
        loads its vocabularies, so that they tell about rungs and not about that.
        """
        ids, figures = self._all_ids(), self._figures
        with self._screen.progress("sessions resumed", len(ids)) as advance:
            for session_id in ids:
                before = time.perf_counter()
                with self._client() as client:
                    context = self._resume(client, session_id)
                    seconds = time.perf_counter() - before
                if session_id == ids[0]:
                    _add(figures.first_contexts, found, time.monotonic() - self._restarted_at)
                    self._append_first(found)
                elif context.rung in figures.rungs:
                    figures.rungs[context.rung].add_s(seconds)
                advance(1)
                yield session_id, context
        latency = figures.rungs[rung]
        self._screen.note(
            f"from the start of the process: first context after {_ms(figures.first_contexts[found].p50_ms)}, first"
            f" acknowledged append after {_ms(figures.first_appends[found].p50_ms)}"
        )
        self._screen.note(
            f"reconnect to context on rung {rung}: p50 {_ms(latency.p50_ms)},"
            f"{f' p95 {_ms(latency.high_ms)},' if latency.has_p95 else ''} worst {_ms(latency.max_ms)}"
        )

    def _append_first(self, found: str) -> None:
        with self._client() as client:
            session = client.create_session(user_id="demo")
            client.append(session.session_id, _exchange("first"))
        _add(self._figures.first_appends, found, time.monotonic() - self._restarted_at)

    def _until_hot(self, client: Client, session_id: str) -> Context:
        """Ask until the claim behind a cold reply is committed. Raises Unavailable if it takes too long."""
        until = time.monotonic() + CLAIM_S
        while (context := self._resume(client, session_id)).rung != "HOT":
            if time.monotonic() > until:
                what = f"{session_id} is still {context.rung} after {CLAIM_S:.0f} s."
                raise Unavailable("STORE_UNAVAILABLE", what, remedy=f"The daemon's own words are in {LOG}.")
            time.sleep(POLL_S)
        return context


def _add(latencies: dict[str, Latency], name: str, seconds: float) -> None:
    latencies.setdefault(name, Latency()).add_s(seconds)


def _exchange(name: str) -> list[turn_pb2.TurnInput]:
    return [
        user("One more thing before you go.", turn_id=f"{name}-user"),
        assistant("Said just before the lights went out.", turn_id=f"{name}-assistant"),
    ]


def _served(context: Context) -> bytes:
    """What a model would be sent, and everything else that must not depend on the rung."""
    copy = context_pb2.ActiveContext()
    copy.CopyFrom(context.proto)
    copy.ClearField("receipt")
    copy.ClearField("context_etag")
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).digest()


def _wrong_turns(client: Client, session_id: str, acked: dict[str, tuple[int, int]]) -> list[str]:
    """What is wrong with a session's log, given the (epoch, seq) under which each turn_id was acknowledged."""
    found: dict[str, tuple[int, int]] = {}
    wrong = []
    for due, turn in enumerate(client.list_turns(session_id, page_size=1000), 1):
        if turn.seq != due:
            wrong.append(f"{session_id}: turn {turn.seq} where {due} is due")
        if turn.turn_id in found:
            wrong.append(f"{session_id}: {turn.turn_id} twice")
        found[turn.turn_id] = (turn.epoch, turn.seq)
    return wrong + [f"{session_id}: {name} lost" for name, place in acked.items() if found.get(name) != place]


def _run_cli(*arguments: str, codes: tuple[int, ...]) -> str:
    """Run a command of sessiond; what it printed. Raises Refused with its own words if it ends with another code."""
    done = subprocess.run(
        [sys.executable, "-m", "sessiond", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S, check=False,
    )  # fmt: skip
    if done.returncode not in codes:
        words = " ".join((done.stderr or done.stdout).split())
        raise Refused(
            f"sessiond {arguments[0]} ended with {done.returncode}: {words[-800:]}", "Its last words say what to do.", 1
        )
    return done.stdout


def _short(path: str | Path) -> str:
    """The path as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _some(items: list[str]) -> str:
    """The first few, and how many there are."""
    shown = "; ".join(items[:3])
    return f"{shown}; {len(items)} in all" if len(items) > 3 else shown


def _ms(value: float) -> str:
    return picture.ms_text(value)


def _times(latency: Latency) -> tuple[str, str, str]:
    return _ms(latency.p50_ms), _ms(latency.high_ms) if latency.has_p95 else "-", _ms(latency.max_ms)


def summary(screen: Screen, figures: Figures, out: Path) -> None:
    """The table, the picture, the figures as JSON, and the next command to try."""
    growth = figures.growth
    screen.line()
    measured = [(f"reconnect to context, rung {name}", latency) for name, latency in figures.rungs.items()]
    measured += [(f"process start to serving: {name}", latency) for name, latency in figures.restarts.items()]
    measured += [(f"process start to first context: {name}", it) for name, it in figures.first_contexts.items()]
    measured += [(f"process start to first append: {name}", latency) for name, latency in figures.first_appends.items()]
    measured.append(("kill -9 under load to the next acknowledged append", figures.outage))
    measured.append(("append with the context in its reply", figures.turn_calls))
    rows = [(name, str(len(latency.samples_ms)), *_times(latency)) for name, latency in measured]
    output.table(("measured", "times", "p50", "p95", "worst"), rows, right=("times", "p50", "p95", "worst"))
    screen.line()
    last = growth.points[-1]
    sums = [
        (f"resumed context, budget {growth.budget_tokens:,}", f"{last[1]:,}", f"{growth.context_tokens:,}"),
        ("full transcript", f"{last[2]:,}", f"{growth.transcript_tokens:,}"),
        ("share", f"{100 * last[1] / last[2]:.1f} %", f"{100 * growth.share:.1f} %"),
    ]
    output.table(("tokens sent to the model", "last call", "all calls"), sums, right=("last call", "all calls"))
    kept = len(figures.promises) - len(figures.broken)
    screen.line()
    screen.line(f"{kept} of {len(figures.promises)} promises kept, in {figures.facts['seconds']} s.")
    for promise in figures.broken:
        screen.promise(promise.promise, False, promise.detail)
    (out / FIGURES).write_text(json.dumps(figures.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / PICTURE).write_text(picture.draw(figures), encoding="utf-8")
    screen.line(f"Picture: {_short(out / PICTURE)}   figures: {_short(out / FIGURES)}   log: {_short(out / LOG)}")


def next_command(screen: Screen, out: Path, session_id: str) -> None:
    """What to try on the data that is still there."""
    here = [sys.executable, "-m", "sessiond"]
    beside = Path(sys.executable).with_name("sessiond")
    if beside.exists():
        on_path = shutil.which("sessiond")
        same = on_path is not None and os.path.samefile(on_path, beside)
        # make puts .venv/bin on the PATH of what it runs, and not on that of whoever reads this.
        here = ["sessiond"] if same and "MAKELEVEL" not in os.environ else [_short(beside)]
    command = shlex.join(here)
    data = shlex.quote(_short(out / DATA))
    screen.line()
    screen.line("Next, on the conversations that are still there:")
    screen.line(f"    {command} serve --data-dir {data}")
    screen.line("and in another terminal:")
    screen.line(f"    {command} resume {shlex.quote(session_id)} --budget {BUDGET_TOKENS}")
