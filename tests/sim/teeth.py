"""Plants bugs into the daemon, in memory, and says which seed catches each, and by which invariant.

`python -m tests.sim.teeth` runs all of them and writes TEETH.md; `--only NAME` runs one. A plant is a function of the
daemon whose source is changed in one place: by hand, where somebody thought of the mistake, or by a rule, where nobody
did. What no seed catches is tried against the stories of this simulation and the tests of the tiers, each with the bug
planted. A plant whose place is not there any more is an error: the list is kept in step with the code.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import inspect
import json
import os
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.sim import schedule
from tests.sim.world import run_seed

TABLE = Path(__file__).with_name("TEETH.md")
CAUGHT = Path(__file__).with_name("teeth.json")
# What is tried once no seed has caught a plant; all of them work within the process.
TESTS = [
    "tests/sim/test_stories.py",
    "tests/service/test_hotpath.py",
    *(f"tests/tiers/test_{name}.py" for name in ("fences", "rescues", "takeovers", "claims", "commits", "lease")),
]
# Seeds after which a plant counts as caught by none of them.
SEEDS_MAX = 400
# A plant that makes the daemon spin is caught, too.
SEED_S_MAX = 30
STEPS_MAX = 300_000
# So many of the places that rules could change are drawn.
MECHANICAL = 24


@dataclass(frozen=True)
class Place:
    """One function of the daemon: `module:Class.function`, or `module:function`."""

    name: str

    def found(self) -> tuple[Any, Any, str, Any]:
        """(module, what holds it, its name there, it)."""
        path, _, rest = self.name.partition(":")
        module = importlib.import_module(path)
        holder: Any = module
        *outer, last = rest.split(".")
        for part in outer:
            holder = getattr(holder, part)
        return module, holder, last, inspect.getattr_static(holder, last)

    def source(self) -> str:
        return textwrap.dedent(inspect.getsource(self.found()[3]))


@dataclass(frozen=True)
class Plant:
    """A bug: in the function at `place`, `old` becomes `new` (each a piece of source that stands there once)."""

    name: str
    place: Place
    old: str
    new: str
    extra: Callable[[Any], dict[str, Any]] = lambda module: {}

    @contextmanager
    def planted(self) -> Iterator[None]:
        source = self.place.source()
        if source.count(self.old) != 1:
            raise LookupError(f"{self.name}: {self.old!r} stands {source.count(self.old)} times in {self.place.name}")
        with changed(self.place, source.replace(self.old, self.new), self.extra):
            yield


@contextmanager
def changed(place: Place, source: str, extra: Callable[[Any], dict[str, Any]] = lambda module: {}) -> Iterator[None]:
    """The daemon with another source of one function: the function itself is changed, for whoever has imported it, and
    sees the module's names as they are at each call, for worlds set some of them.
    """
    module, _, name, found = place.found()
    function = found.__func__ if isinstance(found, staticmethod | classmethod) else found
    made: dict[str, Any] = {}
    exec(compile(f"from __future__ import annotations\n{source}", f"<planted in {place.name}>", "exec"), {}, made)
    more, before = extra(module), function.__code__
    vars(module).update(more)
    function.__code__ = made[name].__code__
    try:
        yield
    finally:
        function.__code__ = before
        for key in more:
            delattr(module, key)


def early(module: Any) -> dict[str, Any]:
    """What answers an append before its commit."""

    async def answered_early(hot: Any, operation: Any, weight_bytes: int) -> Any:
        with hot._env.begin(write=True) as raw:
            try:
                done = operation(type_of(hot)(raw, hot._tables))
            finally:
                raw.abort()
        module.asyncio.ensure_future(hot.run(operation, weight_bytes))
        return done

    return {"answered_early": answered_early}


def type_of(hot: Any) -> Any:
    return importlib.import_module("sessiond.tiers.hot.environment").Transaction


def stale_ids(module: Any) -> dict[str, Any]:
    """Turn ids as they were before the newest transaction of the session."""
    seen: dict[bytes, bytes] = {}

    def ids_before(transaction: Any, h: bytes, head_seq: int) -> bytes:
        before, seen[h] = seen.get(h, b""), module.turn_ids(transaction, h, head_seq)
        return before

    return {"ids_before": ids_before}


FLUSH = "sessiond.tiers.flush:Flusher."
CLAIMS = "sessiond.tiers.hydrate:Claims."
OWN = "sessiond.service.ownership:Ownership."
SESSIONS = "sessiond.service.sessions:Sessions."
HOT = "sessiond.service.hotpath:HotPath."
RESCUE = "sessiond.service.rescue:"
ROUTER = "sessiond.service.router:Router."
LEASE = "sessiond.tiers.cloud.lease:Lease."
PEERS = "sessiond.tiers.peers:Peers."

BY_HAND = [
    Plant(
        "no fence check: manifests are written whatever stands there",
        Place("sessiond.tiers.hydrate:put_settled"),
        "store.put(name, body, if_absent=etag is None, if_match=etag)",
        "store.put(name, body)",
    ),
    Plant(
        "acknowledged before the commit",
        Place(SESSIONS + "_append"),
        "outcome = await self._hot.run(operation, weight_bytes)",
        "outcome = await answered_early(self._hot, operation, weight_bytes)",
        early,
    ),
    Plant(
        "turn_ids are looked up outside the transaction",
        Place("sessiond.tiers.hot.log:append"),
        "known = core.seek_turn_ids(entries, asked)",
        "known = core.seek_turn_ids(ids_before(transaction, h, head.head_seq), asked)",
        stale_ids,
    ),
    Plant(
        "the hot path acknowledges before the commit",
        Place(HOT + "append"),
        "done = await self._hot.run(ready.operation, ready.weight_bytes)",
        "done = await answered_early(self._hot, ready.operation, ready.weight_bytes)",
        early,
    ),
    Plant(
        "the hot path serves whatever rows it finds",
        Place(HOT + "_is_served"),
        "if head.phase != PHASE_OWNED or (user_id and user_id != head.user):",
        "if user_id and user_id != head.user:",
    ),
    Plant(
        "the hot path confirms without a look at the lease",
        Place(HOT + "_ownership"),
        "if self._lease.is_valid() and self._lease.tenure == tenure:",
        "if True:",
    ),
    Plant(
        "segments are deleted after a commit whose outcome is unknown",
        Place(FLUSH + "_flush"),
        "    except Conflict as lost:\n",
        "    except Unavailable:\n"
        "        for row in sealed:\n"
        "            self._store.delete(row_key(cut.base, row))\n"
        "        raise\n"
        "    except Conflict as lost:\n",
    ),
    Plant(
        "what a merge replaced is deleted before the epoch is checked",
        Place(FLUSH + "_merge"),
        "    self.merges += 1\n",
        "    self.merges += 1\n    for name, _ in gone:\n        self._store.delete(name)\n",
    ),
    Plant(
        "a cold read is served as HOT",
        Place(SESSIONS + "_resume_cold"),
        "rung=context_pb2.RUNG_CLOUD,",
        "rung=context_pb2.RUNG_HOT,",
    ),
    Plant(
        "a release does not keep appends out",
        Place(FLUSH + "flush"),
        "before = self._move(h, PHASE_OWNED, PHASE_RELEASING, unused_since_ms)",
        "before = PHASE_OWNED",
    ),
    Plant(
        "a node is called gone without a fence",
        Place(PEERS + "_look"),
        "state = self._fence(key, holder, etag, owner)",
        "state = GONE",
    ),
    Plant(
        "a fence whose outcome is unknown counts",
        Place(PEERS + "_fence"),
        "return SILENT",
        "return GONE",
    ),
    Plant(
        "a lease need not stand still for a session to be taken",
        Place(OWN + "succession"),
        "if verdict.state != GONE or not self._parts.lease.is_valid():",
        "if False:",
    ),
    Plant(
        "a doubt is settled by a read",
        Place(FLUSH + "_settled"),
        "etag = put_settled(self._store, h, manifest, cold.etag, self._wait)",
        "manifest, etag = cold.manifest, cold.etag",
    ),
    Plant(
        "the loss row of a steal is forgotten",
        Place(OWN + "succession"),
        "return Succession([manifest.epoch, manifest.head, REASON_LOST, 0], True)",
        "return Succession(None, True)",
    ),
    Plant(
        "ownership is confirmed without a look at the lease",
        Place(OWN + "standing"),
        "if self._parts.lease.is_valid() and tenure == self._parts.lease.tenure:",
        "if True:",
    ),
    Plant(
        "an orphan is dropped instead of offered",
        Place(RESCUE + "Rescues.offer"),
        "if orphan is None and head.head_seq > head.cloud_seq:",
        "if await self._drop(h, head) is None:",
    ),
    Plant(
        "a rescue is applied over turns that are known",
        Place(RESCUE + "_is_known"),
        "return found is not None",
        "return False",
    ),
    Plant(
        "a rescue that could not be applied is not listed",
        Place(RESCUE + "Rescues._note"),
        "manifest.orphans = [*others, row] if outcome == LISTED else others",
        "manifest.orphans = others",
    ),
    Plant(
        "a forwarded call is forwarded again",
        Place("sessiond.transport.server:Server._forward"),
        "answer = reply(await work(call, request))",
        "call = Call(forwarded.tenant, self._deadline_ms(context))\n"
        "        answer = await self._router.call(name, call, request, forwarded.request, _replied(work))",
    ),
    Plant(
        "a hint is trusted for ever",
        Place(ROUTER + "_forward"),
        "if response.not_owner:\n        self._hints.pop(h, None)",
        "if response.not_owner and self._hints.get(h) == owner:\n"
        "        raise Unavailable('NOT_OWNER', 'It is the owner, whatever it says.')\n"
        "    if response.not_owner:\n        pass",
    ),
    Plant(
        "the lease is taken again before what was owned is doubted",
        Place(LEASE + "_take_again"),
        "self._on_fenced()",
        "pass",
    ),
    Plant(
        "a start believes its rows although it was fenced",
        Place("sessiond.daemon:take_node"),
        "if not ours or fenced:",
        "if not ours:",
    ),
    Plant(
        "an old copy of the disk is taken for the newest",
        Place("sessiond.daemon:take_node"),
        'int(holder.get("txn", 0)) > opened_at',
        "False",
    ),
    Plant(
        "a claim that was under way across a fence settles as owned",
        Place(CLAIMS + "_settle"),
        "if tenure == self._tenure():",
        "if True:",
    ),
    Plant(
        "CLOUD is acknowledged although the outcome is unknown",
        Place(SESSIONS + "_reach"),
        "        except SessiondError as error:\n            detail = error.message\n",
        "        except SessiondError as error:\n"
        "            if error.reason == 'COMMIT_UNKNOWN':\n"
        "                return\n"
        "            detail = error.message\n",
    ),
    Plant(
        "an ambiguous write counts as committed",
        Place("sessiond.tiers.hydrate:put_settled"),
        "        except Ambiguous as error:\n            ambiguous = error\n",
        "        except Ambiguous as error:\n            return 'unknown'\n            ambiguous = error\n",
    ),
    Plant(
        "a steal keeps the epoch",
        Place(CLAIMS + "claim"),
        "h, epoch = old.h, old.epoch + 1",
        "h, epoch = old.h, old.epoch",
    ),
    Plant(
        "`expected` is not looked at",
        Place("sessiond.tiers.hot.log:append"),
        "if expected is not None and",
        "if False and",
    ),
    Plant(
        "rows are dropped before the claim that replaces them is definite",
        Place(CLAIMS + "claim"),
        'transaction.put("heads", h, encode_head(h, intent))',
        'log.drop_rows(transaction, h)\n        transaction.put("heads", h, encode_head(h, intent))',
    ),
]

# Where rules look for places: what decides who owns, what is committed, and what is told.
FUNCTIONS = [
    CLAIMS + "claim",
    CLAIMS + "create",
    CLAIMS + "_settle",
    CLAIMS + "put_orphan",
    "sessiond.tiers.hydrate:put_settled",
    "sessiond.tiers.hydrate:is_write",
    FLUSH + "flush",
    FLUSH + "_delete",
    FLUSH + "_settle",
    FLUSH + "_settled",
    FLUSH + "_catch_up",
    FLUSH + "_is_ours",
    FLUSH + "_look",
    FLUSH + "_fence",
    FLUSH + "_give_up",
    PEERS + "_look",
    LEASE + "renew",
    LEASE + "_take_again",
    LEASE + "is_valid",
    OWN + "succession",
    OWN + "take",
    OWN + "cold",
    OWN + "standing",
    RESCUE + "Rescues.offer",
    RESCUE + "Rescues.apply",
    RESCUE + "Rescues._note",
    ROUTER + "call",
    ROUTER + "_forward",
    SESSIONS + "_append",
    SESSIONS + "_reach",
    SESSIONS + "_judge",
    SESSIONS + "_mark_deleted",
    HOT + "resume",
    HOT + "prepare",
    HOT + "finish",
    "sessiond.tiers.hot.log:append",
    "sessiond.tiers.hot.log:check_writable",
    "sessiond.tiers.hot.log:doubt_owned",
]

NEGATED = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
EDGES = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Mutation:
    """A bug by a rule: the change number `index` of a function. what: the line before and after."""

    name: str
    place: Place
    source: str

    @contextmanager
    def planted(self) -> Iterator[None]:
        with changed(self.place, self.source):
            yield


def mutations(place: Place) -> Iterator[Mutation]:
    """Every change that the rules know of one function."""
    original = ast.parse(place.source())
    for index, node in enumerate(ast.walk(original)):
        for rule, change in changes_of(node):
            tree = copy.deepcopy(original)
            target = next(found for at, found in enumerate(ast.walk(tree)) if at == index)
            before = ast.unparse(node).splitlines()[0]
            change(target, tree)
            after = ast.unparse(ast.fix_missing_locations(tree))
            function = place.name.partition(":")[2]
            yield Mutation(f"{rule} in {function}: `{before[:90]}`", place, after)


def changes_of(node: ast.AST) -> Iterator[tuple[str, Callable[[Any, Any], None]]]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        kind = type(node.ops[0])
        if kind in NEGATED:

            def negate(target: Any, tree: Any) -> None:
                target.ops[0] = NEGATED[type(target.ops[0])]()

            yield "negated", negate
        if kind in EDGES:

            def shift(target: Any, tree: Any) -> None:
                target.ops[0] = EDGES[type(target.ops[0])]()

            yield "off by one", shift
    if isinstance(node, ast.BoolOp):

        def swap(target: Any, tree: Any) -> None:
            target.op = ast.And() if isinstance(target.op, ast.Or) else ast.Or()

        yield "and for or", swap
    if isinstance(node, ast.Constant) and type(node.value) is int:

        def add(target: Any, tree: Any) -> None:
            target.value += 1

        yield "one more", add
    if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant | ast.Yield):

        def drop(target: Any, tree: Any) -> None:
            target.value = ast.Constant(None)

        yield "dropped", drop
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):

        def forget(target: Any, tree: Any) -> None:
            target.targets = [ast.Name("_", ast.Store())]

        yield "not set", forget


def by_rule() -> list[Mutation]:
    """The mutations that are drawn: by their names, so that a change of one function leaves the others as they were."""
    found: dict[str, Mutation] = {}
    for name in FUNCTIONS:
        try:
            found |= {mutation.name: mutation for mutation in mutations(Place(name))}
        except AttributeError:
            continue  # it has another name by now; test_teeth.py counts
    drawn: list[Mutation] = []
    taken: Counter[str] = Counter()
    for mutation in sorted(found.values(), key=lambda mutation: hashlib.sha256(mutation.name.encode()).digest()):
        # At most two of one function.
        if taken[mutation.place.name] < 2:
            taken[mutation.place.name] += 1
            drawn.append(mutation)
    return drawn[:MECHANICAL]


@dataclass(frozen=True)
class Verdict:
    """What became of a plant. seed, or else test: what caught it, both None for a survivor. by: the invariant that was
    seen broken. seeds: how many were run.
    """

    name: str
    seed: int | None
    by: str
    what: str
    seeds: int
    test: str | None = None

    @property
    def is_caught(self) -> bool:
        """Whether anything did."""
        return self.seed is not None or self.test is not None

    @property
    def told(self) -> str:
        """For whoever waits."""
        if self.seed is not None:
            return f"seed {self.seed} {self.by}: {self.what}"
        return f"{self.test}: {self.what}" if self.test is not None else "SURVIVED"


class TooLong(BaseException):
    """A seed took too long under a plant."""


def hunt(plant: Plant | Mutation, seeds: Iterator[int] | range) -> Verdict:
    """Run seeds until one of them catches the plant."""

    def ring(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    count = 0
    try:
        with plant.planted(), mock.patch.object(schedule, "STEPS_MAX", STEPS_MAX):
            for seed in seeds:
                count += 1
                signal.setitimer(signal.ITIMER_REAL, SEED_S_MAX)
                try:
                    result = run_seed(seed)
                except TooLong:
                    return Verdict(plant.name, seed, "HANG", "the world stands still", count)
                except Exception as error:
                    return Verdict(plant.name, seed, "ERROR", f"{type(error).__name__}: {error}"[:160], count)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                if result.violations:
                    by, what = result.violations[0]
                    return Verdict(plant.name, seed, by, what[:160], count)
    finally:
        signal.signal(signal.SIGALRM, before)
    return Verdict(plant.name, None, "", "", count)


class _Catcher:
    """A pytest plugin: remembers the first test that fails."""

    def __init__(self) -> None:
        self.test: str | None = None
        self.what = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.test is None:
            self.test = report.nodeid
            crash = getattr(report.longrepr, "reprcrash", None)
            self.what = " ".join(str(crash.message if crash is not None else report.longrepr).split())


def caught_by_test(plant: Plant | Mutation) -> tuple[str | None, str]:
    """The first of the named tests that fails under a plant, and what it says."""
    catcher = _Catcher()
    with plant.planted():
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *TESTS], plugins=[catcher])
    return catcher.test, catcher.what[:160]


def known() -> dict[str, Verdict]:
    """What became of each plant when the table was written, by its name."""
    rows = json.loads(CAUGHT.read_text()) if CAUGHT.exists() else []
    return {row["name"]: Verdict(**row) for row in rows}


def known_seeds() -> dict[str, int]:
    """The seed that caught each plant when the table was written, of those that seeds catch."""
    return {name: verdict.seed for name, verdict in known().items() if verdict.seed is not None}


def plants() -> list[Plant | Mutation]:
    """All of them, those by hand first."""
    return [*BY_HAND, *by_rule()]


def judge(name: str, seeds: int) -> Verdict:
    """What catches the plant of this name."""
    plant = next(plant for plant in plants() if plant.name == name)
    first = known_seeds().get(name)
    verdict = hunt(plant, iter([*([first] if first is not None else []), *range(seeds)]))
    if verdict.seed is not None:
        return verdict
    sys.stdout.flush()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        test, what = caught_by_test(plant)
    return replace(verdict, test=test, what=what)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.teeth", description=__doc__)
    parser.add_argument("--only", help="run the plants whose name has this in it, and write no table")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--again", action="store_true", help="run those that nothing caught, or that are new")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    every = [plant.name for plant in plants()]
    names = [name for name in every if arguments.only is None or arguments.only in name]
    verdicts: dict[str, Verdict] = {}
    if arguments.again:
        verdicts = {name: verdict for name, verdict in known().items() if name in every and verdict.is_caught}
        names = [name for name in names if name not in verdicts]
    if arguments.list:
        print("\n".join(names))
        return 0
    # A process for each: whatever a planted bug leaves behind is gone with it.
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(judge, name, arguments.seeds): name for name in names}
        for done in as_completed(running):
            verdict = verdicts[running[done]] = done.result()
            print(f"{verdict.name}: {verdict.told} ({verdict.seeds} seeds)", flush=True)
    if arguments.only is None:
        write([verdicts[name] for name in every], len(BY_HAND))
    return sum(not verdict.is_caught for verdict in verdicts.values())


def write(verdicts: list[Verdict], by_hand: int) -> None:
    """The table, and beside it the same for the tests and for the next run."""
    from tests.sim.survivors import SURVIVORS

    by_seed = [verdict for verdict in verdicts if verdict.seed is not None]
    by_test = [verdict for verdict in verdicts if verdict.seed is None and verdict.test is not None]
    lines = [
        "# Planted bugs, and what catches them",
        "",
        "Written by `python -m tests.sim.teeth`; do not edit. Each bug is planted alone; seeds run until one breaks.",
        f"What none of {max(verdict.seeds for verdict in verdicts)} seeds catches is tried against the stories of the"
        " simulation and the tests of the service and the tiers.",
        f"Of {len(verdicts)} bugs {len(by_seed)} are caught by a seed, {len(by_test)} by a named story or test, and"
        f" {len(verdicts) - len(by_seed) - len(by_test)} survive.",
    ]
    for title, part in (("By hand", verdicts[:by_hand]), ("By rule", verdicts[by_hand:])):
        lines += ["", f"## {title}", "", "| bug | caught by | invariant | what it said |", "|---|---|---|---|"]
        for verdict in part:
            if verdict.seed is not None:
                caught = f"seed {verdict.seed}"
            elif verdict.test is not None:
                caught = f"`{verdict.test.replace('::', '`, `')}`"
            else:
                why = SURVIVORS.get(verdict.name, "not explained yet")
                lines.append(f"| {cell(verdict.name)} | survives {verdict.seeds} seeds | | {cell(why)} |")
                continue
            lines.append(f"| {cell(verdict.name)} | {caught} | {verdict.by} | {cell(verdict.what)} |")
    TABLE.write_text("\n".join(lines) + "\n")
    CAUGHT.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
