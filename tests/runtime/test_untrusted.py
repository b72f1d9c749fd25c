"""Untrusted names: paths outside the project and options of commands are refused."""

from pathlib import Path

import pytest

from vitprune.errors import BadInput
from vitprune.runtime.untrusted import commit_id, md5_digest, path_inside, whole_number, without_credentials


@pytest.mark.parametrize("name", ["out/dense/config.json", "data", "a/./b", "images/0/ä.png", "..hidden", "a/..b"])
def test_a_path_below_the_folder_is_returned(tmp_path: Path, name: str) -> None:
    assert path_inside(tmp_path, name, "dvc.lock") == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "a/../../x", "a/..", "", ".", "a\0b", "a\nb", "..\\x", 7, None, ["a"], "//x", "~/../../x"],
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(BadInput, match=r"^dvc\.lock: .*(outside|not a path)"):
        path_inside(tmp_path / "tree", name, "dvc.lock")


def test_a_path_through_a_link_to_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "tree/link").symlink_to(tmp_path / "other")
    with pytest.raises(BadInput) as error:
        path_inside(tmp_path / "tree", "link/file", "x.dvc")
    message = "x.dvc: path 'link/file' is outside of the project: link is a symbolic link; make it a folder"
    assert str(error.value) == message
    assert path_inside(tmp_path / "tree", "link", "x.dvc") == tmp_path / "tree/link"  # the link itself may be replaced


def test_digests_commits_and_numbers_must_match_completely() -> None:
    assert md5_digest("0" * 32, "x") == "0" * 32
    assert md5_digest("a" * 32 + ".dir", "x").endswith(".dir")
    assert commit_id("f" * 40, "x") == "f" * 40
    assert whole_number("12", "x") == 12
    for text in ("../" * 10 + "ab", "0" * 31, "0" * 32 + "\n", "G" * 32, None, 4):
        with pytest.raises(BadInput, match="is not an MD5"):
            md5_digest(text, "dvc.lock")
    for text in ("--output=FILE", "HEAD", "main", "f" * 39, "f" * 40 + "\n", ""):
        with pytest.raises(BadInput, match="is not a commit id"):
            commit_id(text, "tag")
    for text in ("../../x", "-1", "", "1e9", "10000", "٣", "9" * 5000):
        with pytest.raises(BadInput, match="is not a number"):
            whole_number(text, "tag")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://admin:SECRET@host:5000", "http://host:5000"),
        ("postgresql://u:SE/CRET@db/mlflow", "postgresql://db/mlflow"),
        ("API request to http://admin:SECRET@127.0.0.1:1/api failed", "API request to http://127.0.0.1:1/api failed"),
        ("http://SE@CRET@host and ssh://me:SECRET@h/x", "http://host and ssh://h/x"),
        ("http://host:5000/a", "http://host:5000/a"),
        ("mail me@example.org", "mail me@example.org"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_credentials_are_removed_from_addresses(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
