"""Makes vision transformers smaller and proves it: one command per stage of the pipeline, and a few to look around."""

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from vitprune import data, models
from vitprune.architectures import find_groups
from vitprune.config.quantity import format_cost
from vitprune.errors import BadInput, Interrupted
from vitprune.evaluation.check_model import check as proofs
from vitprune.evaluation.check_removal import RemovalCheck
from vitprune.evaluation.cost import count, group_costs
from vitprune.groups import KINDS
from vitprune.pipeline import promotion, stages, sweep_plan, torchrun
from vitprune.pipeline.import_scores import import_scores as scores_of_lists
from vitprune.pipeline.project_data import OUT
from vitprune.pipeline.project_template import Choice, create
from vitprune.pruning.methods import METHODS

Project = Annotated[Path, typer.Option("--project", "-C", help="The project directory, with params.yaml.")]
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IN_ORDER, LOOKING, OWN = "Stages, in order", "Looking around", "A project of your own"
SWEEPS = "Sweeps (vitprune-sweep runs them)"


def application() -> typer.Typer:
    """Build the command line: one command per stage, then those to look around."""
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
    for name, summary in stages.STAGES.items():
        app.command(name, help=summary, rich_help_panel=IN_ORDER)(_command(name))
    app.command("report", rich_help_panel=IN_ORDER)(report)
    for command in (methods, inspect, check):
        app.command(rich_help_panel=LOOKING)(command)
    app.command(rich_help_panel=OWN)(init)
    app.command(rich_help_panel=OWN)(import_scores)
    app.command(rich_help_panel=OWN)(judge)
    app.command(rich_help_panel=SWEEPS)(sweep_check)
    app.command(rich_help_panel=SWEEPS)(sweep_table)
    return app


def main() -> None:
    """Run the command line: one clear line and exit code 2 for bad input, or one that asks for another attempt."""
    try:
        application()()
    except BadInput as error:
        _stop(str(error))
    except Interrupted as error:
        _stop(str(error), error.code)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{error.strerror}; nothing was half-written, make room and run again")


def _stop(line: str, code: int = 2) -> None:
    if os.environ.get("RANK", "0") == "0" or code == 2:
        print(f"Error: {line}", file=sys.stderr)
    torchrun.report_exit_code(code)
    sys.exit(code)


def _command(stage: str) -> Callable[[Path], None]:
    def command(project: Project = Path()) -> None:
        if torchrun.wanted(stage):
            raise typer.Exit(torchrun.launch(stage, project))
        stages.run(stage, project)

    return command


def report(project: Project = Path()) -> None:
    """Write the report, one page that works offline, from all tables."""
    from vitprune.pipeline.report import write_report  # matplotlib takes a second to import

    write_report(project, project / "out/report/report.html")


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The project's directory; made if it is not there.")],
    source: Annotated[str, typer.Option(help="digits, folder:PATH, parquet:PATH, wds/PATH or a timm name.")] = "digits",
    model: Annotated[str | None, typer.Option(help="A timm model.  [default: deit_tiny_patch16_224]")] = None,
    method: Annotated[str, typer.Option(help="As listed by vitprune methods.")] = Choice.method,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes, where the data does not say.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe with all settings, such as recipes/NAME.yaml.")] = None,
    remote: Annotated[
        str | None, typer.Option(help="DVC's remote: a folder, ssh://, s3://, gs:// or azure://.")
    ] = None,
) -> None:
    """Make a project of your own: a git and DVC repository with the pipeline for your images and model."""
    written = create(directory, Choice(source, model, method, classes, remote, recipe))
    print(f"{directory}: wrote {', '.join(written)}")
    print(f"Next: cd {directory} && dvc repro (or vitprune-flow); params.yaml decides the result")
    if remote is not None:
        print(f"Then: git add . && git commit && dvc push --run-cache, which shares it by {remote}")


def import_scores(
    lists: Annotated[Path, typer.Argument(metavar="DIR", help="Where the lists of UP-ViTs' authors are.")],
    parsing: Annotated[str, typer.Option(help="correct, or authors_compat: as their ranking reads them.")] = "correct",
    project: Project = Path(),
) -> None:
    """Take the scores of UP-ViTs' authors for those of the score stage."""
    directory = lists.resolve()
    scores_of_lists(stages.enter(project), directory, parsing)
    print(f"{project / OUT / 'score'}: written from {directory}")
    print("Next: dvc commit -f score && dvc repro")


def judge(
    champion: Annotated[Path | None, typer.Option(help="The directory of the model in use.  [default: dense]")] = None,
    project: Project = Path(),
) -> None:
    """Compare the final model with the one in use, image by image, and apply gates.yaml; 1 if a gate fails."""
    own = champion.resolve() if champion is not None else None
    params = stages.enter(project)
    facts = promotion.judge(params, own, promotion.load_gates(promotion.GATES))
    table = Table("gate", "asked", "measured", "holds", box=None, pad_edge=False)
    for gate in facts["gates"]:
        table.add_row(gate["name"], gate["asked"], gate["measured"], "yes" if gate["holds"] else "NO")
    Console().print(table)
    if not facts["passed"]:
        raise typer.Exit(1)


