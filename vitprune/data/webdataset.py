"""Images in WebDataset shards: plain tar files, whose members of one key are one sample, read by their place in them.

timm reads the same shards as a stream; here an index of all members gives every image by its id.
"""

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.data.readers.targets import get_field, has_field

from vitprune.data.sources import Source, missing_image
from vitprune.errors import BadInput
from vitprune.runtime.progress import track

IMAGES = ("jpg", "jpeg", "png", "webp")  # in the order in which they are looked for
LABELS = ("cls", "json")
INFO = ("_info.json", "info.json")
EVAL_SPLITS = ("validation", "val", "test")
SPLIT_IN_NAME = re.compile(r"(?:^|[-_])(train|validation|val|test)(?=[-_.])")
KEY = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # the key ends at the first dot of the file's name


@dataclass(frozen=True)
class ByteRange:
    """Where the bytes of an image are: in which shard, and the first of them and their number there."""

    shard: str
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class ShardReader:
    """Reads images of shards by the id SHARD#KEY, each with one seek."""

    spec: str
    root: Path
    places: Mapping[str, ByteRange]

    def __call__(self, image_id: str, /) -> bytes:
        """Return the encoded bytes."""
        if image_id not in self.places:
            raise missing_image(image_id, self.spec)
        place = self.places[image_id]
        # opened anew: the position in an open file would be shared by threads and forked processes
        with (self.root / place.shard).open("rb") as file:
            file.seek(place.start)
            data = file.read(place.size)
        if len(data) < place.size:
            raise OSError("the shard has become shorter")
        return data


@dataclass(frozen=True)
class Sample:
    """What the members of one key hold, by ending: the places of images, and the content of .cls and .json."""

    images: dict[str, ByteRange] = field(default_factory=dict)
    labels: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """The shards of a split and the field of their .json members that is the label, empty for .cls."""

    shards: Sequence[str]
    field: str = ""


def open_webdataset(spec: str, classes: Sequence[str] | None) -> Source:
    """Open wds/PATH or, as timm writes it, wds/NAME:PATH; PATH is a shard or a folder of them.

    Splits are those of _info.json (info.json), else the words train and validation (val, test) in all shards' names,
    else the shards are one pool. The label is the .cls member, or the field that _info.json names (alt_label; `label`
    where there is no .cls) of the .json member; a negative one there leaves the sample out, as in timm.

    Raises:
        BadInput: a shard is missing, compressed or cut off, or a sample lacks its image or its label.
    """
    place = spec.removeprefix("wds/").rpartition(":")[2]
    if not place:
        raise BadInput(f"dataset.source: {spec!r} lacks the path; write wds/PATH")
    path = Path(place)
    root = path if path.is_dir() else path.parent
    splits = _splits(spec, path)
    ids: list[str] = []
    labels: list[int] = []
    of: list[str] = []
    places: dict[str, ByteRange] = {}
    shards = [(name, split, shard) for name, split in splits.items() for shard in split.shards]
    for name, split, shard in track(shards, "indexing the shards", len(shards)):
        for key, sample in _indexed(root, shard).items():
            found = _label(f"{root / shard}: sample {key}", sample, split.field, classes)
            if found is None:
                continue
            ids.append(f"{shard}#{key}")
            labels.append(found)
            of.append("train" if name == "train" else "eval")
            places[ids[-1]] = _image(f"{root / shard}: sample {key}", sample)
    if not ids:
        raise BadInput(f"{spec}: no sample in its shards; correct dataset.source")
    names = None if classes is None else tuple(classes)
    native = tuple(of) if len(splits) == 2 else None
    return Source(spec, tuple(ids), tuple(labels), names, native, ShardReader(spec, root, places))


