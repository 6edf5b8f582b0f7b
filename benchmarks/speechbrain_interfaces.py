"""SpeechBrain's interfaces: quantized, loaded again, outputs compared.

> python benchmarks/speechbrain_interfaces.py --out results/interfaces

A tiny model of each class (speechbrain_interfaces.yaml beside this file) is
saved as its folder would be, and `speechbrain-mpq quantize` makes it one of 4
bits. What stock `from_hparams` loads then must put out the same bits as the
source's own class with the weights that are read from the packed file, without
this package's way of loading. Some rows need transformers below 5, unidecode or
inflect.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import soundfile
import torch
import yaml
from hyperpyyaml import load_hyperpyyaml
from torch.nn.utils import parametrize

from speechbrain_mpq.ptq.pretrained import quantize_pretrained
from speechbrain_mpq.ptq.pretrained_folder import find_class
from speechbrain_mpq.quantization.packing import read_packed

TABLE = Path(__file__).with_suffix(".yaml")
SAMPLES = 4000, 3200, 3600  # of the recordings
RATE = 16000  # Hz
CONFIG = {  # of the Hugging Face models
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}


class Letters:
    """A tokenizer."""

    def decode_ids(self, ids):
        """Words of one letter."""
        return " ".join("_.abc"[i] for i in ids)


class Frames(torch.nn.Module):
    """Stands for a large encoder: frames of 20 ms."""

    def __init__(self, size):
        super().__init__()
        self.conv = torch.nn.Conv1d(1, size, 400, 320)

    def forward(self, wavs):
        """Waveforms [batch, time] to states [batch, frames, size]."""
        return self.conv(wavs[:, None]).transpose(1, 2).tanh()


class Filter(torch.nn.Module):
    """An enhancer of waveforms."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(1, 1, 9, padding=4)

    def forward(self, wavs):
        """Enhanced waveforms [batch, time], and something else."""
        return self.conv(wavs[:, None])[:, 0], None


class Blocks(torch.nn.Module):
    """An encoder of waveforms in blocks of 25 ms."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, wavs, lengths):
        """Waveforms [batch, time] to states [batch, blocks, values]."""
        blocks = wavs.unfold(1, 400, 400).transpose(1, 2)
        return self.layers(blocks).transpose(1, 2)


def read_table():
    """Rows by name."""
    rows = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {n: row for n, row in rows.items() if not n.startswith("_")}


def is_runnable(row):
    """Whether the packages that a row needs are there."""
    return all(map(importlib.util.find_spec, row.get("needs", ())))


def write_manifest(folder):
    """Noises with a text, as a manifest in SpeechBrain's JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, entries = torch.Generator().manual_seed(0), {}
    texts = "PLACE BLUE", "SIX", "LACE"
    for index, (samples, text) in enumerate(zip(SAMPLES, texts)):
        path = folder / f"{index}.wav"
        audio = torch.randn(samples, generator=generator) / 9
        soundfile.write(path, audio.numpy(), RATE)
        entries[str(index)] = {"wav": str(path), "txt": text}
    path = folder / "manifest.json"
    path.write_text(json.dumps(entries))
    return path


def write_source(row, folder):
    """The folder of a row's model, with random weights."""
    folder.mkdir(parents=True)
    made = folder / "made"
    if "made" in row:
        MAKERS[row["made"]](made)
    text = row.get("features", "") + row["hparams"].replace("$MADE", str(made))
    names = [*row["loadables"], *row.get("labels", ())]
    loadables = "".join(f"        {name}: !ref <{name}>\n" for name in names)
    text += (
        "pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer\n"
        f"    loadables:\n{loadables}"
    )
    (folder / "hyperparams.yaml").write_text(text)
    torch.manual_seed(0)
    loaded = load_hyperpyyaml(text)
    for name in row["loadables"]:
        torch.save(loaded[name].state_dict(), folder / f"{name}.ckpt")
    for name, labels in row.get("labels", {}).items():
        loaded[name].update_from_iterable(labels, sequence_input=False)
        loaded[name].save(folder / f"{name}.ckpt")


def make_wav2vec2(folder):
    """A tiny wav2vec 2.0 with random weights."""
    import transformers

    config = transformers.Wav2Vec2Config(**CONFIG)
    transformers.Wav2Vec2Model(config).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(
        return_attention_mask=True
    )
    extractor.save_pretrained(folder)


