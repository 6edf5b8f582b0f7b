"""A small GRU in integers, each of its operations at a bit width of its own.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder=recordings

It trains the GRU in floating point, converts it, searches for bit plans on
the validation set by NSGA-II and by its baselines, trains the chosen plan
again, and tells what they make of the test set: `results.json`, `table.md`,
plots, and the packed GRUs.
"""

import copy
import json
import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from torch.utils.data import DataLoader, TensorDataset

from speechbrain_mpq.allocation import nsga2
from speechbrain_mpq.allocation.plan_search import weights_digest
from speechbrain_mpq.evaluation.results import Scored, write_results
from speechbrain_mpq.evaluation.significance import (
    mcnemar,
    paired_difference,
)
from speechbrain_mpq.evaluation.task import markdown_lines
from speechbrain_mpq.evaluation.word_tasks import CLASSIFICATION
from speechbrain_mpq.inference.classification import (
    matrix_plan,
    save_classifier,
)
from speechbrain_mpq.locks import hold_results
from speechbrain_mpq.nnet.gru_conversion import (
    calibrate,
    convert,
    homogeneous_plan,
)
from speechbrain_mpq.nnet.gru_simulation import (
    FakeQuantizedGRU,
    PackedCodes,
    SimulatedGRU,
)
from speechbrain_mpq.nnet.integer_gru_file import (
    load_integer_gru,
    save_integer_gru,
)
from speechbrain_mpq.quantization.packing import MODEL_FILE

PARTS = 150, 300, 600  # evaluations to tell hypervolumes of
EVALUATION_BATCH = 128  # sequences of about the same length
COLUMNS = (
    "system",
    "evaluations",
    "bytes",
    "% of 8 bits",
    "valid error %",
    "test error %",
    "more than 8 bits, 95 % interval",
    "right only here / only at 8 bits",
    "McNemar p",
)


