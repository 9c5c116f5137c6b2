"""Data of every kind become the same checked batches; what cannot is refused in words that say what to do."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.data import Data, Preprocessing
from lowbit.errors import DataError, InputError, ShapeError
from lowbit.model import Port

FLOAT = np.dtype("float32")
IMAGE = (Port("input", FLOAT, ("batch", 3, 4, 4)),)
PAIR = (Port("a", FLOAT, ("batch", 2)), Port("b", np.dtype("int64"), ("batch", 5)))
ROW = (Port("x", FLOAT, ("batch", 3)),)

rows = np.arange(30, dtype=np.float32).reshape(10, 3)
labels = np.arange(10)


def everything(data: Data, size: int | None = None) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    batches = list(data.batches(size))
    joined = {name: np.concatenate([inputs[name] for inputs, _ in batches]) for name in batches[0][0]}
    return joined, None if batches[0][1] is None else np.concatenate([found for _, found in batches])


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    "given",
    [
        rows,
        torch.from_numpy(rows),
        rows.astype(np.float64),
        {"x": rows},
        {"anything": rows},
        [rows[:4], rows[4:]],
        tuple(rows[i : i + 1] for i in range(10)),
        list(torch.from_numpy(rows)),
        (row for row in rows),
        lambda: iter([rows]),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(rows)), batch_size=3),
        [{"x": rows[:7]}, {"x": rows[7:]}],
    ],
    ids=lambda given: type(given).__name__,
)
def test_any_container_gives_the_same_rows(given):
    inputs, found = everything(Data.of(given, ROW), size=4)
    assert inputs["x"].dtype == FLOAT
    assert np.array_equal(inputs["x"], rows)
    assert found is None


@pytest.mark.parametrize(
    "given",
    [
        (rows, labels),
        {"x": rows, "labels": labels},
        ({"x": rows}, labels),
        [(rows[:6], labels[:6]), (rows[6:], labels[6:])],
        [(row, label) for row, label in zip(rows, labels, strict=True)],
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.from_numpy(rows), torch.from_numpy(labels)), batch_size=3
        ),
        torch.utils.data.TensorDataset(torch.from_numpy(rows), torch.from_numpy(labels)),
    ],
)
def test_labels_come_along(given):
    inputs, found = everything(Data.of(given, ROW), size=4)
    assert np.array_equal(inputs["x"], rows)
    assert np.array_equal(found, labels)


def test_two_inputs_by_name_and_in_order():
    a, b = np.ones((6, 2), np.float32), np.zeros((6, 5), np.int32)
    for given in ({"a": a, "b": b}, (a, b), [(a, b)], [{"a": a, "b": b}], [((a, b), np.arange(6))]):
        inputs, _ = everything(Data.of(given, PAIR))
        assert inputs["a"].shape == (6, 2)
        assert inputs["b"].dtype == np.int64


def test_npz_is_read_by_name_and_npy_alone(tmp_path):
    file = npz(tmp_path / "d.npz", x=rows, labels=labels)
    inputs, found = everything(Data.of(file, ROW))
    assert np.array_equal(inputs["x"], rows)
    assert np.array_equal(found, labels)
    np.save(tmp_path / "x.npy", rows)
    assert np.array_equal(everything(Data.of(str(tmp_path / "x.npy"), ROW))[0]["x"], rows)
    np.save(tmp_path / "f.npy", np.asfortranarray(rows))
    assert np.array_equal(everything(Data.of(tmp_path / "f.npy", ROW, skip=2))[0]["x"], rows[2:])


def test_names_choose_among_arrays(tmp_path):
    file = npz(tmp_path / "d.npz", train_x=rows[:3], test_x=rows, test_y=labels)
    with pytest.raises(DataError, match=r"no array for the network's input 'x'.*State names=x="):
        Data.of(file, ROW)
    inputs, found = everything(Data.of(file, ROW, names={"x": "test_x", "labels": "test_y"}))
    assert np.array_equal(inputs["x"], rows)
    assert np.array_equal(found, labels)


@pytest.mark.parametrize("file", [True, False])
def test_skip_limit_and_take_count_samples(tmp_path, file):
    given = (
        npz(tmp_path / "d.npz", x=rows, labels=labels)
        if file
        else [(row, label) for row, label in zip(rows, labels, strict=True)]
    )
    data = Data.of(given, ROW, skip=2, limit=5)
    assert np.array_equal(everything(data, 2)[1], [2, 3, 4, 5, 6])
    assert np.array_equal(everything(data.take(2))[1], [2, 3])
    assert np.array_equal(everything(Data.of(data, ROW, skip=2))[1], [4, 5, 6])
    assert data.count == (5 if file else None)


def test_a_generator_can_be_read_once():
    data = Data.of((rows[i : i + 4] for i in (0, 4, 8)), ROW)
    assert np.array_equal(everything(data)[0]["x"], rows)
    with pytest.raises(DataError, match=r"was read before"):
        everything(data)


def test_batches_have_the_asked_size_and_a_smaller_last_one():
    assert [len(batch["x"]) for batch, _ in Data.of([rows[:7], rows[7:]], ROW).batches(4)] == [4, 4, 2]


def test_a_fixed_batch_is_fed_as_the_network_wants_it():
    fixed = (Port("x", FLOAT, (1, 3)),)
    assert [batch["x"].shape for batch, _ in Data.of(rows, fixed).batches(8)] == [(1, 3)] * 10
    with pytest.raises(DataError, match=r"takes exactly 4 samples at a time, 2 are left over"):
        list(Data.of(rows, (Port("x", FLOAT, (4, 3)),)).batches())


def test_samples_of_other_lengths_are_not_joined():
    ids = (Port("ids", np.dtype("int64"), ("batch", "time")),)
    sentences = [np.arange(n) for n in (3, 3, 5, 5, 5)]
    assert [batch["ids"].shape for batch, _ in Data.of(sentences, ids).batches(4)] == [(2, 3), (3, 5)]


def test_the_batch_axis_follows_its_symbol():
    ports = (Port("x", FLOAT, ("n", 4)), Port("state", FLOAT, (2, "n", 8)), Port("sr", np.dtype("int64"), ()))
    item = {"x": np.ones((3, 4)), "state": np.zeros((2, 3, 8)), "sr": 16000}
    batches = list(Data.of([item, item], ports).batches(4))
    assert [(b["x"].shape, b["state"].shape, b["sr"].shape) for b, _ in batches] == [
        ((4, 4), (2, 4, 8), ()),
        ((2, 4), (2, 2, 8), ()),
    ]


def test_boxes_stay_objects_one_for_each_sample():
    data = Data.of([(np.ones(3), np.ones((2, 5))), (np.ones(3), np.ones((7, 5)))], ROW)
    ((_, found),) = data.batches(2)
    assert [boxes.shape for boxes in found] == [(2, 5), (7, 5)]


# ---------------------------------------------------------------- preprocessing


def test_a_preprocessing_is_a_line_a_table_and_a_value():
    line = "size=224 fit=crop short=256 scale=255 mean=0.485,0.456,0.406 std=0.229,0.224,0.225 layout=NCHW color=BGR"
    stated = Preprocessing.parse(line)
    assert str(stated) == line
    table = {"size": 224, "fit": "crop", "short": 256, "scale": 255, "layout": "NCHW", "color": "BGR"}
    assert Preprocessing.of(table | {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}) == stated
    assert Preprocessing.of("size=240x320").size == (240, 320)
    assert eval(repr(stated)) == stated


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("scala=255", "Did you mean 'scale'"),
        ("scale=abc", "cannot be read"),
        ("scale=0", "cannot be 0"),
        ("layout=CHWN", "not one of NCHW, NHWC, flat"),
        ("short=256", "needs fit=crop"),
        ("fit=crop", "needs a size"),
        ("224", "not name=value"),
        ("size=224 fit=crop short=99", "from the size"),
    ],
)
def test_a_wrong_preprocessing_says_what_is_wrong(line, message):
    with pytest.raises(InputError, match=message):
        Preprocessing.parse(line)


def test_pixels_become_value_over_scale_minus_mean_over_std():
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    data = Data.of((pixels, [1, 2]), IMAGE, preprocess="scale=255 mean=.5,.25,0 std=.5,1,2 layout=NCHW")
    inputs, found = everything(data)
    wanted = ((pixels / 255 - [0.5, 0.25, 0]) / [0.5, 1, 2]).transpose(0, 3, 1, 2)
    assert np.allclose(inputs["input"], wanted, atol=1e-6)
    assert found.tolist() == [1, 2]


def test_gray_images_without_a_channel_axis_get_one():
    digits = np.arange(5 * 28 * 28).astype(np.uint8).reshape(5, 28, 28)
    port = (Port("x", FLOAT, ("n", 1, 28, 28)),)
    assert everything(Data.of(digits, port, preprocess="scale=255 layout=NCHW"))[0]["x"].shape == (5, 1, 28, 28)
    flat = (Port("x", FLOAT, ("n", 784)),)
    assert np.array_equal(
        everything(Data.of(digits, flat, preprocess="layout=flat"))[0]["x"], digits.reshape(5, 784).astype(FLOAT)
    )


def test_uint8_is_not_scaled_by_guess():
    with pytest.raises(DataError, match=r"is uint8, the network takes float32.*state how they are scaled"):
        everything(Data.of(np.zeros((2, 3, 4, 4), np.uint8), IMAGE))


def test_integers_with_a_scale_in_the_file_are_decoded(tmp_path):
    codes = np.asarray([[1, 2, 3], [-128, 0, 127]], np.int8)
    file = npz(tmp_path / "q.npz", features=codes, scale=np.float32(0.5), zero_point=np.int32(1), labels=np.arange(2))
    assert everything(Data.of(file, ROW))[0]["x"].tolist() == [[0, 0.5, 1], [-64.5, -0.5, 63]]
    file = npz(tmp_path / "p.npz", x=codes, x_scale=np.float32(0.5), x_zero_point=np.int32(1))
    assert everything(Data.of(file, ROW))[0]["x"].tolist() == [[0, 0.5, 1], [-64.5, -0.5, 63]]


# ---------------------------------------------------------------- image files


def picture(value: int, width: int = 4, height: int = 4) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return path


def test_a_zip_of_images_with_a_table_of_labels(tmp_path):
    table = b"file,class_index,name\n10.png,7,seven\n2.png,3,three\n"
    file = zipped(tmp_path / "i.zip", **{"10_dot_png": picture(10), "2_dot_png": picture(2), "labels_dot_csv": table})
    inputs, found = everything(Data.of(file, IMAGE, preprocess="scale=1"))
    assert inputs["input"][:, 0, 0, 0].tolist() == [2, 10]
    assert found.tolist() == [3, 7]


def test_a_folder_of_class_folders(tmp_path):
    for name, value in (("cat", 1), ("dog", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(value))
    inputs, found = everything(Data.of(tmp_path, IMAGE, preprocess="scale=1 layout=NCHW"))
    assert inputs["input"][:, 0, 0, 0].tolist() == [1, 2]
    assert found.tolist() == [0, 1]


def test_images_of_a_folder_named_images_have_no_class_folders(tmp_path):
    file = zipped(tmp_path / "i.zip", **{"images__1_dot_png": picture(1), "masks__1_dot_png": picture(9)})
    inputs, found = everything(Data.of(file, IMAGE, preprocess="scale=1"))
    assert inputs["input"][:, 0, 0, 0].tolist() == [1]
    assert found is None


def test_fits_put_the_whole_image_or_its_centre_in_the_frame(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200
    assert Preprocessing(size=(4, 4), fit="crop").resized(wide).min() == 200
    boxed = Preprocessing(size=(8, 8), fit="letterbox-corner", fill=114).resized(wide)
    assert boxed[:4, :, 0].tolist() == wide[..., 0].tolist()
    assert (boxed[4:] == 114).all()
    middle = Preprocessing(size=(8, 8), fit="letterbox", fill=114).resized(wide)
    assert (middle[:2] == 114).all()
    assert (middle[6:] == 114).all()


def test_images_of_another_size_ask_for_a_size(tmp_path):
    file = zipped(tmp_path / "i.zip", **{"1_dot_png": picture(1, 8, 8)})
    with pytest.raises(ShapeError, match=r"preprocess 'size=4x4"):
        everything(Data.of(file, IMAGE, preprocess="scale=255"))
    with pytest.raises(DataError, match=r"state what the network expects"):
        Data.of(file, IMAGE)


def test_a_broken_image_is_named(tmp_path):
    file = zipped(tmp_path / "i.zip", **{"1_dot_png": b"no image"})
    with pytest.raises(DataError, match=r"'1.png' in .* is no readable image"):
        everything(Data.of(file, IMAGE, preprocess="scale=1"))


# ---------------------------------------------------------------- module:function


def test_module_and_function_are_imported_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_loader.py").write_text("import numpy\ndef rows():\n    return [(numpy.ones((2, 3)), [0, 1])]\n")
    monkeypatch.chdir(tmp_path)
    for text in ("my_loader:rows", "my_loader.py:rows"):
        inputs, found = everything(Data.of(text, ROW))
        assert inputs["x"].shape == (2, 3)
        assert found.tolist() == [0, 1]
    with pytest.raises(InputError, match=r"has no function 'row'; it has rows"):
        Data.of("my_loader:row", ROW)
    with pytest.raises(InputError, match=r"cannot be imported"):
        Data.of("no_such_module:rows", ROW)


# ---------------------------------------------------------------- bad data


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_name_input_and_sample(value):
    bad = rows.copy()
    bad[7, 1] = value
    with pytest.raises(DataError, match=r"input 'x' holds .* in sample 7"):
        everything(Data.of([bad[:4], bad[4:]], ROW))
    with pytest.raises(DataError, match=r"in sample 7"):
        everything(Data.of(bad, ROW, skip=5), 2)


@pytest.mark.parametrize("given", [np.zeros((0, 3), np.float32), [], {"x": np.zeros((0, 3))}, iter([])])
def test_empty_data_is_an_error(given):
    with pytest.raises(DataError, match=r"no samples|is empty"):
        everything(Data.of(given, ROW))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"y": rows, "z": rows}, "no array for the network's input 'x'"),
        ({"x": rows, "z": rows}, "the network takes no 'z'.*names=x=x"),
        ({"x": rows, "labels": labels[:3]}, "10 samples but 3 labels"),
        ([(rows, labels[:3])], "10 samples but 3 labels"),
        (rows[:, :2], r"shape \(10, 2\), the network takes \(batch, 3\)"),
        (rows.astype(object), "numbers are needed"),
        (["text", "more"], "numbers are needed"),
        (42, "data is int"),
        ([(rows, rows, rows)], "3 arrays for 1 inputs"),
        (rows.astype(np.int32), "int32, the network takes float32"),
    ],
)
def test_wrong_data_say_what_is_wrong(given, message):
    with pytest.raises((DataError, ShapeError), match=message):
        everything(Data.of(given, ROW))


def test_integers_must_fit_and_floats_are_not_made_integers():
    ids = (Port("ids", np.dtype("int32"), ("n", 2)),)
    assert everything(Data.of(np.asarray([[1, 2]], np.int64), ids))[0]["ids"].dtype == np.int32
    with pytest.raises(DataError, match=r"do not fit in the network's int32"):
        everything(Data.of(np.asarray([[1, 2**40]]), ids))
    with pytest.raises(DataError, match=r"float64, the network takes int32"):
        everything(Data.of(np.asarray([[1.5, 2]]), ids))


def test_channels_last_data_get_a_hint():
    with pytest.raises(ShapeError, match=r"looks like NHWC: state preprocess 'layout=NCHW"):
        everything(Data.of(np.zeros((2, 4, 4, 3), np.float32), IMAGE))


# ---------------------------------------------------------------- hostile files


def test_pickles_are_never_read(tmp_path):
    np.save(tmp_path / "p.npy", np.asarray([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"pickled Python objects, which are never read"):
        Data.of(tmp_path / "p.npy", ROW)
    (tmp_path / "data.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"never read"):
        Data.of(tmp_path / "data.pkl", ROW)


def test_truncated_and_random_files_are_errors_at_every_length(tmp_path):
    whole = npz(tmp_path / "w.npz", x=rows, labels=labels).read_bytes()
    file = tmp_path / "t.npz"
    for length in range(0, len(whole), 37):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError):
            everything(Data.of(file, ROW))
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[int(random.integers(len(whole)))] ^= int(random.integers(1, 256))
        file.write_bytes(bytes(damaged))
        try:
            everything(Data.of(file, ROW))
        except (DataError, ShapeError):
            continue


def test_a_header_that_declares_more_than_it_has_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)})
    (tmp_path / "h.npy").write_bytes(buffer.getvalue() + bytes(12))
    with pytest.raises(DataError, match=r"declares 12000000000000 bytes of numbers, but has 12"):
        Data.of(tmp_path / "h.npy", ROW)


def test_members_that_point_outside_are_refused(tmp_path):
    for name in ("../evil.png", "/etc/evil.png", "a/../../evil.png"):
        with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
            archive.writestr(name, picture(1))
        with pytest.raises(DataError, match=r"points outside"):
            Data.of(tmp_path / "e.zip", IMAGE, preprocess="scale=1")


def test_a_zip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.data.archive.LARGEST_MEMBER", 2**20)
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", bytes(2**22))
    with pytest.raises(DataError, match=r"zip bomb"):
        Data.of(tmp_path / "b.zip", IMAGE, preprocess="scale=1")


# ---------------------------------------------------------------- real files


def test_the_real_archives_open(data):
    cifar = (Port("input", FLOAT, ("batch", 3, 32, 32)),)
    opened = Data.of(data / "cifar10-test.npz", cifar, preprocess="scale=255 layout=NCHW", limit=100)
    inputs, found = everything(opened)
    assert inputs["input"].shape == (100, 3, 32, 32)
    assert found[:4].tolist() == [3, 8, 1, 0]
    speech = (Port("input", FLOAT, ("batch", 1, 49, 10)),)
    features, found = everything(Data.of(data / "speech" / "kws-features.npz", speech))
    assert features["input"].shape == (1000, 1, 49, 10)
    assert features["input"].flat[0] == pytest.approx((2 - 83) * 0.5847029)
    image = (Port("input", FLOAT, ("batch", 3, 128, 128)),)
    photos = Data.of(data / "imagenet-sample-a.zip", image, preprocess="size=128 scale=127.5 mean=1", limit=3)
    assert everything(photos)[1].tolist() == [0, 2, 4]
    assert photos.count == 3


@pytest.mark.parametrize("symbols", [("time", "batch"), ("batch", "time")])
def test_an_axis_called_batch_counts_samples_wherever_it_is(symbols):
    from lowbit.data.samples import Batching

    ports = (Port("x", np.dtype(np.float32), (*symbols, 4)), Port("h", np.dtype(np.float32), (1, "batch", 6)))
    batching = Batching.of(ports)
    assert batching.axes == {"x": symbols.index("batch"), "h": 1}
    assert batching.fixed is None
    arrays = {"x": np.zeros((5, 5, 4), np.float32), "h": np.zeros((1, 5, 6), np.float32)}
    sizes = [part["x"].shape for part, _ in Data.of(arrays, ports).batches(2)]
    assert sizes == [(5, 2, 4), (5, 2, 4), (5, 1, 4)] if symbols[1] == "batch" else [(2, 5, 4), (2, 5, 4), (1, 5, 4)]
