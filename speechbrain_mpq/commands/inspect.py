"""`speechbrain-mpq inspect`: what a packed folder stores, in which bits."""

import json
from collections import defaultdict
from pathlib import Path

from ..utils import BUNDLED_MODEL, repeated_blocks, save_figure

HELP = "sizes, array, bits of every cluster, and coverage of a folder"
EXAMPLE = """
  speechbrain-mpq inspect
  speechbrain-mpq inspect packed
  speechbrain-mpq inspect packed --plot bits.png
  speechbrain-mpq inspect packed --json | jq .average_bits"""


MIB = 2**20  # bytes
KIB = 2**10  # bytes
BAR = 16  # characters, a bit each


def add_arguments(parser):
    """Say what the command line may hold."""
    parser.add_argument(
        "folder",
        nargs="?",
        default=BUNDLED_MODEL,
        help="packed folder (default: the 4-bit separator that comes with "
        "the package)",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the bits of every cluster to .png, .svg or .pdf (needs "
        "matplotlib)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables"
    )


def run(options) -> int:
    """Print what a folder holds."""
    from ..inference.card import array_of, draw_array
    from ..inference.folder import cluster_bits, coverage_rows, summarise
    from ..nnet.integer_gru_file import is_integer_gru
    from ..quantization.packing import MODEL_FILE, read_model

    if options.plot:
        _check_plot(Path(options.plot))
    if is_integer_gru(Path(options.folder, MODEL_FILE)):
        return _inspect_integer_gru(Path(options.folder, MODEL_FILE), options)
    model = read_model(options.folder)
    rows = coverage_rows(model)
    clusters = cluster_bits(rows)
    if options.plot:
        _draw(options.plot, clusters)
    summary = summarise(model, rows)
    array = array_of(model.architecture)
    if options.json:
        content = {
            **summary,
            "array": array,
            "clusters": clusters,
            "tensors": rows,
        }
        print(json.dumps(content, indent=1))
        return 0
    print(_headline(options.folder, summary))
    drawn = [("microphone array", draw_array(**array))] if array else []
    for title, lines in (
        *drawn,
        ("bits of the clusters", plot_lines(clusters)),
        ("coverage", _table(rows)),
    ):
        print("\n".join(["", title, "-" * len(title), *lines]))
    return 0


def plot_lines(clusters):
    """Plot the bits of every cluster as text.

    Blocks that repeat get a line each, with a column for every sublayer.
    """
    blocks, others = defaultdict(dict), {}
    for name, (block, sublayer) in repeated_blocks(clusters).items():
        bits = clusters[name]["bits"]
        if sublayer is None:
            others[name] = bits
        else:
            blocks[block][sublayer] = bits
    if not clusters:
        return ["none: the model is in floating point"]
    width = max(len(name) for name in [*others, *blocks])
    lines = [
        f"{name:{width}}  {'█' * round(min(bits, BAR))} {bits:g}"
        for name, bits in others.items()
    ]
    return lines + _matrix(blocks, width)


def _matrix(blocks, width):
    """A line for each block, a column for each sublayer in order."""
    if not blocks:
        return []
    sublayers = list(dict.fromkeys(n for bits in blocks.values() for n in bits))
    lines = ["", " " * width + "".join(f"  {name}" for name in sublayers)]
    for block, bits in blocks.items():
        cells = [
            f"  {bits[name]:{len(name)}g}"
            if name in bits
            else " " * (len(name) + 2)
            for name in sublayers
        ]
        lines.append(f"{block:{width}}" + "".join(cells))
    return [line.rstrip() if line.strip() else "" for line in lines]


def _inspect_integer_gru(path, options):
    """Print what the file of an integer GRU holds."""
    from ..nnet.integer_gru_file import load_integer_gru

    integer, size = load_integer_gru(path), path.stat().st_size
    description = integer.description
    plan = {name: {"bits": bits} for name, bits in integer.plan.items()}
    if options.plot:
        _draw(options.plot, plan)
    if options.json:
        integers = {"bytes": size, "bytes_of_integers": integer.packed_bytes}
        print(json.dumps({**integers, **description}, indent=1))
        return 0
    sizes = ("input_size", "hidden_size", "layers", "bidirectional", "classes")
    print(
        f"{path.parent}: an integer GRU, {size / KIB:.1f} KiB ({size:,} bytes, "
        f"{integer.packed_bytes:,} of them integers)\n  "
        + ", ".join(f"{name} {description[name]}" for name in sizes)
    )
    title = "bits of the operations"
    print("\n".join(["", title, "-" * len(title), *plot_lines(plan)]))
    return 0


def _headline(folder, summary):
    """Sizes in words."""
    counts = "".join(
        f"\n  {count:9,} parameters at {bits} bits"
        for bits, count in summary["parameters_by_bits"].items()
    )
    rest = summary["parameters"] - summary["quantized_parameters"]
    return (
        f"{folder}: {summary['bytes'] / MIB:.3f} MiB "
        f"({summary['bytes']:,} bytes), {summary['compression']:g} times "
        "smaller than in float32\n"
        f"  {summary['average_bits']:g} bits on average, "
        f"format {summary['format']}, codebook {summary['codebook']}"
        f"{counts}\n  {rest:9,} parameters in floating point"
    )


def _table(rows):
    """Lines of the coverage table."""
    width = max(len(row["tensor"]) for row in rows)
    shapes = max(len(_shape(row)) for row in rows)
    head = (
        f"{'tensor':{width}}  {'shape':{shapes}}  {'bits':>4}  "
        f"{'scales':>6}  {'KiB':>8}"
    )
    lines = [head]
    for row in rows:
        reason = f"  {row['reason']}" if row["reason"] else ""
        lines.append(
            f"{row['tensor']:{width}}  {_shape(row):{shapes}}  "
            f"{row['stored_bits']:4g}  {row['scales']:6}  "
            f"{row['bytes'] / KIB:8.2f}{reason}"
        )
    return lines


def _shape(row):
    """As 96 x 192 x 1."""
    return " x ".join(map(str, row["shape"])) or "1"


def _check_plot(path):
    """Refuse a file that could not be drawn to, before anything is read."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'speechbrain_mpq[evaluate]'"
        ) from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(
            f"{path} has no ending of a picture: name it .png, .svg or .pdf"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"{path} cannot be written: name a file in a folder that is there"
        )


def _draw(path, clusters):
    """The plot of the report, to a file."""
    if not clusters:
        raise ValueError("nothing to plot: the model is in floating point")
    from ..evaluation.plots import bits_per_cluster

    save_figure(bits_per_cluster(clusters), path, dpi=150)
