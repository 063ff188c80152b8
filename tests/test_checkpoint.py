"""Checkpoints: what comes back, what is refused, and what every fault of disk, process and file leaves behind."""
import contextlib
import errno
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from flowbook import checkpoint as C
from flowbook.checkpoint import CheckpointError, Lock, Run, load, pack, problems, save, weights
from flowbook.faults import Bomb
from flowbook.train import ema


def numbers(seed=0):
    "Tensors of every type, and every shape that a file format may trip over."
    g = torch.Generator().manual_seed(seed)
    wide, w = torch.randn(8, generator=g), nn.Parameter(torch.randn(3, generator=g))
    return {**{f'type.{d}': (torch.randn(3, 5, generator=g) * 9).to(d) for d in C.DTYPES},
            'no dimension': torch.tensor(3.5), 'one bool': torch.tensor(True), 'past 2**53': torch.tensor(2**53 + 1),
            'empty': torch.zeros(0, 3), 'empty in the middle': torch.zeros(2, 0, 3, dtype=torch.int64),
            'a': torch.arange(4), 'a.b': torch.randn(2, generator=g), 'a.b.c': torch.randn(1, generator=g),          # nested names
            'transposed': torch.randn(3, 4, generator=g).T, 'channels last': torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last),
            'part': torch.randn(10, generator=g)[2:5], 'every other': torch.randn(10, generator=g)[::2], 'expanded': torch.randn(1, 3, generator=g).expand(4, 3),
            'left': wide[:4], 'right': wide[4:], 'both': wide, 'weight': w, 'tied': w,                                # one memory, several names
            'negative': torch.imag(torch.randn(3, dtype=torch.complex64, generator=g).conj()),                        # a sign that is set on reading
            'negated': torch._neg_view(torch.randn(3, generator=g)),
            'not finite': torch.tensor([float('nan'), float('inf'), -0.]), 'ünï/code 😀 "x"\n': torch.ones(1)}


def blank(tensors): return {k: torch.full(v.shape, 7, dtype=v.dtype) for k, v in tensors.items()}


def bits(t): return t.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def same(a, b): return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(bits(a[k]), bits(b[k])) for k in a)


def small(step): return {'w': torch.full((40, 3), float(step)), 'n': torch.tensor(step)}


def three(folder):
    "A run with checkpoints of steps 1, 2 and 3, closed."
    with Run(folder) as run:
        for step in (1, 2, 3): save(run, step, small(step), {'step': step}, keep=3)
    return run


def newest(folder, **kw):
    "What a fresh run loads: (step, warnings)."
    into = blank(small(0))
    with Run(folder, write=False) as run, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        step, meta = load(run, into, **kw)
    assert meta == {'step': step} and same(into, small(step)), 'what was loaded is not what was saved'
    return step, [str(w.message) for w in seen]


def names(run): return sorted(p.name for p in run.checkpoints.iterdir())


def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


# what comes back

@pytest.mark.parametrize('asynchronous', [False, True])
def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path, asynchronous):
    tensors, meta = numbers(), {'a': [1, None, True, 'ü', 1e-300, {'b': {}}], 'big': 2**70}
    with Run(tmp_path) as run:
        path = save(run, 7, tensors, meta, asynchronous=asynchronous)
        run.wait()
        assert load(run, into := blank(tensors)) == (7, meta) and same(tensors, into)
    assert run.latest() == 7 and run.newest() == path and not problems(path)
    assert sorted(p.name for p in path.iterdir()) == ['manifest.json', 'meta.json', 'part-00001-of-00001.safetensors']


def test_targets_may_be_parameters_and_strided(tmp_path):
    with Run(tmp_path) as run:
        save(run, 1, {'a': torch.arange(6.).view(2, 3), 'b': torch.ones(4)})
        into = {'a': nn.Parameter(torch.zeros(3, 2)).T, 'b': (whole := torch.zeros(8))[::2]}
        load(run, into)
    assert torch.equal(into['a'], torch.arange(6.).view(2, 3)) and torch.equal(whole, torch.tensor([1., 0] * 4))


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_the_files_are_what_torch_and_safetensors_understand(tmp_path):
    tensors = numbers()
    with Run(tmp_path) as run: path = save(run, 1, tensors)
    from safetensors.torch import load_file
    assert same(load_file(path/'part-00001-of-00001.safetensors'), {k: v.detach() for k, v in tensors.items()})
    into = blank(tensors)
    dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(path)), planner=dcp.DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
    assert same(tensors, into)
    head = (path/'part-00001-of-00001.safetensors').read_bytes()
    length = int.from_bytes(head[:8], 'little')
    for k, entry in json.loads(head[8:8 + length]).items():            # each tensor begins where its type may begin
        if k != '__metadata__': assert entry['data_offsets'][0] % tensors[k].itemsize == 0 and (8 + length) % 8 == 0


@pytest.mark.fault('malice', 'pickle and torch.load are replaced by an alarm while a checkpoint is written and read', 'no alarm: nothing of a checkpoint is a pickle')
@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_nothing_is_pickled_or_unpickled(tmp_path, monkeypatch):
    def never(*a, **kw): raise AssertionError('pickle was called')
    for module, name in ((pickle, 'load'), (pickle, 'loads'), (pickle, 'dump'), (pickle, 'dumps'), (pickle, 'Unpickler'), (pickle, 'Pickler'), (torch, 'load'), (torch, 'save')):
        monkeypatch.setattr(module, name, never)
    with Run(tmp_path) as run:
        save(run, 1, small(1), {'step': 1}, asynchronous=True)
        assert load(run, blank(small(1)))[0] == 1
    with pytest.raises(BaseException, match='pickle was called'): dcp.save({'n': 3}, checkpoint_id=tmp_path/'other', no_dist=True)   # and the test can fail


# what is refused at the door

@pytest.mark.parametrize('name, t, says', [
    ('n', 3, 'n is a int.*pickled'), ('n', None, 'n is a NoneType'), ('n', [torch.ones(1)], 'n is a list'), ('', torch.ones(1), "''"), (3, torch.ones(1), '3 is no name'),
    ('__metadata__', torch.ones(1), '__metadata__'), ('c', torch.ones(1, dtype=torch.complex64), 'c is torch.complex64'), ('f8', torch.ones(2).to(torch.float8_e5m2), 'f8 is torch.float8'),
    ('s', torch.eye(2).to_sparse(), 'layout'), ('m', torch.ones(1, device='meta'), 'meta device'), ('q', torch.ones(2).as_subclass(type('Odd', (torch.Tensor,), {})), 'q is a Odd')])
