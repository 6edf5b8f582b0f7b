"""Work that processes share, and that a kill does not lose.

Under torchrun, with SpeechBrain's DDP, all processes hold the same weights and
the same calibration data. What is to be computed is a set of independent
results with names; each process computes its share of them, and all get all.
As no result depends on who computes it, they are those of one process to the
last digit.

A result is in a file as soon as it is known. Whoever starts again, with
however many processes, takes it from there. Settings tell apart what may be
kept in one folder; that weights and data are the same as well is known by a
few results, the witnesses, which every process computes: they must come out
as they did before, and as they do elsewhere.
"""

import hashlib
import json
from itertools import chain
from pathlib import Path

import torch
from speechbrain.utils.distributed import ddp_prevent_block, get_rank
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

logger = get_logger(__name__)


def process():
    """Which process this is, and how many share the work.

    Inside of SpeechBrain's `run_on_main` the main process is alone.

    Returns
    -------
    rank, count : int

    Example
    -------
    >>> process()
    (0, 1)
    """
    if ddp_prevent_block():
        return 0, 1
    return get_rank(), torch.distributed.get_world_size()


def leave():
    """End the work of the processes together, before a program ends well.

    PyTorch aborts a process now and then that ends without it (its issue
    190489). After an error it could wait for ever for processes that still
    exchange results; torchrun ends those.

    Example
    -------
    >>> leave()  # a process alone has nothing to leave
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gathered(value):
    """What each process has, for all of them.

    Arguments
    ---------
    value : object
        That of this process; it must be possible to pickle it.

    Returns
    -------
    list
        One value for each process.

    Example
    -------
    >>> gathered("alone")
    ['alone']
    """
    _, count = process()
    if count == 1:
        return [value]
    values = [None] * count
    torch.distributed.all_gather_object(values, value)
    return values


def shares(costs, count):
    """Divide work among processes: neighbours go to the same one.

    Arguments
    ---------
    costs : dict
        Name -> what it costs, in any unit.
    count : int
        Processes.

    Returns
    -------
    list of list
        Names of each process, in their order.

    Example
    -------
    >>> shares({"a": 3.0, "b": 1.0, "c": 1.0, "d": 1.0}, 2)
    [['a'], ['b', 'c', 'd']]
    """
    total, before = sum(costs.values()), 0.0
    parts = [[] for _ in range(count)]
    for name, cost in costs.items():
        # By its middle, so that no process is ahead by more than half of one.
        middle = (before + cost / 2) / total if total else 0.0
        parts[min(int(middle * count), count - 1)].append(name)
        before += cost
    return parts


def digest(tensor):
    """SHA-256 of a tensor's values, in hexadecimal.

    Example
    -------
    >>> digest(torch.zeros(1))[:8]
    'df3f6198'
    """
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy()).hexdigest()


def weights_digest(module):
    """SHA-256 of a module's parameters and buffers, in hexadecimal.

    A search that goes on must be of the same weights: other ones make other
    errors.

    Arguments
    ---------
    module : torch.nn.Module

    Returns
    -------
    str

    Example
    -------
    >>> weights_digest(torch.nn.Identity())[:8]
    'e3b0c442'
    """
    sha256 = hashlib.sha256()
    for name, tensor in chain(
        module.named_parameters(), module.named_buffers()
    ):
        sha256.update(name.encode())
        content = tensor.detach().cpu().flatten().view(torch.uint8)
        sha256.update(content.numpy().tobytes())
    return sha256.hexdigest()


class ResultLog:
    """Results in files, one for each process, that a new start goes on with.

    A line is written for each result, at once: a kill loses none but the one
    that is being written. To be made, like everything here that processes do
    together, by all of them.

    Arguments
    ---------
    folder : str or Path or None
        Made with the first result; None: nothing is kept.
    settings : object
        What results depend on besides weights and data, for JSON: those of
        other settings are left alone.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> ResultLog(folder, {"bits": 2}).add(("layer", 0), [0.1])
    >>> log = ResultLog(folder, {"bits": 2})
    >>> log.known, ResultLog(folder, {"bits": 3}).known
    ({('layer', 0): [0.1]}, {})
    >>> log.forget()
    >>> ResultLog(folder, {"bits": 2}).known
    {}
    """

    def __init__(self, folder, settings):
        self.known = {}  # name, a str or a flat tuple -> result
        self._file = self._path = None
        if folder is None:
            return
        text = json.dumps(settings, sort_keys=True)
        self._name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._path = Path(folder, f"{self._name}.{process()[0]}.jsonl")
        own = {}
        for path in sorted(self._path.parent.glob(f"{self._name}.*.jsonl")):
            own.update(_read_lines(path))
        for results in gathered(own):  # folders may be of one machine each
            self.known.update(results)

    def add(self, name, result):
        """Keep a result."""
        self.known[name] = result
        if self._path is None:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab")  # noqa: SIM115
            self._file.truncate(_whole_bytes(self._path))
        line = json.dumps([name, result], separators=(",", ":"))
        self._file.write(line.encode() + b"\n")
        self._file.flush()  # it is in the system's hands now

    def forget(self):
        """Delete all results of these settings."""
        self.close()
        self.known = {}
        if self._path is not None:
            for path in self._path.parent.glob(f"{self._name}.*.jsonl"):
                path.unlink(missing_ok=True)
        gathered(None)  # nobody writes anew before all have deleted

    def close(self):
        """Write no more."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _whole_bytes(path):
    """Length of a file without a last line that was cut short by a kill."""
    return path.read_bytes().rfind(b"\n") + 1


