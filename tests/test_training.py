import copy
import os
import pty
import random
import subprocess
import sys
import termios
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from jupyter_client.client import KernelClient
from nbclient import NotebookClient
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dianlib.data import Batches, digits
from dianlib.training import DivergenceError, History, fit, mean_loss, seed_everything, train_epoch

DIGITS = digits()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def train_batches(shuffle: bool = True, seed: int = 0) -> Batches:
    # 1,000 samples in batches of 64: the last batch holds 40.
    generator = torch.Generator().manual_seed(seed)
    return Batches(DIGITS.train_images, DIGITS.train_labels, shuffle=shuffle, generator=generator)


def validation_batches() -> Batches:
    return Batches(DIGITS.validation_images, DIGITS.validation_labels, batch_size=150)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def adam(model: nn.Module, lr: float = 3e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# ----- one epoch -----------------------------------------------------------------------------------------


def test_train_epoch_takes_the_steps_of_gradient_descent_written_out() -> None:
    model = network().double()
    images, labels = DIGITS.train_images.double(), DIGITS.train_labels
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    total = 0.0
    for start in range(0, 1000, 64):
        for parameter in parameters:
            parameter.requires_grad_()
        hidden = (images[start : start + 64].flatten(1) @ parameters[0].T + parameters[1]).relu()
        loss = cross_entropy(hidden @ parameters[2].T + parameters[3], labels[start : start + 64])
        gradients = torch.autograd.grad(loss, parameters)
        parameters = [p.detach() - 0.1 * g for p, g in zip(parameters, gradients, strict=True)]
        total += loss.item() * len(labels[start : start + 64])
    mean = train_epoch(model, Batches(images, labels), sgd(model), cross_entropy)
    assert mean == pytest.approx(total / 1000, rel=1e-12)
    for ours, expected in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours.detach(), expected)


def test_old_gradients_do_not_count() -> None:
    clean, stale = network(), network()
    cross_entropy(stale(DIGITS.test_images), DIGITS.test_labels).backward()
    for model in (clean, stale):
        train_epoch(model, train_batches(shuffle=False), sgd(model), cross_entropy)
    assert torch.equal(weights(clean), weights(stale))


def test_the_mean_weighs_batches_with_their_size() -> None:
    model = network()
    still = sgd(model, lr=0.0)
    whole = cross_entropy(model(DIGITS.train_images), DIGITS.train_labels).item()
    unweighted = np.mean([cross_entropy(model(x), y).item() for x, y in train_batches(shuffle=False)])
    assert train_epoch(model, train_batches(), still, cross_entropy) == pytest.approx(whole, rel=1e-6)
    assert mean_loss(model, train_batches(), cross_entropy) == pytest.approx(whole, rel=1e-6)
    assert unweighted != pytest.approx(whole, rel=1e-6)


