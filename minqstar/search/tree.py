"""The arrays of a batch of search trees; how they grow is in `mcts`."""

import numpy as np

NONE = -1  # no node, no edge
EDGE_BYTES = 53  # of each of a tree's B N A edges


class Tree:
    """B trees with room for N nodes of A kept actions each. Node 0 is the prompt; nodes are numbered as made.

    An edge is an action of a node, by ascending token id. No node is behind the edge of an end token.
    """

    def __init__(self, B: int, N: int, A: int):
        self.parent = np.full((B, N), NONE, np.int32)  # (B, N) the node before it
        self.action = np.zeros((B, N), np.int32)  # (B, N) the edge that leads here
        self.depth = np.zeros((B, N), np.int32)  # (B, N) tokens from the prompt
        self.score = np.zeros((B, N))  # (B, N) log pi of the path, nats
        self.reward = np.zeros((B, N))  # (B, N) rewards of the path
        self.value = np.zeros((B, N))  # (B, N) whole-path value, backed up
        self.visits = np.zeros((B, N), np.int32)  # (B, N) simulations that came through
        self.token = np.zeros((B, N, A), np.int64)  # (B, N, A) the token of each edge
        self.logp = np.full((B, N, A), -np.inf)  # (B, N, A) its log-prob, nats
        self.prior = np.zeros((B, N, A))  # (B, N, A) its probability
        self.step = np.zeros((B, N, A))  # (B, N, A) its step reward
        self.child = np.full((B, N, A), NONE, np.int32)  # (B, N, A) the node behind it, once made
        self.edge_visits = np.zeros((B, N, A), np.int32)  # (B, N, A) simulations that took it
        self.edge_value = np.zeros((B, N, A))  # (B, N, A) whole-path value behind it, once visited
        self.closed = np.ones((B, N, A), bool)  # (B, N, A) never to be taken again
        self.flying = np.zeros((B, N, A), np.int32)  # (B, N, A) simulations under way through it
        self.low, self.high = np.full(B, np.inf), np.full(B, -np.inf)  # (B,) of all simulations' values
        self.best_goal = np.full(B, -np.inf)  # (B,) of the best finished response: log pi, or its reward
        self.best_node, self.best_edge = np.full((2, B), NONE)  # (B,) and where it ends
        self.simulations = np.zeros(B, np.int64)  # (B,) that have come back
        self.dropped = np.full(B, -np.inf)  # (B,) the most that a response with an action not kept may come to
        self.made = 1  # nodes so far, the same in all trees

    def double(self):
        """Make room for twice as many nodes."""
        B, N, A = self.token.shape
        for name, fresh in vars(Tree(B, N, A)).items():
            if np.ndim(fresh) >= 2:
                setattr(self, name, np.concatenate((getattr(self, name), fresh), axis=1))

    def shut(self, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Whether nodes have no open edge."""
        return self.closed[rows, nodes].all(-1)

    def path(self, row: int, node: int, edge: int) -> tuple[list[int], list[float]]:
        """The tokens and log-probs from a root to a node and over one of its edges."""
        tokens, logps = [], []
        while True:
            tokens.append(int(self.token[row, node, edge]))
            logps.append(float(self.logp[row, node, edge]))
            if node == 0:
                return tokens[::-1], logps[::-1]
            node, edge = self.parent[row, node], self.action[row, node]
