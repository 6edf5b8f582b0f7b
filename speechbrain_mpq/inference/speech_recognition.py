"""A hybrid recognizer, loaded in one line: TDNN-F, lexicon and word n-gram.

What SpeechBrain's `EncoderASR` is for CTC. The network's outputs are searched
exactly for the most probable words; with the extra `decode`, a beam search
gives N-best lists and takes large vocabularies.
"""

import re
from pathlib import Path

import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization

from ..decoders.kaldi_decoder import check_scales
from ..decoders.ngram import Ngram
from ..decoders.viterbi import LARGEST_EXACT, ExactDecoder
from ..decoders.vocabulary import Lexicon
from ..evaluation.word_tasks import RECOGNITION
from ..lobes.models.tdnnf import TDNNF
from ..utils import SAMPLE_RATE
from .audio import AudioError, AudioFile
from .chunks import relative_lengths
from .engines.activations import file_digest
from .folder import LEXICON_FILE, NGRAM_FILE, fetch_folder, save_separator
from .loading import load
from .registry import (
    checksum,
    flag,
    number,
    optional,
    register,
    several,
    whole,
)

ENGINES = ("torch", "onnx")
SHORTEST = 400  # samples: one window of the features
# What a folder has beside the weights -> the argument that replaces it; the
# order is that of TDNNF's `files_sha256`
_BESIDE = {LEXICON_FILE: "lexicon", NGRAM_FILE: "ngram"}


