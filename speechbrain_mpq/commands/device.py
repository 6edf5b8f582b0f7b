"""The option --device, which several commands have."""


def check_device(name):
    """PyTorch's complaints of a device as a message, not a traceback.

    Example
    -------
    >>> check_device("cpu")
    >>> check_device("gpu")
    Traceback (most recent call last):
    ...
    ValueError: --device gpu cannot be used: Expected one of cpu, cuda, ...
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error