def _read_lines(path):
    """The results in a file."""
    lines = path.read_bytes()[: _whole_bytes(path)].splitlines()
    try:
        rows = [json.loads(line) for line in lines]
        return {_name(name): result for name, result in rows}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} holds no results of an earlier start ({error}): delete it"
        ) from error


def _name(name):
    """A name as it was before JSON made a list of it."""
    return tuple(name) if isinstance(name, list) else name


def share(
    costs,
    compute,
    log=None,
    witnesses=(),
    title="",
    progress=False,
    order=None,
):
    """All results, each one computed by one of the processes.

    Arguments
    ---------
    costs : dict
        Name of each result -> what it costs; names that follow each other are
        computed by the same process where possible.
    compute : callable
        Name -> result: numbers, strings and lists of them.
    log : ResultLog or None
        Where results are kept, and taken from.
    witnesses : sequence of str
        Names of results that every process computes.
    title : str
        Of the progress bar.
    progress : bool
        Shows one, of the main process's own share.
    order : callable or None
        Name -> what a process sorts its own share by; None: as in the costs.

    Returns
    -------
    dict
        Name -> result, in the order of the costs.

    Example
    -------
    >>> share({"a": 1, "b": 1}, str.upper)
    {'a': 'A', 'b': 'B'}
    """
    log = ResultLog(None, None) if log is None else log
    rank, count = process()
    results = _witnessed(compute, log, witnesses)
    left = {name: c for name, c in costs.items() if name not in results}
    own = {}
    hidden = rank or not progress
    mine = shares(left, count)[rank]
    mine = sorted(mine, key=order) if order else mine
    for name in tqdm(mine, title, disable=hidden):
        own[name] = compute(name)
        log.add(name, own[name])
    for part in gathered(own):
        results |= part
    return {name: results[name] for name in costs}


def _witnessed(compute, log, witnesses):
    """What an earlier start has left, and witnesses; refused unless alike."""
    results = {name: compute(name) for name in witnesses}
    for other, theirs in enumerate(gathered(results)):
        if repr(theirs) != repr(results):
            raise ValueError(
                f"processes {process()[0]} and {other} find other results for "
                f"{', '.join(map(str, results))}: give all processes the same "
                "weights, the same data and the same number of threads"
            )
    old = {name: log.known[name] for name in results if name in log.known}
    if any(repr(results[name]) != repr(old[name]) for name in old):
        logger.warning(
            "What an earlier start has left is of other weights or data: "
            "scoring anew"
        )
        log.forget()
    for name in results:
        if name not in log.known:
            log.add(name, results[name])
    return dict(log.known)
