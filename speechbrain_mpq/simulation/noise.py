"""Noise: generated from a seed, or cut from folders of recordings.

A noise depends on (seed, epoch, key) alone, as a mixture does: an epoch can
be repeated exactly, and every epoch is different. Waveforms are [samples].
"""

import math
import zlib
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import lfilter, oaconvolve, resample_poly, welch

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff")
HELD_OUT = "wind"  # the type that only tests hear
FRAME = 0.032  # seconds over which speech is called active or not
ACTIVE_RANGE = 40  # dB below the loudest frame, from where on it is a pause
PEAK = 0.99  # of full scale, highest sample of a mixture

# Where the DNS Challenge keeps its noise, by year
DNS_NOISE = (
    "datasets/noise",
    "datasets_fullband/noise_fullband",
    "noise_fullband",
    "noise",
)
DNS_CLEAN = (
    "datasets/clean",
    "datasets_fullband/clean_fullband",
    "clean_fullband",
    "clean",
)


def coloured(rng, samples, sample_rate=16000, exponent=None):
    """Noise whose power falls with a power of the frequency.

    Arguments
    ---------
    rng : numpy.random.Generator
    samples : int
    sample_rate : int
        Hz.
    exponent : float or None
        b of 1/f^b: 0 is white, 1 pink, 2 brown; None draws -0.5 to 2.

    Returns
    -------
    noise : numpy.ndarray
        [samples], RMS 1.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> brown = coloured(rng, 16000, exponent=2)
    >>> power = np.abs(np.fft.rfft(brown)) ** 2
    >>> round(10 * np.log10(power[100:1000].sum() / power[1000:].sum()))
    10
    """
    if exponent is None:
        exponent = rng.uniform(-0.5, 2)
    frequencies = np.fft.rfftfreq(samples, 1 / sample_rate)
    # flat below 20 Hz: nothing is heard there, and 1/f has no end
    gain = np.maximum(frequencies, 20) ** (-exponent / 2)
    spectrum = np.fft.rfft(rng.standard_normal(samples)) * gain
    spectrum[0] = 0
    return _unit(np.fft.irfft(spectrum, samples))


def babble(rng, samples, voices, talkers=None):
    """Many talkers at once.

    Arguments
    ---------
    rng : numpy.random.Generator
    samples : int
    voices : sequence of numpy.ndarray
        Utterances to draw from, [samples] each.
    talkers : int or None
        How many speak at a time; None draws 6 to 10.

    Returns
    -------
    noise : numpy.ndarray
        [samples], RMS 1.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> voices = [np.sin(np.arange(500) / n) for n in (3, 5)]
    >>> babble(rng, 1600, voices).shape
    (1600,)
    """
    _check_voices(voices, "babble")
    if talkers is None:
        talkers = rng.integers(6, 11)
    noise = np.zeros(samples)
    for _ in range(talkers):
        speech = _endless(rng, samples, lambda: _any(rng, voices))
        noise += speech * 10 ** (rng.uniform(-3, 3) / 20)
    return _unit(noise)


def speech_shaped(rng, samples, voices, sample_rate=16000):
    """Steady noise with the average spectrum of some speech.

    Arguments
    ---------
    sample_rate : int
        Hz.

    Returns
    -------
    noise : numpy.ndarray
        [samples], RMS 1.
    """
    _check_voices(voices, "speech-shaped noise")
    drawn = [_unit(_any(rng, voices)) for _ in range(4)]
    _, power = welch(np.concatenate(drawn), sample_rate, nperseg=512)
    # linear phase: half a window to either side
    response = np.roll(np.fft.irfft(np.sqrt(power)), 256) * np.hanning(512)
    white = rng.standard_normal(samples + 511)
    return _unit(oaconvolve(white, response, "valid"))


def _hum(rng, samples, sample_rate=16000):
    """Mains or an engine: a drifting tone, its harmonics and a little hiss."""
    mains = rng.random() < 0.5
    pitch = rng.choice([50.0, 60.0]) if mains else rng.uniform(30, 200)
    drift = 0.001 if mains else 0.05
    slow = _slow(rng, samples, sample_rate, seconds=0.5)
    phase = 2 * np.pi * np.cumsum(pitch * (1 + drift * slow)) / sample_rate
    decay = rng.uniform(0.3, 1.5)
    top = min(30, int(0.45 * sample_rate / pitch))
    noise = np.zeros(samples)
    for harmonic in range(1, top + 1):
        level = rng.uniform(0.3, 1) * harmonic**-decay
        noise += level * np.sin(harmonic * phase + rng.uniform(0, 2 * np.pi))
    return _unit(_unit(noise) + 0.05 * rng.standard_normal(samples))


