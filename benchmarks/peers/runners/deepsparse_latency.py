"""DeepSparse: latency of ONNX files, which run alternately.

job.json: models (names of ONNX files), batch, threads, runs. images.npy: images (B, 3, 224, 224). Writes NAME.npy, the
logits of each model, and result.json: versions, and by name `ms`, the median milliseconds of a run, and `supported`,
the fraction of operators that the engine supports. A model that it does not support completely is an error.
"""

import importlib.metadata
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy


def main() -> None:
    """Compile and run the models of the job on the command line."""
    os.environ["NM_DISABLE_ANALYTICS"] = "1"  # read by the import
    from deepsparse import Engine

    folder = Path(sys.argv[1])
    job, images = json.loads((folder / "job.json").read_text()), [numpy.load(folder / "images.npy")]
    engines, facts = {}, {}
    for name in job["models"]:
        engine = Engine(str(folder / f"{name}.onnx"), batch_size=job["batch"], num_cores=job["threads"])
        supported = engine.fraction_of_supported_ops
        if supported < 1:
            raise SystemExit(f"{name}: DeepSparse supports {supported:.2%} of the operators, not all of them")
        numpy.save(folder / f"{name}.npy", engine.run(images)[0])
        engines[name], facts[name] = engine, {"supported": supported}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for run in range(-max(3, job["runs"] // 5), job["runs"]):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.run(images)
            if run >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    models = {name: {"ms": statistics.median(times[name]), **facts[name]} for name in engines}
    versions = {"deepsparse": importlib.metadata.version("deepsparse")}
    (folder / "result.json").write_text(json.dumps({"models": models, "versions": versions}))


if __name__ == "__main__":
    main()
