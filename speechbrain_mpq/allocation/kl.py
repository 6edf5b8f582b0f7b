"""KL divergence between the outputs of a network and its quantized version.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022).
"""

import torch
import torch.nn.functional as F

from .sweep import OutputScores

BLOCK = 2**15  # float64 values that stay in the cache: several times faster


def bernoulli_kl(p_logits, q_logits):
    """Divergence of the Bernoulli distributions that two logits stand for.

    D(P || Q) = P ln(P/Q) + (1 - P) ln((1 - P)/(1 - Q)) with P and Q the
    sigmoids: the two-term form of Eq. 8. Never negative.

    Arguments
    ---------
    p_logits : torch.Tensor
        Full-precision outputs before the sigmoid.
    q_logits : torch.Tensor
        Quantized outputs before the sigmoid, same shape.

    Returns
    -------
    divergence : torch.Tensor
        One value in nats for each logit, float64.

    Example
    -------
    >>> bernoulli_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.1201], dtype=torch.float64)
    >>> bernoulli_kl(torch.tensor(1000.0), torch.tensor(-1000.0)).item()
    1000.0
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

    Arguments
    ---------
    p_logits : torch.Tensor
        Full-precision outputs before the sigmoid.
    q_logits : torch.Tensor
        Quantized outputs before the sigmoid, same shape.

    Returns
    -------
    summand : torch.Tensor
        One value in nats for each logit, float64.

    Example
    -------
    >>> one_sided_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([ 0.0000, -0.1899], dtype=torch.float64)
    """
    p, q = p_logits.double(), q_logits.double()
    return torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))


def categorical_kl(p_logs, q_logs):
    """Summands of the divergence of two categorical distributions.

    D(P || Q) = sum P ln(P/Q): each summand has either sign, their sum over the
    classes has not.

    Arguments
    ---------
    p_logs : torch.Tensor
        Full-precision log-probabilities.
    q_logs : torch.Tensor
        Quantized log-probabilities, same shape.

    Returns
    -------
    summand : torch.Tensor
        One value in nats for each class, float64.

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
    granularity : str
        Scales of a tensor, "tensor" or "channel" (see `quantize_`).
    chunk : int
        Items that go through the network at a time; bounds the memory.
    given : BitPlan or int or None
        Bits of the other clusters while one is tried; None: full precision.
    codebook : str
        Kind of quantization table, "midtread" or "midrise".
    rows : int or None
        Most output channels of a cluster (see `clusters`).

    Example
    -------
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> table = KLScores((2, 3))(network, torch.ones(1, 1, 5), progress=False)
    >>> row = table.scores["mask_net.0"]  # 2 bits: 1 becomes 0; 3 bits: exact
    >>> round(row[2], 4), row[3]
    (0.0555, 0.0)
    """

    needs = ("inputs",)  # what a calibration has to provide

    def __init__(
        self,
        candidate_bits=(2, 4, 8, 16),
        form="bernoulli",
        granularity="tensor",
        chunk=8,
        given=None,
        codebook="midtread",
        rows=None,
    ):
        if form not in FORMS:
            raise ValueError(f"form must be one of {list(FORMS)}, not {form!r}")
        super().__init__(
            candidate_bits, granularity, chunk, given, codebook, rows
        )
        self.summand = FORMS[form]
        self.method = f"{form}_kl"
        self.signed = form == "one_sided"

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
            total = _total(self.summand, reference, output)
            # Only rounding makes a whole divergence negative.
            return total if self.signed else total.clamp(min=0)

        def outputs(reference, items):
            if self.summand is categorical_kl:
                return reference.numel() // reference.shape[-1]
            return reference.numel()

        return inputs, error, outputs


def _total(function, *tensors):
    """Sum of an elementwise float64 function, block by block."""
    blocks = zip(*(tensor.flatten().split(BLOCK) for tensor in tensors))
    return sum(function(*block).sum() for block in blocks)
