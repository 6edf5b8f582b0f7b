"""Scores taken around the plan that they lead to.

One cluster at a time in an otherwise perfect network is not how a plan is
used. Here the plan is solved, every cluster is scored again with all others at
that plan's bits, and so on.
"""

import copy

from .solver import allocate_bits


class RefinedScores:
    """Scores given the plan of the scores before.

    Each round is a whole sweep. The plan of every round is measured on the
    same data, and the table of the best one is kept: a further round cannot
    make it worse there. It ends early where a plan comes back.

    Arguments
    ---------
    scores : OutputScores
        What to refine, for example a `KLScores`; its own `given` is where the
        first round starts.
    average_bits : float
        Budget of the plans, see `allocate_bits`.
    rounds : int
        Sweeps after the first, at least 1.
    min_bits : int
        Least bits of any cluster.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.allocation.kl import KLScores
    >>> _ = torch.manual_seed(0)
    >>> network = torch.nn.Sequential(
    ...     torch.nn.Conv1d(2, 8, 1), torch.nn.PReLU(), torch.nn.Conv1d(8, 2, 1)
    ... )
    >>> scores = RefinedScores(KLScores((2, 3, 4, 8)), average_bits=4)
    >>> table = scores(network, torch.randn(4, 2, 9), progress=False)
    >>> measured = table.details["measured_plans"]
    >>> measured[table.details["round"]] == min(measured)
    True
    """

    def __init__(self, scores, average_bits, rounds=2, min_bits=2):
        if rounds < 1:
            raise ValueError(f"refining takes at least 1 round, not {rounds}")
        self.base = scores
        self.average_bits = average_bits
        self.rounds = rounds
        self.min_bits = min_bits

    @property
    def needs(self):
        """What a calibration has to provide."""
        return self.base.needs

    def __call__(
        self,
        network,
        *calibration,
        include=("*",),
        exclude=(),
        prefix="mask_net",
        progress=True,
    ):
        """Score a network, again and again.

        Arguments
        ---------
        network : torch.nn.Module
            Full-precision network, left as it was found.
        *calibration : object
            The values that `needs` names, in that order.
        include, exclude : sequence of str
            Patterns on parameter names with their prefix.
        prefix : str
            Name of the network in its model; cluster names begin with it.
        progress : bool
            Shows a progress bar in every round.

        Returns
        -------
        table : ScoreTable
            Its details hold "measured_plans", the measured score of every
            round's plan, and "round", which one the table is from.
        """
        where = {"include": include, "exclude": exclude, "prefix": prefix}
        scorer = copy.copy(self.base)
        tables, plans, measured = [], [], []
        for _ in range(self.rounds + 1):
            table = scorer(network, *calibration, progress=progress, **where)
            plan = allocate_bits(
                table, average_bits=self.average_bits, min_bits=self.min_bits
            )
            if plan in plans:
                break
            tables.append(table)
            plans.append(plan)
            measured.append(
                scorer.measure(network, plan, *calibration, **where)
            )
            scorer.given = plan
        best = measured.index(min(measured))
        tables[best].details |= {"round": best, "measured_plans": measured}
        return tables[best]
