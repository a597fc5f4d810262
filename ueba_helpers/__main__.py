"""`python -m ueba_helpers` is the command `ueba`."""

import sys

from ueba_helpers.cli import main

sys.exit(main())
