"""WebDataset image source: tar shards in which the members of one key are one sample.

timm reads shards as a stream; here an index of all members gives random access by id.
"""

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from timm.data.readers.targets import get_field, has_field

from vitprune.data.images import image_suffixes
from vitprune.data.sources import Source, SourceError, checked_label, missing_image
from vitprune.data.split_names import EVAL_SPLITS, files_by_split
from vitprune.errors import BadInput
from vitprune.runtime.files import read_regular_file
from vitprune.runtime.messages import first_line
from vitprune.runtime.progress import track
from vitprune.runtime.untrusted import path_inside

IMAGES = ("jpg", "jpeg", "png", "webp")  # in order of preference, before all other formats
LABELS = ("cls", "json")
INFO = ("_info.json", "info.json")
MAX_LABEL_BYTES = 1 << 20
MAX_READ, MAX_INFO = 1 << 24, 1 << 24  # bytes of one read of a tar header, and of _info.json
KEY = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # the key ends at the first dot of the file name


@dataclass(frozen=True)
class ByteRange:
    """Byte range of an image in a shard.

    Attributes:
        shard: File name of the shard.
        start: First byte.
        size: Number of bytes.
    """

    shard: str
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class ShardReader:
    """Reads images of shards by the id SHARD#KEY, each with one seek."""

    spec: str
    root: Path
    ranges: Mapping[str, ByteRange]

    def __call__(self, image_id: str, /) -> bytes:
        """Return the encoded bytes."""
        if image_id not in self.ranges:
            raise missing_image(image_id, self.spec)
        span = self.ranges[image_id]
        # reopened, because threads and forked processes would share the position of an open file
        with (self.root / span.shard).open("rb") as file:
            file.seek(span.start)
            data = file.read(span.size)
        if len(data) < span.size:
            raise OSError("the shard is shorter than when it was indexed")
        return data


@dataclass(frozen=True)
class BoundedReads:
    """A file whose single reads are bounded: a tar header states how many bytes tarfile reads at once."""

    file: IO[bytes]

    def read(self, size: int = -1) -> bytes:
        """Read bytes."""
        if not 0 <= size <= MAX_READ:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self.file.tell()


@dataclass(frozen=True)
class Sample:
    """Members of one key by file extension: byte ranges of images, contents of .cls and .json."""

    images: dict[str, ByteRange] = field(default_factory=dict)
    labels: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """Shards of a split, and the field of their .json members that is the label; empty for .cls."""

    shards: Sequence[str]
    field: str = ""


def open_webdataset(spec: str, classes: Sequence[str] | None) -> Source:
    """Open WebDataset shards.

    Splits come from _info.json (info.json), else from the words train and validation (val, test) in the names of the
    shards; if no name has one, there are none. The label is the .cls member, or a field of the .json member: the one
    that _info.json names as alt_label, else `label` if there is no .cls. Samples with a negative .json label are
    skipped, as in timm.

    Args:
        spec: wds/PATH or, as in timm, wds/NAME:PATH; PATH is a shard or a folder of shards.
        classes: Class names by label.

    Returns:
        The source.

    Raises:
        BadInput: a shard is missing, compressed or truncated, only some names have a split, or a sample has no image or
            label.
    """
    name_or_path = spec.removeprefix("wds/").rpartition(":")[2]
    if not name_or_path:
        raise SourceError(f"{spec!r} lacks the path; write wds/PATH", first=True)
    path = Path(name_or_path)
    root = path if path.is_dir() else path.parent
    splits, unused = _splits(spec, path)
    ids: list[str] = []
    labels: list[int] = []
    split_of: list[str] = []
    ranges: dict[str, ByteRange] = {}
    shards = [(name, split, shard) for name, split in splits.items() for shard in split.shards]
    for name, split, shard in track(shards, "indexing the shards", len(shards)):
        for key, sample in _index_shard(root, shard).items():
            label = _label(f"{root / shard}: sample {key}", sample, split.field, classes)
            if label is None:
                continue
            ids.append(f"{shard}#{key}")
            labels.append(label)
            split_of.append("train" if name == "train" else "eval")
            ranges[ids[-1]] = _image(f"{root / shard}: sample {key}", sample)
    if not ids:
        raise SourceError(f"{spec}: no samples in the shards")
    names = None if classes is None else tuple(classes)
    native = tuple(split_of) if len(splits) == 2 else None
    return Source(spec, tuple(ids), tuple(labels), names, native, ShardReader(spec, root, ranges), tuple(unused))


