"""TDNN-F speech recognition of the embedded corpus by LF-MMI.

To run this recipe, do the following:
> python train.py hparams/train.yaml

It speaks the corpus if it is not there, estimates the phone and word n-grams
from the training transcripts, trains from scratch (no alignments), and
searches the words exactly.
"""

import sys
from pathlib import Path

import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.decoders.chain_graphs import (
    denominator_graph,
    estimate_ngram,
    numerator_graph,
    phone_lattice,
)
from speechbrain_mpq.decoders.lexicon import Lexicon
from speechbrain_mpq.decoders.viterbi import best_path, word_graph


class ASR(sb.Brain):
    """LF-MMI training."""

    def compute_forward(self, batch, stage):
        """Raw outputs of the two heads, [batch, frames / 3, outputs]."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        feats = self.hparams.compute_features(wavs)
        feats = self.modules.normalize(feats, wav_lens)
        if stage == sb.Stage.TRAIN:
            feats = self.hparams.augment(feats)
        return self.modules.model(feats, wav_lens, heads=True), wav_lens

    def compute_objectives(self, predictions, batch, stage):
        """LF-MMI; word errors outside training."""
        (outputs, xent), wav_lens = predictions
        if stage == sb.Stage.TRAIN:
            return self.lf_mmi(outputs, batch.numerator, wav_lens, xent)
        frames = (wav_lens * outputs.shape[1]).round().long().tolist()
        self.wer_stats.append(
            ids=batch.id,
            predict=[
                self.words(row[:length])
                for row, length in zip(outputs.float().cpu().numpy(), frames)
            ],
            target=[words.split() for words in batch.words],
        )
        return self.lf_mmi(outputs, batch.numerator, wav_lens)

    def words(self, outputs):
        """Words of an utterance, [frames, outputs]."""
        graph, labels = self.word_graph
        states, _ = best_path(graph, self.hparams.acoustic_scale * outputs)
        labels = [labels[state] for state in states]
        return [self.vocabulary[i] for i in labels if i is not None]

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate and dropout of this step."""
        rate = self.hparams.lr_schedule.calculate_lr(self.optimizer_step)
        self.optimizer.param_groups[0]["lr"] = rate
        progress = self.optimizer_step / self.hparams.training_steps
        dropout = self.hparams.dropout(min(progress, 1.0))
        self.modules.model.set_dropout(dropout)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Keep the bottlenecks semi-orthogonal."""
        if should_step:
            self.modules.model.constrain()

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
                    "left out": len(self.lf_mmi.left_out),
                },
                train_stats={"loss": self.train_loss},
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(
                meta={"WER": wer}, min_keys=["WER"]
            )
            return
        self.hparams.train_logger.log_stats(
            stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
            test_stats=stats,
        )
        with open(self.hparams.wer_file, "w", encoding="utf-8") as fout:
            self.wer_stats.write_stats(fout)


class Graphs:
    """Graphs of the task, from the lexicon and the training transcripts.

    Arguments
    ---------
    lexicon : Lexicon
        Pronunciations of all words.
    transcripts : dict
        Utterance -> words, of the training set.
    hparams : dict
        phone_order, between_silence, edge_silence and lm_scale.
    """

    def __init__(self, lexicon, transcripts, hparams):
        self.lexicon = lexicon
        self.hparams = hparams
        self.phone_ngram = estimate_ngram(
            [self.lattice(words, key) for key, words in transcripts.items()],
            len(lexicon.phones),
            hparams["phone_order"],
        )
        self.vocabulary = sorted(lexicon.pronunciations)
        numbers = {word: i for i, word in enumerate(self.vocabulary)}
        sentences = [
            phone_lattice([[[numbers[word]]] for word in words.split()])
            for words in transcripts.values()
        ]
        self.word_graph = word_graph(
            lexicon,
            self.vocabulary,
            estimate_ngram(sentences, len(self.vocabulary)),
            hparams["lm_scale"],
        )

    def lattice(self, words, key):
        """Pronunciations of a transcript."""
        return phone_lattice(
            self.lexicon.encode(words.split(), key),
            self.lexicon.silence,
            self.hparams["between_silence"],
            self.hparams["edge_silence"],
            key,
        )

    def numerator(self, words, key):
        """Graph of a transcript."""
        return numerator_graph(self.lattice(words, key), self.phone_ngram, key)


def dataio_prep(hparams):
    """Datasets by name, and the graphs."""

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return sb.dataio.dataio.read_audio(wav)

    datasets = {
        split: DynamicItemDataset.from_json(
            Path(hparams["data_folder"]) / f"{split}_speech.json",
            replacements={"data_root": hparams["data_folder"]},
            dynamic_items=[audio_pipeline],
        )
        for split in ("train", "valid", "test")
    }
    path = Path(__file__).parent / hparams["lexicon_file"]
    entries = datasets["train"].data
    graphs = Graphs(
        Lexicon.read(path),
        {key: entry["words"] for key, entry in entries.items()},
        hparams,
    )

    @sb.utils.data_pipeline.takes("words", "id")
    @sb.utils.data_pipeline.provides("numerator")
    def numerator_pipeline(words, key):
        return graphs.numerator(words, key)

    for dataset in datasets.values():
        dataset.add_dynamic_item(numerator_pipeline)
        dataset.set_output_keys(["id", "sig", "words", "numerator"])
    return datasets, graphs


def train_loader_options(dataset, hparams):
    """Batches of utterances of about the same length."""
    sampler = DynamicBatchSampler(
        dataset,
        length_func=lambda entry: entry["length"],
        **hparams["dynamic_batch_sampler"],
    )
    return {"batch_sampler": sampler, **hparams["train_loader_options"]}


def main(arguments):
    """Prepare, train and test."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    sb.utils.distributed.ddp_init_group(run_opts)
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
    data, graphs = dataio_prep(hparams)
    brain = ASR(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    denominator = denominator_graph(graphs.phone_ngram)
    brain.lf_mmi = hparams["loss"](denominator).to(brain.device)
    brain.word_graph = graphs.word_graph
    brain.vocabulary = graphs.vocabulary
    brain.fit(
        hparams["epoch_counter"],
        data["train"],
        data["valid"],
        train_loader_kwargs=train_loader_options(data["train"], hparams),
        valid_loader_kwargs=hparams["test_loader_options"],
    )
    brain.evaluate(
        data["test"],
        min_key="WER",
        test_loader_kwargs=hparams["test_loader_options"],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
