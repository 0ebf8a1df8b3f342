"""``python -m mpillama`` is ``mpillama``."""

import sys

from mpillama.cli.main import main

sys.exit(main())
