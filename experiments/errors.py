"""The one error that the command line shows without a traceback."""


class ExperimentError(Exception):
    """A mistake in what was asked for: the message says what is wrong and what to do."""
