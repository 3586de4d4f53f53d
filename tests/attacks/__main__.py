"""`python tests/attacks`."""

from __future__ import annotations

import sys
from pathlib import Path

# The package has the same name here as under pytest and in the processes that it starts.
sys.path.insert(0, str(Path(__file__).parent.parent))

from attacks.run import main

sys.exit(main())
