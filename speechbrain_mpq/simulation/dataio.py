"""Data of the separation experiment, as its hparams file asks for it."""

import sys

import torch
from speechbrain.utils.logger import get_logger

from .bank import RoomBank, prepare_rooms
from .datasets import listed_mixtures, training_mixtures
from .device_mixing import DeviceMixer
from .lip_videos import videos_of_splits
from .mixtures import MixtureMaker, fixed_mixtures, load_speech

logger = get_logger(__name__)


def prepare_data(hparams):
    """Speak the corpus and simulate the rooms, or what is missing of them.

    Arguments
    ---------
    hparams : dict
        Those of the experiment, and the separator's `microphones`.
    """
    folder, seed = hparams["data_folder"], hparams["corpus_seed"]
    show = sys.stderr.isatty()
    if not hparams["skip_prep"]:
        from .corpus import prepare_speech

        counts = hparams["utterances"]
        prepare_speech(folder, **counts, seed=seed, progress=show)
    microphones = hparams["microphones"]
    prepare_rooms(folder, hparams["rooms"], microphones, seed, progress=show)


def dataio_prep(hparams):
    """Datasets of the three splits, and the maker of training mixtures.

    Arguments
    ---------
    hparams : dict
        Those of the experiment, and the separator's `lips_size`.

    Returns
    -------
    datasets : dict
        "train", "valid" and "test"; "voices" is "train" before it is mixed,
        for a device that does it.
    maker : MixtureMaker
        Its `epoch` says which training mixtures are drawn.
    """
    folder = hparams["data_folder"]
    makers = {
        split: MixtureMaker(
            load_speech(hparams[f"{split}_speech"], folder),
            RoomBank(folder, split, count),
            seed=hparams["seed" if split == "train" else "corpus_seed"],
            doa_error=hparams["doa_error"],
            mirror=split == "train",
        )
        for split, count in hparams["rooms"].items()
    }
    nominal, measured = makers["test"].rooms.mean_t60()
    logger.info(
        f"Test rooms: T60 {nominal:.2f} s asked for, {measured:.2f} s measured"
    )
    videos = videos_of_splits(makers, hparams.get("lips_size"))
    datasets = {
        split: listed_mixtures(
            makers[split],
            fixed_mixtures(makers[split], hparams["mixtures"][split]),
            videos[split],
        )
        for split in ("valid", "test")
    }
    datasets |= {
        name: training_mixtures(
            makers["train"],
            hparams["chunk_seconds"],
            hparams["mixtures"]["train"],
            videos["train"],
            dry=name == "voices",
        )
        for name in ("train", "voices")
    }
    return datasets, makers["train"]


def device_mixer(hparams, rooms, device):
    """What mixes on the device; None: the loader mixes.

    Arguments
    ---------
    hparams : dict
        `mix_on_device` says True or False; None: where it is a GPU.
    rooms : RoomBank
    device : str or torch.device

    Returns
    -------
    mixer : DeviceMixer or None
    """
    wanted = hparams["mix_on_device"]
    if wanted is None:
        wanted = torch.device(device).type == "cuda"
    if not wanted:
        return None
    logger.info(f"Mixtures for the training are made on {device}")
    return DeviceMixer(rooms, hparams["chunk_seconds"]).to(device)
