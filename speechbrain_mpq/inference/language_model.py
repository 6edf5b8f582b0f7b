"""A packed language model, loaded in one line, and N-best lists in its order.

It scores sentences, gives perplexities, and is what SpeechBrain's rescorers
ask for. A hypothesis of a recognizer gets its own score, plus the weight times
the language model's log-probability, plus the bonus for each of its words.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial

import torch
from speechbrain.decoders.ctc import CTCBeamSearcher
from speechbrain.decoders.scorer import RNNLMRescorer, TransformerLMRescorer
from speechbrain.lobes.models.transformer.Transformer import PositionalEncoding
from tqdm import tqdm

from ..decoders.nbest import TOO_MANY, NBest, RescoringWeights
from ..decoders.vocabulary import Vocabulary
from ..evaluation.word_tasks import LANGUAGE_MODELLING
from ..lobes.models.language_models import RNNS, TiedRNNLM, TiedTransformerLM
from ..quantization.packing import read_model
from .folder import VOCABULARY_FILE, fetch_folder, save_separator
from .loading import load
from .registry import checksum, choice, number, register, whole
from .speech_recognition import HybridASR, Recognizer

BATCH = 32  # sentences scored together
MOST_WORDS = 2**20  # of a vocabulary in a file
ENGINES = ("torch", "onnx")
PROBED_WORDS = 16  # of the sentences on which an engine is tried
MOST_ERROR = 0.3  # of an engine's, in spreads of what is right; sound: < 0.05


def check_vocabulary(model, vocabulary):
    """Refuse a vocabulary that a model was not trained with.

    Arguments
    ---------
    model : TiedRNNLM or TiedTransformerLM
    vocabulary : Vocabulary
    """
    if model.settings["vocab"] != len(vocabulary):
        raise ValueError(
            f"a vocabulary of {len(vocabulary)} words is not that of this "
            f"model, which has {model.settings['vocab']}: give the one that "
            "it was trained with"
        )
    expected = model.settings["vocabulary_sha256"]
    if expected and expected != vocabulary.sha256:
        raise ValueError(
            "the vocabulary is not the one that the model was trained with: "
            f"the checksum of its words is {vocabulary.sha256[:16]}..., the "
            f"model's {expected[:16]}..."
        )


def read_vocabulary(folder, model):
    """Read the vocabulary that a model was trained with from its folder.

    Arguments
    ---------
    folder : Path
        Packed folder.
    model : TiedRNNLM or TiedTransformerLM

    Returns
    -------
    Vocabulary
    """
    path = folder / VOCABULARY_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: a language model needs the vocabulary beside it that "
            "it was trained with"
        )
    vocabulary = Vocabulary.read(path)
    check_vocabulary(model, vocabulary)
    return vocabulary


@dataclass(frozen=True)
class WordScores:
    """What a model says of a sentence.

    Arguments
    ---------
    log_probs : torch.Tensor
        Natural logarithms, [words + 1]: of each word and of the end.
    unknown : torch.Tensor
        Whether each of them is <unk>, [words + 1].
    """

    log_probs: torch.Tensor
    unknown: torch.Tensor

    @property
    def total(self):
        """Log-probability of the sentence."""
        return float(self.log_probs.double().sum())


class LanguageModel:
    """A word language model and its vocabulary.

    Arguments
    ---------
    model : TiedRNNLM or TiedTransformerLM
    vocabulary : Vocabulary

    Example
    -------
    >>> _ = torch.manual_seed(0)
    >>> vocabulary = Vocabulary(["the", "state", "of", "union"])
    >>> network = TiedRNNLM(vocab=8, size=4, layers=1)
    >>> folder = save_language_model(network, getfixture("tmpdir"), vocabulary)
    >>> lm = LanguageModel.from_pretrained(folder)
    >>> scores = lm.score(["the state of the union", ""])
    >>> [len(row.log_probs) for row in scores]
    [6, 1]
    """

    def __init__(self, model, vocabulary):
        check_vocabulary(model, vocabulary)
        self.model = model.eval()
        self.vocabulary = vocabulary
        self._log_probs = _LogProbs(self.model).eval()

    @classmethod
    def from_pretrained(cls, source, engine="torch", threads=1, **hub):
        """Load a folder or hub repository; nothing in it is executed.

        Arguments
        ---------
        source : str or Path
            Packed folder, or "user/name" on the hub.
        engine : str
            "torch", or "onnx": `score` runs the stored integers in ONNX
            Runtime. SpeechBrain's rescorers compute in PyTorch.
        threads : int
            Of ONNX Runtime.
        **hub
            `revision`, `cache_dir`, `token`, `endpoint` and
            `local_files_only` of `folder.fetch_folder`.

        Returns
        -------
        LanguageModel
        """
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {ENGINES}, not {engine!r}")
        folder = fetch_folder(source, **hub)
        model = load(folder)
        if not isinstance(model, TiedRNNLM | TiedTransformerLM):
            raise ValueError(
                f"{folder} holds a {type(model).__name__}, no language model"
            )
        lm = cls(model, read_vocabulary(folder, model))
        if engine == "onnx":
            lm._log_probs = _in_onnx(lm, read_model(folder), threads)
        return lm

    @torch.inference_mode()
    def score(self, sentences, batch=BATCH, progress=False):
        """Log-probabilities of the words of sentences, each on its own.

        Arguments
        ---------
        sentences : sequence of str
            Words between white space; none at all is a sentence, too.
        batch : int
            Sentences that are computed together.
        progress : bool
            Whether to show a bar.

        Returns
        -------
        list of WordScores
            In their order.
        """
        tokens = self.encode(sentences)
        # Alike lengths together: little padding. The longest first: what they
        # give back holds the shorter, while larger and larger batches would
        # each take new memory (9 GB for 17,000 hypotheses, in place of 2)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        scores = {}
        starts = range(0, len(order), batch)
        for start in tqdm(starts[::-1], "scoring", disable=not progress):
            some = order[start : start + batch]
            rows = self._score([tokens[i] for i in some])
            scores.update(zip(some, rows))
        return [scores[i] for i in range(len(tokens))]

    def perplexity(self, sentences):
        """Perplexity of sentences, with and without unknown words.

        Arguments
        ---------
        sentences : sequence of str

        Returns
        -------
        dict
            "ppl", "ppl_known", "words" and "unknown" of
            `evaluation.language_task`.
        """
        return LANGUAGE_MODELLING.summarise(self.items(sentences))

    def items(self, sentences):
        """Test items of the language modelling task.

        Arguments
        ---------
        sentences : sequence of str

        Returns
        -------
        list of dict
        """
        return [
            {
                "id": f"sentence_{i:07d}",
                "nats": -row.total,
                "words": len(row.log_probs),
                "nats_unknown": -float(row.log_probs[row.unknown].sum()),
                "unknown": int(row.unknown.sum()),
                "reference": sentence,
            }
            for i, (sentence, row) in enumerate(
                zip(sentences, self.score(sentences))
            )
        ]

    def rescorer(self, device="cpu", temperature=1.0):
        """SpeechBrain's rescorer with this model in it.

        Arguments
        ---------
        device : str
        temperature : float
            Of the softmax.

        Returns
        -------
        RNNLMRescorer or TransformerLMRescorer
            With its key of `RescorerBuilder`'s weights as `name`.
        """
        recurrent = isinstance(self.model, TiedRNNLM)
        kind = RNNLMRescorer if recurrent else TransformerLMRescorer
        vocabulary = self.vocabulary
        rescorer = kind(
            self.model,
            vocabulary,
            device=device,
            temperature=temperature,
            bos_index=vocabulary.bos_index,
            eos_index=vocabulary.eos_index,
            pad_index=vocabulary.pad_index,
        )
        rescorer.name = "rnnlm" if recurrent else "transformerlm"
        return rescorer

    def encode(self, sentences):
        """Turn sentences into numbers of words.

        Arguments
        ---------
        sentences : sequence of str

        Returns
        -------
        list of list of int
            ValueError where the model has no positions for a sentence.
        """
        most = self.model.settings.get("max_length", math.inf)
        tokens = [self.vocabulary.encode_as_ids(text) for text in sentences]
        for row in tokens:
            if len(row) + 1 > most:
                raise ValueError(
                    f"a sentence of {len(row)} words, and the model takes "
                    f"{most - 1} at most: split it"
                )
        return tokens

    def _score(self, tokens):
        """WordScores of sentences of numbers, in one batch."""
        vocabulary = self.vocabulary
        longest = max(map(len, tokens)) + 1
        shape = len(tokens), longest
        tokens_before = torch.full(shape, vocabulary.pad_index)
        target = torch.full(shape, vocabulary.pad_index)
        for i, row in enumerate(tokens):
            tokens_before[i, : len(row) + 1] = torch.tensor(
                [vocabulary.bos_index, *row]
            )
            target[i, : len(row) + 1] = torch.tensor(
                [*row, vocabulary.eos_index]
            )
        device = next(self.model.parameters()).device
        own = self._log_probs(tokens_before.to(device), target.to(device)).cpu()
        return [
            WordScores(
                own[i, : len(row) + 1],
                target[i, : len(row) + 1] == vocabulary.unk_index,
            )
            for i, row in enumerate(tokens)
        ]


class _LogProbs(torch.nn.Module):
    """A model that gives the log-probability of each target.

    Tokens and targets are [sentences, words], and so is what comes out.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets):
        """Log-probability of each target behind the tokens up to it."""
        logits = self.model(tokens)  # [sentences, words, vocabulary]
        logits = logits[0] if isinstance(logits, tuple) else logits
        every = logits.log_softmax(-1)
        return every.gather(2, targets[..., None])[..., 0]


