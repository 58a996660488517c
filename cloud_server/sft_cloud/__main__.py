"""`python -m sft_cloud`, the same as `sft-cloud`."""

import sys

from sft_cloud.cli import main

sys.exit(main())
