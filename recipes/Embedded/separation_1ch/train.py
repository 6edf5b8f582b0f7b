"""Single-channel separation of two talkers of the embedded corpus.

To run this recipe, do the following:
> python train.py hparams/conv_tasnet.yaml
> python train.py hparams/sepformer.yaml

Two utterances of different speakers are mixed while they are needed: other
pairs in every epoch of training, the same ones in validation and test.
"""

import sys
import zlib

import numpy as np
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.locks import hold_results


class Separation(sb.Brain):
    """Training on the waveform, in the best order of the talkers."""

    def compute_forward(self, batch, stage):
        """Estimated sources, [batch, time, talkers]."""
        batch = batch.to(self.device)
        mixture = batch.mixture.data
        encoded = self.hparams.Encoder(mixture)
        masks = self.hparams.MaskNet(encoded)  # [talkers, batch, N, frames]
        estimates = torch.stack(
            [self.hparams.Decoder(encoded * mask) for mask in masks], dim=-1
        )
        missing = mixture.shape[1] - estimates.shape[1]
        # Negative padding cuts what the last frame has too much.
        return torch.nn.functional.pad(estimates, (0, 0, 0, missing))

    def compute_objectives(self, predictions, batch, stage):
        """Negative SI-SNR."""
        return self.hparams.loss(batch.sources.data, predictions).mean()

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, anneal the learning rate, save a checkpoint."""
        stats = {"si-snr": float(stage_loss)}
        if stage == sb.Stage.TRAIN:
            self.train_stats = stats
        elif stage == sb.Stage.VALID:
            old_lr, new_lr = self.hparams.lr_scheduler(
                [self.optimizer], epoch, stage_loss
            )
            sb.nnet.schedulers.update_learning_rate(self.optimizer, new_lr)
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch": epoch, "lr": old_lr},
                train_stats=self.train_stats,
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(
                meta=stats, min_keys=["si-snr"]
            )
        else:
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )


class Mixer:
    """Puts another talker over an utterance.

    Arguments
    ---------
    entries : dict
        All utterances of a split.
    training : bool
        Whether to draw other pairs in every epoch.
    hparams : dict
        seed, epoch_counter, seconds, level_difference and sample_rate.
    """

    def __init__(self, entries, training, hparams):
        if len({entry["speaker"] for entry in entries.values()}) < 2:
            raise ValueError(
                "mixtures need two speakers in every split: ask for more "
                "utterances"
            )
        self.entries = entries
        self.names = sorted(entries)
        self.training = training
        self.hparams = hparams
        self.samples = int(hparams["seconds"] * hparams["sample_rate"])

    def __call__(self, name):
        """Both sources of a mixture.

        Arguments
        ---------
        name : str
            Name of the first utterance.

        Returns
        -------
        torch.Tensor
            [samples, 2].
        """
        epoch = self.hparams["epoch_counter"].current if self.training else 0
        rng = np.random.default_rng(
            [self.hparams["seed"], epoch, zlib.crc32(name.encode())]
        )
        first, second = (
            self._cut(n, rng) for n in (name, self._other(name, rng))
        )
        widest = self.hparams["level_difference"]
        gain = 10 ** (rng.uniform(-widest, widest) / 20)
        return torch.stack([first, gain * second], dim=-1)

    def _other(self, name, rng):
        """An utterance of another speaker."""
        own = self.entries[name]["speaker"]
        others = [n for n in self.names if self.entries[n]["speaker"] != own]
        return others[rng.integers(len(others))]

    def _cut(self, name, rng):
        """A stretch of an utterance, with silence where it is too short."""
        speech = sb.dataio.dataio.read_audio(self.entries[name]["wav"])
        start = rng.integers(max(len(speech) - self.samples, 0) + 1)
        stretch = speech[start : start + self.samples]
        missing = self.samples - len(stretch)
        return torch.nn.functional.pad(stretch, (0, missing))


def dataio_prep(hparams):
    """Datasets by name: train, valid, test."""

    def dataset(split):
        data = DynamicItemDataset.from_json(
            hparams[f"{split}_annotation"],
            replacements={"data_root": hparams["data_folder"]},
        )
        mixer = Mixer(data.data, split == "train", hparams)

        @sb.utils.data_pipeline.takes("id")
        @sb.utils.data_pipeline.provides("sources", "mixture")
        def mix_pipeline(name):
            sources = mixer(name)
            yield sources
            yield sources.sum(-1)

        data.add_dynamic_item(mix_pipeline)
        data.set_output_keys(["id", "mixture", "sources"])
        return data

    return {split: dataset(split) for split in ("train", "valid", "test")}


def main(arguments):
    """Prepare, train and test."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    sb.utils.distributed.ddp_init_group(run_opts)
    hold_results(hparams["output_folder"])
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    if not hparams["skip_prep"]:
        from speechbrain_mpq.simulation.corpus import prepare_speech

        run_on_main(
            prepare_speech,
            args=[hparams["data_folder"]],
            kwargs=hparams["utterances"],
        )
    data = dataio_prep(hparams)
    brain = Separation(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.fit(
        hparams["epoch_counter"],
        data["train"],
        data["valid"],
        train_loader_kwargs={**hparams["dataloader_opts"], "shuffle": True},
        valid_loader_kwargs=hparams["dataloader_opts"],
    )
    brain.evaluate(
        data["test"],
        min_key="si-snr",
        test_loader_kwargs=hparams["dataloader_opts"],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
