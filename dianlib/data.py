"""Real images as whole tensors, and mini-batches cut from them.

Letters: N samples, H and W the height and width of an image in pixels. Nothing is decoded item by
item: a data set is one tensor, and a batch is one indexing operation. Reading 64 images through a
transform each, as most tutorials do, costs more than the training step that follows.

Two folders matter. DIANLIB_DATA names a torchvision root; it is only read, unless `download` is
asked to write there. Without it, and for unpacking, a cache folder of our own is used.
"""

import contextlib
import copy
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor


class DataError(RuntimeError):
    """A data set is missing, damaged or out of reach; the message says what to run."""


@dataclass(frozen=True)
class ImageData:
    """One image data set, split in three: images (N, H, W) float32 in 0..1, labels (N,) int64."""

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Batches:
    """Cut tensors of equal length N into mini-batches, as often as you iterate.

    ``Batches(images, labels, batch_size=64)`` yields tuples (64 images, 64 labels); the last batch
    may be shorter. With ``shuffle`` each pass draws one fresh permutation of the N samples from
    ``generator`` (torch's global one by default). Raises ValueError when there is no tensor, no
    sample, a batch size below 1, or tensors of unequal length.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int = 64,
        shuffle: bool = False,
        generator: Generator | None = None,
    ) -> None:
        lengths = [len(tensor) for tensor in tensors]
        if not lengths or lengths[0] == 0:
            raise ValueError("there is no sample to put in a batch; give tensors with at least one row.")
        if len(set(lengths)) > 1:
            raise ValueError(f"all tensors need the same number of rows, not {lengths}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        self.tensors = tensors
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        return -(-len(self.tensors[0]) // self.batch_size)  # division that rounds up

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if not self.shuffle:
            # Slices of the tensors themselves: nothing is copied.
            yield from zip(*(tensor.split(self.batch_size) for tensor in self.tensors), strict=True)
            return
        order = torch.randperm(len(self.tensors[0]), generator=self.generator).to(self.tensors[0].device)
        for rows in order.split(self.batch_size):
            # The same rows as tensor[rows], copied in less than half the time.
            yield tuple(tensor.index_select(0, rows) for tensor in self.tensors)


def digits(seed: int = 0) -> ImageData:
    """Return 1,797 scanned digits of 8 x 8 pixels, which come with scikit-learn: no download.

    They are split 1000 / 400 / 397 by ``seed``, with nearly the same share of each digit in all
    three parts. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,
    UCI Machine Learning Repository, 1998 (its test part).
    """
    return copy.deepcopy(_digits(seed))  # whoever changes the images changes only their own


@cache
def _digits(seed: int) -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    images = torch.from_numpy(scans.images).float() / 16  # the scans count 0 to 16 inked cells
    labels = torch.from_numpy(scans.target).long()
    train, rest = train_test_split(range(len(labels)), train_size=1000, stratify=labels, random_state=seed)
    validation, test = train_test_split(rest, train_size=400, stratify=labels[rest], random_state=seed)
    parts = [part for rows in (train, validation, test) for part in (images[rows], labels[rows])]
    return ImageData("digits", tuple("0123456789"), *parts)


def mnist(validation: int = 5_000, seed: int = 0) -> ImageData:
    """Return MNIST: 70,000 handwritten digits of 28 x 28 pixels, 10,000 of them for the test.

    ``validation`` of the 60,000 training images are set apart, chosen by ``seed``; the others keep
    their order. Raises DataError when the data set is not on this machine, ValueError when
    ``validation`` leaves nothing to train on. Source: LeCun, Bottou, Bengio and Haffner 1998,
    Proc. IEEE 86(11), 2278-2324.
    """
    return _load("mnist", validation, seed)


def fashion_mnist(validation: int = 5_000, seed: int = 0) -> ImageData:
    """Return Fashion-MNIST: 70,000 photographs of clothes, in the shape and split of MNIST.

    Arguments and errors are those of `mnist`. Source: Xiao, Rasul and Vollgraf 2017,
    arXiv:1708.07747.
    """
    return _load("fashion_mnist", validation, seed)


# The data sets that can be downloaded, and what torchvision calls their class and folder.
DOWNLOADABLE = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def _load(name: str, validation: int, seed: int) -> ImageData:
    if not 0 <= validation < 60_000:
        raise ValueError(f"validation must leave some of the 60,000 training images, not take {validation}.")
    root = torchvision_root(name)
    dataset_class = _dataset_class(name)
    train, test = dataset_class(root, train=True), dataset_class(root, train=False)

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    apart, kept = order[:validation].sort().values, order[validation:].sort().values

    def scaled(images: Tensor) -> Tensor:
        return images.float().div_(255)

    return ImageData(
        name,
        # torchvision's own names for the digits are "0 - zero" and so on.
        tuple("0123456789") if name == "mnist" else tuple(dataset_class.classes),
        train_images=scaled(train.data[kept]),
        train_labels=train.targets[kept],
        validation_images=scaled(train.data[apart]),
        validation_labels=train.targets[apart],
        test_images=scaled(test.data),
        test_labels=test.targets,
    )


def cache_folder() -> Path:
    """Return the folder for our own copies: dianlib in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dianlib"


