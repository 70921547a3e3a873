"""The one exception of the project."""


class OrthoactError(Exception):
    """What was received, what was expected and what to do, in one sentence; the command line prints it as it is."""
