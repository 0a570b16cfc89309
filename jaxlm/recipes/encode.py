"""Examples:

  jaxlm encode path/to/all-MiniLM-L6-v2 --texts sentences.txt --out vectors.npy
  jaxlm encode path/to/model --texts rows.jsonl --field sentence --out vectors.parquet --batch-size 64

MODEL is the Hugging Face or sentence-transformers folder of an encoder (BERT, ModernBERT, …) or a decoder (Llama, Qwen,
…), such as a run's runs/x/encoder. --texts: a text a line, or jsonl or Parquet with a field; .gz, .bz2 and .zst are
read too. The vectors are in the order of the texts: float32 [texts, width] as .npy, or Parquet with the columns text
and vector. Rows are split over all devices of this machine, --batch-size texts on each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxlm.data.encode import text_of
from jaxlm.data.sources import SourceConfig, files, open_source
from jaxlm.recipes.runtime import Runtime, configure
from jaxlm.sharding.mesh import MeshConfig, make_mesh

ENDINGS = (".npy", ".parquet")
ROWS: dict[Literal["jsonl", "parquet"], tuple[str, ...]] = {"jsonl": files.JSONL_SUFFIXES, "parquet": (".parquet",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm encode`."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face or sentence-transformers folder")
    parser.add_argument(
        "--texts", metavar="FILE", required=True, help="a text a line, or jsonl or Parquet with --field"
    )
    parser.add_argument("--field", default="text", help="the field of a row (default: text)")
    parser.add_argument("--out", metavar="FILE", required=True, help="vectors.npy or vectors.parquet")
    parser.add_argument("--pooling", choices=("mean", "cls", "last"), help="in place of the folder's own")
    parser.add_argument("--batch-size", type=int, default=32, help="texts a call on each device (default 32)")
    parser.add_argument("--simulate-devices", type=int, metavar="N", help="N CPU devices in place of the real ones")


def main(args: argparse.Namespace) -> int:
    """Encodes the texts and writes the vectors in one rename."""
    out = Path(args.out)
    if out.suffix not in ENDINGS:
        raise ValueError(f"--out {out}: expected a name that ends in {' or '.join(ENDINGS)}")
    texts = list(read_texts(Path(args.texts), args.field))
    configure(Runtime(simulated_devices=args.simulate_devices))
    from jaxlm.evals.encode import Encoder

    mesh = make_mesh(MeshConfig(), jax.local_devices())
    encoder = Encoder.load(args.model, pooling=args.pooling).on(mesh)
    rows = min(args.batch_size, -(-len(texts) // mesh.size) or 1)  # on each device
    vectors = encoder.encode(texts, batch_size=rows * mesh.size, show_progress=True)
    part = out.with_name(out.name + ".part")
    _write(part, out.suffix, texts, vectors)
    part.replace(out)
    print(f"{len(texts):,} vectors of width {vectors.shape[1]} in {out}", file=sys.stderr)
    return 0


def read_texts(path: Path, field: str) -> Iterator[str]:
    """The texts of a file; ValueError naming file and row of one that is not text or not UTF-8."""
    if not path.is_file():
        raise ValueError(f"--texts {path}: no such file")
    for kind, suffixes in ROWS.items():
        if files.stem(path).endswith(suffixes):
            source = open_source(SourceConfig(kind, path=str(path)))
            yield from (text_of(source[i], source.origin(i), field=field, empty=True) for i in range(len(source)))
            return
    for number, line in enumerate(files.read_bytes(path).splitlines(), 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: expected UTF-8, found {line[:40]!r}") from error


def _write(path: Path, ending: str, texts: list[str], vectors: np.ndarray) -> None:
    if ending == ".npy":
        with path.open("wb") as file:
            np.save(file, vectors)
        return
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "vector": column}), path)
