"""Errors that a command line turns into one sentence and an exit code."""


class UsageError(Exception):
    """A mistake of the user. The message is one sentence: what is wrong, and how to fix it. Exit code 2."""


class RunError(Exception):
    """A failure that is no mistake of the user, such as a job that could not finish. Exit code 1."""


def one_line(error: Exception) -> str:
    """The message of an error on one line of at most 300 characters; for a file error, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)  # Arrow's text has the file
    return " ".join(text.split())[:300] or type(error).__name__