@pytest.mark.fault('arguments', 'something that no file of numbers can hold is saved', 'refused, with the name of the tensor; nothing is written')
def test_what_no_file_of_numbers_can_hold_is_refused(tmp_path, name, t, says):
    with Run(tmp_path) as run:
        with pytest.raises(ValueError, match=says): save(run, 1, {'fine': torch.ones(1), name: t})
        assert names(run) == [] and not run.steps()


@pytest.mark.parametrize('meta, says', [
    ({'a': (1, 2)}, 'meta.a: a tuple'), ({'a': {1: 2}}, r'meta.a: the key 1'), ({'a': [float('nan')]}, r'meta.a\[0\]: nan'), ({'a': {'b': torch.ones(1)}}, 'meta.a.b: a Tensor'),
    ({'a': float('inf')}, 'inf'), ({'p': Path('x')}, 'meta.p'), ([1], 'meta: a list')])
@pytest.mark.fault('arguments', 'settings that JSON would bring back as something else are saved', 'refused, with the entry; nothing is written')
def test_meta_that_would_come_back_otherwise_is_refused(tmp_path, meta, says):
    with Run(tmp_path) as run, pytest.raises(ValueError, match=says): save(run, 1, small(1), meta)


@pytest.mark.parametrize('step, kw, says', [
    (-1, {}, 'step: -1'), (1.5, {}, 'step: 1.5'), (True, {}, 'step: True'), (1, {'keep': 1}, 'keep: 1'), (1, {'keep': None}, 'keep'), (1, {'forever': -1}, 'forever: -1')])
def test_bad_arguments_of_save(tmp_path, step, kw, says):
    with Run(tmp_path) as run, pytest.raises(ValueError, match=says): save(run, step, small(1), **kw)


def test_steps_only_grow_and_one_is_written_once(tmp_path):
    with Run(tmp_path) as run:
        path = save(run, 5, small(5), {'step': 5})
        written = (path/'manifest.json').stat().st_mtime_ns
        assert save(run, 5, small(6), {'step': 6}) == path and (path/'manifest.json').stat().st_mtime_ns == written
        with pytest.raises(ValueError, match='step: 4 came after step 5'): save(run, 4, small(4))
    with pytest.raises(ValueError, match='closed'): save(run, 6, small(6))
    with Run(tmp_path) as run:                                           # another process, which has not loaded what is there
        with pytest.raises(ValueError, match='holds a checkpoint of step 5, which this run has not read'): save(run, 9, small(9))
        load(run, blank(small(5)))
        save(run, 9, small(9), {'step': 9})
    assert newest(tmp_path) == (9, [])


def test_a_run_for_reading_changes_nothing(tmp_path):
    three(tmp_path)
    (tmp_path/'checkpoints'/'being-written-x').mkdir()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    flip(tmp_path/'checkpoints'/'step-00000003'/'meta.json', 3)
    before[tmp_path/'checkpoints'/'step-00000003'/'meta.json'] = (tmp_path/'checkpoints'/'step-00000003'/'meta.json').stat().st_mtime_ns
    assert newest(tmp_path)[0] == 2
    with Run(tmp_path, write=False) as run, pytest.raises(ValueError, match='for reading'): save(run, 9, small(9))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before


@pytest.mark.fault('configuration', 'a checkpoint is loaded into tensors of other names, shapes or types', 'it is refused, the tensors are named, and none is changed: the model that wrote it, or another checkpoint')
def test_load_is_strict_about_names_shapes_and_types(tmp_path):
    with Run(tmp_path) as run:
        save(run, 1, {'a': torch.ones(2), 'b': torch.ones(3), 'c': torch.ones(1)})
        def says(into, what, **kw):
            kept = {k: v.clone() for k, v in into.items()}
            with pytest.raises(ValueError, match=what): load(run, into, **kw)
            assert same(kept, into), 'a refused load wrote into its targets'
        says({'a': torch.zeros(2)}, 'it also has b, c')
        says({'a': torch.zeros(2), 'x': torch.zeros(1)}, 'it has no x', strict=False)
        says({'a': torch.zeros(2), 'b': torch.zeros(4), 'c': torch.zeros(1)}, r'b float32 \(3,\) instead of float32 \(4,\)')
        says({'a': torch.zeros(2).double(), 'b': torch.zeros(3), 'c': torch.zeros(1)}, r'a float32 \(2,\) instead of float64')   # DCP would convert
        with pytest.raises(ValueError, match='meta device'): load(run, {'a': torch.zeros(2, device='meta')})                 # DCP would fill others
        with pytest.raises(ValueError, match='verify'): load(run, {}, verify='none')
        with pytest.raises(ValueError, match='into: a list'): load(run, [torch.zeros(2)])
        assert load(run, some := {'b': torch.zeros(3)}, strict=False)[0] == 1 and some['b'].sum() == 3
        seen = []
        load(run, lambda names: seen.append(names) or {k: torch.zeros(n) for k, n in zip('abc', (2, 3, 1))})
        assert seen == [{'a', 'b', 'c'}]


def test_an_empty_folder_and_a_step_that_is_not_there(tmp_path):
    with Run(tmp_path) as run:
        with pytest.raises(CheckpointError, match='holds no checkpoint'): load(run, {})
        save(run, 1, small(1))
        with pytest.raises(CheckpointError, match='no checkpoint of step 2; there are 1'): load(run, blank(small(1)), step=2)
    assert 'steps 1, latest 1' in repr(run)


# damaged files

FILES = ['manifest.json', 'meta.json', 'part-00001-of-00001.safetensors']


