"""The one error that a user can cause and mend."""


class BadInput(ValueError):
    """Input that cannot be used: one line that names the file, key or module and says what to do.

    The command line prints it and exits with code 2.
    """
