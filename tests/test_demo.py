"""The main job, as a user runs it: the console script in a process of its own."""
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowbook.data import load
from flowbook.scripts import demo as script
from flowbook.tarflow import TarFlow

SCRIPT = [sys.executable, '-m', 'flowbook.scripts.demo']


def demo(*argv, cwd, ok=True):
    r = subprocess.run([*SCRIPT, *map(str, argv)], capture_output=True, text=True, cwd=cwd)
    assert (r.returncode == 0) == ok, r.stdout + r.stderr
    return r


def make_images(root, classes=('cats', 'dogs'), n=30, size=(40, 30)):
    "A user's folder: photographs of different kinds and sizes."
    g = torch.Generator().manual_seed(0)
    for k, c in enumerate(classes):
        (root/c).mkdir(parents=True)
        for i in range(n):
            w, h = size[0] + i % 7, size[1] + i % 5
            x = (torch.rand(h, w, 3, generator=g) * 100 + 70 * k).byte().numpy()
            mode = ('RGB', 'L', 'RGBA', 'P', 'CMYK')[i % 5]
            Image.fromarray(x).convert(mode).save(root/c/f'{i}.{"tif" if mode == "CMYK" else "png"}')


def test_help():
    assert '--image-size' in demo('--help', cwd='.').stdout


@pytest.mark.parametrize('command', [['flowbook_demo', '--steps', '1'], ['flowbook_demo', '--help'], ['flowbook_remake', '--list'], ['flowbook_experiment', '--list'], ['flowbook_book', '--help'], ['flowbook_evaluate', '--help'], ['flowbook_fid_stats', '--help']])
def test_installed_commands_succeed_with_status_zero(command, tmp_path):
    path = shutil.which(command[0], path=str(Path(sys.executable).parent))
    assert path, f'pip install -e . makes {command[0]}'
    r = subprocess.run([path, *command[1:]], capture_output=True, text=True, cwd=tmp_path if 'demo' in command[0] else None)
    assert r.returncode == 0 and 'Traceback' not in r.stderr, r.stdout + r.stderr


def test_a_users_own_folder(tmp_path):
    make_images(tmp_path/'mine')
    r = demo('--data', 'folder', '--root', tmp_path/'mine', '--image-size', 16, '--steps', 4, '--batch-size', 8, '--out', 'out', '--device', 'cpu', cwd=tmp_path)
    assert '2 classes' in r.stdout and 'bits/dim' in r.stdout and 'jupyter lab' in r.stdout
    report = json.loads((tmp_path/'out'/'report.json').read_text())
    assert report['steps'] == 4 and 'agreement' not in report
    flow = TarFlow.from_pretrained(tmp_path/'out'/'checkpoint')
    assert flow.image_shape == (3, 16, 16) and flow.classes == 2 and flow.card['class_names'] == ['cats', 'dogs']
    assert flow.sample(torch.tensor([0, 1, -1])).isfinite().all()
    for name in ('samples.png', 'denoised.png', 'loss.png'): Image.open(tmp_path/'out'/name).verify()


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'judge_samples', lambda *a, **k: {})        # the judge is at work in the other tests
    for _ in range(2): script.main(['--steps', '2', '--out', str(tmp_path/'out'), '--device', 'cpu'])
    assert (tmp_path/'out'/'report.json').exists() and (tmp_path/'out-2'/'report.json').exists()


@pytest.mark.fault('configuration', 'a command line of flowbook_demo that cannot be', 'it ends with one sentence that names the mistake, before the first step; type it again')
@pytest.mark.parametrize('argv,says', [
    (['--data', 'digit'], "did you mean 'digits'"), (['--data', 'folder'], 'needs --root'), (['--data', 'folder', '--root', 'nowhere', '--image-size', '8'], 'nowhere'),
    (['--patch-size', '3'], 'does not divide'), (['--sigma', '-1'], 'standard deviation'), (['--device', 'abacus'], 'auto or cpu'),
    (['--steps', '-5'], 'steps'), (['--steps', '0'], 'steps'), (['--lr', '0'], 'lr'), (['--batch-size', '0'], 'batch'), (['--dim', '50', '--layers', '0'], 'layers'),
    (['--image-size', '7'], 'one patch'), (['--threads', '-1'], 'threads'), (['--seed', '-1'], '--seed'), (['--batch-size', '-3'], '--batch-size'), (['--blocks', '0'], '--blocks'), (['--simflow', '--steps', '0'], '--steps'), (['--image-size', '0'], '--image-size'), (['--patch-size', '0'], '--patch-size'), (['--dim', str(10**12)], '--dim'), (['--out', 'pytest.ini/x'], '--out')])
