"""Noise suppression with early exits: nsNet2 on the embedded corpus in noise.

To run this recipe, do the following:
> python train.py hparams/train.yaml

Utterances get noise while they are needed: another one in every epoch of
training, the same one in validation and test. All exits are trained at once.
The test scores each exit on whole files, then streams with an exit chosen
frame by frame, and writes metrics.json.
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import run_on_main
from tqdm import tqdm

from speechbrain_mpq.evaluation.signal_quality import pesq_many, si_snr
from speechbrain_mpq.lobes.models.nsnet2 import (
    EnhancerStream,
    log_power,
    stft,
    threshold_for,
)
from speechbrain_mpq.nnet.exit_rules import FixedExit, RandomExit, UncertainMask
from speechbrain_mpq.simulation.noise import NoiseFolder, NoiseMaker
from speechbrain_mpq.simulation.noisy_speech import NoisySpeech, Voices
from speechbrain_mpq.utils import write_json


class Enhancement(sb.Brain):
    """Joint training of all exits."""

    def compute_forward(self, batch, stage):
        """Enhanced spectra {exit: [batch, frames, bins]}."""
        batch = batch.to(self.device)
        spectrum = stft(batch.noisy.data)
        exits = self.hparams.train_exits
        masks = self.modules.network(log_power(spectrum), exits)
        return {exit: mask * spectrum for exit, mask in masks.items()}

    def compute_objectives(self, predictions, batch, stage):
        """Compressed loss, the sum of the exits."""
        target = stft(batch.clean.data)
        losses = {
            exit: self.hparams.loss(estimate, target).mean()
            for exit, estimate in predictions.items()
        }
        for exit, loss in losses.items():
            self.exit_losses.setdefault(exit, []).append(loss.item())
        return sum(losses.values())

    def on_stage_start(self, stage, epoch):
        """Collect the losses of the exits from nothing."""
        self.exit_losses = {}

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, anneal the learning rate, save a checkpoint."""
        stats = {"loss": float(stage_loss)}
        for exit, losses in self.exit_losses.items():
            stats[f"exit {exit}"] = sum(losses) / len(losses)
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
            self.checkpointer.save_and_keep_only(meta=stats, min_keys=["loss"])
        else:
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )


def noise_of(hparams, speech, split):
    """Noise of a split: generated, or of a folder."""
    if hparams["noise_folder"]:
        return NoiseFolder(
            hparams["noise_folder"], split, hparams["seed"], resample=True
        )
    return NoiseMaker(Voices(speech), seed=hparams["seed"])


def dataio_prep(hparams):
    """Datasets by name: train, valid, test and test_unseen.

    The last one has the type of noise that training has not heard or, where
    `test_noise_folder` is given, that folder's.
    """

    def dataset(split, noise=None, kind=None):
        data = DynamicItemDataset.from_json(
            hparams[f"{split}_annotation"],
            replacements={"data_root": hparams["data_folder"]},
        )
        training = split == "train"
        clips = NoisySpeech(
            data.data,
            noise or noise_of(hparams, data.data, split),
            hparams["seconds"],
            hparams["snr"],
            hparams["gain"] if training else (0, 0),
            hparams["seed"],
        )

        @sb.utils.data_pipeline.takes("id")
        @sb.utils.data_pipeline.provides("noisy", "clean")
        def noisy_pipeline(key):
            epoch = hparams["epoch_counter"].current if training else 0
            noisy, clean, _ = clips.draw(key, epoch, kind)
            yield torch.from_numpy(noisy)
            yield torch.from_numpy(clean)

        data.add_dynamic_item(noisy_pipeline)
        data.set_output_keys(["id", "noisy", "clean"])
        return data

    data = {split: dataset(split) for split in ("train", "valid", "test")}
    folder = hparams["test_noise_folder"]
    if folder:
        noise = NoiseFolder(folder, seed=hparams["seed"], resample=True)
        data["test_unseen"] = dataset("test", noise)
    else:
        noise = NoiseMaker(seed=hparams["seed"])
        data["test_unseen"] = dataset("test", noise, kind=noise.held_out)
    return data


def begin(hparams):
    """Weights of another run; what trained exits build on is frozen.

    Arguments
    ---------
    hparams : dict
        network, train_exits and start_from are used.
    """
    network, folder = hparams["network"], hparams["start_from"]
    if folder is not None:
        save = Path(folder) / "save"
        best = Checkpointer(save).find_checkpoint(min_key="loss")
        if best is None:
            raise ValueError(f"{save} has no checkpoint: train it first")
        state = torch.load(best.paramfiles["network"], weights_only=True)
        network.load_state_dict(state)
    before = [e for e in network.exits if e < min(hparams["train_exits"])]
    if before:
        for part in network.parts_of(before[-1]):
            part.requires_grad_(False)


