"""Lengths in the headers of audio files, mended where the file has others.

Recorders write the length last. One that is cut off, or that writes to a pipe,
leaves none or a wrong one, and readers that believe it lose what follows or
find nothing. The sound itself goes on to the end of the file.
"""

import io
import math
import re
import struct
from dataclasses import dataclass, field, replace

PIPE_SIZE = 0x7FFF0000  # from here on a 32-bit length stands for none
PIPE_SIZE_64 = 2**62
_NIST_SIZE = 2**14  # bytes of the text at the beginning that are looked at
_NIST_COUNTS = {"sample_count", "channel_count", "sample_n_bytes"}
_MP3_FRAME = 2**12  # bytes in which the first frame ends
_MP3 = (b"\xff\xfb", b"\xff\xf3", b"\xff\xfa", b"\xff\xf2")  # a frame's start
_W64 = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # of all its names
# What libsndfile reads without a word where it was cut off: what it notes of
# some of them, and those that have no length in their headers
_NOTED = {"AVR", "MAT4", "MPC2K", "SVX", "VOC"}
_WITHOUT_LENGTH = {"IRCAM", "MAT5", "PAF", "PVF", "XI"}


@dataclass(frozen=True)
class Header:
    """What is to be changed in a file's header before it is read."""

    # dict of int -> bytes: position -> what should stand there
    changes: dict = field(default_factory=dict)
    # empty where the header is right, or says that it does not know
    warning: str = ""
    # the file is read to its end, however long it says it is
    open_end: bool = False
    frames: int = 0  # what it says of an open end; 0: nothing
    start: int = 0  # where the file begins, behind a tag of another format


@dataclass(frozen=True)
class _Chunks:
    """How a format names its chunks and tells their lengths."""

    start: int  # of the first one
    name: int  # bytes of a name
    size: str  # of a length, as `struct` has it
    data: bytes  # the name of the chunk with the sound
    align: int = 2
    counted: int = 0  # bytes before the content that a length counts


_FORMATS = (  # by the first bytes of the file
    (b"RIFF", _Chunks(12, 4, "<I", b"data")),
    (b"RIFX", _Chunks(12, 4, ">I", b"data")),
    (b"RF64", _Chunks(12, 4, "<I", b"data")),
    (b"BW64", _Chunks(12, 4, "<I", b"data")),
    (b"FORM", _Chunks(12, 4, ">I", b"SSND")),
    (b"caff", _Chunks(8, 4, ">q", b"data", align=1)),
    (b"riff", _Chunks(40, 16, "<q", b"data" + _W64, 8, 24)),
)


def read_header(file):
    """Find wrong lengths in the header of an audio file.

    Example
    -------
    >>> import soundfile
    >>> file = io.BytesIO()
    >>> soundfile.write(file, [0.0] * 100, 16000, format="WAV")
    >>> content = bytearray(file.getvalue())
    >>> read_header(io.BytesIO(content)).changes
    {}
    >>> content[40:44] = bytes(4)  # the recorder was cut off
    >>> read_header(io.BytesIO(content)).warning
    'its header tells 0 bytes of sound, the file holds 200: all is taken'
    """
    tag = _tag_bytes(file)
    # What stands behind it is a file of its own: libsndfile loses its place
    header = _mended(ChangedFile(file, {}, tag))
    file.seek(0)
    return replace(header, start=tag)