def cut(path): path.write_bytes(path.read_bytes()[:-1])
def empty(path): path.write_bytes(b'')
def longer(path): path.write_bytes(path.read_bytes() + b'\0')
def gone(path): path.unlink()
def one_bit(path): flip(path, path.stat().st_size // 2)
def folder(path): path.unlink(); path.mkdir()


@pytest.mark.fault('disk', 'a file of a checkpoint is cut off, emptied, lengthened, removed, flipped in one bit, or a folder', 'it is noticed on loading and named; the checkpoint before is taken, the damaged one set aside; nothing to do')
@pytest.mark.parametrize('verify', ['full', 'sizes'])
@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('fault', [cut, empty, longer, gone, one_bit, folder])
def test_a_damaged_file_is_named_and_the_next_checkpoint_taken(tmp_path, fault, file, verify, tried):
    three(tmp_path)
    path = tmp_path/'checkpoints'/'step-00000003'
    fault(path/file)
    if (fault, verify, file) == (one_bit, 'sizes', FILES[2]): return    # not looked for: that is what 'sizes' says
    if (fault, file) == (longer, 'manifest.json'): assert 'not JSON' in problems(path)[file]
    assert list(problems(path, verify)) == [file]
    if fault in (cut, empty, longer) and file != 'manifest.json': assert 'bytes instead of' in problems(path, verify)[file]
    step, (said,) = newest(tmp_path, verify=verify)
    assert step == 2 and f'step-00000003/{file}' in said and 'Step 2 is taken instead' in said
    tried(said=said)


@pytest.mark.fault('disk', 'one bit flips in each byte of a manifest, of the settings and of a header', 'each is noticed before anything is believed; nothing to do')
def test_every_bit_of_the_small_files_and_of_a_header_matters(tmp_path, tried):
    flips = 0
    with Run(tmp_path) as run: path = save(run, 1, {'a': torch.arange(4.), 'b': torch.ones(2, 3).half()}, {'lr': 1e-3})
    for file in FILES:
        content = (path/file).read_bytes()
        end = 8 + int.from_bytes(content[:8], 'little') if file.endswith('tensors') else len(content)
        for k in range(end):
            flip(path/file, k, k % 8); flips += 1
            assert problems(path), f'bit {k % 8} of byte {k} of {file} was flipped, unseen'
            if file.endswith('tensors'):                                # a header is read, not hashed, where sizes are enough
                if not problems(path, 'sizes'):
                    into = {'a': torch.zeros(4), 'b': torch.zeros(2, 3).half()}
                    with Run(tmp_path, write=False) as run: load(run, into, verify='sizes')
                    assert torch.equal(into['a'], torch.arange(4.)) and torch.equal(into['b'], torch.ones(2, 3).half()), f'byte {k} of the header was changed, and the tensors with it'
            (path/file).write_bytes(content)
    assert not problems(path)
    tried(times=flips)


@pytest.mark.fault('disk', 'a file of a checkpoint has the right size and other tensors in it', 'the header does not agree with the manifest, even where no hash is computed; the checkpoint before is taken')
def test_a_file_of_the_right_size_that_holds_something_else(tmp_path):
    "Sizes and headers are looked at even where sha256 is not."
    with Run(tmp_path) as run: path = save(run, 1, {'a': torch.arange(4.), 'b': torch.ones(2, 3)})
    size = (path/FILES[2]).stat().st_size
    for pieces in ([('c', (4,)), ('b', (2, 3))], [('a', (4,)), ('b', (3, 2))]):
        C.write_part(path/FILES[2], [C.Piece(n, shape, (0,) * len(shape), torch.ones(shape)) for n, shape in pieces])
        assert (path/FILES[2]).stat().st_size == size and problems(path, 'sizes') == {FILES[2]: 'do not hold what the manifest says'}


@pytest.mark.fault('malice', 'a pickle that runs a command lies in place of each file of a checkpoint', 'it is not run: no file is unpickled; the checkpoint before is taken')
def test_a_pickle_in_place_of_a_file_is_not_run(tmp_path, tried):
    three(tmp_path)
    evil = pickle.dumps(Bomb(tmp_path/'it ran'))
    pickle.loads(evil); assert (tmp_path/'it ran').exists(); (tmp_path/'it ran').rmdir()        # it would run
    path = tmp_path/'checkpoints'/'step-00000003'
    for file in [*FILES, '.metadata']:                                   # the last is what DCP would look for
        kept = (path/file).read_bytes() if (path/file).exists() else None
        (path/file).write_bytes(evil)
        assert newest(tmp_path)[0] == (3 if kept is None else 2)
        (path/file).write_bytes(kept) if kept is not None else (path/file).unlink()
    (tmp_path/'checkpoints'/'latest').write_bytes(evil)
    assert newest(tmp_path)[0] == 3
    (tmp_path/'lock').write_bytes(evil)
    Run(tmp_path).close()
    assert not (tmp_path/'it ran').exists()
    tried(times=len(FILES) + 3)


@pytest.mark.fault('malice', 'a foreign file of tensors is put into a checkpoint', 'it is not read: only files of the signed manifest are')
def test_safetensors_that_do_not_belong_there_are_not_read(tmp_path):
    from safetensors.torch import save_file
    three(tmp_path)
    path = tmp_path/'checkpoints'/'step-00000003'
    save_file({'w': torch.zeros(40, 3), 'other': torch.ones(1)}, path/'zzz.safetensors')      # DCP's reader would take w from it
    assert newest(tmp_path) == (3, [])


@pytest.mark.fault('disk', 'all checkpoints of a run are damaged', 'loading stops and names what is wrong with each: restore one from a copy, or start again in another folder')
def test_none_intact_is_an_error_that_names_all(tmp_path, tried):
    three(tmp_path)
    for k, fault in zip((1, 2, 3), (gone, cut, one_bit)): fault(tmp_path/'checkpoints'/f'step-0000000{k}'/FILES[2])
    with pytest.raises(CheckpointError) as e: newest(tmp_path)
    for k in (1, 2, 3): assert f'step-0000000{k}/{FILES[2]}' in str(e.value)
    tried(said=e.value)
    with Run(tmp_path) as run, pytest.raises(CheckpointError, match='step-00000002'): load(run, blank(small(0)), step=2)
    assert run.newest() is None and run.steps() == [1, 2, 3]


@pytest.mark.fault('disk', 'the newest checkpoint of a run is damaged when it goes on', 'the one before is taken, the damaged one renamed, and the warning says both; nothing to do')
def test_a_run_that_falls_back_sets_the_damaged_aside_and_goes_on(tmp_path):
    three(tmp_path)
    one_bit(tmp_path/'checkpoints'/'step-00000003'/'meta.json')
    with Run(tmp_path) as run:
        with pytest.warns(UserWarning, match='moved out of the way: set-aside-step-00000003'): assert load(run, blank(small(0)))[0] == 2
        assert names(run) == ['latest', 'set-aside-step-00000003', 'step-00000001', 'step-00000002'] and run.latest() == 2
        save(run, 3, small(3), {'step': 3})
    assert newest(tmp_path) == (3, [])
    with Run(tmp_path) as run:                                           # back to an older one, on purpose: what came later is not the future of this run
        with warnings.catch_warnings(): warnings.simplefilter('error'); load(run, blank(small(0)), step=2)
        assert names(run) == ['latest', 'set-aside-step-00000003', 'set-aside-step-00000003-1', 'step-00000002'] and run.latest() == 2


def test_a_reader_finds_what_a_trainer_wrote_meanwhile(tmp_path, monkeypatch):
    "The trainer saves twice and prunes while a sampler verifies what it saw first."
    with Run(tmp_path) as run:
        save(run, 1, small(1), {'step': 1})
        real, turns = C.problems, []
        def slow(*a, **kw):
            if not turns:
                turns.append(1)
                for step in (2, 3): save(run, step, small(step), {'step': step})
            return real(*a, **kw)
        monkeypatch.setattr(C, 'problems', slow)
        assert newest(tmp_path) == (3, [])


# a write that fails, or is killed

class Fail:
    "The k-th call of a function of `os` raises."
    def __init__(self, monkeypatch, name, k, error=errno.ENOSPC):
        self.real, self.left, self.error = getattr(os, name), k, error
        monkeypatch.setattr(C.os, name, self)
    def __call__(self, *a, **kw):
        self.left -= 1
        if self.left == 0: raise OSError(self.error, os.strerror(self.error))
        return self.real(*a, **kw)


@pytest.mark.filterwarnings('ignore:the checkpoint of step 1 could not be removed')
@pytest.mark.parametrize('asynchronous', [False, True])
@pytest.mark.parametrize('name', ['fsync', 'rename', 'replace'])
def test_a_disk_that_fails_at_any_moment_leaves_an_intact_newest(tmp_path, name, asynchronous):
    failed = 0
    for k in range(1, 12):
        folder = tmp_path/str(k)
        with Run(folder) as run:
            for step in (1, 2): save(run, step, small(step), {'step': step})
            with pytest.MonkeyPatch.context() as m:
                fail = Fail(m, name, k)
                try: save(run, 3, small(3), {'step': 3}, asynchronous=asynchronous); run.wait()
                except CheckpointError as e:
                    failed += 1
                    assert 'step 3 could not be written' in str(e) and 'No space left' in str(e) and 'free some space' in str(e) and 'MB are free' in str(e)
                    assert f'latest {run.latest()}' in str(e) and all(str(s) in str(e) for s in run.steps())
            step, said = newest(folder)
            assert step in (2, 3) and said == [] and problems(run.path(run.latest())) == {}
            assert not [n for n in names(run) if n.startswith('being-written-step')], 'something half written was left'
            if step == 3: run.at = 3
            save(run, 4, small(4), {'step': 4})                          # and the run goes on
        assert newest(folder) == (4, [])
        if fail.left > 0: break
    assert failed >= {'fsync': 6, 'rename': 1, 'replace': 1}[name]


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='needs /proc to see which file is flushed')
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    def spy(name, tell):
        real = getattr(os, name)
        monkeypatch.setattr(C.os, name, lambda *a: order.append((name, tell(*a))) or real(*a))
    spy('fsync', lambda fd: Path(os.readlink(f'/proc/self/fd/{fd}')).name)
    for name in ('rename', 'replace'): spy(name, lambda a, b: Path(b).name)
    with Run(tmp_path) as run: save(run, 1, small(1))
    assert order == [('fsync', FILES[2]), ('fsync', 'meta.json'), ('fsync', 'manifest.json'), ('fsync', 'being-written-step-00000001'), ('rename', 'step-00000001'),
                     ('fsync', 'checkpoints'), ('fsync', 'being-written-latest'), ('replace', 'latest'), ('fsync', 'checkpoints')]


