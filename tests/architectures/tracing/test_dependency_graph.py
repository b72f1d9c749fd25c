"""Channel groups of the tracer against reference groups and against small networks with known coupling."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import reference_groups
from tests.support.model_zoo import ZOO, images, tiny
from vitprune import BadInput, find_groups
from vitprune.architectures.causal_lm import Decoder
from vitprune.architectures.tracing.dependency_graph import ChannelGraph, ChannelGroup, run_trace
from vitprune.architectures.tracing.recorded_run import record_run
from vitprune.groups import Group, ParamSlice, meta_copy, positions, reordered_positions, shrink, unit_sums, zero

Slice = tuple[str, int | None, int, int]


def channel_groups(model: nn.Module, inputs: Tensor) -> list[ChannelGroup]:
    """Return all groups of coupled channels of a model."""
    return ChannelGraph(run_trace(record_run(model, inputs)), model).groups()


def where(result: ChannelGroup) -> set[Slice]:
    return {(part.param, part.axis, part.outer, part.inner) for part in result.slices + result.buffers}


@pytest.mark.parametrize("name", [*ZOO, "decoder"])
def test_residual_groups_equal_the_reference(name: str) -> None:
    model = Decoder(11, 8, width=12, depth=2, heads=3) if name == "decoder" else tiny(name)
    reference = getattr(reference_groups, name.partition("-")[0], reference_groups.vit)(model)
    result = {group.name: (group.units, set(group.slices)) for group in find_groups(model, ["residual"])}
    assert list(result) == list(reference)
    assert result == reference


@pytest.mark.parametrize("name", ["vit", "thin", "odd", "extra", "distilled", "swin", "pvt", "pvt-linear"])
@pytest.mark.parametrize("kind", ["residual", "ffn"])
def test_tracer_finds_the_groups_of_find_groups(name: str, kind: str) -> None:
    model = tiny(name)
    result = [one for one in channel_groups(model, images(model)[:1]) if not one.why_not]
    for group in find_groups(model, [kind]):
        slices = {(part.param, part.axis, part.outer, part.inner) for part in group.slices}
        (same,) = [one for one in result if where(one) == slices]
        assert same.units == group.units
        assert same.kind == ("ffn" if group.name.endswith(".sr") else kind)


class Squeezed(nn.Module):
    """A stem, a residual bottleneck with a depth-wise convolution and a gate, and two concatenated maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand, self.bn = nn.Conv2d(6, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.down, self.up = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)
        self.project = nn.Conv2d(10, 6, 1)
        self.side = nn.Conv2d(6, 5, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(12, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        hidden = self.depthwise(F.relu(self.bn(self.expand(x))))
        gate = self.up(F.relu(self.down(hidden.mean((2, 3), keepdim=True)))).sigmoid()
        x = x + self.scale * self.project(hidden * gate)
        both = torch.cat([x, x.flip(2)], dim=1)
        self.side(x)
        output: Tensor = self.head(both.mean((2, 3)))
        return output


def test_channel_groups_of_a_bottleneck_network() -> None:
    residual, hidden, inner, side, output = channel_groups(Squeezed(), torch.randn(1, 3, 8, 8))
    assert (residual.kind, residual.units, residual.why_not) == ("residual", 6, "")
    assert where(residual) == {
        *[("stem.weight", 0, 1, 1), ("stem.bias", 0, 1, 1), ("project.weight", 0, 1, 1), ("project.bias", 0, 1, 1)],
        *[("expand.weight", 1, 1, 1), ("side.weight", 1, 1, 1), ("head.weight", 1, 2, 1)],
    }
    assert residual.writers == ("stem.weight", "project.weight")
    assert (hidden.kind, hidden.units, hidden.why_not) == ("ffn", 10, "")
    assert {part.param for part in hidden.buffers} == {"bn.running_mean", "bn.running_var"}
    assert {part.param for part in hidden.slices} == {
        *["expand.weight", "bn.weight", "bn.bias", "depthwise.weight", "depthwise.bias"],
        *["down.weight", "up.weight", "up.bias", "project.weight"],
    }
    assert where(inner) == {("down.weight", 0, 1, 1), ("down.bias", 0, 1, 1), ("up.weight", 1, 1, 1)}
    assert where(side) == {("side.weight", 0, 1, 1), ("side.bias", 0, 1, 1)}
    assert output.why_not == "Squeezed: it is the output of the model"


class One(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.last(self.between(self.first(image)))
        return output


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(dim=1).values


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (nn.Softmax(dim=1), "between (Softmax): softmax runs over it"),
        (nn.GroupNorm(4, 8), "between (GroupNorm): a GroupNorm of 4 groups counts its channels"),
        (nn.Conv2d(8, 8, 1, groups=2), "between (Conv2d): it runs through a convolution of 2 groups"),
        (
            nn.ConvTranspose2d(8, 8, 1, groups=2),
            "between (ConvTranspose2d): it runs through a transposed convolution of 2 groups",
        ),
        (Sorted(), "between (Sorted): operation sort is not supported"),
    ],
)
def test_unprunable_channels_give_the_reason(between: nn.Module, why: str) -> None:
    result = channel_groups(One(between), torch.randn(1, 3, 4, 4))
    assert next(one for one in result if "first.weight" in one.writers).why_not == why


@pytest.mark.parametrize(
    "between",
    [
        nn.GroupNorm(1, 8),
        nn.ReLU(),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.GELU()),
        nn.ConvTranspose2d(8, 8, 2, 2),
        nn.ConvTranspose2d(8, 8, 2, 2, groups=8),
    ],
)
def test_prunable_channels_give_no_reason(between: nn.Module) -> None:
    result = channel_groups(One(between), torch.randn(1, 3, 4, 4))
    hidden = next(one for one in result if "first.weight" in one.writers)
    assert (hidden.why_not, hidden.units) == ("", 8)
    reader = "between.weight" if getattr(between, "groups", 0) == 1 else "last.weight"
    assert {"first.weight", "first.bias", reader} <= {part.param for part in hidden.slices}


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("convnext_atto", [40, 80, 160, 320]),
        ("poolformer_s12", [64, 128, 320, 512]),
        ("resnet50", [256, 512, 1024, 2048]),
    ],
)
def test_residual_streams_of_hierarchical_models(name: str, widths: list[int]) -> None:
    model = timm.create_model(name, pretrained=False).eval()
    result = [
        one for one in channel_groups(model, torch.randn(1, 3, 64, 64)) if one.kind == "residual" and not one.why_not
    ]
    assert [one.units for one in result] == widths


