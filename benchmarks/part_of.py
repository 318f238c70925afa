"""Some classes of a data set in parquet files, as a data set of its own; labels stay as they are.

python benchmarks/part_of.py DATA --labels 2 3 4 5 6 7 --out animals     # CIFAR-10
python benchmarks/part_of.py DATA --labels 0 1 8 9 --out vehicles
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def main() -> None:
    """Write the same files with fewer rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with parquet files")
    parser.add_argument("--labels", nargs="+", type=int, required=True, help="that stay")
    parser.add_argument("--column", default="label", help="where they are (default label)")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    for path in sorted(options.data.rglob("*.parquet")):
        table = pq.read_table(path)
        labels = table[options.column]
        part = table.filter(pc.is_in(labels, value_set=pa.array(options.labels, type=labels.type)))
        target = options.out / path.relative_to(options.data)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, target)
        print(f"{target}: {len(part)} of {len(table)} rows", flush=True)


if __name__ == "__main__":
    main()
