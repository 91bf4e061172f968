"""`python -m cyflash`: the command line."""

import sys

from cyflash.cli import main

sys.exit(main())