def sweep_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The sweep's methods and targets, as YAML.")],
    project: Project = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs with all their settings, as JSON.")] = False,
) -> None:
    """Check a sweep's settings against the project's model, and print the runs that it comes to."""
    wanted = sweep_plan.read_sweep(file.resolve())
    params = stages.enter(project)
    runs = sweep_plan.runs_of(wanted, Path("params.yaml"))
    title = f"{params.model.name}: {len(wanted.methods)} methods x {len(wanted.targets)} targets"
    if as_json:
        print(json.dumps({"title": title, "against": wanted.against, "runs": [asdict(run) for run in runs]}))
        return
    table = Table("run", "method", "target", box=None, pad_edge=False)
    for run in runs:
        table.add_row(run.name, run.method, run.target)
    Console().print(title, table)


def sweep_table(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's folder: .vitprune/sweeps/NAME.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the table and the picture go.")],
) -> None:
    """Write the table and the picture of a sweep's runs, as far as they have come."""
    from vitprune.pipeline.report.sweep_table import write_sweep  # matplotlib takes a second to import

    rows = write_sweep(folder, out)
    print(f"{out}: {sum(row['status'] == 'finished' for row in rows)} of {len(rows)} runs")


def methods() -> None:
    """Print the table of methods."""
    table = Table("method", "kinds and scopes", "", box=None, pad_edge=False)
    for name, row in METHODS.items():
        scopes = ", ".join(f"{kind}: {scope}" for kind, scope in row.scopes.items())
        table.add_row(f"[bold]{name}", scopes, row.about)
    Console().print(table)


def inspect(
    model: Annotated[str, typer.Argument(help="A timm model's name, or a saved model's directory.")],
) -> None:
    """Print a model's groups, with the parameters and MACs behind each of them."""
    network = models.load(model) if Path(model).is_dir() else models.create(model)
    example = data.example_input(network, 1)
    table = Table("group", "kind", "units", "parameters", "MACs", box=None, pad_edge=False)
    refused = []
    for kind in KINDS:
        try:
            groups = find_groups(network, [kind])
        except BadInput as error:
            refused.append((kind, error))
            continue
        cost = group_costs(network, groups, example)
        for group in groups:
            shape = " x ".join(str(side) for side in group.shape)
            weights, macs = cost[group.name]
            table.add_row(group.name, kind, shape, f"{weights:,}", f"{macs:,}")
    if len(refused) == len(KINDS):
        raise refused[0][1]
    whole = count(network, example)
    console = Console()
    console.print(f"[bold]{model}[/]: {whole.params / 1e6:.2f} M parameters, {whole.macs / 1e9:.3f} G MACs")
    for kind, why in refused:
        console.print(f"[dim]{kind}: {escape(str(why))}")
    console.print(table)


def check(
    model: Annotated[str, typer.Argument(help="A timm model's name; its weights are random.")],
    ratios: Annotated[str, typer.Option(help="Shares of the units to remove.")] = "0.25,0.5,0.75",
    kinds: Annotated[str, typer.Option(help="Kinds of group to prove.")] = ",".join(KINDS),
) -> None:
    """Prove that a timm model can be cut: what is cut out is what literal removal leaves, in float64."""
    try:
        shares = [float(share) for share in ratios.split(",")]
    except ValueError:
        raise BadInput(f"--ratios {ratios!r}: expected numbers between 0 and 1, with commas between them") from None
    table = Table("kind", "removed", "verdict", "difference", "parameters", "MACs", box=None, pad_edge=False)
    console, reasons, failed = Console(), [], False
    with Live(table, console=console, transient=True) if console.is_terminal else nullcontext():
        for row in proofs(model, kinds.split(","), shares):
            failed |= row.verdict == "failed"
            table.add_row(row.kind, f"{row.ratio:.0%}" if row.ratio else "", row.verdict, *_cells(row.proof))
            reasons += [f"{row.kind}: {row.why}"] if row.why else []
    console.print(table)
    for reason in reasons:
        console.print(f"[dim]{escape(reason)}", highlight=False)
    if failed:
        raise typer.Exit(1)


def _cells(proof: RemovalCheck | None) -> Sequence[str]:
    """Of a proof: the largest difference, and parameters and MACs before and after."""
    if proof is None:
        return ()
    pairs = [(proof.params_before, proof.params_after), (proof.macs_before, proof.macs_after)]
    return [f"{proof.difference:.1e}", *(f"{format_cost(before)} -> {format_cost(after)}" for before, after in pairs)]


if __name__ == "__main__":
    main()
