"""Every public name refuses bad input: ValueError or TypeError, the argument named, at once, nothing written, nothing changed. The cases are in `doors/`."""
import copy
import importlib
import inspect
import pkgutil
import re
import sys
import time
from pathlib import Path

import pytest
import torch

import doors
import flowbook

MODULES = {m.name.removeprefix('flowbook.').replace('.', '_'): m.name for m in pkgutil.walk_packages(flowbook.__path__, 'flowbook.') if '_modidx' not in m.name and not m.ispkg}
TABLES = {k: importlib.import_module(f'doors.{k}') for k in MODULES if (Path(doors.__file__).parent/f'{k}.py').exists()}
CASES = [pytest.param(k, d, arg, v, id=f'{k}-{d.name}-{arg}-{i}') for k, t in TABLES.items() for d in t.DOORS for arg, values in d.bad.items() for i, v in enumerate(values)]
GOOD = [pytest.param(k, d, id=f'{k}-{d.name}') for k, t in TABLES.items() for d in t.DOORS]

WRITES, WATCHING = [], []                                    # an audit hook cannot be taken away, so that it watches when it is told to


def watch(event, args):
    if not WATCHING: return
    if event == 'open' and isinstance(args[1], str) and set('wax+') & set(args[1]): WRITES.append(f'open {args[0]} {args[1]}')
    elif event in ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.truncate', 'os.symlink', 'os.link', 'shutil.rmtree', 'shutil.copyfile', 'shutil.move', 'subprocess.Popen'): WRITES.append(f'{event} {args[0]}')


sys.addaudithook(watch)


def public(module):
    m = importlib.import_module(MODULES[module])
    return {n: getattr(m, n) for n in m.__all__ if inspect.isfunction(getattr(m, n)) or inspect.isclass(getattr(m, n))}


def target(module, d, tmp):
    "What is called."
    if d.of is not None: return getattr(d.of(tmp), d.name.split('.')[-1])
    return getattr(importlib.import_module(MODULES[module]), d.name)


def call(f, arguments):
    "f(**arguments), positional where f wants it; generators are started."
    arguments, positional = dict(arguments), []
    for p in inspect.signature(f).parameters.values():
        if p.kind == p.POSITIONAL_ONLY and p.name in arguments: positional.append(arguments.pop(p.name))
        elif p.kind == p.VAR_POSITIONAL and p.name in arguments: positional = [*positional, *arguments.pop(p.name)]
    found = f(*positional, **arguments)
    return next(found) if inspect.isgenerator(found) else found


def state(v): # of what could be changed by mistake
    if isinstance(v, torch.Tensor): return v.detach().clone()
    if isinstance(v, torch.nn.Module): return {k: t.detach().clone() for k, t in v.state_dict().items()}
    if isinstance(v, (dict, list)):
        try: return copy.deepcopy(v)
        except Exception: return None
    return None


def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.shape == b.shape and (a.numel() == 0 or torch.equal(a.nan_to_num(7) if a.is_floating_point() else a, b.nan_to_num(7) if b.is_floating_point() else b))
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and a != a: return isinstance(b, float) and b != b
    try: return bool(a == b)
    except Exception: return True


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    WATCHING.clear(); WRITES.clear()
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')


@pytest.mark.parametrize('module, d', GOOD)
def test_the_call_beside_which_bad_input_stands_works(module, d, here):
    call(target(module, d, here), d.good(here))


@pytest.mark.fault('arguments', 'one bad argument beside good ones, of every public function, class and method', 'ValueError or TypeError that names it, in under a second; nothing is written, no argument changed')
@pytest.mark.parametrize('module, d, arg, value', CASES)
def test_bad_input_is_refused(module, d, arg, value, here):
    f, good = target(module, d, here), d.good(here)
    bad = value(good) if inspect.isfunction(value) and value.__module__.startswith('doors') else value
    arguments = {**good, arg: bad}
    before = {k: state(v) for k, v in arguments.items()}
    there = sorted(p.relative_to(here) for p in here.rglob('*'))
    WRITES.clear(); WATCHING.append(1)
    began = time.process_time()                              # of this process alone: the machine is shared
    try:
        with pytest.raises((ValueError, TypeError)) as e: call(f, arguments)
    finally: WATCHING.clear()
    spent, said = time.process_time() - began, str(e.value)
    words = d.says.get(arg, arg)
    assert re.search(rf'(?<![A-Za-z0-9]){re.escape(words)}(?![A-Za-z0-9])', said), f'{words!r} is not named in: {type(e.value).__name__}: {said}'
    assert len(said) < 1000, f'{len(said)} characters are no sentence'
    assert spent < 1, f'{spent:.2f} s of computing before it was refused'
    assert not WRITES and sorted(p.relative_to(here) for p in here.rglob('*')) == there, f'written: {WRITES}'
    for k, was in before.items(): assert was is None or same(was, state(arguments[k])), f'{k} was changed'


@pytest.mark.parametrize('module', TABLES)
def test_every_public_name_has_a_place(module):
    "A door, or inner for a reason that is written down; and nothing that is not there any more."
    t, names = TABLES[module], public(module)
    inner = [n for some in t.INNER.values() for n in some.split()]
    doors_ = {d.name.split('.')[0] for d in t.DOORS}
    assert len(inner) == len(set(inner)) and not set(inner) & {d.name for d in t.DOORS}, 'a name twice'
    left = {n for n, f in names.items() if n not in doors_ and n not in inner and not (inspect.isclass(f) and issubclass(f, BaseException))}
    assert not left, f'no door: {sorted(left)}'
    assert not (doors_ | set(inner)) - set(names), f'not public: {sorted((doors_ | set(inner)) - set(names))}'


def test_every_module_has_a_table_and_the_table_is_long():
    assert set(TABLES) == set(MODULES), f'no table: {sorted(set(MODULES) - set(TABLES))}'
    assert len(CASES) >= 200