def _splits(spec: str, path: Path) -> dict[str, Split]:
    """Return the shards of train and of one evaluation split, or of train alone where they are one pool."""
    if path.is_file():
        return {"train": Split([path.name])}
    if not path.is_dir():
        raise BadInput(f"{spec}: no such file or folder; correct dataset.source")
    described = next((path / name for name in INFO if (path / name).is_file()), None)
    if described is not None:
        return _chosen(_described(described))
    shards = sorted(file.name for file in path.glob("*.tar"))
    if not shards:
        raise BadInput(f"{spec}: no *.tar file in the folder; correct dataset.source")
    by_name: dict[str, list[str]] = {}
    for shard in shards:
        match = SPLIT_IN_NAME.search(shard)
        by_name.setdefault(match[1] if match else "", []).append(shard)
    splits = {name: Split(found) for name, found in by_name.items()}
    if "" in splits or "train" not in splits:
        return {"train": Split(shards)}
    return _chosen(splits)


def _described(path: Path) -> dict[str, Split]:
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        found = {
            name: Split([str(shard) for shard in split["filenames"]], split.get("alt_label") or "")
            for name, split in splits.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: not the description of a data set as timm reads it ({error!r})") from None
    if "train" not in found:
        raise BadInput(f"{path}: has no split train; name the shards to train on there")
    return found


def _chosen(splits: Mapping[str, Split]) -> dict[str, Split]:
    evaluation = next((name for name in EVAL_SPLITS if name in splits), None)
    return {"train": splits["train"]} | ({} if evaluation is None else {evaluation: splits[evaluation]})


def _indexed(root: Path, shard: str) -> dict[str, Sample]:
    """Return the samples of one shard by key, in its order; only labels are read, images are passed over."""
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(root / shard, "r:") as tar:
            for member in tar:
                match = KEY.fullmatch(member.name)
                if member.isreg() and match and not _is_meta(member.name):
                    _add(samples.setdefault(match[1], Sample()), member, match[2].lower(), tar, shard)
    except FileNotFoundError:
        raise BadInput(f"{root / shard}: no such file; correct dataset.source") from None
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{root / shard}: not a whole, uncompressed tar file ({error}); write it again") from None
    return samples


def _is_meta(name: str) -> bool:
    return "/" not in name and name.startswith("__") and name.endswith("__")


def _add(sample: Sample, member: tarfile.TarInfo, ending: str, tar: tarfile.TarFile, shard: str) -> None:
    if ending in sample.images or ending in sample.labels:
        raise BadInput(f"{shard}: {member.name} is there twice; give every sample a key of its own")
    if ending in IMAGES:
        sample.images[ending] = ByteRange(shard, member.offset_data, member.size)
    elif ending in LABELS and (content := tar.extractfile(member)) is not None:
        sample.labels[ending] = content.read()


def _image(where: str, sample: Sample) -> ByteRange:
    for ending in IMAGES:
        if ending in sample.images:
            return sample.images[ending]
    raise BadInput(f"{where} has no image; each needs one of .{', .'.join(IMAGES)}")


def _label(where: str, sample: Sample, name: str, classes: Sequence[str] | None) -> int | None:
    """Return the label of a sample, None if it is to be left out."""
    value = _written(where, sample, name)
    try:
        label = int(value)
    except (TypeError, ValueError):
        raise BadInput(f"{where} has the label {value!r}, which must be one integer") from None
    if label < 0 and (name or "cls" not in sample.labels):
        return None
    if label < 0 or (classes is not None and label >= len(classes)):
        wanted = "0 or more" if classes is None else f"0..{len(classes) - 1} ({len(classes)} classes)"
        raise BadInput(f"{where} has label {label}, which must be {wanted}")
    return label


def _written(where: str, sample: Sample, name: str) -> Any:
    if not name and "cls" in sample.labels:
        return sample.labels["cls"].decode("ascii", "replace").strip()
    if "json" not in sample.labels:
        raise BadInput(f"{where} has no label; each needs a .{'json' if name else 'cls'} member")
    try:
        facts = json.loads(sample.labels["json"])
    except ValueError:
        raise BadInput(f"{where} has a .json member that is not JSON; write it again") from None
    wanted = name or "label"
    if not isinstance(facts, dict) or not has_field(facts, wanted):
        raise BadInput(f"{where} has no field {wanted} in its .json member; name it as alt_label in _info.json")
    return get_field(facts, wanted)
