"""`make run` does what it says: real kills, every rung, a picture and figures; and it fails with a remedy."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import sessiond
from sessiond.demo import __main__ as demo
from sessiond.demo import picture, show
from sessiond.demo.figures import (
    AFTER_DRAIN,
    AFTER_KILL,
    AFTER_LOSS,
    UNDER_LOAD,
    Figures,
    Growth,
    Latency,
    Promise,
    percentile,
)
from sessiond.testing import running_daemon

SVG = "{http://www.w3.org/2000/svg}"
RUN_S = 120


def environment() -> dict[str, str]:
    source = str(Path(sessiond.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sessiond.demo", *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=RUN_S, check=False,
    )  # fmt: skip


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def check(done: subprocess.CompletedProcess[str], out: Path) -> dict:
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((out / "figures.json").read_text())
    assert all(promise["kept"] for promise in figures["promises"])
    assert len(figures["promises"]) == 14
    for rung in ("HOT", "CLOUD", "PARTIAL"):
        measured = figures["rungs"][rung]
        assert measured["count"] >= 10
        assert 0 < measured["p50_ms"] <= measured["max_ms"]
    assert set(figures["first_contexts"]) == {AFTER_KILL, AFTER_DRAIN, AFTER_LOSS}
    assert figures["growth"]["largest_context_tokens"] <= figures["growth"]["budget_tokens"] == 4000
    svg = (out / "summary.svg").read_text()
    root = ElementTree.fromstring(svg)
    assert {group.get("id") for group in root.iter(f"{SVG}g")} == {"tokens", "latency"}
    shown = texts(svg)
    for label in ("turns so far", "tokens of one call", "milliseconds, logarithmic", "HOT", "CLOUD", "PARTIAL"):
        assert label in shown
    for what in ("summary.svg", "figures.json", "serve --data-dir", "resume"):
        assert what in done.stdout
    return figures


def test_the_sample_set_survives_every_step_and_the_next_command_works(tmp_path):
    done = run(tmp_path, "--quick")
    figures = check(done, tmp_path / "sessiond-demo")
    assert figures["conversations"] >= 21
    assert figures["imported_turns"] > 2000
    assert figures["kills"] == 1
    assert figures["growth"]["turns"] == 240
    assert figures["growth"]["share"] < 0.6
    session = re.search(r" resume (\S+) --budget (\d+)$", done.stdout, re.MULTILINE)
    data = re.search(r" serve --data-dir (\S+)$", done.stdout, re.MULTILINE)
    assert session
    assert data
    with running_daemon(tmp_path / data[1]) as daemon:
        resumed = subprocess.run(
            [sys.executable, "-m", "sessiond", "resume", session[1], "--budget", session[2], "--json"],
            env={**environment(), "SESSIOND_SERVER": daemon.address},
            capture_output=True, text=True, timeout=RUN_S, check=True,
        )  # fmt: skip
    context = json.loads(resumed.stdout)
    assert 2000 < context["tokens"]["total"] <= 4000
    assert context["receipt"]["missing"] == []


def test_files_that_are_named_are_used_and_a_second_run_clears_what_the_first_left(tmp_path):
    calls = [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
    files = {"two.jsonl": [], "one.jsonl": []}
    for number in range(3):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Where is parcel {number}?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c", "content": "on its way"},
            {"role": "assistant", "content": "On its way."},
        ]
        files["two.jsonl" if number else "one.jsonl"].append(
            json.dumps({"id": f"parcel-{number}", "messages": messages})
        )
    for name, lines in files.items():
        (tmp_path / name).write_text("\n".join(lines))
    with (tmp_path / "two.jsonl").open("a") as file:
        file.write('\n{"id": "broken"}\n')
    out = tmp_path / "results"
    for _ in range(2):
        done = run(tmp_path, "--quick", "--out", "results", "one.jsonl", "two.jsonl")
        figures = check(done, out)
        assert figures["files"] == ["one.jsonl", "two.jsonl"]
        assert figures["conversations"] == 3
        assert figures["imported_turns"] == 15
        assert figures["growth"]["turns"] == 15
        assert "two.jsonl:3" in done.stdout
    assert " resume parcel-" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "missing.jsonl"),
        (["empty.jsonl"], "no conversation"),
        (["-"], "Standard input"),
        (["--out", "mine"], "not the demonstration's"),
    ],
)
def test_what_can_not_be_shown_is_refused_with_a_remedy_and_nothing_is_touched(tmp_path, arguments, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "empty.jsonl").write_text("\n")
    done = run(tmp_path, "--quick", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Remedy: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_data_that_a_daemon_still_uses_is_left_alone(tmp_path):
    out = tmp_path / "sessiond-demo"
    out.mkdir()
    (out / show.MARK).touch()
    with running_daemon(out / show.DATA) as daemon:
        done = run(tmp_path, "--quick")
        assert done.returncode == 2
        assert f"Process {daemon.pid} still uses" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_half_way_it_leaves_no_process_behind(tmp_path, number):
    with subprocess.Popen(
        [sys.executable, "-m", "sessiond.demo", "--quick"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        pid = next(int(found[1]) for line in process.stdout if (found := re.search(r"process (\d+) on", line)))
        process.send_signal(number)
        _, errors = process.communicate(timeout=RUN_S)
    assert process.returncode == 130
    assert "no process is left behind" in errors
    assert not Path(f"/proc/{pid}").exists()


def some_figures() -> Figures:
    figures = Figures(Growth(4000, 2000, [(n, min(n * 50, 3500), n * 50) for n in range(1, 2000, 2)]))
    for name, base in (("HOT", 0.9), ("CLOUD", 2.0), ("PARTIAL", 2.5)):
        figures.rungs[name].samples_ms = [base * (1 + n / 50) for n in range(100)]
    figures.restarts[UNDER_LOAD] = Latency([400.0, 500.0])
    figures.first_contexts[AFTER_KILL] = Latency([600.0])
    figures.promises.append(Promise("the sun rises", False, "it is night"))
    figures.facts = {"seconds": 1.0, "longest_session": "a"}
    return figures


def test_a_promise_that_was_not_kept_is_named_and_fails_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "run", lambda *_: some_figures())
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "out")])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert demo.main() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().out
    assert "0 of 1 promises kept" in said
    assert "NOT KEPT: the sun rises (it is night)" in said


def test_the_title_states_the_measured_finding_and_labels_stay_inside():
    figures = some_figures()
    svg = picture.draw(figures)
    share = f"{100 * figures.growth.share:.1f} %"
    title = next(ElementTree.fromstring(svg).iter(f"{SVG}title")).text or ""
    assert (
        title == f"2,000 turns in a budget of 4,000 tokens a call: {share} of the input tokens of the full transcript"
    )
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        if element.get("transform"):
            continue
        # DejaVu Sans, the widest of the usual fonts, takes about this share of its size for a letter.
        letter = 0.56 * float(element.get("font-size", "14"))
        width = letter * len(element.text or "")
        start = (
            float(element.get("x", "0")) - {"start": 0, "middle": width / 2, "end": width}[element.get("text-anchor")]
        )
        assert start >= 0, element.text
        assert start + width <= picture.WIDTH + 10, element.text


@pytest.mark.parametrize("samples", [[], [5.0], [1.0, 2.0], list(range(1, 101))])
def test_latencies_are_told_as_they_were_measured(samples):
    latency = Latency([float(sample) for sample in samples])
    told = latency.as_json()
    assert told["count"] == len(samples)
    assert told["max_ms"] == max(samples, default=0)
    assert told["p95_ms"] == (95.0 if len(samples) == 100 else None)
    assert percentile(latency.samples_ms, 1.0) == told["max_ms"]


@pytest.mark.parametrize("points", [[(1, 40, 40)], [(1, 0, 0)], [(3, 90, 90), (5, 3900, 10**9)]])
def test_a_picture_can_be_drawn_of_little(points):
    figures = Figures(Growth(4000, points[-1][0], points))
    figures.rungs["HOT"].samples_ms = [0.1]
    assert ElementTree.fromstring(picture.draw(figures)).tag == f"{SVG}svg"