def test_a_checkpoint_of_another_format_is_named(tmp_path):
    with Run(tmp_path) as run: path = save(run, 1, small(1))
    manifest = json.loads((path/'manifest.json').read_bytes()) | {'format': 'flowbook checkpoint 9'}
    manifest['sha256'] = C.hashed({k: v for k, v in manifest.items() if k != 'sha256'})
    (path/'manifest.json').write_text(json.dumps(manifest))
    assert problems(path) == {'manifest.json': "is of the format 'flowbook checkpoint 9'; this version reads 'flowbook checkpoint 1'"}


def test_an_error_of_the_thread_is_heard_at_the_next_save_or_wait_or_close(tmp_path, monkeypatch):
    def broken(*a): raise OSError(errno.EIO, 'broken')
    for k, listen in enumerate((lambda run: run.wait(), lambda run: save(run, 2, small(2)), lambda run: load(run, blank(small(1))), lambda run: run.close())):
        run = Run(tmp_path/str(k))
        with pytest.MonkeyPatch.context() as m:
            m.setattr(C, 'write_part', broken)
            save(run, 1, small(1), asynchronous=True)
            run.writing.join()
        with pytest.raises(CheckpointError, match='step 1 .*broken.*no older checkpoint'): listen(run)
        run.wait()                                                       # it is heard once
        run.close()
        Run(tmp_path/str(k)).close()                                     # and the lock is free


def test_leaving_a_run_by_an_error_waits_and_keeps_that_error(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with Run(tmp_path) as run: save(run, 1, small(1), {'step': 1}, asynchronous=True); 1 / 0
    assert newest(tmp_path) == (1, [])


def test_an_asynchronous_save_holds_what_was_when_it_was_called(tmp_path, monkeypatch):
    go, real = threading.Event(), C.write_part
    monkeypatch.setattr(C, 'write_part', lambda *a: go.wait(20) and real(*a))
    tensors = numbers()
    want = {k: v.detach().clone() for k, v in tensors.items()}
    with Run(tmp_path) as run:
        save(run, 1, tensors, asynchronous=True)
        assert run.writing.is_alive() and run.steps() == []              # it has not been written yet
        with torch.no_grad():
            for t in {t.untyped_storage().data_ptr(): t for t in tensors.values()}.values():
                if not t.is_neg() and t.numel() and t.stride() and 0 not in t.stride(): t.zero_()
        go.set(); run.wait()
        load(run, into := blank(want))
    assert same(want, into) and not same(want, tensors)


def in_child(f):
    "Run f in a forked process; its pid. The child never returns."
    if pid := os.fork(): return pid
    try: f()
    finally: os._exit(1)


def kill(pid):
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)


