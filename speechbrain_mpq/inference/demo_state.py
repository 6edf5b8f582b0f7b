"""What the demo page works on: models, recordings, separated speech."""

import threading
import time
from itertools import count
from pathlib import Path

from ..quantization.unpacking import read_model
from .audio import AudioError
from .output import TargetOutput

MAX_SECONDS = 120.0  # of a recording; longer ones are for `separate`
MOST_UPLOADS = 16  # older ones are forgotten
MOST_RESULTS = 64


class Demo:
    """Models, recordings and results of one page.

    Everything is kept in files of a scratch folder, which are named by
    numbers: no name that comes from outside ever becomes a path.

    Arguments
    ---------
    models : dict
        Name -> QuantizedSeparator; all for the same array.
    scratch : str or Path
        Folder for audio, which the caller deletes.
    """

    def __init__(self, models, scratch):
        self.models = models
        self.scratch = Path(scratch)
        self._first = next(iter(models.values()))
        self._recordings, self._results = {}, {}
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._facts = [_facts(name, model) for name, model in models.items()]
        for name, model in models.items():
            if model.microphones != self.microphones:
                raise ValueError(
                    f"{name} uses microphones {model.microphones}, the first "
                    f"model {self.microphones}: compare models of one array"
                )

    @property
    def microphones(self):
        """Numbers of the microphones that the models use."""
        return self._first.microphones

    def state(self):
        """All that the page shows before anything is separated.

        Returns
        -------
        state : dict
            For JSON.
        """
        return {
            "models": self._facts,
            # A list first: another thread may add one
            "recordings": [r["shown"] for r in list(self._recordings.values())],
            "microphones": self.microphones,
            "array_size": self._first.separator.features.array_size,
            "max_seconds": MAX_SECONDS,
        }

    def add_recording(self, path, name, doas=(), uploaded=False):
        """Offer a recording on the page.

        Arguments
        ---------
        path : str or Path
            Multichannel audio.
        name : str
            What the page calls it.
        doas : sequence of float
            Directions of the talkers, where they are known.
        uploaded : bool
            The page may forget and delete it.

        Returns
        -------
        shown : dict
            For JSON: id, name, seconds, doas, audio, warnings.
        """
        audio = self._first.open_audio(path, name)
        if audio.seconds > MAX_SECONDS:
            raise AudioError(
                name,
                f"{audio.seconds:.0f} s long",
                f"the page takes up to {MAX_SECONDS:.0f} s: cut it, or use "
                "`speechbrain-mpq separate`",
            )
        survey = audio.survey()
        number = str(next(self._numbers))
        self._write_reference(audio, number)
        shown = {
            "id": number,
            "name": name,
            "seconds": round(audio.seconds, 3),
            "doas": [round(doa, 1) for doa in doas],
            "audio": f"/audio/{number}.wav",
            "warnings": list(survey.warnings),
        }
        entry = {"shown": shown, "path": Path(path), "uploaded": uploaded}
        self._recordings[number] = entry
        self._forget_uploads()
        return shown

    def separate(self, recording, model, doa):
        """Separate the talker at a direction.

        Arguments
        ---------
        recording : str
            Its id.
        model : str
            Its name.
        doa : float
            Degrees.

        Returns
        -------
        result : dict
            For JSON: audio, seconds that it took, times real time.
        """
        if recording not in self._recordings:
            raise ValueError("this recording is no longer there: add it again")
        if model not in self.models:
            raise ValueError(f"there is no model {model!r}")
        entry = self._recordings[recording]
        audio = self.models[model].open_audio(entry["path"])
        with self._lock:  # times of two at once would mean nothing
            number = str(next(self._numbers))
            start = time.perf_counter()
            path = self.scratch / f"{number}.wav"
            self.models[model].separate_file(audio, float(doa), out=path)
            seconds = time.perf_counter() - start
            self._results[number] = path
            self._forget_results()
        return {
            "audio": f"/audio/{number}.wav",
            "seconds": round(seconds, 4),
            "speed": round(audio.seconds / seconds, 1),
        }

    def audio_path(self, number):
        """File of a recording's reference channel or of a result.

        Arguments
        ---------
        number : str

        Returns
        -------
        path : Path or None
            None where there is none.
        """
        if number in self._recordings or number in self._results:
            return self.scratch / f"{number}.wav"
        return None

    def _write_reference(self, audio, number):
        """What the first microphone hears, for the page to play."""
        with TargetOutput(self.scratch / f"{number}.wav") as output:
            for block in audio.blocks():
                output.push(block[:, 0].contiguous(), block[:, 0].contiguous())
            output.finish()

    def _forget_uploads(self):
        """Delete what was uploaded first."""
        kept = list(self._recordings.items())  # other threads may add some
        uploads = [number for number, r in kept if r["uploaded"]]
        for number in uploads[:-MOST_UPLOADS]:
            entry = self._recordings.pop(number, None)
            if entry is None:  # forgotten by another upload
                continue
            entry["path"].unlink(missing_ok=True)
            (self.scratch / f"{number}.wav").unlink(missing_ok=True)

    def _forget_results(self):
        """Delete the oldest results."""
        for number in list(self._results)[:-MOST_RESULTS]:
            self._results.pop(number).unlink(missing_ok=True)


def _facts(name, model):
    """What the page says of a model."""
    packed = read_model(model.model_file)
    tensors = packed.quantized.values()
    values = sum(t.integers.numel() for t in tensors)
    bits = sum(t.bits * t.integers.numel() for t in tensors)
    floats = sum(t.numel() for t in packed.floats.values())
    return {
        "name": name,
        "bytes": packed.path.stat().st_size,
        "bits": round((bits + 32 * floats) / (values + floats), 2),
    }
