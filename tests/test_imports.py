"""The core stands on little: what may be missing is forbidden here, in a fresh process."""
import subprocess
import sys

FORBIDDEN = ('timm', 'diffusers', 'torch_fidelity', 'torchmetrics', 'ipywidgets', 'matplotlib', 'jupyter', 'jupyterlab', 'IPython', 'notebook', 'nbformat', 'nbconvert',
             'sklearn', 'scipy', 'torchvision', 'PIL', 'tqdm', 'fastcore', 'nbdev', 'execnb', 'pandas')

CODE = '''
import sys
for name in {forbidden!r}: sys.modules[name] = None       # an import of it raises ModuleNotFoundError
'''


def run(code):
    return subprocess.run([sys.executable, '-c', CODE.format(forbidden=FORBIDDEN) + code], capture_output=True, text=True)


def test_the_guard_forbids():
    assert 'ModuleNotFoundError' in run('import matplotlib.pyplot').stderr


def test_modules_import_alone():
    "Each in a child of its own; what all of them may use is loaded before, once."
    r = run('''
import os, torch
for name in ('tarflow', 'flows', 'data', 'train', 'metrics', 'evidence', 'noise', 'denoise', 'guidance', 'sampling', 'classify', 'repa', 'latent', 'simflow',
             'configs', 'recipe', 'checkpoint', 'loader', 'monitor', 'plan', 'scale', 'faults', 'explore', 'variants', 'sit', 'claims', 'no_such_module'):
    if not (child := os.fork()):
        try: __import__(f'flowbook.{name}')
        except BaseException as e: print(name, type(e).__name__, e, flush=True); os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
''')
    assert r.returncode == 0 and r.stdout.split('\n') == ["no_such_module ModuleNotFoundError No module named 'flowbook.no_such_module'", ''], r.stdout + r.stderr


def test_tarflow_trains_samples_and_saves_alone(tmp_path):
    "Not only the import: a step, samples, a checkpoint and back, with nothing else to be had."
    r = run(f'''
import torch
from flowbook.tarflow import TarFlow
from flowbook.train import fit
flow = TarFlow(4, 1, 2, 16, 2, 1, 8, classes=3)
log, = fit(flow, iter([(torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, -1, 0]))]), steps=1)
x = flow.sample(torch.tensor([0, 1]))
flow.save_pretrained({str(tmp_path)!r})
print(torch.equal(TarFlow.from_pretrained({str(tmp_path)!r}).log_prob(x), flow.log_prob(x)))
''')
    assert r.returncode == 0 and r.stdout.strip() == 'True', r.stderr


def test_a_flow_is_guided_denoised_and_judged_alone():
    "A machine without torch-fidelity, matplotlib and widgets still draws, denoises and measures FID."
    r = run('''
import torch
from flowbook.denoise import denoise
from flowbook.guidance import ClassGuidance, guided_sample
from flowbook.metrics import evaluate
from flowbook.tarflow import TarFlow
flow, y = TarFlow.from_pretrained('digits-0.1'), torch.arange(30) % 10
x = denoise(flow, guided_sample(flow, y, ClassGuidance(.25)), .1, y)
print(evaluate(x, torch.rand(40, 1, 8, 8) * 2 - 1, ('fid', 'sfid'), 'digits')['fid'] > 0)
''')
    assert r.returncode == 0 and r.stdout.strip() == 'True', r.stderr
