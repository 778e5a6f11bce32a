"""`python -m pipelines.spreading`; see `pipelines.spreading.command`."""

import sys

from pipelines.spreading.command import main

if __name__ == "__main__":
    sys.exit(main())
