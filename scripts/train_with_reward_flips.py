"""One run in which each reward is inverted with probability label_flip_rate."""

import sys

from notebook import TRAINING, execute

if __name__ == "__main__":
    sys.exit(execute("02_train", __doc__, TRAINING | {"label_flip_rate": None}))