@pytest.mark.fault('processes', 'SIGKILL at random moments of writing checkpoints', 'the newest whole checkpoint is loaded, half ones are cleared away; start again')
def test_sigkill_at_random_moments_of_a_write(tmp_path, tried):
    rng, at, step = random.Random(0), set(), 0
    def train():
        with Run(tmp_path) as run:
            if run.steps(): load(run, blank(small(0)))
            for step in range((run.at or 0) + 1, 10**6): save(run, step, small(step), {'step': step}, asynchronous=step % 2 == 0)
    for k in range(100):
        if k >= 20 and step > 20 and 'being-written' in at: break             # on a busy machine some are killed before they have begun
        pid = in_child(train)
        time.sleep(.03 + .1 * rng.random())
        kill(pid)
        if not (tmp_path/'checkpoints'/'latest').exists(): continue
        run = Run(tmp_path, write=False)
        assert not problems(run.path(run.latest())), '`latest` names something broken'
        step, said = newest(tmp_path)
        assert said == [] and all(not problems(run.path(s)) for s in run.steps()), 'a half checkpoint has the name of a whole one'
        at |= {n.split('-step')[0] for n in names(run) if not n.startswith(('step', 'latest'))}
        later = Run(tmp_path); later.close()                              # the lock is free; what was left is cleared away
        assert all(n.startswith(('step', 'latest')) for n in names(run)) and later.latest() == later.steps()[-1] == step
    assert step > 20 and 'being-written' in at, 'no kill hit a write'
    tried(times=k)


@pytest.mark.fault('processes', 'a run is killed while its workers live on', 'the system frees the lock; the folder can be used at once; start again')
def test_a_dead_process_holds_no_lock_and_neither_do_its_children(tmp_path):
    def hold():
        with Run(tmp_path):
            in_child(lambda: (tmp_path/'worker').write_text(str(os.getpid())) and time.sleep(120))     # as a loader forks its workers
            time.sleep(120)
    pid = in_child(hold)
    while not (tmp_path/'worker').exists() or not (tmp_path/'worker').read_text(): time.sleep(.01)     # it runs, and so has left the lock
    with pytest.raises(CheckpointError, match=f'{tmp_path} is in use by process {pid} on {socket.gethostname()} since 20'): Run(tmp_path)
    Run(tmp_path, write=False).close()                                    # looking is allowed
    kill(pid)
    worker = int((tmp_path/'worker').read_text())
    os.kill(worker, 0)                                                    # the orphan lives, and holds no lock
    Run(tmp_path).close()
    os.kill(worker, signal.SIGKILL)


@pytest.mark.fault('processes', 'two runs are started in one folder', 'the second is refused with the process, host and time of the first, and writes nothing; a dead process holds nothing: wait, or give another folder')
def test_the_lock_says_what_it_knows(tmp_path):
    with Run(tmp_path):
        with pytest.raises(CheckpointError, match='give another folder; a dead process holds no lock'): Run(tmp_path)
        (tmp_path/'lock').write_text('')
        with pytest.raises(CheckpointError, match='in use by another process'): Run(tmp_path)
    Run(tmp_path).close()
    (tmp_path/'file').write_text('')
    with pytest.raises(CheckpointError, match='A file is in the way'): Run(tmp_path/'file')
    assert isinstance(Lock(tmp_path/'lock'), Lock)


@pytest.mark.fault('processes', 'SIGKILL between a checkpoint and its name in `latest`', 'the checkpoint is whole and counts; `latest` is mended; nothing to do')
def test_killed_between_the_rename_and_latest(tmp_path, monkeypatch):
    three(tmp_path)
    (tmp_path/'checkpoints'/'latest').write_text('step-00000002\n')
    assert newest(tmp_path)[0] == 3                                       # what is whole counts
    Run(tmp_path).close()
    assert (tmp_path/'checkpoints'/'latest').read_text() == 'step-00000003\n'


def test_pruning(tmp_path):
    with Run(tmp_path) as run:
        for step in range(1, 13): save(run, step, small(step), {'step': step}, keep=2, forever=5)
        assert run.steps() == [5, 10, 11, 12]
        save(run, 13, small(13), {'step': 13}, keep=4)
        assert run.steps() == [10, 11, 12, 13]


