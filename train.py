"""Train a Q-function: SFT, then DPO, on the TL;DR world or on a file of your own.

python train.py --stage dpo                      # everything: data, SFT, DPO, evaluation against the exact Q*
python train.py --stage dpo --data prefs.jsonl   # the same on rows of prompt, chosen, rejected
"""

from minqstar.cli import run
from minqstar.pipeline import Options, main

if __name__ == "__main__":
    run(main, Options, prog="train.py")