def measured(pairs, with_pesq):
    """Mean SI-SNR in dB, and PESQ, of (estimate, clean) waveforms."""
    ratios = [si_snr(estimate, clean).item() for estimate, clean in pairs]
    scores = {"si_snr": sum(ratios) / len(ratios)}
    if with_pesq:
        found = pesq_many(
            [(estimate.numpy(), clean.numpy()) for estimate, clean in pairs],
            skip_undefined=True,
        )
        defined = [score for score in found if score is not None]
        scores["pesq_undefined"] = len(found) - len(defined)
        scores["pesq"] = sum(defined) / max(len(defined), 1)
    return scores


def score_exits(network, data, with_pesq):
    """Scores of each exit on whole files, and of the noisy input.

    Arguments
    ---------
    network : EarlyExitNsNet2
    data : DynamicItemDataset
    with_pesq : bool

    Returns
    -------
    dict
        "noisy" or "exit <number>" -> measures and multiplications a frame.
    """
    items = [(item["noisy"], item["clean"]) for item in data]
    scores = {"noisy": measured(items, with_pesq)}
    for exit in network.exits:
        pairs = [
            (network.enhance(noisy[None], exit)[0], clean)
            for noisy, clean in tqdm(items, desc=f"Exit {exit}", disable=None)
        ]
        scores[f"exit {exit}"] = {
            "macs": network.macs(exit),
            **measured(pairs, with_pesq),
        }
    return scores


def score_stream(network, data, rule, with_pesq, utterances):
    """Scores of a stream whose rule chooses the exits.

    Arguments
    ---------
    network : EarlyExitNsNet2
    data : DynamicItemDataset
    rule : callable
        See `exit_rules`.
    with_pesq : bool
    utterances : int
        How many of the data are streamed.

    Returns
    -------
    dict
        Measures, and multiplications a frame on average.
    """
    pairs, macs = [], 0
    for index in range(min(utterances, len(data))):
        item = data[index]
        stream = EnhancerStream(network, rule)
        parts = [stream.feed(item["noisy"]), stream.flush()]
        pairs.append((torch.cat(parts), item["clean"]))
        macs += stream.mean_macs()
    return {"macs": macs / len(pairs), **measured(pairs, with_pesq)}


def score_rules(network, data, hparams):
    """The rule that listens, beside fixed exits and chance.

    Arguments
    ---------
    network : EarlyExitNsNet2
    data : dict
        Datasets; thresholds are found in "valid".
    hparams : dict
        mac_shares, threshold_utterances, stream_utterances and pesq are used.

    Returns
    -------
    dict
        Name of the rule -> scores on the same utterances.
    """
    exits, count = network.exits, hparams["stream_utterances"]
    heard = [
        data["valid"][index]["noisy"]
        for index in range(
            min(hparams["threshold_utterances"], len(data["valid"]))
        )
    ]
    rules = {f"fixed exit {exit}": FixedExit(exit) for exit in exits}
    for share in hparams["mac_shares"] if len(exits) > 1 else []:
        budget = share * network.macs(exits[-1])
        if budget < network.macs(exits[0]):
            continue
        threshold = threshold_for(network, heard, budget)
        rules[f"listening, {share:.0%} of the MACs"] = UncertainMask(threshold)
        # Of the fixed exits around the budget, by chance: the line between
        late = next(exit for exit in exits[1:] if network.macs(exit) >= budget)
        early = exits[exits.index(late) - 1]
        costs = network.macs(early), network.macs(late)
        early_share = (costs[1] - budget) / (costs[1] - costs[0])
        rules[f"chance, {share:.0%} of the MACs"] = RandomExit(
            early, late, early_share, hparams["seed"]
        )
    return {
        name: score_stream(network, data["test"], rule, hparams["pesq"], count)
        for name, rule in tqdm(rules.items(), desc="Rules", disable=None)
    }


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
    data = dataio_prep(hparams)
    begin(hparams)
    brain = Enhancement(
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
    for name in ("test", "test_unseen"):
        brain.evaluate(
            data[name],
            min_key="loss",
            test_loader_kwargs=hparams["dataloader_opts"],
        )
    network = hparams["network"].cpu().eval()
    with torch.no_grad():
        metrics = {
            name: score_exits(network, data[name], hparams["pesq"])
            for name in ("test", "test_unseen")
        }
        metrics["streams"] = score_rules(network, data, hparams)
    write_json(Path(hparams["output_folder"]) / "metrics.json", metrics)


if __name__ == "__main__":
    main(sys.argv[1:])
