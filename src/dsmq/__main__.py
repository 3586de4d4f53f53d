"""`python -m dsmq` is `dsmq`."""

import sys

from dsmq.cli import main

sys.exit(main())