class ClassifierBrain(sb.Brain):
    """Classification of sequences by what the GRU ends with."""

    def compute_forward(self, batch, stage):
        """Scores of the classes, [batch, classes]."""
        features, lengths, _ = (part.to(self.device) for part in batch)
        gru, classifier = self.modules.gru, self.modules.classifier
        return float_scores(gru, classifier, features, lengths)

    def compute_objectives(self, predictions, batch, stage):
        """Cross-entropy; errors are counted outside training."""
        classes = batch[2].to(self.device)
        if stage != sb.Stage.TRAIN:
            wrong = predictions.argmax(-1) != classes
            self.errors += wrong.sum().item()
            self.seen += len(classes)
        return torch.nn.functional.cross_entropy(predictions, classes)

    def on_stage_start(self, stage, epoch):
        """Count errors from zero."""
        self.errors = self.seen = 0

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, anneal the learning rate, save a checkpoint."""
        if stage == sb.Stage.TRAIN:
            self.train_stats = {"loss": stage_loss}
            return
        stats = {"loss": stage_loss, "error": self.errors / self.seen}
        if stage == sb.Stage.VALID:
            old_lr, new_lr = self.hparams.lr_annealing(epoch)
            sb.nnet.schedulers.update_learning_rate(self.optimizer, new_lr)
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch": epoch, "lr": old_lr},
                train_stats=self.train_stats,
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(meta=stats, min_keys=["error"])
        else:
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )


class Experiment:
    """A trained GRU and all that is asked of its bit plans.

    Arguments
    ---------
    gru : speechbrain.nnet.RNN.GRU
    classifier : torch.nn.Linear
    data : dict of str -> tuple
        Split -> features, lengths, classes.
    labels : list of str
    hparams : dict
    """

    def __init__(self, gru, classifier, data, labels, hparams):
        self.gru, self.classifier = gru.eval(), classifier.eval()
        self.data, self.labels, self.hparams = dict(data), labels, hparams
        items = len(data["valid"][0])
        order = torch.randperm(
            items, generator=torch.Generator().manual_seed(1)
        )[: hparams["search_items"]]
        # A search sees some of it; what it finds is then chosen on all
        self.data["search"] = tuple(part[order] for part in data["valid"])
        order = torch.randperm(
            len(data["train"][0]), generator=torch.Generator().manual_seed(0)
        )[: hparams["calibration_items"]]
        self.known = tuple(part[order] for part in data["train"])
        features, lengths, _ = self.known
        self.calibration = calibrate(
            gru, [(features, lengths)], hparams["result_bits"]
        )
        with torch.no_grad():
            scores = float_scores(gru, classifier, features, lengths)
        self.log_posteriors = scores.log_softmax(-1)
        self.packed = {}

    def convert(self, plan, gru=None, classifier=None, row_scales=None):
        """The integer GRU of a plan."""
        return convert(
            gru or self.gru,
            plan,
            self.calibration,
            classifier or self.classifier,
            self.labels,
            row_scales,
        )

    def codes(self, integer, name, features, lengths):
        """Codes of sequences, packed once: all plans have the same ones."""
        if name not in self.packed:
            self.packed[name] = PackedCodes(integer.quantize(features), lengths)
        return self.packed[name]

    def predicted(self, integer):
        """Classes that the integers give the test sequences, [sequences]."""
        features, lengths, _ = self.data["test"]
        codes = integer.quantize(features)
        classes = torch.zeros_like(lengths)
        for part in lengths.argsort().split(EVALUATION_BATCH):
            some = codes[part, : lengths[part].max()]
            scores = integer.classify(some, lengths[part])
            classes[part] = scores.argmax(-1)
        return classes

    def tested(self, integer):
        """Which test sequences the integers classify right, [sequences]."""
        return self.predicted(integer) == self.data["test"][2]

    def evaluate(self, plan):
        """Share of errors in a search, and bytes of the packed integers."""
        integer = self.convert(plan)
        return self.valid_error(integer, "search"), integer.packed_bytes

    def valid_error(self, integer, split="valid"):
        """Share of errors on validation; simulated, which changes no score."""
        features, lengths, classes = self.data[split]
        codes = self.codes(integer, split, features, lengths)
        scores = SimulatedGRU(integer).classify(codes)
        return (scores.argmax(-1) != classes).double().mean().item()

    def score(self, plan):
        """How far the classes' distribution moves on known sequences: KL."""
        integer = self.convert(plan)
        features, lengths, _ = self.known
        codes = self.codes(integer, "known", features, lengths)
        last = SimulatedGRU(integer).last(codes)
        with torch.no_grad():
            scores = self.classifier(integer.dequantize(last))
        moved = torch.nn.functional.kl_div(
            scores.log_softmax(-1),
            self.log_posteriors,
            reduction="batchmean",
            log_target=True,
        )
        return moved.item(), integer.packed_bytes

    def search(self, genes):
        """Every method's evaluations, by name."""
        hparams, bits = self.hparams, self.hparams["candidate_bits"]
        folder = Path(hparams["output_folder"])
        kinds = ("result_bits", "calibration_items", "search_items")
        settings = {
            "task": hparams["task"],
            "seed_of_gru": hparams["seed"],
            "weights": [
                weights_digest(module) for module in (self.gru, self.classifier)
            ],
            **{kind: hparams[kind] for kind in kinds},
        }
        same = nsga2.homogeneous(self.evaluate, genes, bits)
        evolution = nsga2.Evolution(
            hparams["population"],
            hparams["generations"],
            hparams["search_seed"],
            hparams["mutation"],
            largest_error=same.all()[-1].error + hparams["error_room"],
        )
        evaluations = nsga2.search(
            self.evaluate,
            genes,
            bits,
            evolution,
            initial=[item.plan for item in same.all()],
            checkpoint=folder / "search.json",
            settings=settings,
        )
        budget = len(evaluations)
        few = round(hparams["additive_share"] * budget)
        few = max(few, len(genes) * (len(bits) - 1) + 9)
        scores = nsga2.Evaluations(self.score, genes)
        return {
            "homogeneous": same,
            "NSGA-II": evaluations,
            "random": nsga2.random_search(
                self.evaluate,
                genes,
                budget,
                bits,
                hparams["search_seed"],
                checkpoint=folder / "random.json",
                settings=settings,
            ),
            "greedy": nsga2.greedy_descent(
                self.evaluate,
                genes,
                budget,
                bits,
                checkpoint=folder / "greedy.json",
                settings=settings,
            ),
            "scores": nsga2.additive_search(
                self.evaluate, genes, few, bits, scores
            ),
            "scores, whole hull": nsga2.additive_search(
                self.evaluate, genes, max(few, budget), bits, scores
            ),
        }

    def tuned(self, plan, path):
        """The plan's integer GRU of a file, trained now if it is not there."""
        if not path.exists() or load_integer_gru(path).plan != plan:
            integer = self.finetune(plan)
            if integer is None:
                return None
            path.parent.mkdir(exist_ok=True)
            save_integer_gru(path, integer)
        return load_integer_gru(path)  # what is tested is what is shipped

    def finetune(self, plan):
        """The plan's GRU in integers after training with its roundings."""
        gru, classifier = map(copy.deepcopy, (self.gru, self.classifier))
        fake = FakeQuantizedGRU(gru, plan, self.calibration)
        parameters = [*fake.parameters(), *classifier.parameters()]
        optimizer = torch.optim.Adam(parameters, self.hparams["finetune_lr"])
        batches = DataLoader(
            TensorDataset(*self.data["train"]),
            self.hparams["batch_size"],
            shuffle=True,
            generator=torch.Generator().manual_seed(self.hparams["seed"]),
        )
        epochs, best = self.hparams["finetune_epochs"], (2.0, None)
        steps = max(epochs * len(batches), 1)
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, 0.05, total_iters=steps
        )
        for _ in range(epochs):
            for features, lengths, classes in batches:
                features = features[:, : lengths.max()]
                _, states = fake(features, lengths)
                loss = torch.nn.functional.cross_entropy(
                    classifier(states[-1]), classes
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
            integer = self.convert(plan, gru, classifier, fake.row_scales())
            error = self.valid_error(integer)
            if error <= best[0]:
                best = error, integer
        return best[1]


def float_scores(gru, classifier, features, lengths):
    """Scores in floating point, [batch, classes]."""
    outputs, _ = gru(features)
    return classifier(outputs[torch.arange(len(outputs)), lengths - 1])


def choose(experiment, evaluations, limit):
    """The smallest plan of a front with few errors on all of validation.

    Returns
    -------
    tuple or None
        Evaluation, integer GRU, share of errors; None without any.
    """
    for item in evaluations.front():  # smallest first
        integer = experiment.convert(item.plan)
        error = experiment.valid_error(integer)
        if error <= limit + 1e-9:
            return item, integer, error
    return None


def report(experiment, methods, folder):
    """Test the plans that validation chose; rows of the table."""
    hparams, data = experiment.hparams, experiment.data
    folder = Path(folder)
    same = {
        next(iter(e.plan.values())): e for e in methods["homogeneous"].all()
    }
    eight = same[max(same)]
    integer = experiment.convert(eight.plan)
    reference = experiment.tested(integer)
    features, lengths, classes = data["test"]
    with torch.no_grad():
        scores = float_scores(
            experiment.gru, experiment.classifier, features, lengths
        )
    numbers = [
        *experiment.gru.parameters(),
        *experiment.classifier.parameters(),
    ]
    size = 4 * sum(parameter.numel() for parameter in numbers)
    rows = []

    def add(name, evaluations, size, valid_error, right):
        result = mcnemar(right, reference)
        more, low, high = paired_difference(~right, ~reference)
        rows.append(
            {
                "system": name,
                "evaluations": evaluations,
                "bytes": int(size),
                "size_of_8_bits": size / eight.size,
                "valid_error": valid_error,
                "test_error": 1 - right.float().mean().item(),
                "more_test_errors": more,  # than 8 bits, as a share
                "interval": [low, high],  # 95 %, of what is above
                "only_this_right": result.only_first,
                "only_8_bits_right": result.only_second,
                "p": result.p,
            }
        )

    add("float", None, size, None, scores.argmax(-1) == classes)
    for bits, item in sorted(same.items(), reverse=True):
        network = experiment.convert(item.plan)
        error = experiment.valid_error(network)
        add(f"{bits} bits", 1, item.size, error, experiment.tested(network))
    corner = eight.error + hparams["error_room"], eight.size
    error = experiment.valid_error(integer)
    volumes, reached, whole = {}, {}, corner[0] * corner[1]
    part_volumes = {name: {} for name in ("NSGA-II", "random", "greedy")}
    target_volume = nsga2.hypervolume(methods["scores"].all(), corner)
    for name, evaluations in methods.items():
        volume = nsga2.hypervolume(evaluations.all(), corner)
        volumes[name] = volume / whole
        for count in PARTS if name in part_volumes else ():
            volume = nsga2.hypervolume(evaluations.all()[:count], corner)
            part_volumes[name][count] = volume / whole
        reached[name] = nsga2.evaluations_until(
            target_volume, evaluations.all(), corner
        )
        chosen = choose(experiment, evaluations, error + hparams["tolerance"])
        count = len(evaluations)
        if name.startswith("scores"):
            bits = len(hparams["candidate_bits"])
            count += 1 + len(eight.plan) * (bits - 1)
        if chosen is not None:
            item, network, least = chosen
            right = experiment.tested(network)
            add(f"{name}, chosen", count, item.size, least, right)
    chosen = methods["NSGA-II"]
    limits = error + hparams["tolerance"], error + hparams["tuned_tolerance"]
    whole_front = [choose(experiment, chosen, limit) for limit in limits]
    # Where the front has none that is good enough on all of validation
    kept, smaller = (one[0] if one else eight for one in whole_front)
    # The control: the same bits for all, at about the same size
    near = min(same, key=lambda bits: abs(same[bits].size - smaller.size))
    plans = {f"{bits} bits": same[bits].plan for bits in (max(same), near)}
    plans["NSGA-II"] = kept.plan
    if smaller.plan != kept.plan:
        plans["NSGA-II, smaller"] = smaller.plan
    least = {}
    for name, plan in plans.items():
        network = experiment.tuned(
            plan, folder / "tuned" / f"{name}.safetensors"
        )
        if network is not None:
            least[name] = experiment.valid_error(network)
            right = experiment.tested(network)
            title = f"{name}, trained again"
            add(title, None, network.packed_bytes, least[name], right)
    shared = ["NSGA-II"] if "NSGA-II" in least else []
    if least.get("NSGA-II, smaller", 1.0) <= limits[0] + 1e-9:
        shared = ["NSGA-II, smaller"]
    fronts = {
        name: [item for item in e.all() if item.error <= corner[0]]
        for name, e in methods.items()
    }
    nsga2.plot_fronts(fronts, folder / "fronts.png", error_label="valid error")
    useful = [item for item in chosen.front() if item.error <= corner[0]]
    if len(useful) > 1:
        nsga2.plot_genomes(useful, folder / "genomes.png")
    content = {
        "task": hparams["task"],
        "seed": hparams["seed"],
        "items": {split: len(part[2]) for split, part in data.items()},
        "evaluations": {name: len(e) for name, e in methods.items()},
        "rows": rows,
        "hypervolumes": volumes,
        "hypervolumes_of_the_first": part_volumes,  # so many evaluations
        "evaluations_until_scores": reached,  # that many for their volume
        "plan": kept.plan,
        "shared": shared,  # the smaller one where validation does not mind
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1))
    (folder / "table.md").write_text(table(content))
    return content