class HybridASR:
    """A TDNN-F with the lexicon and n-gram that make words of its outputs.

    Arguments
    ---------
    model : TDNNF
        Without a speaker vector.
    lexicon : Lexicon
        Pronunciations in the phones that the network was trained with.
    ngram : Ngram
        Word n-gram, a bigram for the exact search.
    acoustic_scale, lm_scale : float
        Of the network's outputs and of the n-gram's log-probabilities; LF-MMI
        is made for 1 and 1.
    device : str

    Example
    -------
    >>> from speechbrain_mpq.decoders.ngram import estimate_arpa
    >>> _ = torch.manual_seed(0)
    >>> lexicon = Lexicon({"tea": [["t", "iy"]], "eat": [["iy", "t"]]})
    >>> path = getfixture("tmp_path") / "lm.arpa"
    >>> estimate_arpa(path, ["tea", "eat tea"])
    >>> network = TDNNF(40, 6, 16, [4, 4], [1, 3], prefinal=4)
    >>> folder = save_recognizer(network, path.parent / "asr", lexicon, path)
    >>> model = HybridASR.from_pretrained(folder)
    >>> words, numbers = model.transcribe_batch(torch.randn(2, 16000))
    >>> [set(row.split()) <= {"tea", "eat"} for row in words]
    [True, True]
    """

    def __init__(
        self,
        model,
        lexicon,
        ngram,
        acoustic_scale=1.0,
        lm_scale=1.0,
        device="cpu",
    ):
        check_scales(acoustic_scale, lm_scale)
        check_lexicon(model, lexicon)
        if model.settings["speaker_size"]:
            raise ValueError(
                "a network that wants a vector of the speaker: there is none "
                "here; train it with speaker_size 0"
            )
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.lexicon, self.ngram = lexicon, ngram
        self.vocabulary = ngram.vocabulary
        # Words without pronunciation are named now, not in the middle of work.
        lexicon.check_vocabulary(self.vocabulary)
        self.acoustic_scale, self.lm_scale = acoustic_scale, lm_scale
        self.compute_features = Fbank(
            sample_rate=SAMPLE_RATE, n_mels=model.settings["input_size"]
        ).to(self.device)
        self.normalize = InputNormalization(norm_type="sentence")
        self.network = self.model
        self._exact = self._decoder = None

    @classmethod
    def from_pretrained(
        cls,
        source,
        lexicon=None,
        ngram=None,
        hub=None,
        engine="torch",
        threads=1,
        **options,
    ):
        """Load a folder or hub repository; nothing in it is executed.

        Arguments
        ---------
        source : str or Path
            Packed folder, or "user/name" on the hub.
        lexicon, ngram : str or Path or None
            Files to take in place of the folder's own.
        hub : dict or None
            What `folder.fetch_folder` takes.
        engine : str
            "torch", or "onnx": ONNX Runtime multiplies the stored integers, on
            the CPU; takes the extra `onnx`.
        threads : int
            Of ONNX Runtime.
        **options
            `acoustic_scale`, `lm_scale` and `device`.

        Returns
        -------
        HybridASR
        """
        folder = fetch_folder(source, **(hub or {}))
        model = load(folder)
        if not isinstance(model, TDNNF):
            raise ValueError(
                f"{folder} holds a {type(model).__name__}, no TDNN-F"
            )
        if engine not in ENGINES:
            raise ValueError(f"engine {engine!r} is none of {ENGINES}")
        recognizer = cls(
            model,
            read_lexicon(folder, model, lexicon),
            read_ngram(folder, model, ngram),
            **options,
        )
        if engine == "onnx":
            from .onnx_recognizer import RecognizerSession

            recognizer.network = RecognizerSession(model, folder, threads)
        return recognizer

    @torch.inference_mode()
    def outputs(self, wavs, wav_lens=None):
        """Outputs of the network for a batch, normalized in each frame.

        The search makes the same of them as of the raw ones, and scores are
        log-probabilities.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, samples], 16 kHz.
        wav_lens : torch.Tensor, optional
            [batch], relative to the longest.

        Returns
        -------
        list of numpy.ndarray
            [frames, outputs] of each utterance.
        """
        wavs = torch.as_tensor(wavs, dtype=torch.float32, device=self.device)
        if wavs.dim() != 2:
            raise ValueError(
                f"waveforms {list(wavs.shape)} must be [batch, samples]"
            )
        if wavs.shape[1] < SHORTEST:
            raise ValueError(
                f"{wavs.shape[1]} samples are too short: give at least "
                f"{SHORTEST}, a window of the features"
            )
        if not wavs.isfinite().all():
            raise ValueError("waveforms hold NaN or infinity")
        wav_lens = relative_lengths(wav_lens, wavs)
        feats = self.normalize(self.compute_features(wavs), wav_lens)
        outputs = self.network(feats, wav_lens).log_softmax(2).cpu()
        if not outputs.isfinite().all():  # of which a search makes silence
            raise ValueError(
                "the network puts out NaN or infinity: its weights are damaged "
                "or diverged; take another packed folder"
            )
        outputs = outputs.numpy()
        frames = (wav_lens * outputs.shape[1]).round().long().tolist()
        return [row[:length] for row, length in zip(outputs, frames)]

    def transcribe_batch(self, wavs, wav_lens=None):
        """Most probable words of a batch, as `EncoderASR` gives them.

        Up to 1000 words are searched exactly; larger vocabularies and n-grams
        by Kaldi's decoder, which takes the extra `decode`.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, samples], 16 kHz.
        wav_lens : torch.Tensor, optional
            [batch], relative to the longest.

        Returns
        -------
        words : list of str
            Of each utterance.
        numbers : list of list of int
            Places of these words in `vocabulary`.
        """
        hypotheses = [self._search(row) for row in self.outputs(wavs, wav_lens)]
        places = {word: i for i, word in enumerate(self.vocabulary)}
        numbers = [[places[word] for word in words] for words in hypotheses]
        return [" ".join(words) for words in hypotheses], numbers

    def transcribe_file(self, path):
        """Most probable words of a recording.

        Arguments
        ---------
        path : str or Path
            Audio file of any rate of 16 kHz and more; channels are averaged.

        Returns
        -------
        str
        """
        return self.transcribe_batch(self.read(path)[None])[0][0]

    def read(self, source, name=None):
        """A recording, or what a pipe holds, as [samples] at 16 kHz."""
        if not hasattr(source, "seek") and not Path(source).exists():
            raise FileNotFoundError(f"no file {source}")
        audio = AudioFile(source, name=name, min_samples=SHORTEST)
        if audio.scan().silent:  # of which the search makes words, too
            raise AudioError(
                audio.name, "it is silent: nobody speaks", "give another one"
            )
        audio.log_warnings()
        return torch.cat(list(audio.blocks())).mean(1)

    def nbest(self, wavs, wav_lens=None, count=20, ids=None, **options):
        """N-best lists by a beam search; takes the extra `decode`.

        Arguments
        ---------
        wavs, wav_lens : torch.Tensor
            As for `transcribe_batch`.
        count : int
            Most hypotheses of a list.
        ids : sequence of str, optional
            Names of the utterances.
        **options
            `beam` and `lattice_beam` of `decoders.kaldi_decoder.WordDecoder`.

        Returns
        -------
        list of NBest
            With "acoustic_scores" and "lm_scores", unscaled, as details.
        """
        decoder = self.word_decoder(**options)
        rows = self.outputs(wavs, wav_lens)
        ids = [f"utterance_{i}" for i in range(len(rows))] if not ids else ids
        return [
            decoder.nbest(row, count, key)
            for row, key in zip(rows, ids, strict=True)
        ]

    def word_decoder(self, **options):
        """Kaldi's decoder with these beams, kept for the next call."""
        from ..decoders.kaldi_decoder import WordDecoder

        if self._decoder is None or self._decoder[0] != options:
            decoder = WordDecoder(
                self.lexicon,
                self.ngram,
                acoustic_scale=self.acoustic_scale,
                lm_scale=self.lm_scale,
                **options,
            )
            self._decoder = options, decoder
        return self._decoder[1]

    def _search(self, outputs):
        """Words of one utterance, [frames, outputs]."""
        if len(self.vocabulary) > LARGEST_EXACT:
            best = self.word_decoder().nbest(outputs, count=1)
            return best.hypotheses[0].split()
        if self._exact is None:
            self._exact = ExactDecoder(
                self.lexicon, self.ngram, self.acoustic_scale, self.lm_scale
            )
        return self._exact(outputs)[0]


