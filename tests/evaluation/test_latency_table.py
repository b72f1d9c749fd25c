"""Latency tables as files, and recorded from a tiny model."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.support.model_zoo import tiny
from vitprune import BadInput, find_groups
from vitprune.data import example_input
from vitprune.evaluation.engines import forward_call
from vitprune.evaluation.latency_table import LatencyTable, kept_width, read_latency_table, write_latency_table
from vitprune.evaluation.record_latency_table import error_of_median, record_latency_table, record_to_file, smoothed
from vitprune.groups import Group

FFN = Group("blocks.3.mlp", "ffn", (8,), ())
ATTENTION = Group("blocks.3.attn", "attention", (2, 4), ())


def write(path: Path, rows: str) -> Path:
    path.write_text("# by hand\ngroup,width,milliseconds\n" + rows)
    return path


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    times = {"blocks.*.mlp": {1: 0.0, 4: 0.5, 8: 1.25}, "blocks.0.attn": {4: 2.0}}
    table = LatencyTable(12.5, times, str(tmp_path / "sub/table.csv"), ("deit, 1 thread", "half: 0.5"))
    write_latency_table(table, tmp_path / "sub/table.csv")
    assert read_latency_table(tmp_path / "sub/table.csv") == table
    assert (tmp_path / "sub/table.csv").read_text() == (
        "# deit, 1 thread\n# half: 0.5\ngroup,width,milliseconds\nmodel,,12.5\nblocks.*.mlp,1,0\nblocks.*.mlp,4,0.5\n"
        "blocks.*.mlp,8,1.25\nblocks.0.attn,4,2\n"
    )


def test_times_are_monotone_linear_between_widths_and_constant_below_the_smallest(tmp_path: Path) -> None:
    rows = "model,,10\n\nblocks.*.mlp , 2, 1.0\nblocks.*.mlp,8,4\nblocks.*.mlp,4,3\nblocks.*.mlp,6,2\n"
    times = read_latency_table(write(tmp_path / "table.csv", rows)).group_times(FFN)
    assert times == pytest.approx(np.array([1, 1, 1, 1.75, 2.5, 2.5, 2.5, 3.25, 4]))  # 3 and 2 ms: 2.5 ms each


def test_a_group_name_has_priority_over_a_pattern() -> None:
    table = LatencyTable(10, {"*.mlp": {8: 1.0}, FFN.name: {1: 0.0, 8: 7.0}})
    assert table.group_times(FFN)[-1] == 7
    widths, masks = (
        {FFN.name: 1, ATTENTION.name: 2},
        {ATTENTION.name: torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()},
    )
    both = LatencyTable(10, {"*.mlp": {1: 1.0, 8: 3.0}, "*.attn": {1: 0.0, 3: 2.0, 4: 5.0}})
    assert both.fraction_at(both.all_times([FFN, ATTENTION]), widths) == pytest.approx(1 - (3 - 1 + 5 - 1) / 10)
    assert kept_width(ATTENTION, masks) == 2


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("", r"table.csv: no row model,,MILLISECONDS has the latency of the dense model; add it"),
        ("model,,10\nblocks.*.mlp,8\n", r"table.csv, line 4: has 2 values; give group, width and milliseconds"),
        ("model,,10\nblocks.*.mlp,-8,1\n", r"table.csv, line 4: width '-8' must be a whole number from 1, and "),
        ("model,,10\nblocks.*.mlp,,1\n", r"table.csv, line 4: width '' must be a whole number"),
        ("model,192,10\n", r"table.csv, line 3: width '192' must be a whole number from 1, and empty for model"),
        ("model,,0\n", r"table.csv, line 3: '0' is no time; give milliseconds such as 1.25"),
        ("model,,10\nblocks.*.mlp,8,fast\n", r"table.csv, line 4: 'fast' is no time"),
        ("model,,10\nblocks.*.mlp,8,nan\n", r"table.csv, line 4: 'nan' is no time"),
        ("model,,10\nblocks.*.mlp,8,1\nblocks.*.mlp,8,2\n", r"line 5: blocks.\*.mlp has this width twice; remove one"),
        ("model,,10\nmodel,,11\n", r"line 4: model has this width twice; remove one"),
        ("model,,10\nblocks.*.attn,8,1\n", r"table.csv: no row names group blocks.3.mlp; vitprune inspect lists the"),
        ("model,,10\n*.mlp,8,1\nblocks.*,8,1\n", r"table.csv: \*.mlp and blocks.\* both match group blocks.3.mlp; "),
        ("model,,10\n*.mlp,7,1\n", r"table.csv: \*.mlp is given up to width 7, and blocks.3.mlp has 8; use the table"),
        ("model,,10\n*.mlp,1,1\n*.mlp,8,11\n", r"table.csv: the groups take 10 ms in all and the model only 10; "),
    ],
)  # fmt: skip
def test_an_invalid_table_gives_a_one_line_error(tmp_path: Path, rows: str, why: str) -> None:
    with pytest.raises(BadInput, match=why) as refused:
        read_latency_table(write(tmp_path / "table.csv", rows)).all_times([FFN])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory; record one by vitprune latency-table"),
        (b"", "the first line must be group,width,milliseconds; correct it, or record one"),
        (b"{}", "the first line must be group,width,milliseconds"),
        (b"\xff\xfe", "is not UTF-8 text; record one"),
        (b'group,width,milliseconds\n"a', 'line 2: has 1 values; give group, width'),
    ],
)  # fmt: skip
def test_files_that_are_not_tables_are_refused(tmp_path: Path, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(str(tmp_path)) + ".*" + why):
        read_latency_table(tmp_path / "table.csv")


def test_kinds_whose_times_do_not_add_up_are_refused() -> None:
    with pytest.raises(BadInput, match="times of kind residual do not add up; prune ffn, attention, head, or remove"):
        LatencyTable(10, {"*": {8: 1.0}}).group_times(Group("residual", "residual", (8,), ()))


def test_a_recorded_table_has_all_widths_of_all_groups(tmp_path: Path) -> None:
    model = tiny("vit").float()
    table = record_latency_table(model, "torch", runs=15)
    assert {name: sorted(times) for name, times in table.times.items()} == {
        "blocks.*.mlp": [1, 24, 48, 72, 96, 120, 144, 168, 192],
        "blocks.*.attn": [1, 2, 4, 6, 8, 10, 12, 14, 16],
    }
    assert re.fullmatch(r"torch \S+, batch size 1, 1 thread, medians of 15 runs, .*, \d{4}-\d\d-\d\d", table.notes[0])
    assert re.fullmatch(
        r"every group at half width: \d.\d{3} of the dense .* measured, -?\d.\d{3} by this table", table.notes[1]
    )
    write_latency_table(table, tmp_path / "table.csv")
    groups = find_groups(model, ["ffn", "attention"])
    assert all(len(read_latency_table(tmp_path / "table.csv").group_times(g)) == g.shape[-1] + 1 for g in groups)


def test_noise_is_smoothed_and_steps_are_kept() -> None:
    widths = [1, *range(8, 65, 8)]
    line = {width: 0.2 + 0.0125 * width for width in widths}
    noisy = {width: value + 0.02 * (-1) ** number for number, (width, value) in enumerate(line.items())}
    result = smoothed(noisy, dict.fromkeys(widths, 0.03))
    assert max(abs(result[width] - line[width]) for width in widths) < 0.012  # the noise is 0.02
    steps = {width: 0.2 + 0.2 * (width // 16) for width in widths}
    assert smoothed(steps, dict.fromkeys(widths, 0.0)) == pytest.approx(steps, abs=2e-4)
    assert smoothed({1: 0.5, 2: 1.0}, {1: 0.1, 2: 0.0}) == pytest.approx({1: 0.5, 2: 1.0}, abs=0.15)


def test_the_error_of_a_median_includes_correlated_noise() -> None:
    noise = np.random.default_rng(0).normal(size=(400, 100))
    errors = [error_of_median(values) for values in noise]
    assert np.mean(errors) == pytest.approx(np.median(noise, axis=1).std(), rel=0.15)
    lasting = np.repeat(noise[0, :5], 20)  # one value for every fifth of the runs
    assert error_of_median(lasting) == pytest.approx(noise[0, :5].std(ddof=1) / 5**0.5)
    assert error_of_median(np.array([2.0])) == 0


def set_ratio(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """Give all narrower models this fraction of the dense model's latency, independent of the load of the machine."""

    def times(calls: Sequence[Callable[[], object]], runs: int) -> list[list[float]]:
        for call in calls:
            call()
        return [[ratio] * runs, [1.0] * runs]

    monkeypatch.setattr("vitprune.evaluation.record_latency_table.alternating_times", times)


