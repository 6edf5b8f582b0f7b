"""Quantize a multichannel speech separator and score it to word error rate.

To run this recipe:

> python train.py hparams/kl_4bit.yaml

Any budget: --bits 3, --bits 2.5. Full precision: hparams/fp32.yaml, uniform
precision: hparams/uniform_4bit.yaml, new full-precision weights:
hparams/pretrain.yaml. An interrupted run continues when started again.
"""

import copy
import sys
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.distributed import (
    ddp_init_group,
    if_main_process,
    run_on_main,
)

from speechbrain_mpq.evaluation.results import show_results, write_results
from speechbrain_mpq.evaluation.scoring import Recognizer, score_separation
from speechbrain_mpq.evaluation.si_snr import si_snr
from speechbrain_mpq.inference.folder import write_card, write_hyperparams
from speechbrain_mpq.inference.loading import (
    check_describable,
    initial_separator,
    weights_file,
)
from speechbrain_mpq.inference.registry import describe
from speechbrain_mpq.lobes.models.separator import apply_mask, build_separator
from speechbrain_mpq.lobes.models.tcn import fold_norms_
from speechbrain_mpq.quantization.packing import load_packed_
from speechbrain_mpq.simulation.dataio import (
    dataio_prep,
    device_mixer,
    mix_batch_,
    prepare_data,
)
from speechbrain_mpq.training.brain import QuantizationBrain, check_average_bits
from speechbrain_mpq.training.experiment import (
    Experiment,
    read_hparams,
    run_baselines,
    run_prototypes,
)
from speechbrain_mpq.utils import keep_freed_memory, read_json


class Separation(QuantizationBrain):
    """Separates one talker by direction; trained on SI-SNR.

    `teacher` is the full-precision separator that is distilled from, or None;
    `training_maker` draws the training mixtures; `mixer` makes them on the
    device, or is None.
    """

    teacher = None
    training_maker = None
    mixer = None

    def compute_forward(self, batch, stage):
        """Estimates [batch, targets, samples]."""
        if hasattr(batch, "voices") and not hasattr(batch, "mixture"):
            mix_batch_(self.mixer, batch, self.device)
        return self.modules.separator(*self.given(batch))

    def given(self, batch):
        """What the separator takes: waveforms, DOA and, if there are, lips."""
        names = [n for n in ("mixture", "doa", "lips") if hasattr(batch, n)]
        return [getattr(batch, name).data.to(self.device) for name in names]

    def compute_objectives(self, estimates, batch, stage):
        """Negative SI-SNR in dB against the reverberant targets.

        In training, a share of it is against the estimates of the
        full-precision separator (distillation).
        """
        targets = batch.targets.data.transpose(1, 2)  # [B, targets, samples]
        loss = -si_snr(estimates, targets.to(self.device)).mean()
        share = self.hparams.distillation
        if stage != sb.Stage.TRAIN or not share or self.teacher is None:
            return loss
        with torch.no_grad():
            taught = self.teacher(*self.given(batch))
        return (1 - share) * loss - share * si_snr(estimates, taught).mean()

    def on_stage_start(self, stage, epoch=None):
        """Draw new mixtures in every epoch, the same when it is repeated."""
        super().on_stage_start(stage, epoch)
        if stage == sb.Stage.TRAIN:
            self.training_maker.epoch = epoch
        training = stage == sb.Stage.TRAIN
        torch.compiler.set_stance("default" if training else "force_eager")

    def calibration(self, dataset, count):
        """What scores may need, from mixtures that no epoch trains on.

        The mask network's inputs, the energies of the mixtures, and the loss
        of the network's output: negative SI-SNR in dB, summed over items.
        """
        items = [dataset[i] for i in range(count)]
        mixtures = torch.stack([item["mixture"] for item in items])
        doa = torch.stack([item["doa"][0] for item in items])
        targets = torch.stack([item["targets"][:, 0] for item in items])
        targets = targets.to(self.device)
        given = [mixtures, doa]
        if "lips" in items[0]:
            given.append(torch.stack([item["lips"][0] for item in items]))
        separator = self.modules.separator
        with torch.no_grad():
            inputs, reference = separator.analyse(
                *(values.to(self.device) for values in given)
            )

        def loss(output, chunk):
            estimate = apply_mask(output, reference[chunk])
            signal = separator.features.istft(estimate, targets.shape[1])
            return -si_snr(signal, targets[chunk]).sum()

        weights = reference.abs().square()
        return {"inputs": inputs, "weights": weights, "loss": loss}


def starting_separator(hparams):
    """A new separator, or the shipped one in full precision."""
    return initial_separator(
        hparams["separator_file"],
        hparams["pretrained_separator"],
        full_precision=hparams["bits"] == 32,
        equalize=hparams["equalize_inputs"],
    )


def pack(brain, separator, hparams):
    """Write the packed folder; the scores are put on its card later."""
    fold_norms_(separator)
    architecture = describe(separator)
    kept = {key: hparams[key] for key in ("system", "corpus", "seed")}
    folder = brain.pack(separator, kept, architecture)
    run_on_main(write_hyperparams, args=[folder, architecture])
    run_on_main(write_card, args=[folder])
    return folder


