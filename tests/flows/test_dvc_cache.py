"""Read .dvc files and DVC's lists of folders, whatever their names and content."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from vitprune.errors import BadInput
from vitprune.orchestration.execution.dvc_cache import Store, pointers

MD5 = "04210ad2fbe0f3ffa3b9d9f0a1d1d2b3"


def test_dvc_files_with_any_name_are_found(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    names = ["写真.dvc", 'two words "quoted"\ttab.dvc', "plain.dvc", "deep/ä.dvc", os.fsdecode(b"not-utf-8-\xe4.dvc")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"outs:\n- path: images\n  md5: {MD5}.dir\n")
    assert set(pointers(tmp_path)) == set(names)
    assert pointers(tmp_path)["deep/ä.dvc"]["outs"][0]["path"] == "deep/images"


@pytest.mark.parametrize(
    "content",
    [b"7", b"{}7", b"[7]", b"null", b"{", b"\xff", b"[" * 100_000, b'[{"md5": "%s"}]' % MD5.encode(), b'["ab"]',
     b'[{"relpath": "x"}]', b'[{"relpath": 7, "md5": "x"}]', b'[{"relpath": "x", "md5": 7}]'],
)  # fmt: skip
def test_a_list_with_other_content_is_refused(content: bytes, tmp_path: Path) -> None:
    name = hashlib.md5(content, usedforsecurity=False).hexdigest()
    path = tmp_path / "files/md5" / name[:2] / f"{name[2:]}.dir"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(BadInput, match=rf"^images: DVC's list {name}.dir: .*; restore (it|the file) from "):
        list(Store(tmp_path, tmp_path).files({"images": {"outs": [{"path": "images", "md5": f"{name}.dir"}]}}))
