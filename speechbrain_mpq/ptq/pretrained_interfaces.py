"""Whether there is anything under the name of a pretrained model.

`from_hparams` takes whatever is no folder for a name on the Hugging Face hub,
whose client repeats its attempts for minutes where it has no connection. One
question first, so that a mistyped folder is told at once.

What pretrained interfaces put out, class by class.

Layout: outputs [items, frames, values].

Pretrained SpeechBrain interfaces: finding, loading, comparing them.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import speechbrain.inference
import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.fetching import fetch

from ..quantization.tensors import near_misses
from .calibration_data import batch_of
from .task_metrics import (
    Comparison,
    DistributionComparison,
    ErrorRate,
    SourceSISNR,
    WordErrorRate,
)

HPARAMS_FILE = "hyperparams.yaml"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class SourceNotFoundError(FileNotFoundError):
    """There is no pretrained model where one was named."""


def check_source(source):
    """Refuses what is neither a model's folder nor one on the hub."""
    folder = Path(source)
    if folder.is_file():
        raise SourceNotFoundError(
            f"{source} is a file: name the folder that it is in"
        )
    if folder.is_dir():
        if not (folder / HPARAMS_FILE).is_file():
            raise SourceNotFoundError(
                f"{source} has no {HPARAMS_FILE}: name a folder that "
                f"from_hparams loads{_near_folders(folder)}"
            )
    elif HUB_NAME.fullmatch(str(source)):
        _ask_hub(str(source), _near_folders(folder))
    else:
        raise SourceNotFoundError(
            f"{source}: no such folder, and no name on the Hugging Face hub, "
            "which would be user/name: check the folder's name"
            f"{_near_folders(folder)}"
        )


def _near_folders(folder):
    """The end of a message: models beside a folder that is none."""
    models = folder.parent.glob(f"*/{HPARAMS_FILE}")
    return near_misses(str(folder), [str(path.parent) for path in models])


def _ask_hub(name, near):
    """Refuse a name that the hub does not know; it may be in the cache."""
    if isinstance(try_to_load_from_cache(name, HPARAMS_FILE), str):
        return
    try:
        # SpeechBrain uses no token either, and downloads public models only.
        get_hf_file_metadata(hf_hub_url(name, HPARAMS_FILE), token=False)
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise SourceNotFoundError(
            f"{name}: no such folder here, and no public model of this name "
            f"with a {HPARAMS_FILE} on the Hugging Face hub: check the name"
            f"{near}"
        ) from error
    except Exception as error:  # of whichever HTTP library the client has
        raise SourceNotFoundError(
            f"{name}: no such folder here, and the Hugging Face hub, which "
            f"may have it, cannot be reached ({_first_line(error)}): check "
            f"the folder's name or the connection{near}"
        ) from error


def _first_line(error):
    """What went wrong, in few words."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


class CTCOutputs(DistributionComparison):
    """Log-probabilities of an EncoderASR, for every frame."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        return self.interface.encode_batch(wavs, lengths)


class AttentionOutputs(DistributionComparison):
    """Log-probabilities of an attention decoder, for every token.

    The decoder is led along what the full-precision model has recognized.
    """

    def __init__(self, interface, items):
        super().__init__(interface, items)
        if not hasattr(self.decoder, "forward_step"):
            raise ValueError(
                f"the decoder is a {type(self.decoder).__name__}, which gives "
                "no distribution to compare: only SpeechBrain's S2S searchers "
                "are served"
            )
        self.tokens = []
        for item in items:
            wavs, lengths = batch_of([item.audio])
            _, tokens = interface.transcribe_batch(wavs, lengths)
            self.tokens.append([int(token) for token in tokens[0]])

    @property
    def decoder(self):
        """The searcher of the interface."""
        return self.interface.mods["decoder"]

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        encoded = self.layers(wavs, lengths, indices)
        frames = lengths.to(encoded.device) * encoded.shape[1]
        frames = frames.round().int()
        tokens = [
            torch.tensor([self.decoder.bos_index, *self.tokens[i]])
            for i in indices
        ]
        tokens = torch.nn.utils.rnn.pad_sequence(
            tokens, True, self.decoder.eos_index
        ).to(encoded.device)
        memory = self.decoder.reset_mem(len(indices), encoded.device)
        steps = []
        for column in tokens.unbind(1):
            step, memory, _ = self.decoder.forward_step(
                column, memory, encoded, frames
            )
            steps.append(step)
        return torch.stack(steps, 1)

    def layers(self, wavs, lengths, indices):
        """The encoder; the decoder's layers are used once for each token."""
        return self.interface.encode_batch(wavs, lengths)

    def valid(self, items, frames):
        """Tokens with the one that ends them; see ``Comparison``."""
        counts = torch.tensor([len(t) + 1 for t in self.tokens[items]])
        return torch.arange(frames) < counts[:, None]


class ClassOutputs(DistributionComparison):
    """Log-posteriors of a classifier, one distribution for each item."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        logits = self.interface.classify_batch(wavs, lengths)[0]
        return logits.reshape(len(logits), -1, logits.shape[-1])

    def valid(self, items, frames):
        """See ``Comparison``."""
        return torch.ones(len(self.audio[items]), frames, dtype=torch.bool)


class WaveformOutputs(Comparison):
    """Estimated waveforms of a separator or an enhancer."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        if hasattr(self.interface, "separate_batch"):
            return self.interface.separate_batch(wavs)
        return self.interface.enhance_batch(wavs)[..., None]


