"""Rehearse the three tables of preset paper with random weights, as many as fit into a time limit.

Each table is one papermill command, as a user gives it. What its stages took is printed, beside what the real
run would take, and goes to OUT/rehearsal-table3.json (and 1, 2), also of a table that the limit has cut off.
The first table writes the weights for all.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from egmi.base.config import get_preset
from egmi.base.files import write_json
from egmi.evaluation.costs import estimate_table
from egmi.evaluation.experiment import provenance

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {'3': 'ablation', '1': 'text_to_audio', '2': 'audio_editing'}
RECORDED = (
    'config', 'seconds', 'memory', 'peak_memory_gib', 'code', 'libraries', 'python', 'system', 'hardware',
    'date')


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--tables', default='3 1 2', help='in this order')
    parser.add_argument('--limit', type=float, default=1200, help='seconds for all of them')
    parser.add_argument('--weights', default='random', help='random (of published sizes) or tiny')
    parser.add_argument('--gpu-gib', type=float, help='of a smaller GPU, to find out whether it is enough')
    parser.add_argument('--out', type=Path, default=Path('runs/gpu'), help='folder of the records')
    parser.add_argument('parameters', nargs='*', help='of the notebooks, as NAME=VALUE')
    arguments = parser.parse_args()
    arguments.tables = arguments.tables.split()
    unknown = [table for table in arguments.tables if table not in NOTEBOOKS]
    if unknown or not arguments.tables:
        parser.error(f'--tables takes some of 1, 2 and 3, not {" ".join(unknown) or "nothing"}')
    if not arguments.limit > 0:
        parser.error(f'--limit must be positive, not {arguments.limit:g}')
    return arguments


def smaller_gpu(gib):
    "Variables with which PyTorch takes no more than this of the GPU."
    if gib is None:
        return {}
    import torch
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    if gib > total:
        raise SystemExit(f'--gpu-gib {gib:g}: this GPU has {total:.1f} GiB')
    return dict(PYTORCH_CUDA_ALLOC_CONF=f'per_process_memory_fraction:{gib / total:.4f}')


def command(table, arguments, folder):
    "The papermill command of a table; results and the executed notebook go to `folder`."
    notebook = ROOT/f'nbs/{NOTEBOOKS[table]}.ipynb'
    line = [sys.executable, '-m', 'papermill', notebook, folder/'executed.ipynb', '--no-progress-bar',
            '-p', 'preset', 'paper', '-p', 'weights', arguments.weights, '-p', 'out_dir', folder/'out']
    for parameter in arguments.parameters:
        line += ['-p', *parameter.split('=', 1)]
    return list(map(str, line))


def end(process):
    "Have papermill end its kernel, which ends by itself if papermill is killed."
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(line, environment, seconds):
    "Run a command; the last line of its errors, empty if it went well."
    process = subprocess.Popen(
        line, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f'stopped after {seconds:.0f} s'
    finally: # also of Ctrl-C
        if process.poll() is None:
            end(process)
    if process.returncode == 0:
        return ''
    print(errors[-3000:], file=sys.stderr)
    lines = [text for text in errors.splitlines() if text.strip()]
    return lines[-1] if lines else f'exit code {process.returncode}'


def read_record(out, arguments):
    "What a run has written: all of run.json that is not a result, or the stages so far."
    if (out/'run.json').exists():
        record = json.loads((out/'run.json').read_text())
        record['config'].pop('out_dir') # a temporary folder
        return {name: record[name] for name in RECORDED}
    record = provenance(dict(weights=arguments.weights), [], {})
    if (out/'stages.json').exists():
        record |= json.loads((out/'stages.json').read_text())
    return record


def rehearse(table, arguments, environment, left):
    "Run a table within the seconds that are left, and write its record."
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        error = 'skipped: no time was left'
        if left > 0:
            error = run(command(table, arguments, folder), environment, left)
        record = read_record(folder/'out', arguments)
    seconds = round(time.monotonic() - start, 1)
    result = dict(table=int(table), finished=not error, error=error, total_seconds=seconds)
    real = estimate_table(get_preset('paper'), int(table))
    result |= dict(real_run=dict(title=real.title, rows=real.rows, notes=real.notes))
    write_json(arguments.out/f'rehearsal-table{table}.json', result | record)
    stages = pd.DataFrame(record.get('memory', {})).T.assign(seconds=pd.Series(record['seconds']))
    print(stages.round(2).to_string())
    print(f'The real run: {real}')
    print(f'table {table}: {seconds:.0f} s' + (f', {error}' if error else ''), flush=True)
    return not error


def main():
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    environment = os.environ | smaller_gpu(arguments.gpu_gib)
    finished = []
    for table in arguments.tables:
        left = arguments.limit - (time.monotonic() - start)
        finished.append(rehearse(table, arguments, environment, left))
    sys.exit(0 if all(finished) else 1)


if __name__ == '__main__':
    main()
