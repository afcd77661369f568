"""Ask a trained Q-function for a response; `python sample.py --help` says how (minqstar/lab/sample.py)."""

from minqstar.cli import sample

if __name__ == "__main__":
    sample()
