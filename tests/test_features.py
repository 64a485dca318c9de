"""Features of pictures on disk: killed runs, lost workers, full disks, changed corpora, flat memory."""
import errno
import gc
import multiprocessing
import os
import shutil
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from egmi.data.hub import load_huggingface
from egmi.frozen import features
from egmi.frozen.features import picture_features

WIDTH = 64


class Encoder(torch.nn.Module):
    "The mean colour of a picture, in the first three of 64 numbers."
    config = SimpleNamespace(image_size=8, embed_dim=WIDTH)

    def __init__(self, most=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.most = most # pictures at once for which there is memory
        self.asked = []

    def encode_image(self, x_B3HW):
        self.asked.append(len(x_B3HW))
        if self.most and len(x_B3HW) > self.most:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.')
        features_BD = torch.zeros(len(x_B3HW), WIDTH)
        features_BD[:, :3] = x_B3HW.mean((2, 3)) + self.weight
        return features_BD


@dataclass(frozen=True)
class Colour:
    "A file of one colour that is drawn when it is opened; a number may be deadly for a process."
    number:int
    deadly:tuple = ()

    def identity(self):
        return str(self.number)

    def draw(self):
        if self.number in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new('RGB', (8, 8), colour_of(self.number))


@dataclass(frozen=True)
class Example:
    image_file:Colour

    @property
    def image(self):
        return self.image_file.draw()


def colour_of(number):
    return number % 256, number // 256 % 256, 7


def expected_row(number):
    "The feature by its definition."
    rgb = np.array(colour_of(number)) / 255
    row = np.zeros(WIDTH)
    row[:3] = (rgb - (.48145466, .4578275, .40821073)) / (.26862954, .26130258, .27577711)
    return row


def examples_of(numbers, deadly=()):
    return [Example(Colour(number, deadly)) for number in numbers]


def extract(examples, folder, encoder=None, **options):
    panda = SimpleNamespace(encoder=encoder or Encoder(), llm=SimpleNamespace(device=torch.device('cpu')))
    options = dict(pictures_a_file=4, batch_size=3, progress=False) | options
    return picture_features(panda, examples, folder, **options)


def check(found, numbers):
    expected_ND = np.stack([expected_row(number) for number in numbers])
    np.testing.assert_allclose(found[:].numpy(), expected_ND, atol=2e-3)


def test_a_killed_run_goes_on(tmp_path):
    numbers = range(10)
    deadly = examples_of(numbers, deadly=(6,))
    process = multiprocessing.get_context('fork').Process(target=extract, args=(deadly, tmp_path))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob('*.npy'))) == 1
    encoder = Encoder()
    check(extract(examples_of(numbers), tmp_path, encoder), numbers)
    assert encoder.asked == [3, 1, 2]  # pictures 4 to 9


def test_a_lost_worker_is_one_line_and_nothing_is_lost(tmp_path):
    deadly = examples_of(range(60), deadly=(50,))
    line = (rf'^a process that decodes pictures was lost, perhaps as memory ended \(.*\): start again with '
            rf'workers=0, not 1; what is in {tmp_path} is kept$')
    with pytest.raises(RuntimeError, match=line):
        extract(deadly, tmp_path, workers=1)
    n_kept = len(list(tmp_path.iterdir()))
    assert n_kept > 5
    encoder = Encoder()
    check(extract(examples_of(range(60)), tmp_path, encoder, workers=1), range(60))
    assert sum(encoder.asked) == 60 - 4 * n_kept


def test_a_disk_that_fills_up_is_one_line_and_what_is_written_stays(tmp_path, monkeypatch):
    saved = []

    def save(file, rows):
        if saved:
            file.write(b'half')
            raise OSError(errno.ENOSPC, 'No space left on device')
        saved.append(rows)
        np.lib.format.write_array(file, rows)

    monkeypatch.setattr(features.np, 'save', save)
    with pytest.raises(OSError, match=rf'^the features cannot be written to {tmp_path} \(.*No space left'):
        extract(examples_of(range(10)), tmp_path)
    monkeypatch.undo()
    file, = tmp_path.iterdir()
    encoder = Encoder()
    check(extract(examples_of(range(10)), tmp_path, encoder), range(10))
    assert sum(encoder.asked) == 6


