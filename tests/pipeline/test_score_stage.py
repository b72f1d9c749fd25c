"""Scoring in several processes, and resumed scoring after SIGKILL."""

import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from tests.support import preloaded
from tests.support.cap_worker import KINDS, setting_of
from tests.support.digits_project import ORDER, project_in
from tests.support.model_zoo import batches
from tests.support.plans import context
from tests.support.subprocesses import ONE_THREAD, TOGETHER
from vitprune import BadInput, find_groups
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.kl.fisher import fisher_kl
from vitprune.criteria.magnitude import magnitude
from vitprune.criteria.obs import fisher_blocks, gradients
from vitprune.criteria.obs.cap import ovit
from vitprune.criteria.taylor import taylor
from vitprune.models.weights import read_weights
from vitprune.pipeline import score_stage, stages
from vitprune.pruning.methods import METHODS
from vitprune.runtime import tables
from vitprune.runtime.distributed import ProcessGroup
from vitprune.runtime.files import sha256

ROOT = Path(__file__).parents[2]


def worker(directory: Path, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "tests/support/score_worker.py"), str(directory), str(seconds)]
    return subprocess.Popen(command, env=ONE_THREAD)


def done_in(directory: Path) -> int:
    return max((int(read_weights(path)["done"]) for path in (directory / "partial").glob("*.safetensors")), default=0)


@pytest.mark.parametrize("criterion", [fisher_kl, taylor])
def test_scores_are_sums_over_batches(vit: nn.Module, tmp_path: Path, criterion) -> None:
    groups, data = find_groups(vit, ["ffn", "head"]), batches(vit, 3)
    work = score_stage.ScoringJob(criterion, groups, data, context(fisher_directions=2))
    result = work.importance(vit, True, tmp_path, ProcessGroup()).scores
    expected = criterion(vit, groups, data, work.context).scores
    for name, score in expected.items():
        assert result[name].shape == score.shape
        torch.testing.assert_close(result[name], score, rtol=1e-12, atol=1e-18)


def test_partial_sums_are_resumed_only_by_the_same_job(vit: nn.Module, tmp_path: Path) -> None:
    groups, data = find_groups(vit, ["ffn"]), batches(vit, 3)
    work = score_stage.ScoringJob(fisher_kl, groups, data, DEFAULT_CONTEXT)
    first = work.importance(vit, True, tmp_path, ProcessGroup()).scores
    (path,) = tmp_path.glob("scores-*.safetensors")
    assert all(
        torch.equal(first[n], score) for n, score in work.importance(vit, True, tmp_path, ProcessGroup()).scores.items()
    )
    assert list(tmp_path.iterdir()) == [path]  # found again, and no other files
    others = [
        replace(work, context=context(seed=1)),
        replace(work, batches=data[:2]),
        replace(work, criterion=taylor),
        replace(work, groups=groups[:1]),
    ]
    for other in others:
        other.importance(vit, True, tmp_path, ProcessGroup())
    with torch.no_grad():
        vit.head.bias[0] += 1
    changed = work.importance(vit, True, tmp_path, ProcessGroup()).scores
    assert len(list(tmp_path.iterdir())) == 6
    assert not torch.equal(changed["blocks.0.mlp"], first["blocks.0.mlp"])
    score_stage.clear_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scores_are_bit_identical_after_a_kill_and_resume_by_two_processes(vit: nn.Module, tmp_path: Path) -> None:
    victim = worker(tmp_path, 0.5)
    while done_in(tmp_path) < 2:
        assert victim.poll() is None
        time.sleep(0.02)
    victim.kill()
    assert victim.wait(60) == -9
    assert 2 <= done_in(tmp_path) < 5
    assert not (tmp_path / "scores.safetensors").exists()
    preloaded.run_together(2, "tests.support.score_worker", str(tmp_path), "0")
    assert done_in(tmp_path) == 5
    work = score_stage.ScoringJob(fisher_kl, find_groups(vit, ["ffn", "residual"]), batches(vit, 5, 2), DEFAULT_CONTEXT)
    result = load_file(tmp_path / "scores.safetensors")
    expected = work.importance(vit, True, tmp_path / "other", ProcessGroup()).scores
    assert all(torch.equal(result[name], score) for name, score in expected.items())


