"""Samples on disk: several processes make the files of one, and memory does not grow with their number.

As a script, which `accelerate launch` starts: `test_samples.py FOLDER` makes samples and scores them."""
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from accelerate.utils.other import get_free_port

from egmi.base.config import get_preset
from egmi.base.processes import ALONE, Processes, start_processes
from egmi.evaluation.checks import bytes_written
from egmi.evaluation.outputs import load_networks, network_sources, run_on_arrays
from egmi.evaluation.samples import generate_samples
from egmi.evaluation.scoring import run_on_samples, score_references, score_samples
from egmi.mapper import Conditions
from egmi.model import load_generators
from egmi.toybox.scenes import toybox
from egmi.training import text_targets

PICTURE = (64, 64, 3)
LENGTH = 8000  # of a sound


# Parts, with generators that only draw noise

class Noise:
    "In the place of a generator: the noise of each row plus its condition, and notes on what is asked of it."
    def __init__(self, shape):
        self.shape = shape
        self.vocoder = SimpleNamespace(config=SimpleNamespace(sampling_rate=16_000))
        self.sizes = []

    def draw(self, condition, generator):
        self.sizes.append(len(condition))
        drawn = [torch.rand(self.shape, generator=g).numpy() for g in generator]
        return np.stack(drawn) + condition.numpy().reshape(len(condition), *[1] * len(self.shape))


class Painter(Noise):
    def generate(self, condition, generator, **options):
        return [Image.fromarray((99 * x).astype(np.uint8)) for x in self.draw(condition, generator)]


class Player(Noise):
    def generate(self, condition, generator, **options):
        return self.draw(condition, generator=generator).astype(np.float32)


def sample(path, n=7, part_size=2, processes=ALONE):
    "Samples of n rows, and the two generators that made them."
    condition = torch.arange(n) % 8 / 8
    painter, player = Painter(PICTURE), Player((LENGTH,))
    made = generate_samples(
        Conditions(condition, condition), painter, player, path, part_size=part_size, processes=processes)
    return made, painter, player


@dataclass(frozen=True)
class Threads(Processes):
    "Threads in the place of processes."
    barrier: threading.Barrier = None

    def wait(self):
        self.barrier.wait(timeout=20)


def in_threads(count, work):
    "What `work` returns in each of several threads."
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda i: work(Threads(i, count, barrier=barrier)), range(count)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('count', [2, 3, 5])
def test_processes_write_the_files_of_one(count, tmp_path):
    for name in ('alone', 'together'):
        (tmp_path/name).mkdir()
    alone, *_ = sample(tmp_path/'alone/x')
    each = in_threads(count, lambda processes: sample(tmp_path/'together/x', processes=processes))
    assert len(contents(tmp_path/'alone')) == 8
    assert contents(tmp_path/'together') == contents(tmp_path/'alone')
    for which in (1, 2):
        sizes = [made[which].sizes for made in each]
        assert sorted(sum(sizes, [])) == [1, 2, 2, 2]  # every part once
        assert max(map(len, sizes)) - min(map(len, sizes)) <= 1
    for made, *_ in each:
        assert np.array_equal(made.images[:], alone.images[:])
        assert np.array_equal(made.audio[:], alone.audio[:])


def test_rows_are_those_of_the_formula(tmp_path):
    made, *_ = sample(tmp_path/'x')
    for i in range(7):
        noise = torch.rand(LENGTH, generator=torch.Generator().manual_seed(i)).numpy()
        assert np.array_equal(made.audio[i], noise + np.float32(i / 8))
    assert made.images.files[0].stat().st_size == 2 * np.prod(PICTURE) + 128


def test_only_what_is_damaged_is_made_again(tmp_path):
    made, *_ = sample(tmp_path/'x')
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cut, lost = tmp_path/'x-2-4-images.npy', tmp_path/'x-6-7-images.npy'
    cut.write_bytes(before[cut.name][:-1])
    lost.unlink()
    with pytest.warns(UserWarning, match='x-2-4-images.npy is damaged'):
        each = in_threads(2, lambda processes: sample(tmp_path/'x', processes=processes))
    assert [made[1].sizes for made in each] == [[2], [1]]
    assert [made[2].sizes for made in each] == [[], []]
    assert contents(tmp_path) == before
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {cut, lost}


def peak_memory(folder, n):
    "Bytes at most while n rows are made, and read one after another; and files left open."
    folder.mkdir()
    process = psutil.Process()
    n_open = process.num_fds()
    tracemalloc.start()
    try:
        made, *_ = sample(folder/'x', n, part_size=20)
        assert sum(int(image.any()) for image in made.images) == n
        assert sum(int(wave.any()) for wave in made.audio) == n
        return tracemalloc.get_traced_memory()[1], process.num_fds() - n_open
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows(tmp_path):
    peak_memory(tmp_path/'warm', 20)
    few, _ = peak_memory(tmp_path/'few', 40)
    many, left_open = peak_memory(tmp_path/'many', 400)
    more = 360 * (np.prod(PICTURE) + 4 * LENGTH)  # bytes
    assert many - few < more / 50
    assert left_open == 0


# Generators and networks of mini

def sample_and_score(folder, processes):
    "Columns of seven captions of Toybox; four parts of samples and of outputs."
    preset, examples = get_preset('mini'), toybox('test', 7)
    generators = load_generators(preset)
    conditions = text_targets(*generators, [e.caption for e in examples])
    made = generate_samples(
        conditions, *generators, folder/'x', steps=2, batch_size=2, part_size=2, progress=False,
        processes=processes)
    with mock.patch('egmi.evaluation.scoring.PART_SIZE', 2):
        outputs = run_on_samples(made, network_sources(preset), processes=processes)
    references = score_references(load_networks(preset), examples)
    columns = score_samples(outputs, references)
    return {column: np.asarray(values).tolist() for column, values in columns.items()}


def run_script(folder, *launcher):
    "What each process of this file finds, with one thread: two threads sum in another order."
    folder.mkdir()
    command = [sys.executable, *launcher, __file__, folder]
    subprocess.run(command, check=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1'))
    return [json.loads(path.read_text()) for path in sorted(folder.glob('[0-9].json'))]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    alone, together = tmp_path/'alone', tmp_path/'together'
    launcher = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
                '--main_process_port', str(get_free_port())]
    (expected,) = run_script(alone)
    assert expected['count'] == 1
    assert run_script(together, *launcher) == [expected | dict(count=2)] * 2
    written = contents(together)
    assert len(written) == 2 + 2 * 4 + 4 * 4  # samples, and four networks
    samples = {name: data for name, data in contents(alone).items() if 'json' not in name}
    assert {name: data for name, data in written.items() if 'json' not in name} == samples
    estimate = bytes_written(get_preset('mini'), pictures=7, sounds=7)
    assert .7 * estimate < sum(map(len, samples.values())) <= estimate


@pytest.mark.slow
def test_outputs_are_those_of_arrays_and_are_made_again_where_damaged(tmp_path):
    preset = get_preset('mini')
    sources = {'judge': network_sources(preset)['judge']}
    made, *_ = sample(tmp_path/'x', n=5, part_size=5)
    with mock.patch('egmi.evaluation.scoring.PART_SIZE', 2):
        outputs = run_on_samples(made, sources)['judge']
        before = contents(tmp_path)
        file, = tmp_path.glob('x-2-4-judge-*.npz')
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.warns(UserWarning, match='is damaged'):
            run_on_samples(made, sources)
    assert contents(tmp_path) == before
    judge = load_networks(preset)['judge']
    parts = [run_on_arrays('judge', judge, made.audio[rows], 16_000)
             for rows in (slice(0, 2), slice(2, 4), slice(4, 5))]
    for part, values in outputs.items():
        assert np.array_equal(values, np.concatenate([arrays[part] for arrays in parts])), part


if __name__ == '__main__':
    us = start_processes('cpu')
    out = Path(sys.argv[1])
    record = dict(count=us.count, columns=sample_and_score(out, us))
    (out/f'{us.index}.json').write_text(json.dumps(record))
    us.end()
