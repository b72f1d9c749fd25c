"""A small project on the digits images, for tests that run the stages in this process, without DVC."""

from pathlib import Path

import yaml

from vitprune.pipeline import stages

ROOT = Path(__file__).parents[2]
ORDER = list(stages.STAGES)
SHORT = {"epochs": 2, "batch_size": 64, "lr": 0.002, "augment": "digits"}


def project_in(path: Path, **prune: object) -> Path:
    """Write the params.yaml of a small project; `prune` replaces settings of that section."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["args"] |= {"depth": 2, "embed_dim": 48, "num_heads": 3}
    params["dense"]["train"] = params["prune"]["finetune"] = params["distill"]["train"] = SHORT
    params["calibrate"]["size"], params["evaluate"]["latency_runs"], params["export"]["onnx"] = 100, 5, False
    params["prune"] |= prune
    path.mkdir()
    (path / "params.yaml").write_text(yaml.safe_dump(params))
    return path
