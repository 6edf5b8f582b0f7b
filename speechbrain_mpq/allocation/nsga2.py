"""Search for bit plans by evaluating whole plans.

A plan gives every gene (an operation, a cluster, ...) a bit width, and
`evaluate(plan)` gives two objectives, both better when lower: an error and a
size. `search` finds plans that no other one beats in both by NSGA-II (Deb et
al. 2002, 10.1109/4235.996017); the baselines here spend the same evaluations
in simpler ways. No function knows what is evaluated.

A search of the same seed evaluates the same plans. That is what an interrupted
one goes on by: the checkpoint is JSON of all evaluations, written whole after
each generation, and a new start takes from there what it would evaluate again.
Evaluations of the generation that is being made are in a folder beside it.
Under torchrun the processes share out the plans of each generation.
"""

import json
import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..utils import read_text, save_figure, strict_json, write_text
from .sharing import ResultLog, process, share

CANDIDATE_BITS = (2, 3, 4, 5, 6, 7, 8)


class Evaluation(NamedTuple):
    """A plan and what it is worth: lower is better for both."""

    plan: dict
    error: float
    size: float


class Evaluations:
    """Every plan that was evaluated, each one once.

    Arguments
    ---------
    evaluate : callable
        Takes a plan (dict of str -> int), returns (error, size).
    genes : sequence of str
    checkpoint : str or Path or None
        JSON file to go on from and to write to.
    settings : dict
        What a checkpoint must have been made with.

    Example
    -------
    >>> seen = Evaluations(lambda plan: (1 / plan["a"], plan["a"]), ["a"])
    >>> seen({"a": 4})
    (0.25, 4.0)
    >>> len(seen), seen.front()
    (1, [Evaluation(plan={'a': 4}, error=0.25, size=4.0)])
    """

    def __init__(self, evaluate, genes, checkpoint=None, settings=None):
        self.evaluate, self.genes = evaluate, tuple(genes)
        if not self.genes or len(set(self.genes)) != len(self.genes):
            raise ValueError("genes must be names, none twice")
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.settings = {"genes": list(self.genes), **(settings or {})}
        self.known, self.values = {}, {}
        self._is_checked = False  # whether all evaluate alike
        parts = self.checkpoint and f"{self.checkpoint}.parts"
        self._log = ResultLog(parts, self.settings)
        self._is_saved = bool(self.checkpoint and self.checkpoint.exists())
        if self._is_saved:
            self._read()

    def __len__(self):
        return len(self.values)

    def __call__(self, plan):
        """Objectives of a plan, from before where it was evaluated."""
        return self.evaluate_all([plan])[0]

    def evaluate_all(self, plans):
        """Objectives of some plans; processes share those that are new.

        Arguments
        ---------
        plans : sequence of dict

        Returns
        -------
        list of tuple
            Error and size of each plan.
        """
        keys = [tuple(plan[gene] for gene in self.genes) for plan in plans]
        self._evaluate([key for key in keys if key not in self.known])
        for key, plan in zip(keys, plans):
            if not all(map(math.isfinite, self.known[key])):
                raise ValueError(f"{self.known[key]} for the plan {plan}")
            self.values[key] = self.known[key]
        return [self.values[key] for key in keys]

    def _evaluate(self, keys):
        """Come to know plans."""
        if not keys:
            return

        def objectives(key):
            error, size = self.evaluate(dict(zip(self.genes, key)))
            return [float(error), float(size)]

        witnesses = [] if self._is_checked else keys[:1]
        costs = dict.fromkeys(keys, 1.0)
        results = share(costs, objectives, self._log, witnesses)
        self.known |= {key: tuple(values) for key, values in results.items()}
        self._is_checked = True
        self._is_saved = False

    def within(self, plans, budget):
        """As many of some plans, in order, as a budget allows to evaluate."""
        new, allowed = set(), []
        for plan in plans:
            if len(self) + len(new) >= budget:
                break
            key = tuple(plan[gene] for gene in self.genes)
            new |= {key} - set(self.values)
            allowed.append(plan)
        return allowed

    def all(self):
        """Everything evaluated, in order."""
        return [
            Evaluation(dict(zip(self.genes, key)), *values)
            for key, values in self.values.items()
        ]

    def front(self):
        """What nothing else beats."""
        return pareto_front(self.all())

    def save(self):
        """Write the checkpoint, whole, where there is one."""
        if self.checkpoint is None or self._is_saved:
            return
        if process()[0] == 0:
            self._write()
        self._log.forget()
        self._is_saved = True

    def _write(self):
        """Write the checkpoint."""
        rows = [[list(key), *value] for key, value in self.known.items()]
        content = {"settings": self.settings, "evaluations": rows}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.checkpoint, json.dumps(content))

    def _read(self):
        """Take over the evaluations of a checkpoint of the same search."""
        try:
            content = strict_json(read_text(self.checkpoint))
            settings, rows = content["settings"], content["evaluations"]
            stored = {
                tuple(key): (float(error), float(size))
                for key, error, size in rows
            }
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of a search ({error}): "
                "delete it"
            ) from error
        for name, value in self.settings.items():
            if settings.get(name) != json.loads(json.dumps(value)):
                raise ValueError(
                    f"{self.checkpoint} is of another search: its {name} "
                    "differ; delete it or name another file"
                )
        self.known = stored


