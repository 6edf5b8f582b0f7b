"""Word language models of a prepared text corpus.

To run this recipe, do the following:
> python train.py hparams/lstm.yaml

It prepares the State of the Union addresses if they are not there; give
--skip_prep True and --data_folder for any other prepared corpus.
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.decoders.text_corpus import read_corpus
from speechbrain_mpq.evaluation.word_tasks import Perplexity
from speechbrain_mpq.locks import hold_results
from speechbrain_mpq.training.checkpoints import load_best_


class LM(sb.Brain):
    """Cross-entropy training, sentence by sentence."""

    def compute_forward(self, batch, stage):
        """Log-probabilities of all words of all sentences, [words, vocab]."""
        batch = batch.to(self.device)
        tokens, _ = batch.tokens_bos
        logits = self.modules.model(tokens)
        logits = logits[0] if isinstance(logits, tuple) else logits
        # What is behind a sentence's end is no word of anybody's.
        return logits[tokens != self.hparams.pad_index].log_softmax(-1)

    def compute_objectives(self, log_probs, batch, stage):
        """Mean cross-entropy; perplexity outside training."""
        targets, _ = batch.tokens_eos
        targets = targets[targets != self.hparams.pad_index]
        if stage != sb.Stage.TRAIN:
            self.perplexity.append(log_probs, targets)
        return torch.nn.functional.nll_loss(log_probs, targets)

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate of this step."""
        rate = self.hparams.lr_schedule.calculate_lr(self.optimizer_step)
        self.optimizer.param_groups[0]["lr"] = rate

    def on_stage_start(self, stage, epoch):
        """Count words from zero."""
        if stage != sb.Stage.TRAIN:
            self.perplexity = Perplexity(self.hparams.unk_index)

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, and save a checkpoint after each epoch."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        stats = self.perplexity.summarize()
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
                meta={"PPL": stats["PPL"]}, min_keys=["PPL"]
            )
            return
        self.hparams.train_logger.log_stats(
            stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
            test_stats=stats,
        )


def dataio_prep(hparams):
    """Datasets by name, and the vocabulary."""
    folder = Path(hparams["data_folder"])
    corpus, vocabulary = read_corpus(folder)
    if len(vocabulary) != hparams["vocabulary"]:
        raise ValueError(
            f"{folder} has a vocabulary of {len(vocabulary)}, the hparams one "
            f"of {hparams['vocabulary']}: give --vocabulary {len(vocabulary)}"
        )

    check_lengths(corpus, hparams.get("max_length"))

    @sb.utils.data_pipeline.takes("words")
    @sb.utils.data_pipeline.provides("tokens_bos", "tokens_eos")
    def text_pipeline(words):
        tokens = vocabulary.encode_as_ids(words)
        yield torch.tensor([vocabulary.bos_index, *tokens])
        yield torch.tensor([*tokens, vocabulary.eos_index])

    datasets = {}
    for split, sentences in corpus.items():
        lines = {
            f"{split}_{i:07d}": {"words": line, "length": line.count(" ") + 2}
            for i, line in enumerate(sentences)
        }
        datasets[split] = DynamicItemDataset(
            lines,
            dynamic_items=[text_pipeline],
            output_keys=["id", "tokens_bos", "tokens_eos"],
        )
    # Alike lengths together: little padding.
    datasets["test"] = datasets["test"].filtered_sorted(sort_key="length")
    return datasets, vocabulary


def check_lengths(corpus, most):
    """Refuse sentences that a Transformer has no positions for.

    Arguments
    ---------
    corpus : dict
        Split -> sentences.
    most : int or None
        Words of a sentence and its end; None: any number.
    """
    for split, sentences in corpus.items():
        longest = 1 + max(len(line.split()) for line in sentences)
        if most is not None and longest > most:
            raise ValueError(
                f"{split} has a sentence of {longest - 1} words, and the model "
                f"takes {most - 1} at most: give --max_length {longest}"
            )


def train_loader_options(dataset, hparams):
    """Batches of sentences of about the same length."""
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
    hold_results(hparams["output_folder"])
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    if not hparams["skip_prep"]:
        from sotu_prepare import prepare_sotu

        run_on_main(
            prepare_sotu,
            args=[hparams["data_folder"], hparams["text_folder"]],
            kwargs={"vocabulary": hparams["vocabulary"]},
        )
    data, vocabulary = dataio_prep(hparams)
    if hparams["start_from"]:
        load_best_(
            hparams["modules"]["model"],
            hparams["start_from"],
            "give the same sizes and --vocabulary",
            name="model",
            key="PPL",
        )
    brain = LM(
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
    brain.evaluate(
        data["test"],
        min_key="PPL",
        test_loader_kwargs=hparams["test_loader_options"],
    )
    run_on_main(publish, args=[brain, vocabulary, hparams["output_folder"]])


def publish(brain, vocabulary, folder):
    """Write published/: the packed model and its vocabulary.

    Arguments
    ---------
    brain : LM
        After its test.
    vocabulary : Vocabulary
    folder : str or Path
        Of the results.
    """
    from speechbrain_mpq.inference.language_model import save_language_model

    stats = brain.perplexity.summarize()
    metrics = {
        "average": {"ppl": stats["PPL"], "ppl_known": stats["PPL_known"]},
        "corpus": Path(brain.hparams.data_folder).name,
        "seed": brain.hparams.seed,
    }
    save_language_model(
        brain.modules.model,
        Path(folder, "published"),
        vocabulary,
        {"test": stats},
        metrics=metrics,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
