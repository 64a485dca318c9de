"""Training with a corpus of any size: memory that does not grow, whatever is kept."""
import subprocess
import sys

import pytest

from conftest import environment

from egmi.small.random_weights import TINY, weight_variables, write_weights

# Trains a few steps with N captions and pictures; prints how much memory that took beside the captions.
TRAIN = '''
import resource, sys
import numpy as np, psutil, torch
from egmi.base.fitting import FitConfig
from egmi.base.memory import MemoryBudget
from egmi.losses import LossWeights
from egmi.model import load_generators, load_panda, mapper_config
from egmi.small.random_weights import TINY, random_preset
from egmi.training import drop_modalities, keep_prefixes, keep_targets, make_conditioner, train_conditioners

n, folder = int(sys.argv[1]), sys.argv[2]
preset = random_preset(TINY)
panda = load_panda(preset)
generators = load_generators(preset)
width = panda.projection.in_features
np.lib.format.open_memmap(f'{folder}/{n}.npy', 'w+', np.float16, (n, width))[:] = 1
features = torch.from_numpy(np.load(f'{folder}/{n}.npy', mmap_mode='r+'))

def train(captions):
    budget = MemoryBudget(gibibytes=.001)
    prompts = drop_modalities(captions, features[:len(captions)])
    prefixes = keep_prefixes(panda, prompts, budget, batch_size=4, progress=False)
    targets = keep_targets(*generators, captions, budget)
    conditioner = make_conditioner('EGMI mapper', panda, mapper_config(preset, panda, *generators))
    config = FitConfig(steps=12, batch_size=4)
    train_conditioners(dict(egmi=conditioner), panda, prefixes, targets, config, LossWeights())
    return type(prefixes).__name__, type(targets).__name__

captions = [f'{i} bells in the rain' for i in range(n)]
kept = train(captions[:100]) # what libraries load at first use
before = psutil.Process().memory_info().rss
kept = train(captions)
growth = psutil.Process().memory_info().rss - before
print(*kept, growth // 2**20)
'''


@pytest.mark.slow
def test_memory_is_flat_from_1600_pairs_to_all_of_coco(tmp_path):
    write_weights(TINY, tmp_path/'weights')
    variables = environment(tmp_path/'cache') | weight_variables(tmp_path/'weights')
    growth = {}
    for n in (1_600, 591_753):
        command = [sys.executable, '-c', TRAIN, str(n), str(tmp_path)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        *kept, mebibytes = done.stdout.splitlines()[-1].split()
        assert kept == (['ComputedPrefixes', 'ComputedTargets'] if n > 1_600 else kept)
        growth[n] = int(mebibytes)
    assert growth[591_753] - growth[1_600] < 60, growth  # 100 bytes a caption; a kept prefix takes 9 KiB
