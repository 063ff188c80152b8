from functools import lru_cache

from doors import door, whole
from flowbook.data import load
from flowbook.scripts.sample import Opened
from flowbook.tarflow import TarFlow


@lru_cache(None)
def opened(): return Opened(TarFlow(8, 1, 4, 16, 2, 1, 8).eval())


@lru_cache(None)
def digits(): return load('digits', 'test')


DOORS = [
    door('likelihood', lambda tmp: dict(model=opened(), noise=.1, data=digits(), batch_size=200), model=[None, 'digits-0.1', 3], noise=['loud', -1., float('nan'), []], data=[None, 'digits', 3], batch_size=whole()),
]
INNER = {
    'the command line: mistakes are tested in test_sample.py': 'parser main cli opened known_data metrics_of',
    'its steps, which come after the checks of `main`': 'draw nll reconstructed judged table',
}
