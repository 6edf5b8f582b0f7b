"""Packed models: bit-packed integers in a safetensors file.

model.safetensors holds two pooled tensors, so that its header stays small:
``packed`` (uint8) has the integers of all quantized tensors in the order of
their names, each beginning on a byte, and ``scales`` (float32) is in the same
order. What stayed in float keeps its own name. The header's ``mpq_config``
gives the bits and shape of every quantized tensor, ``sha256`` guards it all.
quantization_config.json beside it is a readable copy that nothing reads. All
bytes are in docs/packed_format.md.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..utils import write_text
from .codebook import GRANULARITIES, packed_width, quantize_to_integers
from .container import (
    PackedModelError,
    container_bytes,
    pack_bits,
    write_container,
)
from .entropy_coding import encode_packed
from .finite import not_finite
from .groups import split_as_named, split_name
from .header import (
    check_name,
    describe,
    described_tensors,
    needs_second_version,
    shared_header,
    tree_header,
)
from .plan import bit_plan, packed_bytes
from .state import (
    SAME,
    as_integers,
    encode,
    equal_buffers,
    made_alike,
    module_states,
    stored_buffers,
    unknown_state,
    why_not,
)
from .tensors import NamedTensor, named_tensors
from .unpacking import (
    CODED,
    CODING,
    MODEL_FILE,
    PACKED_TENSORS,
    PackedModel,
    PackedTensor,
    check_compatible,
    check_scales,
    inner_buffers,
    load_packed_,
    plain_targets,
    read_model,
    read_packed,
)

__all__ = [
    "CONFIG_FILE",
    "MODEL_FILE",
    "PackedModel",
    "PackedTensor",
    "check_compatible",
    "content_of",
    "load_packed_",
    "packed_file_bytes",
    "plain_targets",
    "read_model",
    "read_packed",
    "readable_config",
    "save_packed",
    "stored_buffers",
    "unpackable",
]

CONFIG_FILE = "quantization_config.json"


@dataclass
class Content:
    """What a packed file of a model holds, and what it cannot."""

    # dict of str -> NamedTensor: what is stored as integers: weights, and
    # buffers where they are exact
    quantized: dict
    floats: dict  # dict of str -> torch.Tensor: what is stored as it is
    # dict of str -> dict: state of modules -> the tensors that hold it
    states: dict
    same: dict  # dict of str -> str: buffers that are stored under another name
    left_out: dict  # dict of str -> str: what need not be stored -> why
    refused: dict  # dict of str -> str: what cannot be stored -> why

    def same_names(self):
        """Writes down which buffers are stored under another name."""
        if not self.same:
            return {}
        text = json.dumps(self.same, separators=(",", ":"))
        return {SAME: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    def stored(self):
        """Collects the tensors of the file but the packed ones."""
        stored = dict(self.floats)
        for parts in self.states.values():
            stored.update(parts)
        stored.update(self.same_names())
        return stored


def content_of(model, granularity=None):
    """Finds out what a packed file of a model would hold."""
    tensors = named_tensors(model)
    quantized = {n: t for n, t in sorted(tensors.items()) if t.fake_quantize}
    buffers = stored_buffers(model)
    floats, left_out, refused = {}, {}, {}
    stored_ids = {id(t.parameter) for t in tensors.values()}
    for name, tensor in tensors.items():
        if tensor.fake_quantize and tensor.chain is not None:
            why = f"{tensor.parameter_name} results from it"
            left_out.update(dict.fromkeys(tensor.parts, why))
            for inner in inner_buffers(tensor):
                if inner in buffers:
                    left_out[inner] = why
                    stored_ids.add(id(buffers.pop(inner)))
        elif not tensor.fake_quantize and tensor.chain is not None:
            floats.update(tensor.parts)
        elif not tensor.fake_quantize:
            floats[name] = tensor.parameter
    for name in sorted(made_alike(model)):
        if name in buffers:
            left_out[name] = "the same in every new module of its class"
            stored_ids.add(id(buffers.pop(name)))
    for name, tensor in {**floats, **buffers}.items():
        problem = why_not(name, tensor) or _name_problem(name)
        if problem:
            refused[name] = problem
            floats.pop(name, None)
            buffers.pop(name, None)
    for name in quantized:
        problem = _name_problem(split_name(name)[0])
        if problem or "@" in name:
            refused[name] = problem or "its name is taken by the format"
    granularity = granularity or _granularity(quantized) or "tensor"
    exact = {n: as_integers(n, b, granularity) for n, b in buffers.items()}
    exact = {name: tensor for name, tensor in exact.items() if tensor}
    # Integers take less room than one of several that are equal.
    rest = {name: b for name, b in buffers.items() if name not in exact}
    same = equal_buffers(rest)
    quantized |= exact
    floats |= {name: b for name, b in rest.items() if name not in same}
    stored_ids |= {id(t) for t in [*floats.values(), *buffers.values()]}
    states, problems = module_states(model)
    refused.update(problems)
    refused.update(unknown_state(model, stored_ids))
    states = {name: encode(state, name) for name, state in states.items()}
    quantized = dict(sorted(quantized.items()))
    return Content(quantized, floats, states, same, left_out, refused)


def _name_problem(name):
    """Why a file cannot hold a name; empty if it can."""
    if name in PACKED_TENSORS:
        return "its name is taken by the format"
    try:
        check_name(name)
    except ValueError as error:
        return str(error)
    return ""


def _granularity(quantized):
    """The one granularity that all scales' shapes follow, or None."""
    for granularity in GRANULARITIES:
        if all(
            t.scale_shape(granularity) == tuple(t.fake_quantize.alpha.shape)
            for t in quantized.values()
        ):
            return granularity
    return None


