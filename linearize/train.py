"""`python -m linearize.train --model DIR …`: `linearize train DIR …` under the name that launchers were told first."""

import sys

from linearize import cli

if __name__ == "__main__":
    sys.argv[1:] = ["train", *(word.removeprefix("--model=") for word in sys.argv[1:] if word != "--model")]
    cli.main()
