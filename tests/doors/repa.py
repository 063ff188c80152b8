import functools

import torch

from doors import door, flag, flat, images, integers, labels, number, off, one_more_axis, tensor, whole


def R():
    from flowbook import repa
    return repa


@functools.lru_cache
def flow(classes=3):
    from flowbook.tarflow import TarFlow
    torch.manual_seed(0)
    return TarFlow(4, 1, 2, 16, 2, 1, 8, classes=classes)


@functools.lru_cache
def vit(image_size=4):
    torch.manual_seed(0)
    return R().DigitsViT(8, 1, 2, 2, image_size)


@functools.lru_cache
def seeing(): return R().Encoder(vit().vit, (2, 2), 2, name='tiny')


@functools.lru_cache
def head(): return R().Projector(16, 8, 8)


@functools.lru_cache
def objective(): return R().Alignment(flow(), R().Reverse([(2, 1)]), 8, hidden=8)


@functools.lru_cache
def recipe():
    return {**R().SMALL, 'model': {**R().SMALL['model'], 'dim': 16, 'blocks': 2, 'layers': 1, 'head_dim': 8}, 'steps': 1}


def data(n=6):
    from flowbook.data import InMemory
    return InMemory(torch.arange(n * 16).view(-1, 1, 4, 4).to(torch.uint8), torch.arange(n) % 3, ('a', 'b', 'c'), 256)


def named(d, *values): return d._replace(bad={**d.bad, 'name': list(values)})  # of an argument that `door` has, too


def x(b=3): return torch.linspace(-1, 1, 16 * b).view(b, 1, 4, 4)


def gone(name): return lambda good: {k: v for k, v in good[name].items() if k != list(good[name])[-1]}


V, Y, FEATURES, LABELS = torch.randn(3, 4, 8), torch.tensor([0, 1, 2]), torch.randn(8, 5), torch.tensor([0, 1] * 4)
NO_LABELS = [v for i, v in enumerate(labels(3, 3)) if i != 5]  # NaN weights: values, which chapter 01 looks at or not
NO_FLOW = ['digits-0.1', None, torch.nn.Linear(2, 2)]
NO_PAIRS = [3, None, [], 'all', [2], [(1,)], [(0, 1)], [(1, 1), (1, 1)], [(1.5, 1)], [(True, 1)], [('1', 1)]]
PATCHES = [*tensor(), integers('v'), flat('v'), off('v', 0), off('v', 1), off('v', 2), one_more_axis('v')]
NO_NUMBERS = ['.5', None, .5, (), (float('nan'),), ('a',), (-1.,)]
DATA = ['digits', None, 3, lambda good: x()]
GRIDS = [4, None, 'ab', (4,), (4, 0), (4., 4), (True, 4), (4, 4, 4)]


def table(name): return [*tensor(), integers(name), flat(name), one_more_axis(name), lambda good: good[name][:0]]