def _in_onnx(lm, packed, threads):
    """`_LogProbs` in ONNX Runtime, held against PyTorch."""
    from .engines.engine import import_engine
    from .engines.integer_onnx import integer_model, stored_weights

    engine = import_engine("onnx")
    most = min(PROBED_WORDS, lm.model.settings.get("max_length", math.inf))
    generator = torch.Generator().manual_seed(0)
    shape, vocab = (2, int(most)), len(lm.vocabulary)
    probe = tuple(
        torch.randint(1, vocab, shape, generator=generator) for _ in range(2)
    )
    names = ["tokens", "targets"], ["log_probs"]
    axes = {name: {0: "sentences", 1: "words"} for name in sum(names, [])}
    model, _ = integer_model(
        lm._log_probs, probe, stored_weights(packed).values(), names, axes
    )
    running = engine.session(model, threads)

    def log_probs(tokens, targets):
        inputs = {
            "tokens": tokens.cpu().numpy(),
            "targets": targets.cpu().numpy(),
        }
        return torch.from_numpy(running.run(None, inputs)[0])

    with torch.inference_mode():
        exact = lm._log_probs(*probe)
    spread = exact.std()
    error = (log_probs(*probe) - exact).square().mean().sqrt()
    if not error < MOST_ERROR * spread:
        raise ValueError(
            "ONNX Runtime gives other probabilities than PyTorch on this "
            f"processor ({error:.2g} nats apart, of a spread of "
            f'{spread:.2g}): choose engine="torch"'
        )
    return log_probs


