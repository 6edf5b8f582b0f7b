"""A packed noise suppressor with early exits, loaded in one line.

What SpeechBrain's `SpectralMaskEnhancement` is for its own networks, with an
exit to choose: for the whole signal, by a budget, or frame by frame.
"""

import copy
import logging
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..evaluation.signal_tasks import ENHANCEMENT
from ..lobes.models.exit_rules import EnhancerStream, exit_rule
from ..lobes.models.nsnet2 import BINS, LAST, EarlyExitNsNet2, NsNet2
from ..utils import BUNDLED_ENHANCER, SAMPLE_RATE, atomic_write
from .audio import AudioFile, as_waveforms
from .chunks import check_finite, relative_lengths
from .folder import fetch_folder, save_separator
from .loading import load
from .output import UNLIMITED, check_subtype, output_paths, write_blocks
from .registry import flag, number, optional, register, several, whole

logger = logging.getLogger(__name__)
MIN_RATE = 8000  # Hz; below it there is hardly any speech
CHUNK_SECONDS = 4.0  # that are in memory at a time


class SpeechEnhancer:
    """A noise suppressor with exits, for waveforms, files and streams.

    Arguments
    ---------
    model : NsNet2 or EarlyExitNsNet2
    device : str

    Example
    -------
    >>> _ = torch.manual_seed(0)
    >>> folder = getfixture("tmpdir")
    >>> _ = save_enhancer(EarlyExitNsNet2(side=8), folder)
    >>> enhancer = SpeechEnhancer.from_pretrained(folder)
    >>> enhancer.exits, enhancer.model.exit_within(600e3)
    ((0, 1, 3, 5), 1)
    >>> enhancer.enhance_batch(torch.randn(2, 1600), exit=1).shape
    torch.Size([2, 1600])
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, model, device="cpu"):
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)

    @classmethod
    def from_pretrained(cls, source=BUNDLED_ENHANCER, device="cpu", **hub):
        """Load a folder or hub repository; nothing in it is executed.

        Arguments
        ---------
        source : str or Path
            Packed folder, or "user/name" on the hub; the 4-bit model that
            comes with the package if not given.
        device : str
            Of PyTorch.
        **hub
            `revision`, `cache_dir`, `token`, `endpoint` and
            `local_files_only` of `folder.fetch_folder`.

        Returns
        -------
        SpeechEnhancer
        """
        folder = fetch_folder(source, **hub)
        model = load(folder)
        if not isinstance(model, NsNet2 | EarlyExitNsNet2):
            raise ValueError(
                f"{folder} holds a {type(model).__name__}, which suppresses "
                "no noise: name a folder that save_enhancer has written"
            )
        return cls(model, device)

    @property
    def exits(self):
        """Numbers of the exits."""
        return self.model.exits

    @torch.inference_mode()
    def enhance_batch(self, noisy, lengths=None, exit=None):
        """Suppress the noise of a batch.

        Arguments
        ---------
        noisy : torch.Tensor or array
            [batch, samples], 16 kHz.
        lengths : torch.Tensor or None
            [batch], relative to the longest; what is behind them becomes
            silence. The network is causal: the rest does not depend on them.
        exit : int or None
            None: the last one.

        Returns
        -------
        torch.Tensor
            [batch, samples].
        """
        noisy = as_waveforms(noisy).to(self.device)
        exit = self.exits[-1] if exit is None else exit
        enhanced = self.model.enhance(noisy, exit)
        check_finite(enhanced)
        if lengths is not None:
            samples = relative_lengths(lengths, noisy, "lengths")[:, None]
            samples = (samples * noisy.shape[1]).round()
            places = torch.arange(noisy.shape[1], device=self.device)
            enhanced = enhanced * (places < samples)
        return enhanced

    def stream(self, exit=None, macs=None):
        """Suppress the noise of a live signal.

        Arguments
        ---------
        exit : int, "auto" or None
            "auto": for each frame, by `MovingMask`. None: the last one.
        macs : float or None
            Multiplications a frame: of the latest exit within them or, for
            "auto", on average (half the last exit's if not given).

        Returns
        -------
        EnhancerStream
        """
        return EnhancerStream(self.model, exit_rule(self.model, exit, macs))

    @torch.inference_mode()
    def enhance_file(
        self,
        path,
        output_filename=None,
        exit=None,
        macs=None,
        subtype=None,
        progress=False,
    ):
        """Suppress the noise of a recording of any length.

        The file is read in chunks, so that memory does not grow with it, and
        the output is that of the whole file up to rounding. Each channel is
        enhanced on its own. Rates from 8 kHz on are resampled; the output has
        16 kHz. A constant offset is taken off; silence stays silence.

        Arguments
        ---------
        path : str or Path or AudioFile
        output_filename : str or Path or None
            Audio file to write.
        exit, macs
            As of `stream`.
        subtype : str or None
            Sample format of the file; None: the usual one of its kind.
        progress : bool
            Shows a progress bar.

        Returns
        -------
        Path or torch.Tensor
            The file; without one the waveform, [samples] or, of several
            channels, [samples, channels].
        """
        audio = path if isinstance(path, AudioFile) else self.open_audio(path)
        rule = exit_rule(self.model, exit, macs)
        (out,) = output_paths(output_filename, [0.0], audio.source)
        audio.log_warnings()
        if audio.rate != SAMPLE_RATE:
            lacks = audio.rate < SAMPLE_RATE
            logger.warning(
                f"{audio.name}: resampled from {audio.rate} to {SAMPLE_RATE} Hz"
                + f"; nothing is above {audio.rate // 2} Hz" * lacks
            )
        blocks = self._enhanced(audio, rule, progress)
        if out is not None:
            return _write(blocks, out, audio.channels, subtype)
        enhanced = torch.cat(list(blocks))
        return enhanced[:, 0] if audio.channels == 1 else enhanced

    def open_audio(self, path, name=None):
        """Open a recording, checked against what the model needs."""
        return AudioFile(path, name=name, min_samples=1, min_rate=MIN_RATE)

    def _enhanced(self, audio, rule, progress):
        """Blocks [samples, channels]."""
        samples = audio.scan().samples
        streams = [
            EnhancerStream(self.model, copy.deepcopy(rule))
            for _ in range(audio.channels)
        ]
        with tqdm(
            total=round(audio.seconds), unit="s", disable=not progress
        ) as bar:
            done = 0
            for block in audio.blocks(round(CHUNK_SECONDS * audio.rate)):
                block = block.to(self.device)
                parts = [s.feed(part) for s, part in zip(streams, block.T)]
                done += len(block)
                yield torch.stack(parts, 1).cpu()
                bar.n = round(done / samples * bar.total)
                bar.refresh()
            rest = torch.stack([stream.flush() for stream in streams], 1)
            yield rest.cpu()


def save_enhancer(model, folder, metadata=None, **card):
    """Save a noise suppressor as a packed folder.

    Arguments
    ---------
    model : NsNet2 or EarlyExitNsNet2
        Quantized, or in full precision; it is left as it is.
    folder : str or Path
        Made if it is not there.
    metadata : dict or None
        For quantization_config.json; the card shows its "exits" and "noisy".
    **card
        What `card.model_card` takes: `metrics`, `reference`, `base_model`,
        `license`.

    Returns
    -------
    Path
    """
    card = {"task": ENHANCEMENT, **card}
    return save_separator(model, folder, metadata, **card)


def _write(blocks, path, channels, subtype):
    """Blocks [samples, channels] as an audio file."""
    check_subtype(path, subtype)
    clipped = 0

    def limited():
        nonlocal clipped
        for block in blocks:
            block = block.numpy()
            if subtype not in UNLIMITED:
                clipped += int((np.abs(block) > 1).sum())
                block = block.clip(-1, 1)
            yield block

    with atomic_write(path) as part:
        write_blocks(limited(), path, part, subtype, channels)
    if clipped:
        logger.warning(
            f"{path}: {clipped} samples above full scale were clipped: ask "
            "for FLOAT samples to keep them"
        )
    return Path(path)


def _probe(model):
    """What a model makes of a second of noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 63, model.bins, generator=generator)
    return torch.cat(list(model(noise).values()))


_WIDTH = whole(1, 2**14)
_COMMON = {
    "bins": whole(1, BINS),
    "exits": several(whole(0, LAST), 1, LAST + 1),
    "input_mean": number(-1e3, 1e3),
    "input_std": number(1e-3, 1e3),
    "deepest": optional(whole(0, LAST)),
    "thresholds": several(several(number(0, 1e12), 2, 2), 0, 64),
}
register(
    EarlyExitNsNet2,
    {**_COMMON, "side": _WIDTH, "concat": flag},
    card=None,
    probe=_probe,
)
register(
    NsNet2, {**_COMMON, "widths": several(_WIDTH, LAST, LAST)}, probe=_probe
)
