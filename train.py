"""Quantize a multichannel speech separator and score it to word error rate.

To run this recipe:

> python train.py hparams/kl_4bit.yaml

Any budget: --bits 3, --bits 2.5. Full precision: hparams/fp32.yaml, uniform
precision: hparams/uniform_4bit.yaml, new full-precision weights:
hparams/pretrain.yaml. What it will do and cost: --dry_run. All conditions in
the table: --wide. An interrupted run continues when started again.

Below are the stages in their order. Each is a function, and the Brain a class,
of `speechbrain_mpq.experiments.talker_separation`.
"""

import sys

import speechbrain as sb
import torch
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.evaluation.results import show_results
from speechbrain_mpq.experiments import command_line
from speechbrain_mpq.experiments import talker_separation as stages
from speechbrain_mpq.experiments.command_line import say
from speechbrain_mpq.utils import keep_freed_memory


def run(step, run_opts, chatter_into):
    """Run one experiment, after those that it is compared with."""
    experiment = step.begin(stages.input_files)
    if experiment.state:
        say(f"      {experiment.state}")
    if experiment.finished:
        return
    run_on_main(experiment.start)
    hparams = experiment.read()
    # Copies this script into the folder, as it is the one that calls it
    with command_line.quiet_log_config(run_opts.log_config) as log_config:
        sb.create_experiment_directory(
            hparams["output_folder"], log_config=log_config
        )
    run_on_main(experiment.write_hyperparams)
    chatter_into(experiment.folder / "log.txt")
    torch.set_num_threads(hparams["threads"])

    # Full-precision weights and calibration data
    separator = stages.starting_separator(hparams)
    fp32_bytes = 4 * sum(p.numel() for p in separator.parameters())
    brain = stages.make_brain(separator, hparams, run_opts)
    say("      speech and rooms, where missing")
    datasets = stages.load_data(brain, hparams)

    # Score, allocate, quantize in place, estimate; then pack
    say(f"      {stages.estimation_text(brain)}")
    prototypes = step.packed_prototypes
    plan = stages.estimate(brain, separator, datasets, prototypes)
    packed = stages.pack(brain, separator, hparams)

    # Load what a stranger would load, and score that
    say(f"      test on {len(datasets['test'])} mixtures")
    system = stages.describe_system(brain, hparams, plan, packed, fp32_bytes)
    scored = [packed, system, hparams, datasets["test"], brain.device]
    baselines = [baseline.folder for baseline in step.baselines]
    run_on_main(stages.score_packed, args=[*scored, baselines])


def main(arguments):
    """Run the experiments of the command line and show their table."""
    keep_freed_memory()
    with command_line.chatter_to_log() as chatter_into:
        line = command_line.read_command_line(arguments, stages.check)
        command_line.tell_plan(line, stages.input_files)
        if line.dry_run:
            return
        for number, step in enumerate(line.steps, 1):
            command_line.tell_step(number, line)
            run(step, line.run_opts, chatter_into)
    last = line.steps[-1]
    folders = [step.folder for step in (*last.baselines, last)]
    say("\n" + show_results(folders, wide=line.wide))
    packed = last.folder / "packed"
    say(f"Look and listen: {last.folder / 'report.html'}")
    say(f"Use it: speechbrain-mpq separate mix.wav --doa 60 --model {packed}")
    say(f"Beside others, in a browser: speechbrain-mpq demo --open {packed}")


if __name__ == "__main__":
    sys.exit(command_line.guarded(main, sys.argv[1:]))
