"""Other methods' losses and TRL's own code, on the same log-probabilities: values and gradients.

A loss of TRL's asks a trainer, a model and an accelerator for little, which stands in for them here."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minqstar.theory import methods
from minqstar.theory.losses import dpo_loss

trl = pytest.importorskip("trl")
CPOTrainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer

BETA, N, T = 0.3, 10, 5
LENGTHS = torch.tensor([2, 5, 3, 1, 4, 5, 5, 2, 1, 4])  # of five chosen responses, then of five rejected ones
SCORED = torch.arange(T) < LENGTHS[:, None]
IN_PAIRS = torch.arange(N).view(2, -1).T.flatten()  # chosen, rejected, chosen, …


def drawn(seed: int) -> Tensor:
    """Log-probabilities (N, T) of tokens, nats, 0 after a response's end."""
    generator = torch.Generator().manual_seed(seed)
    return -(3 * torch.rand(N, T, generator=generator, dtype=torch.float64) * SCORED)


def trainer(**options) -> SimpleNamespace:
    alone = SimpleNamespace(device="cpu", num_processes=1, gather=lambda t: t, gather_for_metrics=lambda t: t)
    alone.reduce = lambda t, reduction: t
    logged = {"_metrics": {"eval": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1}
    common = {"accelerator": alone, "beta": BETA, "aux_loss_enabled": False, "precompute_ref_logps": True}
    return SimpleNamespace(model=SimpleNamespace(training=False), **(logged | common | options))


class Model:
    training = False

    def __init__(self, logps: Tensor):
        logged = {"entropy": logps.detach(), "mean_logits": logps.detach(), "is_top1": SCORED}
        self.outputs = SimpleNamespace(log_probs=logps, **logged)

    def __call__(self, **inputs) -> SimpleNamespace:
        return self.outputs


def batch(**more) -> dict:
    """One token of prompt before each response."""
    mask = torch.cat((torch.zeros(N, 1, dtype=torch.bool), SCORED), dim=1).long()
    return {"input_ids": mask, "attention_mask": mask, "completion_mask": mask} | more


def equal(ours: Tensor, theirs: Tensor, of: Tensor):
    """The same value, and the same gradient with respect to the scored tokens of `of`, which is not 0."""
    found, expected = (torch.autograd.grad(loss, of, retain_graph=True)[0][SCORED] for loss in (ours, theirs))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12) and torch.allclose(found, expected, atol=1e-12)
    assert found.abs().max() > 1e-3


def by_dpo_trainer(kind: str, logps: Tensor, ref: Tensor) -> Tensor:
    chosen, rejected = ref.sum(-1).chunk(2)
    own = trainer(loss_types=[kind], loss_weights=[1.0], ld_alpha=None, f_divergence_type="reverse_kl")
    own.use_weighting = False
    inputs = batch(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    return trl.DPOTrainer._compute_loss(own, Model(logps), inputs, False)


def test_dpo_and_ipo_are_those_of_trl_and_its_ipo_has_means():
    logps, ref = drawn(0).requires_grad_(), drawn(1)
    response = torch.arange(N).repeat_interleave(LENGTHS[IN_PAIRS])
    flat = (t[IN_PAIRS][SCORED[IN_PAIRS]] for t in (logps, ref))
    equal(dpo_loss(*flat, response, [2] * (N // 2), BETA).loss.mean(), by_dpo_trainer("sigmoid", logps, ref), logps)
    theirs = by_dpo_trainer("ipo", logps, ref)
    of_sums, of_means = (
        methods.ipo((logps.sum(-1) / L)[IN_PAIRS], (ref.sum(-1) / L)[IN_PAIRS], BETA).mean() for L in (1, LENGTHS)
    )
    equal(of_means, theirs, logps)
    assert abs(of_sums.item() - theirs.item()) > 0.1
    cpo = trainer(alpha=0.0, loss_type="ipo")  # where it has IPO on sums, and no reference
    sums = logps.sum(-1)
    equal(
        methods.ipo(sums[IN_PAIRS], torch.zeros(N), BETA).mean(),
        CPOTrainer.cpo_loss(cpo, *sums.chunk(2))[0].mean(),
        logps,
    )


def test_simpo_is_that_of_trl():
    logps = drawn(0).requires_grad_()
    cpo = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0)
    theirs = CPOTrainer.cpo_loss(cpo, *(logps.sum(-1) / LENGTHS).chunk(2))[0].mean()
    equal(methods.simpo(logps.sum(-1)[IN_PAIRS], LENGTHS[IN_PAIRS], BETA, 0.7).mean(), theirs, logps)


@pytest.mark.parametrize("kl", [0.4, -0.4])
def test_kto_is_that_of_trl(kl):
    """Its estimate of the KL may be negative: it counts as 0. It has no gradient."""
    logps, ref = drawn(0).requires_grad_(), drawn(1)
    desirable = torch.arange(N) % 3 > 0
    estimate = kl * logps.sum(-1) / logps.detach().sum(-1)
    own = trainer(loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    own._compute_kl_logps = lambda model, inputs: estimate
    inputs = batch(label=desirable, ref_logps=ref.sum(-1), ref_KL_logps=torch.zeros(N))
    theirs = trl.KTOTrainer._compute_loss(own, Model(logps), inputs, False)
    equal(methods.kto(logps.sum(-1), ref.sum(-1), desirable, BETA, BETA * estimate.mean()).mean(), theirs, logps)


def test_ppo_clip_is_that_of_trl():
    """Token by token, as GRPO averages it: over a response's tokens, then over responses."""
    logps, old = drawn(0).requires_grad_(), drawn(1)
    advantage = torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    own = trainer(
        beta=0.0, loss_type="grpo", epsilon_low=0.2, epsilon_high=0.2, args=SimpleNamespace(delta=None), use_vllm=False,
        importance_sampling_level="token", off_policy_mask_threshold=None, top_entropy_quantile=1.0,
        _entropy_bonus_enabled=False, _get_per_token_logps_and_entropies=lambda *_, **__: (logps, logps, None),
    )  # fmt: skip
    prompt = torch.ones(N, 1, dtype=torch.long)
    inputs = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": SCORED, "completion_mask": SCORED.long()}
    theirs = trl.GRPOTrainer._compute_loss(own, None, inputs | {"advantages": advantage, "old_per_token_logps": old})
    of_tokens = methods.ppo_clip(logps, old, advantage[:, None], 0.2) * SCORED
    equal((of_tokens.sum(-1) / LENGTHS).mean(), theirs, logps)
