"""Take the README's screenshots of a run: the report, the run in Prefect, the run in MLflow.

A project on the embedded digits is run by its deployment on real servers on loopback, and headless Chromium takes
docs/images/report.png, prefect.png and mlflow.png, with a color palette that keeps each below 200 KB.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from mlflow import MlflowClient
from PIL import Image

from benchmarks.lib import toy_project
from benchmarks.lib.results import arguments
from benchmarks.lib.toy_project import ROOT, servers, tiny_project

IMAGES = ROOT / "docs/images"
MAX_BYTES = 200_000
COLORS = (256, 128, 64, 32)
QUIET = ("quic", "background-networking", "component-update", "sync", "dev-shm-usage")


def main() -> None:
    """Start the servers, run the project, and take the screenshots."""
    quick = arguments(__doc__).quick
    toy_project.require_servers()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("no Chromium on this machine; apt-get install chromium")
        return
    with tempfile.TemporaryDirectory(prefix="vitprune-pictures-") as name:
        folder = Path(name)
        images = folder if quick else IMAGES
        images.mkdir(parents=True, exist_ok=True)
        with servers.serving(folder / "team", {}) as running:
            project = run_deployment(folder / "digits", running, quick)
            for what, address in addresses(project, running).items():
                take([browser, f"--user-data-dir={folder / 'profile'}"], address, images / f"{what}.png", SIZES[what])


SIZES = {"report": (1200, 1500), "prefect": (1400, 900), "mlflow": (1400, 1000)}
CROPPED = {"mlflow.png": 1035}  # without the side panel


def run_deployment(project: Path, servers: servers.Servers, quick: bool) -> Path:
    """Create the project and run its deployment by a worker."""
    tiny_project.make(project)
    if not quick:
        path = project / "params.yaml"
        params = yaml.safe_load(path.read_text())
        params["dense"]["train"] = {"epochs": 25, "batch_size": 64, "lr": 0.002, "warmup_epochs": 2}
        params["prune"]["finetune"] = {"epochs": 3, "batch_size": 64, "lr": 0.001}
        params["distill"]["train"] = {"epochs": 10, "batch_size": 64, "lr": 0.001}
        params["evaluate"]["latency_runs"] = 50
        path.write_text(yaml.safe_dump(params, sort_keys=False))
        tiny_project.commit(project, "Train for longer.")
    with deployed(project, servers):
        (deployment,) = servers.ask("/deployments/filter", {"deployments": {"name": {"any_": ["compress"]}}})
        run = servers.ask(f"/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
        query = {"flow_runs": {"id": {"any_": [run["id"]]}}}
        deadline = time.monotonic() + 3600
        while (state := servers.ask("/flow_runs/filter", query)[0]["state"])["type"] != "COMPLETED":
            if state["type"] in ("FAILED", "CRASHED") or time.monotonic() > deadline:
                sys.exit(f"the run is {state['type']}: {state['message']}")
            time.sleep(1)
    return project


@contextlib.contextmanager
def deployed(project: Path, servers: servers.Servers) -> Iterator[None]:
    """Start a worker and deploy the project."""
    with servers.worker(project.with_name("worker.log")):
        servers.run("prefect", "--no-prompt", "deploy", "--all", where=project)
        yield


def addresses(project: Path, servers: servers.Servers) -> dict[str, str]:
    """Return the URL of every page."""
    client = MlflowClient(tracking_uri=servers.env["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("vitprune").experiment_id
    runs = client.search_runs([experiment], "tags.`vitprune.prefect_flow_run_id` != ''", max_results=100)
    (parent,) = [run for run in runs if "/" not in run.data.tags["vitprune.key"]]
    flow = parent.data.tags["vitprune.key"]
    return {
        "report": (project / "out/report/report.html").as_uri(),
        "prefect": f"{servers.env['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/{flow}",
        "mlflow": f"{servers.env['MLFLOW_TRACKING_URI']}/#/experiments/{experiment}/runs/{parent.info.run_id}",
    }


def take(browser: list[str], address: str, path: Path, size: tuple[int, int]) -> None:
    """Take a screenshot; reduce the colors until the file is small enough."""
    options = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", "--virtual-time-budget=60000"]
    options += [*(f"--disable-{word}" for word in QUIET), "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        window = f"--window-size={size[0]},{size[1]}"
        subprocess.run([*browser, *options, f"--screenshot={raw}", window, address], check=True, capture_output=True)
        with Image.open(raw) as image:
            picture = image.convert("RGB").crop((0, 0, CROPPED.get(path.name, image.width), image.height))
    for colors in COLORS:
        content = io.BytesIO()
        picture.quantize(colors).save(content, "PNG", optimize=True)
        if len(content.getvalue()) < MAX_BYTES:
            break
    path.write_bytes(content.getvalue())
    print(f"{path}: {len(content.getvalue()) / 1000:.0f} KB, {colors} colors", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
