import pytest
import torch

from vitprune.errors import BadInput
from vitprune.pipeline.project_data import device


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
