"""`vitprune-audit`: from the id of a run of MLflow, whether everything about it agrees and can be computed again."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitprune.orchestration.audit.collect import Evidence


def main() -> None:
    """Run `vitprune-audit`: 0 passed, 1 failed, 2 there was nothing to audit."""
    options = _options()
    from vitprune.orchestration.audit.collect import Unusable

    try:
        failed = audit(options.run, options.project, options.all, options.rerun)
    except Unusable as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if failed else 0)


def audit(run_id: str, project: Path | None, every: bool, rerun: bool) -> int:
    """Print each check as it goes, then PASS, or FAIL with the first difference (`every`: all); their number."""
    from mlflow import MlflowClient

    from vitprune.orchestration.audit.collect import gathered
    from vitprune.orchestration.tracking.store import short_patience, tracking_uri

    client = MlflowClient(tracking_uri=tracking_uri((project or Path()).resolve()))
    differences = 0
    with (
        tempfile.TemporaryDirectory(prefix="vitprune-audit-") as scratch,
        short_patience(60),
        gathered(client, run_id, project, Path(scratch)) as evidence,
    ):
        for name, lines in _checks(evidence, rerun):
            found = list(lines) if every else list(_first(lines))
            for line in found or ["as recorded"]:
                print(f"{name}: {line}", flush=True)
            differences += len(found)
            if found and not every:
                break
    print("PASS" if not differences else "FAIL" + (f": {differences} differences" if every else ""))
    return differences


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vitprune-audit", description=__doc__)
    parser.add_argument("run", help="the id of a run in MLflow, as vitprune-flow prints it")
    parser.add_argument("--project", type=Path, help="the project or a clone of it (default: the run's own)")
    parser.add_argument("--all", action="store_true", help="go on after the first difference")
    parser.add_argument("--rerun", action="store_true", help="compute everything again in a clean worktree and compare")
    return parser.parse_args()


def _checks(evidence: "Evidence", rerun: bool) -> Iterator[tuple[str, Iterator[str]]]:
    """The checks in order, with what each finds: first that the records agree, then that they can be computed."""
    from vitprune.orchestration.audit.records import CHECKS, check
    from vitprune.orchestration.audit.rerun import rebuild
    from vitprune.pipeline import verify

    for name in CHECKS:
        yield name, check(name, evidence)
    for name in verify.CHECKS:
        yield name, _recomputed(evidence.tree, name)
    if rerun:
        yield "rerun", rebuild(evidence)


def _recomputed(tree: Path, name: str) -> Iterator[str]:
    from vitprune.config.params import load
    from vitprune.errors import BadInput
    from vitprune.pipeline.verify import recheck

    with contextlib.chdir(tree):
        try:
            yield from recheck(name, load(Path("params.yaml")))
        except BadInput as error:
            yield str(error)


def _first(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line
        return


if __name__ == "__main__":
    main()
