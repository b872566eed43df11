"""The one family of errors that a user is meant to read."""


class PrefsError(Exception):
    """Base of every expected failure: one sentence that names the input, the rule and the remedy.

    The `prefs` command prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 1
