"""Lip reading in small: what the voice does, from the mouth alone.

To run this recipe, do the following:
> python train.py hparams/train.yaml

The lip stream of the audio-visual separator learns to foresee the voice's
energy in some bands of frequency: no rooms, no mixtures, a few minutes. It is
then put beside the weights of the audio-only separator, in a packed folder
that hparams/pretrain_av.yaml starts from.
"""

import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.inference.folder import write_card, write_hyperparams
from speechbrain_mpq.inference.registry import describe
from speechbrain_mpq.lobes.models.audio_visual import begin_with_audio_
from speechbrain_mpq.lobes.models.lips import PERIOD
from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.locks import hold_results
from speechbrain_mpq.quantization.packing import load_packed_, save_packed
from speechbrain_mpq.simulation.lip_videos import (
    TRAINING,
    Corruption,
    LipVideos,
)
from speechbrain_mpq.simulation.mixtures import load_speech

WINDOW = 1024  # samples, around the time of each picture
LOWEST, HIGHEST = 60.0, 4700.0  # Hz


def band_energies(waveforms, bands):
    """Log energies of frequency bands at the times of the pictures.

    Arguments
    ---------
    waveforms : torch.Tensor
        [batch, samples], pictures * 640 of them.
    bands : int
        Wider ones at higher frequencies.

    Returns
    -------
    energies : torch.Tensor
        [batch, bands, pictures]; each band has zero mean over the clip, and
        all together have unit deviation.
    """
    window = torch.hann_window(WINDOW)
    spectra = torch.stft(
        waveforms,
        WINDOW,
        PERIOD,
        window=window,
        pad_mode="constant",
        return_complex=True,
    )
    power = spectra.abs().square()[..., : waveforms.shape[1] // PERIOD]
    shares = torch.linspace(0, 1, bands + 1).square()
    edges = (LOWEST + (HIGHEST - LOWEST) * shares) * WINDOW / 16000
    edges = edges.round().int().tolist()
    rows = [
        power[:, low : max(high, low + 1)].mean(1)
        for low, high in zip(edges, edges[1:])
    ]
    energies = torch.stack(rows, 1).clamp_min(1e-8).log10()
    energies = energies - energies.mean(2, keepdim=True)
    deviation = energies.square().mean((1, 2), keepdim=True).sqrt()
    return energies / (deviation + 0.1)


class LipReading(sb.Brain):
    """Foresees band energies."""

    def compute_forward(self, batch, stage):
        """Band energies [batch, bands, pictures]."""
        lips = batch.lips.data.to(self.device).float() / 255
        return self.modules.head(self.modules.visual(lips))

    def compute_objectives(self, predictions, batch, stage):
        """Mean squared error; 1 is what knowing nothing has, about."""
        energies = batch.energies.data.to(self.device)
        return torch.nn.functional.mse_loss(predictions, energies)

    def on_stage_start(self, stage, epoch=None):
        """Draw other pictures in every epoch."""
        if stage == sb.Stage.TRAIN:
            self.hparams.clock.epoch = epoch

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Schedule the learning rate by steps."""
        if should_step:
            self.hparams.lr_schedule(self.optimizer, self.optimizer_step)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log and keep the best."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
        elif stage == sb.Stage.VALID:
            self.hparams.train_logger.log_stats(
                {"epoch": epoch},
                {"loss": self.train_loss},
                {"loss": stage_loss},
            )
            self.checkpointer.save_and_keep_only(
                {"loss": float(stage_loss)}, min_keys=["loss"]
            )


def dataset(hparams, split, clock):
    """Clips of a split: "lips" and "energies"."""
    speech = load_speech(
        Path(hparams["data_folder"]) / f"{split}_speech.json",
        hparams["data_folder"],
    )
    maker = SimpleNamespace(speech=speech, seed=hparams["seed"], epoch=0)
    pictures = round(hparams["seconds"] * 25)
    faults = TRAINING if split == "train" else Corruption()
    videos = LipVideos(maker, hparams["separator"].lips_size, faults)

    @sb.utils.data_pipeline.takes("id")
    @sb.utils.data_pipeline.provides("lips", "energies")
    def clip(key):
        maker.epoch = clock.epoch if split == "train" else 0
        waveform, _ = soundfile.read(speech[key]["wav"], dtype="float32")
        samples = pictures * PERIOD
        rng = np.random.default_rng([maker.epoch, zlib.crc32(key.encode())])
        start = int(rng.integers(max(1, len(waveform) - samples)))
        signal = np.zeros(samples, np.float32)
        cut = waveform[start : start + samples]
        signal[: len(cut)] = cut
        yield torch.from_numpy(videos.utterance(key, start, pictures))
        signal = torch.from_numpy(signal)[None]
        yield band_energies(signal, hparams["bands"])[0]

    data = {key: {} for key in sorted(speech)}
    return DynamicItemDataset(data, [clip], ["id", "lips", "energies"])


def pack(hparams):
    """Audio-only weights and the lip stream in one packed folder."""
    separator, folder = hparams["separator"], Path(hparams["packed_folder"])
    audio = build_separator(Path(hparams["audio_only"]) / "hyperparams.yaml")
    fold_norms_(audio)
    load_packed_(audio, hparams["audio_only"])
    begin_with_audio_(separator.mask_net, audio.mask_net)
    fold_norms_(separator)
    architecture = describe(separator)
    save_packed(separator, folder, {"system": "lips"}, architecture)
    write_hyperparams(folder, architecture)
    write_card(folder)


def main(arguments):
    """Prepare, train and pack."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    sb.utils.distributed.ddp_init_group(run_opts)
    hold_results(hparams["output_folder"])
    sb.create_experiment_directory(
        hparams["output_folder"], hparams_file, overrides
    )
    if not hparams["skip_prep"]:
        from speechbrain_mpq.simulation.corpus import prepare_speech

        run_on_main(
            prepare_speech,
            args=[hparams["data_folder"]],
            kwargs=hparams["utterances"],
        )
    separator = build_separator(hparams["separator_file"])
    hparams["separator"], hparams["clock"] = separator, SimpleNamespace(epoch=0)
    visual = separator.mask_net.visual
    head = torch.nn.Conv1d(visual.channels, hparams["bands"], 1)
    brain = LipReading(
        modules={"visual": visual, "head": head},
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.checkpointer.add_recoverables({"visual": visual, "head": head})
    brain.fit(
        hparams["epoch_counter"],
        dataset(hparams, "train", hparams["clock"]),
        dataset(hparams, "valid", hparams["clock"]),
        train_loader_kwargs=hparams["train_loader"],
        valid_loader_kwargs=hparams["valid_loader"],
    )
    brain.checkpointer.recover_if_possible(min_key="loss")
    run_on_main(pack, args=[hparams])


if __name__ == "__main__":
    main(sys.argv[1:])
