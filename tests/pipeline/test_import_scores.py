"""The authors' score lists, selected with merged heads, give the authors' index lists."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.index_lists import read_mask, removal_lists
from tests.support.model_zoo import VIT, tiny
from vitprune import BadInput, Group, find_groups, save, shrink
from vitprune.architectures import merge_heads
from vitprune.config.params import Params
from vitprune.pipeline import mask_stage
from vitprune.pipeline.import_scores import import_scores, read_all, read_scores
from vitprune.pruning.select import select


def write(path: Path, values: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{value}\n" for value in values))
    return path


def drawn(units: int, median: float, spread: float, seed: int, noise: float = 0.0) -> list[float]:
    """Return KL sums in the authors' format: log-normal float32, or noise around zero."""
    generator = torch.Generator().manual_seed(seed)
    values = median * torch.exp(spread * torch.randn(units, generator=generator))
    return (values - noise * torch.rand(units, generator=generator)).float().tolist()


def naive_list(scores: list[float], remove: int, runs: int = 1) -> list[int]:
    """Return the ranking in plain Python: stable sort of each run of consecutive units, lowest first."""
    size = len(scores) // runs
    positions = [range(run * size, (run + 1) * size) for run in range(runs)]
    return [unit for index in positions for unit in sorted(index, key=lambda at: scores[at])[: remove // runs]]


def test_scores_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ["0.25", "4.1e-05", "8.5e-06", "-7.9e-06", "1288.1", "-0.5", "3", "1e-05"])
    correct = [0.25, 4.1e-05, 8.5e-06, -7.9e-06, 1288.1, -0.5, 3.0, 1e-05]
    assert read_scores(path).tolist() == correct
    assert read_scores(path, "authors_compat").tolist() == [0.25, 5.0, 6.0, 6.0, 1288.1, 0.5, 3.0, 5.0]


def test_authors_parsing_misreads_exponents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ["0.3", "4.1e-05", "0.2", "8.5e-06", "0.1", "0.1"])
    result = {}
    for parsing in ("correct", "authors_compat"):
        scores = {"a": read_scores(path, parsing)}
        result[parsing] = removal_lists(scores, select(scores, 0.5, "layer"))["a"]
    assert result == {"correct": [3, 1, 4], "authors_compat": [4, 5, 2]}


def test_lists_of_merged_heads_by_hand() -> None:
    scores = {"attn": torch.tensor([[5.0, 1.0, 3.0, 2.0], [0.1, 0.4, 0.2, 0.2]])}
    masks = select(scores, 0.5, "head")
    assert removal_lists(scores, masks) == {"attn": [1, 3, 4, 6]}


