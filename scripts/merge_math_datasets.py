"""Merge the parts of MATH into train and validation; 01_data goes on to split train."""

import sys

from notebook import DATA, execute

if __name__ == "__main__":
    sys.exit(execute("01_data", __doc__, DATA))
