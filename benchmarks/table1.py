"""Run the eleven systems of the paper's Table 1 and print the table.

> python benchmarks/table1.py
> python benchmarks/table1.py --seed 1 2 3 --jobs 2 --results_folder results

Options that are not known here go to train.py as they are. Every system is
one `python train.py ...`, whose output is kept in `<results_folder>/logs`.
What was interrupted continues when started again, what is finished is only
checked. A failing system does not stop the others; the exit status is 1 then.
What train.py refuses, as an option that it does not have, stops all at once.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from speechbrain_mpq.evaluation.results_table import results_table
from speechbrain_mpq.evaluation.runs import load_run, table_order
from speechbrain_mpq.signals import exit_on_signals

ROOT = Path(__file__).parents[1]
TRAIN = (sys.executable, "train.py")
FILES = {
    "fp32": "hparams/fp32.yaml",
    "uniform": "hparams/uniform_4bit.yaml",
    "hes": "hparams/hes_4bit.yaml",
    "kl": "hparams/kl_4bit.yaml",
    "nas": "hparams/nas_4bit.yaml",
}
# A system is run when those of the stages before it, on its seed, have ended:
# they are its baselines and the prototypes that it inherits from.
STAGES = (
    (("fp32", 32),),
    (("uniform", 2), ("uniform", 4), ("uniform", 8), ("uniform", 16)),
    tuple((name, bits) for name in ("hes", "kl", "nas") for bits in (4, 8)),
)
OWN_KEYS = ("bits", "system", "output_folder")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


_TOLD = re.compile(r"^Look and listen: (.*)/report\.html$", re.MULTILINE)
REFUSED = 2  # exit status of train.py where it has not begun
_RUNNING = set()  # processes of jobs


class Refusal(Exception):
    """What train.py said to a command line that it cannot mean."""


@dataclass(frozen=True)
class Job:
    """One system with one seed."""

    system: str
    bits: int
    seed: int
    stage: int

    @property
    def name(self):
        """Name of its folder and, with the seed, of its log."""
        return f"{self.system}_{self.bits}bit"

    def waits_for(self, other, first):
        """Whether another job must have ended before this one starts.

        The very first prepares the data, which two must not do at once.
        """
        if self == first:
            return False
        earlier = other.seed == self.seed and other.stage < self.stage
        return earlier or other == first

    def command(self, program, results_folder, overrides):
        """Its command line."""
        return [
            *program,
            FILES[self.system],
            *("--bits", str(self.bits), "--seed", str(self.seed)),
            *("--results_folder", str(results_folder), *overrides),
        ]

    def folder(self, results_folder, output=""):
        """Where train.py left its results, by what it said of it."""
        folders = _TOLD.findall(output)
        if folders:
            return ROOT / folders[-1]
        return ROOT / results_folder / self.name / str(self.seed)


def all_jobs(seeds):
    """Jobs of all systems and seeds, in the order in which they are begun."""
    return [
        Job(*system, seed, stage)
        for stage, systems in enumerate(STAGES)
        for seed in seeds
        for system in systems
    ]


def run_all(jobs, start, limit=1, report=print):
    """Run jobs, several at a time; return the failed ones.

    Once a job has failed, one runs at a time: those that need it try to run
    it again themselves, and two must not do that at once.

    Arguments
    ---------
    jobs : list of Job
        In the order in which they are begun.
    start : callable
        Runs a job to its end; returns whether it went well, and a remark.
    limit : int
        Jobs at a time.
    report : callable
        Takes a line about each job that has ended.

    Returns
    -------
    failed : list of Job
    """
    waiting, running, ended, failed = list(jobs), {}, set(), []
    with ThreadPoolExecutor(limit) as pool, _jobs_end_with_it():
        while waiting or running:
            for job in list(waiting):
                if len(running) >= (1 if failed else limit):
                    break
                if all(
                    other in ended
                    for other in jobs
                    if job.waits_for(other, jobs[0])
                ):
                    running[pool.submit(start, job)] = job
                    waiting.remove(job)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                went_well, remark = future.result()
                ended.add(job)
                if not went_well:
                    failed.append(job)
                count = f"[{len(ended):{len(str(len(jobs)))}}/{len(jobs)}]"
                report(f"{count} {job.name}, seed {job.seed}: {remark}")
    return [job for job in jobs if job in failed]


@contextmanager
def _jobs_end_with_it():
    """Lets a signal end the jobs, too, which would go on without a parent."""
    try:
        with exit_on_signals():
            yield
    except (KeyboardInterrupt, SystemExit):
        for process in list(_RUNNING):
            process.terminate()
        raise


def _exit_status(command, log):
    """Run a command to its end, with its output in an open file."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT | os.environ,
    ) as process:
        _RUNNING.add(process)
        try:
            return process.wait()
        finally:
            _RUNNING.discard(process)


