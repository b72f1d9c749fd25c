"""The recipes that come with vitprune, by name: complete settings, most of them of published runs."""

from pathlib import Path

from vitprune.config.section import similar
from vitprune.errors import BadInput

HERE = Path(__file__).parent


def recipe_files() -> dict[str, Path]:
    """Return the files of all recipes by name: those of this package in a wheel, of the repository in a checkout."""
    packed = HERE / "recipes"
    folder = packed if packed.is_dir() else HERE.parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_file(recipe: str) -> Path:
    """Return the file of a recipe, given by its path or its name.

    Raises:
        BadInput: there is no such file and no such name.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    files = recipe_files()
    if recipe not in files:
        hint = similar(recipe, list(files)) or "; vitprune recipes lists the names"
        raise BadInput(f"--recipe {recipe}: no such file, and no recipe has this name{hint}")
    return files[recipe]


def about(path: Path) -> str:
    """Return the first sentence of a recipe's comment."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    sentence, _, _ = " ".join(comment).partition(". ")
    return sentence.removesuffix(".")
