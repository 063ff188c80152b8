"""The command line of training: what it refuses, what it plans, one process and two, a stop that is told, and a folder of one's own images."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowbook.configs import CONFIGS, find_config
from flowbook.scripts import train as script
from flowbook.scripts.train import STOPPED, UNPLANNED, configured, main, parser, status_of, write_status

SMALL = 'flow.blocks=2 flow.layers=1 system.amp=off'.split()


def asked(line): return configured(parser().parse_intermixed_args(line.split()))


def losses(folder): return [l['loss'] for l in map(json.loads, (Path(folder)/'log.jsonl').read_text().splitlines()) if 'loss' in l]


def command(*line, torchrun=0, **kw):
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(torchrun)] if torchrun else []
    return subprocess.run([sys.executable, *launcher, '-m', 'flowbook.scripts.train', *line, '--device', 'cpu'], capture_output=True, text=True, **kw)


# --- the configuration

def test_a_configuration_and_what_is_changed():
    c = asked('--config digits-tarflow-64 optim.lr=1e-3 --seed 5 system.amp=off --workers 2 noise.sigma=0.3')
    assert (c.optim.lr, c.seed, c.system.amp, c.system.workers, c.noise.sigma) == (1e-3, 5, 'off', 2, .3)
    assert asked('optim.lr=1e-3 --config digits-tarflow-64').optim.lr == 1e-3              # before or after
    assert asked('--config tarflow-64') == CONFIGS['tarflow-64']


def images(root, n=12, sizes=((20, 24), (18, 18))):
    rng = np.random.default_rng(0)
    for k, name in enumerate(('a', 'b', 'c')):
        (root/name).mkdir(parents=True)
        for i in range(n):
            v = rng.integers(0, 60, (*sizes[i % 2], 3))
            v[..., k] += 150
            Image.fromarray(v.astype('uint8')).save(root/name/f'{i}.png')
    return root


def test_a_folder_of_images_adapts_the_configuration(tmp_path):
    root = images(tmp_path/'photos')
    c = asked(f'--config digits-tarflow-64 data.image_size=16 flow.image_size=16 --root {root}')
    d, f = c.data, c.flow
    assert (d.name, d.classes, d.channels, d.image_size, d.levels, d.samples, f.channels, f.image_size) == ('folder', 3, 3, 16, 256, 33, 3, 16) and d.root == str(root)
    assert asked(f'--config tarflow-64 --root {root}').data.classes == 3                  # the papers' own, too


@pytest.mark.fault('configuration', 'a command line of flowbook_train that cannot be: no configuration, a misspelt key, no images, no such device', 'it ends with one sentence that names the mistake, before a checkpoint or a model is written; type it again')
@pytest.mark.parametrize('line,says', [
    ('', '--config: missing'), ('--config tarflow-46', 'did you mean'), ('--config tarflow-64 optim.lt=1', 'did you mean optim.lr'), ('--config tarflow-64 optim.lr=fast', 'takes a number'),
    ('--config tarflow-64 optim.lr', 'optim.lr'), ('--config tarflow-64', '--out: missing'), ('--config tarflow-64 --out run', 'nobody named'), ('--config tarflow-64 --root none --out run', 'not a folder'),
    ('--config tarflow-64 data.root=gone --out run', 'there is no folder gone'), ('--config tarflow-64 --dry-run --gpu H1000', 'H100'), ('--config tarflow-64 --dry-run --world 0', 'world'),
    ('--config digits-tarflow-64 --seed -1 --out run', 'seed'), ('--config digits-tarflow-64 --every 0 --out run', 'every'), ('--config digits-tarflow-64 --device abacus --out run', 'abacus')])
def test_mistakes_end_with_a_sentence(line, says, tmp_path, monkeypatch, tried):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['flowbook_train', *line.split()])
    with pytest.raises(SystemExit) as e: script.cli()
    assert isinstance(e.value.code, str) and e.value.code.startswith('flowbook_train: ') and says in e.value.code and '\n' not in e.value.code
    tried(said=e.value.code)
    assert not Path('run/status').exists() and not Path('run/model').exists() and ('device' in line or not Path('run').exists())


# --- pages

def test_the_list_and_the_page(capsys):
    main(['--list'])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:1 + len(CONFIGS)]] == list(CONFIGS)
    main('--config simflow-512 --describe --world 16'.split())
    assert 'simflow-512' in (text := capsys.readouterr().out) and '16 GPUs' in text


def test_a_plan_is_printed_and_its_status_says_whether_it_works(capsys, monkeypatch):
    p = main('--config digits-simflow-l --dry-run --world 4 --gpu RTX-4090'.split())
    assert 'problems    none' in capsys.readouterr().out and status_of(p) == 0
    bad = main('--config digits-simflow-l --dry-run --world 7 --json'.split())
    assert json.loads(capsys.readouterr().out) == bad and status_of(bad) == UNPLANNED
    monkeypatch.setattr(sys, 'argv', 'flowbook_train --config digits-simflow-l --dry-run --world 7'.split())
    with pytest.raises(SystemExit) as e: script.cli()
    assert e.value.code == UNPLANNED


def test_without_world_the_plan_is_for_the_gpus_that_are_here(capsys, monkeypatch):
    line = '--config digits-simflow-l --dry-run'.split()
    assert main(line)['world'] == find_config('digits-simflow-l').system.gpus and 'as many as the configuration says; --world N' in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    assert main(line)['world'] == 3 and 'as many' not in capsys.readouterr().out
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main(line)['world'] == 2
    assert main([*line, '--world', '4'])['world'] == 4
    main('--config digits-simflow-l --describe'.split())
    assert '2 GPUs' in capsys.readouterr().out


class Card: name, total_memory = 'NVIDIA A100-SXM4-40GB', int(39.5 * 2**30)


@pytest.mark.fault('configuration', 'a training is begun on a GPU that is too small for it, or with a batch that does not divide', "it ends before the first step with the plan's sentence and what helps, with the price; --anyway trains all the same")
def test_a_gpu_that_is_too_small_is_named_before_the_first_step(tmp_path, monkeypatch, tried):
    from flowbook import scale
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: Card)
    monkeypatch.setattr(scale, 'pick', lambda device: torch.device('cuda:0') if device == 'auto' else torch.device(device))
    monkeypatch.setattr(script, 'data_problems', lambda c: [])
    began = []
    monkeypatch.setattr(scale, 'train', lambda c, out, **k: began.append(k) or scale.Outcome('done', 1, Path(out)))
    line = ['--config', 'tarflow-64', '--out', str(tmp_path/'run')]
    with pytest.raises(ValueError, match=r'memory: about .* and NVIDIA A100-SXM4-40GB has 39.5; try: system.*GiB.*days.*--anyway') as e: main(line)
    tried(times=3, said=e.value)
    monkeypatch.setenv('WORLD_SIZE', '5')
    with pytest.raises(ValueError, match='batch: 768 samples a step do not divide by 5 ranks; try: optim.batch_size=765 or 770'): main(line)
    monkeypatch.delenv('WORLD_SIZE')
    assert began == [] and not (tmp_path/'run').exists()
    (tmp_path/'run').mkdir()
    main([*line, '--anyway']); main([*line, '--device', 'cpu'])                  # on a CPU nothing is asked
    assert len(began) == 2
    Card.total_memory = 10 * 2**40
    try: main(line)
    finally: Card.total_memory = int(39.5 * 2**30)
    assert len(began) == 3


def test_the_help_holds_the_launch_commands_and_the_batch_file(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    text = capsys.readouterr().out
    assert not e.value.code and all(w in text for w in ('torchrun --nproc-per-node 8', '--rdzv-endpoint', '--max-restarts 3', '#SBATCH --signal=USR1@120 --requeue', 'scontrol requeue', '--signals-to-handle', 'Always -m', '--from RUN --out NEW', 'Ctrl-C twice', '--forever'))
    batch = text[text.index('#!/bin/bash'):text.index('Two minutes before')]
    assert subprocess.run(['bash', '-n'], input='\n'.join(line[4:] if line.startswith('    ') else line for line in ('    ' + batch).splitlines()), text=True, capture_output=True).returncode == 0


def test_the_word_for_schedulers(tmp_path, monkeypatch):
    write_status(tmp_path/'none')                                                # nothing there, nothing to do
    write_status(tmp_path, 'stopped')
    assert (tmp_path/'status').read_text() == 'stopped\n'
    monkeypatch.setenv('RANK', '1')
    write_status(tmp_path)
    assert (tmp_path/'status').exists()                                          # rank 0 alone writes
    monkeypatch.setenv('RANK', '0')
    write_status(tmp_path)
    assert list(tmp_path.iterdir()) == []
    class Found: state = 'stopped'
    assert (status_of(Found), status_of(None)) == (STOPPED, 0)


@pytest.mark.fault('malice', 'RUN/status is rubbish, or a folder', 'rubbish is replaced, a folder is named and nothing is trained; remove it')
@pytest.mark.parametrize('kind', ['rubbish', 'folder'])
def test_a_status_that_is_none(tmp_path, kind, monkeypatch, tried):
    (run := tmp_path/'run').mkdir()
    if kind == 'rubbish':
        (run/'status').write_bytes(bytes(range(256)) * 1000)
        write_status(run, 'stopped')
        assert (run/'status').read_text() == 'stopped\n' and [p.name for p in run.iterdir()] == ['status']
        return
    (run/'status').mkdir()
    monkeypatch.setattr('flowbook.scale.train', lambda *a, **k: pytest.fail('the training began'))
    monkeypatch.setattr(sys, 'argv', f'flowbook_train --config digits-tarflow-64 --out {run}'.split())
    with pytest.raises(SystemExit) as e: script.cli()
    assert 'status' in e.value.code and '\n' not in e.value.code and [p.name for p in run.iterdir()] == ['status']
    tried(said=e.value.code)


# --- runs

def test_a_run_in_this_process_is_the_reference_trainers_and_goes_on(tmp_path, monkeypatch, capsys):
    from flowbook.configs import override
    from flowbook.recipe import train_config
    from flowbook.scripts.sample import open_model
    monkeypatch.chdir(tmp_path)
    line = ['--config', 'digits-tarflow-64', *SMALL, 'optim.steps=8', '--out', 'run', '--every', '2', '--device', 'cpu']
    found = main(line)
    want = [(logs['loss'], m) for logs, m in train_config(override(find_config('digits-tarflow-64'), [*SMALL, 'optim.steps=8']), every=2)]
    assert (found.state, found.step, Path('run/status').read_text()) == ('done', 8, 'done\n') and losses('run') == [v for v, _ in want]
    for a, b in zip(open_model('run').flow.parameters(), want[-1][1].parameters()): assert torch.equal(a, b)
    again = main(line)                                                           # nothing is left to do
    assert again.step == 8 and len(losses('run')) == 4
    with pytest.raises(ValueError, match='holds a run'): main([*line, '--no-resume'])
    with pytest.raises(ValueError, match='noise.sigma'): main([*line, 'noise.sigma=0.5'])
    assert open_model('run').card['config']['name'] == 'digits-tarflow-64' and 'done after 8 steps' in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_print_the_losses_of_one(tmp_path):
    line = ['--config', 'digits-tarflow-64', *SMALL, 'optim.steps=12', '--every', '3']
    r = command(*line, '--out', 'one', cwd=tmp_path)
    assert r.returncode == 0, r.stdout + r.stderr
    r = command(*line, '--out', 'two', torchrun=2, cwd=tmp_path)
    assert r.returncode == 0 and r.stdout.count('done after 12 steps') == 1, r.stdout + r.stderr
    one, two = losses(tmp_path/'one'), losses(tmp_path/'two')
    assert len(one) == len(two) == 4 and max(abs(a - b) for a, b in zip(one, two)) < 2e-5


def test_a_new_run_from_the_command_line(tmp_path, monkeypatch, capsys):
    "No --config: as the other run; only what is named is otherwise."
    monkeypatch.chdir(tmp_path)
    more = ['--every', '2', '--device', 'cpu']
    main(['--config', 'digits-tarflow-64', *SMALL, 'optim.steps=6', '--out', 'run', '--save-every', '2', '--forever', '2', *more])
    assert sorted(p.name for p in Path('run/checkpoints').glob('step-*')) == ['step-00000002', 'step-00000004', 'step-00000006']    # none was taken away
    assert 'in 1 process on cpu; folder run' in (said := capsys.readouterr().out) and said.index('numbers are trained') < said.index('step 2 of 6')
    found = main(['--from', 'run@4', '--out', 'new', 'optim.lr=1e-5', *more])
    assert found.step == 6 and len(losses('new')) == 1 and 'begins from' in (said := capsys.readouterr().out) and 'optim.lr' in said
    fine = main(['--from', 'run/model', '--out', 'fine', 'optim.steps=2', *more])
    assert fine.step == 2 and 'weights alone' in capsys.readouterr().out
    assert asked('--from run@4 noise.sigma=0.3').noise.sigma == .3 and asked('--from run@4').optim.steps == 6
    main(['--from', 'run@4', '--out', 'new', 'optim.lr=1e-5', *more])
    assert 'goes on from step 6' in capsys.readouterr().out


@pytest.mark.slow
def test_a_mistake_is_said_once_by_however_many(tmp_path):
    r = command('--config', 'digits-tarflow-64', 'optim.batch_size=64', '--out', 'run', torchrun=3, cwd=tmp_path)
    assert r.returncode and r.stderr.count('flowbook_train: ') == 1 and '64 is not to be divided among 3 processes' in r.stderr, r.stderr


def stopped_in_the_middle(tmp_path, sign, torchrun=0):
    "Start a long run, tell it to stop once it has logged, and wait."
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(torchrun), '--signals-to-handle', 'SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1'] if torchrun else []
    line = ['-m', 'flowbook.scripts.train', '--config', 'digits-tarflow-64', *SMALL, 'optim.steps=100000', '--every', '5', '--out', 'run', '--device', 'cpu']
    p = subprocess.Popen([sys.executable, *launcher, *line], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 90
        while not ((tmp_path/'run'/'log.jsonl').exists() and losses(tmp_path/'run')) and time.monotonic() < until and p.poll() is None: time.sleep(.2)
        p.send_signal(sign)
        out, _ = p.communicate(timeout=90)
    finally:
        if p.poll() is None: p.kill(); p.wait()
    return p.returncode, out


STOP = pytest.mark.fault('processes', 'a training is told to stop in the middle: SIGTERM, SIGUSR1, a signal to torchrun', 'it finishes the step, saves, writes stopped into RUN/status and leaves with status 75 (torchrun has its own: read RUN/status); the same command goes on')


@STOP
@pytest.mark.slow
@pytest.mark.parametrize('sign', [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_told_to_stop_saves_and_says_so(tmp_path, sign):
    status, out = stopped_in_the_middle(tmp_path, sign)
    assert status == STOPPED and (tmp_path/'run'/'status').read_text() == 'stopped\n' and 'stopped after' in out, out
    step = int((tmp_path/'run'/'checkpoints'/'latest').read_text().strip().split('-')[-1])
    assert step > 0 and (tmp_path/'run'/'model'/'config.json').exists()


@pytest.mark.fault('processes', 'Ctrl-C, or the terminal of a training closes (SIGINT, SIGHUP)', 'it saves at that step and leaves with status 75; Ctrl-C twice ends at once, and what was saved is intact; the same command goes on')
@pytest.mark.slow
@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize('torchrun', [0, 2])
def test_ctrl_c_and_a_closed_terminal_leave_with_a_status(tmp_path, sign, torchrun):
    status, out = stopped_in_the_middle(tmp_path, sign, torchrun)
    assert (status == STOPPED or torchrun and status) and (tmp_path/'run'/'status').read_text() == 'stopped\n', out
    assert int((tmp_path/'run'/'checkpoints'/'latest').read_text().strip().split('-')[-1]) > 0


@STOP
@pytest.mark.slow
def test_torchrun_passes_the_signal_on_and_the_folder_says_stopped(tmp_path):
    status, out = stopped_in_the_middle(tmp_path, signal.SIGUSR1, torchrun=2)
    assert status and (tmp_path/'run'/'status').read_text() == 'stopped\n', out
    assert int((tmp_path/'run'/'checkpoints'/'latest').read_text().strip().split('-')[-1]) > 0


@pytest.mark.slow
def test_a_folder_of_images_one_command_each_on_two_processes(tmp_path):
    "The issue's sixth promise: train, sample, evaluate, explore."
    from flowbook.data import load
    from flowbook.explore import Explorer, Setting
    from flowbook.tarflow import TarFlow
    images(tmp_path/'photos', n=20)
    sizes = 'data.image_size=16 flow.image_size=16 flow.patch_size=4 optim.batch_size=36 optim.steps=150 optim.lr=5e-3 noise.sigma=0.1 sample.w=0'.split()
    r = command('--config', 'digits-tarflow-64', *SMALL, *sizes, '--root', 'photos', '--out', 'run', '--sample-every', '150', torchrun=2, cwd=tmp_path)
    assert r.returncode == 0, r.stdout + r.stderr
    two = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m']
    for line in ('flowbook.scripts.sample run --samples 30 --out drawn --device cpu', 'flowbook.scripts.evaluate run --samples 30 --metrics fid --extractor digits --json'):
        r = subprocess.run([*two, *line.split()], capture_output=True, text=True, cwd=tmp_path)
        assert r.returncode == 0, r.stdout + r.stderr
    found = json.loads(r.stdout[r.stdout.index('{'):])
    assert found['denoised'] and found['fid'] > 0 and '3 classes' in found['reference'] and 'bits_per_dim' in found
    x, y = (drawn := load('folder', root=tmp_path/'drawn', image_size=16)).batch(range(27))
    assert drawn.classes == ('a', 'b', 'c') and [int(x[y == k].mean((0, 2, 3)).argmax()) for k in range(3)] == [0, 1, 2]
    flow = TarFlow.from_pretrained(tmp_path/'run'/'model')
    assert Explorer(flow, n=6).picture(Setting('model', label=1)).right.shape == (6, 3, 16, 16)


@pytest.mark.slow
def test_run_by_its_path_it_does_not_work_as_the_help_says(tmp_path):
    r = subprocess.run([sys.executable, script.__file__, '--list'], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': ''})
    assert r.returncode == 1 and r.stderr == 'flowbook_train: run it as a module: python -m flowbook.scripts.train\n', r.stderr
