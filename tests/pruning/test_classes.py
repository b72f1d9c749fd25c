"""Pruning for some classes of a model: logits, labels, scores, saved models, refusals."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import vitprune
from tests.support.model_zoo import SMALL, VIT, batches, images, predict, redrawn, same_state, state, tiny
from tests.support.other_models import VIT as SIZES
from vitprune import (
    BadInput,
    PruneConfig,
    TrainConfig,
    accuracy,
    data,
    find_groups,
    load,
    load_into,
    prune,
    save,
    score,
)
from vitprune.architectures.classifier import keep_classes
from vitprune.data.class_subset import images_of_classes
from vitprune.runtime.kept_classes import kept_classes

CLASSES = [5, 0, 3]
IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


@pytest.mark.parametrize(
    "name", ["vit", "distilled", "swin", "pvt", "beit_base_patch16_224", "xcit_nano_12_p16_224", "convnext_atto"]
)
def test_the_outputs_are_those_of_the_classes_in_the_order_given(name: str) -> None:
    model = timm.create_model(name, num_classes=7, **SMALL[name]).eval() if name in SMALL else tiny(name)
    x = torch.randn_like(data.example_input(model, 2)).to(next(model.parameters()))
    expected = predict(model, x)[:, CLASSES]
    before = state(model)
    pruned = prune(model, "magnitude", sparsity=0.0, classes=CLASSES).model
    torch.testing.assert_close(predict(pruned, x), expected)
    assert (pruned.num_classes, kept_classes(pruned)) == (3, (5, 0, 3))
    assert same_state(model, before)


def test_the_second_head_of_volo_is_cut() -> None:
    model = redrawn(timm.create_model("volo_d1_224", num_classes=7, img_size=64), 0).eval()
    assert keep_classes(model, CLASSES).aux_head.out_features == 3


def test_a_new_classifier_has_classes_of_its_own(tmp_path: Path) -> None:
    cut = keep_classes(tiny("vit", dtype=torch.float32), CLASSES)
    cut.reset_classifier(6)
    assert kept_classes(cut) is None
    x = images(cut, 6).float()
    vitprune.finetune(cut, [(x, torch.arange(6))], TrainConfig(epochs=1, lr=0.001))
    assert set(accuracy(cut, [(x, torch.arange(6))])[1].tolist()) <= set(range(6))
    save(cut, tmp_path)
    assert kept_classes(load(tmp_path)) is None
    assert keep_classes(cut, [4, 1]).head.out_features == 2


@pytest.mark.parametrize("method", ["upvits", "upvits-fisher", "unit-obs", "obc", "ovit", "channel-taylor"])
def test_pruning_for_classes_equals_pruning_of_the_model_with_these_outputs(method: str) -> None:
    model = tiny("vit")
    given = batches(model, 4, 8)
    narrow = keep_classes(tiny("vit"), CLASSES)
    del narrow.vitprune_classes  # its labels are 0, 1 and 2
    position = {label: index for index, label in enumerate(CLASSES)}
    own = []
    for x, y in given:
        rows = [row for row, label in enumerate(y.tolist()) if label in position]
        own.append((x[rows], torch.tensor([position[int(y[row])] for row in rows])))
    settings = {"sparsity": 0.25, "correct_norms": True}
    result = prune(model, method, calibration=given, classes=CLASSES, **settings).model
    assert same_state(result, state(prune(narrow, method, calibration=own, **settings).model))
    assert not same_state(
        result, state(keep_classes(prune(model, method, calibration=given, **settings).model, CLASSES))
    )


def test_the_score_is_the_divergence_of_the_renormalized_logits() -> None:
    model = tiny("vit")
    x = images(model, 3)
    (group, *_) = find_groups(model, ["ffn"])
    scores = score(keep_classes(tiny("vit"), CLASSES), [group], "kl-literal", [x])[group.name]
    masks = {group.name: torch.arange(group.units) != 7}
    p, q = (
        predict(one, x).double().softmax(-1)[:, CLASSES] for one in (model, vitprune.zero(tiny("vit"), [group], masks))
    )
    p, q = (part / part.sum(dim=1, keepdim=True) for part in (p, q))
    assert float(scores[7]) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)


def test_images_of_other_classes_are_left_out_and_images_without_a_label_kept() -> None:
    x = torch.arange(6.0).view(6, 1, 1, 1)
    ((kept, labels),) = images_of_classes([(x, torch.tensor([2, 0, 4, -100, 1, 2]))], [4, 2])
    assert kept.flatten().tolist() == [0, 2, 3, 5]
    assert labels.tolist() == [1, 0, -100, 1]
    shares = torch.tensor([[0.5, 0, 0.25, 0, 0.25], [1, 0, 0, 0, 0]])
    ((kept, labels),) = images_of_classes([(x[:2], shares)], [4, 2])
    assert (kept.flatten().tolist(), labels.tolist()) == ([0], [[0.5, 0.5]])
    with pytest.raises(BadInput, match=r"^prune.classes: no calibration image is of these classes"):
        images_of_classes([(x, torch.tensor([0, 1, 3, 0, 1, 3]))], [4, 2])


def test_images_without_labels_are_used_as_given() -> None:
    model = tiny("vit")
    x = images(model, 8)
    narrow = keep_classes(tiny("vit"), CLASSES)
    result = prune(model, "unit-obs", sparsity=0.25, calibration=[x], classes=CLASSES).model
    assert same_state(result, state(prune(narrow, "unit-obs", sparsity=0.25, calibration=[x]).model))


def test_labels_and_predictions_of_the_pruned_model_are_classes_of_the_dense_model() -> None:
    model = tiny("vit")
    pruned = prune(model, "magnitude", sparsity=0.0, classes=CLASSES).model
    x = images(model, 8)
    best = torch.tensor(CLASSES)[predict(model, x)[:, CLASSES].argmax(dim=1)]
    metrics, predicted = vitprune.accuracy(pruned, [(x, best)])
    assert (metrics["top1"], predicted.tolist()) == (100.0, best.tolist())
    assert vitprune.evaluate(pruned, [(x, best)])["top1"] == 100.0
    with pytest.raises(BadInput, match=r"^batches\[0\]: label 1 is not among the classes .*\(5, 0, 3\); leave"):
        vitprune.evaluate(pruned, [(x, torch.ones_like(best))])


def test_finetuning_accepts_labels_and_a_teacher_of_all_classes() -> None:
    model = tiny("vit")
    config = PruneConfig(
        method="channel-taylor", sparsity=0.25, cycles=2, classes=CLASSES, finetune=TrainConfig(epochs=1, lr=1e-3)
    )
    loader = [(images(model, 4), torch.tensor([5, 0, 3, 0]))]
    result = vitprune.gradual_prune(model, config, loader, calibration=loader, teacher=model)
    assert (result.model.num_classes, model.num_classes) == (3, 7)


def test_a_saved_model_has_the_classes_and_loads_in_timm(tmp_path: Path) -> None:
    model = tiny("vit")
    model.pretrained_cfg = model.pretrained_cfg | {"num_classes": 7, "label_names": list("abcdefg")}
    pruned = prune(model, "magnitude", sparsity=0.5, classes=CLASSES).model
    save(pruned, tmp_path)
    loaded, plain = load(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(model)
    assert kept_classes(loaded) == (5, 0, 3)
    assert plain.num_classes == 3
    assert plain.pretrained_cfg["label_names"] == ["f", "a", "d"]
    assert predict(loaded, x).equal(predict(pruned, x))
    torch.testing.assert_close(predict(plain, x.float()), predict(pruned.float(), x.float()))
    save(loaded, tmp_path / "again")
    assert kept_classes(load(tmp_path / "again")) == (5, 0, 3)


@pytest.mark.parametrize("classes", ["[5, 5]", "[]", "[-1]", '["a"]', "5"])
def test_classes_of_an_untrusted_file_are_checked(classes: str, tmp_path: Path) -> None:
    save(prune(tiny("vit"), "magnitude", sparsity=0.5, classes=[5, 0, 3]).model, tmp_path)
    config = (tmp_path / "config.json").read_text().split('"classes"')[0]
    (tmp_path / "config.json").write_text(f'{config}"classes": {classes}}}}}')
    with pytest.raises(BadInput, match=r"config.json: vitprune.classes "):
        load(tmp_path)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_models_of_transformers_load_with_fewer_labels(name: str, tmp_path: Path) -> None:
    kind = getattr(transformers, name)
    names = {label: f"name {label}" for label in range(10)}
    model = kind(kind.config_class(**SIZES, id2label=names)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x).logits[:, CLASSES]
    pruned = prune(model, "channel-magnitude", sparsity={"ffn": 0.0}, classes=CLASSES).model
    save(pruned, tmp_path)
    assert pruned.config.id2label == {0: "name 5", 1: "name 0", 2: "name 3"}
    for loaded in (load(tmp_path), kind.from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            torch.testing.assert_close(loaded(x).logits, expected)
    assert kind.from_pretrained(tmp_path).config.id2label == {0: "name 5", 1: "name 0", 2: "name 3"}
    assert model.config.num_labels == 10
    assert kept_classes(load(tmp_path)) == (5, 0, 3)


class Own(nn.Module):
    """A classifier of a user-defined class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=10)
        self.image_size = 64

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


