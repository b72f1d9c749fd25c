"""Eight faults in each of the ten stages of a run: it ends right, or says what failed and ends right the next time.

A small project of 240 scanned digits runs on real servers on loopback (PostgreSQL, Prefect, MLflow, a worker, a DVC
remote by SSH, a small disk of its own). For every fault and stage the project is set back before the stage, started,
and struck at a random moment of the stage: the worker with all that it has started, the flow, a server, or all of them
are killed (SIGKILL), SSH is cut off, the disk is filled to its last byte. A fault lasts until the run has ended, two
minutes at most. Then all is mended, the same command started again, and compared with an undisturbed run: MD5 of every
output and sha256 of every file but for what a clock has measured, `dvc status`, locks, processes and half-written files
left, names of all metrics in MLflow, and `vitprune audit`. Writes benchmarks/results/drill.json, docs/results/drill.md.
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
PATIENCE = 120  # seconds that a fault lasts at most
LEAST_LIMIT, SLACK = 420, 4  # a run hangs after so many seconds, or so many times what an undisturbed one takes


def main() -> None:
    """Strike every stage by every fault, note each, and write the tables."""
    extra = {"only": ("", "faults, with commas, of: " + ", ".join(FAULTS)), "stage": ("", "stages, with commas")}
    asked = arguments(__doc__, extra)
    toy_project.needed()
    wanted = [(fault, stage) for fault in faults.possible() for stage in STAGES]
    for place, words in enumerate((asked.only, asked.stage)):
        wanted = [cell for cell in wanted if not words or cell[place] in words.split(",")]
    notes = {} if asked.quick else noted()
    waiting = [cell for cell in (QUICK if asked.quick else wanted) if cell not in notes]
    if waiting:
        with tempfile.TemporaryDirectory(prefix="vitprune-drill-") as name, faults.site(Path(name)) as site:
            for cell in waiting:
                notes[cell] = struck(site, *cell)
                print(json.dumps(notes[cell]), flush=True)
                if not asked.quick:
                    with NOTES.open("a") as file:
                        file.write(json.dumps(notes[cell]) + "\n")
            left = site.running()
            print(f"runs that Prefect still takes for running: {left or 'none'}", flush=True)
    write(notes, asked.quick)


def noted() -> dict[tuple[str, str], dict[str, Any]]:
    """What earlier runs of this benchmark have found; what was wrong then is tried again."""
    lines = NOTES.read_text().splitlines() if NOTES.exists() else []
    rows = [row for row in map(json.loads, lines) if not row["wrong"]]
    return {(row["fault"], row["stage"]): row for row in rows}


def struck(site: Site, fault: str, stage: str) -> dict[str, Any]:
    """Strike a stage by a fault, mend it, start again; what the first run said and what is wrong after the second."""
    strike, toy = FAULTS[fault], site.toy
    how, limit = strike.launcher, max(LEAST_LIMIT, SLACK * sum(toy.seconds.values()))
    toy.set_back(stage)
    moment = random.Random(f"{fault}/{stage}").uniform(0.05, 0.95) * toy.seconds[stage]
    run, begun = how(site, stage), time.monotonic()
    reached = toy.wait_for_stage(stage, limit)
    time.sleep(moment)
    strike.break_it(site, run)
    mended_early = not run.wait(PATIENCE)
    strike.mend(site)
    hung = mended_early and not run.wait(limit)
    if hung:
        run.kill()
    first = run.outcome()
    again = how(site, stage)
    hung_again = not again.wait(limit)
    last = again.outcome()
    wrong = [] if reached else [f"{stage} was not reached"]
    wrong += ["the struck run hung"] * hung + ["the run after it hung"] * hung_again
    wrong += [f"no clear message: {first.said[-300:]}"] * (not (first.clear or run.was_killed))
    wrong += [] if last.code == 0 else [f"the run after it ended with {last.code}: {last.said[-300:]}"]
    if last.code == 0:
        wrong += site.recorded(again) + toy.wrong(again.branch)
    went = "went on" if first.code == 0 else "killed" if run.was_killed else "said"
    return {
        "fault": fault, "stage": stage, "moment": round(moment, 2), "went": went, "wrong": wrong,
        "said": first.line, "seconds": round(time.monotonic() - begun, 1), "outlived": mended_early,
    }  # fmt: skip


def write(notes: Mapping[tuple[str, str], Mapping[str, Any]], quick: bool) -> None:
    """Write the tables: what happened in every stage, and what was said."""
    rows, cells, words = [], [], []
    for fault in FAULTS:
        own = {stage: notes[fault, stage] for stage in STAGES if (fault, stage) in notes}
        if not own:
            continue
        right = sum(not note["wrong"] for note in own.values())
        rows.append(Row(fault, right, "of the stages end right", f"{len(own)}", right == len(own), len(own)))
        cells.append([fault, *(mark(own.get(stage)) for stage in STAGES)])
        said = dict.fromkeys(shown(note["said"]) for note in own.values() if note["went"] == "said")
        words += [[fault, f"`{line}`"] for line in list(said)[:3]]
    if not quick:
        sections = [
            Section("What happened", LEGEND, ["fault", *STAGES], cells),
            Section("What runs said that ended by themselves", "Up to three of each.", ["fault", "last line"], words),
        ]
        write_sections(ROOT / "docs/results/drill.md", "A fault drill", __doc__ or "", sections)
    write_results("drill", rows, quick)


def shown(line: str) -> str:
    """A line without what is another one in every run: the drill's folder, a worktree's name, ports."""
    line = re.sub(r"/\S*/vitprune-drill-\w+/disk/project", "PROJECT", line)
    line = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "RUN", line)
    return re.sub(r"(\('127\.0\.0\.1', )\d+", r"\1PORT", line).replace("|", "\\|")


LEGEND = """*went on*: the struck run itself ended right. *said*: it ended with one clear line. *killed*: it could say
nothing any more. In all three cases the run after it ended right and nothing was lost; where not, it is BROKEN."""


def mark(note: Mapping[str, Any] | None) -> str:
    """A cell of the table."""
    if note is None:
        return "not tried"
    return f"BROKEN: {note['wrong'][0]}".replace("|", "\\|") if note["wrong"] else str(note["went"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
