"""Evaluate the finished runs with flipped rewards."""

import sys

from notebook import PROFILE, execute

if __name__ == "__main__":
    sys.exit(execute("03_eval", __doc__, PROFILE | {"study": "flip"}))
