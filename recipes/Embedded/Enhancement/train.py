"""Noise suppression with early exits: nsNet2 on the embedded corpus in noise.

To run this recipe, do the following:
> python train.py hparams/train.yaml

Utterances get noise while they are needed: another one in every epoch of
training, the same one in validation and test. All exits are trained at once.
At the end the network is packed; what is loaded from there is scored at each
exit, then in streams with an exit chosen frame by frame.
"""

import sys
import time
from functools import cache
from pathlib import Path
from statistics import fmean, median

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from numpy import interp
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import run_on_main
from tqdm import tqdm

from speechbrain_mpq.evaluation.runs import summarise
from speechbrain_mpq.evaluation.signal_quality import P808, pesq_many, si_snr
from speechbrain_mpq.evaluation.signal_tasks import ENHANCEMENT
from speechbrain_mpq.inference.enhancement import save_enhancer
from speechbrain_mpq.inference.folder import coverage_rows
from speechbrain_mpq.inference.loading import load
from speechbrain_mpq.lobes.models.exit_rules import (
    EnhancerStream,
    FixedExit,
    RandomExit,
    UncertainMask,
    frame_rule,
    threshold_for,
)
from speechbrain_mpq.lobes.models.nsnet2 import HOP, log_power, stft
from speechbrain_mpq.locks import hold_results
from speechbrain_mpq.quantization.packing import read_model
from speechbrain_mpq.simulation.augmentation import NoisySpeech, Voices
from speechbrain_mpq.simulation.noise import NoiseFolder, NoiseMaker
from speechbrain_mpq.training.checkpoints import load_best_
from speechbrain_mpq.utils import write_json

MEASURES = ("si_snr", "pesq", "dnsmos")


