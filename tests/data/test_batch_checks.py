"""Batches of a user: converted if that is exact, otherwise refused in one line that names the batch."""

import pytest
import torch
from torch import Tensor, nn

import vitprune
from tests.support.model_zoo import batches, images, same_state, state
from vitprune import METHODS, BadInput, TrainConfig

X, Y = torch.zeros(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 6])
WRONG = {
    "no list": (3, r"^calibration: is a int; give a list or a DataLoader of pairs"),
    "one tensor": (X, r"^calibration: is a Tensor; give a list"),
    "a pair instead of pairs": ((X, Y), r"^calibration\[0\]: is a Tensor; give pairs"),
    "labels alone": ([Y], r"^calibration\[0\]: has shape \(2,\); give images"),
    "a mapping": ([{"pixel_values": X, "labels": Y}], r"^calibration\[0\]: is a dict; give pairs"),
    "three parts": ([(X, Y, Y)], r"^calibration\[0\]: is a tuple of 3; give pairs"),
    "an image without a batch": ([(X[0], Y[:1])], r"^calibration\[0\]: has shape \(3, 32, 32\); give images"),
    "an empty batch": ([(X, Y), (X[:0], Y[:0])], r"^calibration\[1\]: has shape \(0, 3, 32, 32\); give images"),
    "bytes": ([(X.byte(), Y)], r"^calibration\[0\]: images are torch.uint8; convert them to floating point and norm"),
    "another size": ([(torch.zeros(2, 3, 40, 40), Y)], r"^calibration\[0\]: VisionTransformer does not run on .*40"),
    "gray": ([(X[:, :1], Y)], r"^calibration\[0\]: VisionTransformer does not run on inputs of shape \(1, 32, 32\)"),
    "infinite": ([(X / 0, Y)], r"^calibration\[0\]: has pixels that are not finite"),
    "fewer labels": ([(X, Y[:1])], r"^calibration\[0\]: 2 images and 1 labels; give one label per image"),
    "names": ([(X, ("cat", "dog"))], r"^calibration\[0\]: labels must be a tensor of class indices"),
    "sparse": ([(X.to_sparse(), Y)], r"^calibration\[0\]: is a tensor torch.sparse_coo; give a dense tensor with"),
    "without values": ([(X.to("meta"), Y)], r"^calibration\[0\]: is a tensor on the meta device; give a dense"),
    "no probabilities": ([(X, torch.ones(2, 7))], r"^calibration\[0\]: labels are no probabilities; give class"),
    "negative": ([(X, torch.tensor([[2.0, -1], [0, 1]]))], r"^calibration\[0\]: labels are no probabilities"),
    "not a number": ([(X, torch.full((2, 7), torch.nan))], r"^calibration\[0\]: labels are no probabilities"),
    "arrays": ([(X, Y.numpy())], r"^calibration\[0\]: labels must be a tensor of class indices \(B,\), not ndarray"),
    "one label": ([(X, 3)], r"^calibration\[0\]: labels must be a tensor of class indices \(B,\), not int"),
}
LABELS = {
    "unlabeled": (
        torch.tensor([-100, -100]),
        r"^labels: these images have no label \(-100\); give pairs \(images, labels\), with the classes 0 to 6",
    ),
    "one too large": (torch.tensor([0, 7]), r"^labels: 7 is not a class"),
    "of another shape": (torch.full((2, 3), 1 / 3), r"^labels: have shape \(2, 3\); \(2, 7\) is needed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_batch_is_named(vit: nn.Module, name: str) -> None:
    given, message = WRONG[name]
    for method in ("channel-taylor", "corp", "magnitude"):
        with pytest.raises(BadInput, match=message):
            vitprune.prune(vit, method, sparsity=0.25, calibration=given)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("method", ["channel-taylor", "ovit", "fastcap"])
def test_labels_must_be_classes_for_methods_that_use_them(vit: nn.Module, name: str, method: str) -> None:
    labels, message = LABELS[name]
    with pytest.raises(BadInput, match=message):
        vitprune.prune(vit, method, sparsity=0.25, calibration=[(images(vit, 2), labels)])
    vitprune.prune(vit, "corp", sparsity=0.25, calibration=[(images(vit, 2), labels)])


def _refusal(model: nn.Module, method: str, calibration: list) -> str:
    """Return why a method refuses its images; empty if it takes them."""
    try:
        vitprune.prune(model, method, sparsity=0.5, calibration=calibration)
    except BadInput as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", METHODS)
def test_methods_with_labels_refuse_a_model_without_classifier(vit: nn.Module, method: str) -> None:
    data = batches(vit, 2, 4)
    needs_labels = _refusal(vit, method, [given for given, _ in data]).startswith("labels: these images have no label")
    vit.reset_classifier(0)
    assert _refusal(vit, method, data) == needs_labels * (
        "VisionTransformer: has no classifier (num_classes is 0) for the labels; give it one, or use a method without "
        "labels, such as unit-obs or obc"
    )


def test_accuracy_and_fine_tuning_refuse_a_model_without_classifier(vit: nn.Module) -> None:
    data = batches(vit, 2, 4)
    vit.reset_classifier(0)
    for call in (
        lambda: vitprune.accuracy(vit, data),
        lambda: vitprune.evaluate(vit, data),
        lambda: vitprune.finetune(vit, data, TrainConfig(epochs=1, lr=0.001)),
        lambda: vitprune.finetune(torch.nn.DataParallel(vit), data, TrainConfig(epochs=1, lr=0.001), teacher=vit),
    ):
        with pytest.raises(
            BadInput, match=r"^VisionTransformer: has no classifier \(num_classes is 0\) for the labels; "
        ):
            call()
    assert vitprune.evaluate(vit, data, "knn")["knn_top5"] > 0


def test_equal_scores_are_refused(vit: nn.Module) -> None:
    with torch.no_grad():
        vit.head.weight.zero_()
    with pytest.raises(
        BadInput, match=r"^ffn: all 384 scores are 0 and rank nothing; check weights, images and labels"
    ):
        vitprune.prune(vit, "channel-taylor", sparsity={"ffn": 0.5}, calibration=batches(vit))
    with pytest.raises(BadInput, match=r"^ffn: all 384 scores are 0"):
        vitprune.score(vit, vitprune.find_groups(vit, ["ffn"]), "taylor", batches(vit))


def test_a_shuffled_loader_is_read_once(vit: nn.Module) -> None:
    data = torch.utils.data.TensorDataset(images(vit, 8), torch.arange(8) % 7)

    def pruned() -> nn.Module:
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
        given = loader if not reads else list(loader)
        return vitprune.prune(vit, "upvits", sparsity=0.25, calibration=given).model

    reads: list[Tensor] = []
    first = pruned()
    reads.append(X)
    assert same_state(pruned(), state(first))


def test_other_types_of_images_and_labels_are_converted(vit: nn.Module) -> None:
    expected = vitprune.prune(vit, "channel-taylor", sparsity=0.25, calibration=batches(vit)).model
    for change in (
        lambda x, y: (x, y.int()),
        lambda x, y: [x, y.tolist()],
        lambda x, y: (x, nn.functional.one_hot(y, 7).double()),
    ):
        given = [change(*batch) for batch in batches(vit)]
        pruned = vitprune.prune(vit, "channel-taylor", sparsity=0.25, calibration=given).model
        assert same_state(pruned, state(expected))
    single = [(x.float(), y) for x, y in batches(vit)]
    vitprune.prune(vit, "channel-taylor", sparsity=0.25, calibration=single)


def test_images_without_labels_give_the_same_result_if_the_method_uses_none(vit: nn.Module) -> None:
    first, second = (
        vitprune.prune(vit, "unit-obs", sparsity={"ffn": 0.25}, calibration=given).model.state_dict()
        for given in ([(X, Y)], [X])
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(
        BadInput, match=r"^labels: these images have no label \(-100\); give pairs .*, with the classes 0 to 6, or "
    ):
        vitprune.prune(vit, "channel-taylor", sparsity=0.25, calibration=[X])


def test_class_indices_of_a_floating_point_type_are_refused(vit: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^labels: are torch.float32; give class indices as integers$"):
        vitprune.prune(vit, "channel-taylor", sparsity=0.25, calibration=[(X, Y.float())])


@pytest.mark.parametrize("batch", [{"pixel_values": X}, X.numpy()])
def test_batches_of_another_type_are_refused_with_both_forms(vit: nn.Module, batch: object) -> None:
    with pytest.raises(BadInput, match=r"^calibration\[0\]: is a .*; give pairs, as in \[.*\], or tensors of images$"):
        vitprune.prune(vit, "unit-obs", sparsity=0.25, calibration=[batch])


def test_images_that_are_not_normalized_are_warned_of(vit: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    vitprune.prune(vit, "unit-obs", sparsity=0.25, calibration=[255 * torch.rand(2, *X.shape[1:])])
    warning = "warning: calibration[0]: has pixels from 0 to 25"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(warning)]
    assert line.endswith("; normalize the images as for the training")
