"""Real images as whole tensors, sentences as numbers, and mini-batches cut from them.

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
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence


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
    if seed not in KNOWN_DIGITS:
        KNOWN_DIGITS[seed] = _read_digits(seed)
    return copy.deepcopy(KNOWN_DIGITS[seed])  # whoever changes the images changes only their own


KNOWN_DIGITS: dict[int, ImageData] = {}  # by seed


def _read_digits(seed: int) -> ImageData:
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


def lookup_task(
    n_samples: int,
    n_questions: int = 6,
    n_items: int = 6,
    n_fields: int = 4,
    n_values: int = 6,
    *,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make lists of items, and questions that ask for every field, each time of any item.

    Returns questions (N, n_questions, n_fields * n_items), items (N, n_items, n_items + n_fields * n_values),
    both float32, and targets (N, n_questions, n_fields) int64. An item is its name and the values of its
    fields, one-hot side by side. A question names one item for each field, drawn at random; the target is
    that item's value of the field. So one look at one item seldom answers it. Raises ValueError for a number
    below 1.
    """
    if min(n_samples, n_questions, n_items, n_fields, n_values) < 1:
        raise ValueError("the numbers of samples, questions, items, fields and values must be at least 1.")
    values = torch.randint(n_values, (n_samples, n_items, n_fields), generator=generator)
    asked = torch.randint(n_items, (n_samples, n_questions, n_fields), generator=generator)
    names = torch.eye(n_items)
    items = torch.cat([names.expand(n_samples, -1, -1), torch.eye(n_values)[values].flatten(2)], dim=2)
    return names[asked].flatten(2), items, values.gather(1, asked)


def order_task(
    n_samples: int, length: int, n_symbols: int = 8, *, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Make sequences of random symbols, two of which carry a mark: which one came first, which later?

    Returns inputs (N, length, n_symbols + 1) float32, one-hot symbols and the mark in the last column, and
    the two marked symbols (N, 2) int64 in the order of their places. The two differ, and stand anywhere
    but at the last place, so that it can ask. Raises ValueError for fewer than 3 steps or 2 symbols.
    """
    if length < 3 or n_symbols < 2:
        raise ValueError("length must be at least 3, and n_symbols at least 2.")
    symbols = torch.randint(n_symbols, (n_samples, length), generator=generator)
    places = torch.rand(n_samples, length - 1, generator=generator).argsort(dim=1)[:, :2].sort(dim=1).values
    first = symbols.gather(1, places[:, :1])
    later = (first + torch.randint(1, n_symbols, (n_samples, 1), generator=generator)) % n_symbols
    symbols.scatter_(1, places[:, 1:], later)
    inputs = torch.zeros(n_samples, length, n_symbols + 1, dtype=torch.float32)
    inputs.scatter_(2, symbols.unsqueeze(2), 1.0)
    inputs[..., n_symbols].scatter_(1, places, 1.0)
    return inputs, torch.cat([first, later], dim=1)


def attributes_task(
    n_samples: int,
    n_items: int = 8,
    n_attributes: int = 4,
    n_values: int = 8,
    *,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make lists of items with attributes, and questions about several items at once.

    Returns values (N, n_items, n_attributes) int64, below ``n_values``; asked (N, n_attributes) int64, a
    different item for each attribute; and targets (N, n_attributes) int64: attribute a of item asked[:, a].
    A network that answers at one place has to look at as many items as there are attributes, so each head
    that looks where no other does counts. Raises ValueError for fewer items than attributes.
    """
    if n_items < n_attributes:
        raise ValueError("attributes_task needs at least as many items as attributes.")
    values = torch.randint(n_values, (n_samples, n_items, n_attributes), generator=generator)
    order = torch.rand(n_samples, n_items, generator=generator).argsort(dim=1)
    asked = order[:, :n_attributes]
    targets = values.gather(1, asked.unsqueeze(1)).squeeze(1)
    return values, asked, targets


# ----- sentences ---------------------------------------------------------------------------------------

# The first four numbers of every vocabulary: padding, begin, end, and any token that is not listed.
PAD, BOS, EOS, UNKNOWN = range(4)


class Vocabulary:
    """The tokens of some sentences, numbered from 4 in the order of their first occurrence.

    Tokens that occur fewer than ``min_count`` times are left out and become UNKNOWN.
    """

    def __init__(self, sentences: Iterable[Sequence[str]], min_count: int = 1) -> None:
        counts = Counter(token for sentence in sentences for token in sentence)
        kept = (token for token, count in counts.items() if count >= min_count)
        self.tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *kept]
        self._numbers = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, sentence: Sequence[str]) -> list[int]:
        """Return the numbers of the tokens, and EOS behind them."""
        return [*(self._numbers.get(token, UNKNOWN) for token in sentence), EOS]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Return the tokens before the first EOS."""
        return [self.tokens[number] for number in takewhile(lambda number: number != EOS, numbers)]


def pad_sequences(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Write N sequences of numbers into one tensor (N, longest) int64, with PAD behind the shorter ones."""
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=PAD)


def english_tokens(text: str) -> list[str]:
    """Cut English into words, single digits and punctuation: "March 12, 2024" has eight tokens."""
    return re.findall(r"[^\W\d]+(?:['’][^\W\d]+)?|\d|[^\w\s]", text)