def test_a_disk_that_is_too_small_is_seen_before_any_work(tmp_path):
    encoder = Encoder()
    with mock.patch.object(shutil, 'disk_usage', return_value=mock.Mock(free=1000)):
        with pytest.raises(OSError, match='and the features take'):
            extract(examples_of(range(10)), tmp_path, encoder)
    assert not encoder.asked


@pytest.mark.parametrize('workers', [0, 2])
def test_every_example_has_its_own_picture(workers, tmp_path):
    numbers = [5, 300, 5, 5, 2, 77_000, 300, 9, 8, 7]
    encoder = Encoder()
    check(extract(examples_of(numbers), tmp_path, encoder, workers=workers), numbers)
    assert encoder.asked == [3, 1, 3]  # 7 pictures, 4 in a file


def test_a_corpus_that_changed_between_two_starts(tmp_path):
    numbers = list(range(12))
    check(extract(examples_of(numbers), tmp_path), numbers)
    for changed, made in (numbers[:8], 0), (numbers[:11], 3), ([*numbers, 12], 1), (numbers[1:], 11), (
            numbers[::-1], 12):
        encoder = Encoder()
        check(extract(examples_of(changed), tmp_path, encoder), changed)
        assert sum(encoder.asked) == made


def test_another_encoder_takes_no_file_of_the_first(tmp_path):
    other = Encoder()
    other.weight.data += .5
    first = extract(examples_of(range(5)), tmp_path)[:]
    second = extract(examples_of(range(5)), tmp_path, other)[:]
    np.testing.assert_allclose(second[:, :3] - first[:, :3], .5, atol=2e-3)


def test_batches_stay_halved(tmp_path):
    encoder = Encoder(most=2)
    with pytest.warns(UserWarning) as said:
        check(extract(examples_of(range(8)), tmp_path, encoder, batch_size=4), range(8))
    assert [str(w.message) for w in said] == ['pictures: out of memory with 4 at once, going on with 2']
    assert encoder.asked == [4, 2, 2, 2, 2]


def test_features_that_are_no_numbers_are_refused(tmp_path):
    encoder = Encoder()
    encoder.weight.data += 1e6  # more than float16 holds
    with pytest.raises(FloatingPointError, match='no finite numbers: take bfloat16 or float32'):
        extract(examples_of(range(3)), tmp_path, encoder)
    assert not list(tmp_path.iterdir())


def test_captions_of_a_row_of_a_dataset_share_its_picture(tmp_path):
    pictures = [examples_of([number])[0].image for number in (3, 4, 5)]
    captions = [['a bell', 'one bell'], ['a drum'], ['two bells', 'bells', 'they ring']]
    data = datasets.Dataset.from_dict(dict(caption=captions, image=pictures))
    for rows, made in (3, 3), (3, 0), (2, 2):
        examples = load_huggingface(data.select(range(rows)), 'toys', image='image')
        encoder = Encoder()
        check(extract(examples, tmp_path, encoder), [3, 3, 4, 5, 5, 5][:len(examples)])
        assert sum(encoder.asked) == made


def memory():
    "Bytes of this process that are not of mapped files."
    gc.collect()
    info = psutil.Process().memory_info()
    return info.rss - info.shared


def growth(n, folder):
    "Bytes that features of n examples, five a picture, take while all of them are read."
    examples = examples_of(np.repeat(np.arange(n // 5), 5).tolist())
    before = memory()
    found = extract(examples, folder, batch_size=64, pictures_a_file=1024)
    for start in range(0, n, 64):
        assert found[start:start + 64].shape[1] == WIDTH
    return memory() - before


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='tells mapped memory apart on Linux only')
def test_memory_is_flat(tmp_path):
    growth(2000, tmp_path/'warm')
    small = growth(2000, tmp_path/'small')
    large = growth(60_000, tmp_path/'large')
    print(f'{small:,} and {large:,} bytes')
    assert (large - small) / 58_000 < 100