def test_the_score_stage_under_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project = project_in(tmp_path / "one", method="upvits-fisher", sparsity={"ffn": 0.5}, cycles=1)
    for stage in ORDER[:4]:
        monkeypatch.chdir(project)
        stages.run(stage, project)
    written = {path: sha256(path) for path in (project / "out" / "score").iterdir()}
    for path in written:
        path.unlink()
    command = [*TOGETHER, "-m", "vitprune.cli", "score", "-C", str(project)]
    subprocess.run(command, env={**ONE_THREAD, "VITPRUNE_DEVICE": "cpu"}, check=True, timeout=120)
    assert {path: sha256(path) for path in (project / "out" / "score").iterdir()} == written
    assert list((project / ".vitprune" / "partial").iterdir()) == []


def test_two_processes_divide_gradients_and_blocks(vit: nn.Module, tmp_path: Path) -> None:
    preloaded.run_together(2, "tests.support.cap_worker", str(tmp_path))
    for kind in KINDS:
        expected = ovit(vit, find_groups(vit, ["weight"])[:4], batches(vit, 3), setting_of(kind)).scores
        result = load_file(tmp_path / f"{kind}.safetensors")
        assert list(result) == sorted(expected)
        for name, score in expected.items():
            torch.testing.assert_close(result[name], score, rtol=1e-6, atol=0)
    score_stage.clear_partial(tmp_path / "partial")
    assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_block_scoring_resumes(
    vit: nn.Module, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start computes a few parts more; the result equals that of an uninterrupted run."""
    work = score_stage.ScoringJob(ovit, find_groups(vit, ["weight"])[:4], batches(vit, 3), setting_of(kind))
    monkeypatch.setattr(score_stage.PartialScoreStore, "due", lambda notebook: True)
    monkeypatch.setattr(gradients, "GRADIENTS_AT_ONCE", 1)
    expected = ovit(vit, work.groups, work.batches, work.context).scores
    remaining, add = [0], fisher_blocks.add_outer_products

    def breaking(total: torch.Tensor, values: torch.Tensor) -> None:
        if not remaining[0]:
            raise KeyboardInterrupt
        remaining[0] -= 1
        add(total, values)

    monkeypatch.setattr(fisher_blocks, "add_outer_products", breaking)
    starts, result = 0, None
    while result is None:
        remaining[0], starts = 7, starts + 1
        assert starts < 30
        with suppress(KeyboardInterrupt):
            result = work.importance(vit, False, tmp_path, ProcessGroup(), collective=True)
    assert starts > 3
    assert all(torch.equal(result.scores[name], score) for name, score in expected.items())


def test_criteria_that_are_not_sums_over_batches_use_one_process(vit: nn.Module, tmp_path: Path) -> None:
    work = score_stage.ScoringJob(magnitude, find_groups(vit, ["ffn"]), batches(vit), DEFAULT_CONTEXT)
    assert work.importance(vit, False, tmp_path, ProcessGroup()) is not None
    with pytest.raises(BadInput, match=r"^magnitude: its scores are no sums over images; use one process$"):
        work.importance(vit, False, tmp_path, ProcessGroup(0, 2))
    additive = {name for name, row in METHODS.items() if row.additive}
    assert {"taylor", "channel-taylor", "upvits", "upvits-literal", "upvits-exact", "upvits-fisher"} <= additive
    assert not {"random", "magnitude", "lamp", "dimap", "channel-magnitude"} & additive


@pytest.mark.parametrize("method", ["obc", "ovit"])
def test_layers_that_do_not_fit_a_pattern_and_are_ignored_have_no_quartiles(method, tmp_path, monkeypatch) -> None:
    ignored = [{"match": r"blocks\.\d\.(attn\..*|mlp\.fc1.*)", "ignore": True}]
    setting = {"method": method, "scope": "2:4", "sparsity": None, "kinds": None, "rules": ignored, "finetune": None}
    project = project_in(tmp_path / "project", **setting, cycles=1)
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["model"]["args"] |= {"embed_dim": 42, "num_heads": 3, "depth": 1}  # rows of 42 weights, and of 168 in fc2
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(project)
    for stage in ORDER[: ORDER.index("prune") + 1]:
        stages.run(stage, project)
    rows = tables.read_table(Path("out/score/summary.parquet"), tables.SCORES).to_pylist()
    assert {row["group"]: row["median"] is None for row in rows} == {
        f"blocks.0.{name}.weight": name != "mlp.fc2" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert all((row["max"] is None) == (row["mean"] is None) == (row["median"] is None) for row in rows)
