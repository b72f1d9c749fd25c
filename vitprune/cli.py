"""The command `vitprune`: stages, pipeline runs, projects and models.

Every command imports what it needs in its function, so help, --version and shell completion load neither torch nor
Prefect.

The arguments of a command are described once, in the `help` of their annotations, which --help and the docs show.
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vitprune.errors import BadInput, Interrupted
from vitprune.pipeline.stages import STAGES
from vitprune.runtime.files import DISK_FULL

BEFORE_TRAINING = ("dataset", "dense")  # stages that check all settings first
WHOLE_NAMES = 200  # columns; a narrower table would shorten the names of groups, which prune.rules need
STAGE_PANEL, PIPELINE, PROJECTS, MODELS = "Stages, in order", "Pipeline runs", "Projects", "Models and methods"

Project = Annotated[Path, typer.Option("--project", "-C", help="The project directory, with params.yaml.")]
StageLimit = Annotated[float | None, typer.Option(help=r"Seconds after which a stage is killed.  \[default: no limit]")]
ModelName = Annotated[
    str | None,
    typer.Option(help=r"Name in MLflow's registry.  \[default: VITPRUNE_MODEL_NAME, else the name of the folder]"),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A timm model, or the directory of a saved model.")]

app = typer.Typer(
    name="vitprune", no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"max_content_width": 120}
)


def main() -> None:
    """Run the command line; errors are one line on stderr, with exit code 2 for bad input and 75 for a retry."""
    try:
        app(prog_name="vitprune")
    except BadInput as error:
        _exit(str(error))
    except Interrupted as error:
        _exit(str(error), error.code)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        if error.errno in DISK_FULL:
            _exit(f"{path}{error.strerror}; no partial files were left; free some space and run again")
        if not path:
            raise
        _exit(f"{path}{error.strerror}; check the path and its permissions")


def _exit(line: str, code: int = 2) -> None:
    from vitprune.pipeline import torchrun

    if os.environ.get("RANK", "0") == "0" or code == 2:
        print(f"Error: {line}", file=sys.stderr)
    torchrun.report_exit_code(code)
    sys.exit(code)


def _print_version(value: bool) -> None:
    if value:
        from vitprune import __version__

        print(f"vitprune {__version__}")
        raise typer.Exit


@app.callback(epilog="Example: vitprune init my-project && cd my-project && vitprune run")
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prune vision transformers: one command per pipeline stage, and commands to run, inspect and audit pipelines."""


def _stage_command(stage: str) -> Callable[[Path], None]:
    def command(project: Project = Path()) -> None:
        from vitprune.pipeline import torchrun

        if torchrun.wanted(stage):
            raise typer.Exit(torchrun.launch(stage, project))
        if stage == "report":
            from vitprune.pipeline.report.page import write_report

            write_report(project, project / "out/report/report.html")
        else:
            from vitprune.pipeline import stages

            if stage in BEFORE_TRAINING:
                from vitprune.pipeline.check_settings import check_settings

                check_settings(stages.enter(project))
                project = Path()
            stages.run(stage, project)

    return command


def _evaluate_command(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Directory of a saved timm model, instead of a project.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--data", help="With MODEL: images, as folder:PATH, parquet:PATH, wds/PATH or hfds/NAME."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="With MODEL: accuracy or knn; for agreement with --dense: cosine, cka or iou.")
    ] = "accuracy",
    dense: Annotated[Path | None, typer.Option(help="With MODEL: directory of the dense model.")] = None,
    threshold: Annotated[float, typer.Option(help="With MODEL: threshold of a map of one channel, for iou.")] = 0.0,
    project: Project = Path(),
) -> None:
    if model is None:
        if source is not None or dense is not None or metric != "accuracy":
            raise BadInput("--data, --metric and --dense: evaluate one saved model; give its directory as MODEL")
        _stage_command("evaluate")(project)
        return
    if source is None:
        raise BadInput("--data: give the images to evaluate on, such as folder:photos")
    import json
    from typing import Any, cast

    from vitprune.evaluation.evaluate_saved import evaluate_saved

    print(json.dumps(evaluate_saved(model, source, cast(Any, metric), dense, threshold=threshold), indent=2))


_COMMANDS = STAGES | {
    "evaluate": f"{STAGES['evaluate']} With MODEL: evaluate one saved model by a metric.",
    "report": "Write the HTML report from the results of all stages.",
}
for _name, _help in _COMMANDS.items():
    app.command(
        _name, help=_help, rich_help_panel=STAGE_PANEL, epilog=f"Example: vitprune {_name} --project my-project"
    )(_evaluate_command if _name == "evaluate" else _stage_command(_name))


