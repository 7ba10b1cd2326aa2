"""python -m tests.model [--turns EC] [--lapses 1] ... [--break RULE]: explore one model, and tell what was found."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from tests.model.explorer import Broken, Outcome, explore
from tests.model.protocol import NAMES, SWITCHES, Bounds, Manifest, Node, Rules, Sessions, State


def _turns(turns: Any) -> str:
    return "[" + " ".join(f"t{turn + 1}" for turn in turns) + "]"


def _said(value: Any) -> str:
    """The object of an action: a turn, several, an epoch, a manifest or a kind of write."""
    if isinstance(value, Manifest):
        return _manifest(value)
    return _turns(value) if isinstance(value, tuple) else str(value)


def _who(incarnation: int) -> str:
    return NAMES[incarnation & 1] + (f"'{incarnation >> 1}" if incarnation >> 1 else "")


def _manifest(manifest: Manifest | None) -> str:
    if manifest is None:
        return "no manifest"
    owner = _who(manifest.incarnation) if manifest.is_owned else "nobody"
    said = f"epoch {manifest.epoch} of {owner}, log {_turns(manifest.log)}"
    if manifest.loss:
        said += f", loss in {list(manifest.loss)}"
    return said + (f", {len(manifest.orphans)} orphans" if manifest.orphans else "")


def _node(me: int, node: Node) -> str:
    lease = "valid" if node.lease_valid else "lapsed"
    said = f"{NAMES[me]}: {'up' if node.is_up else 'down'}, lease {lease}{', fenced' if node.lease_fenced else ''}"
    if node.row is not None:
        said += f", {node.row.phase} epoch {node.row.epoch} {_turns(node.row.log)} cloud_seq {node.row.cloud_seq}"
    return said + (f", {node.put.kind} {node.put.status}" if node.put else "")


def told(outcome: Outcome) -> str:
    """What an exploration found, with the shortest way to it."""
    lines = [f"{outcome.states} states, {outcome.steps} steps, depth {outcome.depth}"]
    if outcome.broken is None:
        return lines[0] + (": every invariant holds in all of them" if outcome.is_whole else "")
    lines.append(f"{outcome.broken.invariant} is broken: {outcome.broken.what}")
    for number, (action, _) in enumerate(outcome.trace):
        what, *others = action
        if not others:
            continue
        me, *objects = others
        is_node = what.startswith("fences")
        objects = [NAMES[objects[0]]] if is_node else [_said(each) for each in objects]
        if "turn" in what or "EDGE" in what or "CLOUD" in what or what.startswith(("append", "commits", "finds no")):
            objects = [f"t{int(each) + 1}" if each.isdigit() else each for each in objects]
        lines.append(f"{number:3}  {NAMES[me]} {what} {' '.join(objects)}".rstrip())
    ends = [state for _, state in outcome.trace if not isinstance(state, Broken)]
    if ends and isinstance(ends[-1], State):
        state = ends[-1]
        lines.append(f"     {_manifest(state.manifest)}")
        lines += [f"     {_node(me, node)}" for me, node in enumerate(state.nodes)]
    return "\n".join(lines)


def main() -> int:
    """Explore; the exit code says whether every invariant held."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--turns", default="EC", help="one letter each: E for EDGE, C for CLOUD")
    parser.add_argument("--zombies", default="AB", help="the nodes whose lease may lapse")
    for name in ("lapses", "crashes", "disks", "timeouts", "releases"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--break", dest="broken", action="append", default=[], choices=SWITCHES, metavar="RULE")
    parser.add_argument("--states-max", type=int, default=20_000_000)
    asked = vars(parser.parse_args())
    rules = Rules(**dict.fromkeys(asked.pop("broken"), True))
    states_max = asked.pop("states_max")
    started = time.monotonic()

    def progress(depth: int, states: int) -> None:
        print(f"\rdepth {depth}, {states} states", end="", file=sys.stderr, flush=True)

    outcome = explore(Sessions(Bounds(**asked), rules), states_max, "I15", progress)
    print(file=sys.stderr)
    print(told(outcome))
    print(f"{time.monotonic() - started:.1f} s")
    return outcome.broken is not None


if __name__ == "__main__":
    sys.exit(main())