def _splits(spec: str, path: Path) -> tuple[dict[str, Split], list[str]]:
    """Return the shards of train and of one eval split, or of train alone; and shards that are not used."""
    if path.exists() and not path.is_dir():
        return {"train": Split([path.name])}, []
    if not path.is_dir():
        raise SourceError(f"{spec}: no such file or folder")
    info = next((path / name for name in INFO if (path / name).is_file()), None)
    if info is not None:
        described = _train_and_eval(_read_info(info))
        used = {shard for split in described.values() for shard in split.shards}
        return described, sorted(file.name for file in path.glob("*.tar") if file.name not in used)
    shards = sorted(file.name for file in path.glob("*.tar"))
    if not shards:
        raise SourceError(f"{spec}: no *.tar file in the folder")
    by_split, unused = files_by_split(shards, spec)
    return {split: Split(names) for split, names in by_split.items()}, unused


def _read_info(path: Path) -> dict[str, Split]:
    try:
        splits = json.loads(read_regular_file(path, MAX_INFO))["splits"]
        described = {
            name: Split([str(shard) for shard in split["filenames"]], str(split.get("alt_label") or ""))
            for name, split in splits.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: not a dataset description in timm's format ({error!r})") from None
    for split in described.values():
        for shard in split.shards:
            path_inside(path.parent, shard, path.name)
    if "train" not in described:
        raise BadInput(f"{path}: has no split train; add one with the shards to train on")
    return described


def _train_and_eval(splits: Mapping[str, Split]) -> dict[str, Split]:
    evaluation = next((name for name in EVAL_SPLITS if name in splits), None)
    return {"train": splits["train"]} | ({} if evaluation is None else {evaluation: splits[evaluation]})


def _index_shard(root: Path, shard: str) -> dict[str, Sample]:
    """Return the samples of one shard by key, in order. Labels are read, images are only located."""
    samples: dict[str, Sample] = {}
    try:
        if not (root / shard).is_file() and (root / shard).exists():
            raise SourceError(f"{root / shard}: not a regular file")
        with (root / shard).open("rb") as file, tarfile.open(fileobj=BoundedReads(file), mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                match = KEY.fullmatch(member.name)
                if member.isreg() and match and not _is_meta(member.name):
                    _add(samples.setdefault(match[1], Sample()), member, match[2].lower(), tar, shard)
    except FileNotFoundError:
        raise SourceError(f"{root / shard}: no such file") from None
    except BadInput:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, TypeError, LookupError, OverflowError) as error:
        reason = first_line(error)[:200]
        raise BadInput(f"{root / shard}: not a complete, uncompressed tar file ({reason}); write it again") from None
    return samples


def _is_meta(name: str) -> bool:
    return "/" not in name and name.startswith("__") and name.endswith("__")


def _add(sample: Sample, member: tarfile.TarInfo, ending: str, tar: tarfile.TarFile, shard: str) -> None:
    if ending in sample.images or ending in sample.labels:
        raise BadInput(f"{shard}: {member.name} occurs twice; give every sample its own key")
    if member.issparse() or (ending in LABELS and member.size > MAX_LABEL_BYTES):
        raise BadInput(f"{shard}: {member.name} is sparse or too large ({member.size} bytes); write the shard again")
    if f".{ending}" in image_suffixes():
        sample.images[ending] = ByteRange(shard, member.offset_data, member.size)
    elif ending in LABELS and (content := tar.extractfile(member)) is not None:
        sample.labels[ending] = content.read()


def _image(where: str, sample: Sample) -> ByteRange:
    for ending in (*IMAGES, *sorted(sample.images)):
        if ending in sample.images:
            return sample.images[ending]
    raise BadInput(f"{where} has no image; each needs one of .{', .'.join(IMAGES)} or another format that Pillow reads")


def _label(where: str, sample: Sample, name: str, classes: Sequence[str] | None) -> int | None:
    """Return the label of a sample, None to skip it."""
    value = _label_value(where, sample, name)
    if isinstance(value, int) and value < 0 and (name or "cls" not in sample.labels):
        return None
    return checked_label(value, classes, where)


def _label_value(where: str, sample: Sample, name: str) -> Any:
    if not name and "cls" in sample.labels:
        return sample.labels["cls"].decode("ascii", "replace").strip()
    if "json" not in sample.labels:
        raise BadInput(f"{where} has no label; each needs a .{'json' if name else 'cls'} member")
    try:
        facts = json.loads(sample.labels["json"])
    except (ValueError, RecursionError):
        raise BadInput(f"{where} has a .json member that is not JSON; write it again") from None
    wanted = name or "label"
    if not isinstance(facts, dict) or not has_field(facts, wanted):
        raise BadInput(f"{where} has no field {wanted} in its .json member; name it as alt_label in _info.json")
    return get_field(facts, wanted)