def test_a_hundred_saves_leave_no_thread_file_or_memory_behind(tmp_path):
    import gc, resource
    count = lambda: (len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0, threading.active_count())
    with Run(tmp_path) as run:
        tensors = {'w': torch.zeros(200_000)}
        for step in range(1, 101):
            save(run, step, tensors, asynchronous=True)
            if step == 10: run.wait(); gc.collect(); before, peak = count(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run.wait(); gc.collect()
        assert count() == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 30_000, 'memory grew'      # kB; a hundred copies are 80,000


def test_the_grid_of_pieces():
    grid = lambda *cuts: [(tuple(o for o, _ in c), tuple(s for _, s in c)) for c in __import__('itertools').product(*cuts)]
    assert C.is_grid((), [((), ())]) and C.is_grid((0, 3), [((0, 0), (0, 3))])
    whole = grid([(0, 3), (3, 2)], [(0, 1), (1, 1), (2, 2)])
    assert C.is_grid((5, 4), whole)
    for k in range(len(whole)): assert not C.is_grid((5, 4), whole[:k] + whole[k + 1:]), 'a hole'
    assert not C.is_grid((5, 4), whole + whole[:1]) and not C.is_grid((6, 4), whole) and not C.is_grid((5, 4), [])
    assert not C.is_grid((4,), [((0,), (2,)), ((1,), (2,))])              # as many numbers as there are, and yet a hole
    with pytest.raises(ValueError, match='pieces of w are not the whole'): C.layout([C.Row('w', 'float32', (4,), (0,), (2,))])
    with pytest.raises(ValueError, match='w is of two types'): C.layout([C.Row('w', 'float32', (4,), (0,), (4,)), C.Row('w', 'float64', (4,), (0,), (4,))])


def test_who_writes_what():
    r = lambda name, n, at=0, of=None: C.Row(name, 'float32', (of or n,), (at,), (n,))
    plain = [r('a', 100), r('b', 60), r('c', 30), r('d', 5)]
    rows = [plain + [r('s', 50, 0, 90)], plain + [r('s', 40, 50, 90)]]
    todo = C.share_out(rows)
    taken = [rows[k][i] for k, mine in enumerate(todo) for i in mine]
    assert sorted(taken) == sorted(set(rows[0]) | set(rows[1])) and len(taken) == len(set(taken))
    assert todo[0][-1] is not None and 4 in todo[0] and 4 in todo[1]      # a shard is written by the rank that has it
    heavy = [sum(rows[k][i].bytes() for i in mine) for k, mine in enumerate(todo)]
    assert max(heavy) / sum(heavy) < .6


# a training

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        self.extra = nn.Linear(2, 2)                                      # never has a gradient
    def forward(self, x): return self[3](self[2](self[1](self[0](x))))


def net():
    torch.manual_seed(0)
    return Net()


class Goal(nn.Module):
    def __init__(self): super().__init__(); self.head = nn.Linear(2, 1); self.register_buffer('seen', torch.zeros((), dtype=torch.long))
    def forward(self, flow, x): self.seen += 1; return self.head(flow(x)).square().mean()


def training(fused):
    flow, goal = net(), Goal()
    for p in goal.head.parameters(): nn.init.constant_(p, .1)
    opt = torch.optim.AdamW([*flow.parameters(), *goal.parameters()], 1e-2, fused=fused)
    return flow, goal, opt, ema(flow, .9)


def go(state, first, last):
    flow, goal, opt, average = state
    for k in range(first, last):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(k))
        opt.zero_grad(); goal(flow, x).backward(); opt.step(); average.update_parameters(flow)


@pytest.mark.parametrize('fused', [True, False])
def test_a_training_goes_on_bit_for_bit(tmp_path, fused):
    whole = training(fused); go(whole, 0, 9)
    one = training(fused); go(one, 0, 4)
    with Run(tmp_path) as run: save(run, 4, pack(*one))
    two = training(fused); go(two, 20, 23)                                # one that already has another state
    assert not same(pack(*two), pack(*one))
    with Run(tmp_path) as run: assert load(run, lambda names: pack(*two, names))[0] == 4
    assert same(pack(*two), pack(*one)); go(two, 4, 9)
    assert same(pack(*two), pack(*whole))
    assert 'opt.step.flow.0.weight' in pack(*two) and 'opt.exp_avg.objective.head.weight' in pack(*two) and 'ema.n_averaged' in pack(*two)
    assert 'opt.step.flow.extra.weight' not in pack(*two) and 'flow.extra.weight' in pack(*two) and 'flow.1.running_mean' in pack(*two)


def test_the_state_that_pack_makes_is_the_one_adamw_makes():
    for kw in ({'fused': True}, {'fused': False}, {'amsgrad': True, 'fused': False}, {'capturable': False, 'foreach': True}):
        made, own = net(), net()
        a, b = (torch.optim.AdamW(m.parameters(), 1e-3, **kw) for m in (made, own))
        own[0](torch.randn(2, 4)).sum().backward(); b.step()
        want = pack(own, None, b)
        got = pack(made, None, a, names=set(want))
        assert {k: (v.dtype, v.shape, v.device) for k, v in got.items()} == {k: (v.dtype, v.shape, v.device) for k, v in want.items()}
        assert not any(v.requires_grad for k, v in got.items() if k.startswith('opt.'))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        m = nn.Linear(2, 2); opt = torch.optim.AdamW(m.parameters(), fused=False); m(torch.ones(1, 2)).sum().backward(); opt.step()
        want, opt.state = pack(m, None, opt), type(opt.state)(dict)
        assert {k: v.dtype for k, v in pack(m, None, opt, names=set(want)).items()} == {k: v.dtype for k, v in want.items()}
    finally: torch.set_default_dtype(before)


def test_an_optimizer_of_other_parameters_is_refused():
    with pytest.raises(ValueError, match=r'shape \(1, 2\) that belongs to neither flow nor objective'): pack(net(), None, torch.optim.AdamW(Goal().parameters()))


def test_a_training_without_optimizer_state_yet(tmp_path):
    one, two = training(True), training(True)
    go(two, 0, 2)
    with Run(tmp_path) as run:
        save(run, 0, pack(*one)); load(run, lambda names: pack(*two, names))
    assert same(pack(*one), pack(*two)) and not two[2].state


def test_weights_are_copies_on_the_cpu():
    m = net()
    w = weights(m)
    assert same(w, dict(m.state_dict()))
    w['0.weight'].zero_()
    assert m[0].weight.abs().sum() > 0 and all(t.is_contiguous() and not t.requires_grad for t in w.values())


# a real disk

@contextlib.contextmanager
def tmpfs(path, size):
    path.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(path)], capture_output=True).returncode: pytest.skip('mounting a tmpfs is not permitted here')
    try: yield path
    finally: subprocess.run(['umount', '-l', str(path)], check=True)


@pytest.mark.fault('disk', 'the disk is full while a checkpoint is written', 'the save fails and says so with the bytes that are free; older checkpoints are as they were: free some space, start again')
@pytest.mark.slow
@pytest.mark.parametrize('asynchronous', [False, True])
def test_a_full_disk(tmp_path, asynchronous, tried):
    big = lambda step: {'w': torch.full((300_000,), float(step)), 'n': torch.tensor(step)}       # 1.2 MB
    with tmpfs(tmp_path/'disk', '4m') as disk, Run(disk/'run') as run:
        for step in (1, 2): save(run, step, big(step), {'step': step})
        (disk/'other').write_bytes(bytes(10**6))
        with pytest.raises(CheckpointError, match=r'step 3 .*No space left.*free some space.*MB are free; as they were: steps 1, 2, latest 2') as e:
            save(run, 3, big(3), {'step': 3}, asynchronous=asynchronous); run.wait()
        tried(said=e.value)
        assert names(run) == ['latest', 'step-00000001', 'step-00000002'] and not problems(run.path(2))
        load(run, into := blank(big(0))); assert same(into, big(2))
        (disk/'other').unlink()
        save(run, 3, big(3), {'step': 3})                                 # there is room again
        assert run.steps() == [2, 3]
        (disk/'fill').write_bytes(bytes(1)); run.close()
        with contextlib.suppress(OSError), open(disk/'fill', 'wb') as f:
            while True: f.write(bytes(4096)); f.flush()
        with Run(disk/'run', write=False) as reader: assert load(reader, blank(big(0)))[0] == 3
        with Run(disk/'run') as again: assert load(again, blank(big(0)))[0] == 3                 # a lock that cannot be signed is a lock


