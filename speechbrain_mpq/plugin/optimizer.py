"""An optimizer factory under which bits are learned while weights train."""


def learn_bits(parameters, quantizer, opt_class, **options):
    """Makes an ordinary optimizer, after whose steps bits are decided.

    For the ``opt_class`` of a Brain, in place of the optimizer itself. What is
    known of the bits is kept in the optimizer's checkpoint.

    Arguments
    ---------
    parameters : iterable
        Parameters or groups of them, as a Brain gives them.
    quantizer : LearnedBits
        Whose bits are learned.
    opt_class : callable
        Makes the optimizer, such as torch.optim.AdamW.
    **options : dict
        Passed on: lr, weight_decay, ...

    Returns
    -------
    optimizer : torch.optim.Optimizer

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import LearnedBits
    >>> modules = torch.nn.ModuleDict({"net": torch.nn.Linear(8, 8)})
    >>> quantizer = LearnedBits(modules, bits=3, interval=1, decisions=1)
    >>> optimizer = learn_bits(
    ...     modules.parameters(), quantizer, torch.optim.SGD, lr=0.1
    ... )
    >>> modules["net"](torch.ones(8)).square().sum().backward()
    >>> quantizer.plan.average_bits
    16.0
    >>> optimizer.step()
    >>> quantizer.plan.average_bits <= 3
    True
    """
    optimizer = opt_class(parameters, **options)
    quantizer.follow(optimizer)
    return optimizer
