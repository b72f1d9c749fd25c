"""Malicious checkpoints are refused with a one-line error, without side effects."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.support.model_zoo import ZOO, random_masks, tiny
from vitprune import BadInput, find_groups, load, models, save, shrink
from vitprune.models.build_limits import BuildLimitError, try_in_child

Break = Callable[[Path], None]

# forbidden audit events of Python: network access, programs, imports, files other than the model's
WATCHED = r"""
import json, re, resource, shutil, sys
from pathlib import Path
from tests.models import test_malicious_checkpoints as test_hostile
from vitprune import BadInput, load
saved_model, folder, seen, on = Path(sys.argv[1]), Path(sys.argv[2]), [], False
def hook(event, args):
    if on and event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "exec")):
        seen.append(event)
    if on and event == "import" and args[0] not in sys.modules:
        seen.append(f"import {args[0]}")
    if on and event == "open" and isinstance(args[0], (str, bytes)) and str(folder) not in str(args[0]):
        if not re.fullmatch(r"/proc/[0-9]+/stat", str(args[0])):  # the state of the child process that builds the model
            seen.append(f"open {args[0]}")
def refused(name):
    global on
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved_model, folder)
    test_hostile.CASES[name][0](folder)
    on = True
    try:
        load(folder)
    except BadInput as error:
        return str(error)
    finally:
        on = False
sys.addaudithook(hook)
load(saved_model)
for name in ("depth of a million", "weights of another type"):  # warm up one-time allocations of timm and torch
    refused(name)
seen.clear()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
told = {name: refused(name) for name in test_hostile.CASES}
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"told": told, "seen": seen, "grown": grown}))
"""


def config(**change: object) -> Break:
    """Change a section's keys, as in model_args={"depth": 3}; None deletes a key."""

    def broken(folder: Path) -> None:
        result = json.loads((folder / "config.json").read_text())
        for key, value in change.items():
            result[key] = result.get(key, {}) | value if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(result))

    return broken


def content(text: str | bytes, file: str = "config.json") -> Break:
    return lambda folder: (folder / file).write_bytes(text.encode() if isinstance(text, str) else text) and None


def structure(**shapes: object) -> Break:
    return config(vitprune={"structure": shapes})


def group(name: str, shape: object) -> Break:
    return config(vitprune={"structure": {name: shape}})


