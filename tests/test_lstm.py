"""The cells and layers against torch with copied weights, values and gradients, and by their properties."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dianlib import lstm
from dianlib.data import recall_task

B, T, F, H, C = 3, 7, 5, 4, 6


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def weights(n_blocks: int) -> list[Tensor]:
    rows = n_blocks * H
    return [randn(1, rows, F), randn(2, rows, H), randn(3, rows), randn(4, rows)]


def assert_same_gradients(ours: Tensor, theirs: Tensor, wanted: list[Tensor]) -> None:
    """Compare two results of one shape, and the gradients of an uneven sum of each."""
    torch.testing.assert_close(ours, theirs)
    uneven = randn(99, *ours.shape).detach()
    for a, b in zip(
        torch.autograd.grad((ours * uneven).sum(), wanted),
        torch.autograd.grad((theirs * uneven).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_lstm_cell_equals_torch() -> None:
    x, h, c = randn(5, B, F), randn(6, B, H), randn(7, B, H)
    inputs = weights(4)
    ours = torch.stack(lstm.lstm_cell(x, (h, c), *inputs))
    theirs = torch.stack(torch.lstm_cell(x, (h, c), *inputs))
    assert_same_gradients(ours, theirs, [x, h, c, *inputs])


def test_gru_cell_equals_torch() -> None:
    x, h, inputs = randn(5, B, F), randn(6, B, H), weights(3)
    assert_same_gradients(lstm.gru_cell(x, h, *inputs), torch.gru_cell(x, h, *inputs), [x, h, *inputs])


def copy_of(theirs: Any) -> Any:
    """Make our layer with the weights of a torch layer."""
    ours = (lstm.LSTM if isinstance(theirs, nn.LSTM) else lstm.GRU)(F, H).double()
    ours.load_state_dict(theirs.state_dict())
    return ours


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_layer_equals_torch(kind: Any, with_state: bool) -> None:
    torch.manual_seed(0)
    theirs = kind(F, H, batch_first=True).double()
    ours = copy_of(theirs)
    x, h, c = randn(5, B, T, F), randn(6, B, H), randn(7, B, H)
    own_state, their_state = ((h, c), (h[None], c[None])) if kind is nn.LSTM else (h, h[None])
    their_outputs, their_last = theirs(x, their_state) if with_state else theirs(x)
    outputs, last = ours(x, own_state) if with_state else ours(x)
    torch.testing.assert_close(outputs, their_outputs)
    for a, b in zip(last, their_last, strict=True) if kind is nn.LSTM else [(last, their_last)]:
        torch.testing.assert_close(a, b.squeeze(0))
    uneven = randn(99, B, T, H).detach()
    (outputs * uneven).sum().backward()
    x_gradient, x.grad = x.grad, None
    (their_outputs * uneven).sum().backward()
    torch.testing.assert_close(x_gradient, x.grad)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("layer", [lstm.LSTM, lstm.GRU])
def test_a_sequence_in_two_parts_gives_the_same(layer: Any) -> None:
    model, x = layer(F, H).double(), randn(5, B, T, F)
    whole, last = model(x)
    first, state = model(x[:, :3])
    second, last_of_parts = model(x[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(last_of_parts, last)


@pytest.mark.parametrize("layer", [lstm.LSTM, lstm.GRU])
def test_the_future_does_not_reach_the_past(layer: Any) -> None:
    model, x = layer(F, H).double(), randn(5, B, T, F).detach()
    changed = x.clone()
    changed[:, 4] += 1
    before, after = model(x)[0], model(changed)[0]
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def blocks(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(H)


def test_gates_of_one_and_zero_keep_the_cell_exactly() -> None:
    c = randn(7, B, H)
    nothing = (torch.zeros(4 * H, F).double(), torch.zeros(4 * H, H).double())
    closed, opened = -1e4, 1e4
    zero = torch.zeros(4 * H).double()
    _, kept = lstm.lstm_cell(
        randn(5, B, F), (randn(6, B, H), c), *nothing, blocks(closed, opened, 3, 0), zero
    )
    assert torch.equal(kept, c)
    h = randn(6, B, H)
    wanted = lstm.gru_cell(
        randn(5, B, F), h, nothing[0][: 3 * H], nothing[1][: 3 * H], blocks(0, opened, 3), zero[: 3 * H]
    )
    torch.testing.assert_close(wanted, h)


def test_the_direct_road_through_the_cell_is_the_product_of_the_forget_gates() -> None:
    """Without recurrent weights nothing but the forget gates lies between the first cell and the last."""
    w_ih, _, b_ih, b_hh = (w.detach() for w in weights(4))
    w_hh = torch.zeros(4 * H, H).double()
    xs, c0 = randn(5, B, T, F).detach(), randn(7, B, H)
    h, c = torch.zeros(B, H).double(), c0
    for x in xs.unbind(1):
        h, c = lstm.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh)
    gradient = torch.autograd.grad(c.sum(), c0)[0]
    torch.testing.assert_close(gradient, lstm.gates(xs, w_ih, w_hh, b_ih, b_hh)["forget"].prod(dim=1))


def test_the_gates_explain_the_outputs_of_torch() -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(F, H, batch_first=True).double()
    x = randn(5, B, T, F).detach()
    found = lstm.gates(x, *theirs.parameters())
    assert set(found) == {"input", "forget", "candidate", "output"}
    for name, values in found.items():
        assert values.shape == (B, T, H)
        assert ((values > (-1 if name == "candidate" else 0)) & (values < 1)).all()
    c, outputs = torch.zeros(B, H), []
    for t in range(T):
        i, f, g, o = (found[name][:, t] for name in ("input", "forget", "candidate", "output"))
        c = f * c + i * g
        outputs.append(o * c.tanh())
    torch.testing.assert_close(torch.stack(outputs, dim=1), theirs(x)[0])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}])
def test_open_forget_gates_changes_the_forget_gates_only(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(F, H, **options)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lstm.open_forget_gates(model, 2.5)
    after = dict(model.named_parameters())
    forget = slice(H, 2 * H)
    for name, parameter in after.items():
        if name.startswith("bias_ih"):
            other = after[name.replace("bias_ih", "bias_hh")]
            torch.testing.assert_close(parameter[forget] + other[forget], torch.full((H,), 2.5))
        if name.startswith("bias"):
            changed = parameter.detach().clone()
            changed[forget] = before[name][forget]
            assert torch.equal(changed, before[name])
        else:
            assert torch.equal(parameter, before[name])


def test_remember_for_leaves_a_share_of_one_e_th() -> None:
    model = nn.LSTM(F, H)
    lstm.remember_for(model, 200)
    total = (model.bias_ih_l0 + model.bias_hh_l0).double()
    assert float(total[H : 2 * H].sigmoid().prod() ** (200 / H)) == pytest.approx(math.exp(-1), rel=0.01)
    torch.testing.assert_close(total[:H].sigmoid(), torch.full((H,), 1 / 201).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("model", [nn.GRU(F, H), nn.Linear(F, H), nn.Sequential()])
def test_open_forget_gates_refuses_what_has_none(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no forget gates"):
        lstm.open_forget_gates(model, 1.0)


def test_the_forget_gate_of_our_layer_starts_where_it_is_told() -> None:
    for wanted in (1.0, 4.0):
        model = lstm.LSTM(F, H, forget_bias=wanted)
        total = (model.bias_ih_l0 + model.bias_hh_l0)[H : 2 * H]
        torch.testing.assert_close(total, torch.full((H,), wanted))
    drawn = lstm.LSTM(F, 400, forget_bias=None)
    total = (drawn.bias_ih_l0 + drawn.bias_hh_l0)[400:800]
    assert total.abs().max() < 0.1 + 1e-6
    assert abs(total.mean()) < 0.01


def test_the_classifier_reads_the_last_hidden_state() -> None:
    torch.manual_seed(0)
    model = lstm.LSTMClassifier(F, H, C).double()
    layer, x = nn.LSTM(F, H, batch_first=True).double(), randn(5, B, T, F)
    layer.load_state_dict(model.lstm.state_dict())
    torch.testing.assert_close(model(x), model.output(layer(x)[0][:, -1]))
    assert model(x).shape == (B, C)


@pytest.mark.parametrize("order", ["ifgo", "iofg", "igfo", "figo"])
def test_to_torch_order(order: str) -> None:
    marks = {name: float(number) for number, name in enumerate("ifgo")}
    shuffled = blocks(*(marks[name] for name in order))
    assert torch.equal(lstm.to_torch_order(shuffled, order), blocks(0, 1, 2, 3))
    assert torch.equal(
        lstm.to_torch_order(shuffled[:, None].expand(-1, F), order), blocks(0, 1, 2, 3)[:, None].expand(-1, F)
    )


@pytest.mark.parametrize("order", ["ifg", "ifgg", "ijfo"])
def test_to_torch_order_refuses_another_word(order: str) -> None:
    with pytest.raises(ValueError, match="once"):
        lstm.to_torch_order(torch.zeros(8), order)


@pytest.mark.parametrize(("kind", "layer"), [("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_parameters_are_counted_as_torch_counts_them(kind: str, layer: Any) -> None:
    def counted(hidden_size: int) -> int:
        return sum(p.numel() for p in layer(F, hidden_size).parameters())

    assert lstm.n_parameters(kind, F, 13) == counted(13)
    for budget in (counted(13) - 1, counted(13), counted(13) + 1):
        size = lstm.hidden_size_at_budget(kind, F, budget)
        assert counted(size) <= budget < counted(size + 1)
    assert lstm.hidden_size_at_budget(kind, F, 3) == 0


def test_another_kind_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="rnn, gru, lstm"):
        lstm.n_parameters("cnn", 1, 1)


def test_recall_asks_for_the_marked_first_symbol() -> None:
    inputs, targets = recall_task(500, 12, n_symbols=5, generator=torch.Generator().manual_seed(0))
    assert inputs.shape == (500, 13, 6)
    assert (inputs[:, :, :5].sum(dim=2) == 1).all()
    assert inputs[:, 0, 5].eq(1).all()
    assert inputs[:, 1:, 5].eq(0).all()
    assert torch.equal(inputs[:, 0, :5].argmax(dim=1), targets)
    # The other symbols say nothing about the first: each position agrees with it in one case of five.
    agreement = (inputs[:, 1:, :5].argmax(dim=2) == targets[:, None]).double().mean(dim=0)
    assert (agreement - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 500)
    again = recall_task(500, 12, n_symbols=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0], inputs)
    for arguments in ((3, 0), (3, 4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            recall_task(*arguments)