def unpackable(model):
    """Names what no packed file of a model can hold."""
    return content_of(model).refused


def save_packed(
    model, folder, metadata=None, architecture=None, entropy_coded=False
):
    """Writes a model as a packed model, quantized or in full precision.

    The same weights give the same bytes. Each file is written whole or not
    at all, and read as any reader would before it takes its place.

    Arguments
    ---------
    model : torch.nn.Module
        It is left as it is.
    folder : str or Path
        Made if it is not there.
    metadata : dict or None
        Anything that JSON can hold, for quantization_config.json.
    architecture : dict or None
        Anything that JSON can hold, for the header of the weights, under
        their checksum: what to build before they are loaded. The file then
        is of format 3.

    Returns
    -------
    Path
        The model.safetensors, whose size is the model's.
    """
    content = _packable_content(model)
    weights = any(t.fake_quantize for t in named_tensors(model).values())
    plan = bit_plan(model) if weights else None
    codebook = plan.codebook if plan else "midtread"
    granularity = _granularity(content.quantized)
    if granularity is None:
        raise ValueError(
            "packing needs one scale per tensor, or one per output channel, "
            "in the whole model"
        )
    entropy_coded = entropy_coded or codebook == "entropy"
    packed_tensors = _pack_tensors(content.quantized, codebook)
    header, version = _header(
        describe(content.quantized),
        granularity,
        codebook,
        _axes(content.quantized, granularity),
        architecture,
        entropy_coded,
    )
    if entropy_coded:
        packed_tensors = with_coding(packed_tensors, header)
    readable = {
        **readable_config(header, version),
        "plan": plan.to_dict() if plan else None,
        "metadata": metadata or {},
    }
    # Readers refuse NaN: complain before anything is written.
    text = json.dumps(readable, indent=1, allow_nan=False) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    floats = content.stored().items()
    floats = {n: t.detach().cpu().contiguous() for n, t in floats}
    check = partial(_check_written, path)
    tensors = {**floats, **packed_tensors}
    del packed_tensors
    write_container(path, tensors, header, str(version), check)
    write_text(folder / CONFIG_FILE, text)
    return path