def test_user_defined_and_torchvision_models_load_with_fewer_outputs(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = redrawn(Own(), 0).eval()
    result = prune(own, "channel-magnitude", sparsity={"ffn": 0.25}, classes=CLASSES).model
    save(result, tmp_path / "own")
    loaded = load_into(Own(), tmp_path / "own")
    assert loaded(x).shape == (2, 3)
    assert loaded(x).equal(result(x))
    cut = keep_classes(redrawn(torchvision.models.get_model("mobilenet_v3_small"), 0), CLASSES)
    save(cut, tmp_path / "torchvision", factory="torchvision:mobilenet_v3_small")
    assert load(tmp_path / "torchvision").classifier[-1].out_features == 3


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], r"^prune.classes: name at least two classes to keep, or null for all"),
        ([1], r"^prune.classes: name at least two classes to keep, or null for all"),
        ([1, 2, 1], r"^prune.classes: 1 occurs twice; name every class once"),
        ([1, 7], r"^prune.classes: 7 is not a class; the model has the classes 0 to 6"),
        ([-1, 2], r"^prune.classes.0: Input should be greater than or equal to 0"),
    ],
)
def test_invalid_classes_are_refused(classes: list[int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        prune(tiny("vit"), "magnitude", sparsity=0.5, classes=classes)


@pytest.mark.parametrize("labels", [torch.eye(3), torch.arange(3.0), torch.zeros(3, 7, dtype=torch.int64)])
def test_labels_that_do_not_fit_the_classes_are_refused(labels: Tensor) -> None:
    model = tiny("vit")
    message = rf"^prune.classes: labels are {labels.dtype} of shape .*; give class indices .* of more than 5 classes$"
    for method in ("channel-taylor", "unit-obs"):
        with pytest.raises(BadInput, match=message):
            prune(model, method, sparsity=0.5, classes=CLASSES, calibration=[(images(model, 3), labels)])


def test_models_without_a_classifier_or_already_cut_are_refused() -> None:
    for changes in ({"num_classes": 0}, {"global_pool": ""}):
        model = timm.create_model("vit_tiny_patch16_224", **VIT | changes)
        with pytest.raises(BadInput, match=r"^prune.classes: VisionTransformer has no classifier \(its output: \(2, "):
            prune(model, "magnitude", sparsity=0.5, classes=[1, 2])
    pruned = prune(tiny("vit"), "magnitude", sparsity=0.5, classes=CLASSES).model
    with pytest.raises(BadInput, match=r"has already been cut to classes 5, 0, 3; give the dense model"):
        prune(pruned, "magnitude", sparsity=0.5, classes=[0, 1])


@pytest.mark.real
def test_ten_classes_of_imagenet(real_data: Path, real_deit: nn.Module) -> None:
    source = data.open_source(f"parquet:{real_data / 'imagenette-val-1000.parquet'}")
    transform = data.transform(data.data_config(real_deit))
    names = [name for row, name in enumerate(source.ids) if row % 25 == 0]
    labels = torch.tensor([source.labels[row] for row in range(len(source.ids)) if row % 25 == 0])
    x = torch.stack([transform.image(data.decode(source.read(name), transform.mode)) for name in names])
    assert set(labels.tolist()) <= set(IMAGENETTE)
    dense = keep_classes(copy.deepcopy(real_deit), IMAGENETTE)
    wide = predict(real_deit, x)
    torch.testing.assert_close(predict(dense, x), wide[:, IMAGENETTE], rtol=0, atol=1e-4)
    assert accuracy(dense, [(x, labels)])[0]["top1"] >= accuracy(real_deit, [(x, labels)])[0]["top1"]
    pruned = prune(real_deit, "unit-obs", sparsity={"ffn": 0.6}, calibration=[(x, labels)], classes=IMAGENETTE).model
    assert pruned.head.out_features == 10
    assert accuracy(pruned, [(x, labels)])[0]["top1"] >= 90
