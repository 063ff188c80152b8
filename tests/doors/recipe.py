from functools import lru_cache

import torch

from doors import choice, door, flag, number, whole
from flowbook.configs import find_config, override
from flowbook.data import InMemory, load
from flowbook.recipe import build


@lru_cache
def tiny(): return override(find_config('digits-tarflow-64'), ['flow.blocks=1', 'flow.layers=1', 'flow.dim=8', 'flow.head_dim=8', 'optim.batch_size=4', 'data.samples=8', 'optim.steps=1', 'optim.warmup=0', 'sample.denoise=false', 'sample.guidance=none', 'sample.w=0'])


@lru_cache
def few(n=8):
    d = load('digits')
    return InMemory(d.images[:n], d.labels[:n], d.classes, d.levels, 'eight digits')


def rgb(): return InMemory(few().images.expand(-1, 3, -1, -1), few().labels, few().classes, few().levels, 'coloured')
def named(): return InMemory(few().images, few().labels % 3, 'abc', few().levels, 'three classes')


@lru_cache
def recipe(): return build(tiny())


configs = ['digits-tarflow-64', None, 3, {'optim': 1}]
datasets = ['digits', None, 3, torch.zeros(2, 1, 8, 8)]

DOORS = [
    door('constant', lambda tmp: dict(step=3, steps=10, warmup=2, floor=.1), step=whole(0), warmup=whole(0), floor=number(0, 1)),
    door('shortened', lambda tmp: dict(c=tiny(), steps=1), c=configs, steps=whole()),
    door('build', lambda tmp: dict(c=tiny(), device='cpu', dtype=torch.float32, dry=False), c=configs, device=['tpu of mine', 3.5], dtype=['float32', torch.int64, None], dry=flag()),
    door('open_images', lambda tmp: dict(c=tiny(), split='test'), c=configs, split=choice()),
    door('held_note', lambda tmp: dict(c=tiny()), c=configs),
    door('open_data', lambda tmp: dict(c=tiny(), split='test', shard=8), c=configs, split=choice(), shard=whole()),
    door('check_data', lambda tmp: dict(c=tiny(), data=few()), c=configs, data=[*datasets, rgb(), named(), few(7), few(3)]),
    door('adapt', lambda tmp: dict(c=tiny(), data=few()), c=configs, data=datasets),
    door('guidance_of', lambda tmp: dict(c=tiny()), c=configs),
    door('card_of', lambda tmp: dict(c=tiny(), data=few(), steps=3), c=configs, steps=[v for v in whole(0) if v is not None]),
    door('draw_samples', lambda tmp: dict(recipe=recipe(), model=recipe().model.eval(), y_or_n=torch.tensor([1, 2]), batch_size=2), recipe=['a recipe', None, tiny], y_or_n=['cat', None, -1, 1.5], batch_size=whole()),
    door('train_config', lambda tmp: dict(c=tiny(), seed=0, every=1, steps=1, data=few()), c=configs, seed=[v for v in whole(0) if v is not None], every=whole(), steps=[v for v in whole() if v is not None], data=[v for v in datasets if v is not None]),
]
INNER = {'a record': 'Stage Recipe Frozen',
         'parts of `build`, which has checked the configuration': 'schedule_of fit_of Rate noise_transform transforms_of moments_shape strategy_of grid_of encoder_of encoder_shape vae_of vae_shape DigitDistance perceptual_of frozen_of Prepare joint_stages projector_of flow_stages notes_of',
         'of two datasets that `open_data` opened; tests/test_recipe.py has their mistakes': 'Paired Apart Cast is_whole await_shards',
         'of what `build` and `fit` gave': 'shape_mends reach_of save_model',
         'checks themselves': 'check_config check_images_of'}
