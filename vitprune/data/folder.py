"""Image source: a folder with one sub-folder per class, with or without folders of splits around them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm.utils.misc import natural_key

from vitprune.data.images import image_suffixes
from vitprune.data.sources import Source, SourceError
from vitprune.data.split_names import SPLITS, split_named
from vitprune.errors import BadInput
from vitprune.runtime.files import read_regular_file

MAX_BYTES = 1 << 28  # of one image file


@dataclass(frozen=True)
class FolderReader:
    """Reads image files below a folder; the id is the path relative to it, with forward slashes."""

    root: Path

    def __call__(self, image_id: str, /) -> bytes:
        """Return the content of the file."""
        return read_regular_file(self.root / image_id, MAX_BYTES)


@dataclass
class Scan:
    """Files below one folder.

    Attributes:
        root: Folder of the source, which links must not lead back to.
        images: Image files.
        left_out: Files that are no images, and folders that are not searched.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)

    def search(self, folder: Path) -> None:
        """Add the files of a folder; each folder is searched once, so that links cannot loop."""
        visited = {os.path.realpath(path) for path in (self.root, *Path(os.path.realpath(self.root)).parents)}
        for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
            if os.path.realpath(parent) in visited:
                self.left_out.append(Path(parent))
                folders.clear()
                continue
            visited.add(os.path.realpath(parent))
            folders[:] = sorted(name for name in folders if name[0] != ".")
            for name in names:
                if name[0] != ".":
                    path = Path(parent, name)
                    (self.images if _is_image(path) else self.left_out).append(path)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes()


def _refuse(error: OSError) -> None:
    if isinstance(error, FileNotFoundError):  # a class that a split does not have
        return
    raise BadInput(f"{error.filename}: cannot be read ({error.strerror}); correct its permissions")


def open_folder(root: Path, classes: Sequence[str] | None) -> Source:
    """Open a folder with one sub-folder per class, or with folders of splits (train and val or test) of that layout.

    Args:
        root: The folder.
        classes: Sub-folders to use, in the order of the labels; None for all, in timm's natural order.

    Returns:
        The source.

    Raises:
        BadInput: the folder is missing, has no images, one class or another layout.
    """
    if not root.is_dir():
        raise SourceError(f"folder:{root}: no such folder")
    parts, unused = _parts(root, classes)
    names = tuple(classes) if classes is not None else _class_names(root, parts)
    for name in names:
        if Path(name).name != name:
            raise BadInput(f"dataset.classes: {name!r} is not the name of a sub-folder of {root}; correct it")
    ids: list[str] = []
    labels: list[int] = []
    splits: list[str] = []
    left_out = [*unused, *(path for part in parts.values() for path in _files_of(part))]
    for split, part in parts.items():
        for label, name in enumerate(names):
            scan = Scan(root)
            scan.search(part / name)
            files = sorted(scan.images, key=lambda file: natural_key(str(file)))
            ids += [file.relative_to(root).as_posix() for file in files]
            labels += [label] * len(files)
            splits += [split] * len(files)
            left_out += scan.left_out
    if not ids:
        loose = [path for path in left_out if _is_image(path)]
        shown = ", ".join(path.name for path in (loose or left_out)[:3])
        ignored = f"{len(loose)} are beside them" if loose else f"{len(left_out)} files are no images that Pillow reads"
        also = f" ({ignored}, such as {shown})" if left_out else ""
        raise BadInput(
            f"folder:{root}: no images in its sub-folders{also}; put the images of each class into their own folder"
        )
    native = tuple(splits) if len(parts) == 2 else None
    others = tuple(path.relative_to(root).as_posix() for path in left_out)
    return Source(f"folder:{root}", tuple(ids), tuple(labels), names, native, FolderReader(root), others)


def _folders_of(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.name[0] != "." and entry.is_dir())
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({error.strerror}); correct its permissions") from None


def _files_of(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.name[0] != "." and not entry.is_dir())


def _parts(root: Path, classes: Sequence[str] | None) -> tuple[dict[str, Path], list[Path]]:
    """Return the folders of the splits, or the root alone, and sub-folders that are not used."""
    folders = _folders_of(root)
    named = {split: [path for path in folders if split_named(path.name) == split] for split in SPLITS}
    is_layout_of_classes = classes is not None and set(classes) <= {path.name for path in folders}
    if is_layout_of_classes or not any(named.values()):
        return {"train": root}, []
    where = f"folder:{root}: {', '.join(path.name for paths in named.values() for path in paths)}"
    if len(named["train"]) != 1 or not _folders_of(named["train"][0]):
        raise BadInput(
            f"{where}: names of splits, but not one training folder with a sub-folder per class; "
            "name it train, or list the folders in dataset.classes if they are classes"
        )
    evaluation = [path for split in SPLITS[1:] for path in named[split] if _folders_of(path)]
    others = [path for path in folders if path not in (*named["train"], *evaluation[:1])]
    strange = [path.name for path in others if not split_named(path.name)]
    if not evaluation and strange:
        raise BadInput(
            f"{where}: a split, but {strange[0]} is none; name the evaluation folder val, move other folders "
            "away, or list the folders in dataset.classes if they are classes"
        )
    parts = {"train": named["train"][0]} | ({"eval": evaluation[0]} if evaluation else {})
    return parts, others


def _class_names(root: Path, parts: dict[str, Path]) -> tuple[str, ...]:
    """Return the names of all class folders, unless the layout looks like another one."""
    names = {path.name for part in parts.values() for path in _folders_of(part)}
    splits = sorted(name for name in names if split_named(name))
    if splits:
        raise BadInput(
            f"folder:{root}: class {splits[0]} has the name of a split; give another folder, or list the "
            "classes in dataset.classes"
        )
    train = _folders_of(parts["train"])
    below = [tuple(path.name for path in _folders_of(folder)) for folder in train]
    if len(names) == 1 and len(below[0]) > 1:
        raise BadInput(f"folder:{root}: one class only, {train[0].name}; its folders may be: write folder:{train[0]}")
    if len(set(below)) == 1 and len(below[0]) > 1 and len(train) > 1 and not any(map(_files_of, train)):
        raise BadInput(
            f"folder:{root}: each of {train[0].name}, {train[1].name}, ... has the same sub-folders, "
            f"{below[0][0]}, {below[0][1]}, ...; if those are the classes, give one folder as the source, "
            "else list the classes in dataset.classes"
        )
    return tuple(sorted(names, key=natural_key))