def pack(experiment, log_mel, folder, name):
    """Write a trained plan as a folder to share, with its card."""
    hparams, folder = experiment.hparams, Path(folder)
    integer = load_integer_gru(folder / "tuned" / f"{name}.safetensors")
    about = {"corpus": hparams["task"], "seed": hparams["seed"]}
    arguments = integer, folder / "packed", log_mel.settings, about
    path = save_classifier(*arguments) / MODEL_FILE
    integer = load_integer_gru(path)  # what is tested is what is shared
    features, lengths, classes = experiment.data["test"]
    with torch.no_grad():
        scores = float_scores(
            experiment.gru, experiment.classifier, features, lengths
        )
    numbers = [
        *experiment.gru.parameters(),
        *experiment.classifier.parameters(),
    ]
    whole = 4 * sum(parameter.numel() for parameter in numbers)
    plan = matrix_plan(integer.description)
    systems = {
        "fp32": (folder / "fp32", 32, 32, whole, scores.argmax(-1)),
        "nsga2": (
            folder,
            round(plan.average_bits),
            plan.average_bits,
            path.stat().st_size,
            experiment.predicted(integer),
        ),
    }
    metrics = {}
    for name, (where, bits, average, size, predicted) in systems.items():
        where.mkdir(exist_ok=True)
        items = [
            {
                "id": f"sequence_{number:05d}",
                "reference": experiment.labels[right],
                "hypothesis": experiment.labels[answer],
            }
            for number, (right, answer) in enumerate(
                zip(classes.tolist(), predicted.tolist())
            )
        ]
        metrics[name] = write_results(
            where,
            {
                "system": name,
                "bits": bits,
                "average_bits": average,
                "estimator": "FakeQuantizedGRU" if bits < 32 else None,
                "model_bytes": size,
                "fp32_bytes": whole,
                "corpus": hparams["task"],
                "seed": hparams["seed"],
            },
            Scored(items),
            [systems["fp32"][0]] if name != "fp32" else (),
            task=CLASSIFICATION,
        )
    save_classifier(
        *arguments,
        metrics=metrics["nsga2"],
        reference=metrics["fp32"],
        license=hparams["license"],
    )


