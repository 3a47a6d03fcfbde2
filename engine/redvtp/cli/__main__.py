"""`python -m redvtp.cli.main`."""

import sys

from redvtp.cli.main import main

sys.exit(main())
