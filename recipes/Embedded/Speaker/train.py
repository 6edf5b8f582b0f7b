"""Speaker identification of the embedded corpus's voices with ECAPA-TDNN.

To run this recipe, do the following:
> python train.py hparams/ecapa.yaml

The voices are those of the training set; every so many utterances of each are
kept for validation and test.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.locks import hold_results


class SpeakerBrain(sb.Brain):
    """Classification of utterances by their speaker."""

    def compute_forward(self, batch, stage):
        """Cosines of the embeddings with the speakers, [batch, 1, speakers]."""
        batch = batch.to(self.device)
        wavs, lens = batch.sig
        feats = self.modules.compute_features(wavs)
        feats = self.modules.mean_var_norm(feats, lens)
        embeddings = self.modules.embedding_model(feats, lens)
        return self.modules.classifier(embeddings), lens

    def compute_objectives(self, predictions, batch, stage):
        """Loss with an angular margin; errors outside training."""
        cosines, lens = predictions
        speakers, _ = batch.spk_id_encoded
        if stage != sb.Stage.TRAIN:
            self.error_metrics.append(batch.id, cosines, speakers, lens)
        return self.hparams.compute_cost(cosines, speakers, lens)

    def on_stage_start(self, stage, epoch):
        """Count errors from zero."""
        if stage != sb.Stage.TRAIN:
            self.error_metrics = self.hparams.error_stats()

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, anneal the learning rate, save a checkpoint."""
        if stage == sb.Stage.TRAIN:
            self.train_stats = {"loss": stage_loss}
            return
        error = float(self.error_metrics.summarize("average"))
        stats = {"loss": stage_loss, "ErrorRate": error}
        if stage == sb.Stage.VALID:
            old_lr, new_lr = self.hparams.lr_annealing(epoch)
            sb.nnet.schedulers.update_learning_rate(self.optimizer, new_lr)
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch": epoch, "lr": old_lr},
                train_stats=self.train_stats,
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(
                meta={"ErrorRate": error}, min_keys=["ErrorRate"]
            )
        else:
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )


def prepare_speakers(manifest, folder, held_out):
    """Share the utterances of each speaker out to three manifests.

    Arguments
    ---------
    manifest : str or Path
        All utterances.
    folder : str or Path
        Where train.json, valid.json and test.json are written.
    held_out : int
        One in so many utterances of a speaker is for validation, the next
        one for test.
    """
    if held_out < 3:
        raise ValueError(
            f"held_out {held_out} leaves nothing to train with: give 3 or more"
        )
    entries = json.loads(Path(manifest).read_text(encoding="utf-8"))
    shares, seen = {"train": {}, "valid": {}, "test": {}}, Counter()
    for name, entry in entries.items():
        turn = seen[entry["speaker"]] % held_out
        seen[entry["speaker"]] += 1
        split = {held_out - 2: "valid", held_out - 1: "test"}
        kept = {key: entry[key] for key in ("wav", "length", "speaker")}
        shares[split.get(turn, "train")][name] = kept
    for split, share in shares.items():
        text = json.dumps(share, indent=1)
        (Path(folder) / f"{split}.json").write_text(text, encoding="utf-8")


def dataio_prep(hparams):
    """Datasets by name: train, valid, test."""
    encoder = hparams["label_encoder"]

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return sb.dataio.dataio.read_audio(wav)

    @sb.utils.data_pipeline.takes("speaker")
    @sb.utils.data_pipeline.provides("speaker", "spk_id_encoded")
    def label_pipeline(speaker):
        yield speaker
        yield torch.LongTensor([encoder.encode_label(speaker)])

    data = {
        split: DynamicItemDataset.from_json(
            Path(hparams["save_folder"]) / f"{split}.json",
            replacements={"data_root": hparams["data_folder"]},
            dynamic_items=[audio_pipeline, label_pipeline],
            output_keys=["id", "sig", "spk_id_encoded"],
        )
        for split in ("train", "valid", "test")
    }
    encoder.load_or_create(
        path=Path(hparams["save_folder"]) / "label_encoder.txt",
        from_didatasets=[data["train"]],
        output_key="speaker",
    )
    return data


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
    run_on_main(
        prepare_speakers,
        args=[hparams["manifest"], hparams["save_folder"]],
        kwargs={"held_out": hparams["held_out"]},
    )
    data = dataio_prep(hparams)
    brain = SpeakerBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    options = hparams["dataloader_options"]
    brain.fit(
        hparams["epoch_counter"],
        data["train"],
        data["valid"],
        train_loader_kwargs={**options, "shuffle": True},
        valid_loader_kwargs=options,
    )
    brain.evaluate(
        data["test"], min_key="ErrorRate", test_loader_kwargs=options
    )


if __name__ == "__main__":
    main(sys.argv[1:])