class Enhancement(sb.Brain):
    """Joint training of all exits."""

    def compute_forward(self, batch, stage):
        """Masks {exit: [batch, frames, bins]}."""
        batch = batch.to(self.device)
        features = log_power(stft(batch.noisy.data))
        return self.modules.network(features, self.hparams.train_exits)

    def compute_objectives(self, predictions, batch, stage):
        """Compressed loss, the sum of the exits."""
        noisy, clean = stft(batch.noisy.data), stft(batch.clean.data)
        losses = {
            exit: self.hparams.loss(mask * noisy, clean).mean()
            for exit, mask in predictions.items()
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
            old_lr, new_lr = self.hparams.lr_scheduler(epoch)
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
            hparams["train_seconds" if training else "seconds"],
            hparams["snr"],
            hparams["gain"] if training else (0, 0),
            hparams["seed"],
        )

        @sb.utils.data_pipeline.takes("id")
        @sb.utils.data_pipeline.provides("noisy", "clean", "noise")
        def noisy_pipeline(key):
            epoch = hparams["epoch_counter"].current if training else 0
            noisy, clean, drawn = clips.draw(key, epoch, kind)
            yield torch.from_numpy(noisy)
            yield torch.from_numpy(clean)
            yield drawn["noise"]

        data.add_dynamic_item(noisy_pipeline)
        data.set_output_keys(["id", "noisy", "clean", "noise"])
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
        network, train_exits and start_from, which may be a packed folder,
        are used.
    """
    network, folder = hparams["network"], hparams["start_from"]
    if folder is not None:
        load_best_(
            network,
            folder,
            "give the --exits, --split and sizes that it was trained with",
        )
    before = [e for e in network.exits if e < min(hparams["train_exits"])]
    if before:
        for part in network.parts_of(before[-1]):
            part.requires_grad_(False)


@cache
def dnsmos():
    """The network of DNSMOS P.808, loaded once."""
    return P808()


def measure(pairs, hparams):
    """SI-SNR in dB, PESQ and DNSMOS of (estimate, clean) waveforms.

    Arguments
    ---------
    pairs : list of tuple
        Of torch.Tensor [samples].
    hparams : dict
        pesq and dnsmos say whether these are measured.

    Returns
    -------
    list of dict
        None where a measure is undefined or not asked for.
    """
    scores = [
        {"si_snr": si_snr(*pair).item(), "pesq": None, "dnsmos": None}
        for pair in pairs
    ]
    if hparams["pesq"]:
        arrays = [(output.numpy(), clean.numpy()) for output, clean in pairs]
        grades = pesq_many(arrays, workers=1, skip_undefined=True)
        for score, value in zip(scores, grades):
            score["pesq"] = value
    if hparams["dnsmos"]:
        p808 = dnsmos()
        for score, (estimate, _) in zip(scores, pairs):
            if estimate.any():
                score["dnsmos"] = p808(estimate.numpy())
    return scores


def averages(scores):
    """Means of measures, of those that are defined."""
    blocks = {
        key: [score[key] for score in scores if score[key] is not None]
        for key in MEASURES
    }
    return {key: fmean(values) for key, values in blocks.items() if values}


def score_exits(network, data, hparams):
    """Scores of the noisy input and of each exit on whole files.

    Arguments
    ---------
    network : EarlyExitNsNet2 or NsNet2
    data : DynamicItemDataset
    hparams : dict

    Returns
    -------
    table : dict
        "noisy" or "exit <number>" -> averages.
    items : list of dict
        Of the task, for the last exit.
    """
    items = [(item["id"], item["noise"]) for item in data]
    pairs = [(item["noisy"], item["clean"]) for item in data]
    noisy = measure(pairs, hparams)
    table = {"noisy": averages(noisy)}
    for exit in network.exits:
        enhanced = [
            (network.enhance(waveform[None], exit)[0], clean)
            for waveform, clean in tqdm(pairs, f"Exit {exit}", disable=None)
        ]
        scores = measure(enhanced, hparams)
        table[f"exit {exit}"] = {
            "macs": network.macs(exit),
            **averages(scores),
        }
    return table, [
        {
            "id": key,
            "noise": kind,
            **score,
            **{f"{name}_noisy": before[name] for name in MEASURES},
        }
        for (key, kind), score, before in zip(items, scores, noisy)
    ]


def frame_milliseconds(network, exit, waveform):
    """Processor time of a frame in a stream of single frames, the median.

    Arguments
    ---------
    network : EarlyExitNsNet2 or NsNet2
    exit : int
    waveform : torch.Tensor
        [samples].
    """
    stream = EnhancerStream(network, FixedExit(exit))
    times = []
    for block in waveform.split(HOP):
        begun = time.process_time()
        stream.feed(block)
        times.append(time.process_time() - begun)
    return 1000 * median(times)


def bytes_of(network, exit, packed):
    """Bytes of the packed weights that an exit needs.

    Arguments
    ---------
    network : EarlyExitNsNet2 or NsNet2
        As loaded from there.
    exit : int
    packed : str or Path
        Folder.
    """
    needed = {
        id(parameter)
        for part in network.parts_of(exit)
        for parameter in part.parameters()
    }
    names = {n for n, p in network.named_parameters() if id(p) in needed}
    rows = coverage_rows(read_model(packed))
    return sum(r["bytes"] for r in rows if r["tensor"].split("[")[0] in names)


def score_stream(network, data, rule, hparams):
    """Scores of a stream whose rule chooses the exits.

    Arguments
    ---------
    network : EarlyExitNsNet2 or NsNet2
    data : DynamicItemDataset
    rule : callable
        See `exit_rules`.
    hparams : dict
        The first `stream_utterances` of the data are streamed.

    Returns
    -------
    dict
        Averages, and multiplications a frame.
    """
    pairs, macs = [], 0
    for index in range(min(hparams["stream_utterances"], len(data))):
        item = data[index]
        stream = EnhancerStream(network, rule)
        parts = [stream.feed(item["noisy"]), stream.flush()]
        pairs.append((torch.cat(parts), item["clean"]))
        macs += stream.mean_macs()
    scores = averages(measure(pairs, hparams))
    return {"macs": macs / len(pairs), **scores}


def validation(data, hparams):
    """Noisy waveforms of the validation that thresholds are found on."""
    count = min(hparams["threshold_utterances"], len(data["valid"]))
    return [data["valid"][index]["noisy"] for index in range(count)]


def deepest_of(network, data, hparams):
    """The exit with the least loss on the validation, from the third on.

    Arguments
    ---------
    network : EarlyExitNsNet2 or NsNet2
    data : dict
        Datasets by name.
    hparams : dict
    """
    # between the second one and itself no rule has anything to choose
    losses = dict.fromkeys(network.exits[2:] or network.exits[1:], 0.0)
    for item in data["valid"]:
        noisy, clean = stft(item["noisy"][None]), stft(item["clean"][None])
        for exit, mask in network(log_power(noisy)).items():
            if exit in losses:
                losses[exit] += hparams["loss"](mask * noisy, clean).item()
    return min(losses, key=losses.get)


def thresholds_of(network, data, hparams):
    """Thresholds of the rule for shares of the last exit's multiplications.

    Arguments
    ---------
    network : EarlyExitNsNet2 or NsNet2
    data : dict
        Datasets; they are found in "valid".
    hparams : dict
        mac_shares and threshold_utterances are used.

    Returns
    -------
    list
        [multiplications a frame, threshold], as the network holds them.
    """
    clips = validation(data, hparams)
    least, most = network.macs(network.exits[1]), network.macs(network.deepest)
    whole = network.macs(network.exits[-1])
    budgets = [share * whole for share in sorted(hparams["mac_shares"])]
    return [
        [budget, threshold_for(network, clips, budget)]
        for budget in budgets
        if least < budget < most
    ]


def score_rules(network, data, hparams):
    """Rules that listen, beside fixed exits and chance.

    Arguments
    ---------
    network : EarlyExitNsNet2 or NsNet2
        With its thresholds.
    data : dict
        Datasets; the thresholds of the other rule are found in "valid".
    hparams : dict

    Returns
    -------
    dict
        Name of the rule -> scores on the same utterances of "test". "line"
        is where fixed exits would be at the multiplications of a rule.
    """
    exits = network.exits
    rules = {f"fixed exit {exit}": FixedExit(exit) for exit in exits}
    for budget, threshold in network.thresholds:
        share = f"{budget / network.macs(exits[-1]):.0%} of the MACs"
        rules[f"moving mask, {share}"] = frame_rule(network, threshold)
        threshold = threshold_for(
            network, validation(data, hparams), budget, UncertainMask
        )
        rule = frame_rule(network, threshold, UncertainMask)
        rules[f"uncertain mask, {share}"] = rule
        # Of the fixed exits around the budget, by chance
        late = next(exit for exit in exits[1:] if network.macs(exit) >= budget)
        early = exits[exits.index(late) - 1]
        costs = network.macs(early), network.macs(late)
        early_share = (costs[1] - budget) / (costs[1] - costs[0])
        rules[f"chance, {share}"] = RandomExit(
            early, late, early_share, hparams["seed"]
        )
    scores = {
        name: score_stream(network, data["test"], rule, hparams)
        for name, rule in tqdm(rules.items(), desc="Rules", disable=None)
    }
    fixed = [scores[f"fixed exit {exit}"] for exit in exits]
    for row in scores.values():
        if row not in fixed:
            row["line"] = line_between(fixed, row["macs"])
    return scores


def line_between(fixed, macs):
    """Measures of fixed exits, in turns, at a number of multiplications.

    Arguments
    ---------
    fixed : list of dict
        Scores of fixed exits, by ascending "macs".
    macs : float
    """
    costs = [row["macs"] for row in fixed]
    return {
        key: float(interp(macs, costs, [row[key] for row in fixed]))
        for key in MEASURES
        if all(key in row for row in fixed)
    }


@torch.no_grad()
def publish(network, data, hparams):
    """Pack the network, score what is loaded again, write metrics.json.

    Arguments
    ---------
    network : EarlyExitNsNet2 or NsNet2
        Trained, in full precision or quantized.
    data : dict
        Datasets by name.
    hparams : dict
    """
    output = Path(hparams["output_folder"])
    folder = output / "published"
    save_enhancer(network, folder)
    packed = load(folder)
    if len(packed.exits) > 1:
        network.deepest = packed.deepest = deepest_of(packed, data, hparams)
        pairs = thresholds_of(packed, data, hparams)
        network.thresholds = packed.thresholds = tuple(map(tuple, pairs))
    metrics = {"system": hparams["system"], "seed": hparams["seed"]}
    metrics["corpus"] = Path(hparams["data_folder"]).name
    for name in ("test", "test_unseen"):
        table, items = score_exits(packed, data[name], hparams)
        if name == "test":
            metrics.update(summarise(items, ENHANCEMENT))
            write_json(output / "test_items.json", items)
        metrics[name] = table
    noisy = data["test"][0]["noisy"]
    for exit in packed.exits:
        row = metrics["test"][f"exit {exit}"]
        row["bytes"] = bytes_of(packed, exit, folder)
        row["ms"] = frame_milliseconds(packed, exit, noisy)
    if hparams["stream_utterances"]:
        metrics["streams"] = score_rules(packed, data, hparams)
    rows = coverage_rows(read_model(folder))
    metrics |= sizes(folder, rows)
    metadata = {
        "noisy": metrics["test"]["noisy"],
        "exits": {
            str(exit): metrics["test"][f"exit {exit}"] for exit in packed.exits
        },
    }
    save_enhancer(network, folder, metadata, metrics=metrics)
    write_json(output / "metrics.json", metrics)


def sizes(folder, rows):
    """What metrics.json says of bits and bytes.

    Arguments
    ---------
    folder : Path
        Packed.
    rows : list of dict
        Coverage table.
    """
    weights = [row for row in rows if not row["reason"]] or rows
    count = sum(row["parameters"] for row in weights)
    bits = sum(row["parameters"] * row["stored_bits"] for row in weights)
    return {
        "bits": round(bits / count),
        "average_bits": bits / count,
        "model_bytes": (folder / "model.safetensors").stat().st_size,
        "fp32_bytes": 4 * sum(row["parameters"] for row in rows),
    }


def main(arguments):
    """Prepare, train and test."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    begin(hparams)  # before any work: it may be refused
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
    run_on_main(publish, args=[hparams["network"].cpu().eval(), data, hparams])


if __name__ == "__main__":
    main(sys.argv[1:])
