"""`python -m minqstar.lab.bench`: see `compare`."""

from minqstar.cli import run
from minqstar.lab.bench.compare import Options, main

run(main, Options, prog="python -m minqstar.lab.bench")
