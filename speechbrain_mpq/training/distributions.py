"""What a Brain puts out, to compare a quantized one with.

What `compute_forward` returns differs from recipe to recipe: a tensor, a
tuple of tensors and lengths, a dict, a PaddedBatch. Log-probabilities are
recognized by their values, not by their names. Scorers see a network that puts
out the distributions, the outputs or the loss of a batch.
"""

from collections import deque
from dataclasses import fields, is_dataclass

import torch
from speechbrain.utils.logger import get_logger

from ..allocation.output_scores import FORMS, KLScores, OutputErrorScores

logger = get_logger(__name__)
TOLERANCE = 1e-3  # of sums of probabilities; half floats have no more
KINDS = ("log_softmax", "softmax", "sigmoid")  # the most telling one first
EDGE = 1e-6  # masks keep this distance from 0 and 1, so that logits exist


class NoGradientError(ValueError):
    """A Brain's validation cannot be differentiated."""


class NoLossError(NoGradientError):
    """A Brain's loss is not one number."""


class NoOutputError(ValueError):
    """Predictions hold nothing that the model has put out."""


class NoDistributionError(ValueError):
    """Predictions hold nothing that KL divergence is defined for."""


def distribution_type(tensor):
    """Which distribution a tensor holds."""
    if not tensor.is_floating_point() or tensor.dim() < 2 or not tensor.numel():
        return ""
    values = tensor.detach().float()
    if values.isnan().any():
        return ""
    if tensor.shape[-1] > 1:
        if (values <= TOLERANCE).all() and _sums_to_one(values.exp()):
            return "log_softmax"
        if (values >= 0).all() and _sums_to_one(values):
            return "softmax"
    inside = (values >= 0) & (values <= 1)
    return "sigmoid" if inside.all() else ""


def find_distributions(predictions, more=0):
    """The distributions in a Brain's predictions of the most telling kind.

    Log-probabilities come before probabilities and those before masks.

    Arguments
    ---------
    predictions : object
        Tensors in lists, tuples, dicts and objects.
    more : int
        Of so many other kinds that are there, too.

    Returns
    -------
    list of torch.Tensor

    Example
    -------
    >>> attention = torch.full((2, 4), 0.25)
    >>> outputs = attention, attention.log()
    >>> [len(find_distributions(outputs, more)) for more in (0, 1)]
    [1, 2]
    """
    tensors = list(tensors_in(predictions))
    kinds = [distribution_type(tensor) for tensor in tensors]
    taken = [kind for kind in KINDS if kind in kinds][: 1 + more]
    if taken:
        return [tensor for tensor, k in zip(tensors, kinds) if k in taken]
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors[:5])
    raise NoDistributionError(
        "the predictions hold no distribution to compare, only tensors of "
        f"shapes {shapes or 'none at all'}: give choose_bits output=, a "
        "function of the predictions that returns log-probabilities or a "
        'sigmoid mask, or use scores="loss" or "hessian", which need none'
    )


def find_outputs(predictions):
    """The tensors in a Brain's predictions that its model put out."""
    tensors = {id(t): t for t in tensors_in(predictions) if t.requires_grad}
    return [tensor for tensor in tensors.values() if tensor.numel()]


def to_log_probs(tensor):
    """A distribution as what KLScores takes, and which form of it.

    Example
    -------
    >>> to_log_probs(torch.tensor([[0.5, 0.25], [0.5, 1.0]]))[1]
    'bernoulli'
    >>> to_log_probs(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    (tensor([[ -0.6931,  -0.6931],
            [  0.0000, -87.3365]], dtype=torch.float64), 'categorical')
    """
    kind = distribution_type(tensor)
    if kind == "softmax":
        tensor = tensor.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    if kind in ("log_softmax", "softmax"):
        # Float32 rows sum to one only nearly, which drowns small divergences.
        return tensor.double().log_softmax(-1), "categorical"
    if kind == "sigmoid":
        inside = tensor.float().clamp(EDGE, 1 - EDGE)
        return inside.logit(), "bernoulli"
    raise ValueError(
        f"output= returned a tensor of shape {list(tensor.shape)} that is "
        "neither log-probabilities, nor probabilities over the last axis, nor "
        "a mask from 0 to 1: end it with log_softmax or sigmoid"
    )


