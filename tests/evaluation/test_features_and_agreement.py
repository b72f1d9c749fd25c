"""k-NN accuracy, cosine similarity, CKA and IoU, compared with values computed by hand; features of models."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import vitprune
from tests.support.model_zoo import VIT, batches, images, predict, redrawn, tiny
from tests.support.other_models import make_model
from vitprune import BadInput, evaluate, find_groups, prune, save
from vitprune.cli import app
from vitprune.data.batch_checks import first_image
from vitprune.evaluation.agreement import cosine, linear_cka, map_iou
from vitprune.evaluation.evaluate_saved import evaluate_saved
from vitprune.evaluation.nearest_neighbors import nearest_neighbors
from vitprune.evaluation.pooled_features import pooled_features


def angles(*degrees: float) -> Tensor:
    """Return vectors of several lengths at these angles."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1) * torch.arange(1.0, len(degrees) + 1)[:, None]


def test_votes_are_weighted_by_similarity() -> None:
    reference = angles(0, 20, 25), torch.tensor([0, 1, 1])
    # at 8 degrees: class 0 has exp(cos 8 / T), class 1 exp(cos 12 / T) + exp(cos 17 / T)
    query, label = angles(8), torch.tensor([1])
    votes = [[8], [12, 17]]
    for temperature, expected in ((0.07, 100.0), (0.005, 0.0)):
        shares = [sum(math.exp(math.cos(math.radians(a)) / temperature) for a in some) for some in votes]
        assert (shares[1] > shares[0]) == bool(expected)
        result = nearest_neighbors(query, label, reference, temperature=temperature)
        assert result == {"knn_top1": expected, "knn_top5": 100.0}
    assert nearest_neighbors(query, label, reference, neighbors=1)["knn_top1"] == 0.0


def test_without_a_reference_every_image_is_compared_with_the_others() -> None:
    features, labels = angles(0, 1, 90, 91), torch.tensor([0, 0, 1, 2])
    assert nearest_neighbors(features, labels, neighbors=1) == {"knn_top1": 50.0, "knn_top5": 50.0}
    assert nearest_neighbors(features, labels, (features, labels), neighbors=1)["knn_top1"] == 100.0


@pytest.mark.parametrize("classes", [3, 9])
def test_only_classes_with_votes_are_among_the_top_5(classes: int) -> None:
    reference = angles(10, 20, 30, 40), torch.tensor([classes, classes, 1, 1])
    queries = angles(*range(classes + 1))
    result = nearest_neighbors(queries, torch.arange(classes + 1), reference)
    assert result["knn_top5"] == pytest.approx(100 * 2 / (classes + 1))  # classes 1 and `classes`


def test_knn_equals_a_loop_over_images() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 8, generator=generator), torch.randint(4, (60,), generator=generator)
    right = 0
    for row in range(60):
        similarity = F.cosine_similarity(features, features[row : row + 1], dim=1).tolist()
        order = sorted((other for other in range(60) if other != row), key=lambda other: -similarity[other])[:20]
        votes = [0.0] * 4
        for other in order:
            votes[int(labels[other])] += math.exp(similarity[other] / 0.07)
        right += votes.index(max(votes)) == int(labels[row])
    assert nearest_neighbors(features, labels)["knn_top1"] == pytest.approx(100 * right / 60)


def test_cosine_and_cka_by_hand() -> None:
    assert cosine(angles(0, 0), angles(60, 90)) == pytest.approx(0.25)
    x, y = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    # x'y = (2, 1), x'x = 2, y'y = [[2, 1], [1, 2]]: 5 / (2 sqrt 10)
    assert linear_cka(x, y) == pytest.approx(5 / (2 * math.sqrt(10)))
    rotation = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]
    assert linear_cka(y, 3 * y @ rotation + 5) == pytest.approx(1)
    with pytest.raises(BadInput, match=r"^cosine: the features have 1 channels, those of the dense model 2; use cka"):
        cosine(x, y)
    with pytest.raises(BadInput, match=r"^cka: the features of all images are equal"):
        linear_cka(torch.ones(3, 2), y)


class Map(nn.Module):
    """Return the first channels of the image, moved by some columns."""

    def __init__(self, channels: int, moved: int = 0) -> None:
        super().__init__()
        self.scale, self.channels, self.moved = nn.Parameter(torch.ones(())), channels, moved

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * images[:, : self.channels].roll(self.moved, dims=3)


