"""params.yaml: every error is one line that names the dotted key."""

from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import parse_yaml

from vitprune import BadInput, plan_for
from vitprune.config.params import Params, load_params, read_yaml
from vitprune.config.section import RENAMED

ROOT = Path(__file__).parents[2]


@pytest.fixture
def message_of(tmp_path: Path):
    """Change one key of the repository's params.yaml (None removes it), load it, and return the error line."""

    def change(key: str, value: object = ...) -> str:
        raw = yaml.safe_load((ROOT / "params.yaml").read_text())
        *path, last = key.split(".")
        section = raw
        for part in path:
            section[part] = section[part] or {}  # null: its defaults
            section = section[part]
        section.pop(last, None)
        if value is not ...:
            section[last] = value
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
        with pytest.raises(BadInput) as error:
            load_params(tmp_path / "params.yaml")
        message = str(error.value)
        assert "\n" not in message
        assert message.startswith(f"{tmp_path / 'params.yaml'}: ")
        return message.removeprefix(f"{tmp_path / 'params.yaml'}: ")

    return change


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))], ids=lambda p: p.name
)
def test_params_yaml_and_recipes_are_valid(path: Path) -> None:
    params = load_params(path)
    prune = params.prune
    plan = plan_for(prune)
    assert len(plan.targets()) == prune.cycles


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("sed", "did you mean seed?"),
        ("prunes", "did you mean prune?"),
        ("dataset.sorce", "did you mean source?"),
        ("model.nmae", "did you mean name?"),
        ("dense.train.learning_rate", "remove it or correct its name"),
        ("calibrate.balanced", "did you mean balance?"),
        ("score.batchsize", "did you mean batch_size?"),
        ("prune.sparsty", "did you mean sparsity?"),
        ("prune.finetune.epoch", "did you mean epochs?"),
        ("distill.alfa", "remove it or correct its name"),
        ("distill.train.lrr", "did you mean lr?"),
        ("evaluate.runs", "remove it or correct its name"),
        ("export.onxx", "did you mean onnx?"),
    ],
)
def test_an_unknown_key_is_named(message_of, key: str, remedy: str) -> None:
    assert message_of(key, 1) == f"{key}: unknown key; {remedy}"


def test_a_misspelled_key_is_named_even_if_the_right_one_is_missing(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text().replace("  sparsity: {ffn: 0.6, attention: 0.5}", "  sparsty: 0.5")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"prune\.sparsty: unknown key; did you mean sparsity\?$"):
        load_params(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    path, text = tmp_path / "params.yaml", (ROOT / "params.yaml").read_text()
    text = text.replace("seed: 0", "seed: 010").replace("lr: 0.002", "lr: 2e-3").replace("scope: null", "scope: 2:4")
    path.write_text(text.replace("num_classes: 10}", "num_classes: 10, init_values: 1e-5}"))
    params = load_params(path)
    assert (params.seed, params.dense.train.lr, params.prune.scope) == (10, 0.002, "2:4")
    assert params.model.args["init_values"] == 1e-5
    assert params.model_dump(mode="json") == Params.model_validate(parse_yaml(path.read_text(), path)).model_dump(
        mode="json"
    )


def test_a_value_of_any_size_gives_a_short_message(message_of, tmp_path: Path) -> None:
    for value in ("x" * 100_000, ["x"] * 5000, {str(key): key for key in range(5000)}, [[["deep"] * 50] * 50] * 50):
        assert len(message_of("seed", value)) < 1000
    text = (ROOT / "params.yaml").read_text().replace("seed: 0", "seed: 0x" + "f" * 50_000)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"params.yaml: seed: .* got a number of int with too many digits"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("key", RENAMED)
def test_a_renamed_key_gives_the_new_name(message_of, key: str) -> None:
    assert message_of(key, 1) == f"{key}: has been renamed to {RENAMED[key]}"


@pytest.mark.parametrize("key", ["dataset", "dataset.source", "model.name", "dense.start", "prune", "prune.method"])
def test_a_missing_key_is_named(message_of, key: str) -> None:
    assert message_of(key) == f"{key}: Field required"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "zero"),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("dataset", "digits"),
        ("dataset", None),
        ("dataset.source", 5),
        ("dataset.source", None),
        ("dataset.eval_fraction", 0),
        ("dataset.eval_fraction", 1),
        ("dataset.skip_limit", 1.1),
        ("model.args", "depth: 4"),
        ("dense.start", "scratch"),
        ("dense.train", 40),
        ("dense.train.epochs", 0),
        ("dense.train.epochs", 1.5),
        ("dense.train.epochs", "many"),
        ("dense.train.batch_size", 0),
        ("dense.train.lr", 0),
        ("dense.train.lr", "fast"),
        ("dense.train.lr", float("nan")),
        ("dense.train.lr", float("inf")),
        ("dense.train.weight_decay", -0.1),
        ("dense.train.smoothing", 1.0),
        ("dense.train.augment", "heavy"),
        ("dense.train.clip", 0),
        ("dense.train.decay", "step"),
        ("dense.train.decay_over", "epoch"),
        ("dense.train.optimizer_state", "forget"),
        ("dense.train.eps", 0),
        ("dense.train.mixup", -0.1),
        ("dense.train.mix_prob", 0),
        ("dense.train.repeats", 0),
        ("calibrate.size", 0),
        ("calibrate.balance", "even"),
        ("score.batch_size", -1),
        ("prune.method", 5),
        ("prune.sparsity", 1.0),
        ("prune.sparsity", -0.5),
        ("prune.sparsity", float("nan")),
        ("prune.sparsity", "half"),
        ("prune.sparsity", [0.5]),
        ("prune.target", {}),
        ("prune.target", 0.5),
        ("prune.target", {"macs": 0.5, "params": 0.5}),
        ("prune.merge_heads_to", 0),
        ("prune.cycles", 0),
        ("prune.cycles", 2.5),
        ("prune.schedule", "sudden"),
        ("distill.alpha", -1),
        ("distill.alpha", float("inf")),
        ("distill.temperature", 0),
        ("distill.kind", "patches"),
        ("evaluate.latency_runs", 0),
        ("export.onnx", "maybe"),
    ],
)
def test_a_wrong_type_or_value_is_named_and_shown(message_of, key: str, value: object) -> None:
    line = message_of(key, value)
    assert line.startswith(f"{key}: ")
    assert repr(value) in line


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"ffn": 1.5}, "prune.sparsity.ffn"),
        ({"ffn": 0.5, "attention": -0.1}, "prune.sparsity.attention"),
        ({"blocks": 0.5}, "prune.sparsity.blocks"),
        ({"ffn": "half"}, "prune.sparsity.ffn"),
    ],
)
def test_a_sparsity_per_kind_is_named_by_its_kind(message_of, value: dict, key: str) -> None:
    assert message_of("prune.sparsity", value).startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"shape": "cubic", "initial": 2}, "prune.schedule.initial: Input should be less than 1, got 2"),
        ({"shape": "sudden"}, "prune.schedule.shape: Input should be 'linear' or 'cubic', got 'sudden'"),
        ({"shape": "cubic", "start": 0.4}, "prune.schedule.start: unknown key; remove it or correct its name"),
        ({"steps": [0.5, 2]}, "prune.schedule.steps.1: Input should be less than 1, got 2"),
        ({"steps": {-1: 0.5}}, "prune.schedule.steps.-1: Input should be greater than or equal to 0, got -1"),
        ({"steps": {0: 1.5}}, "prune.schedule.steps.0: Input should be less than 1, got 1.5"),
        ({"steps": []}, "prune.schedule.steps: List should have at least 1 item"),
        ({"shape": "cubic", "steps": [0.5]}, "prune.schedule: give a shape, with or without an initial"),
        ({"steps": [0.5], "initial": 0.1}, "prune.schedule: give a shape, with or without an initial"),
        ({}, "prune.schedule: give a shape, with or without an initial sparsity, or steps"),
    ],
)
def test_an_error_in_a_schedule_names_the_key(message_of, value: dict, key: str) -> None:
    assert message_of("prune.schedule", value).startswith(key)


