"""What pretrained interfaces put out, class by class.

Layout: outputs [items, frames, values].
"""

import inspect
import math

import torch
from speechbrain.inference.interfaces import Pretrained

from .calibration_data import sample_rate_of
from .task_metrics import (
    Comparison,
    DistributionComparison,
    ErrorRate,
    SourceSISNR,
    WordErrorRate,
    waveforms,
)

SEED = 0  # of whatever is random in a pass, the same for all passes
EDGE = 1e-6  # probabilities keep this distance from 0 and 1


class CTCOutputs(DistributionComparison):
    """Log-probabilities of an EncoderASR, for every frame."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        return self.interface.encode_batch(wavs, lengths)


class LedOutputs(DistributionComparison):
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
        for index in range(len(items)):
            with torch.no_grad():
                recognized = self.recognized(*self.batch(torch.tensor([index])))
            self.tokens.append([int(token) for token in recognized])

    @property
    def decoder(self):
        """The searcher of the interface."""
        return self.interface.mods["decoder"]

    def recognized(self, wavs, lengths, indices):
        """Tokens of one item."""
        raise NotImplementedError("a subclass asks the interface")

    def encoded(self, wavs, lengths, indices):
        """What the decoder attends to, [items, frames, values], and lengths."""
        return self.interface.encode_batch(wavs, lengths), lengths

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        encoded, lengths = self.encoded(wavs, lengths, indices)
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
        return self.encoded(wavs, lengths, indices)[0]

    def valid(self, items, frames):
        """Tokens with the one that ends them; see ``Comparison``."""
        counts = torch.tensor([len(t) + 1 for t in self.tokens[items]])
        return torch.arange(frames) < counts[:, None]


class AttentionOutputs(LedOutputs):
    """Log-probabilities of a recognizer's decoder."""

    def recognized(self, wavs, lengths, indices):
        """See ``LedOutputs``."""
        return self.interface.transcribe_batch(wavs, lengths)[1][0]


class UnitOutputs(LedOutputs):
    """Log-probabilities of a translator's decoder."""

    def recognized(self, wavs, lengths, indices):
        """See ``LedOutputs``."""
        return self.interface.translate_batch(wavs, lengths)[0]


class PhonemeOutputs(LedOutputs):
    """Log-probabilities of a phoneme decoder, whose input is text."""

    reads = "text"

    @property
    def decoder(self):
        """The searcher in the interface's own decoding."""
        steps = self.interface.hparams.decode_pipeline["steps"]
        for step in steps:
            for value in getattr(step["func"], "keywords", {}).values():
                if hasattr(value, "forward_step"):
                    return value
        return None

    def encoded(self, texts, lengths, indices):
        """Encoder states; see ``LedOutputs``."""
        inputs = self.interface.encode_input({"txt": texts})
        self.interface._update_graphemes(inputs)
        keys = getattr(self.interface.hparams, "model_input_keys", inputs)
        outputs = self.interface.mods.model(**{k: inputs[k] for k in keys})
        keys = self.interface.hparams.model_output_keys
        outputs = dict(zip(keys, outputs))
        return outputs["encoder_out"], outputs["char_lens"]

    def recognized(self, texts, lengths, indices):
        """See ``LedOutputs``."""
        return self.decoder(*self.encoded(texts, lengths, indices))[0][0]


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
        return waveforms(self.interface, wavs, lengths)


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


class MelEncoderOutputs(Comparison):
    """Embeddings of an encoder whose input is a mel spectrogram."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        mels = self.interface.mel_spectrogram(wavs.to(self.interface.device))
        return self.interface.encode_mel_spectrogram_batch(mels, lengths)


class SpeechOutputs(DistributionComparison):
    """Log-probabilities of speech and of none, for every frame."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        speech = self.interface.get_speech_prob_chunk(wavs, lengths)
        speech = speech.clamp(EDGE, 1 - EDGE)
        return torch.cat([speech, 1 - speech], -1).log()


