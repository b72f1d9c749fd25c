"""Error messages: one printable line of bounded length, whatever the names and values in it."""

from vitprune.errors import BadInput, NotFinite


def test_a_message_is_one_printable_line() -> None:
    name = b"a\xe4\n\x1b[2J.png".decode("utf-8", "surrogateescape")
    assert str(BadInput(f"{name}: cannot be read")) == "a\\udce4\\n\\x1b[2J.png: cannot be read"
    assert str(BadInput("Käfer/犬 1.png: ok")) == "Käfer/犬 1.png: ok"


def test_a_long_message_keeps_its_beginning_and_end() -> None:
    line = str(BadInput("params.yaml: seed: got " + "9" * 1_000_000 + "; give a whole number"))
    assert len(line) == 1000
    assert line.startswith("params.yaml: seed: got 99")
    assert line.endswith("99; give a whole number")
    assert len(str(NotFinite("x" * 5000, 1, 2))) == 1000