def test_iou_by_hand() -> None:
    x = torch.full((3, 3, 1, 4), -1.0)
    x[0, 0, 0, :2] = 1.0  # shifted by one: one of three positions in common
    x[1, 0, 0, :] = 1.0  # all in common
    dense, moved = Map(1), Map(1, 1)
    assert map_iou(moved, dense, [x]) == pytest.approx((1 / 3 + 1) / 2)
    with pytest.raises(BadInput, match=r"^iou: no image has an output above the threshold 2; give another"):
        map_iou(moved, dense, [x], threshold=2.0)
    classes = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])  # of the positions; class 2 does not occur
    y = torch.stack([1 - classes, classes, torch.full_like(classes, -1)], dim=1)
    # class 0: {0, 1} and {1, 2}, class 1: {2, 3} and {3, 0}
    assert map_iou(Map(3, 1), Map(3), [y]) == pytest.approx(1 / 3)
    with pytest.raises(BadInput, match=r"^iou: the maps have shapes"):
        map_iou(Map(3), Map(1), [y])
    with pytest.raises(BadInput, match=r"^iou: the output is no map \(B, C, H, W\) but \(3, 7\)"):
        map_iou(tiny("vit"), tiny("vit"), [images(tiny("vit"))])


def test_features_are_the_inputs_of_the_classifier() -> None:
    for name in ("vit", "swin", "pvt"):
        model = tiny(name)
        features, labels = pooled_features(model, batches(model))
        head = model.get_classifier()
        torch.testing.assert_close(head(features.double()), predict(model, torch.cat([x for x, _ in batches(model)])))
        assert labels.tolist() == [0, 1, 2, 1, 2, 3]
    encoder = redrawn(timm.create_model("vit_tiny_patch16_224", **VIT | {"num_classes": 0}), 0)
    x = images(encoder)
    assert pooled_features(encoder, [x])[0].equal(predict(encoder, x))


def test_features_of_models_of_transformers() -> None:
    x = torch.randn(2, 3, 64, 64)
    classifier = make_model("vit")
    with torch.no_grad():
        hidden = classifier.vit(x).last_hidden_state
        assert pooled_features(classifier, [x])[0].equal(hidden[:, 0])
        siglip = make_model("siglip")
        assert pooled_features(siglip, [x])[0].equal(siglip(x).last_hidden_state.mean(dim=1))
        features = make_model("vit features")
        assert pooled_features(features, [x])[0].equal(features(x).last_hidden_state[:, 0])


def test_evaluate_has_all_metrics() -> None:
    model, loader = tiny("vit"), batches(tiny("vit"), 4, 8)
    pruned = prune(model, "channel-magnitude", sparsity={"ffn": 0.5}).model
    macs = vitprune.count(pruned, images(model)).macs
    only = [x for x, _ in loader]
    results = {
        metric: evaluate(pruned, only if metric in ("cosine", "cka") else loader, metric, dense=model)
        for metric in ("accuracy", "knn", "cosine", "cka")
    }
    assert {"top1", "top5", "macs"} <= results["accuracy"].keys()
    assert all(result["macs"] == macs for result in results.values())
    first, second = (pooled_features(one, loader)[0] for one in (pruned, model))
    assert results["cosine"]["cosine"] == cosine(first, second) < evaluate(model, only, "cosine", dense=model)["cosine"]
    assert results["cka"]["cka"] == linear_cka(first, second)
    assert results["knn"]["knn_top1"] == nearest_neighbors(*pooled_features(pruned, loader))["knn_top1"]
    assert evaluate(model, loader, "knn", reference=loader)["knn_top5"] == 100.0
    narrow = prune(model, "channel-magnitude", sparsity={"residual": 0.25}).model
    assert evaluate(narrow, only, "cka", dense=model)["cka"] < 1


def test_labels_of_knn_are_not_those_of_the_classifier() -> None:
    model = tiny("vit")
    pruned = prune(model, "magnitude", sparsity=0.0, classes=[5, 3]).model
    loader = [(x, y + 100) for x, y in batches(model)]
    assert set(evaluate(pruned, loader, "knn")) > {"knn_top1", "knn_top5"}


