"""What the integration tests share, made once however many processes run."""

import os
import shutil

import pytest
from filelock import FileLock
from helpers import CORPUS, ROOMS, TINY, run

from speechbrain_mpq.lobes.models.separator import build_separator
from speechbrain_mpq.simulation.rooms import prepare_rooms


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """A function that makes a folder, or finds what another process made."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of this session's processes

    def make_once(name, make):
        folder, made = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def corpus(once):
    """Speech and rooms for all tests; they work on copies (`data`)."""
    for needed in ("espeakng_loader", "pyroomacoustics"):
        pytest.importorskip(needed)
    from speechbrain_mpq.simulation.corpus import prepare_speech

    def make(folder):
        prepare_speech(folder, **CORPUS, progress=False)
        microphones = build_separator(TINY).features.microphones
        prepare_rooms(folder, ROOMS, microphones, progress=False)

    return once("corpus", make)


def copy(source, folder, ignore=None):
    """A copy that costs no space; its files are replaced, never rewritten."""
    return shutil.copytree(source, folder, ignore=ignore, copy_function=os.link)


@pytest.fixture(scope="session")
def speech(corpus):
    """Copies the speech alone to a folder."""
    rooms = shutil.ignore_patterns("rooms")
    return lambda folder: copy(corpus, folder, rooms)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory, request):
    """The module's folder for experiments, with speech and rooms in data/."""
    folder = tmp_path_factory.mktemp(request.module.__name__)
    copy(corpus, folder / "data")
    return folder


@pytest.fixture(scope="session")
def trained(once, corpus):
    """Results of a training of the tiny separator in full precision."""
    pytest.importorskip("pesq")

    def make(folder):
        copy(corpus, folder / "data")
        run(folder, "pretrain.yaml")

    return once("trained", make) / "results/pretrain_32bit"


@pytest.fixture(scope="session")
def shipped(trained):
    """The packed full-precision separator."""
    return trained / "1234/packed"


@pytest.fixture(scope="session")
def main_job(once, corpus, shipped):
    """A folder with the main job's results and what it printed."""

    def make(folder):
        copy(corpus, folder / "data")
        options = {"pretrained_separator": shipped, "examples": 2}
        printed = run(folder, "kl_4bit.yaml", pictures=True, **options)
        (folder / "printed.txt").write_text(printed)

    return once("main_job", make)


@pytest.fixture(scope="session")
def kl(main_job):
    """Results of the main job."""
    return main_job / "results/kl_4bit/1234"
