"""Libraries that are not installed with the package."""


class MissingExtra:
    """Stands for a library that is not there; its use says how to get it.

    Arguments
    ---------
    message : str
        What needs it, and the pip command.

    Example
    -------
    >>> MissingExtra("pip install openvino").Core()
    Traceback (most recent call last):
    ...
    ImportError: pip install openvino
    """

    def __init__(self, message):
        self.message = message

    def __getattr__(self, name):
        """Refuse, but to tools that look at what every object has."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(self.message)


def require(*libraries):
    """Refuse to begin where a library is missing.

    Arguments
    ---------
    *libraries : module or MissingExtra
    """
    for library in libraries:
        if isinstance(library, MissingExtra):
            raise ImportError(library.message)
