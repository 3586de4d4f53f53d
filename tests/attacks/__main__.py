"""`python tests/attacks`."""

from __future__ import annotations

import sys
from pathlib import Path

# Under pytest, and in the processes that are started, the package is found there too, under the same name.
sys.path.insert(0, str(Path(__file__).parent.parent))

from attacks.run import main

sys.exit(main())
