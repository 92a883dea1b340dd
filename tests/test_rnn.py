"""The recurrent network against torch's own layer with the same weights, and by its properties."""

import pytest
import torch
from torch import Tensor, nn

from dianlib import rnn


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


B, T, F, H = 3, 5, 4, 6


def weights(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = [(H, F), (H, H), (H,), (H,)]
    ih, hh, b_ih, b_hh = (
        randn(seed + n, *shape).mul_(0.7).requires_grad_() for n, shape in enumerate(shapes)
    )
    return ih, hh, b_ih, b_hh


def test_the_cell_equals_torchs_cell_values_and_gradients() -> None:
    theirs = nn.RNNCell(F, H).double()
    inputs = randn(1, B, F).requires_grad_(), randn(2, B, H).requires_grad_()
    ours = rnn.rnn_cell(*inputs, theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh)
    expected = theirs(*inputs)
    torch.testing.assert_close(ours, expected)
    wanted = [*inputs, *theirs.parameters()]
    for a, b in zip(
        torch.autograd.grad((ours * randn(3, B, H)).sum(), wanted),
        torch.autograd.grad((expected * randn(3, B, H)).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "activation"), [("tanh", torch.tanh), ("relu", torch.relu)])
@pytest.mark.parametrize("shape", [(B, T, F), (1, 1, F), (2, 40, F)])
def test_the_layer_equals_torchs_layer_values_and_gradients(
    name: str, activation: object, shape: tuple[int, ...]
) -> None:
    assert callable(activation)
    theirs = nn.RNN(F, H, nonlinearity=name, batch_first=True).double()
    ours = rnn.RNN(F, H, activation).double()
    ours.load_state_dict(theirs.state_dict())
    xs = randn(4, *shape).requires_grad_()
    h0 = randn(5, shape[0], H).requires_grad_()
    expected, last = theirs(xs, h0.unsqueeze(0))
    states = ours(xs, h0)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(states[:, -1], last[0])
    direction = randn(6, *states.shape)
    for a, b in zip(
        torch.autograd.grad((states * direction).sum(), [xs, h0, *ours.parameters()]),
        torch.autograd.grad((expected * direction).sum(), [xs, h0, *theirs.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours(xs), theirs(xs)[0])  # both start from zeros


def test_the_first_weights_are_drawn_as_torch_draws_them() -> None:
    torch.manual_seed(0)
    ours = rnn.RNN(F, H)
    torch.manual_seed(0)
    theirs = nn.RNN(F, H)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_unrolling_is_the_cell_step_by_step() -> None:
    xs, h = randn(1, B, T, F), randn(2, B, H)
    states = rnn.unroll(xs, h, *weights())
    for t in range(T):
        h = rnn.rnn_cell(xs[:, t], h, *weights())
        torch.testing.assert_close(states[:, t], h)


def test_the_future_leaves_the_past_as_it_was_bit_for_bit() -> None:
    xs, h0 = randn(1, B, T, F), torch.zeros(B, H, dtype=torch.float64)
    before = rnn.unroll(xs, h0, *weights())
    changed = xs.clone()
    changed[:, 3:] += 1
    after = rnn.unroll(changed, h0, *weights())
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).any()


def test_samples_do_not_see_each_other() -> None:
    model = rnn.RNNClassifier(F, H, 3).double()
    xs = randn(1, B, T, F)
    together = model(xs)
    for b in range(B):
        torch.testing.assert_close(model(xs[b : b + 1])[0], together[b])
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(xs[order]), together[order])


def test_a_sequence_in_two_parts_is_the_whole_when_the_state_is_handed_on() -> None:
    layer = rnn.RNN(F, H).double()
    xs = randn(1, B, T, F)
    first = layer(xs[:, :2])
    second = layer(xs[:, 2:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, second], dim=1), layer(xs))


