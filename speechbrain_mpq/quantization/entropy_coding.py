"""Entropy coding of quantized weights: frequent levels take fewer bits.

Integers of n bits are worth less than n bits where some levels are more
frequent than others, as small weights are. A range coder (Martin, 1979;
constriction's, Bamler 2022) writes them in about their entropy, losslessly.
Each tensor has a static model of its own, whichever costs least:

* a histogram, one or two bytes for each level that occurs;
* a two-sided geometric distribution around zero, two bytes, for small tensors;
* none: levels that are equally frequent stay as they are.

Models are integers from first to last, so that every machine has the same
ones. Files come from strangers: a value costs at least an eighth of a bit, so
that what a stream can claim to hold is known from its length before anything
is reserved.
"""

import math

import numpy as np
import torch

from .codebook import TERNARY_BITS, has_zero
from .container import PIECE, bits_of_numbers, numbers_of_bits
from .plan import packed_bytes

PLAIN, GEOMETRIC, HISTOGRAM, FINE = range(4)  # kinds of models, a byte each
WIDTHS = {HISTOGRAM: 1, FINE: 2}  # bytes of a level's weight
WIDEST = 12  # bits of a level, from where on there are more levels than values
VALUES_PER_BYTE = 64  # most that a stream holds: each costs 1/8 bit or more
LIKELIEST = 11 / 12  # probability of a level: log2(12/11) is over 1/8
ONE = 2**16  # weight of the middle of a geometric distribution
WORD = 4  # bytes that range coders write at a time


def encode_packed(packed, described, codebook="midtread"):
    """Write the integers of a model by their frequencies.

    Arguments
    ---------
    packed : torch.Tensor
        uint8, the integers of all tensors, each beginning on a byte.
    described : sequence of (int or float, int)
        Bits and count of each.
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    coded : torch.Tensor
        uint8: models, then integers without one, then the stream.

    Example
    -------
    >>> from .container import pack_bits
    >>> weights = torch.tensor([0] * 80 + [1, -1] * 10 + [2, -3] * 2)
    >>> packed = pack_bits(weights, 4)
    >>> coded = encode_packed(packed, [(4, len(weights))])
    >>> len(packed), len(coded)
    (52, 19)
    >>> decoded = decode_packed(coded, [(4, len(weights))])
    >>> bool((decoded == packed).all())
    True
    """
    stream = _library().stream.queue.RangeEncoder()
    models, plain, start = bytearray(), [], 0
    content = packed.numpy()
    for bits, count in described:
        own = content[start:][: packed_bytes(count, bits, scales=0)]
        start += len(own)
        model, numbers = PLAIN, None
        if bits <= WIDEST and count:
            numbers = numbers_of_bits(own, bits, count)
            model, described_by = _best_model(numbers, bits, codebook, len(own))
        models.append(model)
        if model == PLAIN:
            plain.append(own)
            continue
        models += described_by
        weights = _weights(model, described_by, bits, codebook)
        stream.encode(numbers.astype(np.int32), _categorical(weights))
    words = stream.get_compressed().astype("<u4").view(np.uint8)
    head = np.frombuffer(bytes(models), np.uint8)
    return torch.from_numpy(np.concatenate([head, *plain, words]))


def decode_packed(coded, described, codebook="midtread"):
    """Read what `encode_packed` wrote.

    Arguments
    ---------
    coded : torch.Tensor
        uint8, anybody's.
    described : sequence of (int or float, int)
        Bits and count of each tensor.
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    packed : torch.Tensor
        uint8, the integers of all tensors, each beginning on a byte.
    """
    check_claims(len(coded), described)
    library = _library()
    content = coded.numpy()
    models, position = [], 0
    for bits, count in described:
        kind = int(content[position])
        position += 1
        size = _model_bytes(kind, content[position:], bits, count)
        models.append((kind, content[position:][:size].tobytes()))
        position += size
    plain = sum(
        packed_bytes(count, bits, scales=0)
        for (bits, count), (kind, _) in zip(described, models)
        if kind == PLAIN
    )
    first, stream = content[position:][:plain], content[position + plain :]
    coded_values = sum(
        count
        for (_, count), (kind, _) in zip(described, models)
        if kind != PLAIN
    )
    if len(first) != plain or len(stream) % WORD:
        raise ValueError("coded integers that are cut off")
    if coded_values > VALUES_PER_BYTE * len(stream):
        raise ValueError(
            f"{coded_values} values in a stream of {len(stream)} bytes"
        )
    words = np.frombuffer(stream.tobytes(), "<u4").astype(np.uint32)
    decoder = library.stream.queue.RangeDecoder(words)
    pieces = []
    for (bits, count), (kind, described_by) in zip(described, models):
        if kind == PLAIN:
            size = packed_bytes(count, bits, scales=0)
            pieces.append(first[:size])
            first = first[size:]
            continue
        weights = _weights(kind, described_by, bits, codebook)
        if not _is_safe(weights):
            raise ValueError("a model in which one level is all but certain")
        pieces += _decoded(decoder, weights, bits, count)
    if not decoder.maybe_exhausted():
        raise ValueError("a stream that goes on behind the last integer")
    return torch.from_numpy(np.concatenate(pieces))


def _decoded(decoder, weights, bits, count):
    """Yield the integers of a tensor, packed, a part at a time."""
    model = _categorical(weights)
    for start in range(0, count, PIECE):
        try:
            numbers = decoder.decode(model, min(PIECE, count - start))
        except (AssertionError, ValueError) as error:
            raise ValueError(f"a stream that no coder wrote: {error}") from None
        yield bits_of_numbers(numbers, bits)


