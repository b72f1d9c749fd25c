"""The error that a user can cause and mend, and the one that another attempt mends."""

EXIT_PREEMPTED, EXIT_RETRY = 143, 75  # as of a process that SIGTERM ends; EX_TEMPFAIL of sysexits.h


class BadInput(ValueError):
    """Input that cannot be used: one line that names the file, key or module and says what to do.

    The command line prints it and exits with code 2.
    """


class NotFinite(BadInput):
    """A loss or gradient that is not finite, in batch `number` of an epoch, both counted from 0."""

    def __init__(self, line: str, epoch: int, number: int):
        super().__init__(line)
        self.epoch, self.number = epoch, number


class Interrupted(Exception):
    """Work that the machine broke off: one line that says what happened; another attempt goes on.

    The command line prints it and exits with `code`, which the flow takes for a fault of the infrastructure.
    """

    def __init__(self, line: str, code: int = EXIT_RETRY):
        super().__init__(line)
        self.code = code
