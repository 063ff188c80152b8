"""What tests/test_scale.py runs in several processes."""
import torch
from torch import nn

from flowbook import repa
from flowbook import simflow as sf
from flowbook.data import Flip, batches, load
from flowbook.flows import shake
from flowbook.latent import LatentTarFlow, VaeLoss
from flowbook.metrics import CrossEntropy, DigitClassifier
from flowbook.scale import Parallel, Stop, is_sharded, join, leave, same_start, shard
from flowbook.tarflow import TarFlow
from flowbook.train import NLL, DropLabels, GaussianNoise, ema, fit

PAIRS = [(2, 1), (3, 2)]


class To:
    "The last transform: a batch in another precision."
    def __init__(self, dtype): self.dtype = dtype
    def __call__(self, b): return b._replace(x=b.x.to(self.dtype), target=b.target if b.target is None else b.target.to(self.dtype))


def aligned(strategy):
    def make():
        flow, table = TarFlow(8, 1, 2, 16, 3, 2, 8, classes=10), torch.randn(1437, 16, 5, generator=torch.Generator().manual_seed(3))
        return flow, repa.Alignment(flow, strategy, 5, hidden=16), [repa.Lookup(table)]
    return make


def joint(*terms, gan=False, aligned=False):
    def make():
        model = sf.SimFlow({**sf.DIGITS['vae'], 'latent_channels': 8, 'block_out_channels': (8, 8)}, {**sf.DIGITS['flow'], 'channels': 8, 'dim': 16, 'head_dim': 8})
        more = [(.1, sf.Adversarial(sf.PatchCritic(1, 8, 1), start=2))] if gan else []
        return model, sf.Joint(*terms, *more), [sf.DrawNoise(model.posterior.draws(model.N))]
    return make


def plain(flow, objective): return lambda: (flow(), objective(), [])


KINDS = {'nll': plain(lambda: TarFlow(8, 1, 2, 16, 3, 2, 8, classes=10), NLL),
         'nll, recomputed': plain(lambda: TarFlow(8, 1, 2, 16, 3, 2, 8, classes=10), lambda: NLL(checkpoint=True)),
         'latent flow': plain(lambda: LatentTarFlow(8, 1, 2, 16, 2, 2, 8, classes=10), NLL),
         'forward': aligned(repa.Forward(PAIRS)), 'detach': aligned(repa.Detach(PAIRS)), 'reverse': aligned(repa.Reverse(PAIRS)),
         'reverse, rerun': aligned(repa.Reverse(PAIRS, rerun=True)), 'sequential': aligned(repa.ReverseSequential([(3, 1)])),
         'simflow': joint(sf.Reconstruction(1), sf.FlowNLL()), 'simflow, critic': joint(sf.Reconstruction(1), sf.FlowNLL(), gan=True),
         'classifier': plain(DigitClassifier, CrossEntropy)}
SHARDED = ['nll', 'forward', 'detach', 'reverse', 'reverse, rerun', 'simflow', 'simflow, critic']


def whole(p): return (p.full_tensor() if is_sharded(p) else p).detach().clone()


def micro(stream, k):
    "Every batch in k parts."
    part = lambda v, i: v[i::k] if isinstance(v, torch.Tensor) else v
    for b in stream:
        for i in range(k): yield type(b)(*(part(v, i) for v in b))


def train(kind, dtype, part=(0, 1), world=None, fsdp=False, accumulate=1, steps=20, change=()):
    "Train one kind of objective; -> losses, gradient norms, all parameters (those of the average, too)."
    torch.manual_seed(0)
    model, objective, transforms = KINDS[kind]()
    shake(model, .05)
    modules = [m.to(dtype) for m in (model, objective) if isinstance(m, nn.Module)]
    average, loop = ema(model, .9), None
    for f in change: f(model)
    if world is not None:
        same_start(*modules, average)
        if fsdp: shard(model, world, [objective.projector] if hasattr(objective, 'projector') else []); shard(average.module, world)
        loop = Parallel(world, accumulate, stop=Stop(world))
    stream = batches(load('digits'), 32, transforms=[Flip(.3), *transforms, GaussianNoise(.2), DropLabels(.2), To(dtype)], part=part)
    if kind == 'classifier': stream = batches(load('digits'), 32, transforms=[To(dtype)], part=part)
    logs = list(fit(model, micro(stream, accumulate) if accumulate > 1 else stream, objective, steps=steps, lr=1e-3, ema=average, every=1, amp='off', loop=loop))
    if loop: loop.stop.close()
    return [l['loss'] for l in logs], [l['grad_norm'] for l in logs], [whole(p) for m in (*modules, average.module) for p in m.parameters()]


