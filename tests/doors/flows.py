from functools import lru_cache

import torch
from torch import nn

from doors import door, flat, integers, labels, number, off, one_more_axis, tensor, whole
from flowbook.flows import MADE, MAF, Autoregressive, Chain, ClassEmbedding, Coupling, Flow, OnImages, Pretrained, RealNVP

GENERATORS = ['cpu', 3, True]
FOLDERS = [3, None, 'a\0b', lambda good: __file__]            # the last is a file
NAMES = [3, None, 'a\0b', 'no-such-checkpoint', 'no/such/folder', __file__]
DEVICES = ['abacus', 'cpu:one', None, 1.5, *([] if torch.cuda.is_available() else ['cuda'])]


def contract(name, make, shape, z_shape, classes=0): # what every flow refuses; shapes of one sample and one latent
    "Doors of forward, inverse, log_prob, sample and draw of one flow."
    x = lambda tmp: dict(x=torch.zeros(2, *shape), **({'y': torch.tensor([0, -1])} if classes else {}))
    z = lambda tmp: dict(z=torch.zeros(2, *z_shape), **({'y': torch.tensor([0, -1])} if classes else {}))
    of, ys = lambda tmp: make(), labels(classes, 2) + [torch.zeros(2).bool(), torch.zeros(1).long()] if classes else [torch.zeros(2).long(), torch.zeros(2, 3), 'cat', 3]
    bad = lambda k, n: [*tensor(), integers(k), lambda good: good[k].double(), flat(k), one_more_axis(k), *(off(k, i) for i in range(1, n + 1))]
    some = [*whole(0), [[0, 0], [1]], 'cat', {'cat': 1}] + ([v for v in labels(classes, 2) if not isinstance(v, torch.Tensor) or len(v) == 2] if classes else [torch.zeros(2).long()])
    return [door(f'{name}.forward', x, of, x=bad('x', len(shape)), y=ys), door(f'{name}.log_prob', x, of, x=bad('x', len(shape)), y=ys),
            door(f'{name}.inverse', z, of, z=bad('z', len(z_shape)), y=ys),
            door(f'{name}.sample', lambda tmp: dict(n_or_y=2), of, n_or_y=some, generator=GENERATORS),
            door(f'{name}.draw', lambda tmp: dict(b=2), of, b=whole(0), generator=GENERATORS)]


vectors = lru_cache(None)(lambda kind, classes=0: {'coupling': lambda: RealNVP(3, 4, 1, 2, classes), 'MAF': lambda: MAF(3, 4, 1, 2, classes), 'images': lambda: OnImages(MAF(4, 4, 1, 1, classes), (1, 2, 2))}[kind]())
ORDER, KEEP = torch.tensor([1, 0, 2]), torch.tensor([True, False, True])
ORDERS = [*tensor(), torch.tensor([0., 1.]), torch.tensor([1, 2]), torch.tensor([0, 0]), torch.zeros(2, 2).long(), torch.zeros(0).long()]


class Saved(nn.Linear, Pretrained):
    def __init__(self, n): super().__init__(n, n); self.config = {'n': n}


def sizes(dim=2): return dict(dim=whole(dim), hidden=whole(1), layers=whole(1), blocks=whole(1), classes=whole(0))