def table(content):
    """The results as a table in Markdown."""
    lines = [
        f"Task {content['task']}, seed {content['seed']}, "
        f"{content['items']['test']} test sequences.",
        "",
    ]

    def percent(value, digits=1):
        return "" if value is None else f"{100 * value:.{digits}f}"

    rows = [
        (
            row["system"],
            row["evaluations"] or "",
            row["bytes"],
            percent(row["size_of_8_bits"]),
            percent(row["valid_error"], 2),
            percent(row["test_error"], 2),
            f"{100 * row['more_test_errors']:+.1f} "
            f"[{100 * row['interval'][0]:.1f}, "
            f"{100 * row['interval'][1]:.1f}]",
            f"{row['only_this_right']} / {row['only_8_bits_right']}",
            f"{row['p']:.3f}",
        )
        for row in content["rows"]
    ]
    lines.extend(markdown_lines(COLUMNS, rows))
    volumes = [f"{n} {v:.4f}" for n, v in content["hypervolumes"].items()]
    lines += ["", "Hypervolumes on validation: " + ", ".join(volumes) + "."]
    reached = content["evaluations_until_scores"]
    lines += [
        "Evaluations until that of the scores: "
        + ", ".join(
            f"{name} {reached[name] or 'not reached'}"
            for name in ("NSGA-II", "random", "greedy")
        )
        + "."
    ]
    return "\n".join(lines) + "\n"