def compare(rank, n, cases):
    "Each case (kind, dtype, fsdp, accumulate, what one process found) -> largest differences of losses, gradient norms, parameters; and the parameters' bytes."
    world, out = join('cpu', sharded=True), []
    for kind, dtype, fsdp, accumulate, (losses, norms, params) in cases:
        l, g, p = train(kind, dtype, (rank, n), world, fsdp, accumulate)
        gap = lambda a, b: max(abs(x - y) / max(1, abs(x)) for x, y in zip(a, b))
        out.append((gap(losses, l), gap(norms, g), max((a - b).abs().max().item() for a, b in zip(params, p))))
    leave()
    return out


def same(rank, n, kinds):
    "Sums of all parameters after three steps, one for each kind: the ranks are to agree to the last bit."
    world, out = join('cpu'), {}
    for kind in kinds: out[kind] = [p.double().sum().item() for p in train(kind, torch.float32, (rank, n), world, steps=3)[2]]
    leave()
    return out


def seen(how):
    "A console that sends this process a signal when a line says so."
    import os
    import signal
    return lambda line: os.kill(os.getpid(), signal.SIGUSR1) if how in ' '.join(line.split()) else None


def through(rank, n, names, folder):
    "Every twin: trained, stopped, gone on with, drawn from, judged; -> {name: FID of a few samples}."
    import traceback
    from pathlib import Path

    from flowbook.configs import find_config, override
    from flowbook.metrics import evaluate
    from flowbook.monitor import read_log
    from flowbook.recipe import shortened
    from flowbook.scale import train as train_at_scale
    from flowbook.scripts.sample import Way, open_model
    found, world, reference = {}, join('cpu', sharded=True), load('digits').batch(range(200))[0]
    for name in names:
        out = Path(folder)/name
        try:
            c = shortened(override(find_config(name), ['optim.batch_size=16', 'system.workers=0', f'data.latents={folder}/latents' if find_config(name).data.vae else f'seed={find_config(name).seed}']), 6)
            first = train_at_scale(c, out, device='cpu', every=1, save_every=100, console=seen('step 3 of'), tensorboard=False)
            assert first.state == 'stopped' and first.step in (4, 5), first   # said in one step, read in the next
            done = train_at_scale(c, out, device='cpu', every=1, save_every=100, sample_every=100, console=None)
            assert done.state == 'done' and done.step >= 6, done
            if rank == 0:
                assert [l['step'] for l in read_log(out)] == list(range(1, done.step + 1))
            opened = open_model(done.model)
            way = Way(**{k: v for k, v in opened.card['sample'].items() if k != 'n'})
            index = torch.arange(6)[rank::n]
            x = opened.draw(index, index % opened.classes if opened.classes else None, way, sigma=c.noise.sigma).images
            assert x.shape[1:] == (c.data.channels, c.data.image_size, c.data.image_size), x.shape
            found[name] = evaluate(x.nan_to_num(0.).clamp(-1, 1), reference, 'fid', 'digits')['fid']
            assert found[name] > 0
        except Exception: raise AssertionError(f'{name}: {traceback.format_exc()[-2500:]}') from None
    leave()
    return found


