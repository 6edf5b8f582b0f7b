"""Quantize a separator, from its full-precision weights to a scored package.

The stages of train.py, in their order: start from weights, choose bits,
quantize and train, pack, load what a stranger would load and score that.
"""

import copy
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from ..evaluation.results import score_separation, write_results
from ..evaluation.signal_quality import si_snr
from ..evaluation.signal_tasks import SEPARATION
from ..inference.card import write_sample
from ..inference.folder import write_card, write_hyperparams
from ..inference.language_model import LanguageModel, RescoringRecognizer
from ..inference.loading import (
    check_describable,
    initial_separator,
    load,
    weights_file,
)
from ..inference.registry import describe
from ..inference.speech_recognition import Recognizer
from ..lobes.models.separator import apply_mask
from ..lobes.models.tcn import fold_norms_
from ..simulation.dataio import (
    dataio_prep,
    device_mixer,
    mix_batch_,
    prepare_data,
)
from ..training.brain import QuantizationBrain
from ..training.pipeline import log_stats
from ..utils import read_json
from .command_line import cost_of

EMBEDDED = "embedded"  # the corpus that comes with the package
WIDE = 45.0  # degrees between talkers, of a mixture to hear
logger = get_logger(__name__)


class Separation(QuantizationBrain):
    """Train, quantize and score a separator of one talker by direction.

    `teacher` is the full-precision separator that is distilled from, or None;
    `training_maker` draws the training mixtures; `mixer` makes them on the
    device, or is None. The rest is as in `QuantizationBrain`.

    Arguments
    ---------
    modules : dict
        {"separator": Separator}.
    opt_class : callable or None
        Makes the optimizer; None where nothing is trained.
    hparams : dict
        See `QuantizationBrain`; further "distillation".
    run_opts : dict
        SpeechBrain's run options.

    Example
    -------
    >>> from speechbrain_mpq.lobes.models.separator import build_separator
    >>> separator = build_separator("hparams/models/separator_mini.yaml")
    >>> brain = Separation({"separator": separator}, None, {"bits": 32}, {})
    >>> brain.modules.separator is separator
    True
    """

    teacher = None
    training_maker = None
    mixer = None

    def compute_forward(self, batch, stage):
        """Estimates [batch, targets, samples]."""
        if hasattr(batch, "voices") and not hasattr(batch, "mixture"):
            mix_batch_(self.mixer, batch, self.device)
        return self.modules.separator(*self.inputs(batch))

    def inputs(self, batch):
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
            distilled = self.teacher(*self.inputs(batch))
        return (1 - share) * loss - share * si_snr(estimates, distilled).mean()

    def on_stage_start(self, stage, epoch=None):
        """Draw new mixtures in every epoch, the same when it is repeated."""
        super().on_stage_start(stage, epoch)
        if stage == sb.Stage.TRAIN:
            self.training_maker.epoch = epoch
        training = stage == sb.Stage.TRAIN
        torch.compiler.set_stance("default" if training else "force_eager")

    def calibration(self, dataset, count):
        """Collect what scores may need, from mixtures that no epoch trains on.

        Arguments
        ---------
        dataset : sequence of dict
            Mixtures, such as the training set before its first epoch.
        count : int
            How many of them, from the first on.

        Returns
        -------
        calibration : dict
            "inputs" of the mask network [B, features, frames], "weights": the
            energies of the mixtures [B, bins, frames], and "loss" of the
            network's output: negative SI-SNR in dB, summed over items.
        """
        items = [dataset[i] for i in range(count)]
        mixtures = torch.stack([item["mixture"] for item in items])
        doa = torch.stack([item["doa"][0] for item in items])  # [B]
        targets = torch.stack([item["targets"][:, 0] for item in items])
        targets = targets.to(self.device)  # [B, samples]
        inputs = [mixtures, doa]
        if "lips" in items[0]:
            inputs.append(torch.stack([item["lips"][0] for item in items]))
        separator = self.modules.separator
        with torch.no_grad():
            features, reference = separator.analyse(
                *(values.to(self.device) for values in inputs)
            )

        def loss(output, chunk):
            estimate = apply_mask(output, reference[chunk])
            signal = separator.features.istft(estimate, targets.shape[1])
            return -si_snr(signal, targets[chunk]).sum()

        weights = reference.abs().square()
        return {"inputs": features, "weights": weights, "loss": loss}


