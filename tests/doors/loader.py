from functools import lru_cache

import torch
from torch.utils.data import Subset

from doors import choice, door, number, whole
from flowbook.data import InMemory


@lru_cache
def few(): return InMemory(torch.zeros(12, 1, 4, 4, dtype=torch.uint8), torch.arange(12) % 3, 'abc', name='few')


parts = [(2, 2), (-1, 2), (0, 0), (0,), (0, 1, 2), 3, None, '01', (0.5, 1), (False, True)]

DOORS = [
    door('micro_batches', lambda tmp: dict(n=12, batch_size=6, seed=0, start=0, part=(0, 1), accumulate=1), n=whole(), batch_size=whole(), seed=whole(0), start=whole(0), part=parts, accumulate=whole()),
    door('loader', lambda tmp: dict(data=few(), batch_size=6, seed=0, transforms=(), start=0, part=(0, 1), accumulate=1, workers=0, prefetch=2, pin=None, tolerance=.001, floor=10, method=None),
         data=['digits', None, 3, iter([1]), lambda good: Subset(few(), [])], batch_size=[*whole(), 3.], seed=whole(0), transforms=[[3], 'noise', None, len], start=whole(0), part=parts, accumulate=whole(), workers=whole(0),
         prefetch=whole(), pin=['yes', 2], tolerance=number(0, 1), floor=whole(0), method=[v for v in choice() if v is not None]),
    door('loader', lambda tmp: dict(data=few(), batch_size=6, part=(0, 2), accumulate=3), batch_size=[7, 5, 3], part=[(0, 4)], says={'part': 'batch_size'}),
]
INNER = {'called by the loader, with what it has checked': 'check_split joined name_of read read_one sendable Reader as_it_is Begin Line start_workers stop_workers Loader',
         'a record': 'BadSample'}
