"""Draw the entries of vitprune/ and the imports between them: docs/images/import_graph.svg.

A package is drawn above everything that it imports; an arrow that follows from others (A imports B, B imports C,
A imports C) is not drawn. Exits with an error if vitprune/ has more than 16 entries or the imports have a cycle.
"""

import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import grimp

from benchmarks.docs import svg

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs/images/import_graph.svg"
MOST_ENTRIES = 16
WIDTH, ROW, BOX, HEIGHT = 860, 82, 128, 34

Imports = Mapping[str, set[str]]


def entries() -> list[str]:
    """Return the packages and modules directly in vitprune/."""
    paths = (ROOT / "vitprune").iterdir()
    return sorted(path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").exists())


def imports() -> dict[str, set[str]]:
    """Return, for every entry of vitprune/ but the package itself, the entries that it imports."""
    graph = grimp.build_graph("vitprune", exclude_type_checking_imports=True, cache_dir=None)
    result: dict[str, set[str]] = {name: set() for name in entries() if name != "__init__"}
    for module in graph.modules:
        for target in graph.find_modules_directly_imported_by(module):
            importer, imported = (name.split(".")[1:2] for name in (module, target))
            if importer and imported and importer != imported:
                result[importer[0]].add(imported[0])
    return result


def rows(graph: Imports) -> dict[str, int]:
    """Return the row of every entry: 0 if nothing is imported, else one above the highest import.

    Raises:
        graphlib.CycleError: The imports have a cycle.
    """
    height: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        height[name] = 1 + max((height[target] for target in graph[name]), default=-1)
    return height


def direct(graph: Imports) -> dict[str, set[str]]:
    """Return the imports without those that follow from others."""

    def reachable(name: str) -> set[str]:
        return graph[name].union(*(reachable(target) for target in graph[name]))

    return {name: targets - set().union(*(reachable(target) for target in targets)) for name, targets in graph.items()}


def draw(graph: Imports) -> None:
    """Write the figure."""
    height = rows(graph)
    top = max(height.values())
    center: dict[str, tuple[float, float]] = {}
    for level in range(top + 1):
        names = sorted(name for name in height if height[name] == level)
        for index, name in enumerate(names):
            center[name] = (WIDTH * (index + 1) / (len(names) + 1), 40 + (top - level) * ROW)
    parts = [
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    ]
    parts += ['<path d="M0,0 L8,4 L0,8 z" fill="#57606a"/></marker></defs>']
    for name, targets in sorted(direct(graph).items()):
        for target in sorted(targets):
            parts.append(_arrow(*center[name], *center[target]))
    for name, (x, y) in sorted(center.items()):
        parts.append(
            f'<rect x="{x - BOX / 2:.1f}" y="{y - HEIGHT / 2:.1f}" width="{BOX}" height="{HEIGHT}" rx="6" '
            'fill="#ddf4ff" stroke="#0969da"/>'
        )
        parts.append(svg.text(x, y + 4, name, 13, "middle"))
    svg.write(FIGURE, WIDTH, 80 + top * ROW, "Packages of vitprune and their imports", parts)


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return an arrow from the lower edge of a box to the upper edge of another, bent if it spans several rows."""
    start, end = y1 + HEIGHT / 2, y2 - HEIGHT / 2 - 1
    bend = 0.0 if y2 - y1 <= ROW else (60.0 if x1 <= WIDTH / 2 else -60.0) * -1
    path = f"M{x1:.1f},{start:.1f} C{x1 + bend:.1f},{start + 30:.1f} {x2 + bend:.1f},{end - 30:.1f} {x2:.1f},{end:.1f}"
    return f'<path d="{path}" fill="none" stroke="#57606a" marker-end="url(#tip)"/>'


def problem() -> str | None:
    """Return the first problem of the packages: too many entries or an import cycle; None if there is none."""
    if len(entries()) > MOST_ENTRIES:
        return f"vitprune/ has {len(entries())} entries, at most {MOST_ENTRIES} are allowed: {', '.join(entries())}"
    try:
        rows(imports())
    except CycleError as error:
        return "import cycle: " + ", ".join(f"{one} -> {other}" for one, other in pairwise(error.args[1]))
    return None


def main() -> None:
    """Check the packages and draw them."""
    error = problem()
    if error:
        sys.exit(error)
    draw(imports())
    print(f"{FIGURE.relative_to(ROOT)}: {len(entries())} entries, no cycle")


if __name__ == "__main__":
    main()