@dataclass(frozen=True)
class Evolution:
    """How NSGA-II goes on from generation to generation.

    The defaults are those of https://github.com/alecerio/nas-nsnet2, by an
    author of https://arxiv.org/abs/2402.12263, which does not name its own.

    Example
    -------
    >>> Evolution(population=1)
    Traceback (most recent call last):
    ...
    ValueError: give a population of 2 or more, and a generation
    """

    # The first generation is random; population x generations is the most
    # that is evaluated.
    population: int = 25
    generations: int = 50
    seed: int = 1
    # Share of the new plans that mutate, and eta of polynomial mutation. At
    # an eta of 20 few genes of seven candidates change; (1, 3) found better
    # fronts in every comparison here.
    mutation: tuple = (0.2, 20)
    # Plans with more are ranked behind all others: without it, much of the
    # population may stay where size is least and nothing works.
    largest_error: float | None = None

    def __post_init__(self):
        if self.population < 2 or self.generations < 1:
            raise ValueError("give a population of 2 or more, and a generation")

    @property
    def settings(self):
        """What tells one search from another; it may go on for longer."""
        return {
            "population": self.population,
            "seed": self.seed,
            "mutation": list(self.mutation),
            "largest_error": self.largest_error,
        }


def search(
    evaluate,
    genes,
    candidate_bits=CANDIDATE_BITS,
    evolution=None,
    initial=(),
    checkpoint=None,
    settings=None,
    progress=None,
) -> Evaluations:
    """NSGA-II over bit plans.

    Two-point crossover and polynomial mutation of integer genes, no plan
    twice.

    Arguments
    ---------
    evaluate : callable
        Takes a plan (dict of str -> int), returns (error, size), both better
        when lower. The same plan must get the same values.
    genes : sequence of str
    candidate_bits : sequence of int
        In rising order.
    evolution : Evolution or None
        Population, generations, seed, mutation; None: `Evolution()`.
    initial : sequence of dict
        Plans to put into the first generation.
    checkpoint : str or Path or None
        Written after every generation; a search with the same settings goes
        on from there.
    settings : dict or None
        What else tells this search from others, such as the network's name;
        JSON. Other settings in the checkpoint are an error.
    progress : bool or None
        Show a progress bar; None shows it on terminals only.

    Example
    -------
    >>> def evaluate(plan):
    ...     return sum(2.0**-bits for bits in plan.values()), plan["a"]
    >>> found = search(evaluate, ["a", "b"], evolution=Evolution(generations=5))
    >>> [item.plan for item in found.front()][:2]
    [{'a': 2, 'b': 8}, {'a': 3, 'b': 8}]
    """
    candidates, evolution = _checked(candidate_bits), evolution or Evolution()
    seen = Evaluations(
        evaluate,
        genes,
        checkpoint,
        {
            "candidate_bits": candidates,
            **evolution.settings,
            "initial": [_codes(plan, genes, candidates) for plan in initial],
            **(settings or {}),
        },
    )
    algorithm = _algorithm(seen.settings, candidates, evolution.generations)
    most = evolution.largest_error
    limit = math.inf if most is None else most
    hidden = None if progress is None else not progress
    with tqdm(
        total=evolution.generations, desc="NSGA-II", unit="gen", disable=hidden
    ) as bar:
        while algorithm.has_next():
            individuals = algorithm.ask()
            plans = [
                dict(zip(seen.genes, (candidates[c] for c in individual.X)))
                for individual in individuals
            ]
            values = seen.evaluate_all(plans)
            for individual, objectives in zip(individuals, values):
                objectives = np.array(objectives)
                individual.F = objectives
                individual.G = objectives[:1] - limit  # above 0: infeasible
                individual.evaluated.update(("F", "G"))
            algorithm.tell(infills=individuals)
            seen.save()
            bar.set_postfix(plans=len(seen), front=len(seen.front()))
            bar.update()
    return seen