ALIGN = dict(blocks=[2], layer=1, kind='detach', lam=.5, encoder='pixels', hidden=8)
DOORS = [
    door('Encoder', lambda tmp: dict(model=vit().vit, grid=(2, 2), patch=2, mean=(.5,), std=(.5,)), model=['vit', None, torch.nn.Linear(2, 2)], grid=GRIDS, patch=whole(), mean=NO_NUMBERS, std=[*NO_NUMBERS, (0.,), (.5, .5)]),
    door('Encoder.forward', lambda tmp: dict(x=x()), of=lambda tmp: seeing(), x=[*tensor(), integers('x'), flat('x'), off('x', 1), one_more_axis('x'), torch.zeros(2, 1, 0, 4)]),
    door('Encoder.prepare', lambda tmp: dict(x=x()), of=lambda tmp: seeing(), x=[*tensor(), integers('x'), flat('x'), off('x', 1), one_more_axis('x')]),
    named(door('encoder', lambda tmp: dict(name='digits', grid=(2, 2), weights=None, device='cpu'), grid=GRIDS, weights=[3, 'nowhere', ['a'], __file__], device=['nothing', None, 1.5]), 'digit', 3, None, 'resnet18'),
    door('encode', lambda tmp: dict(encoder=seeing(), data=data(), batch_size=4), encoder=['digits', None, lambda good: vit()], data=DATA, batch_size=whole()),
    door('DigitsViT', lambda tmp: dict(dim=8, layers=1, heads=2, patch=2, image_size=4), dim=whole(), layers=whole(), heads=[*whole(), 3], patch=[*whole(), 3], image_size=whole()),
    door('DigitsViT.forward', lambda tmp: dict(x=x()), of=lambda tmp: vit(), x=images()),
    named(door('DigitsViT.from_pretrained', lambda tmp: dict(name='digits-encoder'), of=lambda tmp: R().DigitsViT), 'digits-encoders', 'digits-vae'),
    door('warp', lambda tmp: dict(x=x(), u=torch.full((3, 6), .5), strength=1.), x=[*tensor(), integers('x'), flat('x'), one_more_axis('x')], u=[*tensor(), off('u', 0), off('u', 1), integers('u')], strength=number(0)),
    door('Warp', lambda tmp: dict(strength=1., sigma=.1), strength=number(0), sigma=number(0)),
    door('Views', lambda tmp: dict(data=data(), neighbours=2, views=None), data=DATA, neighbours=whole(0, 5), views=['warp', 3]),
    door('VICReg', lambda tmp: dict(dim=8, d=4, agree=25., vary=25., decorrelate=1.), dim=whole(), d=whole(2), agree=number(0), vary=number(0), decorrelate=number(0)),
    door('VICReg.terms', lambda tmp: dict(a=FEATURES, b=FEATURES + 1), of=lambda tmp: R().VICReg(5, 4), a=[*table('a'), off('a', 1), lambda good: good['a'][:1]], b=[*table('b'), off('b', 1), off('b', 0)]),
    door('VICReg.__call__', lambda tmp: dict(net=vit(), x=torch.stack([x(), x()], 1), y=None), of=lambda tmp: R().VICReg(8, 4), x=[*tensor(), lambda good: x(), off('x', 1), integers('x')]),
    door('MeanTokenClassifier', lambda tmp: dict(dim=8, classes=3), dim=whole(), classes=whole()),
    door('MeanTokenClassifier.__call__', lambda tmp: dict(net=vit(), x=x(), y=Y), of=lambda tmp: R().MeanTokenClassifier(8, 3), x=[*tensor(), integers('x'), flat('x')],
         y=[None, 'cat', [0, 1, 2], Y.float(), Y[:2], Y + 1, Y - 1]),
    door('Sizes', lambda tmp: dict(net=vit(), sizes=(4, 8)), net=['net', None, 3], sizes=[8, None, (), 'ab', (4, 0), (4., 8)]),
    door('few_of_each', lambda tmp: dict(y=LABELS, n=2, seed=0), y=[*tensor(), LABELS.float(), LABELS[None], LABELS[:0]], n=whole(), seed=whole(0)),
    door('few_label_probe', lambda tmp: dict(f=FEATURES, y=LABELS, tf=FEATURES, ty=LABELS, n=2, draws=2), f=table('f'), y=[*tensor(), LABELS.float(), LABELS[:3], LABELS[None], 0 * LABELS],
         tf=[*table('tf'), off('tf', 1)], ty=[*tensor(), LABELS.float(), LABELS[:3]], n=whole(), draws=whole()),
    door('probe_digits', lambda tmp: dict(tokens=lambda v: v.mean((1, 2, 3))[:, None, None]), tokens=['tokens', None, torch.nn.Flatten(), torch.nn.Identity()]),
    door('Projector', lambda tmp: dict(dim=4, width=3, hidden=2), dim=whole(), width=whole(), hidden=whole()),
    door('Projector.forward', lambda tmp: dict(h=torch.zeros(3, 16)), of=lambda tmp: head(), h=[*tensor(), torch.zeros(3, 15), torch.zeros(3, 16).long(), torch.tensor(1.)]),
    door('alignment_loss', lambda tmp: dict(p=V[None], v=V), p=[*tensor(), integers('p'), off('p', 1), off('p', 2), off('p', 3), V[:1], V[0]], v=[*tensor(), integers('v'), flat('v'), one_more_axis('v')]),
    *(door(kind, lambda tmp: dict(pairs=[(2, 1)]), pairs=NO_PAIRS) for kind in ('Strategy', 'Forward', 'ReverseSequential')),
    door('Reverse', lambda tmp: dict(pairs=[(2, 1)], carry=True, unroll=1, rerun=False), pairs=NO_PAIRS, carry=[*flag(), False], unroll=whole(0), rerun=flag()),
    door('Detach', lambda tmp: dict(pairs=[(2, 1)], rerun=False), pairs=NO_PAIRS, rerun=flag()),
    door('alignment_gradient', lambda tmp: dict(flow=flow(), strategy=R().Reverse([(2, 1)]), x=x(), y=Y, v=V, projector=head()), flow=NO_FLOW, strategy=['reverse', None, 3], x=[*images(), lambda good: good['x'][:0]],
         y=NO_LABELS, v=PATCHES, projector=['projector', None, 3]),
    door('alignment_gradient', lambda tmp: dict(flow=flow(), strategy=R().Forward([(2, 1)]), x=x(), y=Y, v=V, projector=head()), says={'strategy': 'pairs'}, strategy=[lambda good: R().Forward([(3, 1)]), lambda good: R().Forward([(1, 2)])]),
    door('flat', lambda tmp: dict(gradient={'weight': torch.ones(2, 2), 'bias': None}, like=torch.nn.Linear(2, 2)), gradient=['g', None, [], {}, gone('gradient')], like=['flow', None, 3]),
    door('gradient_support', lambda tmp: dict(flow=flow(), kind=R().Reverse, x=x(), y=Y, v=V, projector=head(), layer=1), flow=NO_FLOW, kind=['reverse', None], x=images(), y=NO_LABELS, v=PATCHES,
         projector=['projector', None], layer=whole(1, 1)),
    door('Lookup', lambda tmp: dict(table=V), table=[*tensor(), integers('table'), flat('table'), one_more_axis('table')]),
    door('Alignment', lambda tmp: dict(flow=flow(), strategy=R().Reverse([(2, 1)]), encoder=8, lam=.1, hidden=8, likelihood=1.), flow=NO_FLOW, strategy=['reverse', None, lambda good: R().Reverse], lam=number(0), hidden=whole(), likelihood=number(0),
         encoder=[*whole(), torch.nn.Linear(2, 2), lambda good: R().Encoder(vit().vit, (2, 4), 2)]),
    door('Alignment.forward', lambda tmp: dict(flow=flow(), x=x(), y=Y, target=V), of=lambda tmp: objective(), flow=NO_FLOW, x=[*images(), lambda good: good['x'][:0]], y=NO_LABELS,
         target=['patches', None, [1.], V.long(), V[:2], V[:, :3], V[..., :7]]),
    door('train_aligned', lambda tmp: dict(c=recipe(), seed=0, how=dict(ALIGN), every=1), c=['recipe', None, {}, gone('c'), *(lambda good, more=more: {**good['c'], **more} for more in ({'shift': 1}, {'schedule': 'linear'}, {'device': 'nowhere'}))], seed=whole(0), how=['reverse', 3, {}, gone('how'), {**ALIGN, 'kind': 'foo'}],
         every=[v for v in whole() if v is not None]),
]
INNER = {
    'checks, which the doors above call': 'check_grid as_pairs check_strategy check_pairs check_alignment',
    'steps of the strategies, block by block in a training step: Alignment and alignment_gradient have checked': 'Trace trace run_blocks features_in nll_per_dimension nll_of pseudo_reverse vjp push Pulled pull_through run_cut shared_backward upwards downwards',
    'hooks and transforms without arguments of their own': 'KeepClean encoder_may_miss without_encoder',
    'trainings of the checkpoints of the book, too long for a table: seed and steps are checked first, names by check_choice': 'train_vit train_digits_encoder train_digits_encoder_labels train_aligned_flow',
    'how `encoder` finds weights: doors of its own in test_encoders.py': 'timm_name patch_side timm_vit few_words MissingWeights cached check_reachable no_answer',
    'experiments, which chapter 03 runs by their names': 'alignment_exact alignment_tables alignment_mnist',
    'their parts, which take a flow that was just trained, or results, and the configuration of the experiment': 'value_error table_rows chosen drawn shrunk drawn_fid noisy_test share_of read_digits glance at_best_w faster width',
    'verdicts on their results': 'judge_exact against judge_r2 judge_r7 judge_r8 judge_r9 judge_r10 judge_r13 judge_r14 judge_tables',
    'a schedule, which `fit` calls': 'steady',
}
