"""Data that cannot be used as it is: arrays, files, and what a user's code gives."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hesstrace_cli.analysis.loading import check_fit
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.data import load_data
from hesstrace_cli.data.checks import inputs_of, target_of, targets_of
from hesstrace_cli.errors import DataError, ModelError
from hesstrace_cli.models import build_model
from tests.conftest import assert_one_line_error, invoke

CPU = torch.device("cpu")
USABLE = {torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64}
INDICES = {torch.int8, torch.int16, torch.int32, torch.int64}
ALL_TYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def load(spec, **settings):
    return load_data(TrainConfig(dataset=str(spec), val_fraction=0, **settings), CPU)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=str)
def test_inputs_keep_their_type_or_are_refused(kind):
    value = torch.ones(2, 3).to(kind)
    if kind in USABLE:
        assert inputs_of(value, "x").dtype == kind
    elif kind in INDICES:
        assert inputs_of(value, "x").dtype == torch.int64
    else:
        with pytest.raises(DataError, match="expected native floating point"):
            inputs_of(value, "x")


@pytest.mark.parametrize(
    "kind",
    [
        "?",
        "u1",
        "i1",
        "u2",
        "i4",
        "i8",
        "u8",
        "f2",
        "f4",
        "f8",
        "g",
        "c8",
        "U3",
        "S3",
        "O",
        "M8[s]",
        ">f4",
        ">f8",
        "V4",
    ],
)
def test_arrays_keep_their_type_or_are_refused(kind):
    array = np.ones((2, 3)).astype(kind) if kind not in ("M8[s]", "V4") else np.zeros((2, 3), kind)
    if kind in ("u1", "f2", "f4", "f8"):
        assert inputs_of(array, "x").numpy().dtype == array.dtype
    elif kind in ("i1", "i4", "i8"):
        assert inputs_of(array, "x").tolist() == array.tolist()
    else:
        with pytest.raises(DataError, match="expected native floating point"):
            inputs_of(array, "x")


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.tensor(1.0),
        torch.zeros(0, 3),
        [1.0, 2.0],
        None,
        "x",
        1.0,
        Image.new("L", (2, 2)),
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_inputs_that_are_no_plain_tensors_are_refused(value):
    with warnings.catch_warnings(action="ignore"), pytest.raises(DataError):
        inputs_of(value, "x")


NO_TARGETS = [
    True,
    None,
    "3",
    "cat",
    b"3",
    10**30,
    -(10**30),
    [1],
    (1,),
    1j,
    object(),
    np.bool_(True),
    np.str_("3"),
    np.uint64(2**63),
    np.longdouble(3),
    torch.tensor(True),
    torch.tensor(3, device="meta"),
    torch.tensor(1 + 0j),
    torch.ones(2, 2).to_sparse(),
]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
@pytest.mark.parametrize("number", [3, 1.5])
def test_a_single_number_is_no_targets(kind, number):
    with pytest.raises(DataError, match="a single number, expected one an example"):
        targets_of(kind(number), "d")


@pytest.mark.parametrize("target", NO_TARGETS, ids=lambda target: type(target).__name__)
def test_targets_that_are_no_numbers_are_refused(target):
    with pytest.raises(DataError):
        target_of(target, "y")
    with pytest.raises(DataError):
        targets_of([0, 1, target], "y")  # every one counts, not the first


@pytest.mark.parametrize(
    "target", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3).byte()]
)
def test_class_numbers_of_every_kind(target):
    assert target_of(target, "y").dtype == torch.int64
    assert targets_of([target, 0], "y").tolist() == [3, 0]


@pytest.mark.parametrize("target", [1.5, np.float32(1.5), torch.tensor(1.5), torch.tensor([1.5])])
def test_numbers_to_be_met_are_never_cut(target):
    assert targets_of([target, target], "y").tolist() == [[1.5], [1.5]]
    with pytest.raises(DataError, match="targets differ"):
        targets_of([1, target], "y")


@pytest.mark.parametrize("kind", ["?", "f4", ">f8", "c8", "O", "U1", "i1", "i8", ">i4", "u1", "u8"])
def test_arrays_of_targets(kind):
    array = np.array([0, 1, 1]).astype(kind)
    if kind.strip(">")[0] in "iu":
        assert targets_of(array, "y").tolist() == [0, 1, 1]
        assert targets_of(array[:, None], "y").shape == (3, 1)
    elif kind.strip(">")[0] == "f":
        assert targets_of(array, "y").tolist() == [[0], [1], [1]]
    else:
        with pytest.raises(DataError):
            targets_of(array, "y")
    with pytest.raises(DataError):
        targets_of(np.array([2**63], "u8"), "y")


HEAD = """
import numpy as np, torch
from torch.utils.data import Dataset
class D(Dataset):
    def __len__(self): return 24
    def __getitem__(self, i): return {example}
{more}
def data(): return D(), {test}
"""
FINE = "torch.full((1, 8, 8), i / 24), i % 3"
EXAMPLES = {
    "float target, late": "torch.zeros(1, 8, 8), i % 3 + (0.5 if i == 20 else 0)",
    "text label, late": "torch.zeros(1, 8, 8), 'cat' if i == 20 else 0",
    "bool label": "torch.zeros(1, 8, 8), i > 3",
    "vector label, late": "torch.zeros(1, 8, 8), torch.tensor([i % 3] if i == 20 else i % 3)",
    "huge label": "torch.zeros(1, 8, 8), 10**30",
    "integer inputs, late": "torch.zeros(1, 8, 8, dtype=torch.int64 if i == 20 else None), i % 3",
    "complex inputs": "torch.zeros(1, 8, 8).to(torch.complex64), i % 3",
    "bool inputs, late": "torch.zeros(1, 8, 8) > (0 if i == 20 else 0.0), i % 3",
    "bytes among floats": "torch.zeros(1, 8, 8, dtype=torch.uint8 if i == 20 else None), i % 3",
    "doubles among floats": "torch.zeros(1, 8, 8, dtype=torch.float64 if i == 20 else None), i % 3",
    "another shape, late": "torch.zeros(1, 8, 9 if i == 20 else 8), i % 3",
    "objects": "np.array([None]), i % 3",
    "a triple, late": "(torch.zeros(1, 8, 8), 0, 1) if i == 20 else (torch.zeros(1, 8, 8), i % 3)",
    "nothing, late": "None if i == 20 else (torch.zeros(1, 8, 8), i % 3)",
    "NaN, late": "torch.full((1, 8, 8), float('nan') if i == 20 else 0), i % 3",
}


def plugin(path, example=FINE, more="", test="D()"):
    path.write_text(HEAD.format(example=example, more=more, test=test))
    return f"{path}:data"


def read_all(data):
    for split in (data.train, data.test):
        for _ in split.batches(8):
            pass


@pytest.mark.parametrize(
    "targets", ["", "D.targets = [i % 3 for i in range(24)]"], ids=["", "targets"]
)
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_every_example_of_a_users_data_is_checked(example, targets, tmp_path):
    with pytest.raises(DataError):
        read_all(load(plugin(tmp_path / "d.py", example, targets)))


@pytest.mark.parametrize(
    ("more", "test"),
    [
        ("D.targets = [0, 1]", "D()"),
        ("D.targets = ['a'] * 24", "D()"),
        ("D.targets = [0.5] * 24", "D()"),
        ("D.targets = [0] * 24", "D()"),
        ("D.num_classes = 'x'", "D()"),
        ("D.num_classes = 0", "D()"),
        ("D.num_classes = 2", "D()"),
        ("D.num_classes = True", "D()"),
        ("D.__len__ = lambda self: 10**12", "D()"),
        ("", "[(torch.zeros(1, 8, 8).byte(), 0)]"),
        ("", "[(torch.zeros(3, 8, 8), 0)]"),
        ("", "[(torch.zeros(64), 0)]"),
        ("", "5"),
        ("", "[]"),
        ("", "'text'"),
    ],
)
def test_what_a_users_data_says_of_itself_is_checked(more, test, tmp_path):
    with pytest.raises(DataError):
        read_all(load(plugin(tmp_path / "d.py", more=more, test=test)))


def test_a_users_data_that_is_fine(tmp_path):
    more = (
        "D.targets = [9] * 24\nD.target_transform = str"  # the examples', not the targets, are used
    )
    for name, extra in (("a", ""), ("b", "D.targets = torch.arange(24) % 3"), ("c", more)):
        read_all(load(plugin(tmp_path / f"{name}.py", more=extra)))
    read_all(load(plugin(tmp_path / "e.py", "np.full((1, 8, 8), i, 'u1'), np.int32(i % 3)")))


def arrays(**changes):
    x = np.random.default_rng(0).random((12, 4, 4)).astype("f4")
    y = np.arange(12) % 3
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y, **changes}


MEMBERS = {
    "fewer labels": {"y_train": np.zeros(11, int)},
    "more labels": {"y_test": np.zeros(13, int)},
    "float labels": {"y_train": np.zeros(12)},
    "bool labels": {"y_train": np.zeros(12, bool)},
    "a column": {"y_train": np.zeros((12, 1), int)},
    "objects": {"x_train": np.array([object()] * 12)},
    "integers": {"x_train": np.zeros((12, 4, 4), int)},
    "complex": {"x_test": np.zeros((12, 4, 4), "c8")},
    "other byte order": {"x_train": np.zeros((12, 4, 4), ">f4")},
    "0-dim": {"x_train": np.array(3.0)},
    "bytes and floats": {"x_train": np.zeros((12, 4, 4), "u1")},
    "empty": {"x_train": np.zeros((12, 0))},
    "other channels": {"x_test": np.zeros((12, 3, 4, 4), "f4")},
    "other dims": {"x_test": np.zeros((12, 16), "f4")},
    "NaN": {"x_test": np.full((12, 4, 4), np.nan)},
    "no examples": {"x_test": np.zeros((0, 4, 4)), "y_test": np.zeros(0, int)},
}


@pytest.mark.parametrize("changes", MEMBERS.values(), ids=MEMBERS)
def test_arrays_that_cannot_be_used(changes, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays(**changes))
    with pytest.raises(DataError):
        load(tmp_path / "d.npz")


def archive(path, member):
    """An .npz whose x_train has other bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays().items():
            out = io.BytesIO()
            np.save(out, array)
            file.writestr(f"{name}.npy", member if name == "x_train" else out.getvalue())