def data_folder() -> Path:
    """Return the torchvision root that is read: DIANLIB_DATA, or a folder in our cache."""
    given = os.environ.get("DIANLIB_DATA")
    return Path(given).expanduser() if given else cache_folder() / "data"


def download(name: str) -> Path:
    """Fetch "mnist" or "fashion_mnist" into `data_folder` through torchvision and return that folder.

    What is already there is not fetched again. Raises ValueError for another name and DataError,
    in one sentence, when the network or the folder does not let us.
    """
    try:
        torchvision_root(name)
    except DataError:
        try:
            _dataset_class(name)(data_folder(), download=True)
        except (OSError, RuntimeError) as error:
            # torchvision tells about each mirror in turn; the last line is the last cause.
            cause = str(error).strip().splitlines()[-1]
            raise DataError(
                f"{name} could not be downloaded into {data_folder()} ({cause}); "
                "try again with a network, or set DIANLIB_DATA to a folder that has it."
            ) from None
    return data_folder()


def torchvision_root(name: str) -> Path:
    """Return a folder in which torchvision finds "mnist" or "fashion_mnist", unpacked.

    That is `data_folder`, or our cache where that folder has only the packed .gz files: it may be
    read-only, and it is never written to here. Raises DataError when the data set is missing or
    damaged, ValueError for another name.
    """
    if name not in DOWNLOADABLE:
        raise ValueError(f"there is no data set {name!r} to download; choose from {', '.join(DOWNLOADABLE)}.")
    raw = Path(DOWNLOADABLE[name]) / "raw"
    files = [file for file, _ in _dataset_class(name).resources]
    if all((data_folder() / raw / file).with_suffix("").is_file() for file in files):
        return data_folder()
    if not all((data_folder() / raw / file).is_file() for file in files):
        raise DataError(
            f"{name} is not in {data_folder()}; run `dianlib data download`, "
            "or set DIANLIB_DATA to a folder that has it."
        )
    unpacked = cache_folder() / "unpacked"
    if not (unpacked / raw).is_dir():
        try:
            _unpack(name, data_folder() / raw, unpacked / raw)
        except OSError as error:
            raise DataError(
                f"{name} cannot be unpacked into {unpacked} ({error.strerror}); "
                "set XDG_CACHE_HOME to a folder that you may write to."
            ) from None
    return unpacked


def _unpack(name: str, source: Path, target: Path) -> None:
    """Unpack the .gz files of ``source`` into the new folder ``target``: all of them or none."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    target.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked aside and moved in one step, so that another process never sees half a data set.
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        aside = Path(temporary) / "raw"
        aside.mkdir()
        for file, md5 in _dataset_class(name).resources:
            if not check_integrity(source / file, md5):
                raise DataError(f"{source / file} is damaged; run `dianlib data download` to fetch it again.")
            extract_archive(str(source / file), str(aside))
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same files
                raise


def _dataset_class(name: str) -> Any:
    prepare_torchvision()
    from torchvision import datasets

    return getattr(datasets, DOWNLOADABLE[name])


@cache
def prepare_torchvision() -> torch.library.Library | None:
    """Make ``import torchvision`` work beside a torch that its compiled part was not built for.

    A torchvision built for a graphics card cannot load its compiled part beside a CPU-only torch.
    Its import then stops at "operator torchvision::nms does not exist", although data sets and
    transforms need no compiled operator. Two declarations, with no code behind them, let the import
    pass. Where the compiled part loads, nothing is declared and None is returned.
    """
    package = importlib.util.find_spec("torchvision")
    folders = package.submodule_search_locations if package else None
    for compiled in (file for folder in folders or () for file in Path(folder).glob("_C*")):
        with contextlib.suppress(OSError):
            torch.ops.load_library(compiled)
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    # The declarations last as long as this object; the cache of this function keeps it.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


def recall_task(
    n_samples: int, distance: int, n_symbols: int = 8, *, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Make sequences whose first symbol must be named after ``distance`` more steps.

    Returns inputs (N, distance + 1, n_symbols + 1) float32 and targets (N,) int64. Every step is one
    symbol, one-hot; the last input is a mark, 1 at the first step and 0 at all others. The symbols
    after the first are drawn from the same alphabet and mean nothing, so that a network has to write
    once, ignore the rest and keep what it wrote (the idea is that of Hochreiter and Schmidhuber 1997,
    section 5). Raises ValueError for a distance or a number of symbols below 1.
    """
    if distance < 1 or n_symbols < 1:
        raise ValueError("distance and n_symbols must be at least 1.")
    symbols = torch.randint(n_symbols, (n_samples, distance + 1), generator=generator)
    inputs = torch.zeros(n_samples, distance + 1, n_symbols + 1, dtype=torch.float32)
    inputs.scatter_(2, symbols.unsqueeze(2), 1.0)
    inputs[:, 0, n_symbols] = 1.0
    return inputs, symbols[:, 0]
