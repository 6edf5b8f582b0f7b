"""SpeechBrain's Pretrainer for packed models.

A plain Pretrainer works too, with custom_hooks {separator:
!name:speechbrain_mpq.load_packed_} and a path. It looks for separator.ckpt
beside hyperparams.yaml; here the file has the name that other tools know.
"""

from speechbrain.utils.fetching import fetch
from speechbrain.utils.parameter_transfer import Pretrainer

from ..quantization.packing import MODEL_FILE, load_packed_


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
