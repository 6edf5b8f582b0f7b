"""Parameters that are several bit widths at once, while bits are searched.

A super-network connects the candidates of every cluster by weights a that sum
to one (Eq. 11). It mixes weights, not outputs, which is the same thing and
one pass instead of one for each candidate: a convolution, a norm in eval mode
or a PReLU is affine in its own parameters, so that sum a_n f(x; W_n) equals
f(x; sum a_n W_n). All tensors of a cluster share the same a.

Equation numbers are those of "Mixed precision DNN quantization for overlapped
speech separation and recognition" (ICASSP 2022).
"""

import torch


class BitChoice(torch.nn.Module):
    """The architecture weights a of one cluster, as a softmax.

    Arguments
    ---------
    candidates : int
        Number of candidates.

    Example
    -------
    >>> choice = BitChoice(3)
    >>> _ = choice.logits.data.copy_(torch.tensor([0.0, 1.0, 0.0]))
    >>> choice.weights().detach()
    tensor([0.2119, 0.5761, 0.2119])
    >>> _ = choice.temperature.fill_(0.01)
    >>> choice.noise[0] = 1.1  # one draw
    >>> choice.weights().detach().round(decimals=2)
    tensor([1., 0., 0.])
    """

    def __init__(self, candidates):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(candidates))
        self.register_buffer("noise", torch.zeros(candidates))
        self.register_buffer("temperature", torch.ones(()))

    def weights(self):
        """a = softmax((logits + noise) / temperature), [candidates].

        With noise this is one draw of the Gumbel-softmax.
        """
        return torch.softmax((self.logits + self.noise) / self.temperature, 0)

    def draw(self, generator):
        """Draws new noise, which stays until the next draw.

        So that all tensors of the cluster, and modules that read a weight
        several times in one pass, see the same choice.

        Arguments
        ---------
        generator : torch.Generator
            On the CPU, so that a seed means the same on every device.
        """
        uniform = torch.rand(len(self.noise), generator=generator)
        tiny = torch.finfo(uniform.dtype).tiny
        gumbel = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
        self.noise.copy_(gumbel)


class WeightedCandidates(torch.nn.Module):
    """A parameter as the weighted sum of frozen candidates (Eq. 11).

    Only the choice is trained; what the parameter held before is not used.

    Arguments
    ---------
    values : sequence of torch.Tensor
        One tensor for each candidate, all of the parameter's shape.
    choice : BitChoice
        Shared by the tensors of a cluster.

    Example
    -------
    >>> from torch.nn.utils.parametrize import register_parametrization
    >>> layer, choice = torch.nn.PReLU(), BitChoice(2)
    >>> values = [torch.tensor([0.5]), torch.tensor([0.2])]
    >>> mixture = WeightedCandidates(values, choice)
    >>> _ = register_parametrization(layer, "weight", mixture)
    >>> layer(torch.tensor([-1.0, 2.0])).detach()
    tensor([-0.3500,  2.0000])
    """

    def __init__(self, values, choice):
        super().__init__()
        self.choice = choice
        self.register_buffer("values", torch.stack(list(values)).detach())

    def forward(self, weight):
        """The mixture, in the shape and type of the weight."""
        mixture = torch.tensordot(self.choice.weights(), self.values, 1)
        return mixture.to(weight.dtype)
