"""Fine-tuning in Python: the teacher is not changed, and users' mistakes are refused in one line."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.utils import ModelEma, ModelEmaV3
from torch import Tensor, nn

import vitprune
from tests.support.model_zoo import SMALL, batches, predict, redrawn, tiny
from tests.support.other_models import make_model
from vitprune import BadInput, DistillConfig, TrainConfig

RECIPE = TrainConfig(epochs=1, lr=0.001)


def flags(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_the_teacher_is_not_changed(name: str) -> None:
    teacher = tiny("vit", dtype=torch.float32) if name == "timm" else make_model("vit")
    student = copy.deepcopy(teacher)
    teacher.train()
    next(teacher.parameters()).requires_grad_(False)
    before, weights = flags(teacher), {key: value.clone() for key, value in teacher.state_dict().items()}
    size = 32 if name == "timm" else 64
    loader = [(torch.randn(4, 3, size, size), torch.arange(4))]
    vitprune.finetune(student, loader, RECIPE, teacher)
    assert flags(teacher) == before
    assert all(torch.equal(value, weights[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_the_model_keeps_its_mode(training: bool) -> None:
    model = redrawn(timm.create_model("levit_128s", **SMALL["levit_128s"], num_classes=4), 0).train(training)
    model.head.eval()
    before, images = flags(model), torch.randn(4, 3, 64, 64)
    vitprune.finetune(model, [(images, torch.arange(4))], TrainConfig(epochs=1, lr=0.05))
    assert flags(model) == before
    if not training:  # attention biases that were cached before the training are not used; eval() drops them too
        with torch.no_grad():
            logits = model(images)
        assert torch.equal(logits, predict(model, images))


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        ModelEma,
        ModelEmaV3,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: copy.deepcopy(model).bfloat16(),
    ],
    ids=["DataParallel", "ModelEma", "ModelEmaV3", "compile", "bfloat16"],
)
def test_a_teacher_in_a_wrapper_or_of_another_type_teaches(wrap) -> None:
    teacher = tiny("vit", dtype=torch.float32)
    given = [(x.float(), y) for x, y in batches(teacher, 1)]
    direct, wrapped = copy.deepcopy(teacher), copy.deepcopy(teacher)
    with torch.no_grad():
        for student in (direct, wrapped):
            student.blocks[0].mlp.fc2.weight.mul_(0.5)
    vitprune.finetune(direct, given, RECIPE, teacher)
    vitprune.finetune(wrapped, given, RECIPE, wrap(teacher))
    for first, second in zip(direct.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0.05, atol=0.003)


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    model, other = tiny("vit", dtype=torch.float32), make_model("vit")
    given = [(x.float(), y) for x, y in batches(model, 1)]
    with pytest.raises(BadInput, match=r"^teacher: is the model that is trained; give the dense model, or a copy"):
        vitprune.finetune(model, given, RECIPE, nn.DataParallel(model))
    large = tiny("vit", dtype=torch.float32)
    large.set_input_size(img_size=(64, 64))
    with pytest.raises(BadInput, match=r"^teacher: VisionTransformer does not run on inputs of shape \(3, 32, 32\) \("):
        vitprune.finetune(model, given, RECIPE, large)
    pictures = [(torch.randn(2, 3, 64, 64), torch.arange(2))]
    with pytest.raises(
        BadInput, match=r"^distill.kind features: ViTForImageClassification is not a model of timm; use"
    ):
        vitprune.finetune(other, pictures, RECIPE, make_model("vit"), distillation=DistillConfig(kind="features"))


def test_a_frozen_model_is_refused() -> None:
    model = tiny("vit", dtype=torch.float32).requires_grad_(False)
    with pytest.raises(BadInput, match=r"^VisionTransformer: all parameters are frozen; call requires_grad_\(True\)"):
        vitprune.finetune(model, [(x.float(), y) for x, y in batches(model, 1)], RECIPE)


class Own(nn.Module):
    """A classifier that does not say how many classes it has, with tokens beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("vit", dtype=torch.float32)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(images), self.net.forward_features(images)


def test_a_class_of_ones_own_is_distilled() -> None:
    model, (images, labels) = Own(), batches(tiny("vit"), 1)[0]
    dense, given = copy.deepcopy(model), [(images.float(), labels)]
    vitprune.finetune(model, given, TrainConfig(epochs=1, lr=0.001, mixup=0.5), dense)
    assert not torch.equal(model.net.head.weight, dense.net.head.weight)
    assert not hasattr(model, "num_classes")
    with pytest.raises(BadInput, match=r"^loader\[0\]: label 7 is not a class; the model has the classes 0 to 6"):
        vitprune.finetune(model, [(images.float(), labels * 0 + 7)], RECIPE)


@pytest.mark.parametrize("build", [Own, lambda: tiny("vit")])
def test_an_empty_loader_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(BadInput, match=r"^loader: no images; give at least one batch$"):
        vitprune.finetune(build(), [], RECIPE)


@pytest.mark.parametrize(
    ("labels", "more", "message"),
    [
        (torch.rand(4, 5).softmax(1), {}, r"^labels: have shape \(4, 5\); \(4, 7\) is needed for these images$"),
        (torch.zeros(4, 2).long(), {}, r"^labels: have shape \(4, 2\); \(4,\) is needed for these images$"),
        (torch.zeros(4), {}, r"^labels: are torch.float64; give class indices as integers$"),
        (torch.rand(4, 7).softmax(1), {"mixup": 1.0}, r"^train.mixup, train.cutmix: labels are torch.float64 of shape"),
        (torch.tensor([0, 1, -100, 2]), {"mixup": 1.0}, r"^train.mixup, train.cutmix: label -100 is no class, so its"),
        (torch.tensor([0, 1, -100, 2]), {"cutmix": 1.0}, r"^train.mixup, train.cutmix: label -100 is no class, so its"),
    ],
)
def test_labels_that_cannot_be_trained_on_are_refused(labels: Tensor, more: dict, message: str) -> None:
    model = tiny("vit")
    labels = labels.double() if labels.is_floating_point() else labels
    with pytest.raises(BadInput, match=message):
        vitprune.finetune(model, [(batches(model, 1, 4)[0][0], labels)], TrainConfig(epochs=1, lr=0.001, **more))