def _clicks(rng, samples, sample_rate=16000):
    """Single knocks and clicks at random times, on a faint floor."""
    times = _poisson(rng, samples, sample_rate, rate=rng.uniform(2, 12))
    return _bursts(rng, samples, sample_rate, times, (0.001, 0.02))


def _keyboard(rng, samples, sample_rate=16000):
    """Typing: each key is heard going down and, weaker, coming up."""
    down = _poisson(rng, samples, sample_rate, rate=rng.uniform(4, 9))
    held = rng.uniform(0.06, 0.14, len(down)) * sample_rate
    times = np.concatenate([down, down + held.astype(int)])
    return _bursts(rng, samples, sample_rate, times, (0.003, 0.012))


def _rain(rng, samples, sample_rate=16000):
    """A hiss of far drops, and many single ones near by."""
    rate = rng.uniform(100, 600)
    times = _poisson(rng, samples, sample_rate, rate)
    near = _bursts(rng, samples, sample_rate, times, (0.0005, 0.004))
    far = coloured(rng, samples, sample_rate, exponent=0.3)
    return _unit(near + rng.uniform(0.3, 1) * far)


def _wind(rng, samples, sample_rate=16000):
    """Rumble in gusts, and a howl that comes with them."""
    rumble = coloured(rng, samples, sample_rate, exponent=rng.uniform(1.5, 3))
    slow = _slow(rng, samples, sample_rate, seconds=rng.uniform(0.3, 1))
    angle = 2 * np.pi * rng.uniform(300, 1200) / sample_rate
    howl = _unit(_resonance(rng.standard_normal(samples), angle, 0.98))
    howl *= rng.uniform(0.3, 1) * np.exp(0.5 * slow)  # most of it in gusts
    return _unit((rumble + howl) * np.exp(rng.uniform(0.5, 1.2) * slow))


OF_VOICES = {"babble": babble, "speech_shaped": speech_shaped}
OF_NOTHING = {
    "coloured": coloured,
    "hum": _hum,
    "clicks": _clicks,
    "keyboard": _keyboard,
    "rain": _rain,
    "wind": _wind,
}


class NoiseMaker:
    """Noise of all types but one, which is kept for tests.

    Arguments
    ---------
    voices : sequence of numpy.ndarray
        Utterances of the same split, for babble and speech-shaped noise;
        without any, these two are left out.
    held_out : str
        The type that only tests hear.
    seed : int
    sample_rate : int
        Hz.

    Example
    -------
    >>> maker = NoiseMaker()
    >>> "wind" in maker.types, "babble" in maker.types
    (False, False)
    >>> noise, kind = maker.draw("utterance_0", 16000, epoch=3)
    >>> noise.shape, kind
    ((16000,), 'keyboard')
    >>> maker.draw("utterance_0", 16000, kind="wind")[1]
    'wind'
    """

    def __init__(
        self, voices=(), held_out=HELD_OUT, seed=1234, sample_rate=16000
    ):
        kinds = {*OF_VOICES, *OF_NOTHING}
        if held_out not in kinds:
            raise ValueError(f"no noise {held_out!r}: choose of {kinds}")
        self.voices = voices
        self.held_out = held_out
        self.seed = seed
        self.sample_rate = sample_rate
        names = [*(OF_VOICES if len(voices) else ()), *OF_NOTHING]
        self.types = [name for name in names if name != held_out]

    def draw(self, key, samples, epoch=0, kind=None):
        """One noise, the same for the same key and epoch.

        Arguments
        ---------
        key : str
            Name of what it is mixed with.
        samples : int
        epoch : int
        kind : str or None
            Type of noise; None draws one that is not held out.

        Returns
        -------
        noise : numpy.ndarray
            [samples], RMS 1.
        kind : str
        """
        if samples < 1:
            raise ValueError(f"noise of {samples} samples")
        rng = draw_by(self.seed, epoch, key)
        if kind is None:
            kind = self.types[rng.integers(len(self.types))]
        if kind == "babble":
            return babble(rng, samples, self.voices), kind
        if kind == "speech_shaped":
            voices, rate = self.voices, self.sample_rate
            return speech_shaped(rng, samples, voices, rate), kind
        if kind not in OF_NOTHING:
            raise ValueError(f"no noise {kind!r}: choose of {self.types}")
        return OF_NOTHING[kind](rng, samples, self.sample_rate), kind


