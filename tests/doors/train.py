import math
from functools import lru_cache

import torch

from doors import choice, door, flag, number, tensor, whole
from flowbook.data import InMemory, batches, load
from flowbook.tarflow import TarFlow


@lru_cache
def flow():
    torch.manual_seed(0)
    return TarFlow(8, 1, 4, 8, 1, 1, 8, classes=10)


@lru_cache
def few():
    d = load('digits')
    return InMemory(d.images[:8], d.labels[:8], d.classes, d.levels, 'eight digits')


def fits(tmp): return dict(flow=flow(), data=batches(few(), 4), steps=1, lr=1e-9, warmup=0, clip=1., every=1)


def measured(tmp):
    x, y = few().batch(range(2))
    return dict(flow=flow(), x=x, y=y, rounds=1, gain=1.1)


logs = [{'step': 1, 'loss': 1.}, {'step': 2, 'loss': .5}]
modules = ['a flow', None, 3, torch.ones(2)]
datasets = ['digits', None, 3, iter([1])]

DOORS = [
    door('GaussianNoise', lambda tmp: dict(sigma=.2), sigma=number(0)),
    door('Dequantize', lambda tmp: dict(levels=17), levels=whole(2)),
    door('DropLabels', lambda tmp: dict(p=.1), p=number(0, 1)),
    door('NLL', lambda tmp: dict(checkpoint=False), checkpoint=flag()),
    door('cosine', lambda tmp: dict(step=3, steps=10, warmup=2, floor=.1), step=whole(0), steps=whole(), warmup=whole(0), floor=number(0, 1)),
    door('ema', lambda tmp: dict(flow=flow(), decay=.9), flow=modules, decay=number(0, 1, below=True)),
    door('fit', fits, flow=modules, data=['digits', None, 3, torch.zeros(2, 1, 8, 8)], objective=['nll', 3], steps=whole(), lr=number(0, above=True), betas=[.9, (.9,), (.9, 1.), (-.1, .9), (math.nan, .9), None, 'ab'],
         weight_decay=number(0), schedule=['cosine', None, 3], warmup=whole(0) + [5], clip=[v for v in number(0, above=True) if v is not None], ema=[.99, 'yes'], amp=choice() + ['fp16'], compile=flag(), every=whole(), device=['tpu of mine', 3.5, [0]]),
    door('faster_in_bf16', measured, flow=modules, x=tensor(), rounds=whole(), gain=number(0)),
    door('mean_nll', lambda tmp: dict(flow=flow(), data=few(), transforms=(), draws=1, batch_size=4, seed=1), flow=modules, data=datasets, transforms=['noise', [3], None], draws=whole(), batch_size=whole(), seed=[v for v in whole(0) if v is not True]),
    door('to_bits', lambda tmp: dict(nats=1.2, levels=17), nats=number(), levels=[v for v in whole(2) if v is not None]),
    door('progress', lambda tmp: dict(logs=iter(logs), steps=2), steps=whole()),
    door('plot_curve', lambda tmp: dict(history=logs, keys=('loss',)), history=['logs', None, 3, [{'loss': 1.}], [{'step': 1}]]),
    door('live_curve', lambda tmp: dict(logs=iter(logs), seconds=1.), seconds=number(0)),
]
INNER = {'called by the transforms with a batch of `batches`': 'keyed_uniform keyed_normal',
         'called by NLL': 'recomputed',
         'made by `fit`, from arguments that it has checked': 'adamw Kept Late Meter suspects',
         'without arguments: the seam for training at scale': 'Alone',
         'checks themselves': 'check_dataset check_transforms'}