def starting_separator(hparams):
    """Make a new separator, or load the shipped one in full precision."""
    return initial_separator(
        hparams["separator_file"],
        hparams["pretrained_separator"],
        full_precision=hparams["bits"] == 32,
        equalize=hparams["equalize_inputs"],
    )


def input_files(hparams, prototypes):
    """List the files that an experiment's result depends on."""
    return [
        hparams["separator_file"],
        weights_file(hparams["pretrained_separator"]),
        *map(weights_file, prototypes.values()),
    ]


def make_brain(separator, hparams, run_opts):
    """Make the Brain of a separator; impossible settings are refused."""
    check_describable(separator)
    hparams["microphones"] = separator.features.microphones
    hparams["array_positions"] = separator.features.array_positions.numpy()
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


def check(hparams, run_opts):
    """Refuse what cannot be done, before any work; tell what the rest costs.

    Arguments
    ---------
    hparams : dict
        Loaded hyper-parameters of an experiment.
    run_opts : dict
        SpeechBrain's run options.

    Returns
    -------
    cost : Cost
        Of the experiment.
    """
    for key in ("admm", "one_stage"):
        if isinstance(hparams[key], dict):
            raise ValueError(f"--{key} names no object: use hparams/{key}_4bit")
    if hparams["skip_prep"]:
        for split in ("train", "valid", "test"):
            path = Path(hparams[f"{split}_speech"])
            if not path.exists():
                raise FileNotFoundError(
                    f"no {path}: write it, name it with --{split}_speech, or "
                    "leave out --skip_prep"
                )
    count = hparams["calibration_mixtures"]
    if not 1 <= count <= hparams["mixtures"]["train"]:
        raise ValueError(
            f"--calibration_mixtures {count}: they are taken from the "
            f"{hparams['mixtures']['train']} training mixtures"
        )
    _check_corpora(hparams)
    if hparams["rescorer"] is not None:
        LanguageModel.from_pretrained(hparams["rescorer"])  # refused now
    separator = starting_separator(hparams)
    brain = make_brain(separator, hparams, run_opts)
    if hparams["augmentation"] and separator.lips_size:
        raise ValueError(
            "--augmentation changes how long voices are, which the lips of "
            "this separator are not: leave it out"
        )
    parameters = sum(p.numel() for p in separator.parameters())
    return cost_of(hparams, parameters, brain.trains)


def _check_corpora(hparams):
    """Refuse corpora that are not there, and mixing that cannot be varied."""
    shares = hparams["train_corpora"]
    if not isinstance(shares, dict):
        raise ValueError(
            '--train_corpora maps folders to shares, as "{data/embedded: 0.3, '
            f'data/voices: 0.7}}", not {shares!r}'
        )
    for folder, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise ValueError(f"--train_corpora: {folder} has share {share!r}")
        if not 0 <= share:
            raise ValueError(f"--train_corpora: {folder} has share {share}")
        if not share:
            continue
        made = folder == hparams["data_folder"] and not hparams["skip_prep"]
        path = Path(folder) / "train_speech.json"
        if not made and not path.exists():
            raise FileNotFoundError(
                f"no {path}: prepare that corpus first (recipes/*/README.md), "
                "or leave it out of --train_corpora"
            )
    if hparams["augmentation"] and hparams["mix_on_device"]:
        raise ValueError(
            "--mix_on_device True mixes two voices and nothing else: leave it "
            "out, or train without --augmentation"
        )


def estimation_text(brain):
    """Say what `estimate` will do, in a line for the terminal."""
    hparams = brain.hparams
    trains = brain.trains and hparams.number_of_epochs
    parts = ["train"] if trains else []
    if hparams.bits != 32:
        parts.insert(
            0, "round" if not hparams.round_calibrated else "fit layers"
        )
        if hparams.scores is not None:
            parts.insert(0, "score clusters, choose bits")
    return ", ".join(parts) or "full precision as it is"


def load_data(brain, hparams):
    """Prepare speech and rooms, and make the datasets."""
    run_on_main(prepare_data, args=[hparams])
    datasets, maker = dataio_prep(hparams)
    brain.training_maker = maker
    if brain.trains:
        brain.mixer = device_mixer(hparams, maker.rooms, brain.device)
    return datasets


