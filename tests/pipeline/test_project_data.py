from pathlib import Path

import pytest
import torch

from tests.support.model_zoo import tiny
from vitprune.architectures.classifier import keep_classes
from vitprune.config.params import load_params
from vitprune.errors import BadInput
from vitprune.pipeline.project_data import CALIBRATION, calibration, device
from vitprune.runtime import tables


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:x", "xla", "mps:3", " "])
def test_a_missing_device_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("VITPRUNE_DEVICE", name)
    with pytest.raises(BadInput, match=f"^VITPRUNE_DEVICE={name}: cannot be used .*; give cpu, or unset it$"):
        device()


def test_an_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITPRUNE_DEVICE", "")
    assert device() == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("VITPRUNE_DEVICE", "cpu")
    assert device() == torch.device("cpu")


def test_calibration_labels_are_outputs_of_a_model_that_was_cut_to_some_classes(
    shared_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared_project)
    params, model = load_params(Path("params.yaml")), tiny("vit", dtype=torch.float32)
    labels = tables.read_table(CALIBRATION, tables.CALIBRATION)["label"].to_pylist()
    cut = keep_classes(model, [2, 0, 1])
    expected = [[2, 0, 1].index(label) for label in labels if label < 3]
    batches = calibration(cut, params)
    assert torch.cat([given for _, given in batches]).tolist() == expected
    assert sum(len(images) for images, _ in batches) == len(expected) > 3