@pytest.mark.fault('disk', 'the disk has become read-only', 'a run is refused with that word; loading still works: have it mounted for writing, or take another folder')
@pytest.mark.slow
def test_a_read_only_disk(tmp_path, tried):
    with tmpfs(tmp_path/'disk', '4m') as disk:
        three(disk/'run')
        with Run(disk/'run') as run:
            load(run, blank(small(0)))
        subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
        with pytest.raises(CheckpointError, match='read-only'): Run(disk/'run')
        with pytest.raises(CheckpointError, match='read-only') as e: Run(disk/'new')
        tried(times=2, said=e.value)
        assert newest(disk/'run') == (3, [])


# many processes

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def launch(work, world, *args, fails=False):
    import torch.multiprocessing as mp
    if world == 1: return work(0, 1, 0, *args)
    mp.start_processes(work, (world, free_port(), *args), world, start_method='fork')    # no second import of torch


@contextlib.contextmanager
def joined(rank, world, port):
    torch.set_num_threads(1)
    if world > 1: dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=world)
    try: yield
    finally:
        if world > 1: dist.destroy_process_group()


def sharded(module):
    from torch.distributed.fsdp import fully_shard
    for layer in module:
        if isinstance(layer, nn.Linear): fully_shard(layer)
    fully_shard(module)
    return module