@pytest.mark.parametrize(
    ("value", "key"),
    [({"macs": 0}, "prune.target.macs"), ({"macs": 1}, "prune.target.macs"), ({"flops": 0.5}, "prune.target.flops")],
)
def test_a_target_is_named_by_its_cost(message_of, value: dict, key: str) -> None:
    assert message_of("prune.target", value).startswith(f"{key}: ")


def test_a_target_beside_one_sparsity_is_refused(tmp_path: Path) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["prune"] |= {"sparsity": 0.5, "target": {"macs": 0.5}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(BadInput, match=r"params.yaml: prune.target: give a target or one sparsity, not both") as error:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


def test_several_errors_are_counted(message_of, tmp_path: Path) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["seed"], raw["score"]["batch_size"] = "x", 0
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(BadInput, match=r"seed: .* \(and 1 more\)$"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must be a mapping of sections, but is empty"),
        ("- a\n- b\n", "must be a mapping of sections, is list"),
        ("a: [1\nb: 2\n", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(BadInput, match=why) as error:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(BadInput, match="not valid YAML") as error:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere.yaml: no such file; run in a project directory"):
        load_params(tmp_path / "nowhere.yaml")


def test_numbers_in_yaml_notation_are_accepted(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    raw = yaml.safe_load(text)
    raw["dense"]["train"]["lr"] = "1e-3"  # in quotes
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    assert load_params(tmp_path / "params.yaml").dense.train.lr == 0.001


def test_params_are_frozen() -> None:
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 1
    assert Params.model_validate(params.model_dump()) == params


def test_a_file_with_a_base_replaces_single_keys_of_its_sections(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nscore: {batch_size: 3, memory_mb: 5}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nscore: {memory_mb: 7}\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\n")
    (tmp_path / "d.yaml").write_text("base: none.yaml\n")
    assert read_yaml(tmp_path / "b.yaml", "") == {"seed": 1, "score": {"batch_size": 3, "memory_mb": 7}}
    with pytest.raises(BadInput, match=r"c\.yaml: base: b\.yaml has a base itself; name a file that has none$"):
        read_yaml(tmp_path / "c.yaml", "")
    with pytest.raises(BadInput, match=r"none\.yaml: no such file; it is the base of .*d\.yaml; correct its name$"):
        read_yaml(tmp_path / "d.yaml", "")


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"pretrained_cfg_overlay": {"file": "other.pth"}}, "pretrained_cfg_overlay.file"),
        ({"pretrained_cfg": {"hf_hub_id": "somebody/else"}}, "pretrained_cfg.hf_hub_id"),
        ({"checkpoint_path": "other.pth"}, "checkpoint_path"),
        ({"pretrained": True}, "pretrained"),
    ],
)
def test_model_args_that_name_weights_are_refused(message_of, args: dict, key: str) -> None:
    start = f"model.args.{key}: names weights; use dense.start and dense.checkpoint, which are recorded, got "
    assert message_of("model.args", args).startswith(start)


def test_the_planned_epochs_are_those_of_all_trainings() -> None:
    assert load_params(ROOT / "params.yaml").planned_epochs == "dense 60, prune 5 in each of 3 cycles, distill 20"