class NoiseFolder:
    """Noise cut from recordings.

    Arguments
    ---------
    folder : str or Path
        Holds audio files, at any depth, or the DNS Challenge's data (its
        noise is then taken, not its speech).
    split : str or None
        "train", "valid" or "test": a fixed share of the files (80, 10 and
        10 %), chosen by their names; None: all.
    seed : int
    sample_rate : int
        Hz, of the noise that is drawn.
    resample : bool
        Take files of higher rates too. Those of lower rates are refused:
        nothing would be in the upper band.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> soundfile.write(folder / "fan.wav", np.ones(800) / 2, 16000)
    >>> noise, name = NoiseFolder(folder).draw("utterance_0", 1000)
    >>> noise.shape, name
    ((1000,), 'fan.wav')
    """

    def __init__(
        self, folder, split=None, seed=1234, sample_rate=16000, resample=False
    ):
        self.folder = dns_folder(folder, DNS_NOISE)
        self.files = [
            path
            for path in audio_files(self.folder)
            if split is None or _split_of(path.name) == split
        ]
        if not self.files:
            raise ValueError(
                f"{self.folder} has too few files for a {split} split: give "
                "more, or a folder for each split"
            )
        self.seed = seed
        self.sample_rate = sample_rate
        self.resample = resample

    def draw(self, key, samples, epoch=0, kind=None):
        """A stretch of a recording, see `NoiseMaker.draw`; `kind` is a file."""
        rng = draw_by(self.seed, epoch, key)
        path = self.folder / kind if kind else _any(rng, self.files)
        noise = _read_noise(path, self.sample_rate, self.resample)
        start = rng.integers(len(noise))
        stretch = np.resize(np.roll(noise, -start), samples)
        # a quiet passage of a file that is not silent as a whole
        stretch = stretch if stretch.any() else np.resize(noise, samples)
        return _unit(stretch), path.relative_to(self.folder).as_posix()


def draw_by(seed, epoch, key):
    """Random generator of one item of one epoch.

    Arguments
    ---------
    seed : int
    epoch : int
    key : str
        Name of the item.

    Returns
    -------
    numpy.random.Generator

    Example
    -------
    >>> int(draw_by(1234, 0, "utterance_0").integers(100))
    71
    """
    # crc32, not hash(): the same in every process
    return np.random.default_rng([seed, epoch, zlib.crc32(key.encode())])


