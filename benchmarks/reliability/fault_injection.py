"""Eight faults in each of the ten stages: a run succeeds, or it reports the failure and the next run succeeds.

A small project with 240 scanned digits runs on real servers on loopback (PostgreSQL, Prefect, MLflow, a worker, a DVC
remote over SSH, a small disk). For every fault and stage, the project is reset to the state before the stage and
started, and the fault is injected at a random moment of the stage: the worker with all its child processes, the flow,
a server, or all of them are killed (SIGKILL), SSH is disconnected, or the disk is filled. A fault lasts until the run
has ended, at most two minutes. Then it is repaired, the same command runs again, and the result is compared with an
undisturbed run: MD5 of every output and sha256 of every file except measured times, `dvc status`, leftover locks,
processes and partial files, names of all metrics in MLflow, and `vitprune audit`. Writes benchmarks/results/drill.json
and docs/results/drill.md.
"""

import json
import os
import random
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.lib import faults, toy_project
from benchmarks.lib.faults import FAULTS, Site
from benchmarks.lib.results import RESULTS, Row, Section, arguments, write_results, write_sections
from benchmarks.lib.toy_project import ROOT, STAGES

NOTES = RESULTS / "drill-notes.jsonl"
QUICK = (("flow killed", "prune"), ("MLflow killed", "evaluate"))
FAULT_SECONDS = 120  # longest duration of a fault
MIN_LIMIT, LIMIT_FACTOR = 420, 4  # a run hangs after these seconds, or this multiple of an undisturbed run


def main() -> None:
    """Inject every fault into every stage, record each result, and write the tables."""
    extra = {"only": ("", "comma-separated faults of: " + ", ".join(FAULTS)), "stage": ("", "comma-separated stages")}
    options = arguments(__doc__, extra)
    toy_project.require_servers()
    cases = [(fault, stage) for fault in faults.possible() for stage in STAGES]
    for index, names in enumerate((options.only, options.stage)):
        cases = [case for case in cases if not names or case[index] in names.split(",")]
    notes = {} if options.quick else recorded_results()
    remaining = [case for case in (QUICK if options.quick else cases) if case not in notes]
    if remaining:
        with tempfile.TemporaryDirectory(prefix="vitprune-drill-") as name, faults.site(Path(name)) as site:
            for case in remaining:
                notes[case] = inject(site, *case)
                print(json.dumps(notes[case]), flush=True)
                if not options.quick:
                    with NOTES.open("a") as file:
                        file.write(json.dumps(notes[case]) + "\n")
            running = site.running()
            print(f"runs that Prefect still reports as running: {running or 'none'}", flush=True)
    write(notes, options.quick)


def recorded_results() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the recorded results of earlier runs, without the failed cases, which are repeated."""
    lines = NOTES.read_text().splitlines() if NOTES.exists() else []
    rows = [row for row in map(json.loads, lines) if not row["errors"]]
    return {(row["fault"], row["stage"]): row for row in rows}


def inject(site: Site, fault: str, stage: str) -> dict[str, Any]:
    """Inject a fault, repair it, run again; return the message of the first run and the errors of the second."""
    spec, toy = FAULTS[fault], site.toy
    launch, limit = spec.launcher, max(MIN_LIMIT, LIMIT_FACTOR * sum(toy.seconds.values()))
    toy.reset_to(stage)
    moment = random.Random(f"{fault}/{stage}").uniform(0.05, 0.95) * toy.seconds[stage]
    run, start = launch(site, stage), time.monotonic()
    reached = toy.wait_for_stage(stage, limit)
    time.sleep(moment)
    spec.inject(site, run)
    repaired_early = not run.wait(FAULT_SECONDS)
    spec.repair(site)
    hung = repaired_early and not run.wait(limit)
    if hung:
        run.kill()
    first = run.outcome()
    second = launch(site, stage)
    second_hung = not second.wait(limit)
    last = second.outcome()
    errors = [] if reached else [f"{stage} was not reached"]
    errors += ["the first run hung"] * hung + ["the second run hung"] * second_hung
    errors += [f"no clear message: {first.output[-300:]}"] * (not (first.clear or run.was_killed))
    errors += [] if last.code == 0 else [f"the second run failed with {last.code}: {last.output[-300:]}"]
    if last.code == 0:
        errors += site.recorded(second) + toy.differences(second.branch)
    result = "continued" if first.code == 0 else "killed" if run.was_killed else "reported"
    return {
        "fault": fault, "stage": stage, "moment": round(moment, 2), "result": result, "errors": errors,
        "message": first.line, "seconds": round(time.monotonic() - start, 1), "repaired_early": repaired_early,
    }  # fmt: skip


def write(notes: Mapping[tuple[str, str], Mapping[str, Any]], quick: bool) -> None:
    """Write the tables: the result in every stage, and the messages."""
    rows, cells, messages = [], [], []
    for fault in FAULTS:
        of_fault = {stage: notes[fault, stage] for stage in STAGES if (fault, stage) in notes}
        if not of_fault:
            continue
        passed = sum(not note["errors"] for note in of_fault.values())
        rows.append(
            Row(fault, passed, "of the stages recovered", f"{len(of_fault)}", passed == len(of_fault), len(of_fault))
        )
        cells.append([fault, *(mark(of_fault.get(stage)) for stage in STAGES)])
        lines = dict.fromkeys(normalized(note["message"]) for note in of_fault.values() if note["result"] == "reported")
        messages += [[fault, f"`{line}`"] for line in list(lines)[:3]]
    if not quick:
        sections = [
            Section("Results", LEGEND, ["fault", *STAGES], cells),
            Section("Messages of failed runs", "At most three per fault.", ["fault", "last line"], messages),
        ]
        write_sections(ROOT / "docs/results/drill.md", "Fault injection", __doc__ or "", sections)
    write_results("drill", rows, quick)


def normalized(line: str) -> str:
    """Replace what differs in every run: directory, worktree name, ports."""
    line = re.sub(r"/\S*/vitprune-drill-\w+/disk/project", "PROJECT", line)
    line = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "RUN", line)
    return re.sub(r"(\('127\.0\.0\.1', )\d+", r"\1PORT", line).replace("|", "\\|")


LEGEND = """*continued*: the first run succeeded. *reported*: it failed with a one-line message. *killed*: it was killed
without a message. In all three cases the second run succeeded and gave identical results; otherwise FAILED."""


def mark(note: Mapping[str, Any] | None) -> str:
    """Return a cell of the table."""
    if note is None:
        return "not run"
    return f"FAILED: {note['errors'][0]}".replace("|", "\\|") if note["errors"] else str(note["result"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