def random_search(
    evaluate,
    genes,
    budget,
    candidate_bits=CANDIDATE_BITS,
    seed=1,
    checkpoint=None,
    settings=None,
):
    """As many plans as the budget allows, each gene drawn evenly.

    Example
    -------
    >>> len(random_search(lambda plan: (1, plan["a"]), ["a"], budget=5))
    5
    """
    candidates, rng = _checked(candidate_bits), np.random.default_rng(seed)
    settings = {"candidate_bits": candidates, "seed": seed, **(settings or {})}
    seen = Evaluations(evaluate, genes, checkpoint, settings)
    drawn = {}
    while len(drawn) < min(budget, len(candidates) ** len(seen.genes)):
        bits = tuple(rng.choice(candidates, len(seen.genes)).tolist())
        drawn[bits] = dict(zip(seen.genes, bits))
    seen.evaluate_all(list(drawn.values()))
    seen.save()
    return seen


def greedy_descent(
    evaluate,
    genes,
    budget,
    candidate_bits=CANDIDATE_BITS,
    checkpoint=None,
    settings=None,
):
    """From most bits down, one gene by one step at a time.

    Each round tries every gene one step lower, and takes the step that adds
    the least error for what it saves.

    Example
    -------
    >>> def evaluate(plan):
    ...     return 1 / plan["a"] + 9 / plan["b"], plan["a"] + plan["b"]
    >>> greedy_descent(evaluate, ["a", "b"], 5).front()[0].plan
    {'a': 6, 'b': 8}
    """
    candidates = _checked(candidate_bits)
    settings = {"candidate_bits": candidates, **(settings or {})}
    seen = Evaluations(evaluate, genes, checkpoint, settings)
    plan = dict.fromkeys(seen.genes, candidates[-1])
    error, size = seen(plan)
    while len(seen) < budget:
        lower = []
        for gene in seen.genes:
            place = candidates.index(plan[gene])
            if place:
                lower.append({**plan, gene: candidates[place - 1]})
        lower = seen.within(lower, budget)
        steps = []
        for step, values in zip(lower, seen.evaluate_all(lower)):
            new_error, new_size = values
            saved = max(size - new_size, 1e-9)
            steps.append(((new_error - error) / saved, new_error, step))
        if not steps:
            break
        _, error, plan = min(steps, key=lambda step: step[:2])
        _, size = seen(plan)
    seen.save()
    return seen


