import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vitprune.errors import BadInput
from vitprune.pipeline.report import numbers
from vitprune.pipeline.report.page import write_report
from vitprune.runtime import tables

HOSTILE = "<script>alert('1')</script>$x^$"
MASK = "a1b2c3d4" * 8


class Page(HTMLParser):
    """Parsed values and references of a report page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: dict[str, str] = {}
        self.shown: dict[str, str] = {}
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.add(tag)
        self.references += [given[key] or "" for key in ("src", "href", "xlink:href", "data", "srcset") if key in given]
        if "id" in given:
            self.ids.append(given["id"] or "")
        name = given.get("data-name")
        self._open.append(name or "")
        if name:
            assert name not in self.values, f"{name} is named twice"
            self.values[name], self.shown[name] = given.get("data-value") or "", ""
        if tag in ("meta", "img"):
            self._open.pop()

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for name in filter(None, self._open):
            self.shown[name] += data


def put(path: Path, content: dict[str, Any] | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def speed_facts(latency: float) -> dict[str, Any]:
    spread = {"median": latency, "p10": 0.9 * latency, "p90": 1.25 * latency, "runs": 50, "batch": 1}
    return {"latency_ms": spread, "throughput": 2136.4}


def model_facts(top1: float, params: int, macs: int) -> dict[str, Any]:
    sizes = {"params": params, "nonzero_params": params, "macs": macs, "nonzero_macs": macs, "nominal_macs": macs}
    return {"top1": top1, "top5": 99.5} | sizes


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def evaluated(project: Path) -> None:
    """Write 360 predictions: 341 right by both models, 7 by dense only, 4 by pruned only, 8 by neither."""
    outcomes = [(0, 0)] * 341 + [(0, 1)] * 7 + [(1, 0)] * 4 + [(1, 1)] * 8
    outputs = [(at % 5, at % 5 + a, at % 5 + b) for at, (a, b) in enumerate(outcomes)]
    rows = [{"id": str(at), "label": y, "dense": a, "pruned": b} for at, (y, a, b) in enumerate(outputs)]
    tables.write_table(rows, tables.EVALUATION, project / "out/evaluate/evaluation.parquet")
    dense = model_facts(100 * 348 / 360, 5_717_416, 1_254_000_000)
    pruned = model_facts(100 * 345 / 360, 2_458_489, 539_220_000)
    environment = {"python": "3.11.7", "torch": "2.11.0", "cpu": "EPYC", "cores": 2, "gpu": None}
    put(project / "metrics/evaluate.json", {"dense": dense, "pruned": pruned, "images": 360})
    measured = {"dense": speed_facts(4.0), "pruned": speed_facts(2.5), "environment": environment}
    put(project / "metrics/latency.json", measured)


def calibrated(project: Path) -> None:
    digits = load_digits()
    pictures = [png(255 / 16 * image) for image in digits.images[:39]]
    pictures.append(png(np.tile(np.arange(256), (200, 1))))  # one that needs a thumbnail
    labels = [*digits.target[:39].tolist(), 4]
    rows = [
        {"id": f"digits/{at}", "label": label, "sha256": "0", "image": {"bytes": picture, "path": None}}
        for at, (label, picture) in enumerate(zip(labels, pictures, strict=True))
    ]
    tables.write_table(rows, tables.CALIBRATION, project / "data/calibration.parquet")


def pruned_in_cycles(project: Path) -> None:
    for cycle, sparsity in ((1, 0.25), (2, 0.5)):
        directory = project / f"out/cycles/{cycle:02}"
        facts = {"cycle": cycle, "sparsity": {HOSTILE: sparsity}, "top1_before": 80.0, "top1_after": 96.0}
        put(directory / "metrics.json", facts | {"params": 4_000_000, "macs": 10**9, "masks_sha256": MASK})
        rows = [
            {"group": group, "kind": HOSTILE, "units": 200, "kept": int(200 * (1 - sparsity)), "sparsity": sparsity}
            for group in ("blocks.0.mlp", "blocks.1.mlp", HOSTILE)
        ]
        tables.write_table(rows, tables.SPARSITY, directory / "sparsity.parquet")
    steps = [f"prune,{cycle},{step},{1 / step},{95 + step}" for cycle in (1, 2) for step in (1, 2, 3)]
    put(project / "plots/prune.csv", "\n".join(["stage,cycle,step,loss,top1", *steps, ""]))
    put(project / "plots/dense.csv", "stage,step,loss,top1\ndense,1,2.5,\ndense,2,2.0,50\ndense,3,,60\n")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    evaluated(tmp_path)
    calibrated(tmp_path)
    pruned_in_cycles(tmp_path)
    facts = {"source": "digits", "classes": 10, "train": 1437, "eval": 360, "skipped": 0, "sha256": "c" * 64}
    put(tmp_path / "metrics/dataset.json", facts | {"class_names": [HOSTILE, "one"]})
    put(tmp_path / "metrics/distill.json", {"sha256": "d" * 64})
    put(tmp_path / "params.yaml", f'seed: 0\nprune: {{method: channel-taylor, "{HOSTILE}": "{HOSTILE}"}}\n')
    return tmp_path


def render(project: Path) -> str:
    write_report(project, project / "out/report/report.html")
    return (project / "out/report/report.html").read_text(encoding="utf-8")


def test_numbers_are_on_the_page(project: Path) -> None:
    page = Page(render(project))
    assert page.shown["headline"].replace("\N{NARROW NO-BREAK SPACE}", " ") == (
        "digits: 57 % fewer MACs, top-1 96.67 \N{RIGHTWARDS ARROW} 95.83 % (\N{MINUS SIGN}0.83 points)"
    )
    assert page.shown["pruned.top1"] == "95.83"
    assert float(page.values["pruned.top1"]) == 100 * 345 / 360
    assert page.shown["dense.params"] == "5.72\N{NARROW NO-BREAK SPACE}M"
    assert page.values["pruned.macs"] == "539220000"
    assert float(page.values["change.macs"]) == pytest.approx(-57.0)
    assert page.shown["dense.latency_ms.p90"] == "5.00"
    counts = [page.values[f"paired.{key}"] for key in ("both", "dense_only", "pruned_only", "neither")]
    assert counts == ["341", "7", "4", "8"]
    assert float(page.values["paired.low"]) == pytest.approx(-3.013, abs=1e-3)
    assert float(page.values["paired.high"]) == pytest.approx(1.211, abs=1e-3)
    assert page.shown["paired.p_different"] == "0.5488"
    assert page.values["cycle.2.masks_sha256"] == MASK
    assert page.shown["removed." + HOSTILE + ".blocks.*.mlp"] == "50.0"
    assert page.values["params.prune.method"] == "channel-taylor"
    assert page.values["environment.cpu"] == "EPYC"
    assert page.values["sha256.distill"] == "d" * 64


def test_a_top5_of_100_percent_is_not_on_the_page(project: Path) -> None:
    assert Page(render(project)).shown["pruned.top5"] == "99.50"
    measured = json.loads((project / "metrics/evaluate.json").read_text())
    for model in ("dense", "pruned"):
        measured[model]["top5"] = 100.0
    put(project / "metrics/evaluate.json", measured)
    assert not [name for name in Page(render(project)).shown if "top5" in name]


def test_every_exported_file_is_on_the_page_with_its_difference_or_its_error(project: Path) -> None:
    files = {"onnx": 4e-6, "fp16": 0.0067, "int8": 0.25, "pt2": 0.0}
    facts: dict[str, Any] = {
        name: {"max_abs_diff": difference, "bound": 0.125, "bytes": 1_234_567} for name, difference in files.items()
    }
    facts |= {"timm": {"loads_plain_timm": True, "max_abs_diff": 0.0}, "openvino": {"error": f"refused {HOSTILE}"}}
    put(project / "metrics/export.json", facts)
    page = Page(render(project))
    for name, difference in files.items():
        assert float(page.values[f"export.{name}.max_abs_diff"]) == difference
        assert page.shown[f"export.{name}.max_abs_diff"] == f"{difference:.1e} (allowed: 1.2e-01)"
        assert page.values[f"export.{name}.bytes"] == "1234567"
    assert page.shown["export.timm.max_abs_diff"] == "0.0e+00"
    assert page.shown["export.openvino.error"] == f"not written: refused {HOSTILE}"


def test_merged_tokens_are_named(project: Path) -> None:
    assert "patch tokens" not in render(project)
    (project / "params.yaml").write_text("prune: {merge_tokens: 13}\n")
    assert (
        "The pruned model merges up to 13 patch tokens into similar ones before every block but the first."
        in render(project)
    )


def test_class_losses_add_up(project: Path) -> None:
    page = Page(render(project))
    losing = [float(value) for name, value in page.values.items() if name.startswith("class.") and ".lost" in name]
    gained = 4 - 7 + sum(losing)
    assert 0 <= gained <= 4  # what the other classes gained, at most what only the pruned model has right


def test_page_loads_no_external_file(project: Path) -> None:
    text = render(project)
    page = Page(text)
    assert {reference.split(":")[0] for reference in page.references if not reference.startswith("#")} == {"data"}
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in text
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed"})
    assert len(set(page.ids)) == len(page.ids)
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)
    assert page.references[:2] == ["#comparison", "#difference"]  # the contents
    assert page.values.keys() & {"dense.macs", "dense.nonzero_macs", "dense.nominal_macs"} == {"dense.macs"}  # no zeros


def test_markup_in_names_is_escaped(project: Path) -> None:
    text = render(project)
    assert "<script" not in text
    page = Page(text)
    assert page.values[f"params.prune.{HOSTILE}"] == HOSTILE
    assert "&lt;script&gt;alert('1')&lt;/script&gt;$x^$</text>" in text  # in a plot, not read as a formula


def test_same_inputs_give_same_bytes(project: Path, tmp_path: Path) -> None:
    first = render(project)
    script = "import sys, pathlib, vitprune.pipeline.report.page as r; r.write_report(*map(pathlib.Path, sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", script, project, tmp_path / "again.html"], check=True, timeout=120)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == first


SECTIONS = {
    "out/cycles": {"cycles", "sparsity"},
    "plots": {"training"},
    "out/evaluate": {"difference", "classes"},
    "data": {"calibration"},
}


@pytest.mark.parametrize("missing", SECTIONS)
def test_sections_without_data_are_omitted(project: Path, missing: str) -> None:
    assert SECTIONS[missing] <= set(Page(render(project)).ids)
    shutil.rmtree(project / missing)
    remaining = set(Page(render(project)).ids)
    assert remaining.isdisjoint(SECTIONS[missing])
    assert {"comparison", "provenance"} <= remaining


def test_evaluation_alone_is_enough(tmp_path: Path) -> None:
    evaluated(tmp_path)
    shutil.rmtree(tmp_path / "out")
    page = Page(render(tmp_path))
    assert page.shown["headline"].startswith("57")
    assert [name for name in page.ids if "-" not in name] == ["comparison", "provenance"]


def test_cycles_without_metrics_use_the_curve(project: Path) -> None:
    shutil.rmtree(project / "out/cycles")
    put(
        project / "plots/cycles.csv",
        "cycle,sparsity,top1_before,top1_after,params\n1,0.3,80,96,4000\n2,0.6,,95.5,3000\n",
    )
    page = Page(render(project))
    assert page.shown["cycle.2.sparsity.all"] == "60.0"
    assert page.shown["cycle.2.top1_before"] == numbers.ABSENT
    assert "cycle.2.masks_sha256" not in page.values


def test_missing_evaluation_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"metrics/evaluate\.json: no such file; run `vitprune evaluate`"):
        render(tmp_path)
    assert not (tmp_path / "out").exists()


def test_unusable_files_are_bad_input(project: Path) -> None:
    facts = json.loads((project / "metrics/evaluate.json").read_text())
    put(project / "metrics/evaluate.json", facts | {"pruned": facts["pruned"] | {"top1": 90.0}})
    with pytest.raises(BadInput, match=r"evaluation\.parquet: its pruned top-1 is 95\.83 % but .* says 90\.00 %"):
        render(project)
    put(project / "metrics/evaluate.json", facts | {"dense": {"top1": 96.0}})
    with pytest.raises(BadInput, match=r"evaluate\.json: key dense\.params is missing"):
        render(project)
    put(project / "metrics/evaluate.json", "{")
    with pytest.raises(BadInput, match=r"evaluate\.json: not valid JSON"):
        render(project)


def test_broken_picture_is_bad_input(project: Path) -> None:
    row = {"id": "digits/7", "label": 0, "sha256": "0", "image": {"bytes": b"no image", "path": None}}
    tables.write_table([row], tables.CALIBRATION, project / "data/calibration.parquet")
    with pytest.raises(BadInput, match=r"calibration\.parquet: image digits/7 cannot be decoded"):
        render(project)


def test_commit_state_ignores_files_written_by_runs(project: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
        command = ["git", "-C", str(project), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", "params.yaml", "metrics")
    git("commit", "--quiet", "--message", "Start.")
    (project / "metrics/distill.json").write_text('{"sha256": "e"}')
    page = Page(render(project))
    assert page.values["commit"] == git("rev-parse", "HEAD")
    assert "commit.dirty" not in page.values
    (project / "params.yaml").write_text("seed: 1\n")
    assert Page(render(project)).values["commit.dirty"] == "true"


@pytest.fixture
def chromium(tmp_path: Path) -> list[str]:
    result = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if result is None:
        pytest.skip("no Chromium on this machine (looked for chromium, chromium-browser, google-chrome)")
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage"]
    options = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"]
    options.append(f"--user-data-dir={tmp_path / 'profile'}")
    return [result, *options, *(f"--disable-{word}" for word in quiet)]


@pytest.mark.browser
def test_browser_shows_the_numbers(project: Path, chromium: list[str], tmp_path: Path) -> None:
    render(project)
    address = (project / "out/report/report.html").as_uri()
    dumped = subprocess.run([*chromium, "--dump-dom", address], check=True, capture_output=True, timeout=120)
    page = Page(dumped.stdout.decode("utf-8"))
    assert page.shown["pruned.top1"] == "95.83"
    assert page.values["dense.params"] == "5717416"
    picture = tmp_path / "page.png"
    shoot = [*chromium, f"--screenshot={picture}", "--window-size=1280,3000", address]
    subprocess.run(shoot, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (3000, 1280)
    for band in np.split(pixels, 3):  # text, tables or plots on the whole page
        assert len(np.unique(band)) > 50
