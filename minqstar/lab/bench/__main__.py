"""`python -m minqstar.lab.bench`: the command of `compare`."""

from minqstar.cli import run
from minqstar.lab.bench.compare import NEEDS, Options, main

if __name__ == "__main__":
    run(main, Options, "python -m minqstar.lab.bench", NEEDS)
