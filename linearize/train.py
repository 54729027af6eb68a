"""`python -m linearize.train`, the form that launchers start; the training stages are in `linearize.recovery`."""

from linearize.recovery.train import main

if __name__ == "__main__":
    main()
