"""``python -m curvopt.demo``."""

import sys

from curvopt.demo.run import main

sys.exit(main())
