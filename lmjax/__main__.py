"""`python -m lmjax` is the command `lmjax`."""

import sys

from lmjax.cli import main

sys.exit(main())
