"""The stages of the pipeline by name: one module each, NAME_stage.py, imported only when the stage runs."""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.errors import BadInput

if TYPE_CHECKING:
    from vitprune.config.params import Params

STAGES = {  # in order, with the help text of the command line
    "dataset": "Hash every image of the source and assign it to the train or the eval split.",
    "dense": "Create the model to prune, with random, timm's or your weights; train it if dense.train is set.",
    "calibrate": "Draw the calibration images from the train split.",
    "score": "Compute the importance score of every unit of the dense model.",
    "mask": "Select the masks of the first pruning cycle from the scores.",
    "prune": "Prune cycle by cycle and fine-tune after each; write model, masks and metrics of every cycle.",
    "distill": "Fine-tune the pruned model with the dense model as teacher; pruned weights remain zero.",
    "evaluate": "Measure accuracy, cost and latency of the dense and the final model on the same images.",
    "export": "Write a timm directory with a model card, and the ONNX, OpenVINO and torch.export files of params.yaml.",
}


def run(stage: str, project: Path) -> None:
    """Run one stage in a project directory."""
    params = enter(project)
    import_module(f"vitprune.pipeline.{stage}_stage").run(params)


def enter(project: Path) -> "Params":
    """Change to a project directory, read its params.yaml and set the number of CPU threads.

    Raises:
        BadInput: the directory does not exist, or params.yaml is missing or invalid.
    """
    if not project.is_dir():
        raise BadInput(f"{project}: no such directory; give a project directory (vitprune init DIR creates one)")
    from vitprune.config.params import load_params  # the command line prints its help without pydantic

    os.chdir(project)
    params = load_params(Path("params.yaml"))
    if params.threads is not None:
        import torch  # the command line prints its help without it

        torch.set_num_threads(params.threads)
    return params
