"""Planted bugs that no seed of the table's run caught, and what is known of each: told in TEETH.md."""

from __future__ import annotations

_RARE = "no seed came to it, and no other test is known to catch it; the exhaustive model (tests/model) covers the rule"
_OPEN = "no seed came to it within the table's run; not looked into yet"

SURVIVORS: dict[str, str] = {
    "a doubt is settled by a read": "too rare for seeds; caught by tests/tiers/test_fences.py, and by the model",
    "a start believes its rows although it was fenced": "too rare for seeds; caught by tests/tiers/test_fences.py",
    "a rescue is applied over turns that are known": (
        "the log takes no turn_id twice, so that nothing is doubled, only listed; caught by tests/tiers/test_fences.py"
    ),
    "the lease is taken again before what was owned is doubted": (
        "too rare for seeds; caught by tests/tiers/test_fences.py, and by the model"
    ),
    "rows are dropped before the claim that replaces them is definite": "caught by tests/tiers/test_rescues.py",
    "dropped in Rescues.offer: `await self._own.take(call, h, session, user, drains=False)`": (
        "caught by tests/tiers/test_rescues.py"
    ),
    "ownership is confirmed without a look at the lease": "caught by seed 98 of an earlier state of the worlds",
    "a claim that was under way across a fence settles as owned": _RARE,
    "negated in Claims._settle: `tenure == self._tenure()`": (
        "a claim then settles as doubted and is settled by a write, which is safe; across a fence it is the bug above"
    ),
    "and for or in Ownership.standing: `self._parts.lease.is_valid() and tenure == self._parts.lease.tenure`": _RARE,
    "segments are deleted after a commit whose outcome is unknown": _OPEN,
    "a fence whose outcome is unknown counts": _OPEN,
    "a hint is trusted for ever": (
        "whoever is asked in vain says so, and the next attempt reads the manifest: slower only"
    ),
    "an old copy of the disk is taken for the newest": _OPEN,
}
