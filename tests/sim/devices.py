"""Who calls: devices that talk to a session as our client does, over any node, with repeats and out of order."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sessiond.client.failures import Failure
from sessiond.errors import Corrupt, SessiondError
from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.sim.history import CLOUD, Op

if TYPE_CHECKING:
    from tests.sim.world import World

EDGE = turn_pb2.DURABILITY_EDGE
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
BUDGET_TOKENS = 100_000


class Device:
    """One device of a session's user. It knows what it was told, and nothing else."""

    def __init__(self, world: World, name: str, session: str) -> None:
        self.world = world
        self.name = name
        self.session = session
        self.rng = world.rng
        self.number = 0
        self.home = world.rng.choice(world.machine_names)
        self.faithful = world.rng.choice((1.0, 0.7, 0.4))
        self.highest: turn_pb2.TurnPosition | None = None
        self.head: turn_pb2.TurnPosition | None = None
        self.missing: list[Any] = []
        self.sent: list[session_pb2.AppendTurnRequest] = []
        self.asked = False

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def call(self, method: str, request: Any, patience_s: float, timeout_s: float) -> tuple[Any, str, int]:
        """The answer, or the refusal, as (it, the node that gave it, when this was first sent)."""
        world = self.world
        sent_us, backoff_s = world.schedule.now_us, BACKOFF_FIRST_S
        ends_us = sent_us + int(patience_s * 1e6)
        while True:
            node = self.home if self.rng.random() < self.faithful else self.rng.choice(world.machine_names)
            answer = await world.call(node, method, request, timeout_s)
            if not isinstance(answer, Failure):
                return answer, node, sent_us
            retry, answer = answer.retry, answer.error
            # Whoever's time is up may send the same once more, too.
            if not retry and answer.reason != "DEADLINE_TOO_SHORT":
                return answer, node, sent_us
            wait_s = (answer.retry_after_ms or 0) / 1000 if answer.reason != "SERVER_UNREACHABLE" else 0.0
            wait_s += backoff_s * (0.5 + self.rng.random() / 2)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
            if world.schedule.now_us + int(wait_s * 1e6) >= ends_us:
                return answer, node, sent_us
            await self.sleep(wait_s)

    def op(self, kind: str, sent_us: int, node: str, answer: Any) -> Op:
        """What this device was told, to be remembered."""
        op = Op(self.name, kind, self.session, sent_us, self.world.schedule.now_us, node)
        if isinstance(answer, SessiondError):
            op.reason = answer.reason
            if isinstance(answer, Corrupt) and answer.reason not in self.world.forgiven:
                self.world.history.broken("I11", f"{op}: {answer.reason} {answer.message}")
        return op

    # What devices do --------------------------------------------------------------------------------------------------

    async def live(self, first: bool, actions: int) -> None:
        if first:
            await self.create()
        # In bursts, and until what goes wrong is over: somebody has to see it.
        usual_s = self.world.knobs.faults_us / 1e6 / actions
        for _ in range(actions):
            await self.sleep(usual_s * self.rng.choice((0.01, 0.05, 0.5, 1, 3)) * (0.5 + self.rng.random()))
            await self.act()

    async def act(self) -> None:
        dice = self.rng.random()
        if dice < 0.50:
            await self.append()
        elif dice < 0.58 and self.sent:
            await self.append_again()
        elif dice < 0.84:
            await self.resume()
        elif dice < 0.90:
            await self.list_turns()
        elif dice < 0.94:
            await self.update()
        elif dice < 0.96:
            await self.get()
        elif dice < 0.98:
            await self.list_sessions()
        elif self.world.knobs.deletes:
            await self.delete()

    async def create(self, patience_s: float = 20.0) -> bool:
        request = session_pb2.CreateSessionRequest(session_id=self.session, user_id="user")
        expiry = self.world.knobs.expiry.get(self.session)
        if expiry is not None:
            request.policy.expiry.CopyFrom(expiry)
        if self.session in self.world.knobs.cloud_only:
            request.policy.min_durability = CLOUD
        answer, node, sent_us = await self.call("CreateSession", request, patience_s, 3.0)
        op = self.op("create", sent_us, node, answer)
        self.world.history.done(op)
        return not op.reason

    def turn(self) -> turn_pb2.TurnInput:
        self.number += 1
        name = f"{self.name}-{self.number}"
        dice = self.rng.random()
        if dice < 0.03:
            return turn_pb2.TurnInput(turn_id=name, milestone=turn_pb2.Milestone(label=name))
        role = turn_pb2.ROLE_USER if self.asked or dice < 0.3 else turn_pb2.ROLE_ASSISTANT
        self.asked = not self.asked
        text = f"{name} says so" + " again" * (self.rng.choice((0, 0, 0, 40, 200)))
        message = turn_pb2.Message(parts=[turn_pb2.Part(text=text)])
        return turn_pb2.TurnInput(turn_id=name, role=role, message=message)

    async def append(self, patience_s: float = 12.0) -> bool:
        request = session_pb2.AppendTurnRequest(session_id=self.session)
        request.turns.extend(self.turn() for _ in range(self.rng.choice((1, 1, 1, 2, 3))))
        request.durability = CLOUD if self.rng.random() < 0.35 else EDGE
        if self.head is not None and self.rng.random() < 0.3:
            request.expected.epoch, request.expected.seq = self.head.epoch, self.head.seq
            if self.rng.random() < 0.5:
                request.conflict_mode = session_pb2.CONFLICT_MODE_RETURN_TAIL
        if self.rng.random() < 0.2:
            request.context.budget_tokens = BUDGET_TOKENS
        self.sent.append(request)
        return await self.send(request, patience_s)

    async def append_again(self) -> None:
        """A request from before once more: a repeat that was on its way for long, or a device that lost count."""
        request = self.rng.choice(self.sent)
        if self.rng.random() < 0.5:
            both = session_pb2.AppendTurnRequest()
            both.CopyFrom(request)
            both.durability = CLOUD
            request = both
        await self.send(request, 6.0)

    async def send(self, request: session_pb2.AppendTurnRequest, patience_s: float) -> bool:
        answer, node, sent_us = await self.call("AppendTurn", request, patience_s, self.rng.choice((0.3, 2.0, 5.0)))
        op = self.op("append", sent_us, node, answer)
        if not op.reason:
            if answer.outcome == session_pb2.APPEND_OUTCOME_CONFLICT:
                op.kind = "conflict"
            op.ownership, op.durability = answer.ownership, answer.durability
            op.turns = [
                (turn.turn_id, turn.position.epoch, turn.position.seq, turn.position.chain, turn.duplicate)
                for turn in answer.turns
            ]
            op.head = (answer.head.seq, answer.head.chain)
            op.missing = ranges(answer.missing)
            if request.durability == CLOUD and op.kind == "append" and op.durability != CLOUD:
                self.world.history.broken("I2", f"{op}: asked for CLOUD, and told that it has less")
            if request.HasField("expected"):
                op.expected = (request.expected.epoch, request.expected.seq)
            self.note(answer.head, answer.missing)
            for turn in answer.turns:
                self.reached(turn.position)
        self.world.history.done(op)
        return not op.reason and op.kind == "append"

    def reached(self, place: turn_pb2.TurnPosition) -> None:
        if self.highest is None or (place.epoch, place.seq) > (self.highest.epoch, self.highest.seq):
            self.highest = place

    def note(self, head: turn_pb2.TurnPosition, missing: Any) -> None:
        self.head = head
        self.missing = list(missing)

    async def resume(self, patience_s: float = 8.0) -> bool:
        request = session_pb2.ResumeSessionRequest(session_id=self.session)
        request.context.budget_tokens = BUDGET_TOKENS
        if self.highest is not None and self.rng.random() < 0.4:
            request.highest_acked.CopyFrom(self.highest)
            if self.rng.random() < 0.3:
                request.highest_acked.chain = b""
        if self.missing and self.rng.random() < 0.2:
            request.accept_missing = max(gap.epoch for gap in self.missing)
        elif self.rng.random() < 0.15:
            request.read_only = True
        answer, node, sent_us = await self.call("ResumeSession", request, patience_s, self.rng.choice((0.3, 2.0, 5.0)))
        op = self.op("resume", sent_us, node, answer)
        if request.HasField("highest_acked"):
            acked = request.highest_acked
            op.highest = (acked.epoch, acked.seq, acked.chain)
        if request.HasField("accept_missing"):
            op.accepts = request.accept_missing
        if not op.reason:
            receipt = answer.context.receipt
            op.ownership = receipt.ownership
            op.head = (receipt.head.seq, receipt.head.chain)
            op.missing = ranges(receipt.missing)
            op.hot_at = receipt.node if receipt.rung == context_pb2.RUNG_HOT else ""
            self.check_context(op, answer.context)
            self.note(receipt.head, receipt.missing)
        self.world.history.done(op)
        return not op.reason and op.ownership == context_pb2.OWNERSHIP_CONFIRMED

    def check_context(self, op: Op, context: Any) -> None:
        """The window is what the receipt says: turns in order up to the head."""
        receipt = context.receipt
        seqs = [turn.seq for turn in context.turns]
        if seqs != sorted(set(seqs)) or (seqs and seqs[-1] > receipt.head.seq):
            self.world.history.broken("I16", f"{op}: turns {seqs} under head {receipt.head.seq}")
        if context.tokens.total > context.tokens.budget:
            self.world.history.broken("I16", f"{op}: {context.tokens.total} of {context.tokens.budget} tokens")
        if receipt.missing and receipt.rung not in (context_pb2.RUNG_PARTIAL, context_pb2.RUNG_RESET):
            self.world.history.broken("I9", f"{op}: something is missing on rung {receipt.rung}")

    async def list_turns(self) -> None:
        request = session_pb2.ListTurnsRequest(session_id=self.session, page_size=self.rng.choice((0, 3)))
        answer, node, sent_us = await self.call("ListTurns", request, 6.0, 3.0)
        op = self.op("list", sent_us, node, answer)
        if not op.reason:
            seqs = [turn.seq for turn in answer.turns]
            if seqs != list(range(1, len(seqs) + 1)):
                self.world.history.broken("I4", f"{op}: the transcript has turns {seqs}")
        self.world.history.done(op)

    async def update(self) -> None:
        self.number += 1
        name = f"{self.name}-{self.number}"
        change = turn_pb2.StateChange(metadata={self.name: name}, pins=[turn_pb2.PinnedFact(key="k", value=name)])
        request = session_pb2.UpdateSessionRequest(session_id=self.session, turn_id=name, change=change)
        answer, node, sent_us = await self.call("UpdateSession", request, 8.0, 3.0)
        op = self.op("append", sent_us, node, answer)
        if not op.reason:
            turn = answer.appended
            place = turn.position
            op.turns = [(turn.turn_id, place.epoch, place.seq, place.chain, turn.duplicate)]
            self.reached(place)
        self.world.history.done(op)

    async def get(self) -> None:
        request = session_pb2.GetSessionRequest(session_id=self.session)
        answer, node, sent_us = await self.call("GetSession", request, 6.0, 3.0)
        op = self.op("get", sent_us, node, answer)
        if not op.reason:
            op.head, op.ownership = (answer.session.head.seq, answer.session.head.chain), answer.session.ownership
            op.missing = ranges(answer.session.missing)
        self.world.history.done(op)

    async def list_sessions(self) -> None:
        answer, node, sent_us = await self.call("ListSessions", session_pb2.ListSessionsRequest(), 6.0, 3.0)
        told = self.world.history.sessions[self.session]
        if isinstance(answer, SessiondError) or answer.incomplete or answer.next_page_token:
            return
        listed = {session.session_id for session in answer.sessions} | {row.session_id for row in answer.unreadable}
        known = told.created_us is not None and told.created_us < sent_us and not told.expires
        ended = any(op.kind in ("delete", "asked to delete") for op in told.ops)
        if known and not ended and self.session not in listed:
            self.world.history.broken("I9", f"{self.name}: the list lacks {self.session}, via {node}")

    async def delete(self) -> None:
        now_us = self.world.schedule.now_us
        self.world.history.done(Op(self.name, "asked to delete", self.session, now_us, now_us, ""))
        request = session_pb2.DeleteSessionRequest(session_id=self.session)
        answer, node, sent_us = await self.call("DeleteSession", request, 10.0, 5.0)
        self.world.history.done(self.op("delete", sent_us, node, answer))


def ranges(missing: Any) -> list[tuple[int, int, int]]:
    return [(gap.epoch, gap.first_seq, gap.last_seq) for gap in missing]