def additive_search(
    evaluate, genes, budget, candidate_bits=CANDIDATE_BITS, score=None
):
    """Plans from what each gene costs alone: scores, then a knapsack.

    Every gene is lowered alone; that what is lost adds up is then taken for
    granted. The plans on the lower hull of summed score against size are
    evaluated, evenly spread, for what is left of the budget. `score` is
    another loss to add up than `evaluate`'s; its evaluations count, but are
    not among those that are returned.

    Example
    -------
    >>> def evaluate(plan):
    ...     return 1 / plan["a"] + 9 / plan["b"], plan["a"] + plan["b"]
    >>> found = additive_search(evaluate, ["a", "b"], 25)
    >>> found.front()[0].plan, found.front()[-1].plan
    ({'a': 2, 'b': 2}, {'a': 8, 'b': 8})
    """
    candidates, seen = _checked(candidate_bits), Evaluations(evaluate, genes)
    full = dict.fromkeys(seen.genes, candidates[-1])
    left = budget - 1 - len(seen.genes) * (len(candidates) - 1)
    if left < 1:
        raise ValueError(
            f"the scores alone take {budget - left} evaluations: give a "
            f"budget beyond {budget - left}, not {budget}"
        )
    score = seen if score is None else score
    alone = {
        (gene, bits): {**full, gene: bits}
        for gene in seen.genes
        for bits in candidates
    }
    plans = [full, *alone.values()]
    results = (
        score.evaluate_all(plans)
        if isinstance(score, Evaluations)
        else [score(plan) for plan in plans]
    )
    base, losses, sizes = results[0][0], {}, {}
    for place, (value, size) in zip(alone, results[1:]):
        losses[place], sizes[place] = value - base, size
    hull = _hull_plans(seen.genes, candidates, losses, sizes)
    spread = np.linspace(0, len(hull) - 1, min(left, len(hull)))
    chosen = spread.round().astype(int).tolist()
    seen.evaluate_all([hull[place] for place in chosen])
    return seen


def homogeneous(evaluate, genes, candidate_bits=CANDIDATE_BITS) -> Evaluations:
    """The same bits for all genes.

    Arguments
    ---------
    evaluate : callable
        As for `search`.
    genes : sequence of str
    candidate_bits : sequence of int

    Example
    -------
    >>> len(homogeneous(lambda plan: (1, plan["a"]), ["a", "b"]))
    7
    """
    seen = Evaluations(evaluate, genes)
    candidates = _checked(candidate_bits)
    seen.evaluate_all([dict.fromkeys(seen.genes, bits) for bits in candidates])
    return seen


def pareto_front(evaluations):
    """What no other evaluation beats in one objective and equals in the other.

    Example
    -------
    >>> items = [Evaluation({}, 0.1, 9), Evaluation({}, 0.1, 8)]
    >>> pareto_front([*items, Evaluation({}, 0.3, 4), Evaluation({}, 0.4, 5)])
    [Evaluation(plan={}, error=0.3, size=4), Evaluation(plan={}, error=0.1, ...
    """
    front = []
    for item in sorted(evaluations, key=lambda item: (item.size, item.error)):
        if not front or item.error < front[-1].error:
            front.append(item)
    return front


def smallest_within(evaluations, largest_error):
    """The smallest plan with an error up to some value; None without any.

    Example
    -------
    >>> items = [Evaluation({}, 0.1, 9), Evaluation({}, 0.2, 8)]
    >>> smallest_within(items, 0.15)
    Evaluation(plan={}, error=0.1, size=9)
    """
    allowed = [item for item in evaluations if item.error <= largest_error]
    return min(allowed, key=lambda item: item.size, default=None)


def hypervolume(evaluations, reference):
    """Area between a front and a reference point.

    Example
    -------
    >>> items = [Evaluation({}, 0.5, 1.0), Evaluation({}, 0.0, 3.0)]
    >>> hypervolume(items, (1.0, 4.0))
    2.0
    """
    area, (highest, largest) = 0.0, reference
    for item in pareto_front(evaluations):
        if item.size < largest and item.error < highest:
            area += (highest - item.error) * (largest - item.size)
            highest = item.error
    return area


def evaluations_until(volume, evaluations, reference):
    """How many evaluations, in order, a search took to a hypervolume.

    Arguments
    ---------
    volume : float
    evaluations : sequence of Evaluation
        In the order in which they were made.
    reference : tuple of float
        Error and size, as for `hypervolume`.

    Returns
    -------
    int or None
        None where it was not reached.

    Example
    -------
    >>> items = [Evaluation({}, 0.5, 1.0), Evaluation({}, 0.0, 3.0)]
    >>> evaluations_until(1.5, items, (1.0, 4.0))
    1
    >>> evaluations_until(2.5, items, (1.0, 4.0)) is None
    True
    """
    counts = range(len(evaluations) + 1)
    needed = bisect_left(
        counts,
        volume,
        key=lambda count: hypervolume(evaluations[:count], reference),
    )
    return needed if needed < len(counts) else None


