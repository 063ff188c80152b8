from functools import lru_cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

from doors import Door, choice, door, flag, flat, images, integers, number, off, one_more_axis, tensor, whole
from flowbook.metrics import DigitClassifier, Extractor, Moments, collect, lpips, save_statistics


def some(n=8): return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
@lru_cache
def judge(): return DigitClassifier(2, 3).eval()
@lru_cache
def stats(): return collect(some(), nn.Flatten(), device='cpu')
def kept(tmp): return save_statistics(stats(), tmp/'kept'/'s.safetensors', features=True)
def weights(tmp):
    torch.save({'w': torch.ones(2)}, tmp/'w.pth')
    import hashlib
    return dict(path=tmp/'w.pth', sha256=hashlib.sha256((tmp/'w.pth').read_bytes()).hexdigest())
def folder(tmp):
    from PIL import Image
    (tmp/'drawn').mkdir(exist_ok=True)
    for i in range(3): Image.new('L', (4, 4), i).save(tmp/'drawn'/f'{i}.png')
    return tmp/'drawn'
def gauss(): return dict(mean1=torch.zeros(2), cov1=torch.eye(2), mean2=torch.ones(2), cov2=torch.eye(2))

def lpips_of_random_weights(net, device): # those of an alexnet are a download
    import torchvision
    with patch.object(torchvision.models, 'alexnet', lambda weights: alexnet()): return lpips(net, device)
@lru_cache
def alexnet():
    import torchvision
    return torchvision.models.AlexNet()

DEVICES = ['abacus', None, 'cpu cpu']
PATHS = [3, None, '', 'a\0b', 'absent.xyz']
MODULES = ['a module', None, 3, torch.zeros(2)]
some_of = lambda values: [v for v in values if v is not None]
SOURCES = [3, None, 3.5, 'absent', 'absent.npz', [], {}, {'x': 1}, some(1), some()[0], some().byte(), some() * torch.nan, some().numpy(), [3], [some()[0]], [some().byte()], [(some()[0], 0)], iter(['x'])]
COVS = [*tensor()[:2], lambda good: torch.zeros(3, 3), lambda good: torch.zeros(2), lambda good: torch.full((2, 2), torch.nan), lambda good: torch.tensor([[1., 5.], [0., 1.]]), lambda good: -torch.eye(2), lambda good: torch.eye(2).long()]