def npy(header):
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(768)


PLAIN = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"
LIES = {
    "text": b"hello",
    "nothing": b"",
    "pickle": b"\x80\x04N.",
    "magic alone": b"\x93NUMPY",
    "later version": b"\x93NUMPY\x09\x00" + bytes(99),
    "cut": npy(PLAIN.format("'<f4'", "(12, 4, 4)"))[:300],
    "terabytes": npy(PLAIN.format("'<f4'", "(10**12, 6, 6)".replace("10**12", str(10**12)))),
    "overflow": npy(PLAIN.format("'<f4'", f"({2**62}, {2**62})")),
    "negative": npy(PLAIN.format("'<f4'", "(-12, 4, 4)")),
    "objects": npy(PLAIN.format("'|O'", "(12,)")),
    "float shape": npy(PLAIN.format("'<f4'", "(12.0, 4)")),
    "code": npy(PLAIN.format("__import__('os').getcwd()", "(12,)")),
    "deep": npy(PLAIN.format("[" * 300 + "]" * 300, "(12,)")),
    "no type": npy(PLAIN.format("'nope'", "(12,)")),
}


@pytest.mark.parametrize("member", LIES.values(), ids=LIES)
def test_members_of_an_archive_that_are_no_arrays(member, tmp_path):
    archive(tmp_path / "d.npz", member)
    with pytest.raises(DataError) as caught:
        load(tmp_path / "d.npz")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_array_larger_than_its_member_takes_no_memory(tmp_path):
    archive(tmp_path / "d.npz", LIES["terabytes"])
    with pytest.raises(DataError, match="says that it is an array of"):
        load(tmp_path / "d.npz")