def save_language_model(model, folder, vocabulary, metadata=None, **card):
    """Save a language model as a packed folder, with its vocabulary.

    The folder names the vocabulary's checksum, so that no other is taken for
    it.

    Arguments
    ---------
    model : TiedRNNLM or TiedTransformerLM
        Quantized, or in full precision; it is left as it is.
    folder : str or Path
        Made if it is not there.
    vocabulary : Vocabulary
        That it was trained with.
    metadata : dict or None
        Anything that JSON can hold, for quantization_config.json.
    **card
        What `card.model_card` takes: `metrics`, `reference`, `base_model`,
        `license`.

    Returns
    -------
    Path
    """
    check_vocabulary(model, vocabulary)
    settings = model.settings
    model.settings = {**settings, "vocabulary_sha256": vocabulary.sha256}
    try:
        card = {"task": LANGUAGE_MODELLING, **card}
        folder = save_separator(model, folder, metadata, **card)
    finally:
        model.settings = settings
    vocabulary.write(folder / VOCABULARY_FILE)
    return folder


def _build_on_meta(kind, **settings):
    """A model without memory for what its file will fill."""
    with torch.device("meta"):
        model = kind(**settings)
    for module in model.modules():
        # No file holds what follows from sizes.
        if isinstance(module, PositionalEncoding):
            shape = module.pe.shape
            with torch.device("cpu"):
                fresh = PositionalEncoding(shape[-1], shape[-2])
            module.pe = fresh.pe
    return model.eval()


