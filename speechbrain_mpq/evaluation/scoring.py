"""Score separated speech: SI-SNR, PESQ and the words of a recognizer."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from ..utils import SAMPLE_RATE
from .pesq import pesq_many
from .si_snr import si_snr


class Recognizer:
    """Turn waveforms into words by a SpeechBrain CTC model.

    Arguments
    ---------
    source : str
        Folder or hub name that `EncoderASR.from_hparams` loads.
    device : str or torch.device

    Example
    -------
    >>> recognize = Recognizer("pretrained/asr_mini")  # doctest: +SKIP
    >>> recognize(waveform)  # doctest: +SKIP
    'place the green boxes behind q one please'
    """

    def __init__(self, source, device="cpu"):
        from speechbrain.inference.ASR import EncoderASR

        self.device = device
        self.model = EncoderASR.from_hparams(
            source=str(source), run_opts={"device": str(device)}
        )

    def __call__(self, waveform):
        """Words of one waveform, [samples]."""
        batch = torch.as_tensor(waveform, device=self.device)[None]
        with torch.no_grad():
            words, _ = self.model.transcribe_batch(batch, torch.ones(1))
        return words[0].strip().lower()


@dataclass
class Scored:
    """Scores of a test set, with examples and speed.

    Arguments
    ---------
    items : list of dict
        One for each mixture, see `metrics.summarise`.
    examples : list of dict
        Waveforms of some of them, see `report.write_report`.
    seconds_per_hour : float
        Seconds of computing for an hour of mixtures, features included.
    """

    items: list = field(default_factory=list)
    examples: list = field(default_factory=list)
    seconds_per_hour: float = 0.0


def score_separation(
    separate, dataset, recognize, workers=2, keep=4, progress=None
):
    """Separate and score every mixture of a test set.

    Arguments
    ---------
    separate : callable
        Maps waveforms [1, samples, mics], DOA [1, 1] and, where the test set
        has them, lips [1, 1, pictures, height, width] to [1, 1, samples].
    """
    scored, pairs = Scored(), []
    seconds = audio = 0.0
    hidden = None if progress is None else not progress
    for item in tqdm(dataset, desc="test", unit="mix", disable=hidden):
        start = time.perf_counter()
        with torch.no_grad():
            estimate = separate(*_given(item))
        estimate = estimate[0, 0].cpu()
        seconds += time.perf_counter() - start
        audio += len(estimate) / SAMPLE_RATE
        signals = {
            "mixture": item["mixture"][:, 0],
            "target": item["targets"][:, 0],
            "estimate": estimate,
        }
        pairs.append((estimate.numpy(), signals["target"].numpy()))
        scored.items.append(_item(item, signals, recognize))
        if len(scored.examples) < keep:
            scored.examples.append(_example(item, signals))
    pesq = pesq_many(pairs, SAMPLE_RATE, workers, skip_undefined=True)
    for result, value in zip(scored.items, pesq):
        result["pesq"] = value
    scored.seconds_per_hour = 3600 * seconds / audio
    return scored


def _given(item):
    """What the separator takes, as a batch of one."""
    names = [n for n in ("mixture", "doa", "lips") if n in item]
    return [item[name][None] for name in names]


def _item(item, signals, recognize):
    """Scores of one mixture, PESQ left open."""
    drawn, target = item["drawn"], signals["target"]
    return {
        "id": item["id"],
        "angle": drawn["angle"],
        "si_snr": si_snr(signals["estimate"], target).item(),
        "si_snr_mixture": si_snr(signals["mixture"], target).item(),
        "pesq": None,
        "reference": drawn["words"],
        "hypothesis": recognize(signals["estimate"]),
        "hypothesis_mixture": recognize(signals["mixture"]),
        "hypothesis_target": recognize(target),
    }


def _example(item, signals):
    """Waveforms and directions of one mixture."""
    drawn = item["drawn"]
    return {
        "id": item["id"],
        "doa_target": drawn["doa"],
        "doa_interferer": drawn["doa_interferer"],
        "angle": drawn["angle"],
        "reference": drawn["words"],
        "sample_rate": SAMPLE_RATE,
        "signals": {
            name: np.ascontiguousarray(signal, dtype=np.float32)
            for name, signal in signals.items()
        },
    }
