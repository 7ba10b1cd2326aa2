"""`sessiond resume`: the active context within a budget, as a table with tokens per part, or as a model takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sessiond.cli import connect, output, ranges
from sessiond.cli.append import parse_position
from sessiond.cli.export import missing_text
from sessiond.v1 import context_pb2, turn_pb2

if TYPE_CHECKING:
    from sessiond.client import Context

STRATEGIES = ("full", "last_n", "summary", "hybrid", "recall")
PARTS = ("instructions", "pins", "summary", "tail", "recalled", "new_message", "framing")


@click.command()
@click.argument("session")
@click.option("--budget", type=click.IntRange(min=0), metavar="N", help="The most tokens.  [default: the policy's]")
@click.option("--reserve", type=click.IntRange(min=0), metavar="N", default=0, help="Tokens to leave free of it.")
@click.option(
    "--strategy", type=click.Choice(STRATEGIES), help="How turns are chosen.  [default: the policy's, or hybrid]"
)
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Exchanges that last_n keeps; implies it.")
@click.option("--encoding", type=click.Choice(["o200k_base", "cl100k_base"]), help="How tokens are counted.")
@click.option("--instructions", metavar="T", help="Instructions in place of the log's own; not stored.")
@click.option("--new-message", metavar="T", help="The user's new message: counted, not stored.")
@click.option(
    "--highest-acked",
    metavar="EPOCH:SEQ[:CHAINHEX]",
    help="The newest turn that you saw acknowledged; its chain, as append prints it, proves it.",
)
@click.option("--accept-missing", type=ranges.UINT32, metavar="EPOCH", help="Go on without its lost turns.")
@click.option("--reset-to", metavar="NEW", default="", help="Make this session if the history is lost for good.")
@click.option("--read-only", is_flag=True, help="Do not take the session over.")
@click.option("--user", default="", metavar="U", help="The user whose session it must be.")
@click.option("--openai", "as_openai", is_flag=True, help="Print the messages of an OpenAI chat completion, as JSON.")
@click.option("--anthropic", "as_anthropic", is_flag=True, help="Print Anthropic's system and messages, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print everything, as JSON.")
@connect.options
def command(
    session: str,
    budget: int | None,
    reserve: int,
    strategy: str | None,
    last: int | None,
    encoding: str | None,
    instructions: str | None,
    new_message: str | None,
    highest_acked: str | None,
    accept_missing: int | None,
    reset_to: str,
    read_only: bool,
    user: str,
    as_openai: bool,
    as_anthropic: bool,
    as_json: bool,
    server: str | None,
    timeout: float,
) -> None:
    """Show what a model would be sent for SESSION, most stable part first, and the receipt with what is missing.

    Exit code 0 also where turns are missing: the receipt says so.
    """
    if as_json + as_openai + as_anthropic > 1:
        raise click.UsageError("Give one of --json, --openai and --anthropic.")
    if last is not None and strategy not in (None, "last_n"):
        raise click.UsageError(f"--last goes with --strategy last_n, not {strategy}.")
    acked = parse_position(highest_acked, "--highest-acked", chain=True) if highest_acked is not None else None
    with connect.client(server, timeout) as client:
        context = client.resume(
            session,
            budget or 0,
            reserve_tokens=reserve,
            strategy="LAST_N" if last is not None else (strategy or "").upper(),
            last_exchanges=last or 0,
            encoding=encoding or "",
            instructions=instructions,
            new_message=new_message,
            highest_acked=acked,
            accept_missing=accept_missing,
            reset_to_session_id=reset_to,
            read_only=read_only,
            user_id=user,
        )
    if as_json:
        output.print_json(output.plain(context.proto))
    elif as_openai:
        output.print_json(context.to_openai())
    elif as_anthropic:
        output.print_json(context.to_anthropic())
    else:
        _show(context)


def _show(context: Context) -> None:
    proto = context.proto
    slot = "cl100k" if proto.encoding == turn_pb2.ENCODING_CL100K_BASE else "o200k"
    rows: list[tuple[object, ...]] = []
    if proto.given_instructions:
        rows.append(("-", "given instructions", proto.tokens.instructions, output.start_of(proto.given_instructions)))
    if proto.HasField("instructions"):
        rows.append(_row(proto.instructions, slot, "instructions"))
    if proto.pins:
        pins = ", ".join(f"{pin.key}={pin.value}" for pin in proto.pins)
        rows.append(("-", "pins", proto.tokens.pins, output.start_of(pins)))
    rows += [_row(turn, slot, "summary") for turn in proto.summaries]
    rows += [_row(turn, slot, "") for turn in proto.turns]
    if proto.recalled.text:
        rows.append(("-", "recalled", proto.tokens.recalled, output.start_of(proto.recalled.text)))
    if proto.HasField("new_message"):
        rows.append(("-", "new message", proto.tokens.new_message, output.start_of(message_text(proto.new_message))))
    output.table(("seq", "role", "tokens", "text"), rows, right=("seq", "tokens"))
    print()
    parts = [(name, getattr(proto.tokens, name)) for name in PARTS]
    told = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in parts if count)
    budget = (
        f"{proto.tokens.budget} with {proto.tokens.reserve} reserved" if proto.tokens.reserve else proto.tokens.budget
    )
    output.facts(
        [
            ("tokens", f"{proto.tokens.total} of {budget} in {_encoding(proto.encoding)}: {told}"),
            ("transcript", f"{proto.tokens.transcript} tokens in all"),
            *receipt_facts(proto),
        ]
    )


def receipt_facts(proto: context_pb2.ActiveContext) -> list[tuple[str, object]]:
    """The receipt, line by line."""
    receipt = proto.receipt
    facts: list[tuple[str, object]] = [
        ("strategy", output.enum_text(turn_pb2.Strategy, proto.strategy, "STRATEGY_")),
        ("rung", output.enum_text(context_pb2.Rung, receipt.rung, "RUNG_").upper()),
        ("ownership", output.enum_text(context_pb2.Ownership, receipt.ownership, "OWNERSHIP_").upper()),
        ("head", f"{receipt.head.epoch}:{receipt.head.seq}, in the cloud tier up to {receipt.cloud_seq}"),
        ("checkpoint", _checkpoint(proto)),
    ]
    for name in ("verbatim", "summarised", "recalled", "omitted"):
        ranges = getattr(receipt, name)
        if ranges:
            facts.append((name, ranges_text(ranges)))
    facts += [("missing", missing_text(lost)) for lost in receipt.missing]
    if receipt.stale:
        facts.append(("stale", "the caller knows a newer turn or checkpoint than this reply's"))
    if receipt.HasField("stable_prefix"):
        prefix = receipt.stable_prefix
        facts.append(("prefix", f"{prefix.tokens} tokens, {prefix.turns} turns, {prefix.digest.hex()}"))
    if receipt.notice:
        facts.append(("notice", receipt.notice))
    return facts


def ranges_text(ranges: Any) -> str:
    """Ranges of seqs, as 1-4, 7."""
    return ", ".join(
        str(item.first_seq) if item.first_seq == item.last_seq else f"{item.first_seq}-{item.last_seq}"
        for item in ranges
    )


def _checkpoint(proto: context_pb2.ActiveContext) -> str:
    if not proto.HasField("checkpoint"):
        return "-"
    header = proto.checkpoint
    return f"{header.version >> 32}:{header.version & 0xFFFFFFFF}, {header.exchanges} exchanges"


def _encoding(number: int) -> str:
    return output.enum_text(turn_pb2.Encoding, number, "ENCODING_")


def _row(turn: turn_pb2.Turn, slot: str, role: str) -> tuple[object, ...]:
    name = role or output.enum_text(turn_pb2.Role, turn.role, "ROLE_")
    text = turn.summary.text if turn.HasField("summary") else message_text(turn.message)
    return turn.seq, name, getattr(turn, slot).tokens, output.start_of(text)


def message_text(message: turn_pb2.Message) -> str:
    """A message in one line: texts, and what stands between them by name."""
    return " ".join(_part_text(part) for part in message.parts)


def _part_text(part: turn_pb2.Part) -> str:
    kind = part.WhichOneof("kind")
    if kind == "tool_call":
        return f"[call {part.tool_call.name}({part.tool_call.arguments})]"
    if kind == "tool_result":
        inner = " ".join(_part_text(piece) for piece in part.tool_result.parts)
        return f"[result of {part.tool_result.call_id}] {inner}"
    if kind == "attachment":
        return f"[attachment {part.attachment.uri}]"
    if kind == "opaque":
        return f"[{part.opaque.origin}]"
    return part.text or part.refusal