def plot_fronts(fronts, path, size_label="bytes", error_label="error"):
    """Draw fronts, each as a line of steps."""
    figure, axes = _figure()
    for label, evaluations in fronts.items():
        front = pareto_front(evaluations)
        sizes = [item.size for item in front]
        errors = [item.error for item in front]
        style = {"where": "post", "marker": ".", "alpha": 0.8}
        axes.step(sizes, errors, label=label, **style)
    axes.set(xlabel=size_label, ylabel=error_label)
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path, bbox_inches="tight")


def plot_genomes(front, path):
    """Draw the plans of a front, like next to like, under a dendrogram."""
    from scipy.cluster.hierarchy import dendrogram, linkage

    if len(front) < 2:
        raise ValueError("a dendrogram needs two plans or more")
    genes = list(front[0].plan)
    bits = np.array([[item.plan[gene] for gene in genes] for item in front])
    figure, (tree, axes) = _figure(2, gridspec_kw={"height_ratios": [1, 3]})
    drawn = dendrogram(linkage(bits, "average"), ax=tree, no_labels=True)
    order = drawn["leaves"]
    image = axes.imshow(bits[order].T, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(genes)), genes)
    sizes = [f"{front[place].size:.0f}" for place in order]
    axes.set_xticks(range(len(order)), sizes, rotation=90)
    axes.set_xlabel("size")
    tree.set_ylabel("distance in bits")
    figure.colorbar(image, ax=axes, label="bits", orientation="horizontal")
    save_figure(figure, path, bbox_inches="tight")


def _figure(rows=1, **options):
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, **options)


def _checked(candidate_bits):
    """The candidates as a list in rising order."""
    candidates = [int(bits) for bits in candidate_bits]
    if len(candidates) < 2 or candidates != sorted(set(candidates)):
        raise ValueError(
            f"candidate bits rise and are two or more, not {candidate_bits}"
        )
    return candidates


def _codes(plan, genes, candidates):
    """A plan as integer genes."""
    if set(plan) != set(genes):
        foreign = sorted(set(plan) ^ set(genes))
        raise ValueError(f"a plan of another network: {foreign[:3]}")
    return [candidates.index(plan[gene]) for gene in genes]


def _algorithm(settings, candidates, generations):
    """pymoo's NSGA-II, ready to be asked."""
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem
        from pymoo.operators.crossover.pntx import TwoPointCrossover
        from pymoo.operators.mutation.pm import PolynomialMutation
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.operators.sampling.rnd import IntegerRandomSampling
    except ImportError as error:
        raise ImportError(
            "NSGA-II needs pymoo: pip install speechbrain_mpq[search]"
        ) from error
    genes = len(settings["genes"])
    probability, eta = settings["mutation"]
    problem = Problem(
        n_var=genes,
        n_obj=2,
        n_ieq_constr=1,
        xl=0,
        xu=len(candidates) - 1,
        vtype=int,
    )
    sampling = IntegerRandomSampling()
    if settings["initial"]:
        rng = np.random.default_rng(settings["seed"])
        drawn = rng.integers(
            len(candidates), size=(settings["population"], genes)
        )
        initial = np.array(settings["initial"])[: len(drawn)]
        drawn[: len(initial)] = initial
        sampling = drawn
    algorithm = NSGA2(
        pop_size=settings["population"],
        sampling=sampling,
        crossover=TwoPointCrossover(),
        mutation=PolynomialMutation(
            prob=probability, eta=eta, repair=RoundingRepair()
        ),
        eliminate_duplicates=True,
    )
    algorithm.setup(
        problem,
        termination=("n_gen", generations),
        seed=settings["seed"],
        verbose=False,
    )
    return algorithm


def _hull_plans(genes, candidates, losses, sizes):
    """Plans that are best for some price of a byte, largest first."""
    plans = []
    for price in [0.0, *np.logspace(-9, 3, 600).tolist()]:
        plan = {
            gene: min(
                reversed(candidates),
                key=lambda bits, gene=gene: losses[gene, bits]
                + price * sizes[gene, bits],
            )
            for gene in genes
        }
        if plan not in plans:
            plans.append(plan)
    return plans
