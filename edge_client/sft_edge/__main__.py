"""`python -m sft_edge` is `sft-edge`."""

import os
import sys

# `-m` puts the working folder first among what Python imports from, where a `random.py` would be run.
if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from sft_edge.cli import main

sys.exit(main())