def pieces(rank, n, folder, until, fsdp, joined):
    "Go on with a float64 run in this many processes until step `until`, and save; -> all parameters, by name."
    from flowbook.checkpoint import Run, load, pack, save
    from flowbook.loader import loader
    world = join('cpu', sharded=True) if joined else join('cpu')
    torch.manual_seed(0)
    model, objective, transforms = KINDS['reverse']()
    shake(model, .05)
    average = ema(model, .9)
    for m in (model, objective, average): m.to(torch.float64)
    if fsdp: shard(model, world, [objective.projector]); shard(average.module, world)
    with Run(folder) as run:
        at = run.steps()[-1] if run.steps() else 0
        kept = {}
        def restore(*parts):
            kept['parts'] = parts
            if at: load(run, lambda names: pack(*parts, names))
        loop = Parallel(world, 1, done=at, restore=restore)
        stream = loader(torch_some(), 16, 0, [Flip(.3), *transforms, GaussianNoise(.2), DropLabels(.2), To(torch.float64)], at, (world.rank, world.size))
        for _ in fit(model, stream, objective, steps=until[-1], lr=1e-3, ema=average, every=until[-1], amp='off', loop=loop, schedule=lambda *a: 1.): pass
        save(run, until[-1], pack(*kept['parts']), {})
        out = {k: whole(p).numpy() for k, p in (*model.named_parameters(), *((f'projector.{k}', p) for k, p in objective.projector.named_parameters()), *((f'mean.{k}', p) for k, p in average.module.named_parameters()))}
        stream.close()
    del model, objective, average, loop, kept, stream
    if joined: leave()
    return out


def torch_some(n=40):
    from flowbook.data import InMemory
    d = load('digits')
    return InMemory(d.images[:n], d.labels[:n], d.classes, d.levels, 'digits, some')


def once(rank, n, folder, kinds):
    "Step 4 goes bad on rank 1, in each of these ways; -> {way: what was told, what is left, and whether the mended run ends as one in which nothing was bad}."
    import math
    from pathlib import Path

    from safetensors.torch import load_file

    from flowbook import scale
    from flowbook.checkpoint import Run, problems
    from flowbook.configs import find_config, override
    from flowbook.data import InMemory
    from flowbook.loader import micro_batches
    from flowbook.train import NonFiniteLoss
    found, plain, calls, whole, _ = {}, scale.build, [], set(), join('cpu', sharded=True)
    theirs = [[i for _, part in next(micro_batches(64, 16, 0, 3, (r, n))) for i in part] for r in range(n)]      # of step 4
    class Spoilt(InMemory):
        value = None
        def batch(self, index):
            x, y = super().batch(index)
            if self.value is not None: x[torch.as_tensor(index) == theirs[1][0], :, 0, 0] = self.value
            return x, y
    some = torch_some(64)
    data = Spoilt(some.images, some.labels, some.classes, some.levels, 'digits, some')
    def saved(out, step): return {k: v for p in sorted((Path(out)/'checkpoints'/f'step-{step:08d}').glob('*.safetensors')) for k, v in load_file(p).items()}
    def run(out, way='', fsdp=False, optim=()):
        calls.clear()
        class Bad(NLL):
            def __call__(self, flow, *a):
                logs = super().__call__(flow, *a); calls.append(1)
                if len(calls) == 4 and rank == 1:
                    if way == 'loss': logs['loss'] = logs['loss'] * math.nan
                    if way in ('gradient', 'overflow'): next(flow.parameters()).grad.fill_(math.nan if way == 'gradient' else 1e30)
                return logs
        def build(*a, **k):
            recipe = plain(*a, **k)
            return recipe._replace(stages=tuple(s._replace(objective=Bad()) for s in recipe.stages))
        scale.build, data.value = build, {'pixel nan': math.nan, 'pixel inf': math.inf}.get(way)
        c = override(find_config('digits-tarflow-64'), ['optim.steps=7', 'optim.batch_size=16', 'system.workers=0', 'flow.blocks=2', 'flow.layers=1', 'data.samples=64', 'optim.ema=0.9', f'system.parallel={"fsdp" if fsdp else "ddp"}', *optim])
        return scale.train(c, out, device='cpu', every=100, save_every=3, keep=10, console=None, data=data, tensorboard=False)
    for way, fsdp in kinds:
        out = f'{folder}/{way}-{fsdp}'
        try: run(out, way, fsdp); told = None
        except NonFiniteLoss as e: told = e
        steps = Run(out, write=False).steps()
        intact = steps == [3] and not problems(Path(out)/'checkpoints'/'step-00000003') and all(v.isfinite().all() for v in saved(out, 3).values())
        found[way, fsdp] = {'step': told and told.step, 'samples': told and told.samples, 'odd': told and told.odd, 'text': str(told).replace(str(folder), '...'), 'calls': len(calls), 'intact': intact, 'theirs': theirs}
        run(out, '', fsdp)
        if fsdp not in whole: run(f'{folder}/whole-{fsdp}', '', fsdp); whole.add(fsdp)
        a, b = saved(out, 7), saved(f'{folder}/whole-{fsdp}', 7)
        found[way, fsdp]['mended'] = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    leave()
    return found


