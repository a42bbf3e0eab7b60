"""One run without noise."""

import sys

from notebook import TRAINING, execute

if __name__ == "__main__":
    sys.exit(execute("02_train", __doc__, TRAINING))
