"""CTC speech recognition of the embedded corpus, clean and reverberant.

To run this recipe, do the following:
> python train.py hparams/train.yaml

It speaks the corpus and simulates the rooms if they are not there, trains
with characters and greedy decoding, and writes a folder that
speechbrain.inference.ASR.EncoderASR loads.
"""

import shutil
import string
import sys
import zlib
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from scipy.signal import oaconvolve
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.locks import hold_results


class ASR(sb.Brain):
    """CTC training."""

    def compute_forward(self, batch, stage):
        """Log-probabilities of the characters, [batch, frames, neurons]."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        model = self.hparams.model
        feats = model["compute_features"](wavs)
        feats = self.modules.normalize(feats, wav_lens)
        if stage == sb.Stage.TRAIN:
            feats = self.hparams.augment(feats)
        for layer in self.modules.asr:
            feats = layer(feats)
        return model["log_softmax"](feats.float()), wav_lens

    def compute_objectives(self, predictions, batch, stage):
        """CTC loss; word errors outside training."""
        log_probs, wav_lens = predictions
        chars, char_lens = batch.chars_encoded
        if stage != sb.Stage.TRAIN:
            model = self.hparams.model
            self.wer_stats.append(
                ids=batch.id,
                predict=model["decoding_function"](log_probs, wav_lens),
                target=chars,
                target_len=char_lens,
                ind2lab=model["tokenizer"].decode_ndim,
            )
        return self.hparams.loss(log_probs, chars, wav_lens, char_lens)

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate of this step."""
        schedule = self.hparams.lr_schedule
        self.optimizer.param_groups[0]["lr"] = schedule.calculate_lr(
            self.optimizer_step
        )

    def on_stage_start(self, stage, epoch):
        """Count word errors from zero."""
        if stage != sb.Stage.TRAIN:
            self.wer_stats = self.hparams.wer_stats()

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, and save a checkpoint after each epoch."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        wer = float(self.wer_stats.summarize("WER"))
        stats = {"loss": stage_loss, "WER": wer}
        if stage == sb.Stage.VALID:
            self.hparams.train_logger.log_stats(
                stats_meta={
                    "epoch": epoch,
                    "lr": self.optimizer.param_groups[0]["lr"],
                },
                train_stats={"loss": self.train_loss},
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(
                meta={"WER": wer}, min_keys=["WER"]
            )
        else:
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )


class RoomAugment:
    """Puts speech into the rooms of a split.

    Arguments
    ---------
    bank : RoomBank
        The rooms; only the first microphone is heard.
    training : bool
        Whether to add noise and silence, other ones in every epoch.
    hparams : dict
        reverberant_share, padded_share, padding and noise_snr.
    """

    def __init__(self, bank, training, hparams):
        self.rirs = bank.first_microphone()
        self.training = training
        self.hparams = hparams

    def __call__(self, speech, key, reverberant):
        """Speech as heard; the same key is in the same room.

        Arguments
        ---------
        speech : numpy.ndarray
            [samples].
        key : str
            Name of the utterance.
        reverberant : bool or None
            None draws it.

        Returns
        -------
        heard : numpy.ndarray
            [samples], longer where silence has been added.
        """
        epoch = self.hparams["epoch_counter"].current if self.training else 0
        rng = np.random.default_rng(
            [self.hparams["seed"], epoch, zlib.crc32(key.encode())]
        )
        if reverberant is None:
            reverberant = rng.random() < self.hparams["reverberant_share"]
        if not reverberant:
            return speech
        rir = self.rirs[rng.integers(len(self.rirs))]
        if not self.training:
            return oaconvolve(speech, rir)[: len(speech)]
        before, after = self._padding(rng)
        speech = np.pad(speech, (before, after))
        in_room = oaconvolve(speech, rir)[: len(speech)]
        low, high = self.hparams["noise_snr"]
        level = np.std(in_room) * 10 ** (-rng.uniform(low, high) / 20)
        return in_room + level * rng.standard_normal(len(in_room))

    def _padding(self, rng):
        """Samples of silence before and after."""
        if rng.random() >= self.hparams["padded_share"]:
            return 0, 0
        longest = self.hparams["padding"] * 16000
        return rng.integers(0, longest, 2)


def dataio_prep(hparams):
    """Datasets by name: train, valid, test_clean, test_reverberant."""
    from speechbrain_mpq.simulation.rooms import RoomBank

    tokenizer = hparams["model"]["tokenizer"]
    tokenizer.insert_blank(index=hparams["model"]["blank_index"])
    tokenizer.update_from_iterable(" " + string.ascii_lowercase)

    @sb.utils.data_pipeline.takes("words")
    @sb.utils.data_pipeline.provides("chars_encoded")
    def text_pipeline(words):
        return tokenizer.encode_sequence_torch(list(words))

    def dataset(split, reverberant):
        bank = RoomBank(hparams["data_folder"], split, hparams["rooms"][split])
        surroundings = RoomAugment(bank, split == "train", hparams)

        @sb.utils.data_pipeline.takes("id", "wav")
        @sb.utils.data_pipeline.provides("sig")
        def audio_pipeline(key, wav):
            speech = sb.dataio.dataio.read_audio(wav).numpy()
            augmented = surroundings(speech, key, reverberant)
            return torch.from_numpy(augmented.astype(np.float32))

        return DynamicItemDataset.from_json(
            Path(hparams["data_folder"]) / f"{split}_speech.json",
            replacements={"data_root": hparams["data_folder"]},
            dynamic_items=[audio_pipeline, text_pipeline],
            output_keys=["id", "sig", "chars_encoded"],
        )

    return {
        "train": dataset("train", None),
        "valid": dataset("valid", None),
        "test_clean": dataset("test", False),
        "test_reverberant": dataset("test", True),
    }


def train_loader_options(dataset, hparams):
    """Batches of utterances of about the same length."""
    sampler = DynamicBatchSampler(
        dataset,
        length_func=lambda entry: entry["length"],
        **hparams["dynamic_batch_sampler"],
    )
    return {"batch_sampler": sampler, **hparams["train_loader_options"]}


def publish(hparams, checkpoint):
    """Write the folder that EncoderASR loads.

    Arguments
    ---------
    hparams : dict
        published_folder and inference_file are used.
    checkpoint : Checkpoint
        What to publish.
    """
    folder = Path(hparams["published_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("asr", "tokenizer"):
        shutil.copy(checkpoint.paramfiles[name], folder / f"{name}.ckpt")
    source = Path(__file__).parent / hparams["inference_file"]
    shutil.copy(source, folder / "hyperparams.yaml")


def main(arguments):
    """Prepare, train, test and publish."""
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
        from speechbrain_mpq.simulation.rooms import prepare_rooms

        run_on_main(
            prepare_speech,
            args=[hparams["data_folder"]],
            kwargs=hparams["utterances"],
        )
        run_on_main(
            prepare_rooms,
            args=[
                hparams["data_folder"],
                hparams["rooms"],
                hparams["microphones"],
            ],
        )
    data = dataio_prep(hparams)
    brain = ASR(
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
        train_loader_kwargs=train_loader_options(data["train"], hparams),
        valid_loader_kwargs=hparams["test_loader_options"],
    )
    for name in ("test_clean", "test_reverberant"):
        brain.evaluate(
            data[name],
            min_key="WER",
            test_loader_kwargs=hparams["test_loader_options"],
        )
    best = brain.checkpointer.find_checkpoint(min_key="WER")
    run_on_main(publish, args=[hparams, best])


if __name__ == "__main__":
    main(sys.argv[1:])