def test_mistakes_end_with_a_sentence(argv, says, tmp_path, monkeypatch, capsys):
    (tmp_path/'pytest.ini').write_text('a file, not a folder')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: script.main(['--out', 'never', *argv])
    out = capsys.readouterr().out
    assert says in str(e.value) and '\n' not in str(e.value) and 'step' not in out.replace('steps', '') and not (tmp_path/'never').exists()


@pytest.mark.fault('data', 'a file of images is no image', 'it is named and the command ends before training; remove or mend the file')
def test_a_broken_image_is_named(tmp_path):
    "And the process ends with that sentence alone."
    make_images(tmp_path/'mine', n=5)
    (tmp_path/'mine'/'cats'/'bad.png').write_bytes(b'no image')
    r = demo('--data', 'folder', '--root', tmp_path/'mine', '--image-size', 16, cwd=tmp_path, ok=False)
    assert 'bad.png' in r.stderr and 'Traceback' not in r.stderr


@pytest.mark.fault('processes', 'Ctrl-C in the middle of the demonstration', 'what was learned is measured and kept; nothing to do')
def test_interrupting_keeps_what_was_learned(tmp_path):
    import signal
    p = subprocess.Popen([*SCRIPT, '--steps', '100000', '--out', 'out', '--device', 'cpu'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen, deadline = '', time.time() + 120
    while 'loss=' not in seen and time.time() < deadline: seen += p.stdout.read(1)
    p.send_signal(signal.SIGINT)
    rest, _ = p.communicate(timeout=120)
    assert p.returncode == 0 and 'stopped by hand' in rest, rest
    assert TarFlow.from_pretrained(tmp_path/'out'/'checkpoint').card['note'].startswith('stopped by hand')


@pytest.mark.fault('numbers', 'samples overflow while they are judged', 'they are left out and counted, the checkpoint is kept; lower the learning rate')
def test_broken_samples_count_as_no_digits():
    "A flow that overflows must not cost its checkpoint: the judge counts, it does not stop."
    from flowbook.scripts.demo import judge_samples
    class Overflows:
        share = 1.
        def sample(self, y, generator=None):
            x = torch.zeros(len(y), 1, 8, 8)
            x[:int(self.share * len(y))] = float('nan')
            return x
    flow, train = Overflows(), load('digits')
    judge = lambda: judge_samples(flow, train, 0, 200)
    assert judge() == {'agreement': 0.}
    flow.share = .5
    broken = judge()
    flow.share = 0.
    assert 0 < broken['agreement'] < judge()['agreement'] and broken['broken'] == 100              # the same blank digits, half of them lost


@pytest.mark.slow
def test_the_main_job(tmp_path):
    "One seed of three in CI (all three stand in nbs/results/demo.laptop.json): legible digits, little memory."
    r = subprocess.run([sys.executable, '-c', f'''
import resource, subprocess, sys, time
t = time.time(); code = subprocess.call([sys.executable, "-m", "flowbook.scripts.demo", "--seed", "0", "--out", "out"], stdout=sys.stderr)
print(code, time.time() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)'''], capture_output=True, text=True, cwd=tmp_path)
    code, seconds, gigabytes = r.stdout.split()
    assert code == '0', r.stderr
    report = json.loads((tmp_path/'out'/'report.json').read_text())
    print(f'\ndemo: {report}, {float(seconds):.0f} s in all, {float(gigabytes):.2f} GB')
    assert report['agreement'] >= .87
    assert float(gigabytes) <= 2
    floor = (.5 + math.log(.2 * math.sqrt(2 * math.pi))) / math.log(2)      # the entropy of the noise
    assert floor < report['test_bits_per_dim'] < 1
