"""The one exception type for input that a user can correct."""

from __future__ import annotations


class InputError(ValueError):
    """Input of the user is wrong: a file, a config key or a pair of things that disagree.

    The message is one sentence that says what was expected, what was found and what to change.
    The command-line tools print it without a traceback and exit with status 2.
    """
