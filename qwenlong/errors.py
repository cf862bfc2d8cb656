"""The error that a user can act on."""


class InputError(ValueError):
    """One sentence: what is wrong and what to do. Commands print it and exit with status 2."""