def _require_pipeline() -> None:
    """Raise BadInput if a package of the extra `pipeline` is not installed."""
    for package in ("dvc", "prefect", "mlflow", "psutil"):
        if find_spec(package) is None:
            raise BadInput(f"{package} is not installed; run: pip install 'vitprune[pipeline]'")


@app.command(rich_help_panel=PIPELINE, epilog="Example: vitprune run --project my-project --stage-limit 3600")
def run(project: Project = Path(), stage_limit: StageLimit = None) -> None:
    """Run all stages that are out of date as a Prefect flow, and record the run in MLflow."""
    _require_pipeline()
    from vitprune.orchestration.cli_compress import run_pipeline

    raise typer.Exit(run_pipeline(project, stage_limit))


@app.command(
    rich_help_panel=PIPELINE, epilog="Example: vitprune sweep --methods channel-taylor,lamp --targets 0.5,macs=0.5"
)
def sweep(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Sweep file; its name without suffix names the sweep.")
    ] = None,
    project: Project = Path(),
    methods: Annotated[str | None, typer.Option(help="Without FILE: method names, separated by commas.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Without FILE: targets, separated by commas, such as 0.5,macs=0.5,params=12M.")
    ] = None,
    against: Annotated[str, typer.Option(help="Without FILE: x-axis, throughput, macs or params.")] = "throughput",
    name: Annotated[str, typer.Option(help="Without FILE: name of the sweep.")] = "sweep",
    jobs: Annotated[int, typer.Option(help="Runs at the same time; latencies are only reliable with 1.")] = 1,
    stage_limit: StageLimit = None,
    check: Annotated[bool, typer.Option("--check", help="Check the settings, print the runs, and stop.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Remove the worktrees of the sweep, and stop.")] = False,
) -> None:
    """Run every method at every target, and plot top-1 against throughput, MACs or parameters.

    Each run has a git worktree of its own and shares the project's DVC cache, so finished stages are not recomputed. A
    failed run does not stop the others. FILE is YAML: methods (a list, or a mapping to settings of prune), targets
    (0.5, {macs: 0.5}, {ffn: 0.6, attention: 0.5}), params (override params.yaml) and against.
    """
    _require_pipeline()
    from vitprune.orchestration.cli_sweep import SweepOptions, remove_worktrees, run_sweep

    if clean:
        remove_worktrees(project, file.stem if file else name)
        return
    settings = SweepOptions(file, methods, targets, against, name, jobs, stage_limit, check)
    raise typer.Exit(run_sweep(project, settings))


@app.command(rich_help_panel=PIPELINE, epilog="Example: vitprune retrain --project my-project --branch retrain")
def retrain(
    project: Project = Path(),
    model: ModelName = None,
    branch: Annotated[str, typer.Option(help="Git branch for the commits of promoted runs.")] = "retrain",
    stage_limit: StageLimit = None,
) -> None:
    """Run the pipeline on the newest commit and data, and promote the model to champion if it passes gates.yaml."""
    _require_pipeline()
    from vitprune.orchestration.cli_retrain import run_retraining

    raise typer.Exit(run_retraining(project, model, branch, stage_limit))


@app.command(rich_help_panel=PIPELINE, epilog="Example: vitprune rollback --project my-project")
def rollback(project: Project = Path(), model: ModelName = None) -> None:
    """Set MLflow's alias champion back to the former champion."""
    _require_pipeline()
    from vitprune.orchestration.cli_retrain import roll_back

    roll_back(project, model)


@app.command(rich_help_panel=PIPELINE, epilog="Example: vitprune versions --project my-project")
def versions(project: Project = Path(), model: ModelName = None) -> None:
    """List the registered versions of the model, their comparison results, and the champion."""
    _require_pipeline()
    from vitprune.orchestration.cli_retrain import print_versions

    print_versions(project, model)


