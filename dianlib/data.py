"""Real images as whole tensors, and mini-batches cut from them.

Letters: N samples, H and W the height and width of an image in pixels. Nothing is decoded item by
item: a data set is one tensor, and a batch is one indexing operation. Reading 64 images through a
transform each, as most tutorials do, costs more than the training step that follows.

Two folders matter. DIANLIB_DATA names a torchvision root; it is only read, unless `download` is
asked to write there. Without it, and for unpacking, a cache folder of our own is used.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
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
    return _load("MNIST", "mnist", validation, seed)


def fashion_mnist(validation: int = 5_000, seed: int = 0) -> ImageData:
    """Return Fashion-MNIST: 70,000 photographs of clothes, in the shape and split of MNIST.

    Arguments and errors are those of `mnist`. Source: Xiao, Rasul and Vollgraf 2017,
    arXiv:1708.07747.
    """
    return _load("FashionMNIST", "fashion_mnist", validation, seed)


# How the two data sets are named here and what torchvision calls their class and folder.
DOWNLOADABLE = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def _load(torchvision_name: str, name: str, validation: int, seed: int) -> ImageData:
    if not 0 <= validation < 60_000:
        raise ValueError(f"validation must leave some of the 60,000 training images, not take {validation}.")
    dataset_class = getattr(_torchvision_datasets(), torchvision_name)
    root = _unpacked_root(dataset_class, name)
    train, test = dataset_class(root, train=True), dataset_class(root, train=False)
    classes = tuple("0123456789") if name == "mnist" else tuple(dataset_class.classes)

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    apart, kept = order[:validation].sort().values, order[validation:].sort().values

    def scaled(images: Tensor) -> Tensor:
        return images.float().div_(255)

    return ImageData(
        name,
        classes,
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
    if name not in DOWNLOADABLE:
        raise ValueError(
            f"there is no data set {name!r} to download; choose one of {', '.join(DOWNLOADABLE)}."
        )
    dataset_class = getattr(_torchvision_datasets(), DOWNLOADABLE[name])
    folder = data_folder()
    try:
        _unpacked_root(dataset_class, name)
    except DataError:
        try:
            dataset_class(folder, download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise DataError(f"{name} could not be downloaded into {folder}: {reason}") from None
    return folder


def _unpacked_root(dataset_class: Any, name: str) -> Path:
    """Return a torchvision root that holds the four unpacked files of a data set.

    That is `data_folder` itself, or our cache when the folder has only the packed .gz files: the
    folder may be read-only, and is never written to.
    """
    folder = data_folder()
    packed = {folder / dataset_class.__name__ / "raw" / file: md5 for file, md5 in dataset_class.resources}
    if all(path.with_suffix("").is_file() for path in packed):
        return folder
    if not all(path.is_file() for path in packed):
        raise DataError(
            f"{name} is not in {folder}; run `dianlib data download`, "
            "or set DIANLIB_DATA to a folder that has it."
        )
    unpacked = cache_folder() / "unpacked"
    if not (unpacked / dataset_class.__name__).is_dir():
        _unpack(dataset_class, packed, unpacked)
    return unpacked


def _unpack(dataset_class: Any, packed: dict[Path, str], root: Path) -> None:
    """Let torchvision unpack copies of the .gz files below ``root``, whole or not at all."""
    from torchvision.datasets.utils import check_integrity

    for path, md5 in packed.items():
        # Left to itself torchvision would fetch a damaged file again, without a word.
        if not check_integrity(path, md5):
            raise DataError(f"{path} is damaged; delete it and run `dianlib data download`.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Unpacked aside and moved in one step: another process never sees half a data set.
        with tempfile.TemporaryDirectory(dir=root) as aside:
            raw = Path(aside) / dataset_class.__name__ / "raw"
            raw.mkdir(parents=True)
            for path in packed:
                shutil.copyfile(path, raw / path.name)
            dataset_class(aside, download=True)
            for path in packed:
                (raw / path.name).unlink()
            try:
                raw.parent.rename(root / dataset_class.__name__)
            except OSError:
                if not (root / dataset_class.__name__).is_dir():  # else another process came first
                    raise
    except OSError as error:
        raise DataError(
            f"{root} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder of yours."
        ) from None


def _torchvision_datasets() -> ModuleType:
    prepare_torchvision()
    import torchvision.datasets

    datasets: ModuleType = torchvision.datasets
    return datasets


@cache
def prepare_torchvision() -> Any:
    """Make ``import torchvision`` work beside a torch that its compiled part was not built for.

    A torchvision built for a graphics card cannot load its compiled part beside a CPU-only torch.
    Its import then stops at "operator torchvision::nms does not exist", although the data sets and
    transforms need no compiled operator. Two declarations, without any code behind them, let the
    import pass. Where the compiled part loads, or torchvision is imported already, this does nothing.
    """
    package = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or package is None or package.origin is None:
        return None
    for compiled in (
        *Path(package.origin).parent.glob("_C*.so"),
        *Path(package.origin).parent.glob("_C*.pyd"),
    ):
        try:
            torch.ops.load_library(compiled)
            return None
        except OSError:
            pass
    # The declarations live as long as this object, which the cache of this function keeps.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators
