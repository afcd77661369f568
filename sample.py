"""Ask a trained Q-function for a response, each token coloured by its implicit reward.

python sample.py --search greedy                       # a held-out post of the TL;DR world
python sample.py --search beam --beam.width 5          # the likeliest response that five beams find
python sample.py --search mcts --tree tree.html        # tree search, often with a proof, and its tree to look at
"""

from minqstar.cli import run
from minqstar.sample import Options, main

if __name__ == "__main__":
    run(main, Options, prog="sample.py")