class Recognizer:
    """Turn waveforms into words, by a hybrid or a SpeechBrain CTC recognizer.

    Arguments
    ---------
    source : str
        Packed folder of `save_recognizer`, or a folder or hub name that
        SpeechBrain's `EncoderASR.from_hparams` loads.
    device : str or torch.device

    Example
    -------
    >>> recognize = Recognizer("pretrained/asr_mini")  # doctest: +SKIP
    >>> recognize(waveform)  # doctest: +SKIP
    'place the green boxes behind q one please'
    """

    def __init__(self, source, device="cpu"):
        self.device = device
        if Path(source, NGRAM_FILE).is_file():
            self.model = HybridASR.from_pretrained(source, device=device)
            return
        from speechbrain.inference.ASR import EncoderASR

        self.model = EncoderASR.from_hparams(
            source=str(source), run_opts={"device": str(device)}
        )

    def __call__(self, waveform):
        """Words of one waveform, [samples]."""
        batch = torch.as_tensor(waveform, device=self.device)[None]
        with torch.no_grad():
            words, _ = self.model.transcribe_batch(batch, torch.ones(1))
        return words[0].strip().lower()


def read_lexicon(folder, model, path=None):
    """Read the lexicon beside a network's weights, or another one.

    Arguments
    ---------
    folder : Path
        Packed folder.
    model : TDNNF
    path : str or Path or None
        Another file to take.

    Returns
    -------
    Lexicon
        In the phones of the network.
    """
    phones = model.settings["phones"]
    if not phones:
        raise ValueError(
            f"{folder} does not tell its phones: save it with save_recognizer"
        )
    path = _beside(folder, LEXICON_FILE, model, path)
    return Lexicon.read(path, silence=phones[0], phones=phones)


def read_ngram(folder, model, path=None):
    """Read the word n-gram beside a network's weights, or another one.

    Arguments
    ---------
    folder : Path
        Packed folder.
    model : TDNNF
    path : str or Path or None
        Another file to take.

    Returns
    -------
    Ngram
    """
    return Ngram(_beside(folder, NGRAM_FILE, model, path))


