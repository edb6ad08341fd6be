"""`python -m bi_ops`, as torchrun starts it: the same as `bi-ops`."""

import sys

from bi_ops.cli import main

sys.exit(main())
