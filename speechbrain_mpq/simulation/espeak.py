"""espeak-ng through ctypes, each call in a process of its own.

espeak-ng carries state from call to call, so that the same call gives other
samples the second time. Each utterance is therefore spoken by a forked child
of a process that has initialised the library and never spoken: the same
arguments then give the same bytes in any process.

The library comes with the wheel `espeakng-loader` (espeak-ng is GPL, hence an
extra: ``pip install speechbrain_mpq[simulate]``).
"""

import ctypes
import functools
import os
import pickle

import numpy as np

SAMPLE_RATE = 22050  # Hz, what the library speaks at


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("string", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_short),
    ctypes.c_int,
    ctypes.POINTER(_Event),
)
_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT, _UTF8 = 2, 0x0001, 0x8000, 1
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_LIST_END, _PHONEME = 0, 7  # espeak_EVENT_TYPE


def speak(text, voice, rate, pitch, range):
    """Speak a text.

    Arguments
    ---------
    text : str
        What to say.
    voice : str
        Voice and variant, e.g. "en-us+m3".
    rate : int
        Words per minute.
    pitch, range : int
        0 to 99, 50 is the voice's own.

    Returns
    -------
    samples : numpy.ndarray
        int16 at 22.05 kHz.
    events : list of tuple
        (first sample, symbol) of every phoneme, in espeak-ng's alphabet.

    Example
    -------
    >>> samples, events = speak("seven", "en-us", 150, 50, 50)  # doctest: +SKIP
    >>> [symbol for _, symbol in events]  # doctest: +SKIP
    ['s', "'E", 'v', '@', 'n', '_:']
    """
    values = {_RATE: rate, _PITCH: pitch, _RANGE: range}
    samples, events = _in_child(_speak, text, voice, values)
    if not samples.any():
        raise RuntimeError(
            f"espeak-ng spoke only silence for {text!r} with the voice "
            f"{voice}: choose another voice"
        )
    return samples, events


def _in_child(function, *arguments):
    """Result of a function that runs in a forked child of this process."""
    library()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(function(*arguments), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        result = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(
            f"espeak-ng failed with {arguments}: check the voice and variant"
        )
    return pickle.loads(result)


@functools.cache
def library():
    """The initialised library, once per process.

    Returns
    -------
    ctypes.CDLL

    Example
    -------
    >>> espeak = library()  # doctest: +SKIP
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "Synthetic voices need espeak-ng: "
            "pip install speechbrain_mpq[simulate]"
        ) from error
    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = espeak.espeak_Initialize(
        _SYNCHRONOUS,
        0,
        str(espeakng_loader.get_data_path()).encode(),
        _PHONEME_EVENTS | _DONT_EXIT,
    )
    if rate != SAMPLE_RATE:
        raise RuntimeError(
            f"espeak-ng started with {rate} instead of {SAMPLE_RATE} Hz; "
            "reinstall it: pip install --force-reinstall espeakng-loader"
        )
    return espeak


def _speak(text, voice, values):
    """Samples and events; spoils the process for another call."""
    espeak, chunks, events = library(), [], []

    def collect(samples, count, event):
        if samples and count:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while event[i].type != _LIST_END:
            if event[i].type == _PHONEME:
                symbol = event[i].string.decode("utf-8", "replace")
                events.append((event[i].sample, symbol))
            i += 1
        return 0

    if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice}")
    callback = _CALLBACK(collect)
    espeak.espeak_SetSynthCallback(callback)
    for parameter, value in values.items():
        espeak.espeak_SetParameter(parameter, int(value), 0)
    spoken = text.encode() + b"\0"
    espeak.espeak_Synth(spoken, len(spoken), 0, 0, 0, _UTF8, None, None)
    return np.concatenate(chunks), events