def _packable_content(model):
    """What a file of a model holds; refuses what no file can hold."""
    content = content_of(model)
    refused = {**content.refused, **not_finite(model)}
    if refused:
        raise ValueError(
            "; ".join(
                f"{name} cannot be packed: {why}"
                for name, why in refused.items()
            )
        )
    return content


def _check_written(path, part):
    """Read a file that was written, by the rules for files of strangers."""
    try:
        read_model(part)
    except PackedModelError as error:
        problem = str(error).removeprefix(f"{part}: ")
        raise ValueError(
            f"{path} is not written: a reader would find it {problem}"
        ) from error


def _pack_tensors(quantized, codebook):
    """The packed tensors of a model's quantized tensors."""
    if not quantized:
        return {}
    stored = [tensor.fake_quantize for tensor in quantized.values()]
    sizes = [
        packed_bytes(t.weight.numel(), packed_width(q.stored_bits, codebook), 0)
        for t, q in zip(quantized.values(), stored)
    ]
    # All at once: small pieces between large temporaries would keep the
    # memory of these from being given back.
    packed = torch.empty(sum(sizes), dtype=torch.uint8)
    rooms = packed.split(sizes)
    scales = []
    for tensor, quantizer, room in zip(quantized.values(), stored, rooms):
        bits, alpha = quantizer.stored_bits, quantizer.alpha
        weight = tensor.weight
        integers = quantize_to_integers(weight, bits, alpha, codebook)
        room.copy_(pack_bits(integers, bits, codebook))
        scales.append(check_scales(alpha.detach().cpu().float().reshape(-1)))
    return dict(zip(PACKED_TENSORS, (packed, torch.cat(scales))))


def _axes(quantized, granularity):
    """Of which tensors the scales are along other dimensions, in a file."""
    return {
        name: list(tensor.axes)
        for name, tensor in sorted(quantized.items())
        if granularity == "channel"
        and tensor.axes != (0,)
        and len(tensor.shape) > 1
    }


def with_coding(tensors, header):
    """The tensors of a file of format 5, of those of one without coding."""
    codebook = header.get("codebook", "midtread")
    counts = [
        (packed_width(bits, codebook), math.prod(shape))
        for _, bits, shape in described_tensors(header)
    ]
    if not counts:
        raise ValueError(
            "nothing is quantized, so there are no integers to code: leave "
            "out entropy_coded"
        )
    rest = {name: t for name, t in tensors.items() if name != "packed"}
    return {CODED: encode_packed(tensors["packed"], counts, codebook), **rest}


def _header(
    described, granularity, codebook, axes, architecture, entropy_coded=False
):
    """The configuration of a file, and the version of its format."""
    kind = {} if codebook == "midtread" else {"codebook": codebook}
    header = {"granularity": granularity, **kind}
    if entropy_coded:
        optional = {"architecture": architecture, "axes": axes}
        header |= {key: value for key, value in optional.items() if value}
        return {**header, "coding": CODING, **shared_header(described)}, 5
    if axes:
        header = {
            "architecture": architecture,
            **header,
            **shared_header(described),
            "axes": axes,
        }
        return header, 4
    if architecture is not None:
        header = {"architecture": architecture, **header}
        return {**header, **shared_header(described)}, 3
    header.update(tree_header(described))
    return header, 2 if needs_second_version(header) else 1


def readable_config(header, version):
    """Lists what quantization_config.json repeats of a header."""
    kept = {k: header[k] for k in ("architecture",) if k in header}
    return {
        "quant_method": "speechbrain_mpq",
        "version": version,
        **kept,
        "granularity": header["granularity"],
        "tensors": {
            name: {"bits": bits, "shape": list(shape)}
            for name, bits, shape in described_tensors(header)
        },
    }


