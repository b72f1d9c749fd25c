import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    """Return the version of every package of a lock file, as written by `make lock`."""
    lines = [line.split()[0] for line in (ROOT / name).read_text().splitlines() if re.match(r"[a-z0-9]", line)]
    return dict(line.split("==") for line in lines)


def test_every_package_is_pinned_in_a_version_that_pyproject_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    versions = pins("constraints.txt")
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_a_deployment_has_the_same_versions_with_hashes() -> None:
    text = (ROOT / "requirements-hashes.txt").read_text()
    assert pins("requirements-hashes.txt").items() <= pins("constraints.txt").items()
    blocks = re.split(r"\n(?=[a-z0-9])", text.strip())
    pattern = re.compile(
        r"[a-z0-9._-]+(\[[a-z0-9,-]+\])?==\S+( ; [^\n\\]+)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\\n)?)+"
    )
    assert [block.splitlines()[0] for block in blocks if not pattern.fullmatch(block)] == []
