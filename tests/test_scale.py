"""Many processes compute what one computes; a run that was stopped goes on as if it had not been."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import in_ranks
from scale_ranks import KINDS, SHARDED, begin, compare, left_out, once, same, through, train as train_kind
from torch import nn

from flowbook import scale
from flowbook.checkpoint import CheckpointError, Run, problems
from flowbook.configs import CONFIGS, changed, find_config, override
from flowbook.data import InMemory, batches, load
from flowbook.flows import shake
from flowbook.scale import Parallel, Stop, World, buckets, compiling, in_buckets, layers_of, leaves, recomputing, train, units
from flowbook.tarflow import TarFlow
from flowbook.train import NLL, NonFiniteLoss, fit


def small(seed=0):
    torch.manual_seed(seed)
    return shake(TarFlow(8, 1, 2, 16, 2, 2, 8, classes=10), .05)


def tensors(folder, step):
    from safetensors.torch import load_file
    return {k: v for p in sorted((Path(folder)/'checkpoints'/f'step-{step:08d}').glob('*.safetensors')) for k, v in load_file(p).items()}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# one process

def test_alone_parallel_is_the_plain_loop_to_the_last_bit():
    flows = [small(), small()]
    logs = [list(fit(f, batches(load('digits'), 32), steps=6, every=2, loop=loop)) for f, loop in zip(flows, (None, Parallel(World())))]
    assert all(torch.equal(p, q) for p, q in zip(*(f.parameters() for f in flows)))
    assert [[l[k] for k in ('step', 'loss', 'grad_norm', 'lr')] for l in logs[0]] == [[l[k] for k in ('step', 'loss', 'grad_norm', 'lr')] for l in logs[1]]


@pytest.mark.parametrize('kind', ['nll', 'reverse', 'simflow'])
def test_micro_batches_add_up_to_the_batch(kind):
    (l1, g1, p1), (l2, g2, p2) = (train_kind(kind, torch.float64, world=World(), accumulate=k, steps=4) for k in (1, 4))
    assert max(abs(a - b) for a, b in zip(l1, l2)) < 1e-6 and max((a - b).abs().max() for a, b in zip(p1, p2)) < 1e-10


def test_clipping_is_pytorchs():
    for most in (1e-3, 1., 1e3):
        grads = [torch.randn(5, 3), torch.randn(7)]
        a, b = ([nn.Parameter(torch.zeros_like(g)) for g in grads] + [nn.Parameter(torch.zeros(2))] for _ in range(2))
        for p, q, g in zip(a, b, grads): p.grad, q.grad = g.clone(), g.clone()
        assert torch.equal(Parallel(World()).clip(a, most), nn.utils.clip_grad_norm_(b, most))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(a[:2], b[:2])) and a[2].grad is None


def test_buckets_hold_everything_once_and_are_bounded():
    some = [torch.arange(float(k)) for k in (3, 0, 50, 4, 4, 9)] + [torch.ones(2, 2, dtype=torch.float64)]
    found = list(buckets(some, 10))
    assert sorted(id(t) for b in found for t in b) == sorted(map(id, some))
    assert all(len(b) == 1 or sum(t.numel() for t in b) <= 10 for b in found) and all(len({t.dtype for t in b}) == 1 for b in found)
    before = [t.clone() for t in some]
    in_buckets(some, lambda flat: flat.add_(1))
    assert all(torch.equal(a, b + 1) for a, b in zip(some, before))
    mixed = [torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.long, device='meta'), torch.zeros(3, dtype=torch.long)]
    assert sorted(len(b) for b in buckets(mixed)) == [1, 2]               # of two devices: never in one message


@pytest.mark.parametrize('change', [(recomputing,), (recomputing, recomputing)])
@pytest.mark.parametrize('kind', ['nll', 'forward', 'detach', 'reverse', 'simflow'])
def test_recomputing_changes_nothing_but_memory(kind, change):
    found = [train_kind(kind, torch.float64, steps=2, change=[lambda m: [f(l) for l in layers_of(m) for f in c]]) for c in ((), change)]
    assert found[0][0] == found[1][0] and all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2]))


def test_a_copy_of_a_recomputing_layer_runs_on_its_own_weights():
    flow, b = small(), next(batches(load('digits'), 4))
    for layer in layers_of(flow): recomputing(layer)
    other = copy.deepcopy(flow)
    with torch.no_grad():
        for p in other.parameters(): p.mul_(1.1)
    assert not torch.equal(flow.log_prob(b.x, b.y), other.log_prob(b.x, b.y))
    assert len({type(l) for l in layers_of(flow)}) == 1 and list(flow.state_dict()) == list(small().state_dict())


def test_recomputing_keeps_less():
    from flowbook.scripts.bench import peak_memory
    torch.manual_seed(0)
    def peak(change):
        flow, x = TarFlow(8, 3, 1, 32, 2, 4, 16), torch.randn(8, 3, 8, 8)
        for layer in layers_of(flow): change(layer)
        NLL()(flow, x, None)
        return peak_memory(lambda: NLL()(flow, x, None), 'cpu')
    assert peak(recomputing) < .5 * peak(lambda layer: None)


def test_units_hold_every_parameter_once():
    for model in (small(), KINDS['simflow']()[0]):
        found, seen = units(model), set()
        for m in found:
            own = {id(p) for p in m.parameters()} - seen
            assert own, f'{type(m).__name__} has nothing of its own'
            seen |= own
        assert seen == {id(p) for p in model.parameters()}


def test_a_signal_is_told_once_closed_it_is_as_before():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    stop = Stop(World())
    assert not stop.told()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.told() and stop.seen == 'SIGTERM'
    stop.close()
    assert {s: signal.getsignal(s) for s in before} == before


def test_a_signal_that_is_ignored_stays_ignored_and_the_second_ctrl_c_is_the_old_one(monkeypatch):
    was = signal.signal(signal.SIGHUP, signal.SIG_IGN)                           # as nohup does
    try:
        stop = Stop(World())
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.told() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        monkeypatch.setitem(sys.modules, 'ipykernel', sys)                         # a notebook's kernel is not to die of it
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.told() and stop.seen == 'SIGINT'
        with pytest.raises(KeyboardInterrupt): os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        stop.quiet(); signal.signal(signal.SIGHUP, was)


def test_join_names_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match='device.*tpu'): scale.join('tpu')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='wants a GPU of its own, and there are 0'): scale.join('cuda')
    assert scale.join('cpu') == World()


def test_leaves_are_keys_of_overrides():
    assert leaves({'a': {'b': 1, 'c': {'d': [2]}}, 'e': None}) == {'a.b': 1, 'a.c.d': [2], 'e': None}


# whole runs in one process

def few(n=40):
    x, y = load('digits').batch(range(n))
    digits = load('digits')
    return InMemory(digits.images[:n], digits.labels[:n], digits.classes, digits.levels, 'digits, some')


def tiny(*more, steps=8, name='digits-rrepa-64'):
    return override(find_config(name), [f'optim.steps={steps}', 'optim.batch_size=16', 'system.workers=0', 'flow.blocks=2', 'flow.layers=1', 'align.blocks=1,2', 'align.layer=1', 'data.samples=40', *more])


def quick(c, out, **kw): return train(c, out, **{**dict(every=1, save_every=1, keep=100, device='cpu', console=None, data=few(), tensorboard=False), **kw})


@pytest.mark.fault('processes', 'a run ends after any of its steps and is started again', 'weights, average and optimiser end with the same bits; nothing to do')
@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_going_on_is_bitwise_at_every_step(tmp_path, workers, tried):
    "40 samples, batches of 16: steps 3 and 5 and 8 straddle or end epochs. Average, optimiser, schedule, noise, flips and dropped labels are all in what is compared."
    c = tiny(f'system.workers={workers}', 'optim.ema=0.9')
    quick(c, tmp_path/'whole')
    want = tensors(tmp_path/'whole', 8)
    assert {k.split('.')[0] for k in want} == {'flow', 'objective', 'ema', 'opt'}
    for k in range(1, 8):
        (to := tmp_path/f'from-{k}').mkdir()
        shutil.copytree(tmp_path/'whole'/'checkpoints'/f'step-{k:08d}', to/'checkpoints'/f'step-{k:08d}')
        assert quick(c, to, save_every=100) == scale.Outcome('done', 8, to/'model')
        assert equal(tensors(to, 8), want), f'from step {k}'
    tried(times=7)
    lines = {l['step']: l for l in map(json.loads, (tmp_path/'whole'/'log.jsonl').read_text().splitlines()) if 'loss' in l}
    again = {l['step']: l for l in map(json.loads, (tmp_path/'from-3'/'log.jsonl').read_text().splitlines()) if 'loss' in l}
    assert sorted(again) == [4, 5, 6, 7, 8] and all(again[k][w] == lines[k][w] for k in again for w in ('loss', 'grad_norm', 'lr', 'align'))


def test_a_run_that_is_done_stays_as_it_is(tmp_path):
    c = tiny(steps=3)
    quick(c, tmp_path/'a')
    before = tensors(tmp_path/'a', 3)
    shutil.rmtree(tmp_path/'a'/'model')
    assert quick(c, tmp_path/'a').state == 'done' and equal(before, tensors(tmp_path/'a', 3)) and (tmp_path/'a'/'model'/'model.safetensors').exists()


@pytest.mark.fault('processes', 'a run of one process gets SIGTERM between two saves', 'it saves at that step; gone on with, it ends with the bits of a run that was not stopped; start again')
def test_told_to_stop_it_saves_at_that_step_and_goes_on(tmp_path):
    c = tiny()
    quick(c, tmp_path/'whole', save_every=100)
    told = quick(c, tmp_path/'a', save_every=100, console=lambda line: os.kill(os.getpid(), signal.SIGTERM) if 'step 3 of' in line else None)
    assert told.state == 'stopped' and told.step == 4 and Run(tmp_path/'a', write=False).steps() == [4]
    assert quick(c, tmp_path/'a', save_every=100).state == 'done' and equal(tensors(tmp_path/'a', 8), tensors(tmp_path/'whole', 8))


CTRL_C = pytest.mark.fault('processes', 'Ctrl-C, or the terminal of a training closes (SIGINT, SIGHUP)', 'it saves at that step and leaves with status 75; Ctrl-C twice ends at once, and what was saved is intact; the same command goes on')


@CTRL_C
@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_and_leave(tmp_path, sign):
    c = tiny()
    told = quick(c, tmp_path/'a', save_every=100, console=lambda line: os.kill(os.getpid(), sign) if 'step 3 of' in line else None)
    assert told.state == 'stopped' and told.step == 4 and Run(tmp_path/'a', write=False).steps() == [4]
    assert [l['by'] for l in map(json.loads, (tmp_path/'a'/'log.jsonl').read_text().splitlines()) if l.get('event') == 'stopped'] == [sign.name]
    quick(c, tmp_path/'whole', save_every=100)
    assert quick(c, tmp_path/'a', save_every=100).state == 'done' and equal(tensors(tmp_path/'a', 8), tensors(tmp_path/'whole', 8))


# a new run from another's checkpoint, or from weights

def events(folder, kind): return [l for l in map(json.loads, (folder/'log.jsonl').read_text().splitlines()) if l.get('event') == kind]


FROM = pytest.mark.fault('configuration', 'a run is to go on with another learning rate, noise or precision, in a new folder: --from RUN@STEP', 'it begins with the weights, average and optimiser of that step; unchanged, it ends with the same bits; both runs and what differs are in its log; nothing to do')


@FROM
def test_a_new_run_begins_from_a_step_of_another(tmp_path, tried):
    c, lines = tiny('optim.ema=0.9'), []
    quick(c, tmp_path/'a')
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'a').rglob('*')}
    assert quick(c, tmp_path/'b', start=f'{tmp_path}/a@3', save_every=100).state == 'done'
    assert equal(tensors(tmp_path/'a', 8), tensors(tmp_path/'b', 8)) and equal(tensors(tmp_path/'a', 3), tensors(tmp_path/'b', 3))
    other = override(c, ['optim.lr=1e-4', 'optim.warmup=1', 'optim.clip=0.5', 'optim.ema=0.5', 'noise.sigma=0.2', 'seed=3', 'system.checkpoint=true'])
    done = quick(other, tmp_path/'c', start=f'{tmp_path}/a@5', console=lines.append)
    assert done == scale.Outcome('done', 8, tmp_path/'c'/'model') and [l['step'] for l in map(json.loads, (tmp_path/'c'/'log.jsonl').read_text().splitlines()) if 'loss' in l] == [6, 7, 8]
    said, = events(tmp_path/'c', 'from')
    assert said['run'] == str(tmp_path/'a') and said['out'] == str(tmp_path/'c') and said['step'] == 5 and said['changed']['optim.lr'] == [c.optim.lr, 1e-4] and 'system.checkpoint' in said['changed']
    assert f'begins from {tmp_path/"a"} at step 5' in lines[0] and not equal(tensors(tmp_path/'a', 8), tensors(tmp_path/'c', 8)) and equal(tensors(tmp_path/'a', 5), tensors(tmp_path/'c', 5))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path/'a').rglob('*')}      # nothing is written there
    stopped = quick(other, tmp_path/'d', start=f'{tmp_path}/a@5', save_every=100, console=lambda line: os.kill(os.getpid(), signal.SIGUSR1) if 'step 6 of' in line else None)
    assert stopped.step == 7 and quick(other, tmp_path/'d', start=f'{tmp_path}/a@5').state == 'done' and equal(tensors(tmp_path/'d', 8), tensors(tmp_path/'c', 8))   # the same command goes on
    assert quick(other, tmp_path/'d').state == 'done'                              # and without --from, too
    with pytest.raises(ValueError, match='began from .*a, and .* came'): quick(other, tmp_path/'d', start=f'{tmp_path}/c@6')
    with pytest.raises(ValueError, match='began as a new one'): quick(c, tmp_path/'a', start=f'{tmp_path}/c@6')
    tried(times=3, said=lines[0])


UNFIT_START = pytest.mark.fault('configuration', 'a run is to begin from one of another architecture, from a step that is not there, or from its own folder', 'it is refused, and what does not fit is named; the other run is as it was: give the same architecture, another step or another folder')


@UNFIT_START
def test_what_a_new_run_cannot_begin_from(tmp_path, tried):
    c = tiny(steps=4)
    quick(c, tmp_path/'a')
    (tmp_path/'empty').mkdir()
    cases = [(c, f'{tmp_path}/a@9', 'no checkpoint of step 9; there are 1, 2, 3, 4'), (c, tmp_path/'none', 'there is no folder'), (c, tmp_path/'empty', 'neither checkpoints nor'),
             (c, tmp_path/'a', 'is at step 4, and this run would end at 4; give more'), (override(c, ['flow.dim=48']), f'{tmp_path}/a@2', 'does not fit.*flow.blocks.0'),
             (override(c, ['flow.blocks=3']), f'{tmp_path}/a@2', 'does not fit.*is missing there'), (override(c, ['flow.dim=48']), tmp_path/'a'/'model', r'does not fit: blocks.0.* tensors in all')]
    for config, start, says in cases:
        with pytest.raises(ValueError, match=says) as e: quick(config, tmp_path/'b', start=start)
        assert Run(tmp_path/'b', write=False).steps() == []
    with pytest.raises(ValueError, match='is the folder of this run'): quick(c, tmp_path/'a', start=tmp_path/'a')
    tried(times=len(cases) + 1, said=e.value)


def test_a_run_begins_from_another_whose_objective_has_other_parts(tmp_path):
    "Another run without alignment: projector and its moments stay behind, and the log says so; and back, where they begin anew."
    c = tiny()
    quick(c, tmp_path/'a')
    plain = changed(c, {'align': None})
    quick(plain, tmp_path/'b', start=f'{tmp_path}/a@4')
    quick(c, tmp_path/'c', start=f'{tmp_path}/b@6')
    (there,), (back,) = events(tmp_path/'b', 'from'), events(tmp_path/'c', 'from')
    assert 'objective.projector' in there['left out'] and 'anew' not in there and 'objective.projector' in back['anew'] and 'left out' not in back
    assert scale.start_of(f'{tmp_path}/a@4') == scale.Start(tmp_path/'a', 4, True) and scale.config_at(scale.start_of(f'{tmp_path}/a@4')) == c


def test_weights_alone_begin_at_step_0_and_other_classes_begin_anew(tmp_path):
    c = tiny(steps=2)
    quick(c, tmp_path/'a')
    model = TarFlow.from_pretrained(tmp_path/'a'/'model').state_dict()
    seen, real = [], scale.Training.take_weights
    few_classes = InMemory(few().images, few().labels % 2, ('even', 'odd'), few().levels, 'two')
    fine = override(c, ['data.classes=2', 'optim.lr=1e-5'])
    class Looked(scale.Training):
        def take_weights(self, m): real(self, m); seen.append({k: v.clone() for k, v in m.state_dict().items()})
    was, scale.Training = scale.Training, Looked
    try: done = quick(fine, tmp_path/'b', start=tmp_path/'a'/'model', data=few_classes)
    finally: scale.Training = was
    assert done.step == 2 and all(torch.equal(v, model[k]) for k, v in seen[0].items() if not k.endswith('embed.weight'))
    said, = events(tmp_path/'b', 'from')
    assert 'embed.weight' in said['anew'] and said['step'] == 0 and scale.config_at(scale.start_of(tmp_path/'b'/'model')).data.classes == 2
    assert quick(fine, tmp_path/'b', start=tmp_path/'a'/'model', data=few_classes).state == 'done' and len(events(tmp_path/'b', 'from')) == 1


@pytest.mark.slow
@FROM
def test_two_processes_begin_from_the_run_of_one_and_end_with_its_numbers(tmp_path):
    found = in_ranks(begin, 2, str(tmp_path))
    assert found[0] == found[1] and max(found[0].values()) < 1e-5, found


def test_stages_go_on_from_within_and_between(tmp_path):
    "SimFlow with a frozen VAE: two stages."
    name = next(n for n, c in CONFIGS.items() if c.joint and c.joint.before and 'encoder' in scale.build.__globals__['variant_of'](c).frozen)
    from flowbook.recipe import shortened
    c = shortened(override(find_config(f'digits-{name}'), ['optim.batch_size=16', 'system.workers=0']), 4)
    quick(c, tmp_path/'whole', data=load('digits'))
    last = max(Run(tmp_path/'whole', write=False).steps())
    for k in range(1, last):
        (to := tmp_path/f'from-{k}').mkdir()
        shutil.copytree(tmp_path/'whole'/'checkpoints'/f'step-{k:08d}', to/'checkpoints'/f'step-{k:08d}')
        assert quick(c, to, save_every=100, data=load('digits')).step == last
        new = quick(c, tmp_path/f'new-{k}', save_every=100, data=load('digits'), start=f'{tmp_path}/whole@{k}')
        assert new.step == last and equal(tensors(tmp_path/f'new-{k}', last), tensors(tmp_path/'whole', last)), f'begun from step {k}'
        assert equal(tensors(to, last), tensors(tmp_path/'whole', last)), f'from step {k} of {last}'


@pytest.mark.fault('configuration', 'a run is to go on with another learning rate, size, batch, noise, weight or seed', 'it is refused with the key and both values, and nothing is written: go on as it was begun, or take another folder')
def test_a_run_goes_on_as_what_it_was_only(tmp_path, tried):
    c = tiny(steps=2)
    quick(c, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'checkpoints').rglob('*')}
    keys = (('optim.lr', 1e-2), ('flow.dim', 48), ('optim.batch_size', 8), ('align.lam', .3), ('noise.sigma', .3), ('seed', 1))
    for key, value in keys:
        with pytest.raises(ValueError, match=key) as e: quick(override(c, [f'{key}={value}']), tmp_path)
        tried(times=len(keys), said=e.value)
    with pytest.raises(ValueError, match='holds a run of 2 steps'): quick(c, tmp_path, resume=False)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/'checkpoints').rglob('*')} == before


@pytest.mark.fault('configuration', 'a run is to go on with other data', 'it is refused, also where number, classes and labels are the same and only the images are others: the same data, or another folder')
def test_other_data_are_noticed_and_a_mended_sample_is_not(tmp_path, tried):
    c = tiny(steps=2)
    quick(c, tmp_path)
    def changed(images=None, labels=None, classes=None, n=40):
        d = few(n)
        return InMemory(d.images if images is None else images(d.images.clone()), d.labels if labels is None else labels(d.labels.clone()), classes or d.classes, d.levels, 'others')
    def one(images): images[int(next(iter(scale.told_of(few())['looks'])))] = 0; return images
    with pytest.raises(ValueError, match='data.samples'): quick(override(c, ['data.samples=39']), tmp_path, data=few(39))
    others = {'other classes': dict(classes=tuple('abcdefghij')), 'other labels': dict(labels=lambda y: (y + 1) % 10), 'other images': dict(images=lambda x: x.roll(1, 0))}
    for what, how in others.items():
        with pytest.raises(ValueError, match=f'begun with 40 samples of 10 classes; these are 40 of 10, {what}; go on with the same') as e: quick(c, tmp_path, data=changed(**how))
    tried(times=len(others) + 1, said=e.value)
    assert quick(c, tmp_path, data=changed(images=one)).state == 'done'           # one sample in 40 was mended
    told = scale.told_of(few())
    assert len(told['looks']) >= 10 and scale.told_of(few()) == told and len(json.dumps(told)) < 1000


def test_data_that_cannot_be_read_everywhere_are_known_by_what_can():
    class Torn(InMemory):
        def batch(self, index):
            if int(torch.as_tensor(index)[0]) % 2: raise OSError('gone')
            return super().batch(index)
    d = few()
    torn, whole = scale.told_of(Torn(d.images, d.labels, d.classes, d.levels, 'torn')), scale.told_of(d)
    assert 0 < len(torn['looks']) < len(whole['looks']) and not scale.other_looks(whole['looks'], torn['looks'])
    assert scale.other_looks({'3': [0., 1.]}, {'3': [.5, .5]}) and not scale.other_looks({'3': [0., None]}, {'3': [.001, 1.]}) and not scale.other_looks({}, {'3': [0., 1.]})


@pytest.mark.fault('configuration', 'a run goes on with other versions of packages, another number of workers, recomputing', 'it goes on, and the log says what is otherwise; nothing to do')
def test_what_may_differ_goes_on_and_is_in_the_log(tmp_path, monkeypatch):
    c = tiny(steps=4)
    quick(tiny(steps=4), tmp_path, console=lambda line: os.kill(os.getpid(), signal.SIGUSR1) if 'step 1 of' in line else None)
    real = str(torch.__version__)
    monkeypatch.setattr(torch, '__version__', '9.9.9'); monkeypatch.setattr(scale, '__version__', '99')
    assert quick(override(c, ['system.workers=1', 'sample.w=3', 'system.checkpoint=true']), tmp_path).state == 'done'
    said = [l for l in map(json.loads, (tmp_path/'log.jsonl').read_text().splitlines()) if l.get('event') == 'changed']
    assert len(said) == 1 and said[0]['torch'] == [real, '9.9.9'] and said[0]['flowbook'][1] == '99' and said[0]['system.workers'] == [0, 1] and said[0]['system.checkpoint'] == [False, True] and 'world' not in said[0]


TWICE = ('processes', 'two runs are started in one folder', 'the second is refused with the process, host and time of the first, and writes nothing; a dead process holds nothing: wait, or give another folder')


@pytest.mark.fault(*TWICE)
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, tried):
    c = tiny(steps=3)
    def second(line):
        if 'step 2 of' not in line: return
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
        with pytest.raises(CheckpointError, match=f'{tmp_path} is in use by process {os.getpid()} on .* since 20.*give another folder') as e: quick(c, tmp_path)
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before
        tried(said=e.value)
    assert quick(c, tmp_path, console=second).state == 'done'


@pytest.mark.fault('arguments', 'a training is asked for what cannot be, at the door', 'refused, with the argument; no folder is made')
def test_mistakes_are_said_before_anything_is_made(tmp_path, monkeypatch):
    c = tiny(steps=2)
    for wrong in (dict(every=0), dict(save_every=0), dict(keep=1), dict(sample_every=-1), dict(fid_every=.5)):
        with pytest.raises(ValueError, match=next(iter(wrong))): quick(c, tmp_path/'a', **wrong)
    monkeypatch.setattr(scale, 'join', lambda *a: World(0, 2))
    with pytest.raises(ValueError, match='2 processes and 5 micro-batches; take a multiple of 10'): quick(override(c, ['optim.batch_size=15', 'system.accumulate=5']), tmp_path/'a')
    assert not (tmp_path/'a').exists()


@pytest.mark.fault('data', 'a pixel of one sample is NaN or infinite', 'training stops with the weights of before, and the error names the sample: mend it, then go on')
def test_a_loss_that_is_no_number_names_the_step_and_the_checkpoint(tmp_path, monkeypatch):
    real = scale.build
    def poisoned(*a, **k):
        recipe = real(*a, **k)
        bad = lambda b: b._replace(x=b.x * float('nan')) if bool((b.index == 7).any()) and b.epoch == 1 else b
        return recipe._replace(stages=tuple(s._replace(transforms=(*s.transforms, bad)) for s in recipe.stages))
    monkeypatch.setattr(scale, 'build', poisoned)
    with pytest.raises(NonFiniteLoss, match=r'loss of step \d+ was nan.*newest checkpoint in .* is of step'): quick(tiny(), tmp_path)
    steps = Run(tmp_path, write=False).steps()
    assert steps and all(v.isfinite().all() for v in tensors(tmp_path, steps[-1]).values()) and not problems(tmp_path/'checkpoints'/f'step-{steps[-1]:08d}')


def test_fid_and_pictures_at_intervals(tmp_path):
    c = tiny(steps=4)
    done = quick(c, tmp_path, sample_every=2, fid_every=4, fid_n=20)
    lines = [json.loads(l) for l in (tmp_path/'log.jsonl').read_text().splitlines()]
    assert sorted(p.name for p in (tmp_path/'samples').iterdir()) == ['step-00000002.png', 'step-00000004.png']
    assert [l['step'] for l in lines if 'fid' in l] == [4] and all('images_per_s' in l for l in lines if 'loss' in l)
    at = next(l for l in lines if 'norms' in l)
    assert {'block 1', 'block 2'} <= set(at['norms']) and [b['block'] for b in at['blocks']] == [1, 2]
    from flowbook.scripts.sample import open_model
    assert open_model(done.model).card['steps'] == 4


def test_the_weights_that_are_kept_are_the_averages(tmp_path):
    c = tiny('optim.ema=0.5', steps=3)
    done, saved = quick(c, tmp_path), tensors(tmp_path, 3)
    kept = TarFlow.from_pretrained(done.model).state_dict()
    assert all(torch.equal(v, saved[f'ema.module.{k}']) for k, v in kept.items()) and not all(torch.equal(v, saved[f'flow.{k}']) for k, v in kept.items())


# many processes

@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch():
    cases = [(k, torch.float64, fsdp, acc) for k in KINDS for fsdp in (False, True) for acc in (1, 2) if (k in SHARDED or not fsdp) and not (acc == 2 and 'critic' in k)]
    cases += [(k, torch.float32, fsdp, 1) for k in ('nll', 'reverse', 'simflow') for fsdp in (False, True)]
    alone = {key: train_kind(*key) for key in {c[:2] for c in cases}}
    found = in_ranks(compare, 2, [(*c, alone[c[:2]]) for c in cases])
    for case, (loss, norm, params) in zip(cases, found[0]):
        assert loss < 1e-6 and norm < 1e-6, f'{case}: loss {loss}, gradient {norm}'
        assert params < (1e-10 if case[1] == torch.float64 else 5e-3), f'{case}: parameters {params}'   # AdamW divides by the gradient's size: 20 steps of 1e-3 could move 2e-2


@pytest.mark.slow
def test_ranks_hold_the_same_bits_after_every_objective():
    a, b = in_ranks(same, 2, list(KINDS))
    assert a == b and len(a) == len(KINDS)


@pytest.mark.slow
@pytest.mark.fault('numbers', 'NaN, infinity or an overflow on one of two processes', 'both stop one step later at the latest, with the same words; the newest checkpoint is intact; mended, the run ends with the bits of one in which nothing was bad')
def test_a_bad_step_of_one_process_stops_all_and_the_mended_run_goes_on(tmp_path, tried):
    kinds = [(way, False) for way in ('pixel nan', 'pixel inf', 'gradient', 'loss', 'overflow')] + [('pixel nan', True), ('loss', True)]
    found = in_ranks(once, 2, str(tmp_path), kinds)
    for kind in kinds:
        for f in (one := found[0][kind], found[1][kind]):
            own = {1: f['theirs'][1]} if kind[0] in ('pixel nan', 'pixel inf', 'loss') else dict(enumerate(f['theirs']))   # a gradient is the ranks' together
            assert f['step'] == 4 and f['samples'] == own and f['calls'] == 5, (kind, f)
            assert f['odd'] == ([f['theirs'][1][0]] if 'pixel' in kind[0] else []), (kind, f)
            assert f['intact'] and f['mended'] and f['text'] == one['text'] and 'is of step 3' in f['text'] and 'of epoch 0 on rank 1' in f['text'], (kind, f)
    tried(times=len(kinds), said=found[0][kinds[0]]['text'])


@pytest.mark.slow
def test_a_bad_step_is_left_out_by_the_optimiser_on_all_ranks():
    "Whole and sharded: weights and AdamW's memory stay those of step 3, although both ranks take step 4 and step 5."
    assert in_ranks(left_out, 2) == [[True, True], [True, True]]


def torchrun(n, *args, torchrun=(), env=None, **kw):
    "A process group of `torchrun`, not waited for."
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(n), '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0', *torchrun, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})}, **kw)


RUN = '''
import os, sys, warnings
import torch
warnings.simplefilter('ignore'); torch.set_num_threads(1)
sys.path.insert(0, os.environ['TESTS'])
import test_scale as t
from flowbook.scale import train
def console(line):
    open(os.environ['SEEN'], 'a').write(' '.join(line.split()[:3]) + chr(10))
    if os.environ.get('SLOW'): import time; time.sleep(float(os.environ['SLOW']))
if os.environ.get('DIE') and os.environ['RANK'] == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':
    import flowbook.scale as scale
    real = scale.Parallel.step
    def step(self, k):
        # a checkpoint is written behind the steps: before the first one is whole there is nothing to go on from
        if k >= int(os.environ['DIE']) and os.path.exists(sys.argv[1] + '/checkpoints/latest'): os.kill(os.getpid(), 9)
        return real(self, k)
    scale.Parallel.step = step
out = train(t.tiny(steps=int(os.environ['STEPS'])), sys.argv[1], every=1, save_every=2, keep=3, device='cpu', console=console, data=t.few(), tensorboard=False)
sys.exit(75 if out.state == 'stopped' else 0)
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path/'run.py').write_text(RUN)
    started = []
    def start(out, n=2, steps=8, options=(), **env):
        env = {'TESTS': str(Path(__file__).parent), 'SEEN': str(tmp_path/'seen'), 'STEPS': str(steps), **env}
        started.append(torchrun(n, str(tmp_path/'run.py'), str(out), torchrun=options, env=env) if n else
                       subprocess.Popen([sys.executable, str(tmp_path/'run.py'), str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', **env}))
        return started[-1]
    start.seen = tmp_path/'seen'
    yield start
    for p in started:                                         # a test that failed leaves nothing running, either
        left = children(p.pid)
        if p.poll() is None: p.kill()
        for c in left:
            try: os.kill(c, signal.SIGKILL)
            except ProcessLookupError: pass


def finished(p, seconds=120):
    text, _ = p.communicate(timeout=seconds)
    return p.returncode, text


def wait_for(script, what, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if script.seen.exists() and what in script.seen.read_text(): return
        time.sleep(.05)
    raise AssertionError(f'{what!r} was not seen')


def children(pid): # of a process, and theirs
    found = []
    for task in Path(f'/proc/{pid}/task').glob('*/children'):
        for c in map(int, task.read_text().split()): found += [c, *children(c)]
    return found


def gone(pids, seconds=40):
    end = time.monotonic() + seconds
    alive = lambda p: Path(f'/proc/{p}/stat').exists() and Path(f'/proc/{p}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    while time.monotonic() < end:
        if not any(alive(p) for p in pids): return True
        time.sleep(.1)
    return False


@pytest.mark.fault('processes', 'one of two training processes is killed by SIGKILL', 'the other ends within a minute; restarted, by torchrun or by hand, the run ends with the bits of one that was never killed')
@pytest.mark.slow
def test_a_killed_worker_ends_the_job_and_a_restart_goes_on_to_the_same_bits(tmp_path, script):
    assert finished(script(tmp_path/'whole'))[0] == 0
    status, text = finished(script(tmp_path/'killed', options=('--max-restarts', '1'), DIE='6'))
    assert status == 0, text
    assert equal(tensors(tmp_path/'whole', 8), tensors(tmp_path/'killed', 8))
    began = time.monotonic()
    status, text = finished(script(tmp_path/'dead', DIE='4'))                     # without a restart: all end, and soon
    assert status != 0 and 'SIGKILL' in text and time.monotonic() - began < 60
    assert script(tmp_path/'dead', n=1).wait(120) == 0 and Run(tmp_path/'dead', write=False).steps()[-1] == 8   # and one process can finish it
    said = [json.loads(l) for l in (tmp_path/'dead'/'log.jsonl').read_text().splitlines()]
    assert [l['world'] for l in said if l.get('event') == 'changed'] == [[2, 1]]


@pytest.mark.fault('processes', 'the launcher of two processes gets SIGTERM or SIGUSR1', 'all processes save at the same step and leave; requeue')
@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_signals_to_the_launcher_save_and_leave(tmp_path, script, name):
    p = script(tmp_path/'out', steps=4000, options=('--signals-to-handle', 'SIGTERM,SIGINT,SIGUSR1'), SLOW='0.02')
    wait_for(script, 'step 3 of')
    workers = children(p.pid)
    p.send_signal(getattr(signal, name))
    status, text = finished(p)
    assert status != 0 and gone(workers), text
    steps = Run(tmp_path/'out', write=False).steps()
    assert steps and not problems(tmp_path/'out'/'checkpoints'/f'step-{steps[-1]:08d}')
    log = [json.loads(l) for l in (tmp_path/'out'/'log.jsonl').read_text().splitlines()]
    assert log[-1]['event'] == 'stopped' and log[-1]['step'] == steps[-1]


@CTRL_C
@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(tmp_path):
    "Both in one call of the console, so that no step lies between them."
    code = "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import test_scale as t; " \
           "twice = lambda line: 'step 3 of' in line and [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]; t.quick(t.tiny(), sys.argv[2], save_every=2, console=twice)"
    done = subprocess.run([sys.executable, '-c', code, str(Path(__file__).parent), str(tmp_path/'out')], capture_output=True, text=True, timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == -signal.SIGINT and 'once more' in done.stderr, done
    assert Run(tmp_path/'out', write=False).steps() in ([], [2]) and quick(tiny(), tmp_path/'out').state == 'done'    # that save may still have been under way


@pytest.mark.fault('processes', 'a run of one process gets SIGUSR1', 'it saves and leaves with status 75; requeue')
@pytest.mark.slow
def test_one_process_leaves_with_a_status_of_its_own(tmp_path, script):
    p = script(tmp_path/'out', 0, 4000, SLOW='0.02')
    wait_for(script, 'step 3 of')
    p.send_signal(signal.SIGUSR1)
    assert finished(p)[0] == 75


@pytest.mark.slow
@pytest.mark.fault(*TWICE)
def test_a_run_whose_process_was_killed_is_gone_on_with(tmp_path, script):
    p = script(tmp_path/'out', 0, 4000, SLOW='0.05')
    wait_for(script, 'step 3 of')
    with pytest.raises(CheckpointError, match=f'in use by process {p.pid} on'): quick(tiny(steps=4000), tmp_path/'out')
    p.kill(); p.wait(10)
    stop = lambda line: os.kill(os.getpid(), signal.SIGUSR1)
    assert quick(tiny(steps=4000), tmp_path/'out', console=stop).state == 'stopped'


@pytest.mark.fault('processes', 'the launcher is killed by SIGKILL', 'its processes notice at their next step, save and leave: no orphan holds a GPU; start again')
@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody_behind(tmp_path, script):
    p = script(tmp_path/'out', steps=100_000, SLOW='0.02')
    wait_for(script, 'step 3 of')
    workers = children(p.pid)
    p.kill(); p.wait(10)
    assert len(workers) >= 2 and gone(workers)
    steps = Run(tmp_path/'out', write=False).steps()
    assert steps and not problems(tmp_path/'out'/'checkpoints'/f'step-{steps[-1]:08d}')


@pytest.mark.fault('configuration', 'a checkpoint is gone on with in another number of processes', 'it goes on, whole or sharded, and computes what one process computes; nothing to do')
@pytest.mark.slow
def test_one_checkpoint_goes_on_in_any_number_of_processes(tmp_path):
    "2 -> 1 -> 4 processes, whole and sharded, in float64: what one process computes alone."
    import scale_ranks
    alone = scale_ranks.pieces(0, 1, str(tmp_path/'alone'), [12], False, False)
    for fsdp in (False, True):
        folder = str(tmp_path/f'many-{fsdp}')
        for n, until in ((2, 4), (1, 8), (4, 12)): found = in_ranks(scale_ranks.pieces, n, folder, [until], fsdp, True)
        for k, v in found[0].items(): assert abs(alone[k] - v).max() < 1e-10, f'{k}, sharded {fsdp}'


@pytest.mark.slow
@pytest.mark.parametrize('part', range(3))
def test_every_twin_goes_the_whole_way(tmp_path, part):
    "train -> stop -> resume -> sample -> evaluate, on two processes, with its own objective, data path and precision."
    names = [f'digits-{n}' for n in CONFIGS][part::3]
    found = in_ranks(through, 2, names, str(tmp_path))
    assert set(found[0]) == set(names)


@pytest.mark.slow
def test_smoke_finds_two_processes_in_order():
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'flowbook.scale'], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = dict(l.rsplit(None, 1) for l in done.stdout.strip().splitlines())
    assert lines['processes'] == '2' and lines['sum'] == 'right' and all(float(v) < 1e-5 for k, v in lines.items() if 'against' in k)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['nll', 'reverse'])
def test_compiled_layers_compute_the_same(kind):
    "The shared reverse pass uses a graph twice, which torch.compile's donated buffers would forbid."
    (l1, g1, _), (l2, g2, _) = (train_kind(kind, torch.float32, steps=3, change=[lambda m: [f(l) for l in layers_of(m) for f in c]]) for c in ((), (compiling,), ))
    assert max(abs(a - b) for a, b in zip(l1 + g1, l2 + g2)) < 1e-4
