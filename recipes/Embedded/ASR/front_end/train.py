"""CTC recognition of one talker in a mixture, the separator as front end.

To run this recipe, from the root of the repository:
> python recipes/Embedded/ASR/front_end/train.py \
>     recipes/Embedded/ASR/front_end/hparams/train.yaml

Microphones and the talker's direction go in, words come out. Separator and
recognizer begin at trained weights and go on together (joint); the front end
can be frozen (--freeze_front_end True), or nothing trained at all
(--number_of_epochs 0). Any SpeechBrain recipe takes the front end like this:
one key in its YAML, one line in front of its features.
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.data_pipeline import provides, takes
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.evaluation.runs import summarise
from speechbrain_mpq.evaluation.signal_quality import si_snr
from speechbrain_mpq.locks import hold_results
from speechbrain_mpq.simulation.mixtures import (
    MixtureMaker,
    fixed_mixtures,
    load_speech,
)
from speechbrain_mpq.simulation.rooms import RoomBank, prepare_rooms
from speechbrain_mpq.utils import write_json


class ASR(sb.Brain):
    """CTC training behind a separator; `maker` draws training mixtures."""

    maker = None

    def compute_forward(self, batch, stage):
        """Log-probabilities of the characters, lengths, separated speech."""
        batch = batch.to(self.device)
        mixtures, lengths = batch.mixture
        doa = batch.doa.data[:, 0]
        speech = self.modules.front_end(mixtures, doa, lengths)
        model = self.hparams.model
        feats = model["compute_features"](speech)
        feats = self.modules.normalize(feats, lengths)
        if stage == sb.Stage.TRAIN:
            feats = self.hparams.augment(feats)
        for layer in self.modules.asr:
            feats = layer(feats)
        return model["log_softmax"](feats.float()), lengths, speech

    def compute_objectives(self, predictions, batch, stage):
        """CTC loss, and its share of negative SI-SNR (both trained jointly)."""
        log_probs, lengths, speech = predictions
        chars, char_lengths = batch.chars_encoded
        if stage != sb.Stage.TRAIN:
            self._note_words(predictions, batch)
        loss = self.hparams.loss(log_probs, chars, lengths, char_lengths)
        if stage != sb.Stage.TRAIN or not self.hparams.si_snr_weight:
            return loss
        quality = si_snr(speech, batch.target.data).mean()  # dB
        return loss - self.hparams.si_snr_weight * quality

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate of this step."""
        schedule = self.hparams.lr_schedule
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.calculate_lr(self.optimizer_step)

    def on_stage_start(self, stage, epoch=None):
        """Draw new mixtures in every epoch; score from zero."""
        if stage == sb.Stage.TRAIN:
            self.maker.epoch = epoch
        self.items = []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log, and save a checkpoint after each epoch."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        average = summarise(self.items)["average"]
        stats = {"loss": stage_loss}
        stats |= {key: average[key] for key in ("wer", "si_snr")}
        if stage == sb.Stage.TEST:
            self.hparams.train_logger.log_stats({}, test_stats=stats)
            return
        self.hparams.train_logger.log_stats(
            {"epoch": epoch}, {"loss": self.train_loss}, stats
        )
        self.checkpointer.save_and_keep_only(
            meta={"loss": float(stage_loss)}, min_keys=["loss"]
        )

    def _note_words(self, predictions, batch):
        """What `summarise` needs to know of every item of a batch."""
        log_probs, lengths, speech = predictions
        model = self.hparams.model
        sequences = model["decoding_function"](log_probs, lengths)
        hypotheses = model["tokenizer"].decode_ndim(sequences)
        references = batch.mixture.data[..., 0]
        for index, key in enumerate(batch.id):
            samples = round(float(lengths[index]) * speech.shape[1])
            target = batch.target.data[index, :samples]
            estimate, mixture = speech[index], references[index]
            item = {
                "id": key,
                "angle": float(batch.angle[index]),
                "si_snr": si_snr(estimate[:samples], target).item(),
                "si_snr_mixture": si_snr(mixture[:samples], target).item(),
                "pesq": None,
                "reference": batch.words[index],
                "hypothesis": "".join(hypotheses[index]).strip(),
            }
            self.items.append(item)


