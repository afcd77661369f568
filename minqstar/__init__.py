"""A language model is a Q-function: the Python API, imported name by name when it is first used.

import minqstar
q = minqstar.load("runs/dpo")                        # a policy, its reference, its beta
q.score(prompt, [" One answer.", " Another."])       # each token's implicit reward beta log(pi/pi_ref)
q.search(prompt, "mcts", budget=256)                 # the likeliest response, often with a proof
minqstar.World().exact(prompt, " A summary.")        # the exact r, V*, Q*, A* of a text of the TL;DR world
minqstar.solve(mdp, beta=0.5)                        # the exact V*, Q*, pi* of any TokenMDP
"""

import importlib
import sys

_HOME = {
    "load": "ask",
    "QFunction": "ask",
    "SearchConfig": "ask",
    "World": "world.tldr",
    "solve": "theory.mdp",
    "TokenMDP": "theory.mdp",
    "read_pairs": "training.formats",
    "UserError": "errors",
}
__all__ = list(_HOME)

if sys.argv[:1] == ["-m"] and any(word.startswith("minqstar.") for word in sys.orig_argv):
    # `python -m minqstar.…` is about to import a command: Ctrl-C during that is one line, too
    from minqstar.cli import hear_signals, leave

    hear_signals(leave)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minqstar' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"minqstar.{_HOME[name]}"), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