def estimate(brain, separator, datasets, prototypes):
    """Choose the bits, quantize in place and train."""
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


def pack(brain, separator, hparams):
    """Write the packed folder; the scores are put on its card later.

    Arguments
    ---------
    brain : Separation
        Of the separator.
    separator : Separator
        With its final values; its norms are folded in place.
    hparams : dict
        Loaded hyper-parameters.

    Returns
    -------
    folder : Path
        The packed folder.
    """
    fold_norms_(separator)
    architecture = describe(separator)
    kept = {key: hparams[key] for key in ("system", "corpus", "seed")}
    folder = brain.pack(separator, kept, architecture)
    run_on_main(write_hyperparams, args=[folder, architecture])
    run_on_main(write_card, args=[folder])
    return folder


def describe_system(brain, hparams, plan, packed, fp32_bytes):
    """Say what metrics.json says of the system beside its scores.

    Arguments
    ---------
    brain : Separation
        It knows the seconds that each stage took.
    """
    variant = hparams.get("variant")
    return {
        "system": hparams["system"],
        **({"variant": variant} if variant else {}),
        "bits": hparams["bits"],
        "average_bits": plan.average_bits if plan else 32,
        "estimator": hparams["estimator"].__name__ if plan else None,
        "model_bytes": weights_file(packed).stat().st_size,
        "fp32_bytes": fp32_bytes,
        "corpus": hparams["corpus"],
        "seed": hparams["seed"],
        "wall_seconds": brain.times(),
    }


def score_packed(packed, system, hparams, dataset, device, baselines=()):
    """Score what a fresh process would load; leave the results."""
    model = load(packed).to(device)  # what from_pretrained gives a user
    scored = score_separation(
        model,
        dataset,
        _recognizer(hparams, device),
        workers=hparams["workers"],
        keep=hparams["examples"],
    )
    metrics = write_results(
        packed.parent, system, scored, baselines, hparams["results_folder"]
    )
    if hparams["corpus"] == EMBEDDED and not hparams["skip_prep"]:
        _leave_sample(packed, model, dataset, scored.items)
    _complete_card(packed, metrics, baselines, hparams)
    stats = {"bits": metrics["average_bits"], "bytes": metrics["model_bytes"]}
    scores = [measure.key for measure in SEPARATION.measures]
    average = {key: metrics["average"].get(key) for key in scores}
    log_stats(
        hparams,
        stats,
        {key: value for key, value in average.items() if value is not None},
    )


def _recognizer(hparams, device):
    """What writes the words down, with a language model behind it or not."""
    source, rescorer = hparams["asr_source"], hparams["rescorer"]
    if rescorer is None:
        return Recognizer(source, device)
    weight = hparams["lm_weight"]
    return RescoringRecognizer(source, rescorer, weight, device)


def _leave_sample(packed, model, dataset, scored):
    """Leave a recording to hear beside the card; its speech is our own."""
    angles = [item["angle"] for item in scored]
    wide = [index for index, angle in enumerate(angles) if angle >= WIDE]
    index = wide[0] if wide else max(range(len(angles)), key=angles.__getitem__)
    item = dataset[index]
    names = [name for name in ("mixture", "doa", "lips") if name in item]
    device = next(model.parameters()).device
    with torch.no_grad():
        estimate = model(*(item[name][None].to(device) for name in names))
    written = write_sample(
        packed,
        item["mixture"],
        estimate[0, 0].cpu(),
        round(item["doa"].flatten()[0].item(), 1),
        "two synthetic talkers in a simulated room",
    )
    if not written:
        logger.info("No sample beside the card: FLAC has 8 channels at most")


def _complete_card(packed, metrics, baselines, hparams):
    """Put the scores on the card, beside those of full precision."""
    others = [read_json(folder / "metrics.json") for folder in baselines]
    full = [other for other in others if other["system"] == "fp32"]
    start = Path(hparams["pretrained_separator"] or "")
    if start.name == "packed" and len(start.parts) > 2:
        start = start.parents[1]  # the experiment that wrote it
    write_card(
        packed,
        metrics=metrics,
        reference=full[0] if full else None,
        base_model=start.name or None,
    )
