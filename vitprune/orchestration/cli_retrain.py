"""`vitprune-retrain`: retrain now, show the versions, and give the champion's place back to the one before."""

import argparse
import sys
from pathlib import Path

from vitprune.orchestration.cli_compress import refuse, settle


def main() -> None:
    """Run `vitprune-retrain`."""
    options = _options()
    project = options.project.resolve()
    if not (project / "dvc.yaml").is_file():
        refuse(f"{project / 'dvc.yaml'}: no such file; name a project by --project")
    try:
        sys.exit(COMMANDS[options.command](project, options))
    except KeyboardInterrupt:
        sys.exit(130)


def run(project: Path, options: argparse.Namespace) -> int:
    """Retrain once, here."""
    for note in settle(project):
        print(note, flush=True)
    from vitprune.orchestration.retrain import Retrained, retrain

    state = retrain(project, options.model, options.branch, options.stage_limit, return_state=True)
    result: object = state.result(raise_on_failure=False)
    if not isinstance(result, Retrained):
        print(f"Error: {(state.message or str(result)).splitlines()[0]}", file=sys.stderr)
        return 1
    print(result.message, file=sys.stderr if result.exit_code else sys.stdout)
    return result.exit_code


def rollback(project: Path, options: argparse.Namespace) -> int:
    """Give the alias `champion` back to the version before."""
    from vitprune.orchestration.tracking.registry import RegistryFault, registry
    from vitprune.orchestration.tracking.store import short_patience

    with short_patience(60):
        models = registry(project, options.model)
        try:
            lost, got = models.roll_back()
        except RegistryFault as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
    print(f"{models.name}: version {got} is champion again, in the place of version {lost}")
    return 0


def show(project: Path, options: argparse.Namespace) -> int:
    """Print every version, what it was held against and which is the champion."""
    from vitprune.orchestration.tracking.registry import PASSED, registry
    from vitprune.orchestration.tracking.store import short_patience

    with short_patience(60):
        models = registry(project, options.model)
        champion = models.champion()
        for version in models.versions():
            mark = "champion" if champion is not None and version.version == champion.version else ""
            how = "passed" if version.tags.get(PASSED) == "true" else "held back"
            difference = version.tags.get("vitprune.difference", "?")
            print(f"{models.name} {version.version}: {how}, {difference} points, run {version.run_id} {mark}".rstrip())
    return 0


COMMANDS = {"run": run, "rollback": rollback, "show": show}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vitprune-retrain", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--project", type=Path, default=Path("."), help="the project's directory (default: here)")
        command.add_argument("--model", help="its name in MLflow's registry (default: VITPRUNE_MODEL_NAME, the folder)")
        if name == "run":
            command.add_argument("--branch", default="retrain", help="takes the commits of promoted runs")
            command.add_argument("--stage-limit", type=float, help="seconds after which a stage is killed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