@app.command(rich_help_panel=PIPELINE, epilog="Example: vitprune audit 3f2a8c... --all --rerun")
def audit(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Id of the MLflow run, as vitprune run prints it.")],
    project: Annotated[
        Path | None, typer.Option("--project", "-C", help=r"A clone of the project.  \[default: the run's project]")
    ] = None,
    list_all: Annotated[bool, typer.Option("--all", help="List all differences, not only the first.")] = False,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Also run all stages again, without the cache, and compare.")
    ] = False,
    trusted_keys: Annotated[
        Path | None, typer.Option(help="File of the public keys that may sign a run, one ssh-ed25519 ... per line.")
    ] = None,
    limit: Annotated[float, typer.Option(help="Seconds; stages that took longer are only repeated by --rerun.")] = 60.0,
) -> None:
    """Verify a run: its signature, records, commit and files, and recompute its numbers; exit code 1 if they differ."""
    _require_pipeline()
    from vitprune.orchestration.cli_audit import AuditOptions, audit_run

    options = AuditOptions(list_all, rerun, trusted_keys, limit)
    raise typer.Exit(1 if audit_run(run_id, project, options) else 0)


@app.command(rich_help_panel=PIPELINE, epilog="Example: vitprune sync --project my-project")
def sync(
    project: Project = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Upload the runs that are missing in MLflow, because its server was unavailable or has lost them; idempotent."""
    _require_pipeline()
    from vitprune.orchestration import cli_audit

    raise typer.Exit(cli_audit.upload_missing_runs(project, as_json))


@app.command(
    rich_help_panel=PROJECTS,
    epilog="Example: vitprune init my-project --source folder:photos --model vit_tiny_patch16_224",
)
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The project directory; created if it is missing.")],
    source: Annotated[
        str, typer.Option(help="Images: digits, folder:PATH, parquet:PATH, wds/PATH, hfds/NAME or torch/NAME:ROOT.")
    ] = "digits",
    model: Annotated[str | None, typer.Option(help=r"A timm model.  \[default: deit_tiny_patch16_224]")] = None,
    method: Annotated[
        str | None, typer.Option(help=r"See vitprune methods.  \[default: unit-obs; channel-taylor for digits]")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes of the model, if they are not those of the source.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Settings to start from: a name of vitprune recipes, or a file.")
    ] = None,
    remote: Annotated[
        str | None, typer.Option(help="DVC remote: a folder, ssh://, s3://, gs:// or azure:// address.")
    ] = None,
) -> None:
    """Create a project: a git and DVC repository with the pipeline, its settings and its Prefect flows."""
    from vitprune.config.params import load_params
    from vitprune.pipeline.project_template import Choice, create_project

    written = create_project(directory, Choice(source, model, method, classes, remote, recipe))
    print(f"{directory}: wrote {', '.join(written)}")
    print(f"Epochs of training: {load_params(directory / 'params.yaml').planned_epochs}; change them in params.yaml")
    print(f"Next: cd {directory} && vitprune run (or dvc repro); all settings are in params.yaml")
    if remote is not None:
        print(f"Then: git add . && git commit && dvc push --run-cache, to share the results on {remote}")


@app.command(rich_help_panel=PROJECTS, epilog="Example: vitprune import-scores lists/ --parsing authors_compat")
def import_scores(
    lists: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the lists published with UP-ViTs.")],
    parsing: Annotated[
        str, typer.Option(help="correct, or authors_compat: as the authors' code reads them.")
    ] = "correct",
    project: Project = Path(),
) -> None:
    """Import the scores published by the authors of UP-ViTs as the output of the score stage."""
    from vitprune.pipeline import stages
    from vitprune.pipeline.import_scores import import_scores as import_lists

    directory = lists.resolve()
    import_lists(stages.enter(project), directory, parsing)
    print(f"{project / 'out/score'}: written from {directory}")
    print("Next: dvc commit -f score && dvc repro")


@app.command(rich_help_panel=MODELS, epilog="Example: vitprune methods")
def methods() -> None:
    """List the pruning methods: what each needs, when to use it, its criterion, and the ranking scope of each kind."""
    from rich.console import Console
    from rich.table import Table

    from vitprune.pipeline.method_guide import METHOD_GUIDE
    from vitprune.pruning.methods import METHODS

    table = Table("method", "images", "time", "use, criterion and scopes", box=None, pad_edge=False)
    for name, row in METHODS.items():
        advice, scopes = METHOD_GUIDE[name], ", ".join(f"{kind}: {scope}" for kind, scope in row.scopes.items())
        text = f"{advice.use}\n[dim]{row.about}\n{scopes}"
        table.add_row(f"[bold]{name}", advice.images, advice.time, text)
    Console().print(table)
    print("Images: a few hundred for calibration. Time: scoring of DeiT-Tiny on a CPU.")


@app.command(rich_help_panel=PROJECTS, epilog="Example: vitprune recipes")
def recipes() -> None:
    """List the recipes for init --recipe: complete settings, most of them of published runs."""
    from rich.console import Console
    from rich.table import Table

    from vitprune.pipeline.project_template.shipped_recipes import about, recipe_files

    table = Table("recipe", "content", box=None, pad_edge=False)
    for name, path in recipe_files().items():
        table.add_row(f"[bold]{name}", about(path))
    Console().print(table)


@app.command(rich_help_panel=PROJECTS, epilog="Example: vitprune schema > params.schema.json")
def schema() -> None:
    """Print the JSON schema of params.yaml, with which an editor completes and checks its keys."""
    import json

    from vitprune.config.params import Params

    print(json.dumps(Params.model_json_schema(), indent=2))


@app.command(rich_help_panel=MODELS, epilog="Example: vitprune inspect deit_small_patch16_224")
def inspect(model: Model) -> None:
    """List the prunable groups of a model, with the parameters and MACs of each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vitprune import data, models
    from vitprune.evaluation.cost import count
    from vitprune.evaluation.inspect_model import inspect_groups

    network = models.load(model) if Path(model).is_dir() else models.create(model, key="model")
    example = data.example_input(network, 1)
    rows, total = list(inspect_groups(network, example)), count(network, example)
    size, console = " x ".join(str(side) for side in example.shape[-2:]), Console()
    console.width = max(console.width, WHOLE_NAMES)
    table = Table("group", "kind", box=None, pad_edge=False)
    for header in ("units", "parameters", f"MACs of {size} pixels"):
        table.add_column(header, justify="right")
    console.print(f"[bold]{model}[/]: {total.params / 1e6:.2f} M parameters, {total.macs / 1e9:.3f} G MACs")
    for row in rows:
        if row.why:
            console.print(f"[dim]{row.kind}: {escape(row.why)}")
        else:
            cells = (row.name or "all", row.kind, row.units, f"{row.params:,}", f"{row.macs:,}")
            table.add_row(*cells, style=None if row.name else "bold")
    console.print(table)


@app.command(rich_help_panel=MODELS, epilog="Example: vitprune check swin_tiny_patch4_window7_224 --ratios 0.5")
def check(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="timm:NAME or NAME, hf:DIRECTORY_OR_CONFIG, torchvision:NAME, or module:PACKAGE.FILE:CALLABLE; the "
            "weights are random.",
        ),
    ],
    ratios: Annotated[
        str, typer.Option(help="Fractions of the units to remove, separated by commas.")
    ] = "0.25,0.5,0.75",
    kinds: Annotated[
        str | None, typer.Option(help=r"Kinds of groups, separated by commas: ffn, head, ...  \[default: all]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per kind and ratio.")] = False,
) -> None:
    """Verify in float64 that a pruned model gives the same outputs as a literal removal of the units."""
    from vitprune.evaluation.check_model import print_check

    try:
        shares = [float(share) for share in ratios.split(",")]
    except ValueError:
        raise BadInput(f"--ratios {ratios!r}: expected numbers between 0 and 1, separated by commas") from None
    if not print_check(model, kinds.split(",") if kinds else None, shares, as_json):
        raise typer.Exit(1)


@app.command(
    "latency-table",
    rich_help_panel=MODELS,
    epilog="Example: vitprune latency-table deit_tiny_patch16_224 --on ort --output deit_tiny.csv",
)
def latency_table(
    model: Model,
    output: Annotated[Path, typer.Option(help="The CSV file to write.")],
    on: Annotated[
        str, typer.Option(help="Engine: torch (on a GPU if there is one), ort (onnxruntime) or openvino.")
    ] = "torch",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 1,
    kinds: Annotated[str, typer.Option(help="Kinds of group: ffn, attention, head.")] = "ffn,attention",
    runs: Annotated[int, typer.Option(min=1, help="Timed forward passes of every width.")] = 50,
    threads: Annotated[int | None, typer.Option(min=1, help=r"CPU threads.  \[default: as torch]")] = None,
) -> None:
    """Measure the time of every group at several widths on this device, and write it for prune.target.table."""
    from vitprune.evaluation.record_latency_table import record_to_file

    print(record_to_file(model, output, on, batch_size, kinds.split(","), runs, threads))


if __name__ == "__main__":
    main()