def test_invalid_calls_are_refused(vit: nn.Module) -> None:
    x, y = batches(vit)[0]
    soft, refused = torch.eye(7, dtype=torch.float64)[y], r"^knn: {} have labels {} of shape \({}\); give class indices"
    for call, message in (
        (lambda: evaluate(vit, [(x, soft)], "knn"), refused.format("batches", "torch.float64", "3, 7")),
        (lambda: evaluate(vit, [(x, y)], "knn", reference=[(x, soft)]), refused.format("reference", ".*64", "3, 7")),
        (lambda: evaluate(vit, [(x, y)], "knn", reference=[(x, y.float())]), refused.format("reference", ".*32", "3,")),
        (
            lambda: evaluate(vit, [(x, y), (x, soft)], "knn"),
            r"^batches: have labels of several shapes; give class",
        ),
        (lambda: evaluate(vit, [(x, y[:, None])], "knn"), refused.format("batches", "torch.int64", "3, 1")),
        (
            lambda: evaluate(vit, [(x, y)], "knn", reference=[x]),
            r"^knn: every image .* \(images, labels\) as reference$",
        ),
        (lambda: evaluate(vit, [(x, y)], "top1"), r"^metric 'top1': unknown; use one of accuracy, knn, cosine"),
        (lambda: evaluate(vit, [x], "cka"), r"^metric 'cka': compares with the dense model; give dense"),
        (lambda: evaluate(vit, [x], "knn"), r"^knn: every image needs a label; give pairs"),
        (lambda: evaluate(vit, [], "knn"), r"^batches: no images; give at least one batch"),
        (lambda: evaluate(vit, [(x[:1], y[:1])], "knn"), r"^knn: 0 images to compare with"),
    ):
        with pytest.raises(BadInput, match=message):
            call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"^batches: no images; give at least one batch$"),
        ([{"pixels": 1}], r"^batches\[0\]: is a dict; give pairs"),
        ({"images": torch.zeros(2, 3, 64, 64)}, r"^batches: is a dict; give a list"),
    ],
)
def test_batches_of_a_model_of_another_library_are_checked(given: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        evaluate(make_model("vit"), given)


def test_a_look_at_the_first_image_draws_no_random_number() -> None:
    model, pairs = make_model("vit"), [(torch.zeros(3, 64, 64), index) for index in range(4)]
    loader = DataLoader(pairs, batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    assert first_image(loader, model, "loader").shape == (1, 3, 64, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command_evaluates_a_saved_model_on_a_folder(tmp_path: Path) -> None:
    model = tiny("vit", dtype=torch.float32)
    save(model, tmp_path / "dense")
    save(vitprune.shrink(model, groups := find_groups(model, ["ffn"]), half(groups)), tmp_path / "pruned")
    for index in range(8):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * index, 0, 200 * (index % 2))).save(path)
    command = ["evaluate", str(tmp_path / "pruned"), "--data", f"folder:{tmp_path / 'photos'}"]

    def output(*words: str) -> dict:
        return json.loads(CliRunner().invoke(app, [*command, *words], catch_exceptions=False).stdout)

    assert output()["top5"] >= output()["top1"]
    assert output("--metric", "knn")["knn_top5"] == 100.0
    agreement = output("--metric", "cka", "--dense", str(tmp_path / "dense"))
    assert 0 < agreement["cka"] < 1
    for words, message in (
        (["evaluate", "--metric", "knn"], "^--data, --metric and --dense: evaluate one saved model"),
        (command[:2], "^--data: give the images to evaluate on"),
        (
            [*command[:2], "--data", str(tmp_path / "photos")],
            rf"^--data: '.*' is unknown; did you mean folder:{tmp_path}/",
        ),
    ):
        with pytest.raises(BadInput, match=message):
            CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.mark.parametrize("content", [b"no image", None], ids=["broken", "missing"])
def test_an_image_of_a_source_that_cannot_be_decoded_is_named(tmp_path: Path, content: bytes | None) -> None:
    save(tiny("vit", dtype=torch.float32), tmp_path / "model")
    for index in range(4):
        path = tmp_path / "my photos" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * index, 0, 0)).save(path)
    if content is None:
        path.unlink()
        path.symlink_to(tmp_path / "gone.png")
        why = "No such file or directory"
    else:
        path.write_bytes(content)
        why = "no image of a known format"
    source = f"folder:{tmp_path / 'my photos'}"
    message = rf"^b/3\.png: cannot be decoded \({why}\); repair it, or remove it from {source}$"
    with pytest.raises(BadInput, match=message):
        evaluate_saved(tmp_path / "model", source)


def half(groups: list) -> dict[str, Tensor]:
    """Return masks that keep every second unit."""
    return {group.name: torch.arange(group.units) % 2 == 0 for group in groups}


def test_macs_of_a_model_without_a_size_are_those_of_its_images() -> None:
    model = tiny("vit", dtype=torch.float32)
    given = [(x.float(), y) for x, y in batches(model)]
    of_timm, own = evaluate(model, given), evaluate(nn.Sequential(nn.Identity(), model), given)
    assert own == of_timm