def complete_card(packed, metrics, baselines, hparams):
    """Put the scores on the card, beside those of full precision."""
    found = [read_json(folder / "metrics.json") for folder in baselines]
    wholes = [other for other in found if other["system"] == "fp32"]
    start = Path(hparams["pretrained_separator"] or "")
    if start.name == "packed" and len(start.parts) > 2:
        start = start.parents[1]  # the experiment that wrote it
    write_card(
        packed,
        metrics=metrics,
        reference=wholes[0] if wholes else None,
        base_model=start.name or None,
    )


def about_system(hparams, plan, packed, fp32_bytes, wall_seconds):
    """What metrics.json says of the system beside its scores."""
    return {
        "system": hparams["system"],
        "bits": hparams["bits"],
        "average_bits": plan.average_bits if plan else 32,
        "estimator": hparams["estimator"].__name__ if plan else None,
        "model_bytes": weights_file(packed).stat().st_size,
        "fp32_bytes": fp32_bytes,
        "corpus": hparams["corpus"],
        "seed": hparams["seed"],
        "wall_seconds": wall_seconds,
    }


def evaluate_packed(folder, hparams, dataset, device):
    """Score the model that a fresh process would load from the folder."""
    separator = build_separator(folder / "hyperparams.yaml").eval()
    fold_norms_(separator)
    load_packed_(separator, folder)
    return score_separation(
        separator.to(device),
        dataset,
        Recognizer(hparams["asr_source"], device),
        workers=hparams["workers"],
        keep=hparams["examples"],
    )


def run(hparams_file, run_opts, overrides):
    """Run one experiment, its baselines first; return its folder and theirs."""
    hparams = read_hparams(hparams_file, overrides)
    check_average_bits(hparams["bits"])  # before any work

    def run_other(file, overrides):
        return run(file, run_opts, overrides)[0]

    baselines = run_baselines(run_other, hparams, overrides)
    prototypes = run_prototypes(run_other, hparams, overrides)
    inputs = [
        hparams["separator_file"],
        weights_file(hparams["pretrained_separator"]),
        *map(weights_file, prototypes.values()),
    ]
    experiment = Experiment(hparams, hparams_file, overrides, inputs)
    if experiment.finished:
        experiment.log_finished()
        return experiment.folder, baselines
    run_on_main(experiment.start)
    sb.create_experiment_directory(
        hparams["output_folder"], hparams_file, overrides
    )
    torch.set_num_threads(hparams["threads"])
    separator = starting_separator(hparams)
    brain = make_brain(separator, hparams, run_opts)
    run_on_main(prepare_data, args=[hparams])
    datasets, maker = dataio_prep(hparams)
    brain.training_maker = maker
    if brain.trains:
        brain.mixer = device_mixer(hparams, maker.rooms, brain.device)
    fp32_bytes = 4 * sum(p.numel() for p in separator.parameters())
    plan = estimate(brain, separator, datasets, prototypes)
    packed = pack(brain, separator, hparams)
    system = about_system(hparams, plan, packed, fp32_bytes, brain.times())

    def finish():
        """Score what a fresh process would load; leave the results."""
        scored = evaluate_packed(
            packed, hparams, datasets["test"], brain.device
        )
        metrics = write_results(
            experiment.folder,
            system,
            scored,
            baselines,
            hparams["results_folder"],
        )
        complete_card(packed, metrics, baselines, hparams)

    run_on_main(finish)
    return experiment.folder, baselines


def make_brain(separator, hparams, run_opts):
    """The Brain of a separator; impossible settings are refused."""
    check_describable(separator)
    hparams["microphones"] = separator.features.microphones
    hparams["lips_size"] = separator.lips_size
    brain = Separation(
        modules={"separator": separator},
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.checkpointer.add_recoverable("separator", separator)
    brain.check_settings(separator)
    return brain


def estimate(brain, separator, datasets, prototypes):
    """Choose the bits, quantize in place and train; return the bit plan."""
    hparams = brain.hparams
    if hparams.distillation and brain.trains:
        brain.teacher = copy.deepcopy(separator).eval().requires_grad_(False)
    calibrate = partial(
        brain.calibration, datasets["train"], hparams.calibration_mixtures
    )
    brain.quantize(separator, "mask_net", calibrate, prototypes)
    if brain.trains:
        if hparams.compile_network:
            separator.mask_net.compile(dynamic=False)
        brain.fit(
            hparams.epoch_counter,
            datasets["voices" if brain.mixer else "train"],
            datasets["valid"],
            train_loader_kwargs=hparams.train_loader,
            valid_loader_kwargs=hparams.valid_loader,
        )
    return brain.recover_best(separator)


def main():
    """Run the experiment of the command line and show its table."""
    keep_freed_memory()
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    ddp_init_group(run_opts)
    folder, baselines = run(hparams_file, run_opts, overrides)
    if if_main_process():
        print(show_results([*baselines, folder]))
        print(f"Look and listen: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
