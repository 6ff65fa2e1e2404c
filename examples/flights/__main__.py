"""`make demo`, or `python -m examples.flights`; from any other folder `python /path/to/examples/flights`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.flights.demo import main  # noqa: E402 # the line above finds it

sys.exit(main())