def _mended(file):
    """The header of a file without tags before it."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(4)
    header = Header()
    if start == b"fLaC":
        header = _flac_header(file)
    elif start == b"OggS":
        header = Header(warning=_ogg_warning(file, length))
    elif start[:2] in _MP3:
        header = _mp3_header(file, length)
    elif start == b"NIST":
        header = _nist_header(file, length)
    elif start in (b".snd", b"dns."):
        header = _au_header(file, length, "<" if start == b"dns." else ">")
    for name, chunks in _FORMATS:
        if start == name:
            header = _chunk_header(file, length, chunks, start)
    return header


class ChangedFile:
    """A file some bytes of which read as others.

    Arguments
    ---------
    file : binary file
        It can be searched.
    changes : dict of int -> bytes
        Position -> what should stand there.
    start : int
        Bytes of the file that come before the first position.

    Example
    -------
    >>> ChangedFile(io.BytesIO(b"0123456789"), {3: b"ab", 9: b"cd"}).read()
    b'012ab5678c'
    """

    def __init__(self, file, changes, start=0):
        self.file = file
        self.changes = changes
        self.start = start
        self.seek(0)

    def read(self, count=-1):
        """Read on."""
        position = self.tell()
        content = self.file.read(count)
        for place, change in self.changes.items():
            first = max(place, position)
            last = min(place + len(change), position + len(content))
            if first < last:
                inside = change[first - place : last - place]
                content = (
                    content[: first - position]
                    + inside
                    + content[last - position :]
                )
        return content

    def seek(self, offset, whence=io.SEEK_SET):
        """Go somewhere else."""
        if whence == io.SEEK_SET:
            offset += self.start
        return self.file.seek(offset, whence) - self.start

    def tell(self):
        """Tell the position."""
        return self.file.tell() - self.start

    def close(self):
        """Close the file."""
        self.file.close()


def _tag_bytes(file):
    """Bytes of an ID3 tag at the beginning, which music players write."""
    file.seek(0)
    head = file.read(10)
    if head[:3] != b"ID3" or len(head) < 10 or max(head[6:]) > 127:
        return 0
    size = sum(byte << 7 * place for place, byte in enumerate(head[:5:-1]))
    return 10 + size + 10 * bool(head[5] & 16)  # perhaps with a footer


def _chunk_header(file, length, chunks, start):
    """The header of a file that is made of chunks."""
    places = dict(_walk(file, length, chunks, chunks.start))
    # A table of packets (ALAC) does not fit what is left of them, and nothing
    # that is decoded behind that is sound.
    if chunks.data not in places or b"pakt" in places:
        return Header()  # for libsndfile to say why
    field_at, declared = places[chunks.data]
    content = field_at + struct.calcsize(chunks.size)
    actual = length - content
    wide = places.get(b"ds64") if start in (b"RF64", b"BW64") else None
    if wide and declared == 0xFFFFFFFF:
        file.seek(wide[0] + 12)  # behind the length of the whole file
        declared = _number(file, "<Q") or 0
    if declared == actual or _is_whole(
        file, length, chunks, content + declared
    ):
        return Header()
    if start in (b"RIFF", b"RIFX"):
        # What libsndfile takes for a file that was never closed: it goes on
        # to its end, beyond 4 GiB too
        changes = {4: struct.pack(chunks.size, 8), field_at: bytes(4)}
    elif wide:
        changes = {wide[0] + 12: struct.pack("<Q", actual)}
    else:
        size = min(actual + chunks.counted, _largest(chunks.size))
        changes = {field_at: struct.pack(chunks.size, size)}
    if start == b"FORM":
        changes |= _aiff_frames(file, places, actual)
    large = PIPE_SIZE_64 if wide or chunks.size[-1] == "q" else PIPE_SIZE
    no_length = declared >= large or declared + chunks.counted == -1
    return Header(changes, "" if no_length else _warning(declared, actual))


def _warning(declared, actual):
    """What a wrong length is answered with."""
    return (
        f"its header tells {max(declared, 0)} bytes of sound, the file holds "
        f"{actual}: all is taken"
    )


def samples_warning(declared, samples):
    """What a wrong number of samples is answered with."""
    return (
        f"its header tells {declared} samples, the file holds {samples}: all "
        "is taken"
    )


def decoder_warning(file):
    """What a decoder finds of a length that `read_header` knows nothing of.

    Arguments
    ---------
    file : soundfile.SoundFile

    Returns
    -------
    str
        Empty where nothing is wrong.
    """
    notes, kind = file.extra_info, file.format
    if kind in _WITHOUT_LENGTH:
        return (
            f"{kind} files do not tell how long they are: if it was cut off, "
            "nothing shows it. Convert the original to WAV"
        )
    declared = re.search(r"(?m)^ *Frames +: (\d+)$", notes)
    if kind not in _NOTED:
        return ""
    if declared and int(declared[1]) != file.frames:
        return samples_warning(int(declared[1]), file.frames)
    if "truncated" in notes or "should be" in notes:
        return "it was cut off, and what there is is taken"
    return ""


def _walk(file, length, chunks, position):
    """Name -> (place of the length, length) of chunks up to the sound."""
    while position + chunks.name < length:
        file.seek(position)
        name = file.read(chunks.name)
        size = _number(file, chunks.size)
        if size is None or not _is_name(name):
            return
        size -= chunks.counted
        yield name, (position + chunks.name, size)
        if name == chunks.data or size < 0:
            return
        position += chunks.name + struct.calcsize(chunks.size) + size
        position += -position % chunks.align


def _is_whole(file, length, chunks, position):
    """Whether nothing but chunks stands between a place and the end."""
    head = chunks.name + struct.calcsize(chunks.size)
    if position > length:
        return False
    for begin in {position, position + -position % chunks.align}:
        while begin + head <= length:
            file.seek(begin)
            name, size = file.read(chunks.name), _number(file, chunks.size)
            if not _is_name(name) or size < chunks.counted:
                break
            begin += head + size - chunks.counted
            begin += -begin % chunks.align
        # One that is cut off, or fill bytes, are none of the sound
        if length - 8 < begin <= length + chunks.align - 1:
            return True
    return False


def _is_name(name):
    """Whether these may be the letters of a chunk."""
    return all(32 <= byte < 127 for byte in name[:4]) and name.strip() != b""


def _number(file, kind):
    """The next number; None at the end of the file."""
    content = file.read(struct.calcsize(kind))
    if len(content) < struct.calcsize(kind):
        return None
    return struct.unpack(kind, content)[0]


def _largest(kind):
    """The largest number of a kind."""
    bits = 8 * struct.calcsize(kind)
    return 2 ** (bits - kind[-1].islower()) - 1


def _aiff_frames(file, places, actual):
    """AIFF tells the number of samples too."""
    if b"COMM" not in places:
        return {}
    place = places[b"COMM"][0] + 4
    file.seek(place)
    content = file.read(8)
    channels, _, bits = struct.unpack(">hIh", content)
    width = max(1, channels) * max(1, -(-bits // 8))
    return {place + 2: struct.pack(">I", min((actual - 8) // width, 2**32 - 1))}


def _au_header(file, length, order):
    """The header of Sun's format."""
    begin, declared = _number(file, f"{order}I"), _number(file, f"{order}I")
    if declared is None or begin > length:
        return Header()
    actual = length - begin
    if declared == actual:
        return Header()
    size = struct.pack(f"{order}I", min(actual, 2**32 - 1))
    return Header(
        {8: size}, "" if declared >= PIPE_SIZE else _warning(declared, actual)
    )


