"""Write tests/slow_tests.txt, the tests that `make test-fast` leaves out, from the times of a complete run.

pytest --numprocesses auto --junitxml times.xml
python -m tests.support.slow_tests times.xml
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from xml.etree import ElementTree

SLOW_TESTS = Path(__file__).parents[1] / "slow_tests.txt"
LIMIT = 0.25  # seconds, mean over the parameters of a test


def main() -> None:
    times = defaultdict(list)
    for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
        path = case.attrib["classname"].replace(".", "/") + ".py"
        times[f"{path}::{case.attrib['name'].split('[')[0]}"].append(float(case.attrib["time"]))
    slow = sorted(name for name, seconds in times.items() if mean(seconds) > LIMIT)
    SLOW_TESTS.write_text("\n".join(slow) + "\n")


if __name__ == "__main__":
    main()
