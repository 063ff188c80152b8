from functools import lru_cache

import torch

from doors import Door, door, flat, images, integers, labels, number, off, one_more_axis, tensor, whole
from flowbook.noise import PointsFlow
from flowbook.tarflow import TarFlow


@lru_cache
def flow(classes=3): return TarFlow(4, 1, 2, 8, 1, 1, 8, classes=classes).eval()
@lru_cache
def points(): return PointsFlow(torch.tensor([[0., 1.], [1., 0.]]), .5)
def levels(b=3): return torch.zeros(b, 1, 4, 4)
def batch_of(**more): return dict(flow=flow(), x=torch.zeros(3, 1, 4, 4), y=torch.tensor([0, 2, -1]), **more)

FLOWS = ['a flow', None, 3, torch.nn.Flatten()]
IMAGES = [*images()[:-1], lambda good: torch.zeros(3)]           # one axis more would be one sample with three labels, and y is named
LABELS = labels(3, 3)[:5] + labels(3, 3)[6:]                  # weights that are NaN: flows.py
VECTORS = [*tensor(), integers('x'), off('x', 1), flat('x'), one_more_axis('x')]
SAMPLES = [*tensor(), integers('x'), lambda good: torch.zeros(3)]

DOORS = [
    door('check_flow_given', lambda tmp: dict(flow=flow()), flow=FLOWS),
    door('bits_per_dim', lambda tmp: dict(flow=flow(), data=levels() - 1, y=torch.tensor([0, 2, -1]), samples=1, levels=2, seed=0, batch_size=2), flow=FLOWS, y=LABELS, samples=whole(), levels=whole(2), seed=whole(0), batch_size=whole(),
         data=[*tensor(), lambda good: good['data'].long(), lambda good: good['data'][0], lambda good: good['data'] + .1, lambda good: good['data'] + 3, lambda good: good['data'] * torch.nan, torch.zeros(0, 1, 4, 4)]),
    door('bits_per_dim', lambda tmp: dict(flow=flow(0), data=levels() - 1, y=None, levels=2), y=[torch.zeros(3).long(), torch.zeros(3, 3)]),
    door('PointsFlow', lambda tmp: dict(points=torch.zeros(3, 2), sigma=.5), points=[*tensor(), integers('points'), flat('points'), one_more_axis('points'), torch.zeros(0, 2), torch.zeros(2, 0), torch.full((2, 2), torch.nan)], sigma=number(0, above=True)),
    door('PointsFlow.forward', lambda tmp: dict(x=torch.zeros(3, 2), y=None), of=lambda tmp: points(), x=VECTORS, y=[torch.zeros(3).long(), 'cat']),
    door('PointsFlow.log_prob', lambda tmp: dict(x=torch.zeros(3, 2), y=None), of=lambda tmp: points(), x=VECTORS, y=[torch.zeros(3).long(), 'cat']),
    door('PointsFlow.inverse', lambda tmp: dict(z=torch.zeros(3, 2), y=None), of=lambda tmp: points(), z=[*tensor(), integers('z'), off('z', 1), flat('z'), one_more_axis('z')], y=[torch.zeros(3).long(), 'cat']),
    door('PointsFlow.posterior_mean', lambda tmp: dict(x=torch.zeros(3, 2)), of=lambda tmp: points(), x=VECTORS),
    door('show_density_1d', lambda tmp: dict(sigma=.3, points=(-.5, .5)), sigma=number(0, above=True), points=['ab', None, 3, [], [[1., 2.]], [torch.inf, 1.]]),
    door('show_density_2d', lambda tmp: dict(sigma=.3, points=torch.zeros(2, 2)), sigma=number(0, above=True), points=['ab', 3, [[1., 2.]], torch.zeros(2, 3), torch.zeros(2), torch.zeros(0, 2), torch.full((2, 2), torch.nan)]),
    door('spiral', lambda tmp: dict(m=3), m=whole()),
    door('condition', lambda tmp: batch_of(), flow=FLOWS, x=IMAGES, y=LABELS),
    door('reach', lambda tmp: dict(sigma=.1, data=1.), sigma=number(0), data=number(0, above=True)),
    door('is_broken', lambda tmp: dict(x=torch.zeros(3, 2), sigma=.1, data=1.), x=SAMPLES, sigma=number(0), data=number(0, above=True)),
    door('at_edge', lambda tmp: dict(x=torch.zeros(3, 2), sigma=.1, data=1.), x=SAMPLES[:-1], sigma=number(0), data=number(0, above=True)),
    door('Shift', lambda tmp: dict(pixels=1), pixels=whole(0)),
    Door('train_flow', lambda tmp: dict(name='digits-0.1', seed=0, steps=1), dict(name=['digits-0.3', None, 3, 'Digits-0.1'], seed=whole(0), steps=[v for v in whole() if v is not None]), None, {}),
]
INNER = {'parts of `train_flow`, whose recipes are the table FLOWS; experiments call them with recipes of their own': 'averaging with_card',
         'transforms of chapter 02, whose doors are in train.py': 'Dequantize GaussianNoise'}