_CHINESE_DIGITS = "〇一二三四五六七八九"
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_BELOW_TWENTY = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def chinese_number(number: int) -> str:
    """Write a whole number from 0 to 99,999,999 in Chinese: 123,405 is 十二万三千四百零五.

    Chinese counts in groups of four digits: 万 is ten thousand. Raises ValueError for other numbers.
    """
    if not 0 <= number < 10**8:
        raise ValueError(f"chinese_number writes 0 to 99,999,999, not {number}.")
    upper, lower = divmod(number, 10_000)
    text = _four_digits(upper) + "万" if upper else ""
    if upper and 0 < lower < 1_000:  # a gap between the groups is read as one zero
        text += "零"
    text += _four_digits(lower)
    # Ten to nineteen, at the front, are read without their one.
    return (text.removeprefix("一") if text.startswith("一十") else text) or "零"


def _four_digits(number: int) -> str:
    text, gap = "", False
    for power, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // power % 10
        if digit:
            text += ("零" if gap and text else "") + _CHINESE_DIGITS[digit] + unit
        gap = digit == 0
    return text


def english_number(number: int) -> str:
    """Write a whole number from 0 to 999,999,999 in English words.

    123,405 is "one hundred twenty-three thousand four hundred five": groups of three digits. Raises
    ValueError for other numbers.
    """
    if not 0 <= number < 10**9:
        raise ValueError(f"english_number writes 0 to 999,999,999, not {number}.")
    words = []
    for power, unit in ((10**6, " million"), (1000, " thousand"), (1, "")):
        group = number // power % 1000
        if group:
            words.append(_three_digits(group) + unit)
    return " ".join(words) or "zero"


def _three_digits(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    words = [f"{_BELOW_TWENTY[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        tens, ones = divmod(rest, 10)
        words.append(_TENS[tens - 2] + (f"-{_BELOW_TWENTY[ones]}" if ones else ""))
    elif rest:
        words.append(_BELOW_TWENTY[rest])
    return " ".join(words)


def chinese_date(day: date, *, year: bool = True, weekday: bool = False) -> str:
    """Write a date in Chinese, the largest unit first: 二〇二四年三月十二日星期二."""
    text = f"{chinese_number(day.month)}月{chinese_number(day.day)}日"
    if year:
        text = "".join(_CHINESE_DIGITS[int(digit)] for digit in f"{day.year:04}") + "年" + text
    return text + "星期" + "一二三四五六日"[day.weekday()] if weekday else text


def english_date(day: date, *, year: bool = True, weekday: bool = False) -> str:
    """Write a date in English: Tuesday, March 12, 2024."""
    text = f"{_MONTHS[day.month - 1]} {day.day}"
    if year:
        text += f", {day.year:04}"
    return f"{_WEEKDAYS[day.weekday()]}, {text}" if weekday else text


def date_pairs(n: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Return ``n`` different pairs (Chinese, English): dates from 1900 to 2099, all of them exact.

    Four of five have a year, and half of these a weekday: 三月十二日 is "March 12". Raises ValueError
    for a negative ``n``, or one for which there are not enough dates.
    """

    def draw(random: Random) -> tuple[str, str]:
        day = _FIRST_DAY + timedelta(random.randrange(_DAYS))
        year, weekday = random.choice(
            [(False, False), (True, False), (True, False), (True, True), (True, True)]
        )
        return (
            chinese_date(day, year=year, weekday=weekday),
            english_date(day, year=year, weekday=weekday),
        )

    if n > _DAYS:  # the two forms with a year have twice as many, but drawing the last ones would take long
        raise ValueError(f"there are dates for {_DAYS} pairs at most, not {n}.")
    return _different(draw, n, seed)


_FIRST_DAY = date(1900, 1, 1)
_DAYS = (date(2100, 1, 1) - _FIRST_DAY).days


def number_pairs(n: int, *, seed: int = 0, digits: int = 8) -> list[tuple[str, str]]:
    """Return ``n`` different pairs (Chinese, English) of whole numbers of 3 to ``digits`` digits, all exact.

    Each count of digits is drawn equally often. Repeated numbers are dropped, so short ones, of which
    there are few, are rarer in a long list. Raises ValueError for a negative ``n``, for ``digits`` outside
    4..8, or where there are not enough numbers.
    """
    if not 4 <= digits <= 8:
        raise ValueError(f"digits must be 4 to 8, not {digits}.")
    if n > 10**digits // 2:
        raise ValueError(f"there are too few numbers of {digits} digits for {n} pairs.")

    def draw(random: Random) -> tuple[str, str]:
        size = random.randint(3, digits)
        number = random.randrange(10 ** (size - 1), 10**size)
        return chinese_number(number), english_number(number)

    return _different(draw, n, seed)


def _different(draw: Callable[[Random], tuple[str, str]], n: int, seed: int) -> list[tuple[str, str]]:
    """Draw until there are ``n`` different pairs."""
    if n < 0:
        raise ValueError(f"the number of pairs must be at least 0, not {n}.")
    random = Random(seed)
    found: dict[tuple[str, str], None] = {}
    while len(found) < n:
        found[draw(random)] = None
    return list(found)


def translations() -> list[tuple[str, str]]:
    """Return 29,155 pairs (English, Chinese) of short sentences, from text/cmn.txt in `data_folder`.

    Source: www.manythings.org/anki, made from tatoeba.org, CC BY 2.0 FR. A sentence may stand in several
    pairs. Raises DataError when the file is not there or damaged.
    """
    path = data_folder() / "text" / "cmn.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise DataError(
            f"the English-Chinese sentences are not at {path}; put cmn.txt from "
            "www.manythings.org/anki there, or set DIANLIB_DATA to a folder that has text/cmn.txt."
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is damaged: it is not UTF-8.") from None
    pairs = [line.split("\t") for line in lines]
    wrong = next((number for number, pair in enumerate(pairs, 1) if len(pair) < 2), None)
    if wrong or not pairs:
        raise DataError(
            f"{path} is damaged: line {wrong or 1} holds no English and Chinese with a tab between."
        )
    return [(pair[0], pair[1]) for pair in pairs]
