"""`python -m sft_edge` is `sft-edge`."""

import sys

from sft_edge.cli import main

sys.exit(main())
