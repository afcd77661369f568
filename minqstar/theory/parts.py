"""Systems of two parts (arXiv 2404.12358, Appendix D): a refiner writes z, a generator writes y from z.

Both are one `TokenMDP`, with a temperature for each part: gamma where the refiner chooses, beta where the generator
does. With gamma = beta it is a language model that thinks (z) before it answers (y).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minqstar.theory.mdp import TokenMDP
from minqstar.theory.paths import Responses


def ends(mdp: TokenMDP) -> tuple[Tensor, Tensor]:
    """The states and actions (E,) that end a response, by state and then by action."""
    return torch.nonzero((mdp.token >= 0) & (mdp.next == mdp.num_states), as_tuple=True)


def then(first: TokenMDP, seconds: Sequence[TokenMDP]) -> TokenMDP:
    """The table in which what ends the first begins a second: the n-th of `ends(first)` the n-th of the seconds.

    The first's states keep their numbers, those of the seconds follow in order. ValueError unless every end has its
    second and all are of one batch shape.
    """
    states, actions = ends(first)
    if len(states) != len(seconds):
        raise ValueError(f"the first has {len(states)} ends, but there are {len(seconds)} seconds to begin")
    tables = [first, *seconds]
    batches = {tuple(mdp.log_ref.shape[:-2]) for mdp in tables}
    if len(batches) > 1:
        raise ValueError(f"tables to glue must be batches of one shape, got {sorted(batches)}")
    A = max(mdp.token.shape[1] for mdp in tables)
    *starts, S = torch.tensor([0, *(mdp.num_states for mdp in tables)]).cumsum(0).tolist()

    def glued(parts: list[Tensor], value: float) -> Tensor:
        return torch.cat([F.pad(part, (0, A - part.shape[-1]), value=value) for part in parts], dim=-2)

    nexts = [
        torch.where(mdp.next < mdp.num_states, mdp.next + start, S) for mdp, start in zip(tables, starts, strict=True)
    ]
    nexts[0][states, actions] = torch.tensor(starts[1:])
    return TokenMDP(
        glued([mdp.token for mdp in tables], -1),
        glued(nexts, S),
        glued([mdp.log_ref for mdp in tables], -torch.inf),
        glued([mdp.reward for mdp in tables], 0.0),
        chance=torch.cat([~mdp.own for mdp in tables]),
    )


def same_answer(mdp: TokenMDP, paths: Responses, refiner: int) -> Tensor:
    """(Y, R) bool: which responses (z, y) give each answer y, the tokens after the table's first `refiner` states."""
    tokens = F.pad(mdp.token, (0, 0, 0, 1), value=-1)[paths.states, paths.actions]
    written = tokens.masked_fill(paths.states < refiner, -1).tolist()
    spelled = [tuple(token for token in row if token >= 0) for row in written]
    return torch.tensor([[y == other for y in spelled] for other in dict.fromkeys(spelled)])


def unseen_thought(log_ratio: Tensor, log_ref: Tensor, gives: Tensor, beta: float) -> Tensor:
    """The implicit return (Y,) of answers whose z nobody saw: beta log(sum_z pi(z, y) / sum_z pi_ref(z, y)).

    From log(pi/pi_ref) and log pi_ref (R,) of the responses (z, y), nats, and the answer that each `gives` (Y, R). With
    one temperature and a reward of y alone it is R(y) - V*(s_0), so the DPO loss of it has pi*'s distribution of y for
    its minimiser; z itself it does not settle. With two temperatures it is no such thing.
    """
    pi, ref = (torch.where(gives, t, -torch.inf).logsumexp(-1) for t in (log_ref + log_ratio, log_ref))
    return beta * (pi - ref)