DOORS = [
    door('DigitClassifier', lambda tmp: dict(width=2, dim=3), width=whole(), dim=whole()),
    door('DigitClassifier.features', lambda tmp: dict(x=torch.zeros(2, 1, 8, 8)), of=lambda tmp: judge(), x=images()),
    door('Jitter', lambda tmp: dict(sigma=.3), sigma=number(0)),
    door('shift_image', lambda tmp: dict(x=torch.zeros(1, 4, 4), dy=1, dx=-1), x=[*tensor(), flat('x'), one_more_axis('x')], dy=whole(-4, 4), dx=whole(-4, 4)),
    door('train_digit_classifier', lambda tmp: dict(seed=0, steps=1), seed=whole(0), steps=whole()),
    door('agreement', lambda tmp: dict(judge=judge(), x=torch.zeros(2, 1, 8, 8), y=torch.zeros(2).long()), judge=['a judge', None], x=[*images(), torch.zeros(0, 1, 8, 8), torch.full((2, 1, 8, 8), torch.nan)], y=[*tensor(), torch.zeros(3).long(), torch.zeros(2), torch.zeros(2, 1).long()]),
    door('frechet', lambda tmp: gauss(), mean1=['a mean', None, torch.zeros(2, 2), torch.tensor(1.), torch.zeros(2).long(), torch.full((2,), torch.nan)], cov1=COVS, mean2=['a mean', None, torch.zeros(3), torch.zeros(2, 1)], cov2=COVS),
    door('Moments', lambda tmp: dict(d=3, device='cpu'), d=whole(0), device=DEVICES),
    door('Moments.add', lambda tmp: dict(f=torch.zeros(2, 3)), of=lambda tmp: Moments(3), f=[*tensor(), integers('f'), off('f', 1), one_more_axis('f')]),
    Door('Extractor', lambda tmp: dict(net=judge(), name='judge', channels=1, size=8, note=''), dict(net=MODULES[:3], name=[None, '', 3], channels=[2, '1', 1.5], size=some_of(whole())), None, {}),
    door('Extractor.look', lambda tmp: dict(levels=torch.zeros(2, 1, 4, 4).byte()), of=lambda tmp: Extractor(nn.Flatten(), 'flat', channels=1), levels=[*tensor(), lambda good: good['levels'].float(), lambda good: good['levels'].long(), one_more_axis('levels')]),
    door('Extractor.__call__', lambda tmp: dict(x=some(2)), of=lambda tmp: Extractor(nn.Flatten(), 'flat', channels=1), x=[*tensor(), integers('x'), one_more_axis('x'), lambda good: good['x'] * torch.nan, off('x', 1)]),
    door('with_channels', lambda tmp: dict(x=torch.zeros(2, 1, 4, 4).byte(), channels=3), x=[*tensor(), off('x', 1), one_more_axis('x')], channels=[2, '3', 3.5]),
    door('fingerprint', lambda tmp: dict(net=judge()), net=MODULES),
    Door('module_extractor', lambda tmp: dict(net=judge(), name='judge', channels=1, size=8), dict(net=MODULES, name=['', 3], channels=[2, '1'], size=some_of(whole())), None, {}),
    door('read_weights', weights, path=['absent', 3, None, '', '.'], sha256=['0' * 64, 'abc', None, 3], says={'path': 'weights'}),
    door('inception_path', lambda tmp: dict(path=weights(tmp)['path']), path=['absent', 3, '.', 'a\0b'], says={'path': 'weights'}),
    door('make_extractor', lambda tmp: dict(which='digits'), which=['clip', None, 3], says={'which': 'extractor'}),
    door('make_extractor', lambda tmp: dict(which=nn.Flatten(), weights=None), which=['inception'], says={'which': 'weights'}),
    door('folder_images', lambda tmp: dict(root=folder(tmp)), root=[*PATHS, __file__]),
    door('image_batches', lambda tmp: dict(source=some(), batch_size=3), source=[3, None, 'absent', {}, some()[0], some().byte(), some().numpy()], batch_size=whole()),
    door('collect', lambda tmp: dict(source=some(), extractor=nn.Flatten(), n=6, keep=True, batch_size=3, device='cpu', on_broken='refuse'), source=SOURCES, extractor=['clip', None, 3], n=[*some_of(whole(2)), 9], keep=flag(), batch_size=whole(),
         device=DEVICES, on_broken=choice()),
    door('save_statistics', lambda tmp: dict(stats=stats(), path=tmp/'s.safetensors', features=True), stats=[None, 'x', {}], path=[3, None, '', 'a\0b', '.'], features=flag()),
    door('load_statistics', lambda tmp: dict(path=kept(tmp)), path=[*PATHS, '.']),
    door('evaluate', lambda tmp: dict(samples=some(), reference=some(7), metrics=('fid', 'precision'), extractor=nn.Flatten(), n=6, batch_size=3, device='cpu', on_broken='refuse', k=2, seed=0), samples=SOURCES,
         reference=[v for v in SOURCES if not hasattr(v, '__next__')] + ['absent.safetensors', 'absent.npz'], metrics=['fdi', (), None, 3, ('fid', 'fdi'), 'sfid', 'is'], extractor=['clip', None, 3], n=[*some_of(whole(2)), 9], batch_size=whole(),
         device=DEVICES, on_broken=choice(), k=[*whole(), 6], seed=whole(0, 2**32 - 1)),
    door('distance', lambda tmp: dict(a=stats(), b=stats(), kind='pooled'), a=[None, 'x', some()], b=[None, 'x', some()], kind=choice()),
    door('fid_curve', lambda tmp: dict(samples=stats(), reference=stats(), ns=[3, 8], seed=0), samples=[None, 'x', some()], reference=[None, 'x', some()], ns=[None, 3, 'ab', [1], [9], [2.5], ['3'], [None]], seed=whole(0)),
    door('fid_at_infinity', lambda tmp: dict(ns=[10, 20], fids=[3., 2.]), ns=[None, 3, 'ab', [5, 5], [], [0, 5], [1.5, 2], ['a', 'b']], fids=[None, 3., 'ab', [1.], [1., 2., 3.], [1., torch.inf], ['a', 'b']]),
    door('reconstruction', lambda tmp: dict(x=some(3), xhat=some(3), metrics=('psnr', 'ssim'), net='alex', batch_size=2, device='cpu'), x=[*images(), lambda good: good['x'] * torch.nan], xhat=[*images('xhat'), lambda good: good['xhat'] * torch.nan],
         metrics=['fid', (), None, 3], net=choice(), batch_size=whole(), device=DEVICES),
    door('reconstruction', lambda tmp: dict(x=some(3), xhat=some(3), metrics=('rfid',), extractor=nn.Flatten()), extractor=['clip', None]),
    door('lpips', lambda tmp: dict(net='alex', device='cpu'), of=lambda tmp: SimpleNamespace(lpips=lpips_of_random_weights), net=choice(), device=DEVICES),
]
INNER = {'without arguments': 'digit_classifier ranks rank_part fidelity_digits',
         'an objective and its like: `fit` calls it with batches that were checked': 'CrossEntropy',
         'a record': 'Statistics',
         'opens the weights of Inception, which are not here: its arguments are those of inception_path, read_weights and check_device, and test_metrics builds it': 'inception_extractor',
         'pieces of `collect` and `evaluate`, which check first; what an extractor returns is tried in test_metrics': 'checked_features image_hash Tally gathered check_given by_fidelity'}

