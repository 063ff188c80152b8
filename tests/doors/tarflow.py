import sys
from functools import lru_cache
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from doors import choice, door, flat, integers, labels, number, off, one_more_axis, tensor, whole
from doors.flows import DEVICES, FOLDERS, NAMES, contract
from flowbook.tarflow import KVCache, TarFlow
from test_reference import random_state

SIZES = dict(image_size=(2, 4), channels=1, patch_size=1, dim=4, blocks=2, layers=1, head_dim=2)
PUBLISHED = random_state(4, 2, 2, 8, (1, 2), 3, True)


@lru_cache(None)
def flow(kind='nvp', classes=0): return TarFlow(4, 1, 2, 8, 2, 1, 4, classes=classes, kind=kind)


def state(**more): return lambda good: {**good['state'], **{k.replace('__', '.'): v for k, v in more.items()}}
def without(k): return lambda good: {n: v for n, v in good['state'].items() if n != k}


def tokens(k): return [*tensor(), integers(k), lambda good: good[k].double(), flat(k), one_more_axis(k), off(k, 1), off(k, 2), off(k, 1, -1)]


def block(name, make, classes=3): # of TarBlock and of CouplingBlock
    of, two = lambda tmp: make().blocks[1], lambda k: lambda tmp: {k: torch.zeros(2, 4, 4), 'y': torch.tensor([0, -1])}
    return [door(f'{name}.params', two('x'), of, x=tokens('x'), y=labels(classes, 2), tau=number(0, above=True), features=[3, 'all', None, [0], [2], ['first'], [1.5], [True]]),
            door(f'{name}.forward', two('x'), of, x=tokens('x'), y=labels(classes, 2)), door(f'{name}.log_prob', two('x'), of, x=tokens('x'), y=labels(classes, 2)),
            door(f'{name}.inverse', two('z'), of, z=tokens('z'), y=labels(classes, 2)), door(f'{name}.sample', lambda tmp: dict(n_or_y=2), of, n_or_y=whole(0))]


DOORS = [
    door('TarFlow', lambda tmp: SIZES, image_size=[*whole(1), (2,), (2, 4, 2), (2, 4.), (0, 4), 'ab'], channels=whole(1), patch_size=[*whole(1), 3], dim=[*whole(1), 5], blocks=whole(1),
         layers=[*whole(1), (1,), (1, 0), (1, 'one'), (1, 1.5), {}, 'ab'], head_dim=[*whole(1), 3], classes=whole(0), kind=choice(),
         orders=['sideways', None, 3, ('forward',), ('forward', 'sideways'), ('forward', [0, 1]), ('forward', [0.5, 1, 2, 3, 4, 5, 6, 7]), [[0, 1, 2, 3, 4, 5, 6, 'seven'], 'reverse'], torch.zeros(2, 8).long()]),
    door('TarFlow', lambda tmp: {**SIZES, 'patch_size': 2, 'kind': 'coupling'}, orders=[[[1, 0], 'reverse']]),
    door('TarFlow.from_ml_tarflow', lambda tmp: dict(state=PUBLISHED, channels=2, head_dim=4), lambda tmp: TarFlow, channels=[*whole(1), 3, 16], head_dim=[*whole(1), 3], sigma=[v for v in number(0) if v is not None],
         state=[None, 'checkpoint.pth', {}, [torch.zeros(2)], {'blocks.0.w': torch.ones(2)}, {1: torch.ones(2)}, {'blocks.0.pos_embed': 3}, without('blocks.0.pos_embed'), without('blocks.1.proj_out.bias'), without('blocks.0.attn_blocks.0.mlp.main.0.weight'),
                state(blocks__0__pos_embed=torch.zeros(4).double()), state(blocks__0__pos_embed=torch.zeros(4, 8).long()), state(blocks__0__class_embed=torch.zeros(3).double()), state(blocks__1__class_embed=torch.zeros(3).double()),
                state(blocks__0__proj_in__weight=torch.zeros(8, 2, 4).double()), state(var=torch.zeros(4, 8).double()), state(var=torch.ones(5, 8).double()), state(more=torch.ones(1).double()), state(blocks__7__w=torch.ones(1).double()),
                lambda good: {k: v for k, v in good['state'].items() if not k.startswith('blocks.1.attn')}, state(blocks__1__attn_blocks__9999999999__w=torch.ones(1).double()),
                state(blocks__0__proj_in__weight=torch.zeros(1, 1).double().expand(8, 8))]),
    door('match_width', lambda tmp: dict(make=lambda w: torch.nn.Linear(w, w), target=50), make=[None, 3, lambda good: lambda w: torch.nn.Linear(2, 2)], target=whole(1)),
    door('TarFlow.save_pretrained', lambda tmp: dict(folder=tmp/'m'), lambda tmp: flow(), folder=FOLDERS, card=['a card', {'loss': torch.zeros(1)}]),
    door('TarFlow.from_pretrained', lambda tmp: (flow().save_pretrained(tmp), dict(name=tmp))[1], lambda tmp: TarFlow)._replace(bad=dict(name=[*NAMES, 'digits-classifier'], device=DEVICES)),
    *contract('TarFlow', lambda: flow(), (1, 4, 4), (4, 4)), *contract('TarFlow', lambda: flow('nvp', 3), (1, 4, 4), (4, 4), 3),
    *contract('TarFlow', lambda: flow('vp', 3), (1, 4, 4), (4, 4), 3), *contract('TarFlow', lambda: flow('coupling', 3), (1, 4, 4), (4, 4), 3),
    *block('TarBlock', lambda: flow('nvp', 3)), *block('CouplingBlock', lambda: flow('coupling', 3)),
    door('TarBlock.step', lambda tmp: dict(x_prev=torch.zeros(2, 4), i=1, cache=KVCache(), y=torch.tensor([0, -1])), lambda tmp: flow('nvp', 3).blocks[0],
         x_prev=[*tensor(), integers('x_prev'), lambda good: good['x_prev'].double(), flat('x_prev'), one_more_axis('x_prev'), off('x_prev', 1)], i=whole(0, 3), cache=[None, {}, 'none'], y=labels(3, 2), tau=number(0, above=True)),
]
INNER = {'the pieces of a block, built by TarFlow, which checks their sizes': 'attention Attention Mlp Layer TokenTransformer Conditioner BlockFlow',
         'a value that samplers pass on to step': 'KVCache',
         'the checks themselves, and what they call; what they refuse is tried at TarFlow': 'check_tau check_tokens check_config per_block reading_order as_order',
         'parts of from_ml_tarflow': 'published_config published_weights rename',
         "experiments of the book, without arguments of a reader's own: seed and budget are checked by evidence": 'exact_flow maf_limit bits_per_dim tarflow_variants shape_sweep',
         'pieces of these experiments': 'flow_errors as_maf param_count free_count fit_best families',
         'verdicts on their results': 'judge_exact judge_t4 judge_t5 judge_variants judge_shapes by_shape'}