DOORS = [
    door('normal_log_prob', lambda tmp: dict(z=torch.zeros(2, 3), var=torch.ones(3)), z=[*tensor(), integers('z'), flat('z')], var=[0., -1., 'one', None, float('nan'), True, torch.ones(4), torch.ones(2, 3), torch.ones(1, 2, 3)]),
    door('ClassEmbedding', lambda tmp: dict(classes=3, dim=4), classes=whole(1), dim=whole(1)),
    door('ClassEmbedding.forward', lambda tmp: dict(y=torch.tensor([0, -1]), b=2), lambda tmp: ClassEmbedding(3, 4), y=labels(3, 2)),
    door('Chain', lambda tmp: dict(flows=(vectors('coupling'), vectors('MAF'))), flows=[(), ('coupling',), (None,), (nn.Linear(3, 3),), lambda good: (vectors('coupling'), vectors('coupling', 3))]),
    door('Coupling', lambda tmp: dict(keep=KEEP, hidden=4), keep=[*tensor(), torch.tensor([1, 0]), torch.ones(2, 2).bool(), torch.ones(0).bool()], hidden=whole(1), layers=whole(1), classes=whole(0)),
    door('Coupling.params', lambda tmp: dict(x=torch.zeros(2, 3), y=torch.tensor([0, -1])), lambda tmp: vectors('coupling', 3).flows[0], y=labels(3, 2)),
    door('RealNVP', lambda tmp: dict(dim=3, hidden=4, blocks=1), **sizes(2)),
    door('MAF', lambda tmp: dict(dim=3, hidden=4, blocks=1), **sizes(1)),
    door('MADE', lambda tmp: dict(order=ORDER, hidden=4), order=ORDERS, hidden=whole(1), layers=whole(1), classes=whole(0)),
    door('Autoregressive', lambda tmp: dict(net=MADE(ORDER, 4), order=ORDER), net=['a network', None], order=ORDERS, classes=whole(0)),
    door('OnImages', lambda tmp: dict(flow=vectors('MAF'), shape=(3, 1, 1)), flow=[None, 'MAF', nn.Linear(3, 3)], shape=[None, 3, (3,), (1, 1, 1), (1, 2, 2), (3., 1, 1), (-3, -1, 1), 'abc']),
    door('shake', lambda tmp: dict(flow=nn.Linear(2, 2)), flow=[None, 'MAF', torch.zeros(2)], scale=number(0), seed=whole(0)),
    door('jacobian', lambda tmp: dict(flow=vectors('MAF', 3), x=torch.zeros(2, 3), y=torch.tensor([0, 1])), flow=[None, 'MAF'], x=[*tensor(), integers('x'), off('x', 1)], y=labels(3, 2)),
    door('check_flow', lambda tmp: dict(flow=vectors('MAF', 3), x=torch.zeros(2, 3), y=torch.tensor([0, 1])), flow=[None, 'MAF', nn.Linear(3, 3)], x=[*tensor(), integers('x'), off('x', 1), torch.zeros(2, 3).half(), torch.zeros(0, 3)], y=labels(3, 2),
         tol=[1e-5, 'small', {'round': 1.}, {'round trip': 'small'}, {'logdet': -1.}, {'logdet': float('inf')}]),
    door('density_grid', lambda tmp: dict(flow=MAF(2, 4, blocks=1, classes=3), n=2), flow=[None, 'MAF', nn.Linear(2, 2), lambda good: vectors('MAF')], lim=number(0, above=True), n=whole(1), y=[torch.full((4,), 3), torch.zeros(5).long(), 'cat']),
    door('load_strictly', lambda tmp: dict(model=nn.Linear(2, 3), state={'weight': torch.zeros(3, 2), 'bias': torch.zeros(3)}, source='state'), model=[None, 'Linear'],
         state=[None, 'weights', [torch.zeros(3)], {}, {'weight': 3, 'bias': 4}, {1: torch.zeros(3)}, lambda good: {**good['state'], 'more': torch.zeros(1)}, lambda good: {**good['state'], 'bias': torch.zeros(2)}, lambda good: {**good['state'], 'bias': torch.zeros(3).long()}]),
    door('Pretrained.save_pretrained', lambda tmp: dict(folder=tmp/'m'), lambda tmp: Saved(2), folder=FOLDERS, card=['a card', 3, [1], {'loss': float('inf')}, {'loss': torch.zeros(1)}, {'data': {1, 2}}]),
    door('Pretrained.from_pretrained', lambda tmp: (Saved(2).save_pretrained(tmp), dict(name=tmp))[1], lambda tmp: Saved)._replace(bad=dict(name=NAMES, device=DEVICES)),
    door('find_pretrained', lambda tmp: dict(name=tmp))._replace(bad=dict(name=NAMES)),
    *contract('RealNVP', lambda: vectors('coupling'), (3,), (3,)), *contract('RealNVP', lambda: vectors('coupling', 3), (3,), (3,), 3),
    *contract('MAF', lambda: vectors('MAF'), (3,), (3,)), *contract('MAF', lambda: vectors('MAF', 3), (3,), (3,), 3),
    *contract('OnImages', lambda: vectors('images', 3), (1, 2, 2), (4,), 3),
]
INNER = {'the base of all flows; its methods are tried at every kind of flow': 'Flow',
         'the checks themselves; what they refuse is tried at the flows': 'check_y check_vector check_dtype check_generator check_module check_order count_and_labels',
         'pieces of layers and flows, called with tensors that these have made': 'affine bounded unaffine zero_ MaskedLinear',
         'parts of check_flow, after its checks': 'causality_error gradient_error',
         "a figure of the book's own Jacobians": 'show_matrix',
         'no arguments': 'weights_folder', 'a part of save_pretrained, after its checks': 'model_card'}