def _beside(folder, name, model, other):
    """The path of a file that a recognizer cannot do without."""
    path = Path(other or folder / name)
    argument = _BESIDE[name]
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: a recognizer needs it beside its weights, or another "
            f"file as {argument}"
        )
    expected = dict(zip(_BESIDE, model.settings["files_sha256"])).get(name)
    if expected and not other and file_digest(path) != expected:
        raise ValueError(
            f"{path} is not the file that the folder was saved with: take that "
            f"one, or name this one as {argument} if you mean it"
        )
    return path


def _check_ngram(folder, model):
    """Refuse an n-gram whose words the lexicon beside it cannot pronounce."""
    vocabulary = read_ngram(folder, model).vocabulary
    read_lexicon(folder, model).check_vocabulary(vocabulary)


def check_lexicon(model, lexicon):
    """Refuse a lexicon whose phones are not those of a network.

    Arguments
    ---------
    model : TDNNF
    lexicon : Lexicon
    """
    phones, outputs = model.settings["phones"], model.settings["outputs"]
    if outputs != 2 * len(lexicon.phones) or (phones or lexicon.phones) != (
        lexicon.phones
    ):
        raise ValueError(
            f"a lexicon of {len(lexicon.phones)} phones and a network with "
            f"{outputs} outputs, two for each of its own, or phones in another "
            "order: take the lexicon that it was trained with"
        )


def save_recognizer(model, folder, lexicon, ngram, metadata=None, **card):
    """Save a recognizer as a packed folder that `HybridASR` loads.

    The cross-entropy head, which only training needs, is left out.

    Arguments
    ---------
    model : TDNNF
        Quantized, or in full precision; it is left as it is.
    folder : str or Path
        Made if it is not there.
    lexicon : Lexicon
        That it was trained with.
    ngram : str or Path
        ARPA file.
    metadata : dict or None
        Anything that JSON can hold, for quantization_config.json.
    **card
        What `card.model_card` takes: `metrics`, `reference`, `base_model`,
        `license`.

    Returns
    -------
    Path
    """
    check_lexicon(model, lexicon)
    Ngram(ngram)  # refuses what is no ARPA file
    packed = model.without_xent()
    packed.settings["phones"] = list(lexicon.phones)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lexicon.write(folder / LEXICON_FILE)
    if Path(ngram).resolve() != (folder / NGRAM_FILE).resolve():
        (folder / NGRAM_FILE).write_bytes(Path(ngram).read_bytes())
    packed.settings["files_sha256"] = [file_digest(folder / n) for n in _BESIDE]
    card = {"task": RECOGNITION, **card}
    return save_separator(packed, folder, metadata, **card)


_SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9_@]{0,15}")


def _symbol(value, place):
    """A phone of a file."""
    if not isinstance(value, str) or not _SYMBOL.fullmatch(value):
        raise ValueError(
            f"{place} must be a phone of at most 16 letters and digits, not "
            f"{str(value)[:40]!r}"
        )
    return value


def _probe(model):
    """What a network makes of a second of speech-like features."""
    generator = torch.Generator().manual_seed(0)
    size = model.settings["input_size"]
    return model(torch.randn(1, 100, size, generator=generator))


_LAYERS = 256  # at most
register(
    TDNNF,
    {
        "input_size": whole(1, 2**12),
        "outputs": whole(2, 2**16),
        "size": whole(1, 2**14),
        "bottlenecks": several(whole(1, 2**14), 1, _LAYERS),
        "strides": several(whole(0, 64), 1, _LAYERS),
        "prefinal": whole(1, 2**14),
        "subsampling": whole(1, 16),
        "speaker_size": whole(0, 2**14),
        "context": whole(0, 64),
        "decorrelate": flag,
        "xent": flag,
        "bypass": number(0, 1),
        "scale": optional(number(1e-6, 1e6)),
        "phones": several(_symbol, 0, 2**15),
        "files_sha256": several(checksum, 0, len(_BESIDE)),
    },
    probe=_probe,
    may_lack=("files_sha256",),  # files of before have none
    needed_files={LEXICON_FILE: read_lexicon, NGRAM_FILE: _check_ngram},
)
