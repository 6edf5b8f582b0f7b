"""Speech quality without a reference: DNSMOS with binary activation maps.

To run this recipe, do the following:
> python train.py hparams/train.yaml
> python train.py hparams/train.yaml --binary_maps True --start_from FOLDER

It makes clips of the embedded corpus in noise, labels them by PESQ, trains,
and writes test_items.json, metrics.json, a report and the folder estimator/,
which `speechbrain-mpq quality --model` takes. FOLDER is the output
folder of the first command. `python -m speechbrain_mpq.run train.py ...`
chooses bits for the weights.
"""

import sys
import time
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.evaluation.results import Scored, write_results
from speechbrain_mpq.evaluation.signal_tasks import SPEECH_QUALITY
from speechbrain_mpq.evaluation.significance import pcc
from speechbrain_mpq.inference.quality_estimation import save_quality_estimator
from speechbrain_mpq.lobes.models.dnsmos import BinaryDNSMOS, BitDNSMOS, memory
from speechbrain_mpq.locks import hold_results
from speechbrain_mpq.quantization.quant_api import coverage
from speechbrain_mpq.training.checkpoints import load_best_

TESTS = ("test", "test_unseen")


class Quality(sb.Brain):
    """Regression of a score."""

    def compute_forward(self, batch, stage):
        """Scores [batch]."""
        batch = batch.to(self.device)
        features = self.modules.features(batch.sig.data)  # [batch, T, mels]
        if stage == sb.Stage.TRAIN:
            features = shift_bands(features, self.hparams.band_shift)
        return self.modules.network(features)

    def compute_objectives(self, predictions, batch, stage):
        """Squared error."""
        labels = batch.label.to(predictions)
        if stage != sb.Stage.TRAIN:
            for key, score, label in zip(batch.id, predictions, labels):
                self.scores[key] = (score.item(), label.item())
        return (predictions - labels).square().mean()

    def on_stage_start(self, stage, epoch):
        """Collect scores from nothing."""
        self.scores = {}

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, anneal the learning rate, save a checkpoint."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = float(stage_loss)
            return
        scores, labels = zip(*self.scores.values())
        stats = {"loss": float(stage_loss), "PCC": pcc(scores, labels)}
        if stage == sb.Stage.VALID:
            old_lr, new_lr = self.hparams.lr_scheduler(epoch)
            sb.nnet.schedulers.update_learning_rate(self.optimizer, new_lr)
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch": epoch, "lr": old_lr},
                train_stats={"loss": self.train_loss},
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(
                meta={"loss": stats["loss"]}, min_keys=["loss"]
            )
        else:
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )


def shift_bands(features, most):
    """Move each clip by some mel bands, as a longer or shorter throat does.

    Arguments
    ---------
    features : torch.Tensor
        [batch, T, mels].
    most : int
        Bands, up or down; the outermost one is repeated.

    Returns
    -------
    torch.Tensor
        [batch, T, mels].
    """
    batch, _, mels = features.shape
    shifts = torch.randint(-most, most + 1, (batch, 1), device=features.device)
    bands = torch.arange(mels, device=features.device) + shifts
    index = bands.clamp(0, mels - 1)[:, None].expand_as(features)
    return features.gather(2, index)


def dataio_prep(hparams):
    """Datasets by name: train, valid, test and test_unseen."""

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return sb.dataio.dataio.read_audio(wav)

    @sb.utils.data_pipeline.takes(hparams["label"])
    @sb.utils.data_pipeline.provides("label")
    def label_pipeline(label):
        return label

    return {
        split: DynamicItemDataset.from_json(
            Path(hparams["data_folder"]) / f"{split}_quality.json",
            replacements={"data_root": hparams["data_folder"]},
            dynamic_items=[audio_pipeline, label_pipeline],
            output_keys=["id", "sig", "label"],
        )
        for split in ("train", "valid", *TESTS)
    }


def load_start(hparams):
    """Load the weights of another run, if one is named; True if so.

    Arguments
    ---------
    hparams : dict
        network and start_from are used.

    Returns
    -------
    bool
    """
    folder = hparams["start_from"]
    if folder is None:
        return False
    load_best_(
        hparams["network"],
        folder,
        "give the --shape and --dense that it was trained with, and no "
        "--binary_weights, which begin afresh",
    )
    return True


