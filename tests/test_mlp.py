"""The network by hand against torch, values and gradients, and by its properties."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dianlib import mlp


def randn(seed: int, *shape: int, requires_grad: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_(requires_grad)


def gradients(function: object, *inputs: Tensor) -> tuple[Tensor, ...]:
    assert callable(function)
    result = function(*inputs)
    weights = randn(99, *result.shape) if result.dim() else torch.tensor(1.0)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return (result, *torch.autograd.grad((result * weights).sum(), wanted))


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_linear_equals_torch(shape: tuple[int, ...]) -> None:
    inputs = (
        randn(0, *shape, requires_grad=True),
        randn(1, 3, 4, requires_grad=True),
        randn(2, 3, requires_grad=True),
    )
    for ours, theirs in zip(gradients(mlp.linear, *inputs), gradients(F.linear, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_relu_equals_torch_also_at_zero_and_for_nan() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0], requires_grad=True)
    for ours, theirs in zip(gradients(mlp.relu, x), gradients(F.relu, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert mlp.relu(torch.tensor([torch.nan])).isnan().all()  # a NaN must not be hidden


@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_softmax_equals_torch(shift: float) -> None:
    logits = (randn(0, 6, 5) * 3 + shift).requires_grad_(True)
    theirs = gradients(lambda z: F.softmax(z, dim=-1), logits)
    for got, wanted in zip(gradients(mlp.softmax, logits), theirs, strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(mlp.softmax(logits), mlp.softmax(logits - shift))


def test_rows_of_softmax_are_independent_however_far_apart() -> None:
    logits = torch.tensor([[0.0, 1.0], [500.0, 501.0]])
    probabilities = mlp.softmax(logits)
    torch.testing.assert_close(probabilities[0], probabilities[1])


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_cross_entropy_and_its_gradient_equal_torch(scale: float) -> None:
    logits = (randn(0, 8, 5) * scale).requires_grad_(True)
    targets = torch.tensor([0, 1, 2, 3, 4, 4, 4, 0])
    ours, gradient = gradients(lambda z: mlp.cross_entropy(z, targets), logits)
    theirs, their_gradient = gradients(lambda z: F.cross_entropy(z, targets), logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, their_gradient)
    torch.testing.assert_close(mlp.cross_entropy_gradient(logits.detach(), targets), gradient)
    assert torch.autograd.gradcheck(lambda z: mlp.cross_entropy(z, targets), logits)


def test_cross_entropy_of_a_confident_wrong_answer_is_finite_in_float32() -> None:
    logits = torch.tensor([[0.0, 200.0]])
    assert mlp.cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(200.0)


def test_twice_softmax_cannot_fall_below_its_floor() -> None:
    certain = torch.full((1, 10), -1e4)
    certain[0, 3] = 1e4
    floor = torch.log(torch.tensor(1 + 9 / torch.e)).item()
    assert mlp.cross_entropy(mlp.softmax(certain), torch.tensor([3])).item() == pytest.approx(floor)
    assert floor == pytest.approx(1.4612, abs=5e-5)


@pytest.mark.parametrize("sizes", [[5, 3], [5, 7, 3], [5, 7, 6, 4, 3]])
def test_mlp_equals_a_torch_sequential_with_the_same_weights(sizes: list[int]) -> None:
    ours = mlp.MLP(sizes).double()
    layers: list[nn.Module] = []
    for layer in ours.layers:
        copy = nn.Linear(layer.in_features, layer.out_features).double()
        copy.load_state_dict(layer.state_dict())
        layers += [copy, nn.ReLU()]
    theirs = nn.Sequential(*layers[:-1])
    x = randn(3, 9, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_mlp_flattens_images_and_uses_the_relu_of_the_chapter() -> None:
    network = mlp.MLP([12, 8, 2])
    images = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(images), network(images.flatten(1)))
    x = randn(0, 4, 4).float()
    assert torch.equal(torch.relu(x), mlp.relu(x))


def test_mlp_permuting_hidden_units_changes_nothing() -> None:
    network = mlp.MLP([4, 6, 3]).double()
    x = randn(0, 5, 4)
    before = network(x)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    first, second = network.layers
    with torch.no_grad():
        first.weight.copy_(first.weight[order].clone())
        first.bias.copy_(first.bias[order].clone())
        second.weight.copy_(second.weight[:, order].clone())
    torch.testing.assert_close(network(x), before)


@pytest.mark.parametrize("sizes", [[], [5]])
def test_mlp_refuses_too_few_sizes(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="give an input and an output size"):
        mlp.MLP(sizes)


def test_sgd_step_equals_torch_and_skips_what_has_no_gradient() -> None:
    torch.manual_seed(0)
    ours, theirs = (
        [nn.Parameter(torch.ones(3)) for _ in range(2)],
        [nn.Parameter(torch.ones(3)) for _ in range(2)],
    )
    for parameters in (ours, theirs):
        parameters[0].grad = torch.tensor([1.0, -2.0, 0.5])
    mlp.sgd_step(iter(ours), 0.1)
    torch.optim.SGD(theirs, lr=0.1).step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert a.requires_grad
