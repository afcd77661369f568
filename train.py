"""Train a Q-function: SFT, then DPO. `python train.py --help` says how; minqstar/pipeline.py is what it does."""

from minqstar.cli import train

if __name__ == "__main__":
    train()
