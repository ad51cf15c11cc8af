"""``python -m layerskip.cli`` is the ``layerskip`` command."""

import sys

from . import main

sys.exit(main())