def test_padding_with_infinity_keeps_the_channels() -> None:
    model = One(nn.ConstantPad2d(1, float("-inf")))
    assert channel_groups(model, torch.randn(1, 3, 4, 4))[0].why_not == ""


class Late(nn.Module):
    """A scale is applied to two concatenated kinds of token, whose channels are coupled by a later operation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.write, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 6), nn.Linear(6, 2)
        self.gamma = nn.Parameter(torch.ones(6))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)  # (B, N, 6)
        x = x + self.gamma * torch.cat([self.write(x[:, :1]), x[:, 1:]], dim=1)
        output: Tensor = self.head(x.mean(1))
        return output


def test_a_scale_over_concatenated_tokens_is_coupled_with_the_stream() -> None:
    stream = channel_groups(Late(), torch.randn(1, 3, 8, 8))[0]
    assert (stream.kind, stream.units, stream.why_not) == ("residual", 6, "")
    assert ("gamma", 0, 1, 1) in where(stream)


class Doubled(nn.Module):
    """A depth-wise convolution writes two channels for each one, and a convolution over stacked maps mixes the maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twofold = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)
        self.write, self.mix, self.head = nn.Linear(8, 8), nn.Conv1d(2, 1, 1), nn.Linear(8, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.twofold(self.stem(image)).mean((2, 3))
        x = x + self.write(x)
        output: Tensor = self.head(self.mix(torch.stack([x, x], dim=1))[:, 0])
        return output


def test_depthwise_convolution_with_multiplier_two() -> None:
    stream = next(one for one in channel_groups(Doubled(), torch.randn(1, 3, 8, 8)) if one.kind == "residual")
    assert (stream.units, stream.why_not) == (4, "")
    assert where(stream) == {
        *[("stem.weight", 0, 1, 1), ("stem.bias", 0, 1, 1), ("twofold.weight", 0, 1, 2), ("twofold.bias", 0, 1, 2)],
        *[("write.weight", 0, 1, 2), ("write.bias", 0, 1, 2), ("write.weight", 1, 1, 2), ("head.weight", 1, 1, 2)],
    }


@pytest.mark.parametrize("name", ["vit", "swin", "pvt-linear"])
def test_trace_on_the_meta_device_is_equal(name: str) -> None:
    model = tiny(name)
    inputs = images(model)[:1]
    assert channel_groups(meta_copy(model), inputs.to("meta")) == channel_groups(model, inputs)


class Unequal(nn.Module):
    """One layer has two rows for each of two units, and then one more row for each."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Linear(3, 6), nn.Linear(2, 2)

    def forward(self, image: Tensor) -> Tensor:
        rows = self.rows(image.mean((2, 3)))
        pairs, single = rows.split([4, 2], dim=1)
        first, second = pairs.reshape(-1, 2, 2).unbind(2)
        output: Tensor = self.head(first * single + second * single)
        return output


def test_units_at_a_part_of_an_axis() -> None:
    part = ParamSlice("rows.weight", 0, inner=2, start=1)
    assert positions(part, torch.tensor([False, True])).tolist() == [3, 4]
    assert reordered_positions(part, torch.tensor([1, 0]), 6).tolist() == [0, 3, 4, 1, 2, 5]
    layer = nn.Sequential(nn.Linear(3, 6), nn.ReLU())
    group = Group("units", "ffn", (2,), (ParamSlice("0.weight", 0, inner=2, start=1), ParamSlice("0.bias", 0, 1, 2)))
    with pytest.raises(BadInput, match=r"^0.bias: axis 0 is 6 long, the group is out of date"):
        shrink(layer, [group], {"units": torch.tensor([False, True])})
    group = Group("units", "ffn", (2,), (ParamSlice("0.weight", 0, inner=2, start=1),))
    other = Group("others", "ffn", (1,), (ParamSlice("0.weight", 0, start=5),))
    third = Group("third", "ffn", (2,), (ParamSlice("0.weight", 0, start=4),))
    masks = {"units": torch.tensor([False, True]), "others": torch.tensor([True]), "third": torch.tensor([True, True])}
    with pytest.raises(BadInput, match=r"^0.weight: groups units and third cut the same axis; "):
        shrink(layer, [group, third], masks)
    weight = layer[0].weight
    assert torch.equal(shrink(layer, [group, other], masks)[0].weight, weight[[0, 3, 4, 5]])


def test_units_with_repetitions_of_different_widths() -> None:
    model, image = Unequal(), torch.randn(2, 3, 4, 4)
    part = ParamSlice("rows.weight", 0, segments=(2, 1))
    assert part.length == 3
    assert positions(part, torch.tensor([False, True])).tolist() == [2, 3, 5]
    assert reordered_positions(part, torch.tensor([1, 0]), 6).tolist() == [2, 3, 0, 1, 5, 4]
    found = next(one for one in channel_groups(model, image[:1]) if ("head.weight", 1, 1, 1) in where(one))
    slices = {one.param: one for one in found.slices}
    assert slices["rows.weight"] == part
    group = Group("units", "ffn", (2,), found.slices)
    sums = unit_sums(group, {name: torch.ones_like(value) for name, value in model.named_parameters()})
    assert sums.tolist() == [14.0, 14.0]  # rows: 3 x 3 weights and 3 biases; head: 2 weights
    masks = {"units": torch.tensor([False, True])}
    expected = zero(copy.deepcopy(model), [group], masks)(image)
    rows = shrink(copy.deepcopy(model), [group], masks).rows
    assert torch.equal(rows.weight, model.rows.weight[[2, 3, 5]])
    assert expected.shape == (2, 2)