def _probe(model):
    """What a model makes of its first words; 0 is no word."""
    output = model(torch.arange(1, min(9, model.settings["vocab"]))[None])
    return output[0] if isinstance(output, tuple) else output


_SIZES = {
    "vocab": whole(5, MOST_WORDS),
    "size": whole(1, 2**12),
    "layers": whole(1, 128),
    "dropout": number(0, 1),
    "vocabulary_sha256": checksum,
}
_BESIDE = {VOCABULARY_FILE: read_vocabulary}
register(
    TiedRNNLM,
    {**_SIZES, "rnn": choice(*RNNS)},
    build=partial(_build_on_meta, TiedRNNLM),
    probe=_probe,
    needed_files=_BESIDE,
)
register(
    TiedTransformerLM,
    {
        **_SIZES,
        "heads": whole(1, 256),
        "width": whole(1, 2**15),
        "max_length": whole(2, 2**12),
    },
    build=partial(_build_on_meta, TiedTransformerLM),
    probe=_probe,
    needed_files=_BESIDE,
)


LONG = 2000  # hypotheses from which on a bar shows that they are scored
HYPOTHESES = 20  # of a list
BEAM = 50  # of the CTC search
ENOUGH_WORDS = 200  # to judge whether a model knows them


def rescore(lists, lm, weights=None, ngram=None, progress=False):
    """Score all hypotheses anew, and order the lists by it.

    Arguments
    ---------
    lists : list of NBest
    lm : LanguageModel
    weights : RescoringWeights or None
    ngram : Ngram or None
        Its probabilities are mixed with the model's.
    progress : bool
        Whether to show a bar where there is much to do.

    Returns
    -------
    list of NBest
        Ranked, with "recognizer_scores" and "lm_scores" as details.
    """
    weights = weights or RescoringWeights()
    for row in lists:
        try:
            lm.encode(row.hypotheses)
        except ValueError as error:
            raise ValueError(f"{row.id}: {error}") from error
    texts = [text for row in lists for text in row.hypotheses]
    progress = progress and len(texts) > LONG
    scored = iter(zip(texts, lm.score(texts, progress=progress)))
    ranked = []
    for row in lists:
        scores, details = [], []
        for own in row.scores:
            text, words = next(scored)
            log_prob = _log_prob(text, words, lm, weights, ngram)
            bonus = weights.word_bonus * len(text.split())
            score = own + weights.lm_weight * log_prob + bonus
            if not math.isfinite(score):
                raise ValueError(
                    f"{row.id}: {text!r} has a score of {score}, with a "
                    f"log-probability of {log_prob:g}: the language model has "
                    "diverged, or --lm_weight or --word_bonus is too large"
                )
            scores.append(score)
            details.append({"recognizer_scores": own, "lm_scores": log_prob})
        new = NBest(row.id, row.hypotheses, scores, details)
        ranked.append(new.ranked())
    return ranked