def check_claims(size, described):
    """Refuse coded integers that cannot hold what is said to be in them.

    Arguments
    ---------
    size : int
        Bytes of the coded integers.
    described : sequence of (int or float, int)
        Bits and count of each tensor.
    """
    values = sum(count for _, count in described)
    if len(described) > size or values > VALUES_PER_BYTE * size:
        raise ValueError(f"{values} integers in {size} bytes")


def _library():
    """The coder, or what to install."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            "entropy-coded models (format 5) need the package constriction, "
            "which is not installed: pip install constriction"
        ) from error
    return constriction


def _best_model(numbers, bits, codebook, plain):
    """Kind and bytes of the model that takes the least room."""
    counts = np.bincount(numbers, minlength=_levels(bits))
    sizes = {(PLAIN, b""): plain}
    for kind, model in (
        (HISTOGRAM, _histogram(counts, HISTOGRAM)),
        (FINE, _histogram(counts, FINE)),
        (GEOMETRIC, _geometric(counts, bits, codebook)),
    ):
        if model is not None:
            weights = _weights(kind, model, bits, codebook).astype(float)
            occurring = counts > 0
            share = weights[occurring] / weights.sum()
            cost = -(counts[occurring] * np.log2(share)).sum() / 8
            sizes[kind, model] = cost + len(model)
    return min(sizes, key=sizes.get)


def _levels(bits):
    """How many numbers there are."""
    return 3 if bits == TERNARY_BITS else 2**bits


def _histogram(counts, kind):
    """First level (2 bytes), how many (2 bytes), a weight for each."""
    occurring = np.flatnonzero(counts)
    first, last = int(occurring[0]), int(occurring[-1])
    counts = counts[first : last + 1].astype(float)
    most = 256 ** WIDTHS[kind] - 1
    shares = np.ceil(most * counts / counts.max())  # what occurs has 1
    others = shares.sum() - shares.max()
    if not others:
        return None
    if not _is_safe(shares):  # a level that is nearly all of them
        peak = math.floor(others * LIKELIEST / (1 - LIKELIEST))
        shares[shares.argmax()] = peak
    size = last - first + 1
    head = first.to_bytes(2, "little") + size.to_bytes(2, "little")
    return head + shares.astype(f"<u{WIDTHS[kind]}").tobytes()


def _geometric(counts, bits, codebook):
    """Decay a level, of 256, and share of the middle, of 64: a byte each."""
    distance = _distance(bits, codebook)
    middle = counts[distance == 0].sum()
    outside = counts.sum() - middle
    if not outside:
        return None
    mean = (counts * distance).sum() / outside  # of those outside: 1 or more
    decay = round(256 * (1 - 1 / max(mean, 1 + 1 / 256)))
    decay = min(max(decay, 1), 255)
    sides = _weights(GEOMETRIC, bytes([decay, 64]), bits, codebook)
    others = sides[distance > 0].sum()
    ratio = middle / outside * others / sides[distance == 0].sum()
    most = min(max(round(64 * ratio), 1), 255)
    for share in range(most, 0, -1):  # no likelier than may be
        model = bytes([decay, share])
        weights = _weights(GEOMETRIC, model, bits, codebook)
        if _is_safe(weights):
            return model
    return None


def _is_safe(weights):
    """Whether each value costs what readers count on."""
    return 0 < weights.max() <= LIKELIEST * weights.sum()


def _distance(bits, codebook):
    """Of each number from the middle of its table, in levels."""
    numbers = np.arange(_levels(bits))
    if bits == TERNARY_BITS:
        return np.abs(numbers - 1)
    half = 2 ** (bits - 1)
    if has_zero(bits, codebook):
        return np.abs(numbers - half)
    return np.where(numbers >= half, numbers - half, half - 1 - numbers)


def _model_bytes(kind, content, bits, count):
    """How many bytes a model has, checked as far as can be."""
    if kind == PLAIN:
        return 0
    if bits > WIDEST or not count or kind > FINE or len(content) < 4:
        raise ValueError(f"a model of kind {kind} for {count} x {bits} bits")
    if kind == GEOMETRIC:
        return 2
    first, size = (int(n) for n in content[:4].copy().view("<u2"))
    length = 4 + size * WIDTHS[kind]
    if not size or first + size > _levels(bits) or len(content) < length:
        raise ValueError(f"a histogram of {size} levels from {first} on")
    return length


def _weights(kind, content, bits, codebook):
    """Integer weights of all numbers of a table, int64; 0 does not occur."""
    weights = np.zeros(_levels(bits), np.int64)
    if kind in WIDTHS:
        first = content[0] + 256 * content[1]
        own = np.frombuffer(content[4:], f"<u{WIDTHS[kind]}")
        weights[first:][: len(own)] = own
    else:
        decay, share = content
        distance = _distance(bits, codebook)
        scale = [ONE]
        for _ in range(distance.max()):
            scale.append(max(1, scale[-1] * decay // 256))
        weights = np.array(scale, np.int64)[distance]
        weights[distance == 0] = max(1, ONE * share // 64)
    return weights


def _categorical(weights):
    """The coder's model of integer weights, the same on every machine."""
    occurring = weights.astype(np.float64) / weights.sum()
    return _library().stream.model.Categorical(occurring, perfect=False)
