"""Fine-tuning for the peers that train: our recipe's data, steps and loss."""

import torch
from speechbrain.dataio.dataloader import make_dataloader
from tqdm import tqdm

from speechbrain_mpq.evaluation.signal_quality import si_snr

MAX_GRAD_NORM = 5.0  # SpeechBrain's default


def total_steps(bench):
    """Steps of our fine-tuning.

    Arguments
    ---------
    bench : Workbench

    Returns
    -------
    int
    """
    hparams = bench.hparams
    mixtures, batch = hparams["mixtures"]["train"], hparams["batch_size"]
    return hparams["number_of_epochs"] * (mixtures // batch)


def finetune_(bench, separator, optimizer, penalty=None):
    """Trains a separator in place, to the last step.

    Arguments
    ---------
    bench : Workbench
    separator : Separator
    optimizer : torch.optim.Optimizer
        A group's `lr_factor` multiplies the scheduled learning rate.
    penalty : callable or None
        Returns what is added to the loss, negative SI-SNR in dB.
    """
    hparams = bench.hparams
    datasets, maker = bench.data
    schedule, share = hparams["lr_schedule"], hparams["distillation"]
    teacher = bench.separator().requires_grad_(False)
    torch.manual_seed(hparams["seed"])
    separator.train()
    step, steps = 0, total_steps(bench)
    with tqdm(total=steps, desc="training", mininterval=30) as bar:
        for epoch in range(1, hparams["number_of_epochs"] + 1):
            maker.epoch = epoch
            loader = make_dataloader(
                datasets["train"], **hparams["train_loader"]
            )
            for batch in loader:
                waveforms, doa = batch.mixture.data, batch.doa.data
                estimates = separator(waveforms, doa)
                targets = batch.targets.data.transpose(1, 2)
                loss = -(1 - share) * si_snr(estimates, targets).mean()
                if share:
                    with torch.no_grad():
                        taught = teacher(waveforms, doa)
                    loss = loss - share * si_snr(estimates, taught).mean()
                if penalty is not None:
                    loss = loss + penalty()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(
                    optimizer.param_groups[0]["params"], MAX_GRAD_NORM
                )
                optimizer.step()
                step += 1
                schedule(optimizer, step)
                for group in optimizer.param_groups:
                    group["lr"] *= group.get("lr_factor", 1.0)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    separator.eval()
