"""Exceptions: BadInput (user error, exit code 2), NotFinite (diverged training), Interrupted (transient, retry)."""

EXIT_PREEMPTED, EXIT_RETRY = 143, 75  # 128 + SIGTERM; EX_TEMPFAIL of sysexits.h
MAX_MESSAGE = 1000  # characters of a message; a longer one loses its middle


class BadInput(ValueError):
    """User error. The message is one line that names the file, key or module and says what to do.

    Names and values of files are part of messages, so control characters are escaped, and a long message is shortened.
    The command line prints the message and exits with code 2.
    """

    def __str__(self) -> str:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())
        return line if len(line) <= MAX_MESSAGE else f"{line[:600]} ... {line[-395:]}"


class Unreachable(BadInput):
    """A target that even the smallest model does not reach."""


class NotFinite(BadInput):
    """Loss or gradient that is not finite.

    Attributes:
        epoch: Epoch, from 0.
        number: Batch of the epoch, from 0.
    """

    def __init__(self, line: str, epoch: int, number: int):
        super().__init__(line)
        self.epoch, self.number = epoch, number


class Interrupted(Exception):
    """Transient failure, such as preemption: a retry can succeed. The message is one line.

    The command line prints the message and exits with `code`, which the flow counts as an infrastructure failure.
    """

    def __init__(self, line: str, code: int = EXIT_RETRY):
        super().__init__(line)
        self.code = code
