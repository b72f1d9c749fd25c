import sys

import pytest
import timm
import torch

from vitprune import cli
from vitprune.evaluation.inspect_model import inspect_groups


def test_every_kind_has_a_total() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=4)
    rows = [row for row in inspect_groups(model, torch.zeros(1, 3, 32, 32)) if row.kind == "ffn"]
    first, second, total = rows
    assert (first.units, total.units) == ("192", "384")
    assert (total.name, total.params, total.macs) == ("", first.params + second.params, first.macs + second.macs)
    assert first.params == 2 * 48 * 192 + 192  # the bias of the second layer remains


def test_the_command_prints_whole_names_and_numbers(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["vitprune", "inspect", "deit_tiny_patch16_224"])
    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr().out
    assert "blocks.10.attn.proj.weight" in printed
    assert "…" not in printed
