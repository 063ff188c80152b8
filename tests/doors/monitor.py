import json
from functools import lru_cache, partial
from types import SimpleNamespace

import torch

from doors import choice, door, flag, integers, number, off, tensor, whole
from flowbook.data import load
from flowbook.monitor import Journal, Speed, at_rest
from flowbook.tarflow import TarFlow

MODELS = [None, 'a flow', 3, {}]                             # of what should be a module
FOLDERS = [None, 3, '', []]


@lru_cache(None)
def flow(): return TarFlow(8, 1, 4, 16, 2, 1, 8, classes=10).eval()


@lru_cache(None)
def digits(): return load('digits', 'test')


def images(tmp): return torch.zeros(3, 1, 8, 8)


def run(tmp):
    (tmp/'log.jsonl').write_text(''.join(json.dumps({'step': s, 'loss': 1. / s}) + '\n' for s in (1, 2, 3)))
    return tmp


def file(tmp):
    (tmp/'file').write_text('')
    return str(tmp/'file')


def journal(tmp): return Journal(tmp/'run', console=None, tensorboard=False)


def resting(**how): # a context says no when it is entered
    with at_rest(**how): pass


def picture(tmp):
    from PIL import Image
    Image.new('L', (4, 4)).save(tmp/'p.png')
    return str(tmp/'p.png')


DOORS = [
    door('Journal', lambda tmp: dict(folder=tmp/'run', start=0, steps=10, console=None, tensorboard=False, rank=0), folder=FOLDERS, start=whole(0), steps=[v for v in whole(1) if v is not None], console=['yes', 3],
         tensorboard=flag(), rank=[v for v in whole(0) if v is not None]),
    door('Journal', lambda tmp: dict(folder=file(tmp) + '-run', start=0, tensorboard=False), folder=[lambda good: good['folder'][:-4]]),
    door('Journal.write', lambda tmp: dict(report={'step': 1, 'loss': 2.}), of=journal, report=[None, 3, [], {}, {'loss': 1.}, {'step': '1'}, {'step': None}, {'step': 1.5}]),
    door('Journal.note', lambda tmp: dict(event='saved', step=1), of=journal, event=[None, 3, []], step=whole(0)),
    door('Journal.image', lambda tmp: dict(path=picture(tmp), step=1), of=lambda tmp: SimpleNamespace(image=partial(journal(tmp).image, 'samples')),
         path=[3, 'not there', [], lambda good: good['path'].removesuffix('/p.png')], step=whole(0)),
    door('Journal.record', lambda tmp: dict(logs=[{'step': 1}], speed=None), of=journal, logs=[None, 3], speed=['fast', 3, {}]),
    door('Journal.record', lambda tmp: dict(logs=[{'step': 1}], speed=None), of=journal, logs=[[3], [{}], 'x', [{'step': 1.5}]])._replace(says={'logs': 'report'}),
    door('read_log', lambda tmp: dict(folder=run(tmp), events=False), folder=[*FOLDERS, 'not there'], events=flag()),
    door('peak', lambda tmp: dict(device='NVIDIA A100-SXM4-80GB', precision='bf16'), device=[None, [], 2.5], precision=choice()),
    door('memory', lambda tmp: dict(device='cpu'), device=[None, 'abacus', [], 2.5]),
    door('Speed', lambda tmp: dict(batch_size=4, flops=1e6, world=1, device='cpu', precision='bf16', start=0, steps=5), batch_size=whole(), flops=[v for v in number(0) if v is not None], world=[v for v in whole(1) if v is not None],
         device=[None, 'abacus', []], precision=choice(), start=whole(0), steps=[v for v in whole(1) if v is not None]),
    door('Speed.watch', lambda tmp: dict(data=[1, 2]), of=lambda tmp: Speed(4), data=[None, 3]),
    door('Speed.read', lambda tmp: dict(step=3), of=lambda tmp: Speed(4), step=whole(0)),
    door('block_stats', lambda tmp: dict(model=flow(), x=images(tmp), y=torch.zeros(3, dtype=torch.long)), model=[*MODELS, torch.nn.Linear(2, 2)], x=[*tensor(), integers('x'), off('x', 1), off('x', 2), off('x', 3)],
         y=[torch.full((3,), 10), torch.zeros(4, dtype=torch.long)]),
    door('groups', lambda tmp: dict(modules=[flow()]), modules=[[], [None], ['a flow'], [3]]),
    door('norms', lambda tmp: dict(modules=[flow()]), modules=[[], [None], ['a flow'], [3], (torch.nn.ReLU(),)]),
    door('filled', lambda tmp: dict(model=TarFlow(8, 1, 4, 16, 2, 1, 8), tensors={'blocks.0.proj_in.bias': torch.zeros(16)}), model=MODELS, tensors=[None, [], 3, {'nobody': torch.zeros(1)}, {'blocks.0.proj_in.bias': torch.zeros(1)}, {'blocks.0.proj_in.bias': 3.}]),
    door('at_rest', lambda tmp: dict(model=flow()), of=lambda tmp: SimpleNamespace(at_rest=resting), model=MODELS),
    door('drawn', lambda tmp: dict(model=flow(), n=2, seed=0, guidance=None, sigma=0., gamma=0., decode=None, solver='sequential', dtype=None, batch_size=2, part=(0, 1)), model=[*MODELS, torch.nn.Linear(2, 2)], n=whole(), seed=whole(0),
         guidance=['class', 1.], sigma=number(0), gamma=number(), decode=['yes', 3], solver=['newton', 0, None, 1.5], dtype=['bfloat16', torch.int64, 3], batch_size=whole(), part=[3, (1, 1), (0,), ('0', 2), (-1, 2)]),
    door('grid', lambda tmp: dict(model=flow(), folder=tmp/'run', step=1, n=2, seed=0, nrow=2), model=MODELS, folder=FOLDERS, step=whole(0), n=whole(), seed=whole(0), nrow=whole()),
    door('quality', lambda tmp: dict(model=flow(), reference=digits(), n=4, metrics=('fid',), extractor='digits', seed=0, batch_size=4), model=MODELS, n=whole(2), metrics=['fod', ('fid', 'x')], seed=whole(0), batch_size=whole()),
    door('plot_run', lambda tmp: dict(folder=run(tmp)), folder=[*FOLDERS, 'not there']),
    door('summary', lambda tmp: dict(folder=run(tmp)), folder=[*FOLDERS, 'not there']),
]
INNER = {
    'of the log: called by Journal and read_log, which have looked at folder and steps; what a log may hold is tested in test_monitor.py': 'plain parsed set_aside now flat open_board line duration',
    'checks themselves': 'check_model',
    'a command line, tested in test_monitor.py': 'main',
    'of a flow that block_stats has looked at': 'as_flow wide Sums',
}