def test_the_classifier_reads_the_last_state_and_can_be_differentiated() -> None:
    torch.manual_seed(0)
    model = rnn.RNNClassifier(F, H, 3).double()
    theirs = nn.RNN(F, H, batch_first=True).double()
    theirs.load_state_dict(model.rnn.state_dict())
    xs = randn(1, B, T, F).requires_grad_()
    torch.testing.assert_close(model(xs), model.output(theirs(xs)[1][0]))
    assert torch.autograd.gradcheck(model, xs)


def test_order_counts() -> None:
    model = rnn.RNNClassifier(F, H, 3).double()
    xs = randn(1, B, T, F)
    assert not torch.allclose(model(xs), model(xs.flip(1)))


def test_a_sequence_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        rnn.RNN(F, H)(torch.zeros(B, 0, F))


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_the_gradient_by_hand_equals_autograds(steps: int) -> None:
    xs, h0, grad_last = randn(1, B, steps, F), randn(2, B, H), randn(3, B, H)
    w_ih, w_hh, b_ih, b_hh = weights()
    last = rnn.unroll(xs, h0, w_ih, w_hh, b_ih, b_hh)[:, -1]
    wanted = torch.autograd.grad((last * grad_last).sum(), [w_ih, w_hh, b_ih, b_hh])
    with torch.no_grad():
        by_hand = rnn.bptt_gradient(xs, h0, w_ih, w_hh, b_ih, b_hh, grad_last)
    for a, b in zip([*by_hand, by_hand[2]], wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_by_distance_is_the_gradient_of_each_step() -> None:
    model = rnn.RNNClassifier(F, H, 3).double()
    xs = randn(1, B, T, F)
    norms = rnn.gradient_by_distance(model, xs)
    for k in range(T):
        step = xs[:, T - 1 - k].clone().requires_grad_()
        whole = torch.cat([xs[:, : T - 1 - k], step.unsqueeze(1), xs[:, T - k :]], dim=1)
        (gradient,) = torch.autograd.grad(model(whole).sum(), step)
        torch.testing.assert_close(norms[k], gradient.norm())
    assert not xs.requires_grad


def test_gradient_by_distance_of_a_linear_recurrence_is_a_power() -> None:
    layer = rnn.RNN(1, 1, activation=lambda a: a).double()
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), (2.0, 0.5, 0.0, 0.0), strict=True):
            parameter.fill_(value)
    norms = rnn.gradient_by_distance(lambda xs: layer(xs)[:, -1], torch.ones(1, 4, 1, dtype=torch.float64))
    assert norms.tolist() == [2.0, 1.0, 0.5, 0.25]


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 1000.0])
def test_clipping_equals_torchs(max_norm: float) -> None:
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (4,), (2,))] for _ in range(2))
    for parameters in (ours, theirs):
        for seed, parameter in enumerate(parameters[:2]):
            parameter.grad = randn(seed, *parameter.shape).float() * 3
    # A generator: the parameters can be gone through once only.
    norm = rnn.clip_grad_norm((parameter for parameter in ours), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(expected.item())
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert ours[2].grad is None


def test_clipping_keeps_zeros_and_directions() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    assert rnn.clip_grad_norm([parameter], 1.0) == 0.0
    assert parameter.grad.tolist() == [0.0, 0.0]
    parameter.grad = torch.tensor([30.0, 40.0])
    assert rnn.clip_grad_norm([parameter], 5.0) == pytest.approx(50.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([3.0, 4.0]))
    assert rnn.clip_grad_norm([], 1.0) == 0.0


@pytest.mark.parametrize("max_norm", [0.0, -1.0])
def test_clipping_refuses_a_bound_that_is_not_positive(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        rnn.clip_grad_norm([], max_norm)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_orthogonal_is_gram_and_schmidts_result(n: int) -> None:
    matrix = randn(n, n, n)
    columns: list[Tensor] = []
    for column in matrix.T:
        for earlier in columns:
            column = column - (column @ earlier) * earlier
        columns.append(column / column.norm())
    result = rnn.orthogonal(matrix)
    torch.testing.assert_close(result, torch.stack(columns, dim=1))
    torch.testing.assert_close(result.T @ result, torch.eye(n, dtype=torch.float64))
