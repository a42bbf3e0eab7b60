"""Split train into training and validation problems; nothing to do after the merge."""

import sys

from notebook import DATA, execute

if __name__ == "__main__":
    sys.exit(execute("01_data", __doc__, DATA))
