"""A classifier of spoken words in integers, loaded in one line.

Calls and what they return are those of SpeechBrain's `EncoderClassifier`. The
folder holds the file of an integer GRU, and a card.
"""

from pathlib import Path

import torch
import torchaudio

from ..evaluation.word_tasks import CLASSIFICATION
from ..lobes.models.gru_classifier import IntegerClassifier
from ..nnet.gru_operations import LINEAR
from ..nnet.integer_gru import cell_names
from ..nnet.integer_gru_file import save_integer_gru
from ..quantization.packing import CONFIG_FILE, MODEL_FILE
from ..quantization.plan import BitPlan, ClusterBits
from ..utils import write_json, write_text
from .audio import check_rates, read_segment
from .card import model_card
from .chunks import relative_lengths
from .folder import CARD_FILE, fetch_folder

CLASSIFIER_BITS = 8  # of the linear classifier


class SpokenWordClassifier:
    """Says which of a few words a recording is, with integers only.

    Arguments
    ---------
    network : IntegerClassifier

    Example
    -------
    >>> import speechbrain_mpq
    >>> root = Path(speechbrain_mpq.__file__).parents[1]
    >>> folder = root / "pretrained/gru_digits"
    >>> classifier = SpokenWordClassifier.from_pretrained(folder)
    >>> classifier.labels[7], classifier.sample_rate
    ('seven', 8000)
    >>> scores, _, _, labels = classifier.classify_batch(torch.randn(2, 8000))
    >>> scores.shape, len(labels)
    (torch.Size([2, 10]), 2)
    """

    def __init__(self, network):
        self.network = network.eval()
        self.labels = list(network.labels)
        self.sample_rate = network.features.sample_rate

    @classmethod
    def from_pretrained(cls, source, **hub):
        """Load a folder or hub repository; nothing in it is executed.

        Arguments
        ---------
        source : str or Path
            Folder, or "user/name" on the hub.
        **hub
            `revision`, `cache_dir`, `token`, `endpoint` and
            `local_files_only` of `folder.fetch_folder`.

        Returns
        -------
        SpokenWordClassifier
        """
        path = fetch_folder(source, **hub) / MODEL_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}: name the folder of a packed classifier"
            )
        return cls(IntegerClassifier.read(path))

    def classify_batch(self, wavs, wav_lens=None):
        """Classify waveforms of the model's sampling rate.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, samples], or [samples] of one.
        wav_lens : torch.Tensor or None
            [batch], lengths as parts of the longest.

        Returns
        -------
        scores : torch.Tensor
            [batch, classes], int32 accumulators; of one recording they can be
            compared, of two they cannot.
        score : torch.Tensor
            [batch], the largest.
        index : torch.Tensor
            [batch], its class.
        labels : list of str
            Their names.
        """
        wavs = torch.as_tensor(wavs)
        wavs = wavs[None] if wavs.ndim == 1 else wavs
        if wavs.ndim != 2 or not len(wavs):
            raise ValueError(
                f"waveforms are [batch, samples], not {list(wavs.shape)}"
            )
        lengths = relative_lengths(wav_lens, wavs) * wavs.shape[1]
        lengths = lengths.round().long().tolist()
        scores = self.network([w[:n] for w, n in zip(wavs, lengths)])
        score, index = scores.max(-1)
        return scores, score, index, [self.labels[i] for i in index.tolist()]

    def classify_file(self, path):
        """Classify a recording of one channel, of any sampling rate.

        Arguments
        ---------
        path : str or Path

        Returns
        -------
        tuple
            As of `classify_batch`, with a batch of one.
        """
        try:
            samples, rate = read_segment(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no file {path}") from error
        except ValueError as error:
            raise ValueError(f"{path} is no sound file: {error}") from error
        if samples.shape[1] != 1:
            raise ValueError(
                f"{path} has {samples.shape[1]} channels: give one of them"
            )
        waveform = torch.from_numpy(samples[:, 0])
        check_rates(rate, self.sample_rate, path)
        if rate != self.sample_rate:
            waveform = torchaudio.functional.resample(
                waveform, rate, self.sample_rate
            )
        try:
            return self.classify_batch(waveform)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def save_classifier(integer, folder, features, metadata=None, **card):
    """Save an integer GRU as a folder that `from_pretrained` loads.

    Arguments
    ---------
    integer : IntegerGRU
        With a classifier.
    folder : str or Path
        Made if it is not there.
    features : dict
        Settings of its `NormalizedFbank`.
    metadata : dict or None
        Anything that JSON can hold, for quantization_config.json.
    **card
        What `card.model_card` takes: `metrics`, `reference`, `license`.

    Returns
    -------
    Path
    """
    integer.description["features"] = features
    IntegerClassifier(integer)  # what cannot be loaded is not saved
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_integer_gru(folder / MODEL_FILE, integer)
    config = {
        "quant_method": "speechbrain_mpq",
        "integer_gru": integer.description,
        "plan": matrix_plan(integer.description).to_dict(),
        "metadata": metadata or {},
    }
    write_json(folder / CONFIG_FILE, config)
    size = (folder / MODEL_FILE).stat().st_size
    card = {"task": CLASSIFICATION, **card}
    write_text(folder / CARD_FILE, model_card(config, size, **card))
    return folder


def matrix_plan(description) -> BitPlan:
    """Bits of the matrices of an integer GRU, as packed folders have them.

    Arguments
    ---------
    description : dict
        Of the `IntegerGRU`.
    """
    hidden = description["hidden_size"]
    clusters = {}
    for cell, features in cell_names(description):
        for name in LINEAR:
            columns = features if name in LINEAR[:3] else hidden
            bits = description["plan"][f"{cell}.{name}"]
            clusters[f"{cell}.{name}"] = ClusterBits(
                bits, hidden * columns, (f"{cell}.{name}",), hidden
            )
    outputs = hidden * (1 + description["bidirectional"])
    clusters["classifier"] = ClusterBits(
        CLASSIFIER_BITS, outputs * description["classes"], ("classifier",)
    )
    return BitPlan(clusters)
