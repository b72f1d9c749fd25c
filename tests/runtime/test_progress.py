import pytest

from vitprune.runtime import progress


def test_lines_are_printed_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress.track(range(3), "steps", total=3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # under a minute
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    assert list(progress.track(range(2), "steps", total=5, done=3)) == [0, 1]
    assert capsys.readouterr().err == "steps: 4 of 5, about 0:00:00 left\n"
    next(many := progress.track(iter([1, 2]), "epochs", total=10**30))
    next(many)
    assert capsys.readouterr().err.startswith("epochs: 1 of 1000000000000000000000000000000, about ")
    assert list(progress.track(iter("ab"), "files")) == ["a", "b"]
    assert capsys.readouterr().err == "files: 1\n"
    monkeypatch.setenv("RANK", "1")
    assert list(progress.track(range(2), "steps", total=2)) == [0, 1]
    assert capsys.readouterr().err == ""