class RescoringRecognizer(Recognizer):
    """A recognizer whose N-best lists a language model has the last word on.

    Arguments
    ---------
    source : str
        As for `Recognizer`.
    rescorer : str or Path
        Packed language model, a folder or a name on the hub.
    lm_weight : float
        Of its log-probability.
    device : str or torch.device

    Example
    -------
    >>> recognize = RescoringRecognizer(  # doctest: +SKIP
    ...     "pretrained/asr_mini", "pretrained/lm_sotu_2bit"
    ... )
    >>> recognize(waveform)  # doctest: +SKIP
    'place the green boxes behind q one please'
    """

    def __init__(self, source, rescorer, lm_weight=0.5, device="cpu"):
        super().__init__(source, device)
        self.rescorer = rescorer
        self.lm = LanguageModel.from_pretrained(rescorer)
        self.weights = RescoringWeights(lm_weight)
        self._searcher = None
        self._unknown = self._words = 0

    def __call__(self, waveform):
        """Words of one waveform, [samples]."""
        batch = torch.as_tensor(waveform, device=self.device)[None]
        with torch.inference_mode():
            nbest = self._nbest(batch)
        (ranked,) = rescore([nbest], self.lm, self.weights)
        best = ranked.hypotheses[0].strip().lower()  # as `Recognizer` does
        self._unknown += len(self.lm.vocabulary.unknown(best))
        self._words += len(best.split())
        enough = self._words >= ENOUGH_WORDS
        if enough and self._unknown > TOO_MANY * self._words:
            raise ValueError(
                f"{self._unknown} of {self._words} words are not in the "
                f"vocabulary of {self.rescorer}: take a language model of "
                "this corpus, or leave the rescorer out"
            )
        return best

    def _nbest(self, batch):
        """The hypotheses of one waveform, [1, samples]."""
        if isinstance(self.model, HybridASR):
            (nbest,) = self.model.nbest(batch, count=HYPOTHESES)
            return nbest
        log_probs = self.model.encode_batch(batch, torch.ones(1))
        if self._searcher is None:
            self._searcher = _ctc_searcher(self.model)
        hypotheses = self._searcher(log_probs.cpu(), torch.ones(1))[0]
        texts = [h.text.strip() for h in hypotheses]
        return NBest("utterance", texts, [float(h.score) for h in hypotheses])


def _ctc_searcher(interface):
    """SpeechBrain's beam search for the tokens of an `EncoderASR`."""
    tokenizer = interface.tokenizer
    if hasattr(tokenizer, "ind2lab"):
        labels = [tokenizer.ind2lab[i] for i in range(len(tokenizer.ind2lab))]
    elif hasattr(tokenizer, "id_to_piece"):
        size = tokenizer.get_piece_size()
        labels = [tokenizer.id_to_piece(i) for i in range(size)]
    else:
        raise ValueError(
            f"a {type(tokenizer).__name__} does not tell its tokens: leave "
            "the rescorer out"
        )
    return CTCBeamSearcher(
        blank_index=getattr(interface.hparams, "blank_index", 0),
        vocab_list=labels,
        beam_size=BEAM,
        topk=HYPOTHESES,
    )


def _log_prob(text, words, lm, weights, ngram):
    """Log-probability of a sentence by the model, or by it and an n-gram."""
    total = words.total
    if ngram:
        share = weights.interpolation
        others = ngram.score(lm.vocabulary.split(text))
        pairs = zip(words.log_probs.tolist(), others)
        total = sum(
            _log(share * math.exp(own) + (1 - share) * math.exp(other))
            for own, other in pairs
        )
    return total + weights.unk_penalty * int(words.unknown.sum())


def _log(probability):
    """A logarithm that zero has one of, too."""
    return math.log(max(probability, sys.float_info.min))