def run_job(job, program, results_folder, overrides):
    """Run one system to its end.

    Returns whether it went well, a remark, and the folder of its results.
    """
    folder = job.folder(results_folder)
    log = folder.parents[1] / "logs" / f"{job.name}_{job.seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = log.stat().st_size if log.exists() else 0
    now, started = time.time(), time.perf_counter()
    with open(log, "a", encoding="utf-8") as output:
        command = job.command(program, results_folder, overrides)
        code = _exit_status(command, output)
    output = log.read_bytes()[before:].decode(errors="replace")
    if code == REFUSED:
        raise Refusal(output.splitlines()[-1])
    seconds = f"{time.perf_counter() - started:.0f} s"
    if code:
        remark = f"FAILED with status {code} after {seconds}, see {log}"
        return False, remark, folder
    folder = job.folder(results_folder, output)
    try:
        average = load_run(folder)["average"]
        known = (folder / "metrics.json").stat().st_mtime < now
    except (ValueError, OSError) as error:
        return False, f"FAILED after {seconds}: {error}", folder
    scores = ", ".join(
        f"{title} {average[key]:.2f}{unit}"
        for title, key, unit in (
            ("SI-SNR", "si_snr", " dB"),
            ("WER", "wer", " %"),
        )
        if average[key] is not None
    )
    how = "finished already" if known else f"done in {seconds}"
    return True, f"{how}: {scores}", folder


def read_options(arguments=None):
    """Options of this script, and the overrides for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--seed", nargs="+", type=int, default=[1234])
    parser.add_argument(
        "--results_folder", default="results", help="within the repository"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--wide",
        action="store_true",
        help="every bucket of angles in the table",
    )
    options, overrides = parser.parse_known_args(arguments)
    for text in overrides:
        key = text.split("=")[0].removeprefix("--")
        if text.startswith("--") and key in OWN_KEYS:
            parser.error(f"--{key} is set for every system here: leave it out")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if len(set(options.seed)) < len(options.seed):
        parser.error("--seed names a seed twice")
    return options, overrides


def main(arguments=None, program=TRAIN):
    """Run what the command line asks for; return the exit status."""
    options, overrides = read_options(arguments)
    jobs = all_jobs(options.seed)

    folders = {}

    def start(job):
        went_well, remark, folders[job] = run_job(
            job, program, options.results_folder, overrides
        )
        return went_well, remark

    def report(line):
        print(line, flush=True)

    try:
        failed = run_all(jobs, start, options.jobs, report)
    except Refusal as refusal:
        print(f"stopped: {refusal}", file=sys.stderr)
        return REFUSED
    done = [job for job in jobs if job not in failed]
    if done:
        runs = [load_run(folders[job]) for job in done]
        runs = sorted(runs, key=table_order)
        print(results_table(runs, wide=options.wide))
    if failed:
        names = ", ".join(f"{job.name} (seed {job.seed})" for job in failed)
        print(f"{len(failed)} of {len(jobs)} failed: {names}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
