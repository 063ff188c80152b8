from functools import lru_cache
from types import SimpleNamespace

import torch

from doors import choice, door, whole
from flowbook.configs import find_config, model_of
from flowbook.plan import plan, pretended

KINDS = [None, 'digits-tarflow-64', 3, {}]                   # of what should be a configuration
WORLD = [v for v in whole(1, 2**13) if v is not None]        # None: as the configuration says


@lru_cache(None)
def config(): return find_config('digits-tarflow-64')


@lru_cache(None)
def planned(): return plan(config(), 2)


def entered(**how): # a context says no when it is entered
    with pretended(**how): pass


DOORS = [
    door('plan', lambda tmp: dict(c=config(), world=2, gpu='H100', root=None), c=KINDS, world=WORLD, gpu=[*choice(), []], root=[3, [], True]),
    door('told', lambda tmp: dict(p=planned()), p=[None, 'a plan', 3, {}, [], {'name': 'x'}]),
    door('rank_memory', lambda tmp: dict(c=config(), world=2), c=KINDS, world=WORLD),
    door('pretended', lambda tmp: dict(world=2, rank=0), of=lambda tmp: SimpleNamespace(pretended=entered), world=whole(1, 2**13), rank=whole(0, 1)),
    door('shards', lambda tmp: dict(model=model_of(config()), world=2), model=[None, 'a flow', 3, torch.nn.Linear(2, 2)], world=whole(1, 2**13)),
]
INNER = {
    'parts of `plan`, which has looked at the configuration, the card and the ranks; the problems that they find are tested in test_plan.py': 'held_out does_not_fit problems_here batch_problems memory_problems data_problems other_problems total_of what_helps shards_of key_of gathered',
    'sizes, called by `shards` and the text of a plan': 'rows_of shard_plan size_in size duration rounded',
    'records': 'Shards Problem',
}
