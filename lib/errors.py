"""The one exception that means: what the user gave cannot work, and this is how to mend it."""


class InputError(ValueError):
    """A fault in a flag, a file or a data set; the scripts print it as one line, without a traceback."""
