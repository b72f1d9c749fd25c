"""Splits in the names of folders and files: train, val and test, in any spelling that data sets use."""

import re
from collections.abc import Mapping, Sequence

from vitprune.errors import BadInput

SPLITS = ("train", "val", "test")  # of the last two, the first that exists becomes the eval split
EVAL_SPLITS = ("validation", "val", "test")  # names of an eval split in data sets that name their splits
WORDS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "valset", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "testset"),
}
SPLIT_OF_WORD = {word: split for split, words in WORDS.items() for word in words}
FILLERS = {"set", "data", "dataset", "image", "images", "img", "imgs", "split", "folder", "sample", "samples"}
LETTERS = re.compile("[a-z]+")


def split_in(name: str) -> str:
    """Return the split whose word occurs in a file name, empty for none or several."""
    splits = {SPLIT_OF_WORD[word] for word in LETTERS.findall(name.lower()) if word in SPLIT_OF_WORD}
    return splits.pop() if len(splits) == 1 else ""


def split_named(name: str) -> str:
    """Return the split that a folder name stands for (Training, val2017, test_set), empty for any other name."""
    words = set(LETTERS.findall(name.lower())) - FILLERS
    return split_in(name) if words and words <= SPLIT_OF_WORD.keys() else ""


def files_by_split(names: Sequence[str], where: str) -> tuple[dict[str, list[str]], list[str]]:
    """Group the files of a folder by the split in their names.

    Args:
        names: File names, of one data set.
        where: The folder, for messages.

    Returns:
        The files of `train` and of one eval split, or of `train` alone if no name has a split; and the files of
        further splits, which are not used.

    Raises:
        BadInput: only some names have a split, or there are several splits without `train`.
    """
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(split_in(name), []).append(name)
    if len(by_split) == 1:
        return {"train": list(names)}, []
    if "" in by_split:
        named = next(name for split, files in by_split.items() if split for name in files)
        raise BadInput(
            f"{where}: {by_split[''][0]} has no split in its name, but {named} has; rename it with train, val or "
            "test, or give one file as the source and another as dataset.eval_source"
        )
    if "train" not in by_split:
        raise BadInput(f"{where}: has the splits {' and '.join(by_split)}, but no train; add it or use a single file")
    return _train_and_eval(by_split)


def _train_and_eval(by_split: Mapping[str, list[str]]) -> tuple[dict[str, list[str]], list[str]]:
    evaluation = next(split for split in SPLITS[1:] if split in by_split)
    unused = [name for split, files in by_split.items() if split not in ("train", evaluation) for name in files]
    return {split: by_split[split] for split in ("train", evaluation)}, unused
