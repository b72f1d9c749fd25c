"""MLflow's python_function flavor: MLflow loads a saved model through this module, to serve it or to predict."""

from pathlib import Path

import numpy
import torch
from torch import nn

from vitprune.models.io import load


class Predictor:
    """The interface that MLflow expects of a loaded model.

    Args:
        model: A model on the CPU.
    """

    def __init__(self, model: nn.Module):
        self.model = model.eval()

    @torch.inference_mode()
    def predict(self, images: numpy.ndarray, params: object = None) -> numpy.ndarray:
        """Return the logits (B, classes) of preprocessed images (B, C, H, W)."""
        logits: numpy.ndarray = self.model(torch.from_numpy(numpy.array(images, dtype=numpy.float32))).numpy()
        return logits


def _load_pyfunc(folder: str) -> Predictor:
    """Load the folder of a logged model; the name of this function is MLflow's."""
    return Predictor(load(Path(folder)).float())