def audio_files(folder):
    """Audio files below a folder, or an error that says there are none.

    Arguments
    ---------
    folder : str or Path

    Returns
    -------
    list of Path
        Sorted.

    Example
    -------
    >>> audio_files("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no folder no/such/folder
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO)
    if not files:
        raise ValueError(
            f"{folder} holds no audio ({', '.join(AUDIO)}): give the folder "
            "of the recordings"
        )
    return files


def dns_folder(folder, places):
    """The part of the DNS Challenge's data that is asked for.

    Arguments
    ---------
    folder : str or Path
        The challenge's folder, or any other.
    places : sequence of str
        `DNS_NOISE` or `DNS_CLEAN`.

    Returns
    -------
    Path
        The first place that is there; else the folder itself.
    """
    folder = Path(folder)
    folders = [folder / place for place in places if (folder / place).is_dir()]
    return folders[0] if folders else folder


def _read_noise(path, sample_rate=16000, resample=False):
    """A recording as one channel [samples], the mean of all, checked."""
    noise, rate = soundfile.read(path, always_2d=True)
    noise = noise.mean(-1)
    if not np.isfinite(noise).all():
        raise ValueError(f"{path} holds NaN or infinity: remove the file")
    if not noise.any():
        raise ValueError(f"{path} is silent or empty: remove the file")
    if rate < sample_rate or (rate > sample_rate and not resample):
        fix = "convert it" if rate < sample_rate else "pass resample=True"
        raise ValueError(f"{path} has {rate} Hz, not {sample_rate}: {fix}")
    return noise if rate == sample_rate else resampled(noise, rate, sample_rate)


def resampled(samples, rate, sample_rate=16000):
    """Bring a waveform to another sample rate.

    Arguments
    ---------
    samples : numpy.ndarray
        [samples].
    rate : int
        That it has, in Hz.
    sample_rate : int
        That it gets.

    Returns
    -------
    samples : numpy.ndarray
        [samples], another number of them.

    Example
    -------
    >>> resampled(np.ones(441), 44100).shape
    (160,)
    """
    common = math.gcd(rate, sample_rate)
    return resample_poly(samples, sample_rate // common, rate // common)


def active_level(speech, sample_rate=16000):
    """RMS of speech without its pauses.

    Frames of 32 ms count that are at most 40 dB below the loudest one.

    Arguments
    ---------
    speech : numpy.ndarray
        [samples].
    sample_rate : int
        Hz.
    """
    _check(speech, "speech")
    size = min(round(FRAME * sample_rate), len(speech))
    whole = len(speech) // size * size
    power = np.square(speech[:whole]).reshape(-1, size).mean(-1)
    active = power > power.max() * 10 ** (-ACTIVE_RANGE / 10)
    if not active.any():  # all sound is in the last, shorter frame
        return float(np.sqrt(np.mean(np.square(speech))))
    return float(np.sqrt(power[active].mean()))


def mix_at_snr(speech, noise, snr, sample_rate=16000):
    """Put noise under speech.

    The ratio is that of the active speech's level to the level of the whole
    noise. Both are made softer together where the sum would clip.

    Arguments
    ---------
    speech, noise : numpy.ndarray
        [samples], of the same length.
    snr : float
        dB.
    sample_rate : int
        Hz.

    Returns
    -------
    noisy, speech : numpy.ndarray
        [samples], the sum and the speech in it.
    """
    if speech.shape != noise.shape:
        raise ValueError(
            f"speech {speech.shape} and noise {noise.shape} differ in "
            "length: draw as much noise as there is speech"
        )
    _check(noise, "noise")
    level = np.sqrt(np.mean(np.square(noise)))
    gain = active_level(speech, sample_rate) / level * 10 ** (-snr / 20)
    noisy = speech + gain * noise
    down = min(1, PEAK / np.abs(noisy).max()) if noisy.any() else 1
    return down * noisy, down * speech


def _check(waveform, name):
    """Refuse what no level can be taken of."""
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"the {name} must be [samples], not {waveform.shape}")
    if not np.isfinite(waveform).all():
        raise ValueError(f"the {name} holds NaN or infinity")
    if not waveform.any():
        raise ValueError(f"the {name} is silent: no level makes a ratio of it")


def _check_voices(voices, name):
    """Refuse to make noise of no voices."""
    if not len(voices):
        raise ValueError(f"{name} needs voices: give some utterances")


def _any(rng, items):
    """One of them."""
    return items[int(rng.integers(len(items)))]


def _unit(waveform):
    """The waveform at RMS 1; silence stays silent."""
    level = np.sqrt(np.mean(np.square(waveform)))
    return waveform / level if level > 0 else waveform


def _endless(rng, samples, draw):
    """Utterances one behind the other, from anywhere in the first."""
    first = _unit(draw())
    pieces = [first[rng.integers(len(first)) :]]
    while sum(map(len, pieces)) < samples:
        pieces.append(_unit(draw()))
    return np.concatenate(pieces)[:samples]


def _slow(rng, samples, sample_rate, seconds):
    """A smooth random curve, about RMS 1, with a new value every so often."""
    knots = int(np.ceil(samples / (seconds * sample_rate))) + 2
    places = np.arange(samples) / (seconds * sample_rate)
    return np.interp(places, np.arange(knots), rng.standard_normal(knots))


def _poisson(rng, samples, sample_rate, rate):
    """Times of random events [events], at least one; `rate` a second."""
    count = max(1, rng.poisson(rate * samples / sample_rate))
    return rng.integers(0, samples, count)


def _bursts(rng, samples, sample_rate, times, decays):
    """Decaying bursts of a resonance at some times, on a floor of -40 dB."""
    hits = np.zeros(samples)
    inside = times[times < samples]
    hits[inside] += rng.lognormal(0, 0.7, len(inside))
    decay = np.exp(-1 / (rng.uniform(*decays) * sample_rate))
    angle = 2 * np.pi * rng.uniform(800, 5000) / sample_rate
    # white noise under the envelope of the hits, then one resonance
    envelope = lfilter([1], [1, -decay], hits)
    burst = envelope * rng.standard_normal(samples)
    burst = _unit(_resonance(burst, angle, radius=0.9))
    return _unit(burst + 0.01 * rng.standard_normal(samples))


def _resonance(waveform, angle, radius):
    """Two poles at an angle, closer to the circle for a clearer tone."""
    poles = [1, -2 * radius * np.cos(angle), radius**2]
    return lfilter([1], poles, waveform)


def _split_of(name):
    """Split that a file belongs to, by its name."""
    place = zlib.crc32(name.encode()) % 10
    return {0: "test", 1: "valid"}.get(place, "train")
