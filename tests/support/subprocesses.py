"""Commands and environment of tests that start Python processes."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
