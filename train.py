"""Quantize a multichannel speech separator and score it to word error rate.

To run this recipe:

> python train.py hparams/kl_4bit.yaml

Any budget: --bits 3, --bits 2.5. Full precision: hparams/fp32.yaml, uniform
precision: hparams/uniform_4bit.yaml, new full-precision weights:
hparams/pretrain.yaml. An interrupted run continues when started again.

Below are the stages in their order. Each is a function, and the Brain a class,
of `speechbrain_mpq.experiments.talker_separation`.
"""

import sys

import speechbrain as sb
import torch
from speechbrain.utils.distributed import (
    ddp_init_group,
    if_main_process,
    run_on_main,
)

from speechbrain_mpq.evaluation.results import show_results
from speechbrain_mpq.experiments import talker_separation as stages
from speechbrain_mpq.training.brain import check_average_bits
from speechbrain_mpq.training.experiment import (
    Experiment,
    read_hparams,
    run_baselines,
    run_prototypes,
)
from speechbrain_mpq.utils import keep_freed_memory


def run(hparams_file, run_opts, overrides):
    """Run one experiment, its baselines first; return its folder and theirs."""
    hparams = read_hparams(hparams_file, overrides)
    check_average_bits(hparams["bits"])  # before any work

    def run_other(file, overrides):
        return run(file, run_opts, overrides)[0]

    # What it is compared with, and what its clusters inherit from
    baselines = run_baselines(run_other, hparams, overrides)
    prototypes = run_prototypes(run_other, hparams, overrides)
    inputs = stages.input_files(hparams, prototypes)
    experiment = Experiment(hparams, hparams_file, overrides, inputs)
    if experiment.finished:
        experiment.log_finished()
        return experiment.folder, baselines
    run_on_main(experiment.start)
    # Copies this script into the folder, as it is the one that calls it
    sb.create_experiment_directory(
        hparams["output_folder"], hparams_file, overrides
    )
    torch.set_num_threads(hparams["threads"])

    # Full-precision weights and calibration data
    separator = stages.starting_separator(hparams)
    fp32_bytes = 4 * sum(p.numel() for p in separator.parameters())
    brain = stages.make_brain(separator, hparams, run_opts)
    datasets = stages.load_data(brain, hparams)

    # Score, allocate, quantize in place, estimate; then pack
    plan = stages.estimate(brain, separator, datasets, prototypes)
    packed = stages.pack(brain, separator, hparams)

    # Load what a stranger would load, and score that
    system = stages.describe_system(brain, hparams, plan, packed, fp32_bytes)
    scored = [packed, system, hparams, datasets["test"], brain.device]
    run_on_main(stages.score_packed, args=[*scored, baselines])
    return experiment.folder, baselines


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