class EncoderOutputs(Comparison):
    """Embeddings or encoder states, whatever the encoder puts out."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        encoded = self.interface.encode_batch(wavs, lengths)
        if not isinstance(encoded, torch.Tensor) or encoded.dim() != 3:
            raise ValueError(
                f"{type(self.interface).__name__}.encode_batch must return "
                "one tensor [batch, frames, values] to be compared"
            )
        return encoded


class InterfaceOutputs(torch.nn.ModuleDict):
    """The modules of an interface as a network: item numbers in, outputs out.

    Parameters have the names that they have in the interface's ``mods``.

    Arguments
    ---------
    comparison : Comparison
        Says what is put out.
    each_layer_once : bool
        Run ``Comparison.layers`` instead of ``Comparison.outputs``.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> encoder = torch.nn.Linear(1, 2)
    >>> interface = SimpleNamespace(
    ...     mods={"encoder": encoder},
    ...     encode_batch=lambda wavs, lengths: encoder(wavs[..., None]),
    ... )
    >>> items = [SimpleNamespace(audio=torch.ones(n)) for n in (4, 6)]
    >>> network = InterfaceOutputs(CTCOutputs(interface, items))
    >>> network(torch.tensor([1, 0])).shape, list(network.state_dict())
    (torch.Size([2, 6, 2]), ['encoder.weight', 'encoder.bias'])
    """

    def __init__(self, comparison, each_layer_once=False):
        mods = comparison.interface.mods
        super().__init__({n: m for n, m in mods.items() if m is not None})
        self._comparison = comparison
        self._each_layer_once = each_layer_once

    def forward(self, indices):
        """Outputs for the items of these numbers.

        Arguments
        ---------
        indices : torch.Tensor
            [items], whole numbers.

        Returns
        -------
        torch.Tensor
            [items, frames, values].
        """
        compared = self._comparison
        run = compared.layers if self._each_layer_once else compared.outputs
        return run(*compared.batch(indices))


# What a class puts out and how good that is; subclasses before their base.
KINDS = {
    "EncoderDecoderASR": (AttentionOutputs, WordErrorRate),
    "EncoderASR": (CTCOutputs, WordErrorRate),
    "SepformerSeparation": (WaveformOutputs, SourceSISNR),
    "SpectralMaskEnhancement": (WaveformOutputs, SourceSISNR),
    "WaveformEnhancement": (WaveformOutputs, SourceSISNR),
    "SpeakerRecognition": (EncoderOutputs, None),
    "EncoderClassifier": (ClassOutputs, ErrorRate),
    "AudioClassifier": (ClassOutputs, ErrorRate),
    "WaveformEncoder": (EncoderOutputs, None),
}


def find_class(name):
    """The interface class of a name."""
    module, _, own = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), own)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"no class {name!r}: {error}") from error
    else:
        classes = _interface_classes()
        if name not in classes:
            raise ValueError(
                f"no class {name!r} in speechbrain.inference"
                f"{near_misses(name, classes)}"
            )
        found = classes[name]
    task_of(found)  # is it one that is served?
    return found


def task_of(cls):
    """What a class puts out, and the measure that suits it.

    Example
    -------
    >>> [kind.__name__ for kind in task_of(find_class("EncoderASR"))]
    ['CTCOutputs', 'WordErrorRate']
    """
    for base in inspect.getmro(cls):
        if base.__name__ in KINDS and issubclass(base, Pretrained):
            return KINDS[base.__name__]
    raise ValueError(
        f"{cls.__name__} is not served: it must be, or inherit from, one of "
        f"{', '.join(KINDS)}"
    )


def load_interface(cls, source, device="cpu"):
    """An interface, and where its hyperparams.yaml is."""
    source = str(source)
    check_source(source)
    interface = cls.from_hparams(source=source, run_opts={"device": device})
    if not hasattr(interface.hparams, "pretrainer"):
        raise ValueError(f"{source}: its {HPARAMS_FILE} has no pretrainer")
    hooks = interface.hparams.pretrainer.custom_hooks.values()
    if any(getattr(h, "func", h).__name__ == "load_packed_" for h in hooks):
        raise ValueError(
            f"{source} is quantized already: quantize the model that it was "
            "made from"
        )
    return interface, Path(fetch(HPARAMS_FILE, source))


def divergence(comparison, interface, chunk=8):
    """How far another interface's outputs are from the compared one's.

    Arguments
    ---------
    comparison : Comparison
        Of the full-precision interface.
    interface : Pretrained
        For example quantized.
    chunk : int
        Items that go through at a time.

    Returns
    -------
    float
        In ``comparison.unit``, mean over all items.
    """
    other, error, scale = comparison.of(interface), 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(comparison), chunk):
            items = slice(start, min(start + chunk, len(comparison)))
            batch = comparison.batch(torch.arange(items.start, items.stop))
            reference = comparison.outputs(*batch)
            error += comparison.error(reference, other.outputs(*batch), items)
            scale += comparison.scale(reference, items)
    return float(error / scale)


def _interface_classes():
    """Name -> class, of all modules in speechbrain.inference that import."""
    found = {}
    for entry in pkgutil.iter_modules(speechbrain.inference.__path__):
        try:
            module = importlib.import_module(
                f"speechbrain.inference.{entry.name}"
            )
        except ImportError:  # its optional packages are not here
            continue
        for name, member in vars(module).items():
            if inspect.isclass(member) and issubclass(member, Pretrained):
                found[name] = member
    del found["Pretrained"]
    return found
