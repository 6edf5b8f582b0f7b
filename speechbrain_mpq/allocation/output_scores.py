"""Scores by what quantization does to a network's output, or to its loss.

Three comparisons: the KL divergence of the distributions that the outputs are
(Eq. 8), the weighted squared error of the output, and the increase of the
task's own loss; and any of them refined around the plan that it leads to.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022).
"""

import copy

import torch
import torch.nn.functional as F

from .scores import DerivedScores
from .solver import allocate_bits
from .sweep import OutputScores

BLOCK = 2**15  # float64 values that stay in the cache: several times faster


def bernoulli_kl(p_logits, q_logits):
    """Divergence of the Bernoulli distributions that two logits stand for.

    D(P || Q) = P ln(P/Q) + (1 - P) ln((1 - P)/(1 - Q)) with P and Q the
    sigmoids: the two-term form of Eq. 8. Never negative.
    """
    # With ln P = p - softplus(p) and ln(1 - P) = -softplus(p), two terms make
    # three; float32 would drown the score of 16 bits in rounding.
    p, q = p_logits.double(), q_logits.double()
    divergence = torch.sigmoid(p) * (p - q) + F.softplus(q) - F.softplus(p)
    return divergence.clamp_(min=0)


def one_sided_kl(p_logits, q_logits):
    """The summand of Eq. 8 as it is printed: P ln(P/Q) alone.

    No divergence, as P does not sum to one over the outputs: it is negative
    wherever quantization raises an output.
    """
    p, q = p_logits.double(), q_logits.double()
    return torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))


def categorical_kl(p_logs, q_logs):
    """Summands of the divergence of two categorical distributions.

    D(P || Q) = sum P ln(P/Q): each summand has either sign, their sum over the
    classes has not.

    Example
    -------
    >>> p = torch.tensor([0.5, 0.5, 0.0]).log()
    >>> q = torch.tensor([0.25, 0.5, 0.25]).log()
    >>> categorical_kl(p, q)
    tensor([0.3466, 0.0000, 0.0000], dtype=torch.float64)
    """
    p, q = p_logs.double(), q_logs.double()
    summand = p.exp() * (p - q)
    return torch.where(p.isneginf(), torch.zeros_like(p), summand)


FORMS = {
    "bernoulli": bernoulli_kl,
    "one_sided": one_sided_kl,
    "categorical": categorical_kl,
}


class KLScores(OutputScores):
    """Scores every cluster by the KL divergence of the output (Eq. 8).

    The score is the mean over all items, frames and outputs, which differs
    from the paper's sum over frames by a constant factor only. Categorical
    distributions count as one output each.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to try for each cluster.
    form : str
        "bernoulli", the divergence, or "one_sided", Eq. 8 as printed; both
        of logits. "categorical": of log-probabilities over the last axis.
    **options : dict
        As for `OutputScores`: chunk, given, granularity, codebook, rows.

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> table = KLScores((2, 3))(network, torch.ones(1, 1, 5), progress=False)
    >>> row = table.scores["0"]  # 2 bits: 1 becomes 0; 3 bits: exact
    >>> round(row[2], 4), row[3]
    (0.0555, 0.0)
    """

    needs = ("inputs",)

    def __init__(
        self, candidate_bits=(2, 4, 8, 16), form="bernoulli", **options
    ):
        if form not in FORMS:
            raise ValueError(f"form must be one of {list(FORMS)}, not {form!r}")
        super().__init__(candidate_bits, **options)
        self.form = form

    @property
    def method(self):
        """How the scores are made."""
        return f"{self.form}_kl"

    @property
    def signed(self):
        """Whether a score can be below zero."""
        return self.form == "one_sided"

    def with_form(self, form):
        """A copy for outputs that are another distribution."""
        scorer = copy.copy(self)
        scorer.form = form
        return scorer

    def comparison(self, inputs):
        """How outputs are compared.

        Arguments
        ---------
        inputs : torch.Tensor
            [items, ...]; the outputs are taken for what the form says.

        Returns
        -------
        inputs, error, scale : tuple
            As `OutputScores.table` takes them.
        """

        def error(reference, output, items):
            total = _total(FORMS[self.form], reference, output)
            # Only rounding makes a whole divergence negative.
            return total if self.signed else total.clamp(min=0)

        def outputs(reference, items):
            if self.form == "categorical":
                return reference.numel() // reference.shape[-1]
            return reference.numel()

        return inputs, error, outputs


def _total(function, *tensors):
    """Sum of an elementwise float64 function, block by block."""
    blocks = zip(*(tensor.flatten().split(BLOCK) for tensor in tensors))
    return sum(function(*block).sum() for block in blocks)


def weighted_error(reference, output, weights):
    """Sum of w |output - reference|^2 over groups of channels.

    Arguments
    ---------
    reference : torch.Tensor
        [items, groups x bins, frames], for example all real parts and then
        all imaginary parts.
    weights : torch.Tensor
        [items, bins, frames], the same for every group.
    """
    error = (output - reference).unflatten(1, (-1, weights.shape[1])).square_()
    return (error * weights[:, None]).sum(dtype=torch.float64)


