"""Four flows at once on one machine, and what orchestration costs: Prefect, DVC and MLflow against plain commands.

Servers (PostgreSQL, Prefect, MLflow) run on servers. Four runs of different seeds and sparsities start at the same
moment, each in a git worktree of its own, with one DVC cache and one MLflow; each has to end right, to leave a clean
`dvc status` and to be audited PASS, and the project that they were made of has to stay as it was. Then one project is
run twice from nothing on the same machine: the ten command lines of dvc.yaml one after the other, with neither DVC nor
a flow, and by `vitprune run`; training is as long as asked for (`--minutes`), and the two leave the same bits. A third
run, which finds all in the cache, says what the machinery costs by itself. CPU seconds are those of all processes of
the run but the servers'. Both parts are noted in benchmarks/results/fleet-notes.json and not measured again, unless
a flow was wrong: delete it to begin anew. Writes benchmarks/results/fleet.json and docs/results/fleet.md.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib import toy_project
from benchmarks.lib.results import RESULTS, Row, Section, arguments, write_results, write_sections
from benchmarks.lib.toy_project import ROOT, STAGES, servers, tamper_worker, tiny_project
from vitprune.orchestration.execution import worktrees
from vitprune.orchestration.execution.processes import process_environment

NOTES = RESULTS / "fleet-notes.json"
LARGEST_RATIO = 1.10
OTHERS = ({"sparsity": 0.5}, {"sparsity": 0.4}, {"cycles": 1}, {"method": "magnitude", "sparsity": 0.5})
PILOT = 4  # epochs, which take long enough to say what one takes


@dataclass(frozen=True)
class Spent:
    """Seconds of a clock and of the processors."""

    wall: float
    cpu: float


def main() -> None:
    """Run four at once, then one in two ways, and write the tables."""
    asked = arguments(__doc__, {"minutes": (10.0, "how long the plain run trains"), "flows": (4, "at once")})
    toy_project.needed()
    minutes, flows = (0.2, 2) if asked.quick else (asked.minutes, asked.flows)
    notes = measured(minutes, flows, asked.quick)
    fleet, same = notes["fleet"], notes["ways"]["same"]
    spent = {name: Spent(**one) for name, one in notes["ways"]["spent"].items()}
    good = sum(not row["wrong"] for row in fleet)
    plain, flow, idle = spent["plain commands"], spent["vitprune run"], spent["vitprune run, all cached"]
    ratio = flow.wall / plain.wall
    promised = None if asked.quick else ratio <= LARGEST_RATIO
    rows = [
        Row(
            "flows at once that end right, audited PASS", good, f"of {len(fleet)}", f"{len(fleet)}", good == len(fleet)
        ),
        Row("files that both ways leave alike", float(same), "all (1) or not (0)", "1", same),
        Row("flow against plain commands", ratio, "x wall", f"<= {LARGEST_RATIO}", promised),
        Row("fixed cost of orchestration", flow.wall - plain.wall, "s wall"),
        Row("fixed cost of orchestration", flow.cpu - plain.cpu, "s of CPU"),
        Row("a run that finds all in the cache", idle.wall, "s wall"),
        Row("the same", idle.cpu, "s of CPU"),
    ]
    if not asked.quick:
        document(fleet, spent, ratio)
    write_results("fleet", rows, asked.quick)


def measured(minutes: float, flows: int, quick: bool) -> dict[str, Any]:
    """Both parts, each on servers of its own; what was asked alike and has been noted is not measured again."""
    parts = {
        "fleet": (flows, lambda folder, servers: at_once(folder, servers, flows)),
        "ways": (minutes, lambda folder, servers: compared(folder, servers, minutes)),
    }
    noted = {} if quick or not NOTES.exists() else json.loads(NOTES.read_text())
    found = {}
    for part, (question, measure) in parts.items():
        if noted.get(part, {}).get("asked") == question:
            found[part] = noted[part]["found"]
            continue
        with tempfile.TemporaryDirectory(prefix="vitprune-fleet-") as name:
            folder = Path(name)
            with servers.serving(folder / "team", {}) as running:
                os.environ |= {key: running.env[key] for key in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
                found[part] = measure(folder, running)
        wrong = part == "fleet" and any(row["wrong"] for row in found[part])
        if not quick and not wrong:
            noted[part] = {"asked": question, "found": found[part]}
            NOTES.write_text(json.dumps(noted, indent=1))
    return found


def document(fleet: Sequence[dict[str, Any]], spent: dict[str, Spent], ratio: float) -> None:
    """Write the page."""
    own = [[row["run"], f"{row['seconds']:.0f}", row["audit"], "; ".join(row["wrong"]) or "right"] for row in fleet]
    ways = [[name, f"{one.wall:.1f}", f"{one.cpu:.1f}"] for name, one in spent.items()]
    sections = [
        Section("At once", "Started in the same moment.", ["run", "seconds", "audit", "how it ended"], own),
        Section("One run in two ways", f"Ratio {ratio:.3f}.", ["way", "seconds", "CPU seconds"], ways),
    ]
    write_sections(ROOT / "docs/results/fleet.md", "Flows at once, and what they cost", __doc__ or "", sections)


def at_once(folder: Path, servers: servers.Servers, number: int) -> list[dict[str, Any]]:
    """Start flows in worktrees of one project at the same moment; how each went, in words."""
    project = tiny_project.make_of_images(folder / "project")
    before = toy_project.told(project, "git", "status", "--porcelain", "--untracked-files=no")
    places = [worktrees.add(project, f"fleet-{one}", "HEAD") for one in range(number)]
    logs = [folder / f"fleet-{one}.log" for one in range(number)]
    for one, place in enumerate(places):
        tiny_project.dvc(place, "checkout", "-q", "images.dvc")
        change(place, seed=one, prune=OTHERS[one % len(OTHERS)])
    started = time.time()
    running = [toy_project.flow_of(place, servers.env, log) for place, log in zip(places, logs, strict=True)]
    found = []
    for one, process in enumerate(running):
        code = process.wait()
        found.append({"run": f"seed {one}, {OTHERS[one % len(OTHERS)]}"})
        found[-1] |= {"wrong": [] if code == 0 else [logs[one].read_text()[-300:]], "audit": "none"}
    for row, place, log in zip(found, places, logs, strict=True):
        row["seconds"] = log.stat().st_mtime - started
        if not row["wrong"]:
            row |= judged(place, log)
    if before != toy_project.told(project, "git", "status", "--porcelain", "--untracked-files=no"):
        found[0]["wrong"].append("the project itself has changed")
    return found


def judged(place: Path, log: Path) -> dict[str, Any]:
    """What is wrong with a run that says it ended right."""
    status = toy_project.told(place, sys.executable, "-m", "dvc", "status")
    run = re.findall(r"^MLflow: .*, run (\w+)$", log.read_text(), re.M)
    if not run:
        said = [line for line in log.read_text().splitlines() if line.startswith("MLflow was not reached")]
        return {"audit": "none", "wrong": said or ["MLflow is not mentioned"]}
    code, said = tamper_worker.audited(place, run=run[-1])
    wrong = [] if "up to date" in status else [f"dvc status: {status[:200]}"]
    return {"audit": "PASS" if code == 0 else said[-300:], "wrong": wrong + ["audit"] * (code != 0)}


def compared(folder: Path, servers: servers.Servers, minutes: float) -> dict[str, Any]:
    """Run one project in both ways; what each took, and whether they leave the same bits."""
    project = tiny_project.make(folder / "long")
    epochs = epochs_for(project, minutes)
    change(project, dense={"train": {**tiny_project.ONE_EPOCH, "epochs": epochs}})
    tiny_project.commit(project, "As long as asked for.")
    plain = folder / "plain"
    subprocess.run(["cp", "-a", project, plain], check=True)
    spent = {"plain commands": timed(lambda: by_hand(plain))}
    for name in ("vitprune run", "vitprune run, all cached"):
        log = folder / "flow.log"
        spent[name] = timed(lambda log=log: ended(toy_project.flow_of(project, servers.env, log), log))
        print(json.dumps({name: vars(spent[name])}), flush=True)
    same = toy_project.unlike(toy_project.digests(project), toy_project.digests(plain)) == []
    return {"spent": {name: asdict(one) for name, one in spent.items()}, "same": same}


def by_hand(project: Path) -> None:
    """The command lines of dvc.yaml, one after the other."""
    pipeline = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    for stage in STAGES:
        subprocess.run(pipeline[stage]["cmd"], shell=True, cwd=project, env=process_environment(project), check=True)


def epochs_for(project: Path, minutes: float) -> int:
    """So many epochs of `dense` as take so long here."""
    stage = ["vitprune", "dataset"], ["vitprune", "dense"]
    seconds = []
    for epochs in (1, 1 + PILOT):
        change(project, dense={"train": {**tiny_project.ONE_EPOCH, "epochs": epochs}})
        for command in stage if epochs == 1 else stage[1:]:
            begun = time.monotonic()
            subprocess.run(command, cwd=project, env=process_environment(project), check=True)
        seconds.append(time.monotonic() - begun)
    for name in toy_project.MADE:
        for path in (project / name).glob("*"):
            subprocess.run(["rm", "-rf", path], check=True)
    return max(1, round(minutes * 60 * PILOT / max(0.1, seconds[1] - seconds[0])))


def ended(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait for a flow, which has to end right."""
    if process.wait():
        sys.exit(log.read_text()[-3000:])


def timed(work: Any) -> Spent:
    """What a piece of work takes, with all processes that it starts and waits for."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    work()
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - begun
    return Spent(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def change(project: Path, **sections: Any) -> None:
    """Change sections of params.yaml."""
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for name, value in sections.items():
        params[name] = {**params[name], **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(params, sort_keys=False))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
