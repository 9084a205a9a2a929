"""Batches of pictures: the same pixels for any number of ranks and threads, and never many at once."""

import gc
import io
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kngd_ray.clip._augment import RandomResizedCrop
from kngd_ray.data import BadImage, DataConfig, PictureFile, open_images
from kngd_ray.errors import DataError
from kngd_ray.sharding import split_evenly
from kngd_ray.training.decoding import Prefetcher, stream
from kngd_ray.training.pictures import Pictures, augmentation

SHOTS, BATCH, STEPS = 30, 7, 9
CROP = RandomResizedCrop((16, 16), (0.5,) * 3, (0.25,) * 3)


def whole(picture):
    """The evaluation transform: all of the picture, 8 x 8."""
    return torch.from_numpy(np.array(picture.resize((8, 8)))).permute(2, 0, 1).float()


@pytest.fixture(scope="module")
def images():
    return open_images(DataConfig())


@pytest.fixture(scope="module")
def rows(images):
    return np.random.default_rng(0).permutation(len(images))[:SHOTS]


@pytest.fixture(scope="module")
def shots(images, rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "shots.arrow"
    PictureFile.write(path, images, rows)
    return Pictures(path, torch.arange(SHOTS), torch.from_numpy(images.labels[rows].copy()))


def plan_of(world_size, rank, seed=3, batch=BATCH):
    """Part of a global batch, drawn as the fit draws it."""

    def plan(step):
        epoch, position = divmod(step, -(-SHOTS // batch))
        order = np.random.default_rng([seed, epoch]).permutation(SHOTS)[position * batch : (position + 1) * batch]
        local = torch.from_numpy(order).split(split_evenly(len(order), world_size))[rank]
        return [(index, augmentation(seed, epoch, index)) for index in local.tolist()]

    return plan


def batches(shots, plan, steps=range(STEPS), **options):
    with Prefetcher(shots, plan, steps, whole, augment=CROP, **options) as ahead:
        return list(ahead)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]


@pytest.fixture(scope="module")
def alone(shots):
    return batches(shots, plan_of(1, 0), threads=1, ahead=1)


def test_load_is_the_transform_of_the_pictures(images, rows, shots):
    which = torch.tensor([4, 0, 4, 29])
    blobs = dict(images.read(rows))
    emoji = [Image.open(io.BytesIO(blobs[rows[i]])) for i in which]
    white = [Image.alpha_composite(Image.new("RGBA", e.size, "white"), e.convert("RGBA")).convert("RGB") for e in emoji]
    assert torch.equal(shots.load(which, whole), torch.stack([whole(picture) for picture in white]))
    seeds = [augmentation(0, 0, i) for i in which.tolist()]
    augmented = shots.load(which, whole, augment=CROP, seeds=seeds)
    assert augmented.shape == (4, 3, 16, 16)
    assert torch.equal(augmented[0], augmented[2])
    assert not torch.equal(augmented[0], shots.load(which[:1], whole, augment=CROP, seeds=[(0, 1, 4)])[0])


def test_no_pictures_have_the_shape_of_some(shots):
    none = torch.empty(0, dtype=torch.long)
    assert shots.load(none, whole).shape == (0, 3, 8, 8)
    assert shots.load(none, whole, augment=CROP, seeds=[]).shape == (0, 3, 16, 16)


def test_load_needs_seeds_to_augment(shots):
    with pytest.raises(ValueError, match="augment needs seeds"):
        shots.load(torch.tensor([0]), whole, augment=CROP)


def test_subsets(shots):
    keep = torch.tensor([5, 2, 5])
    part = shots.subset(keep)
    assert (len(shots), len(part)) == (SHOTS, 3)
    assert torch.equal(part.labels, shots.labels[keep])
    assert torch.equal(part.load(torch.tensor([2, 1]), whole), shots.load(torch.tensor([5, 2]), whole))
    few = shots.labels < shots.labels.median()
    assert torch.equal(shots.subset(few).to("cpu").positions, few.nonzero().flatten())
    with pytest.raises(ValueError, match="2 positions for 1 labels"):
        Pictures(shots.path, torch.arange(2), torch.zeros(1))


def test_a_worker_gets_no_pictures(shots):
    sent = pickle.dumps(shots)
    assert len(sent) < 4000
    assert torch.equal(pickle.loads(sent).load(torch.tensor([7]), whole), shots.load(torch.tensor([7]), whole))


def test_a_file_that_was_written_anew_is_read_anew(images, tmp_path):
    shots = Pictures(tmp_path / "p", torch.tensor([0]), torch.tensor([0]))
    seen = []
    for row in (3, 400):
        PictureFile.write(shots.path, images, [row])
        seen.append(shots.load(torch.tensor([0]), whole))
    assert not torch.equal(*seen)
    shots.path.unlink()
    with pytest.raises(DataError, match="is missing: run again"):
        shots.load(torch.tensor([0]), whole)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_together_see_the_pixels_of_one(shots, alone, world_size):
    parts = [batches(shots, plan_of(world_size, rank), threads=2) for rank in range(world_size)]
    for step in range(STEPS):
        assert torch.equal(torch.cat([part[step] for part in parts]), alone[step])


@pytest.mark.parametrize(("threads", "ahead"), [(1, 3), (4, 1), (3, 50)])
def test_threads_make_no_difference(shots, alone, threads, ahead):
    made = batches(shots, plan_of(1, 0), threads=threads, ahead=ahead)
    assert len(made) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(made, alone, strict=True))


def test_prefetched_is_loaded(shots, alone):
    for step in (0, STEPS - 1):
        which, seeds = zip(*plan_of(1, 0)(step), strict=True)
        assert torch.equal(shots.load(torch.tensor(which), whole, augment=CROP, seeds=seeds), alone[step])


def test_a_resumed_run_sees_what_is_left(shots, alone):
    rest = batches(shots, plan_of(1, 0), range(4, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(rest, alone[4:], strict=True))


def test_every_turn_has_its_own_crops(shots):
    first, second = (
        shots.load(torch.arange(5), whole, augment=CROP, seeds=[augmentation(0, turn, index) for index in range(5)])
        for turn in (0, 1)
    )
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({augmentation(s, t, i) for s in range(3) for t in range(3) for i in range(3)}) == 27


class Counted:
    """An augmentation that knows what it made, and what of that is still there."""

    def __init__(self):
        self.made = []

    def __call__(self, picture, generator):
        pixels = CROP(picture, generator)
        self.made.append(weakref.ref(pixels))
        return pixels

    @property
    def alive(self):
        gc.collect()
        return sum(pixels() is not None for pixels in self.made)


def wait_for(counted, count):
    deadline = time.monotonic() + 60
    while len(counted.made) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)  # for one too many to show


@pytest.fixture
def _little_to_collect():
    """What there was before a test is no garbage, and looking through it takes a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_little_to_collect")
@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_a_few_batches_are_made_ahead(shots, ahead):
    counted, size = Counted(), 5
    steps = range(SHOTS // size)
    with Prefetcher(
        shots, plan_of(1, 0, batch=size), steps, whole, augment=counted, threads=3, ahead=ahead
    ) as prefetcher:
        for used, _ in enumerate(prefetcher, start=1):
            made = min(used + ahead, len(steps)) * size
            wait_for(counted, made)
            assert len(counted.made) == made
            assert counted.alive <= made - used * size
    assert counted.alive == 0


@pytest.fixture
def broken(tmp_path):
    """20 pictures, the thirteenth of which cannot be decoded."""
    blobs = []
    for number in range(20):
        stream = io.BytesIO()
        Image.new("RGB", (9, 9), (number, 0, 0)).save(stream, "PNG")
        blobs.append(stream.getvalue())
    blobs[12] = b"not a picture"
    columns = {"image": pa.array(blobs, pa.binary()), "label": [0, 1] * 10, "class_name": ["a", "b"] * 10}
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    images = open_images(DataConfig(path=str(tmp_path / "set.parquet")))
    PictureFile.write(tmp_path / "p.arrow", images, range(20))
    return images, Pictures(tmp_path / "p.arrow", torch.arange(20), torch.zeros(20).long())


def fives(step):
    return [(index, ()) for index in range(5 * step, 5 * step + 5)]


@pytest.mark.parametrize("ahead", [1, 4])
def test_a_bad_picture_is_raised_where_its_batch_is_asked_for(broken, ahead):
    _, shots = broken
    seen = []
    with (
        pytest.raises(BadImage, match=r"set.parquet, row 12: the picture cannot be decoded"),
        Prefetcher(shots, fives, range(4), whole, ahead=ahead) as prefetcher,
    ):
        seen.extend(batch[:, 0, 0, 0].tolist() for batch in prefetcher)
    assert seen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert not threads()
    with pytest.raises(BadImage, match="row 12"):
        shots.load(torch.tensor([12]), whole)


def test_a_changed_byte_is_raised_with_its_place(broken):
    _, shots = broken
    data = bytearray(shots.path.read_bytes())
    data[data.index(shots.file.read(3)) + 20] ^= 1
    shots.path.unlink()
    shots.path.write_bytes(data)
    with (
        pytest.raises(DataError, match=r"picture 3 .set.parquet, row 3.: its bytes changed"),
        Prefetcher(shots, fives, range(2), whole) as prefetcher,
    ):
        next(prefetcher)


def test_what_a_transform_raises_is_given_a_place(broken):
    def refuse(_):
        raise MemoryError("too large")

    with pytest.raises(MemoryError) as caught, Prefetcher(broken[1], fives, range(2), refuse) as prefetcher:
        next(prefetcher)
    assert caught.value.__notes__[0] == "while preparing the picture of set.parquet, row 0"


def test_what_the_plan_raises_comes_after_the_steps_before_it(broken):
    def plan(step):
        if step == 2:
            raise DataError("no such step")
        return fives(step)

    prefetcher = Prefetcher(broken[1], plan, range(4), whole, ahead=4)
    assert len([next(prefetcher), next(prefetcher)]) == 2
    with pytest.raises(DataError, match="no such step"):
        next(prefetcher)
    assert not threads()


def test_closing_ends_threads_and_iteration(shots):
    with Prefetcher(shots, plan_of(1, 0), range(STEPS), whole, augment=CROP, threads=3, ahead=9) as prefetcher:
        next(prefetcher)
        assert threads()
    assert not threads()
    assert next(prefetcher, None) is None
    prefetcher.close()


def test_the_end_ends_the_threads(shots):
    prefetcher = Prefetcher(shots, plan_of(1, 0), range(2), whole, augment=CROP)
    assert len(list(prefetcher)) == 2
    assert not threads()


ABANDONED = """
    import sys
    from pathlib import Path
    import torch
    from kngd_ray.data import DataConfig, PictureFile, open_images
    from kngd_ray.training.decoding import Prefetcher, stream
    from kngd_ray.training.pictures import Pictures

    images = open_images(DataConfig())
    path = Path(sys.argv[1])
    PictureFile.write(path, images, range(40))
    shots = Pictures(path, torch.arange(40), torch.zeros(40).long())
    whole = lambda picture: torch.zeros(3, 8, 8)
    prefetcher = Prefetcher(shots, lambda step: [(i, ()) for i in range(40)], range(1000), whole, ahead=5)
    next(prefetcher)
    batches = stream(images, torch.arange(900).numpy(), whole, 50)
    next(batches)
    print("left")
"""


@pytest.mark.slow
def test_an_abandoned_iterator_keeps_no_process(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(ABANDONED), str(tmp_path / "p")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "left", "")


@pytest.mark.parametrize("options", [{"threads": 0}, {"ahead": 0}])
def test_options_out_of_range(shots, options):
    with pytest.raises(ValueError, match="both must be 1 or more"):
        Prefetcher(shots, plan_of(1, 0), range(1), whole, **options)


@pytest.mark.parametrize(("batch_size", "count"), [(7, 1), (7, 3), (100, 2)])
def test_streaming_passes_over_the_files_once(images, rows, shots, batch_size, count):
    seen = list(stream(images, rows, whole, batch_size, count))
    assert [len(part) for part, _ in seen] == [len(pixels) for _, pixels in seen]
    found = np.concatenate([part for part, _ in seen])
    assert found.tolist() == sorted(rows.tolist())
    expected = shots.load(torch.from_numpy(np.argsort(rows)), whole)
    assert torch.equal(torch.cat([pixels for _, pixels in seen]), expected)
    assert not threads()


def test_a_stream_is_left_early_and_meets_bad_pictures(broken):
    images, _ = broken
    batches = stream(images, np.arange(20), whole, 5)
    next(batches)
    batches.close()
    assert not threads()
    seen = []
    with pytest.raises(BadImage, match="row 12"):
        seen.extend(rows.tolist() for rows, _ in stream(images, np.arange(20), whole, 5))
    assert len(seen) == 2
    assert list(stream(images, np.empty(0, np.int64), whole)) == []
