"""Fill the tables of measured values in docs/guides and docs/methods from benchmarks/results.

A pair of comments in a page marks a table; the lines between them are replaced:

    <!-- table: oneshot | 50 %, 2:4 | magnitude; obc; obc + correction -->
    <!-- end -->

The parts are the results file, the columns and the rows; a cell is the value of the row "ROW, COLUMN" of
benchmarks/results/NAME.json. `--check` writes nothing and exits with 1 if a table differs from the results.
"""

import argparse
import re
import sys

from benchmarks.docs.readme_table import ROOT, results

TABLE = re.compile(r"(<!-- table: ([^|]+)\|([^|]+)\|(.+?)-->\n).*?(<!-- end -->)", re.DOTALL)


def filled(match: re.Match[str]) -> str:
    """Return the comments with the table between them."""
    begin, name, columns, rows, end = match.groups()
    values = results(name.strip())
    header = ["top-1, %", *(column.strip() for column in columns.split(","))]
    lines = [header, ["---"] * len(header)]
    for row in (row.strip() for row in rows.split(";")):
        cells = [values.get(f"{row}, {column}") for column in header[1:]]
        if all(cell is None for cell in cells):
            sys.exit(f"benchmarks/results/{name.strip()}.json: no value of {row!r}; correct the table's comment")
        lines.append([f"`{row}`", *("" if cell is None else f"{cell:.1f}" for cell in cells)])
    return begin + "".join(f"| {' | '.join(line)} |\n" for line in lines) + end


def main() -> None:
    """Fill all tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", "--quick", action="store_true", help="write nothing, compare with the results")
    check = parser.parse_args().check
    for path in sorted((ROOT / "docs").glob("**/*.md")):
        before = path.read_text(encoding="utf-8")
        now = TABLE.sub(filled, before)
        if now != before and check:
            sys.exit(f"{path.relative_to(ROOT)}: a table differs; run python -m benchmarks.docs.method_tables")
        if now != before:
            path.write_text(now, encoding="utf-8")


if __name__ == "__main__":
    main()
