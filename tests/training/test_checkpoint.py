"""Checkpoint verification, and resumed trainings that end bit-identical to uninterrupted ones."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitprune
from tests.support.model_zoo import batches, noisy, random_masks, state, tiny
from vitprune import BadInput, find_groups, zero
from vitprune.config.train_config import TrainConfig
from vitprune.runtime.files import sha256
from vitprune.training import checkpoint_store
from vitprune.training.checkpoint import INTERVAL_ENV, Checkpointer, catch_stop_signals, checkpoint_minutes, pack
from vitprune.training.checkpoint_store import CheckpointStore, work_key
from vitprune.training.distillation import classification, feature_distillation, logit_distillation
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.optimizers import OptimizerState, ScheduleSpan

STEPS = 3  # batches of an epoch
TOP1 = (0.3, 0.4, 0.4, 0.5, 0.5)  # after each epoch; patience 1 stops after the third


class Broken(Exception):
    """Simulates a kill."""


def put(shelf: CheckpointStore, number: int) -> Path:
    return shelf.save({"number": number, "loss": 0.1 + number}, {"weights": torch.full((3,), number + 0.5)}).directory


def test_the_latest_checkpoint_is_restored_exactly(tmp_path: Path) -> None:
    shelf = CheckpointStore(tmp_path / "work", "key", keep=2)
    assert shelf.latest() is None
    for number in range(4):
        put(shelf, number)
    saved = CheckpointStore(tmp_path / "work", "key").latest()
    assert saved is not None
    assert (saved.facts["number"], saved.facts["loss"]) == (3, 3.1)
    assert torch.equal(saved.tensors()["weights"], torch.full((3,), 3.5))
    assert [path.name for path in sorted((tmp_path / "work").iterdir())] == ["000003", "000004"]
    shelf.clear()
    assert shelf.latest() is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tamper(path: Path) -> None:
    result = bytearray(path.read_bytes())
    result[len(result) // 2] ^= 1
    path.write_bytes(bytes(result))


@pytest.mark.parametrize("harm", [truncate, tamper, Path.unlink])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "index.json", "more/config.json"])
def test_a_corrupt_checkpoint_is_skipped_for_the_previous_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Any, name: str
) -> None:
    shelf = CheckpointStore(tmp_path / "work", "key")

    def more(entry: Path) -> None:
        (entry / "more").mkdir()
        (entry / "more/config.json").write_text("{}")

    for number in (1, 2):
        directory = shelf.save({"number": number}, {"weights": torch.ones(3)}, more).directory
    harm(directory / name)
    saved = shelf.latest()
    assert saved is not None
    assert saved.facts["number"] == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(directory) in message
    assert message.endswith("; ignored\n")
    assert put(shelf, 3).name == "000003"


def test_an_index_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    shelf = CheckpointStore(tmp_path / "work", "key")
    directory = put(shelf, 1)
    (directory / "state.json").write_text('{"number": 7}')
    index = json.loads((directory / "index.json").read_text())
    index["files"]["state.json"] = sha256(directory / "state.json")
    (directory / "index.json").write_text(json.dumps(index))
    assert shelf.latest() is None


def test_a_checkpoint_with_another_key_is_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(CheckpointStore(tmp_path / "work", "key"), 1)
    put(CheckpointStore(tmp_path / "work", "other"), 2)
    saved = CheckpointStore(tmp_path / "work", "key").latest()
    assert saved is not None
    assert saved.facts["number"] == 1
    assert "000002: checkpoint of another run (different settings, inputs or code); ignored" in capsys.readouterr().err


def test_a_partially_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    shelf = CheckpointStore(tmp_path / "work", "key")
    first = put(shelf, 1)
    shutil.copytree(first, tmp_path / "work/000002.partial")
    saved = shelf.latest()
    assert saved is not None
    assert saved.directory == first
    assert put(shelf, 2).name == "000002"
    assert not list((tmp_path / "work").glob("*.partial"))


def test_a_full_disk_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = CheckpointStore(tmp_path / "work", "key", keep=1)
    first = put(shelf, 1)
    monkeypatch.setattr(checkpoint_store, "RESERVED_BYTES", 1 << 62)
    with pytest.raises(OSError, match="No space left on device"):
        put(shelf, 2)
    assert list((tmp_path / "work").iterdir()) == [first]
    assert shelf.latest() is not None


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    shelf = CheckpointStore(tmp_path / "work", "key", keep=1)
    first = put(shelf, 1)

    def fail(entry: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        shelf.save({}, {}, fail)
    assert list((tmp_path / "work").iterdir()) == [first]


def test_the_key_depends_on_settings_files_and_device(tmp_path: Path) -> None:
    file = tmp_path / "inputs/weights"
    file.parent.mkdir()
    file.write_bytes(b"1")
    key = work_key("prune", {"seed": 0}, [file.parent], "cpu")
    assert key == work_key("prune", {"seed": 0}, [file], "cpu")
    file.write_bytes(b"2")
    others = [work_key("prune", {"seed": 0}, [file], "cpu"), work_key("prune", {"seed": 1}, [file], "cpu")]
    others += [work_key("distill", {"seed": 0}, [file], "cpu"), work_key("prune", {"seed": 0}, [file], "cuda")]
    assert len({key, *others}) == 5


def test_the_key_depends_on_the_code_of_all_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(vitprune.__file__).parent == checkpoint_store.PACKAGE
    monkeypatch.setattr(checkpoint_store, "PACKAGE", tmp_path)
    module = tmp_path / "criteria/magnitude.py"
    module.parent.mkdir()
    module.write_text("a = 1\n")
    before = work_key("prune", {}, [], "cpu")
    module.write_text("a = 2\n")
    assert work_key("prune", {}, [], "cpu") != before


def test_the_interval_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(INTERVAL_ENV, raising=False)
    assert checkpoint_minutes() == 10
    monkeypatch.setenv(INTERVAL_ENV, "0.5")
    assert checkpoint_minutes() == 0.5
    for text in ("often", "-1", "nan"):
        monkeypatch.setenv(INTERVAL_ENV, text)
        with pytest.raises(BadInput, match=f"^{INTERVAL_ENV}={text}: give the minutes"):
            checkpoint_minutes()


def test_an_optimizer_state_that_cannot_be_saved_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^train.optimizer: state history is a list, which cannot be saved"):
        pack({"weight": {"history": [1]}}, "optimizer")


class Breaking(Checkpointer):
    """Saves after every step and is killed after some steps."""

    remaining = 0

    def write(self, snapshot: Any) -> None:
        super().write(snapshot)
        self.remaining -= 1
        if not self.remaining:
            raise Broken


def plain(model: nn.Module) -> Any:
    return classification(model, 0.1)


def taught(model: nn.Module) -> Any:
    return logit_distillation(model, tiny("vit", 1), 1.0, 2.0, 0.0)


def featured(model: nn.Module) -> Any:
    return feature_distillation(model, tiny("vit", 1), 2.0, 0.0, 3)


ALL = {"ema": 0.9, "cutmix": 0.5, "mixup": 0.3, "drop_path": 0.2}


@pytest.mark.parametrize(
    ("settings", "task"),
    [
        ({}, plain),
        ({"optimizer": "momentum", "lr": 0.1} | ALL, plain),
        ({"optimizer": "nadamw", "ema": 0.9}, plain),
        ({"optimizer": "lamb", "warmup_epochs": 1.0}, taught),
        ({"optimizer": "lion", "cutmix": 0.5, "mix_prob": 0.5}, taught),
        ({"optimizer": "adafactorbv", "drop_path": 0.1}, plain),
        (ALL, taught),
        ({"mixup": 0.2}, featured),
        ({"layer_decay": 0.7, "channels_last": True, "checkpointing": True}, plain),
        ({"epochs": 5, "patience": 1}, plain),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value)) or "adamw",
)
@pytest.mark.parametrize("every", [2, 4])
def test_a_training_interrupted_at_any_step_resumes_bit_identically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], task: Any, every: int
) -> None:
    monkeypatch.setenv(INTERVAL_ENV, "0")
    recipe, result = TrainConfig.model_validate({"epochs": 3, "lr": 0.01, "weight_decay": 0.1} | settings), []
    noise = batches(tiny("vit"), STEPS, 6)
    for remaining in (0, every):
        memory, starts = OptimizerState(), 0
        rows: list[dict[str, Any]] = []
        while True:  # each start has only the saved checkpoint
            model, starts, memory = noisy(), starts + 1, OptimizerState()
            groups = find_groups(model, ["weight"])
            held = FrozenZeros(groups, random_masks(groups, 0.5))
            zero(model, groups, held.masks)
            saver = Breaking(CheckpointStore(tmp_path / str(remaining), "key"), lambda rows=rows: rows)
            saver.remaining, rows[:] = remaining, saver.history_rows
            start = saver.resumed_from.facts if saver.resumed_from is not None else {"epoch": 0, "done": 0}

            def left_of(epoch: int, start: Any = start) -> list[tuple[Tensor, Tensor]]:
                return noise[start["done"] if epoch == start["epoch"] else 0 :]

            torch.rand(starts)  # earlier draws must not matter
            span = ScheduleSpan(0, 3 * STEPS, memory)
            try:
                evaluate = (lambda rows=rows: {"top1": TOP1[len(rows)]}) if recipe.patience else None
                train(
                    task(model), left_of, STEPS, recipe, 5, rows.append, held, evaluate, span=span, checkpointer=saver
                )
            except Broken:
                continue
            break
        assert starts == (3 * STEPS // remaining + 1 if remaining else 1)
        result.append((state(model), rows, memory))
    assert result[0][1] == result[1][1]
    assert len(result[0][1]) == 3
    assert all(torch.equal(result[0][0][name], result[1][0][name]) for name in result[0][0])
    for name, known in result[0][2].items():
        for key, value in known.items():
            same = torch.equal(value, result[1][2][name][key]) if isinstance(value, Tensor) else None
            assert same if same is not None else value == result[1][2][name][key]


def test_a_resume_at_the_wrong_batch_changes_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would detect a resume that skips or repeats a batch."""
    monkeypatch.setenv(INTERVAL_ENV, "0")
    noise, ends = batches(tiny("vit"), STEPS, 6), []
    for skipped in (0, 1):
        shelf, model = CheckpointStore(tmp_path / str(skipped), "key"), tiny("vit")
        saver = Breaking(shelf, list)
        saver.remaining = 2
        with pytest.raises(Broken):
            train(
                plain(model), lambda epoch: noise, STEPS, TrainConfig(epochs=1, lr=0.01), 0, print, checkpointer=saver
            )
        ahead = noise[2 - skipped :]  # the remaining batches, or one too many
        other = tiny("vit")
        train(plain(other), lambda epoch, rest=ahead: rest, STEPS, TrainConfig(epochs=1, lr=0.01), 0, lambda row: None,
              checkpointer=Checkpointer(shelf, list))  # fmt: skip
        ends.append(state(other))
    assert not all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_caught_only_inside_the_context(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with catch_stop_signals() as requested:
        assert not requested()
        os.kill(os.getpid(), number)
        assert requested()
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_is_not_caught() -> None:
    with pytest.raises(KeyboardInterrupt), catch_stop_signals() as requested:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert requested()
        os.kill(os.getpid(), signal.SIGINT)