class EmotionOutputs(DistributionComparison):
    """Log-probabilities of emotions, for every frame."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        interface = self.interface
        encoded = interface.encode_batch(wavs, lengths)
        pooled = interface.hparams.avg_pool(encoded)
        return interface.hparams.log_softmax(interface.mods.output_mlp(pooled))


class SpectrogramOutputs(Comparison):
    """Spectrograms of a synthesizer, and when it would end.

    It is led along what the full-precision model has said; its dropout, which
    never ends, is the same in all passes.
    """

    reads = "text"

    def __init__(self, interface, items):
        super().__init__(interface, items)
        self.mels = []
        for text in self.audio:
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                mel, lengths, _ = interface.encode_batch([text])
            self.mels.append(mel[:, :, : max(1, int(lengths[0]))])

    def outputs(self, texts, lengths, indices):
        """See ``Comparison``."""
        device = self.interface.device
        spectrograms = []
        for text, index in zip(texts, indices):
            tokens, count = self.interface.text_to_seq(text)
            tokens = torch.tensor(tokens, device=device)[None]
            mel = self.mels[index].to(device)
            counts = torch.tensor([count], device=device)
            frames = torch.tensor([mel.shape[-1]], device=device)
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                _, spectrogram, gates, _ = self.interface.hparams.model(
                    (tokens, counts, mel, count, frames)
                )
            ends = gates.reshape(1, 1, -1)
            spectrograms.append(torch.cat([spectrogram, ends], 1)[0].T)
        return torch.nn.utils.rnn.pad_sequence(spectrograms, batch_first=True)

    def valid(self, items, frames):
        """See ``Comparison``."""
        counts = torch.tensor([mel.shape[-1] for mel in self.mels[items]])
        return torch.arange(frames) < counts[:, None]


class VocoderOutputs(Comparison):
    """Waveforms of a vocoder from spectrograms of the items' audio.

    Their settings are those of SpeechBrain's recipe for LJSpeech where the
    hparams have no others; bands and step are the generator's own.
    """

    settings = {
        "n_fft": ("n_fft", 1024),
        "win_length": ("win_length", 1024),
        "f_min": ("mel_fmin", 0.0),
        "f_max": ("mel_fmax", 8000.0),
        "power": ("power", 1),
        "normalized": ("mel_normalized", False),
        "norm": ("norm", "slaney"),
        "mel_scale": ("mel_scale", "slaney"),
        "compression": ("dynamic_range_compression", True),
    }

    def spectrograms(self, wavs):
        """Log mel spectrograms, [items, bands, frames]."""
        from speechbrain.lobes.models.HifiGAN import mel_spectrogram

        hparams = self.interface.hparams
        generator = hparams.generator
        step = math.prod(layer.conv.stride[0] for layer in generator.ups)
        settings = {
            name: getattr(hparams, key, usual)
            for name, (key, usual) in self.settings.items()
        }
        rate = sample_rate_of(self.interface)
        settings["f_max"] = min(settings["f_max"], rate / 2)
        return mel_spectrogram(
            sample_rate=rate,
            hop_length=step,
            n_mels=generator.conv_pre.conv.in_channels,
            **settings,
            audio=wavs,
        )

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        # Not decode_batch: it takes the weight norm away, and with it what
        # quantizes behind it.
        mels = self.spectrograms(wavs).to(self.interface.device)
        return self.interface.infer(mels).transpose(1, 2)


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
    "WhisperASR": (AttentionOutputs, WordErrorRate),
    "EncoderDecoderS2UT": (UnitOutputs, None),
    "VAD": (SpeechOutputs, None),
    "SepformerSeparation": (WaveformOutputs, SourceSISNR),
    "SpectralMaskEnhancement": (WaveformOutputs, SourceSISNR),
    "WaveformEnhancement": (WaveformOutputs, SourceSISNR),
    "SpeakerRecognition": (EncoderOutputs, None),
    "EncoderClassifier": (ClassOutputs, ErrorRate),
    "AudioClassifier": (ClassOutputs, ErrorRate),
    "WaveformEncoder": (EncoderOutputs, None),
    "MelSpectrogramEncoder": (MelEncoderOutputs, None),
    "Speech_Emotion_Diarization": (EmotionOutputs, None),
    "Tacotron2": (SpectrogramOutputs, None),
    "HIFIGAN": (VocoderOutputs, None),
    "GraphemeToPhoneme": (PhonemeOutputs, None),
}
# What a class would need that no manifest has
NEEDS = {
    "StreamingASR": "its decoding keeps states from chunk to chunk: quantize "
    "its modules in the recipe that trained it (docs/plug-in.md)",
    "EndToEndSLU": "it runs a second model that is not in its folder: quantize "
    "its modules in the recipe that trained it (docs/plug-in.md)",
    "FastSpeech2": "it downloads a second model for phonemes: quantize its "
    "modules in the recipe that trained it (docs/plug-in.md)",
    "MSTacotron2": "it takes speaker embeddings of a second model: quantize "
    "its modules in the recipe that trained it (docs/plug-in.md)",
    "SNREstimator": "it takes estimates of a second model: quantize its "
    "modules in the recipe that trained it (docs/plug-in.md)",
    "UnitHIFIGAN": "it takes units of a second model: quantize its generator "
    "in the recipe that trained it (docs/plug-in.md)",
}


def task_of(cls):
    """What a class puts out, and the measure that suits it.

    Example
    -------
    >>> from speechbrain.inference.ASR import EncoderASR
    >>> [kind.__name__ for kind in task_of(EncoderASR)]
    ['CTCOutputs', 'WordErrorRate']
    """
    for base in inspect.getmro(cls):
        if base.__name__ in KINDS and issubclass(base, Pretrained):
            return KINDS[base.__name__]
    for base in inspect.getmro(cls):
        if base.__name__ in NEEDS:
            raise ValueError(
                f"{cls.__name__} is not served: {NEEDS[base.__name__]}"
            )
    raise ValueError(
        f"{cls.__name__} is not served: it must be, or inherit from, one of "
        f"{', '.join(KINDS)}"
    )