def packed_file_bytes(
    model,
    plan=None,
    granularity="tensor",
    architecture=None,
    entropy_coded=False,
) -> int:
    """Computes how long the model.safetensors of a model is, to the byte.

    Of a plan with the entropy codebook it is what the plan asks for: rounding
    changes the entropies by a few percent, tensors of a few values by more.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized or not.
    plan : BitPlan or None
        As if it were quantized by this plan; None: as it is.
    granularity : str
        That of the plan's scales, "tensor" or "channel".
    architecture : dict or None
        As for ``save_packed``.
    entropy_coded : bool
        As for ``save_packed``; only of a model that is quantized: what its
        integers take depends on their values.

    Example
    -------
    >>> from speechbrain_mpq.quantization.plan import ClusterBits, BitPlan
    >>> model = torch.nn.Linear(64, 8)
    >>> small = BitPlan({".": ClusterBits(2, 512, ("weight",))})
    >>> large = BitPlan({".": ClusterBits(8, 512, ("weight",))})
    >>> packed_file_bytes(model, large) - packed_file_bytes(model, small)
    384
    """
    if entropy_coded and plan is not None:
        raise ValueError(
            "what entropy-coded integers take is known of a quantized model "
            "only: quantize_ it by the plan first"
        )
    content = content_of(model, granularity if plan is not None else None)
    quantized, floats = content.quantized, content.stored()
    codebook = "midtread"
    if plan is not None:
        codebook = plan.codebook
        quantized, floats = _as_planned(model, plan, content)
    else:
        granularity = _granularity(quantized) or "channel"
        weights = [t for t in quantized.values() if t.owners]
        codebook = weights[0].fake_quantize.codebook if weights else codebook
    entropy_coded = entropy_coded or codebook == "entropy"
    header, version = _header(
        describe(quantized),
        granularity,
        codebook,
        _axes(quantized, granularity),
        architecture,
        entropy_coded,
    )
    kinds = {n: (t.dtype, tuple(t.shape)) for n, t in floats.items()}
    if quantized:
        sizes = [
            packed_bytes(t.weight.numel(), t.fake_quantize.stored_bits, 0)
            for t in quantized.values()
        ]
        scales = [
            math.prod(t.scale_shape(granularity)) for t in quantized.values()
        ]
        kinds["packed"] = torch.uint8, (sum(sizes),)
        kinds["scales"] = torch.float32, (sum(scales),)
    if entropy_coded:
        _, (size,) = kinds.pop("packed")
        if plan is None:
            packed_tensors = _pack_tensors(quantized, codebook)
            size = len(with_coding(packed_tensors, header)[CODED])
        kinds[CODED] = torch.uint8, (size,)
    return container_bytes(kinds, header, str(version))


@dataclass
class _Planned:
    """Stands for a quantizer that a plan asks for."""

    stored_bits: int | float


def _as_planned(model, plan, content):
    """What a file would hold if a model were quantized by a plan."""
    whole = {}
    for tensor in named_tensors(model).values():
        name = tensor.parameter_name
        whole[name] = NamedTensor(
            name,
            tensor.parameter,
            tensor.owners,
            reason=tensor.reason,
            chain=tensor.chain,
            parts=tensor.parts,
        )
    members = split_as_named(whole, plan.tensors, plan.gated)
    quantized, floats = {}, content.stored()
    for cluster, entry in plan.clusters.items():
        own = [n for n, t in members.items() if t.cluster == cluster]
        for name in entry.tensors or own:
            members[name].fake_quantize = _Planned(entry.bits)
            quantized[name] = members[name]
    for name, tensor in whole.items():
        planned = any(t.parameter_name == name for t in quantized.values())
        parts = tensor.parts or {name: tensor.parameter}
        inner = inner_buffers(tensor) if tensor.chain is not None else []
        for part in [*parts, *inner]:
            if planned:
                floats.pop(part, None)
        if not planned:
            floats.update(parts)
    # Buffers that are stored as integers.
    for name, tensor in content.quantized.items():
        if not tensor.owners:
            quantized[name] = tensor
    return dict(sorted(quantized.items())), floats
