"""What test_processes.py starts with `accelerate launch`: tiny trainings, features of pictures, failures.

    two_processes.py cases FOLDER     writes what each process has found to FOLDER/INDEX.json
    two_processes.py train FOLDER     a training that may be killed; writes FOLDER/weights.pt
    two_processes.py fail FOLDER HOW  a process that fails"""
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from egmi import training
from egmi.base import processes as starting
from egmi.base.fitting import FitConfig
from egmi.base.memory import MemoryBudget
from egmi.base.processes import one_line_errors, start_processes
from egmi.frozen.features import picture_features
from egmi.frozen.imagebind import ImageBind, ImageBindConfig
from egmi.frozen.pandagpt import PandaGPT
from egmi.frozen.prefix import run_tail
from egmi.losses import LossWeights
from egmi.mapper import Conditions, MapperConfig
from egmi.training import (
    ComputedPrefixes, drop_modalities, keep_prefixes, make_conditioner, train_conditioners)

SYSTEMS = ['EGMI mapper', 'Cross mapper']
SIZE = MapperConfig(
    d_llm=32, d_model=32, n_heads=4, n_encoder_layers=1, n_decoder_layers=1, d_ff=64,
    n_queries=5, d_clip=6, d_clap=7)
LLAMA = dict(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4)


class Bytes:
    "A tokenizer of bytes."
    bos_token_id = 0

    def __call__(self, texts, add_special_tokens=False):
        return SimpleNamespace(input_ids=[[1 + byte for byte in text.encode()] for text in texts])


class Killed(Exception):
    "What ends a training too early."


class Slow:
    "Targets that take their time, and end the training after some reads."
    def __init__(self, targets, seconds=0., reads=10**9):
        self.targets = targets
        self.seconds = seconds
        self.left = reads

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, rows):
        time.sleep(self.seconds)
        self.left -= 1
        if self.left < 0:
            raise Killed
        return self.targets[rows]


def make_panda():
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval().requires_grad_(False)
    return PandaGPT(llm, Bytes(), d_imagebind=8)


def make_targets():
    generator = torch.Generator().manual_seed(1)
    image_NLC = torch.randn(16, 5, 6, generator=generator)
    audio_NC = torch.randn(16, 7, generator=generator)
    return Conditions(image_NLC, F.normalize(audio_NC, dim=-1))


def make_prefixes(panda, kept):
    features_ND = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    prompts = drop_modalities([f'{n} bells' * (1 + n % 3) for n in range(16)], features_ND)
    if kept:
        return keep_prefixes(panda, prompts, MemoryBudget(gibibytes=1), progress=False)
    return ComputedPrefixes(panda, prompts)


def train(processes, kept=True, targets=None, weights=None, checkpoints=None, **config):
    "Losses and weights of two systems."
    panda = make_panda()
    conditioners = {system: make_conditioner(system, panda, SIZE) for system in SYSTEMS}
    if targets is None:
        targets = make_targets()
    config = FitConfig(**dict(steps=20, batch_size=8, lr=1e-2, warmup_steps=5, save_every=5) | config)
    losses = train_conditioners(
        conditioners, panda, make_prefixes(panda, kept), targets, config, weights, checkpoints,
        processes=processes)
    return losses, {system: conditioner.state_dict() for system, conditioner in conditioners.items()}


def train_with_little_memory(processes):
    "The last process has memory for the rows of one system."
    n_rows = len(processes.share(range(8)))

    def small_tail(llm, cache, tokens_RnD):
        if processes.index == processes.count - 1 and len(tokens_RnD) > n_rows:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return run_tail(llm, cache, tokens_RnD)

    with mock.patch.object(training, 'run_tail', small_tail):
        return train(processes)[0]


def stop_early(processes, folder):
    "Checkpoints of ten steps of twenty."
    folder.mkdir(parents=True, exist_ok=True)
    try:
        train(processes, targets=Slow(make_targets(), reads=14), checkpoints=folder)
    except Killed:
        return
    raise AssertionError('the training was not stopped')


@dataclass(frozen=True)
class Picture:
    "A picture that is drawn when it is opened."
    number:int

    def identity(self):
        return str(self.number)


@dataclass(frozen=True)
class Example:
    image_file:Picture

    @property
    def image(self):
        number = self.image_file.number
        if number == 13:
            raise ValueError('picture 13 cannot be read: replace it or leave it out')
        return Image.new('RGB', (40, 30), (number * 7 % 256, number * 31 % 256, 90))


def extract(processes, folder, n=11):
    "Features of pictures, three in a file."
    torch.manual_seed(0)
    encoder = ImageBind(ImageBindConfig.mini()).eval().requires_grad_(False)
    panda = SimpleNamespace(encoder=encoder, llm=SimpleNamespace(device=torch.device('cpu')))
    examples = [Example(Picture(number)) for number in range(n)]
    found = picture_features(
        panda, examples, folder, progress=False, pictures_a_file=3, processes=processes)
    return found[:]


def run_cases(processes, folder):
    "What must be the same for any number of processes."
    cases = dict(
        kept=train(processes)[0],
        computed=train(processes, kept=False)[0],
        uneven=train(processes, batch_size=5)[0],
        small=train(processes, batch_size=2)[0],
        memory=train_with_little_memory(processes))
    if (folder/'begun alone').exists():
        cases['continued'] = train(processes, checkpoints=folder/'begun alone')[0]
    stop_early(processes, folder/'begun by all')
    time.sleep(processes.index)  # the second one comes when the first could have begun
    cases['features'] = extract(processes, folder/'features').tolist()
    cases['processes'] = processes.count
    cases['written'] = [path.stem for path in (folder/'features').iterdir()]
    return cases


def fail(processes, folder, how):
    "Fail in one process or in all, while the others wait, work or compute."
    if how == 'picture':
        extract(processes, folder/'features', n=14)
    if how == 'batch':
        train(processes, batch_size=1)
    if how == 'nan':
        targets = make_targets()
        targets.audio[3, 0] = torch.nan
        train(processes, targets=targets, weights=LossWeights())
    if how == 'disk':
        (folder/'checkpoints').write_text('no folder')
        train(processes, checkpoints=folder/'checkpoints')
    if how == 'killed' and processes.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == 'killed late':
        time.sleep(1 if processes.index else 600)
        os.kill(os.getpid(), signal.SIGKILL)
    processes.wait()


def main():
    mode, folder, *how = sys.argv[1:]
    folder = Path(folder)
    starting.TO_START = 5
    processes = start_processes('cpu')
    with one_line_errors(processes, folder):
        if mode == 'cases':
            found = run_cases(processes, folder)
            (folder/f'{processes.index}.json').write_text(json.dumps(found))
        if mode == 'train':
            (folder/f'{processes.index}.pid').write_text(f'{os.getpid()}')
            targets = Slow(make_targets(), seconds=.01)
            losses, weights = train(processes, targets=targets, checkpoints=folder, steps=200)
            if processes.is_main:
                torch.save(dict(losses=losses, weights=weights), folder/'weights.pt')
        if mode == 'fail':
            fail(processes, folder, *how)


if __name__ == '__main__':
    main()