def main(arguments):
    """Prepare, train, search, report."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    hold_results(hparams["output_folder"])
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    from tasks import TASKS

    if hparams["task"] not in TASKS:
        raise ValueError(f"task is one of {', '.join(TASKS)}")
    prepare = TASKS[hparams["task"]]
    data, labels, log_mel = prepare(hparams["data_folder"], hparams["features"])
    width, size = data["train"][0].shape[-1], hparams["input_size"]
    if (width, len(labels)) != (size, hparams["classes"]):
        raise ValueError(
            f"give --input_size={width} --classes={len(labels)} for this task"
        )
    brain = ClassifierBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    loaders = {
        split: DataLoader(
            TensorDataset(*parts),
            hparams["batch_size"],
            shuffle=split == "train",
        )
        for split, parts in data.items()
    }
    brain.fit(hparams["epoch_counter"], loaders["train"], loaders["valid"])
    brain.evaluate(loaders["test"], min_key="error")
    gru, classifier = (brain.modules[n].cpu() for n in ("gru", "classifier"))
    experiment = Experiment(gru, classifier, data, labels, hparams)
    methods = experiment.search(list(homogeneous_plan(gru, 8)))
    content = report(experiment, methods, hparams["output_folder"])
    print(table(content))
    for name in content["shared"] if log_mel else ():
        pack(experiment, log_mel, hparams["output_folder"], name)


if __name__ == "__main__":
    main(sys.argv[1:])