def make_whisper(folder):
    """A tiny Whisper with random weights, and a tokenizer of bytes."""
    import transformers
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    folder.mkdir(parents=True)
    letters = list(bytes_to_unicode().values())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = ["<|startoftranscript|>"]
    special += [f"<|{language}|>" for language in LANGUAGES]
    special += ["<|translate|>", "<|transcribe|>", "<|startoflm|>"]
    special += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer = transformers.WhisperTokenizer(
        folder / "vocab.json", folder / "merges.txt"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=32,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(special[0]),
    )
    transformers.WhisperModel(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)


MAKERS = {"wav2vec2": make_wav2vec2, "whisper": make_whisper}


def outputs(row, interface):
    """What a class says of a fixed noise, by its own methods."""
    generator = torch.Generator().manual_seed(1)
    known = {
        "i": interface,
        "wavs": torch.randn(2, 4000, generator=generator) / 9,
        "lengths": torch.tensor([1.0, 0.8]),
        "mels": torch.randn(2, 8, 10, generator=generator),
        "graphemes": (torch.tensor([[0, 3, 7, 5]]), torch.ones(1)),
    }
    torch.manual_seed(2)  # Tacotron2 has dropout in inference, too
    with torch.no_grad():
        return eval(row["call"], known)  # of the table beside this file


def with_weights_of(row, source, packed):
    """The source's own class with the values in a packed folder's files."""
    interface = find_class(row["class"]).from_hparams(source=str(source))
    loadables = interface.hparams.pretrainer.loadables
    for name in row["loadables"]:
        module = loadables[name]
        quantized, floats = read_packed(packed / f"{name}.ckpt")
        values = {n: tensor.values() for n, tensor in quantized.items()}
        for inner in list(module.modules()):
            for attribute in list(getattr(inner, "parametrizations", ())):
                parametrize.remove_parametrizations(inner, attribute)
        # Buffers that a fresh model has equal are not stored.
        left = module.load_state_dict({**values, **floats}, strict=False)
        assert not left.unexpected_keys, left
        stored = dict(module.named_parameters())
        assert not stored.keys() & set(left.missing_keys), left
    if hasattr(interface, "first_call"):  # HIFIGAN: there is no weight norm
        interface.first_call = False
    return interface


def tensors_in(value):
    """Tensors in an output, and what is none as text."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.items()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)
    else:
        yield str(value)


def same(one, other):
    """Whether two outputs are the same bits."""
    one, other = list(tensors_in(one)), list(tensors_in(other))
    return len(one) == len(other) and all(
        torch.equal(x, y)
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        else isinstance(x, str) and x == y
        for x, y in zip(one, other)
    )


def one_row(name, row, folder, manifest, bits=(2, 4, 8)):
    """Quantize, load, compare: what is result of a class."""
    row = {"class": name, **row}
    source, packed = folder / "source", folder / "packed"
    if "refused" in row:
        try:
            find_class(row["class"])
        except ValueError as error:
            return {"refused": str(error)}
        return {"failed": f"{name} is not refused"}
    sys.modules.setdefault("speechbrain_interfaces", sys.modules[__name__])
    write_source(row, source)
    report = quantize_pretrained(
        source,
        row["class"],
        manifest,
        budget="4bit",
        output=packed,
        candidate_bits=bits,
        exclude=row.get("options", ["--exclude"])[1:],
        progress=False,
    )
    loaded = find_class(row["class"]).from_hparams(source=str(packed))
    estimates = outputs(row, loaded)
    expected = outputs(row, with_weights_of(row, source, packed))
    plain = find_class(row["class"]).from_hparams(source=str(source))
    return {
        "bytes": report.bytes,
        "divergence": report.divergence,
        "unit": report.unit,
        "same_bits": same(estimates, expected),
        "changed": report.divergence > 0
        and not same(estimates, outputs(row, plain)),
    }


def main(arguments=None):
    """Run all rows, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--out", type=Path, default=Path("results/interfaces"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    out = options.out.resolve()
    manifest = write_manifest(out / "data")
    for name, row in read_table().items():
        if options.only and not any(part in name for part in options.only):
            continue
        folder = out / name.replace(" ", "_")
        if not is_runnable(row):
            print(name, f"needs {row['needs']}", flush=True)
            continue
        try:
            result = one_row(name, row, folder, manifest)
        except Exception as error:
            if options.only:
                raise
            result = {"failed": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(result)[:500], flush=True)


if __name__ == "__main__":
    main()
