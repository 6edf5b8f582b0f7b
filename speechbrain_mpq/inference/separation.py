"""Packed separators in SpeechBrain: its `Pretrained` and its `Pretrainer`.

`QuantizedSeparator` is loaded in one line, `PackedPretrainer` fills a recipe's
modules. A plain Pretrainer works too, with custom_hooks {separator:
!name:speechbrain_mpq.load_packed_} and a path. It looks for separator.ckpt
beside hyperparams.yaml; here the file has the name that other tools know.
"""

import torch
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.fetching import fetch
from speechbrain.utils.parameter_transfer import Pretrainer

from ..quantization.packing import (
    MODEL_FILE,
    check_compatible,
    load_packed_,
    plain_targets,
    read_model,
)
from ..utils import BUNDLED_MODEL, scratch_folder
from .folder import copy_folder, fetch_folder, push_folder
from .interfaces import EngineNetwork, SeparationInterface, load_for_engine


class QuantizedSeparator(SeparationInterface, Pretrained):
    """A separator from a packed folder, for waveforms, files and streams.

    `from_pretrained` is the safe way: it reads one file of weights, whose
    header says in JSON which of our classes to build, and executes nothing.
    `from_hparams` is SpeechBrain's: it builds what hyperparams.yaml says,
    which can be anything.

    Arguments
    ---------
    modules : dict of str -> torch.nn.Module
        "separator": a `Separator`.
    hparams : dict or None
        Of hyperparams.yaml.
    **options
        `run_opts` and `freeze_params` of SpeechBrain's `Pretrained`.

    Example
    -------
    >>> from speechbrain_mpq.inference.folder import save_separator
    >>> from speechbrain_mpq import Separator, SpatialFeatures
    >>> separator = Separator(SpatialFeatures([(8, 1)]), 4, 8, 3, 1, 1)
    >>> folder = save_separator(separator, getfixture("tmpdir"))
    >>> model = QuantizedSeparator.from_pretrained(folder)
    >>> model.microphones
    [1, 8]
    >>> model.separate_batch(torch.zeros(1, 8000, 2), [60.0]).abs().max()
    tensor(0.)
    """

    MODULES_NEEDED = ["separator"]

    def __init__(self, modules=None, hparams=None, **options):
        hparams = dict(hparams or {})
        super().__init__(modules, hparams, **options)
        self.model_file = hparams.get("model_file")
        if self.model_file is None and "pretrainer" in hparams:
            self.model_file = hparams["pretrainer"].paths.get("separator")

    @classmethod
    def from_pretrained(
        cls,
        source=BUNDLED_MODEL,
        engine="torch",
        threads=1,
        device="cpu",
        **hub,
    ) -> "QuantizedSeparator":
        """Load a folder or hub repository; nothing in it is executed.

        Arguments
        ---------
        source : str or Path
            Packed folder, or "user/name" on the hub; the 4-bit separator
            that comes with the package if not given.
        engine : str
            "torch", "openvino" or "onnx": what runs the network.
        threads : int
            Threads of the engine. PyTorch's own are set for the process,
            with `torch.set_num_threads`.
        device : str
            Of PyTorch; other engines run on the CPU.
        **hub
            `revision`, `cache_dir`, `token`, `endpoint` and
            `local_files_only` of `folder.fetch_folder`.
        """
        folder = fetch_folder(source, **hub)
        separator = load_for_engine(folder, engine, threads, device)
        return cls(
            {"separator": separator},
            {"model_file": str(folder / MODEL_FILE)},
            run_opts={"device": str(device)},
        )

    @property
    def separator(self):
        """The `Separator`, in eval mode."""
        return self.mods["separator"]

    def forward(self, waveforms, doa, lips=None):
        """Separate a batch, as `separate_batch` does."""
        return self.separate_batch(waveforms, doa, lips)

    def save_pretrained(self, folder):
        """Save the packed folder again, bit by bit as it was loaded.

        Arguments
        ---------
        folder : str or Path
            Made if it is not there.

        Returns
        -------
        Path
        """
        if self.model_file is None:
            raise ValueError(
                "this separator does not come from a packed folder: write "
                "one with speechbrain_mpq.save_separator"
            )
        packed = read_model(self.model_file)
        self._check_unchanged(packed)
        return copy_folder(packed, folder)

    def push_to_hub(self, repository, **options):
        """Upload the packed folder.

        Arguments
        ---------
        repository : str
            "user/name".
        **options
            `private`, `message`, `revision`, `token` and `endpoint` of
            `hub.push_folder`.

        Returns
        -------
        str
            Address of the commit.
        """
        with scratch_folder() as scratch:  # it holds a lock, too
            self.save_pretrained(scratch / "model")
            return push_folder(scratch / "model", repository, **options)

    def _check_unchanged(self, packed):
        """Refuse to pass off the stored weights as others."""
        if isinstance(self.separator.mask_net, EngineNetwork):
            return  # it has no weights that anybody could change
        targets = plain_targets(self.separator)
        check_compatible(packed, targets)
        values = packed.values(targets)
        if any(not torch.equal(values[n], targets[n].cpu()) for n in targets):
            raise ValueError(
                f"the weights are no longer those of {packed.path}: quantize "
                "the separator and write it with speechbrain_mpq."
                "save_separator"
            )


class PackedPretrainer(Pretrainer):
    """Loads model.safetensors beside hyperparams.yaml.

    Arguments
    ---------
    loadables : dict of str -> torch.nn.Module
        One module, under any name.
    collect_in : str or Path or None
        Folder for the file; None: where the hub's client keeps it.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import save_packed
    >>> folder = getfixture("tmpdir")
    >>> _ = save_packed(torch.nn.Linear(2, 1), str(folder))
    >>> layer = torch.nn.Linear(2, 1)
    >>> pretrainer = PackedPretrainer({"layer": layer})
    >>> _ = pretrainer.collect_files(default_source=str(folder))
    >>> pretrainer.load_collected()
    """

    def __init__(self, loadables, collect_in=None):
        if len(loadables) != 1:
            raise ValueError(
                f"a packed folder holds one model, not {sorted(loadables)}"
            )
        hooks = dict.fromkeys(loadables, load_packed_)
        super().__init__(collect_in, loadables, custom_hooks=hooks)

    def collect_files(self, default_source=None, **how):
        """Fetch the file.

        Arguments
        ---------
        default_source : str or Path or FetchSource
            Folder or hub name.
        **how
            What `speechbrain.utils.fetching.fetch` takes.

        Returns
        -------
        dict of str -> Path
            Loadable -> local file.
        """
        if default_source is None:
            raise ValueError("name the folder or hub repository as a source")
        if self.collect_in is not None:
            self.collect_in.mkdir(parents=True, exist_ok=True)
        path = fetch(MODEL_FILE, default_source, savedir=self.collect_in, **how)
        (name,) = self.loadables
        self.paths[name] = str(path)
        self.is_local.append(name)
        return {name: path}