def test_places_that_hold_no_archive(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    for name in ("folder.npz", "loop.npz", "zero.npz", "gone.npz", "x" * 5000 + ".npz"):
        with pytest.raises(DataError):
            load(tmp_path / name)


def png(width, height, rows=b""):
    def chunk(kind, body):
        whole = kind + body
        return struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def encoded(mode, kind="PNG"):
    out = io.BytesIO()
    Image.new(mode, (8, 8)).save(out, kind)
    return out.getvalue()


IMAGES = {
    "bomb": png(30_000, 30_000),
    "half a bomb": png(10_000, 10_000),
    "endless": png(2**31 - 1, 2**31 - 1),
    "no pixels": png(8, 8),
    "cut": encoded("RGB")[:48],
    "text": b"hello",
    "empty": b"",
    "0 by 0": png(0, 0),
    "16 bits": encoded("I;16"),
    "floats": encoded("F", "TIFF"),
    "integers": encoded("I", "TIFF"),
}


def image_folder(root):
    for part in ("train", "val"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                (root / part / name / f"{number}.png").write_bytes(encoded("RGB"))
    return f"imagefolder:{root}"


@pytest.mark.parametrize("size", [None, 8], ids=["by files", "held"])
@pytest.mark.parametrize("content", IMAGES.values(), ids=IMAGES)
def test_images_that_cannot_be_used(content, size, tmp_path):
    spec = image_folder(tmp_path / "d")
    read_all(load(spec, image_size=size))
    (tmp_path / "d" / "train" / "a" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.png"):
        read_all(load(spec, image_size=size))


def test_an_image_that_is_no_file(tmp_path):
    spec = image_folder(tmp_path / "d")
    (tmp_path / "d" / "train" / "a" / "9.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no file"):
        read_all(load(spec, image_size=8))


def idx(array):
    head = bytes([0, 0, 8, array.ndim])
    return head + b"".join(struct.pack(">I", n) for n in array.shape) + array.astype("u1").tobytes()


def mnist(root, **changes):
    images, labels = np.zeros((20, 28, 28)), np.arange(20) % 10
    files = {
        "train-images-idx3": images,
        "train-labels-idx1": labels,
        "t10k-images-idx3": images,
        "t10k-labels-idx1": labels,
    }
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in files.items():
        key = name.replace("-", "_")
        (raw / f"{name}-ubyte").write_bytes(changes.get(key, idx(array)))
    return {"spec": "mnist", "data_dir": str(root)}


WHOLE = idx(np.zeros((20, 28, 28)))
FILES = {
    "fewer labels": {"train_labels_idx1": idx(np.zeros(12))},
    "more labels": {"t10k_labels_idx1": idx(np.zeros(21))},
    "a label beyond": {"train_labels_idx1": idx(np.full(20, 99))},
    "cut": {"train_images_idx3": WHOLE[:900]},
    "empty": {"train_images_idx3": b""},
    "no magic": {"t10k_images_idx3": b"\xff" * 4 + WHOLE[4:]},
    "floats": {"train_images_idx3": WHOLE[:2] + b"\x0d" + WHOLE[3:]},
    "a count of 0": {"train_images_idx3": idx(np.zeros((0, 28, 28)))},
    "labels as images": {"train_images_idx3": idx(np.zeros(20))},
    "images as labels": {"train_labels_idx1": WHOLE},
}


@pytest.mark.parametrize("changes", FILES.values(), ids=FILES)
def test_idx_files_that_do_not_fit(changes, tmp_path):
    load(**mnist(tmp_path / "fine"))
    with pytest.raises(DataError), warnings.catch_warnings(action="ignore"):
        load(**mnist(tmp_path / "wrong", **changes))


MODELS = """
import sys, torch
from torch import nn

class M(nn.Linear):
    def __init__(self, out):
        super().__init__(16, 3)
        self.out = out
    def forward(self, x):
        return self.out(super().forward(x.flatten(1)), x)

OUTPUTS = {{
    "integers": lambda y, x: y.long(), "bool": lambda y, x: y > 0, "complex": lambda y, x: y + 0j,
    "detached": lambda y, x: y.detach(), "one": lambda y, x: y.sum(), "nothing": lambda y, x: None,
    "pair": lambda y, x: (y, y), "list": lambda y, x: y.tolist(), "one example": lambda y, x: y[:1],
    "transposed": lambda y, x: y.t(), "few": lambda y, x: y[:, :2], "raises": lambda y, x: y @ y,
    "sparse": lambda y, x: y.to_sparse(), "map": lambda y, x: {{"other": y}},
}}
def build(): return M(OUTPUTS[{name!r}])
def fine(): return M(lambda y, x: y)
"""
OUTPUTS = [
    "integers",
    "bool",
    "complex",
    "detached",
    "one",
    "nothing",
    "pair",
    "list",
    "one example",
    "transposed",
    "few",
    "raises",
    "sparse",
    "map",
]


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_no_logits(name, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays())
    data = load(tmp_path / "d.npz")
    (tmp_path / f"{tmp_path.name}.py").write_text(MODELS.format(name=name))

    def built(factory):
        spec = f"{tmp_path / tmp_path.name}.py:{factory}"
        return build_model(spec, num_classes=3, in_shape=data.in_shape, model_args={}, seed=0)

    assert check_fit(built("fine"), data, "fine") == 3
    with pytest.raises(ModelError):
        check_fit(built("build"), data, name)


FACTORIES = {
    "exits": "import sys\ndef f(): sys.exit(0)",
    "exits at once": "import sys\nsys.exit(0)",
    "exits with a text": "def f(): raise SystemExit('bye')",
    "asynchronous": "async def f(): pass",
    "a number": "f = 5",
    "gives nothing": "def f(): pass",
    "gives a class": "from torch import nn\ndef f(): return nn.Linear",
    "generator": "def f(): yield 1",
    "needs more": "def f(a, b, c): pass",
    "missing": "x = 1",
    "builtin": "f = dict.fromkeys",
    "meta": "from torch import nn\ndef f(): return nn.Linear(2, 2, device='meta')",
    "scripted": "import torch\ndef f(): return torch.jit.script(torch.nn.Linear(2, 2))",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("source", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize(("flag", "code"), [("--model", 4), ("--dataset", 3), ("--reg", 2)])
def test_factories_that_give_something_else(source, flag, code, tmp_path):
    (tmp_path / f"{tmp_path.name}.py").write_text(source + "\n")
    spec = f"{tmp_path / tmp_path.name}.py:f"
    value = f"{spec}=0.1" if flag == "--reg" else spec
    result = invoke(
        "train", "--epochs", "1", "--model", "mlp", flag, value, "--out", tmp_path / "r"
    )
    assert_one_line_error(result, code, tmp_path.name)
    assert not (tmp_path / "r").exists()


def test_examples_that_end_the_program(tmp_path):
    spec = plugin(tmp_path / "d.py", "exit(0) if i == 20 else (torch.zeros(1, 8, 8), i % 3)")
    with pytest.raises(DataError, match="exit"):
        load(spec)


def test_a_factory_that_switches_gradients_off_changes_nothing(tmp_path):
    (tmp_path / "off.py").write_text(
        "import torch\ntorch.set_grad_enabled(False)\ndef build(): return torch.nn.Linear(2, 2)\n"
    )
    build_model(f"{tmp_path}/off.py:build", num_classes=2, in_shape=(2,), model_args={}, seed=0)
    assert torch.is_grad_enabled()


def test_what_a_model_prints_does_not_stand_among_the_results(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import torch\nprint('hello')\ndef build():\n    print('hello')\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    result = invoke("verify", "--model", f"{tmp_path}/loud.py:build", "--json", "-")
    assert result.stdout.startswith("{")
    assert "hello" in result.stderr
