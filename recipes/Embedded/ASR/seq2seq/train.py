"""Attention-based speech recognition of the embedded corpus.

To run this recipe, do the following:
> python train.py hparams/train.yaml

A CRDNN encoder and an attentional GRU decoder are trained on characters, with
CTC beside them in the first epochs; decoding is greedy or by beam search.
"""

import sys

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.locks import hold_results


class ASR(sb.Brain):
    """Training with attention and CTC."""

    def compute_forward(self, batch, stage):
        """Log-probabilities of the tokens, and hypotheses outside training."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        tokens_bos, _ = batch.tokens_bos
        feats = self.hparams.compute_features(wavs)
        feats = self.modules.normalize(feats, wav_lens)
        encoded = self.modules.encoder(feats)
        embedded = self.modules.embedding(tokens_bos)
        decoded, _ = self.modules.decoder(embedded, encoded, wav_lens)
        logits = self.modules.seq_lin(decoded)
        predictions = {"seq_logprobs": self.hparams.log_softmax(logits)}
        if self.is_ctc_active(stage):
            logits = self.modules.ctc_lin(encoded)
            predictions["ctc_logprobs"] = self.hparams.log_softmax(logits)
        if stage != sb.Stage.TRAIN:
            valid = stage == sb.Stage.VALID
            hparams = self.hparams
            search = hparams.valid_search if valid else hparams.test_search
            predictions["tokens"] = search(encoded, wav_lens)[0]
        return predictions

    def is_ctc_active(self, stage):
        """CTC helps the encoder to find the words at first."""
        if stage != sb.Stage.TRAIN:
            return False
        epoch = self.hparams.epoch_counter.current
        return epoch <= self.hparams.number_of_ctc_epochs

    def compute_objectives(self, predictions, batch, stage):
        """Sum of both losses; word errors outside training."""
        _, wav_lens = batch.sig
        tokens_eos, tokens_eos_lens = batch.tokens_eos
        loss = self.hparams.seq_cost(
            predictions["seq_logprobs"], tokens_eos, tokens_eos_lens
        )
        if "ctc_logprobs" in predictions:
            tokens, tokens_lens = batch.tokens
            ctc = self.hparams.ctc_cost(
                predictions["ctc_logprobs"], tokens, wav_lens, tokens_lens
            )
            weight = self.hparams.ctc_weight
            loss = (1 - weight) * loss + weight * ctc
        if stage != sb.Stage.TRAIN:
            tokenizer = self.hparams.tokenizer
            hypotheses = [
                tokenizer.decode_ids([int(t) for t in tokens]).split()
                for tokens in predictions["tokens"]
            ]
            references = [words.split() for words in batch.words]
            self.wer_metric.append(batch.id, hypotheses, references)
        return loss

    def on_stage_start(self, stage, epoch):
        """Count word errors from zero."""
        if stage != sb.Stage.TRAIN:
            self.wer_metric = self.hparams.error_rate_computer()

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, anneal the learning rate, save a checkpoint."""
        if stage == sb.Stage.TRAIN:
            self.train_stats = {"loss": stage_loss}
            return
        wer = float(self.wer_metric.summarize("WER"))
        stats = {"loss": stage_loss, "WER": wer}
        if stage == sb.Stage.VALID:
            old_lr, new_lr = self.hparams.lr_annealing(wer)
            sb.nnet.schedulers.update_learning_rate(self.optimizer, new_lr)
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch": epoch, "lr": old_lr},
                train_stats=self.train_stats,
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
            with open(self.hparams.wer_file, "w", encoding="utf-8") as fout:
                self.wer_metric.write_stats(fout)


def dataio_prepare(hparams):
    """Datasets by name, and the tokenizer of the training transcripts."""
    tokenizer = SentencePiece(
        model_dir=hparams["save_folder"],
        vocab_size=hparams["output_neurons"],
        annotation_train=hparams["train_annotation"],
        annotation_read="words",
        annotation_format="json",
        model_type=hparams["token_type"],
        bos_id=hparams["bos_index"],
        eos_id=hparams["eos_index"],
    ).sp

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return sb.dataio.dataio.read_audio(wav)

    @sb.utils.data_pipeline.takes("words")
    @sb.utils.data_pipeline.provides(
        "words", "tokens_bos", "tokens_eos", "tokens"
    )
    def text_pipeline(words):
        yield words
        tokens = tokenizer.encode_as_ids(words)
        yield torch.LongTensor([hparams["bos_index"], *tokens])
        yield torch.LongTensor([*tokens, hparams["eos_index"]])
        yield torch.LongTensor(tokens)

    keys = ["id", "sig", "words", "tokens_bos", "tokens_eos", "tokens"]
    datasets = {
        split: DynamicItemDataset.from_json(
            hparams[f"{split}_annotation"],
            replacements={"data_root": hparams["data_folder"]},
            dynamic_items=[audio_pipeline, text_pipeline],
            output_keys=keys,
        )
        for split in ("train", "valid", "test")
    }
    # Utterances of about the same length make batches with little padding.
    datasets["train"] = datasets["train"].filtered_sorted(sort_key="length")
    return datasets, tokenizer


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
    datasets, tokenizer = dataio_prepare(hparams)
    hparams["tokenizer"] = tokenizer
    brain = ASR(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs=hparams["dataloader_options"],
        valid_loader_kwargs=hparams["dataloader_options"],
    )
    brain.evaluate(
        datasets["test"],
        min_key="WER",
        test_loader_kwargs=hparams["dataloader_options"],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
