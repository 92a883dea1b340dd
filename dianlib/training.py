"""Train a model: one epoch, many epochs, and when to stop.

"Batches" is anything that can be iterated again and again and yields pairs (inputs, targets), such
as `dianlib.data.Batches` or a torch DataLoader. A loss function maps (outputs, targets) to the mean
loss of the batch.
"""

import copy
import math
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

Pairs = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


class DivergenceError(ArithmeticError):
    """The loss became NaN or infinite: the weights are lost, and more epochs cannot mend them."""


def seed_everything(seed: int) -> None:
    """Seed the global random numbers of Python, NumPy and torch (on every device)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (scikit-learn and learners' own code still read this state)
    torch.manual_seed(seed)


def train_epoch(
    model: nn.Module,
    batches: Pairs,
    optimizer: Optimizer,
    loss_fn: Loss,
) -> float:
    """Take one optimizer step for each batch and return the mean loss per sample.

    The mean weighs each batch with its size, so a short last batch does not count too
    much. The losses are those met on the way, each before its step. The model is left
    in training mode. Raises ValueError when there is no batch.
    """
    model.train()
    losses, sizes = [], []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        # detach() keeps the number and drops the graph. Reading it here, with .item(),
        # would make a graphics card wait at every step.
        losses.append(loss.detach())
        sizes.append(len(targets))
    if not sizes:
        raise ValueError("no batch to train on; check that the batches are not used up.")
    total = sum(loss.item() * size for loss, size in zip(losses, sizes, strict=True))
    return total / sum(sizes)


def mean_loss(model: nn.Module, batches: Pairs, loss_fn: Loss) -> float:
    """Return the mean loss per sample, in evaluation mode and without gradients.

    The model gets its own mode back. Raises ValueError when there is no batch.
    """
    return _loss_and_accuracy(model, batches, loss_fn)[0]


@torch.no_grad()
def _loss_and_accuracy(model: nn.Module, batches: Pairs, loss_fn: Loss) -> tuple[float, float]:
    """Return the mean loss per sample and the share of targets that argmax hits (NaN if not classes)."""
    was_training = model.training
    model.eval()
    total_loss: float | Tensor = 0.0
    n_correct: int | Tensor = 0
    n_samples = n_targets = 0
    for inputs, targets in batches:
        outputs = model(inputs)
        total_loss += loss_fn(outputs, targets) * len(targets)
        n_samples += len(targets)
        if not targets.is_floating_point():
            n_correct += (outputs.argmax(dim=-1) == targets).sum()
            n_targets += targets.numel()
    model.train(was_training)
    if n_samples == 0:
        raise ValueError("there is no batch to measure; check that the batches are not used up.")
    return float(total_loss) / n_samples, float(n_correct) / n_targets if n_targets else math.nan


@dataclass
class History:
    """What `fit` saw, one number an epoch; the validation lists stay empty without validation data.

    ``best_epoch`` is the index, in these lists, of the lowest validation loss.
    """

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    best_epoch: int | None = None


def fit(
    model: nn.Module,
    train: Pairs,
    validation: Pairs | None = None,
    *,
    epochs: int,
    optimizer: Optimizer,
    loss_fn: Loss = nn.functional.cross_entropy,
    patience: int | None = None,
    progress: bool | None = None,
) -> History:
    """Train for ``epochs`` epochs, or until the validation loss has stopped falling.

    With ``patience`` the training stops after that many epochs in a row without a new lowest
    validation loss, and in any case the weights of the best epoch are put back at the end.
    ``progress`` shows a bar: by default only when a person is watching. The model is left in
    evaluation mode. Raises DivergenceError as soon as an epoch ends with a loss that is not a
    number, ValueError for epochs or patience below 1 or for patience without validation data.
    """
    if epochs < 1 or (patience is not None and patience < 1):
        raise ValueError("epochs and patience must be at least 1.")
    if patience is not None and validation is None:
        raise ValueError("patience watches the validation loss; give validation batches too.")
    history = History()
    best_loss, best_weights = math.inf, None
    bar = tqdm(
        range(epochs), unit="epoch", leave=False, disable=not (is_watched() if progress is None else progress)
    )
    for epoch in bar:
        train_loss = train_epoch(model, train, optimizer, loss_fn)
        _stop_if_diverged(train_loss, epoch)
        history.train_loss.append(train_loss)
        bar.set_postfix(loss=f"{train_loss:.4f}")
        if validation is None:
            continue
        loss, accuracy = _loss_and_accuracy(model, validation, loss_fn)
        _stop_if_diverged(loss, epoch)
        history.validation_loss.append(loss)
        history.validation_accuracy.append(accuracy)
        if loss < best_loss:
            best_loss, history.best_epoch = loss, epoch
            if patience is not None:
                # state_dict() holds the live tensors, which the next step overwrites.
                best_weights = copy.deepcopy(model.state_dict())
        elif (
            patience is not None and history.best_epoch is not None and epoch - history.best_epoch >= patience
        ):
            break
    bar.close()
    if best_weights is not None:
        model.load_state_dict(best_weights)
    model.eval()
    return history


def _stop_if_diverged(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise DivergenceError(
            f"the loss is {loss} after epoch {epoch + 1}, and training cannot recover from that; "
            "try a smaller learning rate, and look for NaN or very large numbers in the inputs."
        )


def is_watched() -> bool:
    """Tell whether a person can see a progress bar: in a terminal, or in a notebook at work.

    A front end that shows a notebook to a person offers to forward keyboard input; a program that
    runs one (nbclient, nbconvert, nbval, nbgrader) does not.
    """
    ipython = sys.modules.get("IPython")
    kernel = getattr(ipython.get_ipython(), "kernel", None) if ipython else None
    if kernel is not None:
        return bool(getattr(kernel, "_allow_stdin", False))
    return sys.stderr is not None and sys.stderr.isatty()
