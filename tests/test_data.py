import datetime
import gzip
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from dianlib import data
from dianlib.data import Batches, DataError, ImageData

needs_mnist = pytest.mark.skipif(
    "DIANLIB_DATA" not in os.environ,
    reason="reads MNIST and Fashion-MNIST; set DIANLIB_DATA to a torchvision root that has them",
)
FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every test away from the cache of the person who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def packed_folder(root: Path, name: str = "MNIST") -> Path:
    """Make a torchvision root with the four packed files of a data set and nothing else."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for file in FILES:
        shutil.copy(Path(os.environ["DIANLIB_DATA"]) / name / "raw" / file, raw / file)
    return root


def parts(images: ImageData) -> list[tuple[Tensor, Tensor]]:
    return [
        (images.train_images, images.train_labels),
        (images.validation_images, images.validation_labels),
        (images.test_images, images.test_labels),
    ]


# ----- the embedded digits -------------------------------------------------------------------------------


def test_digits_are_a_partition_of_scikit_learns_scans() -> None:
    split = parts(data.digits(seed=3))
    assert [images.shape for images, _ in split] == [(1000, 8, 8), (400, 8, 8), (397, 8, 8)]
    for images, labels in split:
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.min() == 0
        assert images.max() == 1
    scans = load_digits()
    ours = torch.cat(
        [torch.cat([16 * images.flatten(1), labels[:, None]], dim=1) for images, labels in split]
    )
    theirs = np.concatenate([scans.data, scans.target[:, None]], axis=1)
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_digits_have_the_same_share_of_each_class_in_every_part() -> None:
    shares = np.bincount(load_digits().target) / 1797
    for _, labels in parts(data.digits()):
        expected = torch.from_numpy(shares) * len(labels)
        assert (labels.bincount() - expected).abs().max() <= 1


def test_whoever_changes_the_digits_changes_only_their_own() -> None:
    first = data.digits()
    wanted = first.train_images.clone()
    first.train_images.zero_()
    assert torch.equal(data.digits().train_images, wanted)


def test_the_seed_decides_the_split_of_the_digits() -> None:
    first, again, other = data.digits(seed=1), data.digits(seed=1), data.digits(seed=2)
    assert torch.equal(first.test_images, again.test_images)
    assert not torch.equal(first.test_images, other.test_images)
    assert first.classes == tuple("0123456789")


# ----- batches -------------------------------------------------------------------------------------------

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


def test_batches_keep_the_short_last_one_and_can_be_iterated_again() -> None:
    batches = Batches(X, Y, batch_size=4)
    assert len(batches) == 3
    for _ in range(2):
        assert [targets.tolist() for _, targets in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(Batches(X, batch_size=5)) == len(list(Batches(X, batch_size=5))) == 2


def test_unshuffled_batches_share_the_memory_of_the_data() -> None:
    (first, _), *_ = Batches(X, Y, batch_size=4)
    assert first.data_ptr() == X.data_ptr()


def test_shuffled_batches_hold_each_sample_once_with_its_label() -> None:
    for _ in range(2):
        batches = list(Batches(X, Y, batch_size=4, shuffle=True))
        assert [len(targets) for _, targets in batches] == [4, 4, 2]
        assert sorted(torch.cat([targets for _, targets in batches]).tolist()) == list(range(10))
        assert all(torch.equal(inputs, X[targets]) for inputs, targets in batches)


def test_each_pass_draws_one_fresh_permutation_from_the_generator() -> None:
    batches = Batches(Y, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(5))
    expected = torch.Generator().manual_seed(5)
    orders = [torch.cat([rows for (rows,) in batches]) for _ in range(3)]
    assert all(torch.equal(order, torch.randperm(10, generator=expected)) for order in orders)
    assert not torch.equal(orders[0], orders[1])


def test_without_a_generator_the_global_seed_decides() -> None:
    def order(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return [int(row) for (rows,) in Batches(Y, batch_size=3, shuffle=True) for row in rows]

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_those_of_torchs_loader(shuffle: bool) -> None:
    dataset = TensorDataset(X, Y)
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(7)) if shuffle else None
    loader = DataLoader(dataset, batch_size=4, sampler=sampler)
    ours = Batches(X, Y, batch_size=4, shuffle=shuffle, generator=torch.Generator().manual_seed(7))
    for (inputs, targets), (their_inputs, their_targets) in zip(ours, loader, strict=True):
        assert torch.equal(inputs, their_inputs)
        assert torch.equal(targets, their_targets)


@pytest.mark.parametrize(
    ("arguments", "size", "sentence"),
    [
        ((), 4, "no sample"),
        ((X[:0],), 4, "no sample"),
        ((X, Y[:9]), 4, r"\[10, 9\]"),
        ((X,), 0, "at least 1"),
    ],
)
def test_batches_refuse_what_cannot_be_cut(arguments: tuple[Tensor, ...], size: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Batches(*arguments, batch_size=size)


# ----- MNIST and Fashion-MNIST ---------------------------------------------------------------------------


def read_idx(path: Path, header: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).copy())


@needs_mnist
@pytest.mark.parametrize(("load", "folder"), [(data.mnist, "MNIST"), (data.fashion_mnist, "FashionMNIST")])
def test_images_are_those_in_the_files(load: Callable[..., ImageData], folder: str) -> None:
    raw = Path(os.environ["DIANLIB_DATA"]) / folder / "raw"
    images = load(validation=0)
    assert images.train_images.dtype == torch.float32
    assert images.train_labels.dtype == torch.int64
    assert torch.equal((255 * images.train_images).round().byte().flatten(), read_idx(raw / FILES[0], 16))
    assert torch.equal(images.train_labels, read_idx(raw / FILES[1], 8).long())
    assert torch.equal((255 * images.test_images).round().byte().flatten(), read_idx(raw / FILES[2], 16))
    assert torch.equal(images.test_labels, read_idx(raw / FILES[3], 8).long())
    assert images.validation_images.shape == (0, 28, 28)
    assert len(images.classes) == 10


@needs_mnist
def test_validation_images_are_taken_out_of_the_training_images() -> None:
    whole, split = data.mnist(validation=0), data.mnist(validation=1000, seed=1)
    assert [len(images) for images, _ in parts(split)] == [59_000, 1000, 10_000]
    weights = torch.randint(1, 2**40, (784,), generator=torch.Generator().manual_seed(0))

    def fingerprints(images: Tensor, labels: Tensor) -> list[int]:
        numbers: list[int] = ((255 * images).round().long().flatten(1) @ weights + labels).tolist()
        return numbers

    everything = fingerprints(whole.train_images, whole.train_labels)
    train, validation, test = (fingerprints(*part) for part in parts(split))
    assert sorted(train + validation) == sorted(everything)
    assert test == fingerprints(whole.test_images, whole.test_labels)
    for part in (train, validation):
        in_file_order = iter(everything)
        assert all(fingerprint in in_file_order for fingerprint in part)
    again, other = data.mnist(1000, seed=1), data.mnist(1000, seed=2)
    assert torch.equal(split.validation_images, again.validation_images)
    assert not torch.equal(split.validation_images, other.validation_images)


@pytest.mark.parametrize("validation", [-1, 60_000])
def test_something_must_be_left_to_train_on(validation: int) -> None:
    with pytest.raises(ValueError, match="60,000 training images"):
        data.mnist(validation)


@needs_mnist
def test_a_read_only_folder_of_packed_files_works_and_stays_as_it_is(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = packed_folder(tmp_path / "given")
    monkeypatch.setenv("DIANLIB_DATA", str(root))
    for folder in (root, root / "MNIST", root / "MNIST" / "raw"):
        folder.chmod(0o555)
    before = snapshot(root)
    first = data.mnist()
    unpacked = snapshot(own_cache)
    second = data.mnist()
    assert snapshot(root) == before
    assert snapshot(own_cache) == unpacked  # the second time nothing is unpacked again
    assert sorted(path.name for path in unpacked if path.is_file()) == sorted(file[:-3] for file in FILES)
    assert torch.equal(first.train_images, second.train_images)
    for folder in (root, root / "MNIST", root / "MNIST" / "raw"):
        folder.chmod(0o755)


@needs_mnist
def test_unpacked_files_are_read_where_they_are(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = packed_folder(tmp_path / "given")
    for file in FILES:
        packed = root / "MNIST" / "raw" / file
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    monkeypatch.setenv("DIANLIB_DATA", str(root))
    assert data.torchvision_root("mnist") == root
    assert len(data.mnist().test_labels) == 10_000
    assert not own_cache.exists()


@needs_mnist
def test_several_may_unpack_at_once(own_cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        roots = set(pool.map(data.torchvision_root, ["mnist"] * 4))
    assert roots == {own_cache / "dianlib" / "unpacked"}
    assert [path.name for path in (own_cache / "dianlib" / "unpacked" / "MNIST").iterdir()] == ["raw"]


@needs_mnist
def test_a_damaged_file_is_named_and_not_fetched_in_silence(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = packed_folder(tmp_path / "given")
    damaged = root / "MNIST" / "raw" / FILES[2]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    monkeypatch.setenv("DIANLIB_DATA", str(root))
    before = snapshot(root)
    with pytest.raises(DataError, match=f"{FILES[2]} is damaged; run `dianlib data download`"):
        data.mnist()
    assert snapshot(root) == before
    assert not any(path.is_file() for path in own_cache.rglob("*"))


@needs_mnist
def test_a_cache_that_cannot_be_written_is_said_in_one_sentence(own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot be unpacked into .*set XDG_CACHE_HOME") as caught:
        data.mnist()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("load", "name"), [(data.mnist, "mnist"), (data.fashion_mnist, "fashion_mnist")])
@pytest.mark.parametrize("given", [True, False])
def test_a_missing_data_set_says_what_to_run(
    load: Callable[[], ImageData],
    name: str,
    given: bool,
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if given:
        monkeypatch.setenv("DIANLIB_DATA", str(tmp_path / "empty"))
    else:
        monkeypatch.delenv("DIANLIB_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        load()
    folder = tmp_path / "empty" if given else own_cache / "dianlib" / "data"
    assert str(caught.value) == (
        f"{name} is not in {folder}; run `dianlib data download`, "
        "or set DIANLIB_DATA to a folder that has it."
    )
    assert not folder.exists()


# ----- download ------------------------------------------------------------------------------------------


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def log_message(self, *arguments: Any) -> None:
        if self.command == "GET":
            self.requests.append(self.path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve the packed files on this computer, as a mirror that torchvision downloads from."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    requests: list[str] = []
    handler = type("Handler", (QuietHandler,), {"requests": requests})
    folder = os.environ["DIANLIB_DATA"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        mirror = f"http://127.0.0.1:{running.server_port}/MNIST/raw/"
        monkeypatch.setattr(data._dataset_class("mnist"), "mirrors", [mirror])
        yield requests
        running.shutdown()


@needs_mnist
def test_download_fetches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: list[str]) -> None:
    monkeypatch.setenv("DIANLIB_DATA", str(tmp_path / "wanted"))
    assert data.download("mnist") == tmp_path / "wanted"
    assert len(data.mnist().train_labels) == 55_000
    fetched = sorted({Path(path).name for path in server})
    assert fetched == sorted(FILES)
    server.clear()
    data.download("mnist")
    assert server == []


@needs_mnist
def test_download_mends_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: list[str]
) -> None:
    root = packed_folder(tmp_path / "given")
    damaged = root / "MNIST" / "raw" / FILES[1]
    damaged.write_bytes(b"")
    monkeypatch.setenv("DIANLIB_DATA", str(root))
    data.download("mnist")
    assert {Path(path).name for path in server} == {FILES[1]}
    assert len(data.mnist().train_labels) == 55_000


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_a_download_without_a_network_fails_in_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens: the connection is refused
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        monkeypatch.setattr(data._dataset_class(name), "mirrors", [address, address])
        monkeypatch.setenv("DIANLIB_DATA", str(tmp_path / "wanted"))
        with pytest.raises(DataError) as caught:
            data.download(name)
    sentence = str(caught.value)
    assert sentence.startswith(f"{name} could not be downloaded into {tmp_path / 'wanted'} (")
    assert sentence.endswith("try again with a network, or set DIANLIB_DATA to a folder that has it.")
    assert "\n" not in sentence


def test_only_known_data_sets_are_downloaded() -> None:
    with pytest.raises(ValueError, match="choose from mnist, fashion_mnist"):
        data.download("cifar10")


# ----- torchvision ---------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_can_be_imported_after_the_preparation() -> None:
    output = run_python(
        "from dianlib.data import prepare_torchvision\n"
        "first = prepare_torchvision()\n"
        "assert prepare_torchvision() is first\n"
        "from torchvision import datasets, transforms\n"
        "print(datasets.MNIST.__name__, transforms.ToTensor.__name__)\n"
    )
    assert output == "MNIST ToTensor"


def test_nothing_is_declared_where_the_operators_are_there() -> None:
    prepare = "from dianlib.data import prepare_torchvision\nprint(prepare_torchvision())\n"
    if run_python(prepare) == "None":  # torchvision fits this torch: its compiled part declares them
        assert (
            run_python(prepare + "import torch, torchvision\ntorch.ops.torchvision.nms.default\n") == "None"
        )
        return
    # Here it does not fit, and these lines stand for one that does.
    output = run_python(
        "import torch\n"
        "compiled = torch.library.Library('torchvision', 'DEF')\n"
        "compiled.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "compiled.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n" + prepare
    )
    assert output == "None"


def test_importing_data_is_light() -> None:
    output = run_python(
        "import sys, dianlib.data\n"
        "print(sorted({'torchvision', 'sklearn', 'matplotlib', 'dianlib.mlp'} & set(sys.modules)))"
    )
    assert output == "[]"


# ----- sentences -----------------------------------------------------------------------------------------

IN_CHINESE = {
    0: "零",
    7: "七",
    10: "十",
    11: "十一",
    20: "二十",
    105: "一百零五",
    110: "一百一十",
    1_000: "一千",
    1_001: "一千零一",
    1_010: "一千零一十",
    10_000: "一万",
    10_500: "一万零五百",
    15_000: "一万五千",
    100_010: "十万零一十",
    123_405: "十二万三千四百零五",
    20_300_000: "二千零三十万",
    99_999_999: "九千九百九十九万九千九百九十九",
}
IN_ENGLISH = {
    0: "zero",
    13: "thirteen",
    20: "twenty",
    42: "forty-two",
    100: "one hundred",
    1_010: "one thousand ten",
    123_405: "one hundred twenty-three thousand four hundred five",
    1_000_000: "one million",
    20_300_017: "twenty million three hundred thousand seventeen",
}


@pytest.mark.parametrize("number", IN_CHINESE)
def test_numbers_in_chinese(number: int) -> None:
    assert data.chinese_number(number) == IN_CHINESE[number]


@pytest.mark.parametrize("number", IN_ENGLISH)
def test_numbers_in_english(number: int) -> None:
    assert data.english_number(number) == IN_ENGLISH[number]


def read_chinese(text: str) -> int:
    """Read a number as a person does: digit times unit, and everything before 万 ten thousand times."""
    total = group = digit = 0
    for character in text:
        if character in "零〇":
            digit = 0
        elif character in "一二三四五六七八九":
            digit = "一二三四五六七八九".index(character) + 1
        elif character == "万":
            total, group, digit = (group + digit) * 10_000, 0, 0
        else:
            group += (digit or 1) * {"十": 10, "百": 100, "千": 1000}[character]
            digit = 0
    return total + group + digit


def read_english(text: str) -> int:
    small = {data.english_number(n): n for n in [*range(20), *range(20, 100, 10)]}
    total = group = 0
    for word in text.replace("-", " ").split():
        if word == "hundred":
            group *= 100
        elif word in ("thousand", "million"):
            total, group = total + group * {"thousand": 1000, "million": 10**6}[word], 0
        else:
            group += small[word]
    return total + group


def test_numbers_are_read_back_as_they_were() -> None:
    random = np.random.default_rng(0)
    for number in [int(10 ** random.uniform(0, 8)) for _ in range(2000)]:
        assert read_chinese(data.chinese_number(number)) == number
        assert read_english(data.english_number(number)) == number


def test_number_pairs_are_translations_and_differ() -> None:
    pairs = data.number_pairs(3000, seed=1)
    assert len(set(pairs)) == 3000
    for chinese, english in pairs:
        assert read_chinese(chinese) == read_english(english)
    sizes = {len(str(read_chinese(chinese))) for chinese, _ in pairs}
    assert sizes == {3, 4, 5, 6, 7, 8}
    assert data.number_pairs(3000, seed=1) == pairs
    assert data.number_pairs(3000, seed=2) != pairs


def test_a_date_in_both_languages() -> None:
    day = datetime.date(2024, 3, 12)
    assert data.chinese_date(day) == "二〇二四年三月十二日"
    assert data.english_date(day) == "March 12, 2024"
    assert data.chinese_date(day, weekday=True) == "二〇二四年三月十二日星期二"
    assert data.english_date(day, weekday=True) == "Tuesday, March 12, 2024"
    assert data.chinese_date(day, year=False) == "三月十二日"
    assert data.english_date(day, year=False) == "March 12"


def test_date_pairs_are_translations_and_differ() -> None:
    pairs = data.date_pairs(2000, seed=3)
    assert len(set(pairs)) == 2000
    forms = set()
    for chinese, english in pairs:
        form = {"year": "年" in chinese, "weekday": "星期" in chinese}
        forms.add(tuple(form.values()))
        layout = "%A, " * form["weekday"] + "%B %d, %Y"
        text = english if form["year"] else f"{english}, 2000"
        day = datetime.datetime.strptime(f"{text} Z", f"{layout} %z").date()
        assert data.chinese_date(day, **form) == chinese
        assert data.english_date(day, **form) == english  # the weekday is the right one
        assert 1900 <= day.year < 2100
    assert forms == {(False, False), (True, False), (True, True)}
    assert data.date_pairs(2000, seed=3) == pairs


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: data.chinese_number(-1), "0 to 99,999,999, not -1"),
        (lambda: data.chinese_number(10**8), "not 100000000"),
        (lambda: data.english_number(10**9), "0 to 999,999,999"),
        (lambda: data.date_pairs(-1), "at least 0, not -1"),
        (lambda: data.number_pairs(-1), "at least 0, not -1"),
        (lambda: data.date_pairs(10**6), "73049 pairs at most"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_english_is_cut_into_words_digits_and_marks() -> None:
    assert data.english_tokens("Tuesday, March 12, 2024") == [
        *("Tuesday", ",", "March", "1", "2", ",", "2", "0", "2", "4")
    ]
    assert data.english_tokens("I don't know twenty-two.") == [
        "I",
        "don't",
        "know",
        "twenty",
        "-",
        "two",
        ".",
    ]
    assert data.english_tokens("  ") == []


def test_a_vocabulary_numbers_tokens_and_back() -> None:
    vocabulary = data.Vocabulary([["b", "a"], ["a", "c", "a"]], min_count=1)
    assert vocabulary.tokens == ["<pad>", "<bos>", "<eos>", "<unk>", "b", "a", "c"]
    assert len(vocabulary) == 7
    assert vocabulary.encode(["a", "z"]) == [5, data.UNKNOWN, data.EOS]
    assert vocabulary.decode([5, 4, data.EOS, 6, data.EOS]) == ["a", "b"]
    assert vocabulary.decode([5, 4]) == ["a", "b"]
    assert data.Vocabulary([["b", "a"], ["a"]], min_count=2).tokens[4:] == ["a"]


def test_sequences_are_padded_behind() -> None:
    padded = data.pad_sequences([[5, 6, 2], [7, 2]])
    assert padded.tolist() == [[5, 6, 2], [7, 2, data.PAD]]
    assert padded.dtype == torch.int64


def test_translations_are_read_from_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIANLIB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"cmn.txt from www.manythings.org/anki there, or set DIANLIB_DATA"):
        data.translations()
    (tmp_path / "text").mkdir()
    file = tmp_path / "text" / "cmn.txt"
    file.write_text("Hi.\t嗨。\nHi.\t你好。\nRun.\t跑。\tattribution\n", encoding="utf-8")
    assert data.translations() == [("Hi.", "嗨。"), ("Hi.", "你好。"), ("Run.", "跑。")]
    file.write_text("Hi.\t嗨。\nno tab\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2 holds no English and Chinese"):
        data.translations()
    file.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="damaged"):
        data.translations()
    file.write_bytes(b"Hi.\t\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        data.translations()


@pytest.mark.skipif(
    not (Path(os.environ.get("DIANLIB_DATA", "")) / "text" / "cmn.txt").is_file(),
    reason="reads text/cmn.txt; set DIANLIB_DATA to a folder that has it",
)
def test_the_real_translations() -> None:
    pairs = data.translations()
    assert len(pairs) == 29_155
    assert pairs[0] == ("Hi.", "嗨。")
    assert len({english for english, _ in pairs}) == 27_661
