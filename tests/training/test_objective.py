"""The objectives: against each other, against finite sums, and their gradients."""

import itertools
import math

import pytest
import torch

from fastcascade.errors import InvalidArgument
from fastcascade.training.objective import (
    auxiliary_loss,
    distillation_loss,
    exact_loss,
    greedy_exit,
    imitation_loss,
    objective_loss,
    policy_log_probs,
    reinforce_loss,
    rewards,
    sample_exits,
)


def test_the_policy_is_the_product_of_its_decisions():
    u = torch.tensor([[0.3, -40.0], [-1.2, 55.0]], dtype=torch.float64)
    s = u.sigmoid()
    expected = torch.stack([s[0], (1 - s[0]) * s[1], (1 - s[0]) * (1 - s[1])])
    torch.testing.assert_close(policy_log_probs(u).exp(), expected)
    torch.testing.assert_close(policy_log_probs(u).exp().sum(0), torch.ones(2, dtype=torch.float64))


def test_rewards_are_minus_cross_entropy_minus_priced_cost():
    log_probs = torch.randn(3, 4, 5).log_softmax(2)
    labels = torch.tensor([0, 4, 2, 2])
    got = rewards(log_probs, labels, torch.tensor([0.1, 0.5, 1.6]), alpha=0.4, bound=math.inf)
    for k, i in itertools.product(range(3), range(4)):
        expected = log_probs[k, i, labels[i]] - 0.4 * (0.1, 0.5, 1.6)[k]
        assert float(got[k, i]) == pytest.approx(float(expected), abs=1e-6)


def test_the_bounded_loss_is_the_cross_entropy_near_zero_and_never_above_its_bound():
    q = torch.tensor([1.0, 0.99, 0.5, 1e-3, 1e-30], dtype=torch.float64)
    log_probs = torch.stack([q, 1 - q], 1).log()[None]
    labels, free = torch.zeros(5, dtype=torch.long), torch.zeros(1)
    loss = -rewards(log_probs, labels, free, alpha=0.0, bound=2.0)[0]
    torch.testing.assert_close(loss, 2 * (1 - q.sqrt()))
    plain = -rewards(log_probs, labels, free, alpha=0.0, bound=math.inf)[0]
    assert (loss <= plain.clamp(max=2) + 1e-12).all()
    assert float(loss[1]) == pytest.approx(float(plain[1]), rel=0.01)


def test_sampled_exits_follow_the_policy():
    u = torch.tensor([[0.5], [-0.7]], dtype=torch.float64).expand(2, 100_000)
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    shares = torch.bincount(sample_exits(u, grid), minlength=3) / 100_000
    torch.testing.assert_close(shares.double(), policy_log_probs(u[:, :1]).exp()[:, 0], atol=1e-4, rtol=0)


def test_the_greedy_exit_is_the_first_that_wants_to_stop():
    u = torch.tensor([[1.0, -1, -1, -1], [-1.0, 0, -1, 2]])
    assert greedy_exit(u).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("baseline", ["none", "constant", "per instance"])
def test_reinforce_is_unbiased_by_monte_carlo(baseline):
    """Its mean gradient over many draws equals the exact one, for scores and for class probabilities."""
    torch.manual_seed(0)
    n, draws = 4, 40_000
    u = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, n, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3])
    shares = torch.tensor([0.1, 0.4, 1.4])

    def reward(logits):
        return rewards(logits.log_softmax(2), labels, shares, 0.5)

    exact = torch.autograd.grad(exact_loss(u, reward(z)), (u, z))
    b = {"none": 0.0, "constant": -1.5, "per instance": torch.randn(n, dtype=torch.float64)}[baseline]
    many_u = u.repeat(1, draws)
    many_z = z.repeat(1, draws, 1)
    many_b = b.repeat(draws) if isinstance(b, torch.Tensor) else b
    many_reward = rewards(many_z.log_softmax(2), labels.repeat(draws), shares, 0.5)
    loss = reinforce_loss(many_u, many_reward, torch.rand(n * draws, dtype=torch.float64), many_b)
    for got, expected in zip(torch.autograd.grad(loss, (u, z)), exact, strict=True):
        torch.testing.assert_close(got, expected, atol=0.01, rtol=0)
        assert float(expected.abs().max()) > 0.05


def test_imitation_copies_the_best_exit_in_hindsight():
    reward = torch.tensor([[-1.0, -2.0, -1.0], [-3.0, -1.0, -1.0], [-2.0, -1.5, -4.0]])
    u = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(imitation_loss(u, reward), u)
    # Stop at 0 for the first (gap 1) and, by a tie without weight, the third; go on for the second (gap 1).
    assert gradient.sign().tolist() == [[-1, 1, 0], [1, -1, -1]]
    # Half a nat weighs half of one, and three weigh no more than one.
    one = float(gradient[0, 0].abs())
    assert float(gradient[1, 1].abs()) == pytest.approx(one / 2)
    assert float(gradient[1, 2].abs()) == pytest.approx(one)


def test_auxiliary_and_distillation_losses_are_sums_over_stages():
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    labels = torch.tensor([1, 0, 3])
    expected = torch.stack([torch.nn.functional.cross_entropy(z[k], labels) for k in range(2)]).sum()
    assert float(auxiliary_loss(z, labels)) == pytest.approx(float(expected), rel=1e-6)
    teacher = torch.full((3, 4), -math.inf)
    teacher[torch.arange(3), labels] = 0.0
    assert float(distillation_loss(z, teacher)) == pytest.approx(float(expected), rel=1e-6)


def test_an_unknown_objective_is_named():
    with pytest.raises(InvalidArgument, match="unknown objective 'adam'"):
        objective_loss("adam", torch.zeros(1, 1), torch.zeros(2, 1), torch.zeros(1))