def weights(change: Callable[[dict], object]) -> Break:
    def broken(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return broken


def weight(name: str, value: torch.Tensor) -> Break:
    return weights(lambda tensors: tensors.update({name: value}))


def header(text: str) -> Break:
    return content(len(text).to_bytes(8, "little") + text.encode() + bytes(64), "model.safetensors")


def truncated(size: int) -> Break:
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def link(file: str, target: str) -> Break:
    def broken(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(target)

    return broken


def fifo(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def one_nan(tensors: dict) -> None:
    tensors["blocks.1.mlp.fc2.weight"][0, 0] = float("nan")


C, W = "config.json: ", "model.safetensors: "
NOT = C + "not a timm model config"
ARGS, PRE, STRUCTURE = C + "model_args.", C + "pretrained_cfg.", C + "vitprune.structure"
UNCUT = {"vitprune": {"structure": {}}}
CASES: dict[str, tuple[Break, str]] = {
    "empty": (content(""), NOT),
    "no JSON": (content("{"), NOT),
    "no text": (content(b"\xff\xfe\x00"), NOT),
    "no object": (content("[1, 2]"), NOT + " (architecture is missing"),
    "null": (content("null"), NOT + " (architecture is missing"),
    "no architecture": (content("{}"), NOT + " (architecture is missing"),
    "architecture is a list": (config(architecture=["os", "system"]), NOT + " (architecture"),
    "args are a list": (config(model_args=[1]), NOT + " (model_args"),
    "nested without end": (content("[" * 200_000), NOT),
    "nested in an argument": (config(model_args={"depth": [[[[[[2]]]]]]}), ARGS + "depth.0.0.0.0 is too long"),
    "enormous": (content('{"a": "' + "x" * (5 << 20) + '"}'), NOT + " (5242889 bytes, the limit is"),
    "digits without end": (content('{"num_classes": ' + "9" * 100_000 + "}"), NOT),
    "a number that is none": (content('{"architecture": NaN}'), NOT + " (NaN is not a JSON number)"),
    "unknown architecture": (config(architecture="no_such_model"), C + "architecture 'no_such_model': timm"),
    "a module": (config(architecture="os.system"), C + "architecture 'os.system': timm"),
    "a function": (config(architecture="builtins:eval"), C + "architecture 'builtins:eval': timm"),
    "a path": (config(architecture="local-dir:/etc"), C + "architecture 'local-dir:/etc': timm"),
    "a path upwards": (config(architecture="../vit_tiny_patch16_224"), C + "architecture '../vit_tiny"),
    "a hub's model": (config(architecture="hf-hub:timm/resnet18.a1_in1k"), C + "architecture 'hf-hub:timm"),
    "another model": (config(architecture="resnet18"), C + "timm cannot create resnet18 with these model_args"),
    "pretrained": (config(model_args={"pretrained": True}), ARGS + "pretrained: an argument of timm.create_model"),
    "not pretrained": (config(model_args={"pretrained": False}), ARGS + "pretrained: an argument of timm.create_model"),
    "checkpoint_path": (config(model_args={"checkpoint_path": "/tmp/x.pt"}), ARGS + "checkpoint_path: an argument of"),
    "cache_dir": (config(model_args={"cache_dir": "/tmp"}), ARGS + "cache_dir: an argument of"),
    "an overlay": (config(model_args={"pretrained_cfg_overlay": {"file": "x"}}), ARGS + "pretrained_cfg_overlay: an"),
    "another config": (config(model_args={"pretrained_cfg": {"file": "x.pt"}}), ARGS + "pretrained_cfg: an argument"),
    "a wrapper": (config(model_args={"features_only": True, "feature_cls": "fx"}), ARGS + "features_only: an argument"),
    "a device": (config(model_args={"device": "cuda"}), ARGS + "device: an argument of"),
    "url": (config(pretrained_cfg={"url": "http://localhost:1/x.pth"}), PRE + "url: a source of weights"),
    "file": (config(pretrained_cfg={"file": "/etc/passwd"}), PRE + "file: a source of weights"),
    "hub id": (config(pretrained_cfg={"hf_hub_id": "a/b"}), PRE + "hf_hub_id: a source of weights"),
    "state_dict": (config(pretrained_cfg={"state_dict": {}}), PRE + "state_dict: a source of weights"),
    "mean in words": (config(pretrained_cfg={"mean": "half"}), PRE + "mean must be a list of numbers"),
    "a huge image": (config(pretrained_cfg={"input_size": [3, 10**6, 10**6]}), PRE + "input_size must be a list"),
    "an unknown key of timm's": (config(pretrained_cfg={"color": "red"}), C + "timm cannot create vit_tiny"),
    "a layer of a module": (config(model_args={"norm_layer": "torch.nn.LayerNorm"}), ARGS + "norm_layer is 'torch.nn"),
    "a function to import": (config(model_args={"act_layer": "os:system"}), ARGS + "act_layer is 'os:system'"),
    "no such layer": (config(model_args={"norm_layer": "exec"}), C + "timm cannot create vit_tiny_patch16_224"),
    "unknown argument": (config(model_args={"color": 3}), C + "timm cannot create vit_tiny_patch16_224 with these"),
    "depth in words": (config(model_args={"depth": "two"}), C + "timm cannot create vit_tiny_patch16_224 with these"),
    "negative width": (config(model_args={"embed_dim": -48}), C + "timm cannot create vit_tiny_patch16_224 with these"),
    "no heads": (config(model_args={"num_heads": 0}), C + "timm cannot create vit_tiny_patch16_224 with these"),
    "infinite": (config(model_args={"mlp_ratio": 1e999}), NOT + " (Infinity is not a JSON number"),
    "infinite by exponent": (content('{"architecture": "vit_tiny_patch16_224", "model_args": {"mlp_ratio": 1e999}, '
                             '"pretrained_cfg": {}}'), ARGS + "mlp_ratio is larger than"),
    "embed_dim beyond all": (config(model_args={"embed_dim": 10**30}), ARGS + "embed_dim is larger than"),
    "depth beyond all": (config(model_args={"depth": 10**9}), ARGS + "depth is larger than"),
    "depth of a million": (config(model_args={"depth": 10**6}), C + "timm cannot create vit_tiny_patch16_224 with "
                            "these model_args (more than 20000 operations"),
    "width of a million": (config(model_args={"embed_dim": 3 * 2**18}), C + "its arguments describe a model of 1"),
    "ratio of a million": (config(model_args={"mlp_ratio": 1e6}), C + "its arguments describe a model of 9"),
    "an image of a million": (config(model_args={"img_size": 2**20}), C + "its arguments describe a model of 8"),
    "wider than its weights": (config(model_args={"embed_dim": 96}, **UNCUT), W + "weight blocks.0.attn.proj.bias has"),
    "deeper than its weights": (config(model_args={"depth": 3}, **UNCUT), W + "weight blocks.0.attn.proj.bias has"),
    "shallower than its weights": (config(model_args={"depth": 1}), STRUCTURE + ": blocks: shape [4] does not fit"),
    "crop of nothing": (config(pretrained_cfg={"crop_pct": 1e-12}), PRE + "crop_pct must be a number from 0.05 to 2"),
    "crop in words": (config(pretrained_cfg={"crop_pct": "all"}), PRE + "crop_pct must be a number from 0.05 to 2"),
    "std of 0": (config(pretrained_cfg={"std": [0, 1, 1]}), PRE + "std must not be 0"),
    "classifier without a name": (config(pretrained_cfg={"classifier": [None]}), PRE + "classifier must be the path"),
    "stem of a number": (config(pretrained_cfg={"first_conv": 1}), PRE + "first_conv must be the path of a layer"),
    "unknown interpolation": (config(pretrained_cfg={"interpolation": "best"}), PRE + "interpolation must be one of"),
    "interpolation of a dict": (config(pretrained_cfg={"interpolation": {}}), PRE + "interpolation must be one of"),
    "structure is a list": (config(vitprune=({"structure": []})), STRUCTURE + " must map group names"),
    "structure is a word": (config(vitprune={"structure": "blocks"}), STRUCTURE + " must map group names"),
    "size is a number": (structure(residual=4), STRUCTURE + ".residual must be a list"),
    "size in words": (structure(residual=["a"]), STRUCTURE + ".residual must be a list"),
    "size of nothing": (structure(residual=[0]), STRUCTURE + ".residual must be a list"),
    "negative size": (structure(residual=[-1]), STRUCTURE + ".residual must be a list"),
    "half a unit": (structure(residual=[1.5]), STRUCTURE + ".residual must be a list"),
    "a truth for a size": (structure(residual=[True]), STRUCTURE + ".residual must be a list"),
    "a huge size": (structure(residual=[10**30]), STRUCTURE + ".residual must be a list"),
    "larger than the model": (structure(residual=[10**6]), STRUCTURE + ": residual: shape [1000000] does not fit into"),
    "too many axes": (structure(residual=[1] * 5), STRUCTURE + ": residual: shape [1, 1, 1, 1, 1] does not fit"),
    "no group of this name": (group("blocks.7.mlp", [3]), STRUCTURE + ": structure: VisionTransformer has no group"),
    "a group upwards": (group("../../etc/passwd", [3]), STRUCTURE + ": '../../etc/passwd' is not a group name"),
    "a group of two lines": (group("a\nb", [3]), STRUCTURE + ": 'a\\nb' is not a group name"),
    "a later format": (config(vitprune={"format": 2}), C + "vitprune.format is not 1"),
    "surplus": (weight("surplus", torch.ones(1)), W + "weight surplus is not in VisionTransformer"),
    "surplus upwards": (weight("../../x\n", torch.ones(1)), W + "weight '../../x\\n' is not in VisionTransformer"),
    "missing": (weights(lambda tensors: tensors.pop("blocks.0.mlp.fc1.bias")), W + "weight blocks.0.mlp.fc1.bias is"),
    "wrong shape": (weight("head.weight", torch.ones(7, 3)), W + "weight head.weight has shape [7, 3], the model"),
    "integers": (weight("head.bias", torch.ones(7, dtype=torch.int64)), W + "weight head.bias has type I64, the"),
    "eight bits": (weight("head.bias", torch.ones(7).to(torch.float8_e4m3fn)), W + "weight head.bias has type F8_E4M3"),
    "weights of another type": (weight("head.bias", torch.ones(7).half()), W + "weight head.bias has type F16, "),
    "not a number": (weights(one_nan), W + "weight blocks.1.mlp.fc2.weight has values that are not finite"),
    "infinite weight": (weight("head.bias", torch.full((7,), torch.inf)), W + "weight head.bias has values that"),
    "truncated to nothing": (truncated(0), W + "not a safetensors file"),
    "truncated header": (truncated(100), W + "not a safetensors file"),
    "truncated weights": (truncated(20_000), W + "not a safetensors file"),
    "a header without end": (content(b"\xff" * 64, "model.safetensors"), W + "not a safetensors file"),
    "a tensor of the moon": (header('{"head.bias":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,64]}}'), W),
    "a nested header": (header('{"a":' * 5000 + "1" + "}" * 5000), W + "not a safetensors file"),
    "another file's magic": (content(b"PK\x03\x04" + bytes(100), "model.safetensors"), W + "not a safetensors file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), C + "no such file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), W + "no such file"),
    "a link to nowhere": (link("config.json", "../../nowhere"), C + "no such file"),
    "a link to itself": (link("config.json", "config.json"), C + "cannot be read"),
    "a link to a device": (link("config.json", "/dev/zero"), C + "not a regular file"),
    "weights in a device": (link("model.safetensors", "/dev/zero"), W + "not a regular file"),
    "a link to a folder": (link("model.safetensors", "/"), W + "not a regular file"),
    "a pipe": (fifo, C + "not a regular file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shrunk, saved model."""
    model = tiny("vit", dtype=torch.float32)
    groups = find_groups(model, ["residual", "attention", "ffn"])
    folder = tmp_path_factory.mktemp("hostile") / "model"
    save(shrink(model, groups, random_masks(groups, 0.3)), folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_malicious_checkpoints_are_refused_in_one_line(name: str, saved_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved_model, folder)
    broken, expected = CASES[name]
    broken(folder)
    with pytest.raises(BadInput) as error:
        load(folder)
    assert str(error.value).startswith(f"{folder}/{expected}")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(folder)) + 400


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("efficientvit_m0", {"img_size": 1 << 20, "window_size": [2000, 7, 7]}),
        ("mobilenetv3_large_100", {"depth_multiplier": 1 << 20}),
        ("tiny_vit_5m_224", {"window_sizes": [7, 7, 1000, 7]}),
    ],
)
def test_loops_without_tensor_operations_are_stopped(
    architecture: str, args: dict, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitprune.models.io.MAX_SECONDS", 1.0)
    shutil.copytree(saved_model, tmp_path / "model")
    path = tmp_path / "model/config.json"
    changes = {"architecture": architecture, "model_args": args, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    limits = r"more than (1 s of CPU time|1024 MiB of memory)"
    with pytest.raises(BadInput, match=rf"model_args \({limits}; no timm model needs so much\)$"):
        load(tmp_path / "model")


MUCH_MEMORY = "more than 1024 MiB of memory; no timm model needs so much"


@pytest.mark.parametrize(
    ("build", "seconds", "why"),
    [
        (lambda: sum(range(10**12)), 1.0, "more than 1 s of CPU time; no timm model needs so much"),
        (lambda: [0] * (1 << 40), 60.0, MUCH_MEMORY),
        (lambda: [bytes(1 << 20) for _ in range(1 << 20)], 60.0, MUCH_MEMORY),
        (lambda: torch.ones(1 << 34, device="cpu"), 60.0, "allocat"),
        (lambda: os.kill(os.getpid(), 11), 60.0, "or a crash"),
        (lambda: 1 / 0, 60.0, "^division by zero$"),
    ],
    ids=["one call into C", "one allocation", "many allocations", "a tensor", "a crash", "an error"],
)
def test_a_child_process_limits_code_that_cannot_be_interrupted(
    build: Callable[[], object], seconds: float, why: str
) -> None:
    with pytest.raises(BuildLimitError, match=why):
        try_in_child(build, seconds)


def test_a_lock_that_another_thread_held_at_the_fork_is_waited_for_by_another_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock = threading.Lock()
    lock.acquire()
    release = threading.Timer(2.0, lock.release)
    release.start()
    try_in_child(lock.acquire, 60.0)  # the first children have a copy of the lock that nobody releases
    release.join()
    lock.acquire()
    monkeypatch.setattr("vitprune.models.build_limits.ATTEMPTS", 2)
    with pytest.raises(BuildLimitError, match=r"^it waits for a lock of another thread; load the model before other"):
        try_in_child(lock.acquire, 60.0)


def test_models_are_loaded_next_to_threads_that_draw_random_numbers(
    saved_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitprune.models.build_limits.ATTEMPTS", 1)
    ended = threading.Event()

    def draw() -> None:
        while not ended.is_set():
            torch.randn(1000, 1000)

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            models.io._try_build.cache_clear()
            load(saved_model)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_the_child_process_does_not_change_the_parent(capfd: pytest.CaptureFixture) -> None:
    values: list[int] = []
    files = os.listdir("/proc/self/fd")
    before = resource.getrlimit(resource.RLIMIT_AS), torch.get_rng_state()
    try_in_child(lambda: (values.append(1), os.write(2, b"not here"), torch.rand(1)), 60.0)
    assert (values, os.listdir("/proc/self/fd"), capfd.readouterr().err) == ([], files, "")
    assert resource.getrlimit(resource.RLIMIT_AS) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_no_download_import_execution_or_allocation(saved_model: Path, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", WATCHED, str(saved_model), str(tmp_path / "model")]
    ran = subprocess.run(words, check=True, capture_output=True, text=True, env=environment, timeout=300)
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["seen"] == []
    assert all(result["told"].values())
    assert result["grown"] < 300 << 10  # KiB; the largest cases build modules without weights


def test_links_to_the_files_of_a_cache_are_followed(saved_model: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(saved_model / file)
    before = load(saved_model).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in load(tmp_path).state_dict().items())


def test_saving_does_not_write_through_a_link(saved_model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / f"{file}.partial").symlink_to(outside)
        (folder / file).symlink_to(outside)
    save(load(saved_model), folder)
    assert outside.read_text() == "mine"
    assert load(folder).num_classes == 7


def test_checkpoints_given_to_create_are_validated(tmp_path: Path) -> None:
    architecture, args = ZOO["vit"]
    tensors = timm.create_model(architecture, **args).state_dict()
    path = tmp_path / "weights.safetensors"
    for broken, message in (
        ({"head.bias": torch.full((7,), torch.nan)}, "head.bias has values that are not finite"),
        ({"head.bias": torch.ones(7, dtype=torch.int32)}, "head.bias has type I32"),
    ):
        save_file(tensors | broken, path)
        with pytest.raises(BadInput, match=f"^{path}: weight {message}"):
            models.create(architecture, args, checkpoint=path)


def test_no_source_file_uses_pickle_loading() -> None:
    root = Path(__file__).parents[2]
    for path in [*root.glob("vitprune/**/*.py"), *root.glob("flows/**/*.py")]:
        for line in path.read_text().splitlines():
            assert "pickle" not in line, path
            assert "torch.load(" not in line or "weights_only=True" in line, path
