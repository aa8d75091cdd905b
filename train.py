"""Train one stage, or sweep: `python train.py --help`. The same as `speechssm train`."""

import sys

from speechssm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
