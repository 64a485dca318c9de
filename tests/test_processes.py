"""Two processes under `accelerate launch` give what one gives; when one is lost, all stop and say so once."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils.other import get_free_port

from egmi.base.processes import ALONE
from two_processes import run_cases, stop_early, train

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name('two_processes.py')
LOST = 'a process of this run was lost'


def environment(**variables):
    return os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1') | variables


def start(*arguments, port=None):
    "`accelerate launch` of the script, running."
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
               '--main_process_port', str(port or get_free_port()), SCRIPT, *arguments]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)


def finish(process, timeout=120):
    "Exit status, and the lines on stderr that are ours."
    try:
        _, said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, [line for line in said.splitlines() if line.startswith('egmi')]


def launch(*arguments, **options):
    return finish(start(*arguments, **options))


def assert_same_losses(found, expected):
    assert list(found) == list(expected)
    for system in expected:
        np.testing.assert_allclose(found[system], expected[system], rtol=0, atol=1e-5)


# Two give what one gives

def test_two_processes_equal_one(tmp_path):
    folder, folder_alone = tmp_path/'two', tmp_path/'one'
    stop_early(ALONE, folder/'begun alone')
    with pytest.warns(UserWarning, match='out of memory'):
        alone = run_cases(ALONE, folder_alone)
    assert launch('cases', folder) == (0, [])
    each = [json.loads((folder/f'{index}.json').read_text()) for index in range(2)]
    assert each[0] == each[1]
    found = each[0]
    assert (found['processes'], alone['processes']) == (2, 1)
    for case in ('kept', 'computed', 'uneven', 'small', 'memory'):
        assert_same_losses(found[case], alone[case])
    assert_same_losses(found['continued'], alone['kept'])
    continued, _ = train(ALONE, checkpoints=folder/'begun by all')
    assert_same_losses(continued, alone['kept'])
    assert found['features'] == alone['features']
    assert len(found['written']) == 4 and set(found['written']) == set(alone['written'])


# Killed at random

def wait_for(paths, process):
    while not all(path.exists() for path in paths):
        assert process.poll() is None
        time.sleep(.01)


def kill_one(folder, process, generator):
    "Kill one of the two while they train."
    pids = [folder/f'{index}.pid' for index in range(2)]
    wait_for(pids, process)
    time.sleep(generator.uniform(0, 1))
    os.kill(int(generator.choice(pids).read_text()), signal.SIGKILL)
    status, lines = finish(process)
    assert status != 0 and len(lines) == 1 and LOST in lines[0]
    for path in pids:
        path.unlink()


def test_killed_ten_times_the_weights_are_the_same(tmp_path):
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    for folder in (whole, killed):
        folder.mkdir()
    assert launch('train', whole) == (0, [])
    generator = random.Random(0)
    for _ in range(10):
        kill_one(killed, start('train', killed), generator)
        assert not (killed/'weights.pt').exists()
    assert launch('train', killed) == (0, [])
    expected, found = (torch.load(folder/'weights.pt') for folder in (whole, killed))
    assert found['losses'] == expected['losses']
    for system, weights in expected['weights'].items():
        for name, weight in weights.items():
            assert torch.equal(found['weights'][system][name], weight), (system, name)


# Failures

@pytest.mark.parametrize('how, line', [
    ('picture', 'picture 13 cannot be read: replace it or leave it out'),
    ('batch', 'a batch of 1 rows is too small for 2 processes'),
    ('nan', 'EGMI mapper: the loss of step 0 is nan; lower lr (now 0.01); Cross mapper: the loss'),
    ('disk', 'checkpoints'),
    ('killed', LOST),
    ('killed late', LOST),
])
def test_a_failure_is_one_line_and_the_end_of_all(how, line, tmp_path):
    status, lines = launch('fail', tmp_path, how)
    assert status != 0 and len(lines) == 1 and line in lines[0], lines


def start_by_hand(rank, port, folder):
    "One of two processes, without a launcher."
    variables = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2,
                     MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    variables = {name: str(value) for name, value in variables.items()}
    command = [sys.executable, SCRIPT, 'fail', folder, 'nothing']
    return subprocess.Popen(command, env=environment(**variables), stderr=subprocess.PIPE, text=True)


def test_a_port_in_use(tmp_path):
    with socket.socket() as other:
        other.bind(('', 0))
        other.listen()
        port = other.getsockname()[1]
        status, lines = finish(start_by_hand(0, port, tmp_path))
        assert status == 1 and len(lines) == 1 and f'port {port} is in use' in lines[0]
        assert launch('fail', tmp_path, 'nothing', port=port) == (0, [])  # accelerate takes another


@pytest.mark.parametrize('rank', [0, 1])
def test_a_process_that_nobody_joins(rank, tmp_path):
    port = get_free_port()
    status, lines = finish(start_by_hand(rank, port, tmp_path))
    assert status == 1 and len(lines) == 1
    assert f'the 2 processes do not meet at 127.0.0.1:{port}' in lines[0]


def test_processes_that_were_started_by_hand(tmp_path):
    port = get_free_port()
    both = [start_by_hand(rank, port, tmp_path) for rank in range(2)]
    assert [finish(process) for process in both] == [(0, [])] * 2
