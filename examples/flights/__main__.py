"""`make demo`, or `python -m examples.flights`; from any other folder `python /path/to/examples/flights`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    from examples.flights.demo import main
except ModuleNotFoundError as missing:
    if missing.name not in ("duckdb", "matplotlib", "sluiceway"):
        raise
    sys.exit(f"the demo needs {missing.name}: run it with `make demo`, or pip install 'sluiceway[demo]' first")

sys.exit(main())