def _flac_header(file):
    """The header of FLAC, whose length is left open: its blocks decide."""
    file.seek(21)  # behind sizes, rate, channels and four bits of the length
    length = file.read(5)
    if len(length) < 5:
        return Header()
    declared = int.from_bytes(length, "big") & (2**36 - 1)
    changes = {21: bytes([length[0] & 0xF0]) + bytes(4)}
    return Header(changes, open_end=True, frames=declared)


def _ogg_warning(file, length):
    """What is wrong with the pages of an Ogg file; empty if nothing is."""
    position, flags, pieces, inside = 0, 4, 0, False
    while position < length:
        file.seek(position)
        head = file.read(27)
        if len(head) < 27 or head[:4] != b"OggS":
            break
        flags, table = head[5], file.read(head[26])
        position += 27 + head[26] + sum(table)
        begins = bool(flags & 2)
        pieces += begins and not inside  # streams side by side begin together
        inside = not begins or inside and not flags & 4
        if flags & 4:
            inside = False
    if pieces > 1:
        return (
            f"it holds {pieces} recordings one after the other, of which the "
            "first is taken: convert it to WAV"
        )
    if position > length or not flags & 4:
        return "it has no end: it was cut off, and what there is is taken"
    return ""


def _nist_header(file, length):
    """The header of NIST's SPHERE, whose fields are text.

    libsndfile takes all that is there.
    """
    file.seek(0)
    text = file.read(_NIST_SIZE).decode("latin-1")
    fields = dict(re.findall(r"(?m)^(\w+) -\w+ (\d+)$", text))
    size = re.match(r"NIST_1A\n *(\d+)\n", text)
    if not size or not _NIST_COUNTS <= fields.keys():
        return Header()  # for libsndfile to say why
    declared = math.prod(int(fields[name]) for name in _NIST_COUNTS)
    actual = length - int(size[1])
    if declared == actual:
        return Header()
    return Header(warning=_warning(declared, actual))


def _mp3_header(file, length):
    """The header of an MP3, whose first frame may tell the file's bytes."""
    file.seek(0)
    frame = file.read(_MP3_FRAME)
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    tell = frame[place + 4 : place + 16] if place >= 0 else b""
    # Flags, then the number of frames and that of bytes where they say so
    if len(tell) < 12 or tell[3] & 3 != 3:
        return Header()
    declared = int.from_bytes(tell[8:], "big")
    file.seek(declared)
    following = file.read(3)
    if following != b"ID3" and following[:2] not in _MP3:
        return Header()  # what is missing is told by the number of samples
    return Header(
        warning=f"its header tells {declared} bytes, the file holds {length}: "
        "what was appended to it is not taken. Convert it to WAV"
    )
