"""`python -m paceline.spec.cli` is `paceline`."""

import sys

from .main import main

sys.exit(main())