def test_times_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ratio(monkeypatch, 0.1)
    with pytest.raises(
        BadInput, match=r"^--runs 2: too few on a device that is busy \(latency table: the groups take 1.8"
    ):
        record_latency_table(tiny("swin").float(), "torch", kinds=["ffn"], runs=2)


def test_groups_of_different_structures_get_separate_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ratio(monkeypatch, 0.9)
    table = record_latency_table(tiny("swin").float(), "torch", kinds=["ffn"], runs=5)
    assert {name: max(times) for name, times in table.times.items()} == {
        "layers.0.blocks.*.mlp": 96,
        "layers.1.blocks.*.mlp": 192,
    }


def test_onnxruntime_runs_the_export_of_the_model(vit: torch.nn.Module) -> None:
    model = vit.float()
    images = torch.rand(example_input(model, 3).shape, generator=torch.Generator().manual_seed(0))
    logits = forward_call(model, "ort", images)()
    assert torch.allclose(torch.from_numpy(logits), model.eval()(images), atol=1e-4)


def test_threads_of_onnxruntime_do_not_wait_busily_while_another_model_is_measured(
    monkeypatch: pytest.MonkeyPatch, vit: torch.nn.Module
) -> None:
    sessions = []

    class Recorded(onnxruntime.InferenceSession):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            sessions.append(self)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorded)
    forward_call(vit.float(), "ort", example_input(vit, 1))()
    options = [session.get_session_options() for session in sessions]
    assert len(options) == 2  # of the comparison at the export, and of the measurement
    assert {one.get_session_config_entry("session.force_spinning_stop") for one in options} == {"1"}
    assert {one.intra_op_num_threads for one in options} == {torch.get_num_threads()}


def test_invalid_kinds_and_outputs_are_refused(vit: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"^--kinds 'residual': its times do not add up; use some of ffn, attention, head$"
    ):
        record_latency_table(vit, "torch", kinds=["ffn", "residual"])
    with pytest.raises(BadInput, match=r"^--kinds 'fnn': unknown; use some of ffn, attention, head$"):
        record_latency_table(vit, "torch", kinds=["fnn"])
    with pytest.raises(BadInput, match=r"^--output .*: is a directory; give a file such as .*/table.csv$"):
        record_to_file("vit_tiny_patch16_224", tmp_path, "torch", 1, ["ffn"], 1, None)


def test_an_unknown_engine_is_refused(vit: torch.nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^--on 'tensorrt': unknown engine; use one of torch, ort, openvino$"):
        record_latency_table(vit, "tensorrt")