class Watch(nn.Module):
    """Hand the input on and note in which mode, and with gradients or not, it came by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, torch.is_grad_enabled()))
        return x


def test_training_and_evaluation_mode() -> None:
    watch = Watch()
    model = nn.Sequential(network(), watch)
    model.eval()
    train_epoch(model, train_batches(), sgd(model), cross_entropy)
    assert set(watch.seen) == {(True, True)}
    assert model.training
    for mode in (True, False):
        watch.seen.clear()
        model.train(mode)
        mean_loss(model, validation_batches(), cross_entropy)
        assert set(watch.seen) == {(False, False)}
        assert model.training is mode
    watch.seen.clear()
    fit(model, train_batches(), validation_batches(), epochs=2, optimizer=sgd(model))
    assert watch.seen == 2 * (16 * [(True, True)] + 3 * [(False, False)])
    assert not model.training


def test_measuring_a_loss_leaves_batch_statistics_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    before = copy.deepcopy(model.state_dict())
    mean_loss(model, validation_batches(), cross_entropy)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ----- many epochs ---------------------------------------------------------------------------------------


def test_fit_learns_the_digits() -> None:
    model = network()
    history = fit(model, train_batches(), validation_batches(), epochs=20, optimizer=adam(model))
    assert len(history.train_loss) == len(history.validation_loss) == len(history.validation_accuracy) == 20
    assert history.train_loss[-1] < 0.2 * history.train_loss[0]
    predictions = model(DIGITS.validation_images).argmax(dim=1)
    accuracy = (predictions == DIGITS.validation_labels).double().mean()
    assert accuracy > 0.9
    assert history.validation_accuracy[-1] == pytest.approx(float(accuracy))
    assert history.validation_loss[-1] == mean_loss(model, validation_batches(), cross_entropy)
    assert history.best_epoch == int(np.argmin(history.validation_loss))


def test_without_validation_only_the_training_loss_is_kept() -> None:
    model = network()
    history = fit(model, train_batches(), epochs=3, optimizer=sgd(model))
    assert len(history.train_loss) == 3
    assert history == History(train_loss=history.train_loss)


def overfitting_run(patience: int | None, epochs: int) -> tuple[nn.Module, Batches, History]:
    """Train on labels of which half are drawn by lot: the validation loss falls, then rises."""
    noise = torch.Generator().manual_seed(0)
    wrong = torch.randint(0, 10, (200,), generator=noise)
    labels = torch.where(torch.rand(200, generator=noise) < 0.5, wrong, DIGITS.train_labels[:200])
    model = network()
    train = Batches(DIGITS.train_images[:200], labels, shuffle=True, generator=noise)
    history = fit(
        model, train, validation_batches(), epochs=epochs, optimizer=adam(model, 1e-2), patience=patience
    )
    return model, validation_batches(), history


@pytest.mark.parametrize("patience", [1, 4])
def test_early_stop_puts_the_best_weights_back(patience: int) -> None:
    model, validation, history = overfitting_run(patience, epochs=100)
    assert history.best_epoch is not None
    best = min(history.validation_loss)
    assert history.validation_loss[history.best_epoch] == best < history.validation_loss[-1]
    assert len(history.train_loss) == history.best_epoch + 1 + patience < 100
    assert mean_loss(model, validation, cross_entropy) == best


def test_the_best_weights_come_back_also_when_the_epochs_run_out() -> None:
    stopped = overfitting_run(4, epochs=100)[2]
    assert stopped.best_epoch is not None
    model, validation, history = overfitting_run(4, epochs=stopped.best_epoch + 3)
    assert history.best_epoch == stopped.best_epoch
    assert len(history.train_loss) == stopped.best_epoch + 3
    assert mean_loss(model, validation, cross_entropy) == min(history.validation_loss)


def test_without_patience_the_last_weights_stay() -> None:
    model, validation, history = overfitting_run(None, epochs=30)
    assert len(history.train_loss) == 30
    assert mean_loss(model, validation, cross_entropy) == history.validation_loss[-1]
    assert history.validation_loss[-1] > min(history.validation_loss)


def test_one_seed_gives_one_result() -> None:
    def run(seed: int) -> tuple[History, Tensor]:
        seed_everything(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))
        train = Batches(DIGITS.train_images, DIGITS.train_labels, shuffle=True)
        history = fit(model, train, validation_batches(), epochs=2, optimizer=adam(model))
        return history, weights(model)

    (first, first_weights), (again, again_weights), (other, other_weights) = run(1), run(1), run(2)
    assert first == again
    assert torch.equal(first_weights, again_weights)
    assert first != other
    assert not torch.equal(first_weights, other_weights)


def test_seed_everything_seeds_every_source_of_chance() -> None:
    def draw() -> tuple[float, float, float]:
        seed_everything(11)
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    assert draw() == draw()


def test_a_loader_of_torch_will_do() -> None:
    loader = DataLoader(TensorDataset(DIGITS.train_images, DIGITS.train_labels), batch_size=64)
    ours, theirs = network(), network()
    one = fit(ours, train_batches(shuffle=False), epochs=1, optimizer=sgd(ours))
    other = fit(theirs, loader, epochs=1, optimizer=sgd(theirs))
    assert one == other
    assert torch.equal(weights(ours), weights(theirs))


def test_numbers_as_targets_have_a_loss_but_no_accuracy() -> None:
    x = torch.linspace(-1, 1, 64)[:, None]
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    pairs = Batches(x, 3 * x + 1, batch_size=16)
    history = fit(model, pairs, pairs, epochs=50, optimizer=sgd(model, 0.2), loss_fn=nn.functional.mse_loss)
    assert history.validation_loss[-1] < 1e-4
    assert np.isnan(history.validation_accuracy).all()


# ----- what goes wrong -----------------------------------------------------------------------------------


def test_a_diverging_training_stops_with_one_sentence() -> None:
    x = torch.linspace(-1, 1, 64)[:, None]
    model = nn.Linear(1, 1)
    too_large = sgd(model, lr=10)
    with pytest.raises(
        DivergenceError, match=r"the loss is (nan|inf) after epoch \d+.*smaller learning rate"
    ):
        fit(model, Batches(x, 3 * x), epochs=200, optimizer=too_large, loss_fn=nn.functional.mse_loss)


def test_nan_in_the_data_stops_the_training_in_its_first_epoch() -> None:
    model = network()
    images = DIGITS.train_images.clone()
    images[500, 0, 0] = torch.nan
    with pytest.raises(DivergenceError, match="nan after epoch 1"):
        fit(model, Batches(images, DIGITS.train_labels), epochs=5, optimizer=sgd(model))
    healthy = network()
    validation = Batches(images, DIGITS.train_labels)
    with pytest.raises(DivergenceError, match="nan after epoch 1"):
        fit(healthy, train_batches(), validation, epochs=5, optimizer=sgd(healthy))


@pytest.mark.parametrize(
    ("epochs", "patience", "validation", "sentence"),
    [
        (0, None, None, "at least 1"),
        (5, 0, validation_batches(), "at least 1"),
        (5, 3, None, "give validation batches"),
    ],
)
def test_fit_refuses_what_makes_no_sense(
    epochs: int, patience: int | None, validation: Batches | None, sentence: str
) -> None:
    model = network()
    before = weights(model)
    with pytest.raises(ValueError, match=sentence):
        fit(model, train_batches(), validation, epochs=epochs, optimizer=sgd(model), patience=patience)
    assert torch.equal(before, weights(model))


def test_batches_that_are_used_up_are_noticed() -> None:
    model = network()
    once = iter(train_batches())
    with pytest.raises(ValueError, match="no batch to train on"):
        fit(model, once, epochs=2, optimizer=sgd(model))
    with pytest.raises(ValueError, match="no batch to measure"):
        mean_loss(model, once, cross_entropy)


# ----- the progress bar ----------------------------------------------------------------------------------

TRAIN = """
import torch
from dianlib.data import Batches
from dianlib.training import fit
model = torch.nn.Linear(2, 2)
pairs = Batches(torch.ones(8, 2), torch.ones(8, dtype=torch.int64))
history = fit(model, pairs, epochs=3, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
"""


@pytest.mark.parametrize("progress", [True, False, None])
def test_the_progress_bar_can_be_asked_for(progress: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    fit(model, train_batches(), epochs=2, optimizer=sgd(model), progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("epoch/s" in shown.err) is (progress is True)  # captured output is watched by nobody


def test_a_person_at_a_terminal_sees_a_bar() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(ours, False)
    subprocess.run([sys.executable, "-c", TRAIN], stderr=theirs, check=True, timeout=120)
    shown = os.read(ours, 100_000).decode()
    os.close(theirs)
    os.close(ours)
    assert "epoch/s" in shown


def test_a_notebook_that_a_program_runs_shows_no_bar(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(TRAIN), nbformat.v4.new_code_cell("len(history.train_loss)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    assert notebook.cells[0].outputs == []
    assert notebook.cells[1].outputs[0]["data"]["text/plain"] == "3"


def test_a_notebook_in_which_a_person_works_shows_a_bar(tmp_path: Path) -> None:
    class FrontEnd(NotebookClient):
        """A front end forwards keyboard input; nbclient, on its own, says that it does not."""

        async def async_start_new_kernel_client(self) -> KernelClient:
            client = await super().async_start_new_kernel_client()
            client.allow_stdin = True
            return client

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRAIN)])
    FrontEnd(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    assert "epoch/s" in "".join(output.get("text", "") for output in notebook.cells[0].outputs)