@pytest.mark.parametrize("parsing", ["correct", "authors_compat"])
@pytest.mark.parametrize(("kept", "heads"), [(192, 3), (384, 6)], ids=["T", "S"])
def test_lists_of_deit_base(tmp_path: Path, kept: int, heads: int, parsing: str) -> None:
    """All 25 lists, with the spread of the released ones; the scores of the first block's FFN are almost pure noise."""
    lists: dict[str, list[float]] = {"residual": drawn(768, 1.06, 0.5, 0)}
    write(tmp_path / "importance/Deit_base_12_neck_768_kl_5k.txt", lists["residual"])
    write(tmp_path / "Deit_base_12_neck_768_kl_5k_192.txt", [1, 2, 3])  # an index list beside them is not read
    for block in range(12):
        attn, hidden = drawn(768, 0.01, 1.2, 1 + block), drawn(3072, 6.5e-4 * (block + 0.2), 1.5, 20 + block, 1e-5)
        lists |= {f"blocks.{block}.attn": attn, f"blocks.{block}.mlp": hidden}
        write(tmp_path / f"importance/Deit_base_12_attn_768_kl_{block}_5k.txt", attn)
        write(tmp_path / f"importance/Deit_base_12_ffn_3072_kl_{block}_5k.txt", hidden)
    with torch.device("meta"):
        base = timm.create_model("deit_base_patch16_224")
    groups = merge_heads(base, find_groups(base, ["residual", "attention", "ffn"]), heads)
    scores = read_all(tmp_path, groups, parsing)
    masks = masks_at(groups, scores, 1 - kept / 768)
    result = removal_lists(scores, masks)
    for group in groups:
        parsed = scores[group.name].flatten().tolist()
        assert result[group.name] == naive_list(
            parsed, group.units * (768 - kept) // 768, group.shape[0] if len(group.shape) > 1 else 1
        )
        again = read_mask(write(tmp_path / "index.txt", result[group.name]), group)
        assert torch.equal(again, masks[group.name])
        if parsing == "correct":
            assert parsed == lists[group.name]
    assert {len(runs(result[f"blocks.{block}.attn"], 768 // heads)) for block in range(12)} == {heads}
    shrink(base, groups, masks)
    assert sum(p.numel() for p in base.parameters()) == {192: 5_717_416, 384: 22_050_664}[kept]


def masks_at(groups: list[Group], scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for group in groups:
        masks |= select({group.name: scores[group.name]}, share, "head" if group.kind == "attention" else "layer")
    return masks


def runs(units: list[int], width: int) -> list[list[int]]:
    """Return the channels of each merged head, in list order."""
    result: list[list[int]] = []
    for unit in units:
        if not result or result[-1][-1] // width != unit // width:
            result.append([])
        result[-1].append(unit)
    return result


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["0.1", "high"], r"a.txt: line 2 is 'high', not a finite number"),
        (["nan"], r"a.txt: line 1 is 'nan', not a finite number"),
        (["0.1", "", "0.2"], r"a.txt: line 2 is '', not a finite number"),
        (["inf"], "not a finite number"),
    ],
)
def test_invalid_score_lists_are_refused(tmp_path: Path, lines: list[str], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        read_scores(write(tmp_path / "a.txt", list(lines)))


def test_missing_and_ambiguous_lists_are_named(tmp_path: Path, vit: nn.Module) -> None:
    groups = find_groups(vit, ["ffn"])
    with pytest.raises(BadInput, match=r"expected one list \*_ffn_192_kl_0_\*k.txt for blocks.0.mlp, found none$"):
        read_all(tmp_path, groups)
    write(tmp_path / "kl2k/tiny_ffn_192_kl_0_2k.txt", [1.0] * 192)
    write(tmp_path / "kl5k/tiny_ffn_192_kl_0_5k.txt", [1.0] * 191)
    with pytest.raises(BadInput, match=r"found several \(tiny_ffn_192_kl_0_2k.txt, tiny_ffn_192_kl_0_5k.txt\)"):
        read_all(tmp_path, groups)
    with pytest.raises(BadInput, match=r"0_5k.txt: 191 scores, but blocks.0.mlp has 192 units"):
        read_all(tmp_path / "kl5k", groups)
    with pytest.raises(BadInput, match=r"blocks.0.attn.heads: there are lists for residual, attention, ffn"):
        read_all(tmp_path, find_groups(vit, ["head"]))
    with pytest.raises(BadInput, match=r"nowhere.txt: no such file"):
        read_scores(tmp_path / "nowhere.txt")
    with pytest.raises(BadInput, match=r"^parsing 'loose': unknown; use one of correct, authors_compat$"):
        read_scores(tmp_path / "nowhere.txt", "loose")


@pytest.mark.parametrize("lines", [["0", "192"], ["3", "3"], ["-1"], ["0.5"]])
def test_an_index_list_of_another_group_is_refused(tmp_path: Path, vit: nn.Module, lines: list[str]) -> None:
    with pytest.raises(BadInput, match="each of 0 to 191 may be removed once"):
        read_mask(write(tmp_path / "a.txt", list(lines)), find_groups(vit, ["ffn"])[0])


def test_imported_scores_select_the_first_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"name": "vit_tiny_patch16_224", "args": VIT}
    prune = {"method": "upvits-literal", "kinds": ["ffn"], "sparsity": 0.5}
    settings = {"dataset": {"source": "digits"}, "model": model, "dense": {"start": "train"}, "prune": prune}
    params = Params.model_validate(settings)
    monkeypatch.chdir(tmp_path)
    save(tiny("vit").float(), tmp_path / "out/dense")
    lists = {f"blocks.{block}.mlp": drawn(192, 0.01, 1.0, block) for block in range(2)}
    for block in range(2):
        write(tmp_path / f"lists/tiny_ffn_192_kl_{block}_2k.txt", lists[f"blocks.{block}.mlp"])
    for method in ("upvits", "upvits-refit"):
        other = params.model_copy(update={"prune": params.prune.model_copy(update={"method": method})})
        with pytest.raises(
            BadInput, match=f"^prune.method {method}: computes scores of its own; set it to upvits-exact"
        ):
            import_scores(other, tmp_path / "lists", "correct")
    import_scores(params, tmp_path / "lists", "correct")
    mask_stage.run(params)
    masks = load_file("out/mask/masks.safetensors")
    for name, scores in lists.items():
        assert (~masks[name]).nonzero().flatten().tolist() == sorted(naive_list(scores, 96))
    facts = json.loads(Path("metrics/score.json").read_text())
    assert {"method": "upvits-literal", "lists": "lists", "parsing": "correct"}.items() <= facts.items()
