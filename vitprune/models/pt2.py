"""Export to torch.export's format .pt2: the graph and the weights, which torch loads without timm or vitprune."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vitprune.models.export_check import ExportError, example_batch, expected_logits, exportable
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.eval_mode import scoring_mode
from vitprune.runtime.files import atomic_files, path_of_user
from vitprune.runtime.messages import first_line


@check_arguments()
def export_pt2(
    model: nn.Module, path: str | Path, example_input: Tensor, *, dynamic_size: bool = False
) -> dict[str, Any]:
    """Export a model with torch.export and a dynamic batch size, load the file and compare it.

    Args:
        model: The model; it is not changed. A model in half precision is exported with float32 weights.
        path: File to write, with the suffix .pt2. `torch.export.load(path).module()` is the model.
        example_input: Images (B, C, H, W) for tracing and for the comparison.
        dynamic_size: Make height and width of the images dynamic as well; the model must accept other sizes.

    Returns:
        `max_abs_diff`, the largest difference of the logits, `bound`, which it must not exceed, and `bytes`.

    Raises:
        BadInput: the model cannot be exported, or the file gives other logits.
    """
    path = path_of_user(path, "path")
    plain, images = exportable(model, example_input)
    expected = expected_logits(plain, images, dynamic_size)
    axes = {0: Dim("batch")} | ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if dynamic_size else {})
    try:
        with scoring_mode(plain):
            program = torch.export.export(plain, (example_batch(images),), dynamic_shapes=(axes,))
    except Exception as error:  # the exporter has errors of its own for each step
        raise ExportError(f"export.pt2: torch cannot export this model ({first_line(error)})") from None
    _remove_traces(program)
    with atomic_files(path) as unfinished:
        torch.export.save(program, unfinished)
        with torch.no_grad():
            facts: dict[str, Any] = expected.compare("export.pt2", torch.export.load(unfinished).module())
        facts["bytes"] = unfinished.stat().st_size
    return facts


def _remove_traces(program: ExportedProgram) -> None:
    """Remove the stack traces, which name paths of this machine, and the example images."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
