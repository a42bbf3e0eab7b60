"""One run in which each reward is set to zero with probability mask_rate."""

import sys

from notebook import TRAINING, execute

if __name__ == "__main__":
    sys.exit(execute("02_train", __doc__, TRAINING | {"mask_rate": None}))