def begin(rank, n, folder):
    "Two processes begin from a step of a run that one process makes, whole and sharded, and from its weights; -> how far their ends are from those of one process."
    from pathlib import Path

    import test_scale as t
    from safetensors.torch import load_file

    from flowbook import scale
    from flowbook.checkpoint import problems
    join('cpu', sharded=True)
    found, c = {}, t.tiny('optim.ema=0.9', 'system.amp=off')
    def end(out):
        assert not problems(Path(out)/'checkpoints'/'step-00000008')
        whole = load_file(Path(out)/'model'/'model.safetensors')
        return torch.cat([v.flatten() for _, v in sorted(whole.items())])
    for kind in ('ddp', 'fsdp'):
        out = f'{folder}/{kind}'
        how = t.override(c, [f'system.parallel={kind}'])
        first = scale.train(how, f'{out}-a', device='cpu', every=1, save_every=2, keep=10, console=None, data=t.few(), tensorboard=False)
        assert first.state == 'done'
        for name, config, start in (('same', how, f'{out}-a@4'), ('other', t.override(how, ['optim.lr=1e-4']), f'{out}-a@4'), ('weights', how, f'{out}-a/model')):
            done = scale.train(config, f'{out}-{name}', start=start, device='cpu', every=1, save_every=100, console=None, data=t.few(), tensorboard=False)
            assert done.step == 8
        with __import__('pytest').raises(ValueError, match='does not fit'):
            scale.train(t.override(how, ['flow.dim=48']), f'{out}-wide', start=f'{out}-a@4', device='cpu', console=None, data=t.few(), tensorboard=False)
        found[kind] = (end(f'{out}-a') - end(f'{out}-same')).abs().max().item()
        assert (end(f'{out}-a') - end(f'{out}-other')).abs().max() > 1e-4 and (end(f'{out}-a') - end(f'{out}-weights')).abs().max() > 1e-4
    leave()
    return found


def left_out(rank, n):
    "A NaN in one number of rank 1's gradient, after the ranks have averaged; -> does step 4 change weights or AdamW's memory? Whole, sharded."
    from flowbook.checkpoint import pack
    from flowbook.scale import local
    from flowbook.train import NonFiniteLoss
    world, found = join('cpu', sharded=True), []
    class Bad(Parallel):
        def clip(self, params, most):
            self.calls = getattr(self, 'calls', 0) + 1
            if self.calls == 4 and (rank == 1 or not is_sharded(params[0])): local(params[0].grad).view(-1)[0] = float('nan')
            return super().clip(params, most)
    for fsdp in (False, True):
        ends = []
        for kind, steps in ((Bad, 10), (Parallel, 3)):
            torch.manual_seed(0)
            flow, parts, stopped = shake(TarFlow(8, 1, 2, 16, 2, 2, 8, classes=10), .05), [], False
            if fsdp: shard(flow, world)
            try: list(fit(flow, batches(load('digits'), 32, part=(rank, n)), steps=steps, every=100, schedule=lambda *a: 1., amp='off', loop=kind(world, restore=lambda *p: parts.extend(p))))
            except NonFiniteLoss as e: stopped = e.step == 4
            ends.append({k: local(v).clone() for k, v in pack(*parts).items()})
            assert stopped == (kind is Bad)
        found.append(all(torch.equal(ends[0][k], ends[1][k]) for k in ends[1]) and ends[0].keys() == ends[1].keys())
    del flow, parts
    leave()
    return found