def describe_system(network, hparams):
    """What metrics.json says of the system beside its scores.

    Arguments
    ---------
    network : DNSMOS
        Quantized or not.
    hparams : dict
        system, label, seed, binary_maps and binary_weights are used.

    Returns
    -------
    dict
    """
    rows = coverage(network)
    parameters = sum(row["parameters"] for row in rows)
    size = {"bits": 0, "bytes": 0}
    for row in rows:
        bits, held = row["stored_bits"], row["bytes"]
        one = hparams["binary_weights"] and row["parameters"] > 64
        if one and row["tensor"].startswith("convs."):
            bits, held = 1, row["parameters"] / 8
        size["bits"] += row["parameters"] * bits
        size["bytes"] += held
    bits = size["bits"] / parameters
    map_bits = 1 if hparams["binary_maps"] else 32
    return {
        "system": hparams["system"],
        "bits": round(bits, 1),
        "average_bits": bits,
        "model_bytes": round(size["bytes"]),
        "fp32_bytes": 4 * parameters,
        "corpus": f"embedded, labels by {hparams['label']}",
        "seed": hparams["seed"],
        "memory": memory(network, weight_bits=bits, map_bits=map_bits),
    }


def run_bits(network, features, data, clips=20):
    """Bytes and time of a clip in bits, beside the training graph.

    Arguments
    ---------
    network : BinaryDNSMOS
    features : LogMel
    data : DynamicItemDataset
    clips : int
        How many are tried.

    Returns
    -------
    dict
        Bytes kept, milliseconds of either way, and whether all scores are
        the same to the last bit.
    """
    small = BitDNSMOS(network)
    seconds, same = np.zeros(2), True
    for index in range(min(clips, len(data))):
        x = features(data[index]["sig"][None])
        times = [time.perf_counter()]
        graph = network(x)[0].numpy()
        times.append(time.perf_counter())
        bits = small(x[0])
        times.append(time.perf_counter())
        seconds += np.diff(times)
        same = same and bool(graph == bits)
    graph_ms, bits_ms = (1000 * seconds / min(clips, len(data))).tolist()
    return {
        "bytes": small.nbytes,
        "graph_ms": graph_ms,
        "bits_ms": bits_ms,
        "same_scores": same,
    }


def main(arguments):
    """Prepare, train and test."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    started = load_start(hparams)  # before any work: it may be refused
    sb.utils.distributed.ddp_init_group(run_opts)
    hold_results(hparams["output_folder"])
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    if not hparams["skip_prep"]:
        from quality_prepare import prepare_quality

        from speechbrain_mpq.simulation.corpus import prepare_speech

        folder = [hparams["data_folder"]]
        run_on_main(prepare_speech, args=folder, kwargs=hparams["utterances"])
        run_on_main(prepare_quality, args=folder, kwargs=hparams["quality"])
    data = dataio_prep(hparams)
    if not started:  # an output that begins at the mean label
        entries = data["train"].data.values()
        mean = np.mean([entry[hparams["label"]] for entry in entries])
        hparams["network"].output.bias.data.fill_(mean)
    brain = Quality(
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
    items = []
    for name in TESTS:
        brain.evaluate(
            data[name],
            min_key="loss",
            test_loader_kwargs=hparams["dataloader_opts"],
        )
        items += [
            {
                "id": key,
                "score": score,
                "label": label,
                "held_out": name == "test_unseen",
            }
            for key, (score, label) in sorted(brain.scores.items())
        ]
    network = hparams["network"].cpu().eval()
    system = describe_system(network, hparams)
    if isinstance(network, BinaryDNSMOS):
        with torch.no_grad():
            features = hparams["features"].cpu()
            system["bits_run"] = run_bits(network, features, data["test"])
    folder = Path(hparams["output_folder"])
    metrics = write_results(folder, system, Scored(items), task=SPEECH_QUALITY)
    # what `speechbrain-mpq quality --model` takes
    save_quality_estimator(network, folder / "estimator", metrics=metrics)


if __name__ == "__main__":
    main(sys.argv[1:])