def work_train(rank, world, port, folder, shard, first, last):
    with joined(rank, world, port):
        torch.manual_seed(0)
        flow = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).double()   # uneven over 2 and 4; a bias of one number
        average = ema(flow, .9)
        if shard: sharded(flow), sharded(average.module)
        opt = torch.optim.AdamW(flow.parameters(), 1e-2, fused=False, foreach=False)
        with Run(folder) as run:
            if first: assert load(run, lambda names: pack(flow, None, opt, average, names))[0] == first
            for k in range(first, last):
                x = torch.randn(12, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
                loss = flow(x[rank * 12 // world:(rank + 1) * 12 // world]).square().sum() / 12
                opt.zero_grad(); (loss * world if shard else loss).backward()       # FSDP2 takes the mean
                if world > 1 and not shard:
                    for p in flow.parameters(): dist.all_reduce(p.grad)
                opt.step(); average.update_parameters(flow)
                save(run, k + 1, pack(flow, None, opt, average), {'world': world}, asynchronous=k % 2 == 0)
        whole = weights(flow) | {f'ema.{k}': v for k, v in weights(average).items()}
        assert bool(whole) == (rank == 0)
        if rank == 0:
            from safetensors.torch import save_file
            save_file(whole, Path(folder)/f'weights-{last}.safetensors')


@pytest.mark.fault('configuration', 'a checkpoint is gone on with in another number of processes', 'it goes on, whole or sharded, and computes what one process computes; nothing to do')
@pytest.mark.slow
def test_worlds_of_2_1_4_and_2_sharded_and_whole_go_on_as_one_process_would(tmp_path):
    from safetensors.torch import load_file
    launch(work_train, 1, tmp_path/'one', False, 0, 9)
    for world, shard, first, last in ((2, True, 0, 3), (1, False, 3, 5), (4, True, 5, 7), (2, False, 7, 9)):
        launch(work_train, world, tmp_path/'many', shard, first, last)
        assert json.loads((tmp_path/'many'/'checkpoints'/f'step-{last:08d}'/'manifest.json').read_text())['world'] == world
    a, b = (load_file(tmp_path/f/'weights-9.safetensors') for f in ('one', 'many'))
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-10)


def placed(mesh1, mesh2, seed=0):
    "Tensors of every placement: of a line of 4 ranks, and of a square of 2 x 2."
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    g, R, S = torch.Generator().manual_seed(seed), Replicate(), Shard
    r = lambda *shape: torch.randn(shape, generator=g)
    whole = {'plain': r(5, 3), 'even': r(8, 2), 'uneven': r(6, 2), 'fewer rows than ranks': r(3, 2), 'one': r(1), 'columns': r(2, 7), 'none': r(0, 3), 'number': r(),
             'both': r(5, 6), 'twice': r(7, 2), 'copies': r(5, 2), 'mirrored': r(4, 5), 'half': r(6, 3).half(), 'flags': r(9) > 0}
    how = {'even': (mesh1, [S(0)]), 'uneven': (mesh1, [S(0)]), 'fewer rows than ranks': (mesh1, [S(0)]), 'one': (mesh1, [S(0)]), 'columns': (mesh1, [S(1)]), 'none': (mesh1, [S(1)]),
           'number': (mesh1, [R]), 'both': (mesh2, [S(0), S(1)]), 'twice': (mesh2, [S(0), S(0)]), 'copies': (mesh2, [R, S(0)]), 'mirrored': (mesh2, [S(1), R]), 'half': (mesh2, [S(1), S(0)]), 'flags': (mesh1, [S(0)])}
    return whole, {k: distribute_tensor(v, *how[k]) if k in how and mesh1 else v.clone() for k, v in whole.items()}


def raises(kind, match, f, *a, **kw):
    with pytest.raises(kind, match=match): f(*a, **kw)


def work_place(rank, world, port, folder):
    "Four ranks: every placement; and every error is one of all ranks, at once."
    with joined(rank, world, port):
        from torch.distributed.device_mesh import init_device_mesh
        mesh1, mesh2 = init_device_mesh('cpu', (4,)), init_device_mesh('cpu', (2, 2))
        whole, tensors = placed(mesh1, mesh2)
        with Run(folder) as run:
            for asynchronous in (False, True): save(run, 1 + asynchronous, tensors, {'world': 4}, asynchronous=asynchronous)
            _, into = placed(mesh1, mesh2, seed=1)
            assert load(run, into) == (2, {'world': 4})
            for k, v in into.items(): assert torch.equal(v.full_tensor() if hasattr(v, 'full_tensor') else v, whole[k]), k
            assert load(run, plain := blank(whole)) == (2, {'world': 4}) and same(plain, whole)                  # the whole of it on every rank
            manifest = json.loads((run.path(2)/'manifest.json').read_text())
            sizes = [f['bytes'] for n, f in manifest['files'].items() if n.startswith('part')]
            assert len(sizes) == 4 and sum(sizes) < sum(v.nbytes for v in whole.values()) + 4 * 3000              # each number once

            # arguments that differ between ranks; one rank's mistake
            raises(ValueError, 'tensors: rank 2 gave something else', save, run, 3, {**tensors, **({'more': torch.ones(1)} if rank == 2 else {})})
            raises(ValueError, 'meta: rank 1 gave something else', save, run, 3, tensors, {'rank': min(rank, 1) if rank < 2 else 0})
            raises(ValueError, 'step: rank 3 gave something else', save, run, 3 + (rank == 3), tensors)
            raises(ValueError, 'n is a int', save, run, 3, {**tensors, **({'n': 3} if rank == 2 else {})})
            raises(ValueError, 'does not fit; it has no x', load, run, {**into, **({'x': torch.ones(1)} if rank == 1 else {})})

            # a disk that fails on one rank
            before, real = names(run), C.write_part
            def full(*a):
                if rank == 2: raise OSError(errno.ENOSPC, 'No space left on device')
                return real(*a)
            for asynchronous in (False, True):
                C.write_part = full
                def attempt(): save(run, 3, tensors, asynchronous=asynchronous); run.wait()
                raises(CheckpointError, 'No space left.*free some space.*latest 2', attempt)
                C.write_part = real
                assert run.every(lambda: names(run))[0] == before
            # two conversations at once: while a checkpoint is written, the ranks may talk
            C.write_part = lambda *a: time.sleep(.2 * rank) or real(*a)
            save(run, 3, tensors, {'world': 4}, asynchronous=True)
            for k in range(20): assert run.every(lambda: (rank, k)) == [(r, k) for r in range(4)]
            run.wait(); C.write_part = real

            # a bit of one rank's file: all take the older one, one of them says so
            run.every(lambda: rank or one_bit(run.path(3)/'part-00003-of-00004.safetensors'))
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter('always')
                assert load(run, into)[0] == 2 and run.at == 2
            assert [('part-00003-of-00004' in str(w.message)) for w in seen if 'taken instead' in str(w.message)] == ([True] if rank == 0 else [])
            raises(CheckpointError, 'in use by process', Run, folder)                                             # on every rank
            raises(CheckpointError, 'a-file', Run, Path(folder)/'a-file') if (rank or (Path(folder)/'a-file').write_text('') is not None) else None
        assert run.lock is None


@pytest.mark.fault('processes', 'one of four processes meets a full disk, gives other arguments, or finds a damaged file', 'all four raise the same error at once, or all take the older checkpoint; nobody waits for anybody')
@pytest.mark.slow
def test_four_ranks_every_placement_and_every_error_together(tmp_path):
    launch(work_place, 4, tmp_path)
    whole, _ = placed(None, None)
    with Run(tmp_path, write=False) as run:
        assert load(run, into := blank(whole)) == (2, {'world': 4}) and same(into, whole)                         # by one process
    for file in sorted(p.name for p in run.path(2).iterdir()):
        flip(run.path(2)/file, run.path(2).joinpath(file).stat().st_size // 2)
        assert list(problems(run.path(2))) == [file]
        flip(run.path(2)/file, run.path(2).joinpath(file).stat().st_size // 2)


def work_killed(rank, world, port, folder, gate):
    with joined(rank, world, port), Run(folder, timeout=60) as run:
        save(run, 1, small(1), {'step': 1})
        real = C.write_part
        def stop(*a):
            if rank == 1: Path(gate).write_text('now'); os.kill(os.getpid(), signal.SIGKILL)
            return real(*a)
        C.write_part = stop
        began = time.monotonic()
        raises(CheckpointError, 'step 2 could not be written.*latest 1', save, run, 2, small(2))
        assert time.monotonic() - began < 30, 'the others waited for the dead'
        Path(f'{folder}/heard-{rank}').write_text('')


def work_many(rank, world, port, folder, rounds):
    "What a process holds after one run and after many: threads, open files. And a closed run is closed."
    count = lambda: (len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd')))
    with joined(rank, world, port):
        for k in range(rounds):
            with Run(f'{folder}/{k}') as run: save(run, 1, small(1), asynchronous=True)
            if k % 3 == 0: raises(CheckpointError, 'in the way', Run, f'{folder}/0/lock')                 # a mistake leaves nothing, either
            if k == 0: first = count()
        raises(ValueError, 'is closed', load, run, small(1))
        last = count()
        assert all(b <= a + 1 for a, b in zip(first, last)), f'{first} threads and open files after one run, {last} after {rounds}'


@pytest.mark.slow
@pytest.mark.fault('time', 'two processes open and close dozens of runs, one after the other', 'threads and open files stay as many as after the first')
def test_runs_leave_no_threads_and_files_behind(tmp_path, tried):
    launch(work_many, 2, tmp_path, 25)
    tried(times=25)


@pytest.mark.fault('processes', 'one of two processes is killed in the middle of writing a checkpoint', 'the other stops within the step; the checkpoint before is whole; start again')
@pytest.mark.slow
def test_a_rank_that_is_killed_in_the_middle_of_a_write(tmp_path):
    import torch.multiprocessing as mp
    with pytest.raises(mp.ProcessExitedException, match='SIGKILL'): launch(work_killed, 2, tmp_path, tmp_path/'gate')
    assert (tmp_path/'gate').exists()
    run = Run(tmp_path)                                                   # no lock is left, and what was half written goes
    assert names(run) == ['latest', 'step-00000001']
    run.close()
    assert newest(tmp_path) == (1, [])