def tensors_in(predictions, inside=()):
    """All tensors of nested predictions, in order.

    Arguments
    ---------
    predictions : object
        Tensors in lists, tuples, dicts and objects.
    inside : tuple of int
        Ids of what these are in, which they may refer to.

    Yields
    ------
    torch.Tensor

    Example
    -------
    >>> one, two = torch.ones(1), torch.ones(2)
    >>> [len(t) for t in tensors_in({"a": (one, None), "b": [two, "text"]})]
    [1, 2]
    """
    if isinstance(predictions, torch.Tensor):
        yield predictions
    elif id(predictions) not in inside:
        inside = *inside, id(predictions)
        for value in _values_in(predictions):
            yield from tensors_in(value, inside)


def _values_in(thing):
    """What a list, dict or object holds."""
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return thing
    if is_dataclass(thing) and not isinstance(thing, type):
        return [getattr(thing, f.name) for f in fields(thing)]
    return getattr(thing, "__dict__", {}).values()


def _sums_to_one(values):
    """Whether all rows of the last axis sum to one."""
    return bool(((values.sum(-1) - 1).abs() < TOLERANCE).all())


class _BrainNetwork(torch.nn.Module):
    """A model whose forward is the Brain's pass over one of its batches."""

    def __init__(self, calibration):
        super().__init__()
        model = calibration.model
        self._modules, self._parameters = model._modules, model._parameters
        # Past Module's own setter: a child may have any of these names.
        self.__dict__["calibration"] = calibration


class DistributionNetwork(_BrainNetwork):
    """Puts out the distributions of a batch, side by side in one row."""

    def __init__(self, calibration):
        super().__init__(calibration)
        self.__dict__.update(forms=None, parts={}, more=0)

    def with_more(self):
        """Puts out another kind of distributions as well, if there is one."""
        predictions = self.calibration.run(0)
        found, all_ = (
            len(find_distributions(predictions, n))
            for n in (self.more, self.more + 1)
        )
        self.__dict__.update(forms=None, parts={}, more=self.more + 1)
        return all_ > found

    def forward(self, index):
        """Logs of one batch's distributions, [1, ...] or [1, values]."""
        index = int(index)
        predictions = self.calibration.run(index)
        if self.calibration.output:
            outputs = [self.calibration.output(predictions)]
        else:
            outputs = find_distributions(predictions, self.more)
        logs, forms = zip(*map(to_log_probs, outputs))
        if forms != (self.forms or forms):
            raise ValueError(
                f"the output of batch {index} looks {', '.join(forms)}, that "
                f"of the batches before {', '.join(self.forms)}: name it with "
                "output="
            )
        self.__dict__["forms"] = forms
        if len(logs) == 1:
            return logs[0][None]
        self.parts[index] = [tuple(tensor.shape) for tensor in logs]
        return torch.cat([tensor.double().flatten() for tensor in logs])[None]


class OutputNetwork(_BrainNetwork):
    """Puts out all that the model has put out, as one row, [1, ...].

    Several outputs are of energy 1 each, in full precision.
    """

    def __init__(self, calibration):
        super().__init__(calibration)
        self.__dict__["parts"] = {}  # batch -> what counts, and its norm

    def forward(self, index):
        """The outputs of one batch."""
        index = int(index)
        with torch.enable_grad():
            outputs = find_outputs(self.calibration.run(index))
        if index not in self.parts:
            norms = enumerate(output.detach().norm() for output in outputs)
            self.parts[index] = [(i, n) for i, n in norms if n.isfinite()]
        if not self.parts[index]:
            raise NoOutputError(
                "the predictions hold no finite output that depends on the "
                "weights: return one that is not detached, name one by "
                'output=, or use scores="loss"'
            )
        if not torch.is_grad_enabled():
            outputs = [output.detach() for output in outputs]
        if len(self.parts[index]) == 1:
            return outputs[self.parts[index][0][0]][None]
        rows = [
            (outputs[i] / norm.clamp_min(EDGE)).flatten()
            for i, norm in self.parts[index]
        ]
        return torch.cat(rows)[None]


class ObjectiveNetwork(_BrainNetwork):
    """Puts out the Brain's own loss of a batch, [1]."""

    def forward(self, index):
        """The loss of one batch."""
        loss = self.calibration.run(int(index), objective=True)
        if isinstance(loss, tuple | list) and loss:  # and what is logged of it
            loss = loss[0]
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            return loss.reshape(1)
        sizes = [tuple(tensor.shape) for tensor in tensors_in(loss)]
        raise NoLossError(
            "compute_objectives must return one tensor of one value to score "
            f"by the loss, not {type(loss).__name__} with tensors of {sizes}"
        )


