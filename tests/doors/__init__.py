"""Bad input for every public name, a file a module. `tests/test_malformed.py` makes a test of each entry.

A file `doors/<module>.py` (`scripts_sample.py` for `flowbook.scripts.sample`) has two names:

    DOORS = [door('evaluate', lambda tmp: dict(flow=trained(), n=10), n=whole(1), kind=['nothing', 3]), ...]
    INNER = {'why these are no doors': 'names of functions and classes, in one string'}

A door is a public name, a call that works, and for each argument what must be refused: values, or `lambda good: value` made from the good arguments.
Each bad value goes in alone, beside good ones, so that nothing else can be the fault. A name with a dot is a method: `door('TarFlow.log_prob', ..., of=lambda tmp: TarFlow(...))`.
"""
import math
from collections import namedtuple

import torch

Door = namedtuple('Door', 'name good bad of says')


def door(name, good=lambda tmp: {}, /, of=None, says={}, **bad):
    "says: {argument: word of the message}, where the message rightly has another word than the argument's name (a key of a configuration, a file's name)."
    return Door(name, good, bad, of, says)


# kinds of bad values, to be joined by +

def whole(least=1, most=None): # of what should be a whole number
    return [least - 1, least + .5, str(least), None, math.nan, True] + ([most + 1] if most is not None else [])

def number(low=None, high=None, above=False, below=False): # of what should be a finite number
    ends = ([low if above else low - .5] if low is not None else []) + ([high if below else high + .5] if high is not None else [])
    return [math.nan, math.inf, -math.inf, 'one', None, *ends]

def choice(): return ['nothing of the kind', 3, None]

def flag(): return ['yes', None, 2]

def tensor(): # of what should be a tensor, whatever its axes
    return ['a picture', None, [[1., 2.]], 3]

def integers(x): return lambda good: good[x].long()         # in place of floats

def off(x, axis, by=1): # one axis too long
    def wrong(good):
        t = good[x]
        shape = list(t.shape); shape[axis] += by
        return t.new_zeros(shape)
    return wrong

def flat(x): return lambda good: good[x].flatten()

def one_more_axis(x): return lambda good: good[x][None]

def labels(classes, b): # of class indices (b,), -1 for none, or weights (b, classes)
    return [torch.full((b,), classes), torch.full((b,), -2), torch.zeros(b + 1, dtype=torch.long), torch.zeros(b), torch.zeros(b, classes + 1), torch.full((b, classes), math.nan), 'cat']

def images(x='x'): # in place of good[x], of (b, c, h, w)
    return tensor() + [integers(x), flat(x), off(x, 1), off(x, 2), off(x, 3), one_more_axis(x)]
