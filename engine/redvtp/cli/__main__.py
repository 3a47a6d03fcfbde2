"""`python -m redvtp.cli`."""

import sys

from redvtp.cli.main import main

sys.exit(main())