class _JointKLScores(KLScores):
    """KL divergence of several distributions that a model puts out together."""

    # The network has their shapes in `parts` and their forms in `forms`. Each
    # counts the same, however many frames or tokens it has.
    method, signed = "joint_kl", False

    def __init__(self, network, **options):
        super().__init__(**options)
        self.network = network

    def comparison(self, inputs):
        """How outputs are compared, see `KLScores.comparison`."""

        def error(reference, output, items):
            shapes = self.network.parts[int(inputs[items.start])]
            sizes = [torch.Size(shape).numel() for shape in shapes]
            pairs = zip(reference[0].split(sizes), output[0].split(sizes))
            total = 0.0
            for (p, q), shape, form in zip(pairs, shapes, self.network.forms):
                last = shape[-1] if form == "categorical" else 1
                total += FORMS[form](p, q).sum().clamp(min=0) * last / len(p)
            return total

        return inputs, error, lambda reference, items: len(reference)


def network_for(scorer, calibration):
    """What puts out what a scorer compares, and the scorer in its form.

    KL scores compare the distributions that are found, of the most telling
    kind, or of more kinds where the loss needs weights that those do not depend
    on. Where there are none, or all of them do not depend on what the loss
    needs, as attention weights of a speech synthesis do not depend on its
    decoder, all outputs count.
    """
    if isinstance(scorer.base, OutputErrorScores):
        with calibration.ready():
            return scorer, _outputs_of(calibration)
    network = DistributionNetwork(calibration)
    if not isinstance(scorer.base, KLScores):
        return scorer, network
    with calibration.ready():
        try:
            with torch.no_grad():
                network(torch.tensor(0))
        except NoDistributionError as error:
            if calibration.output:
                raise
            network = _outputs_of(calibration, error)
    forms = getattr(network, "forms", ())
    unseen = []
    if forms and not calibration.output:
        unseen = _unseen_by_all(network)
        forms = network.forms
    if unseen:
        logger.info(
            f"The loss needs {len(unseen)} parameters that no distribution "
            f"depends on ({', '.join(unseen[:3])}"
            f"{', ...' if unseen[3:] else ''}): all outputs are compared"
        )
        with calibration.ready():
            network = _outputs_of(calibration)
        forms = ()
    return _in_form(scorer, network, forms), network


def _outputs_of(calibration, error=None):
    """What puts out all outputs; the error where there are none."""
    network = OutputNetwork(calibration)
    try:
        with torch.no_grad():
            network(torch.tensor(0))
    except (NoGradientError, NoOutputError) as none:
        raise (error or none) from none
    return network


def _unseen_by_all(network):
    """Parameters that the loss needs and no kind of distribution depends on.

    As many kinds count from now on as leave none.
    """
    unseen = _unseen(network)
    while unseen:
        with network.calibration.ready(), torch.no_grad():
            if not network.with_more():
                break
            network(torch.tensor(0))
        unseen = _unseen(network)
    return unseen


def _unseen(network):
    """Parameters that the loss needs and a network's output does not."""
    calibration = network.calibration
    parameters = dict(calibration.model.named_parameters())
    weights = list(parameters.values())
    try:
        needed = calibration.reached(ObjectiveNetwork(calibration), weights)
        seen = calibration.reached(network, weights)
    except ValueError as error:
        logger.info(f"Not known what the loss needs: {error}")
        return []
    return [n for n, p in parameters.items() if id(p) in needed - seen]


def _in_form(scorer, network, forms):
    """KL scores of the outputs that a network puts out."""
    base = scorer.base
    options = {
        "candidate_bits": base.candidate_bits,
        "scheme": base.scheme,
        "chunk": base.chunk,
        "given": base.base_plan,
    }
    if not forms:
        logger.info(
            "Outputs are compared by their squared error; output= names a "
            'distribution, scores="loss" goes by the loss'
        )
        adapted = OutputErrorScores(**options)
    elif len(forms) > 1:
        shapes = ", ".join(str(list(s)) for s in network.parts[0])
        logger.info(
            f"The model puts out {len(forms)} distributions ({shapes}): the "
            "score is the sum of their divergences; output= compares one"
        )
        adapted = _JointKLScores(network, **options)
    elif forms[0] == "categorical" or base.form == "categorical":
        adapted = base.with_form(forms[0])
    else:
        adapted = base
    return adapted if base is scorer else scorer._of(adapted)
