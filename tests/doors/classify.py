import functools
import math

import torch

from doors import door, flat, images, integers, number, off, one_more_axis, tensor, whole


@functools.lru_cache
def flow(classes=3):
    from flowbook.tarflow import TarFlow
    torch.manual_seed(0)
    return TarFlow(4, 1, 2, 16, 2, 1, 8, classes=classes)


def data(labels=(0, 1, 2, 0, 1, 2)):
    from flowbook.data import InMemory
    return InMemory(torch.arange(len(labels) * 16).view(-1, 1, 4, 4).to(torch.uint8), torch.tensor(labels), ('a', 'b', 'c'), 256)


def x(b=3): return torch.linspace(-1, 1, 16 * b).view(b, 1, 4, 4)


def empty():
    from torch.utils.data import Subset
    return Subset(data(), [])


FLOWS = ['digits-0.1', None, 3, lambda good: flow(0)]
XS = images() + [lambda good: good['x'] / 0]
PRIORS = ['uniform', 1., [.5, .5], torch.zeros(3), torch.ones(1, 3), torch.tensor([1., math.nan, 1.]), {}]
LAYERS = [3, 'all', [], [2], [(3, 1)], [(0, 1)], [(1, 2)], [('1', '1')], {(1, 1)}]
DATA = ['digits', None, 3, lambda good: x(), lambda good: empty()]
FEATURES, LABELS = torch.randn(4, 5), torch.tensor([0, 1, 0, 1])
NO_LABELS = tensor() + [LABELS.float(), LABELS[:3], LABELS[None], LABELS.bool()]


def table(name): return [*tensor(), integers(name), flat(name), one_more_axis(name), lambda good: good[name][:0], lambda good: good[name] / 0]


DOORS = [
    door('noisy', lambda tmp: dict(data=data(), sigma=.1, seed=1), data=DATA, sigma=number(0), seed=[-1, .5, '1', None]),
    door('class_log_probs', lambda tmp: dict(flow=flow(), x=x(), batch_size=4), flow=FLOWS, x=XS, batch_size=whole()),
    door('bayes', lambda tmp: dict(flow=flow(), x=x(), prior=[1., 2., 3.], batch_size=4), flow=FLOWS, x=XS, prior=PRIORS, batch_size=whole()),
    door('value_and_gradient', lambda tmp: dict(flow=flow(), x=x(), logits=None), flow=FLOWS, x=XS, logits=['none', [[0.] * 3] * 3, torch.zeros(3, 4), torch.zeros(2, 3), torch.zeros(3, 3).long(), torch.full((3, 3), math.nan)]),
    door('class_gradient', lambda tmp: dict(flow=flow(), x=x(), logits=None), flow=FLOWS, x=XS, logits=['none', torch.zeros(3)]),
    door('first_order', lambda tmp: dict(flow=flow(), x=x(), prior=None, batch_size=2), flow=FLOWS, x=XS, prior=PRIORS, batch_size=whole()),
    door('ascend', lambda tmp: dict(flow=flow(), x=x(), steps=2, lr=.1, patience=1), flow=FLOWS, x=XS, steps=whole(), lr=number(0, above=True), patience=whole(0)),
    door('classify', lambda tmp: dict(flow=flow(), x=x(), steps=2, lr=.1, patience=1, batch_size=2), flow=FLOWS, x=XS, steps=whole(), lr=number(0, above=True), patience=whole(0), batch_size=whole()),
    door('reliability', lambda tmp: dict(p=torch.full((4, 2), .5), y=LABELS, bins=5), p=[*table('p'), lambda good: 2 * good['p'], lambda good: good['p'] - torch.tensor([[1., -1.]])],
         y=[*NO_LABELS, LABELS + 1, LABELS - 1], bins=whole()),
    door('layer_features', lambda tmp: dict(flow=flow(), x=x(), layers=[(1, 1), (2, 1)]), flow=['digits-0.1', None, torch.nn.Linear(2, 2)], x=images(), layers=LAYERS),
    door('all_layers', lambda tmp: dict(flow=flow(), layers=None), flow=['digits-0.1', None, torch.nn.Linear(2, 2)], layers=LAYERS),
    door('probe_accuracy', lambda tmp: dict(f=FEATURES, y=LABELS, tf=FEATURES, ty=LABELS, C=1.), f=table('f'), y=[*NO_LABELS, torch.zeros(4).long()],
         tf=[*table('tf'), off('tf', 1)], ty=NO_LABELS, C=number(0, above=True)),
    door('linear_probe', lambda tmp: dict(flow=flow(), train=data(), test=data(), layers=[(1, 1)], sigma=.1, seed=0, batch_size=4), flow=['digits-0.1', None, torch.nn.Linear(2, 2)],
         train=[*DATA, lambda good: data([1, 1, 1])], test=DATA, layers=LAYERS, sigma=[*number(0), True], seed=whole(0), batch_size=whole()),
]
INNER = {
    'checks, which the doors above call': 'check_data check_classes check_logits check_finite check_prior check_label_each check_features card_sigma',
    'records': 'Stage Reliability',
    'steps of the doors above, which have checked': 'posterior zero_logits',
    'the experiment of the chapter, which chapter 03 runs by its name': 'judge_classification classification one_and_all',
}