class WeightedErrorScores(OutputScores):
    """Scores every cluster by the weighted squared error of the output.

    The score is the error's share in the weighted energy of the
    full-precision output: sum w |m_q - m|^2 / sum w |m|^2 over all items.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to try for each cluster.
    **options : dict
        As for `OutputScores`: chunk, given, granularity, codebook, rows.

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> scores = WeightedErrorScores((2, 3))
    >>> inputs, weights = torch.ones(1, 1, 5), torch.ones(1, 1, 5)
    >>> table = scores(network, inputs, weights, progress=False)
    >>> table.scores  # 2 bits: (0, 3) or (2, 2) for (1, 3), 3 bits: exact
    {'0': {2: 0.1, 3: 0.0}}
    """

    method = "weighted_output_error"

    needs = ("inputs", "weights")

    def comparison(self, inputs, weights):
        """How outputs are compared.

        Arguments
        ---------
        inputs : torch.Tensor
            [items, channels, frames].
        weights : torch.Tensor
            [items, bins, frames], not negative. The output has a whole number
            of groups of `bins` channels, which share the weights.
        """
        if len(weights) != len(inputs):
            raise ValueError(
                f"{len(inputs)} items of input need as many items of weights, "
                f"not {len(weights)}"
            )

        def error(reference, output, items):
            _check_shapes(reference, weights)
            own = weights[items].to(reference.device)
            return weighted_error(reference, output, own)

        def energy(reference, items):
            return error(torch.zeros_like(reference), reference, items)

        return inputs, error, energy


MaskErrorScores = WeightedErrorScores  # its name in earlier YAML files


def _check_shapes(output, weights):
    """Refuses weights that would broadcast to something else."""
    _, channels, frames = output.shape
    _, bins, weighted_frames = weights.shape
    if channels % bins or frames != weighted_frames:
        raise ValueError(
            f"weights of {bins} bins x {weighted_frames} frames do not fit an "
            f"output of {channels} channels x {frames} frames; channels must "
            "be a multiple of bins"
        )


class OutputErrorScores(OutputScores):
    """Scores every cluster by the squared error of the output.

    The score is the error's share in the energy of the full-precision output,
    for outputs that are no distribution, such as waveforms. Arguments are
    those of `WeightedErrorScores`.

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> scores = OutputErrorScores((2, 3))
    >>> scores(network, torch.ones(1, 1, 5), progress=False).scores
    {'0': {2: 0.1, 3: 0.0}}
    """

    method = "output_error"
    needs = ("inputs",)

    def comparison(self, inputs):
        """How outputs are compared, see `OutputScores.comparison`."""

        def error(reference, output, items):
            return (output - reference).double().square().sum()

        return (
            inputs,
            error,
            lambda reference, items: error(reference, 0, items),
        )


class LossScores(OutputScores):
    """Scores every cluster by what its quantization adds to the task's loss.

    The score is the mean increase over the items, in the loss's own unit: dB
    for a negative SI-SNR. It is negative where quantization helps these items:
    with many bits the change is first of all the slope of the loss, whose sign
    is an accident of the items, so that this score needs more of them than one
    that compares outputs.

    Arguments
    ---------
    candidate_bits : sequence of int
        Bits to try for each cluster.
    **options : dict
        As for `OutputScores`: chunk, given, granularity, codebook, rows.

    Example
    -------
    >>> import torch
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> def loss(output, items):
    ...     return (output - 1).square().sum()
    >>> scores = LossScores((2, 3))
    >>> table = scores(network, torch.ones(4, 1, 5), loss, progress=False)
    >>> table.scores  # 5 frames of (0 - 1)^2 + (3 - 1)^2 against 0 + (3 - 1)^2
    {'0': {2: 5.0, 3: 0.0}}
    """

    method = "loss_increase"
    signed = True

    needs = ("inputs", "loss")

    def comparison(self, inputs, loss):
        """How outputs are compared.

        Arguments
        ---------
        inputs : torch.Tensor
            [items, ...].
        loss : callable
            `loss(output, items)`: the summed loss of an output, a tensor of
            one value; `items` is the slice of the inputs that it belongs to.

        Returns
        -------
        inputs, error, scale : tuple
            As `OutputScores.table` takes them.
        """
        unquantized = {}  # first item of a chunk -> its loss

        def count(reference, items):
            unquantized[items.start] = loss(reference, items).double()
            return len(reference)

        def increase(_, output, items):
            return loss(output, items).double() - unquantized[items.start]

        return inputs, increase, count


class RefinedScores(DerivedScores):
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
    >>> from speechbrain_mpq.allocation.output_scores import KLScores
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

    def score(self, network, values, selection, progress=True, folder=None):
        """Score a network again and again, see `Scorer.score`.

        The table's details hold "measured_plans", the measured score of every
        round's plan, and "round", which one the table is from.
        """
        where = {**selection.patterns, "prefix": selection.prefix}
        needed = [values[need] for need in self.needs]
        scorer = copy.copy(self.base)
        tables, plans, measured = [], [], []
        for _ in range(self.rounds + 1):
            table = scorer.score(network, values, selection, progress, folder)
            plan = allocate_bits(
                table, average_bits=self.average_bits, min_bits=self.min_bits
            )
            if plan in plans:
                break
            tables.append(table)
            plans.append(plan)
            measured.append(scorer.measure(network, plan, *needed, **where))
            scorer.base_plan = plan
        best = measured.index(min(measured))
        tables[best].details |= {"round": best, "measured_plans": measured}
        return tables[best]