def mixture_pipelines(maker, tokenizer):
    """What makes a mixture out of an utterance's name.

    Arguments
    ---------
    maker : MixtureMaker
    tokenizer : CTCTextEncoder

    Returns
    -------
    draw, render : callable
        Dynamic items: "drawn" of "id", and the signals and words of "drawn".
    """

    @takes("id")
    @provides("drawn")
    def draw(key):
        return {**maker.draw(key), "words": maker.speech[key]["words"]}

    @takes("drawn")
    @provides("mixture", "target", "doa", "angle", "words", "chars_encoded")
    def render(drawn):
        signals = maker.render(drawn)
        yield torch.from_numpy(signals["mixture"])  # [samples, mics]
        yield torch.from_numpy(signals["target"])
        yield torch.tensor([drawn["doa_given"]])
        yield drawn["angle"]
        yield drawn["words"]
        yield tokenizer.encode_sequence_torch(list(drawn["words"]))

    return draw, render


def dataio_prep(hparams):
    """Datasets by name: train, valid, test; and the maker of the first."""
    folder, tokenizer = hparams["data_folder"], hparams["model"]["tokenizer"]
    keys = ["id", "mixture", "target", "doa", "angle", "words"]
    data, makers = {}, {}
    for split, count in hparams["mixtures"].items():
        training = split == "train"
        maker = makers[split] = MixtureMaker(
            load_speech(Path(folder) / f"{split}_speech.json", folder),
            RoomBank(folder, split, hparams["rooms"][split]),
            seed=hparams["seed" if training else "corpus_seed"],
            mirror=training,
        )
        draw, render = mixture_pipelines(maker, tokenizer)
        if training:  # drawn anew in every epoch
            mixtures = {key: {} for key in sorted(maker.speech)[:count]}
        else:
            fixed = fixed_mixtures(maker, count)
            mixtures = {key: {"drawn": drawn} for key, drawn in fixed.items()}
        data[split] = DynamicItemDataset(
            mixtures,
            [draw, render] if training else [render],
            [*keys, "chars_encoded"],
        )
    return data, makers["train"]


def prepare_data(hparams):
    """Speak the corpus and simulate the rooms, or what is missing of them."""
    from speechbrain_mpq.simulation.corpus import prepare_speech

    folder, seed = hparams["data_folder"], hparams["corpus_seed"]
    microphones = hparams["front_end"].microphones
    prepare_speech(folder, **hparams["utterances"], seed=seed)
    prepare_rooms(folder, hparams["rooms"], microphones, seed)


def write_results(brain, hparams):
    """Write metrics.json and, where quantized, the packed model.

    Arguments
    ---------
    brain : ASR
        Just evaluated.
    hparams : dict
        quantizer, if it is there, and output_folder are used.
    """
    folder = Path(hparams["output_folder"])
    metrics = {**summarise(brain.items), "items": brain.items}
    if "quantizer" in hparams:
        packed = hparams["quantizer"].pack(folder / "packed")
        metrics["average_bits"] = hparams["quantizer"].plan.average_bits
        metrics["model_bytes"] = packed.stat().st_size
    write_json(folder / "metrics.json", metrics)


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
        run_on_main(prepare_data, args=[hparams])
    run_on_main(hparams["pretrainer"].collect_files)
    hparams["pretrainer"].load_collected()
    data, maker = dataio_prep(hparams)
    brain = ASR(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.maker = maker
    if "choose_bits" in hparams:
        hparams["choose_bits"](brain, data["valid"])
    brain.fit(
        hparams["epoch_counter"],
        data["train"],
        data["valid"],
        train_loader_kwargs=hparams["train_loader_options"],
        valid_loader_kwargs=hparams["test_loader_options"],
    )
    brain.evaluate(
        data["test"],
        min_key="loss",
        test_loader_kwargs=hparams["test_loader_options"],
    )
    run_on_main(write_results, args=[brain, hparams])


if __name__ == "__main__":
    main(sys.argv[1:])
