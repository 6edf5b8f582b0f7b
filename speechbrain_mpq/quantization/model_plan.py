"""Between a bit plan and the model that it is for."""

from collections import defaultdict

from .plan import BitPlan, ClusterBits
from .tensors import named_tensors, near_misses


def bit_plan(model):
    """The plan that a quantized model follows.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized model.

    Returns
    -------
    BitPlan

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.quantization.quantizer import quantize_
    >>> layer = torch.nn.Linear(4, 2)
    >>> _ = quantize_(layer, 2, include="weight")
    >>> plan = bit_plan(layer)
    >>> plan.clusters["."].tensors, plan.rest_parameters, plan.bytes
    (('weight',), 2, 14)
    """
    grouped, rest = defaultdict(list), 0
    for tensor in named_tensors(model).values():
        if tensor.fake_quantize:
            grouped[tensor.cluster].append(tensor)
        else:
            rest += tensor.parameter.numel()
    if not grouped:
        raise ValueError(
            "the model has no quantized parameter: call quantize_ first"
        )
    entries, codebooks = {}, set()
    for cluster, members in grouped.items():
        codebooks.update(m.fake_quantize.codebook for m in members)
        entries[cluster] = ClusterBits(
            bits=members[0].fake_quantize.stored_bits,
            parameters=sum(m.weight.numel() for m in members),
            tensors=tuple(m.name for m in members),
            scales=sum(m.fake_quantize.alpha.numel() for m in members),
        )
    if len(codebooks) > 1:
        raise ValueError(
            f"the model mixes the codebooks {sorted(codebooks)}: quantize all "
            "of it with one"
        )
    return BitPlan(entries, rest, codebooks.pop())


def bits_of_plan(plan, tensors, chosen):
    """Bits of every tensor, for a plan that must fit the model.

    Arguments
    ---------
    plan : BitPlan
        The plan.
    tensors : dict of str -> NamedTensor
        All tensors of the model, cut as the plan says.
    chosen : list of NamedTensor
        Those of them that may be quantized.

    Returns
    -------
    dict of str -> int or float
        Tensor name -> bits.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.quantization.tensors import named_tensors
    >>> tensors = named_tensors(torch.nn.Linear(4, 2))
    >>> plan = BitPlan({".": ClusterBits(3, 8, ("weight",))})
    >>> bits_of_plan(plan, tensors, list(tensors.values()))
    {'weight': 3}
    """
    members = defaultdict(list)
    for tensor in chosen:
        members[tensor.cluster].append(tensor.name)
    known = [tensor.name for tensor in chosen]
    bits = {}
    for cluster, entry in plan.clusters.items():
        present = members.get(cluster, ())
        names = entry.tensors or present
        missing = [name for name in names if name not in present]
        if missing or not names:
            missing = missing[0] if missing else cluster
            raise ValueError(
                f"the plan's cluster {cluster!r} needs {missing!r}, which the "
                "model lacks there or the patterns leave out"
                f"{near_misses(missing, known)}"
            )
        count = sum(tensors[name].weight.numel() for name in names)
        if count != entry.parameters:
            raise ValueError(
                f"the plan's cluster {cluster!r} has {entry.parameters} "
                f"parameters, the model's {count}: make a plan for this model"
            )
        bits.update(dict.fromkeys(names, entry.bits))
    return bits
