"""`python -m hf_sparse_cli`, where the command `hf-sparse` is not installed."""

import sys

from hf_sparse_cli import main

sys.exit(main())
