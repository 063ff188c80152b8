"""The loop: what a step costs, what it allocates, when it waits, and what survives a bad one."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import flowbook.flows
import flowbook.tarflow
import flowbook.train
from flowbook.data import batches, load
from flowbook.tarflow import TarFlow
from flowbook.train import NLL, DropLabels, GaussianNoise, Meter, NonFiniteLoss, ema, fit

DIGITS = load('digits')
N = 16                                                        # tokens of an 8x8 digit at patch 2


def stream(**kw): return batches(DIGITS, 32, transforms=[GaussianNoise(.2), DropLabels(.1)], **kw)


def small(seed=0, **kw):
    torch.manual_seed(seed)
    return TarFlow(8, 1, 2, 32, 2, 1, 16, classes=10, **kw)


class Recorder(TorchDispatchMode):
    "Every operation below autograd: its name, and the shapes and types of what it makes."
    def __init__(self): super().__init__(); self.names, self.made = [], []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for o in (out if isinstance(out, (tuple, list)) else [out]):
            if isinstance(o, torch.Tensor): self.made.append((str(func), tuple(o.shape), o.dtype))
        return out


def test_attention_is_fused_and_allocates_no_mask(monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    def spy(*a, **kw): calls.append((len(a), kw)); return real(*a, **kw)
    monkeypatch.setattr(flowbook.tarflow.F, 'scaled_dot_product_attention', spy)
    flow, b = small(), next(stream())
    with Recorder() as rec: NLL()(flow, b.x, b.y)
    assert calls and all(n == 3 and kw['is_causal'] and kw.get('attn_mask') is None for n, kw in calls)
    square = [m for m in rec.made if len(m[1]) >= 2 and m[1][-1] == m[1][-2] in (N - 1, N)]
    assert not square, f'something of n x n was made: {square}'
    assert any('scaled_dot_product' in n and 'math' not in n for n in rec.names), 'the fused kernel was not used'
    # and the test can fail: an explicit mask is seen
    with Recorder() as rec: F.scaled_dot_product_attention(*torch.randn(3, 1, 1, N, 8), attn_mask=torch.ones(N, N).tril().bool())
    assert [m for m in rec.made if m[1][-2:] == (N, N)]


def test_between_reports_nothing_waits_for_the_device(monkeypatch):
    "`item()`, `bool(tensor)`, `nonzero()` are what makes a CPU wait for a GPU: none between two reports. (The flag of a bad step crosses by a copy that nobody waits for, and is read a step later.)"
    monkeypatch.setattr(flowbook.flows, 'check_y', lambda *a: None)      # looks at labels on a CPU only
    monkeypatch.setattr(flowbook.tarflow, 'check_y', lambda *a: None)
    monkeypatch.setattr(flowbook.flows, '_look_at_scale', lambda x: None)  # so does this
    reads, real = [], Meter.read
    monkeypatch.setattr(Meter, 'read', lambda self, *a: reads.append(1) or real(self, *a))
    waits, data = [], [next(stream())] * 20
    list(fit(small(), data, steps=1)); reads.clear()                      # what PyTorch imports at its first step is no part of it
    with Recorder() as rec:
        for log in fit(small(), data, steps=20, every=10): waits.append(sum('_local_scalar_dense' in n or 'nonzero' in n for n in rec.names))
    assert waits == [0, 0] and len(reads) == 2
    with Recorder() as rec: bool(torch.ones(1))
    assert any('_local_scalar_dense' in n for n in rec.names)             # the recorder does see a wait


def test_forward_and_backward_run_where_values_do_not_exist():
    "On the meta device any look at a value raises: loss and gradient need none."
    for kind in ('nvp', 'vp', 'coupling'):
        flow = small(kind=kind).to('meta')
        NLL()(flow, torch.empty(4, 1, 8, 8, device='meta'), torch.empty(4, dtype=torch.long, device='meta'))
        assert all(p.grad is not None for p in flow.parameters())


def test_the_same_seed_the_same_weights():
    def run(seed):
        flow = small(seed)
        logs = list(fit(flow, stream(seed=seed), steps=8, every=2))
        return [log['loss'] for log in logs], flow.state_dict()
    (l1, s1), (l2, s2), (l3, _) = run(0), run(0), run(1)
    assert l1 == l2 and l1 != l3 and all(torch.equal(s1[k], s2[k]) for k in s1)


def test_reporting_does_not_change_training():
    flows = [small() for _ in range(2)]
    for flow, every in zip(flows, (1, 7)): list(fit(flow, stream(), steps=9, every=every))
    assert all(torch.equal(p, q) for p, q in zip(*(f.parameters() for f in flows)))


def test_logs_are_means_since_the_last_report():
    ones = [log['loss'] for log in fit(small(), stream(), steps=9, every=1)]
    fours = list(fit(small(), stream(), steps=9, every=4))
    assert [log['step'] for log in fours] == [4, 8, 9]
    for log, part in zip(fours, (ones[:4], ones[4:8], ones[8:])): assert math.isclose(log['loss'], sum(part) / len(part), rel_tol=1e-5)


class Poison:
    "An objective that goes bad at one call: a NaN loss, an infinite one, or a gradient that is NaN while the loss is fine."
    def __init__(self, at, how): self.at, self.how, self.calls = at, how, 0
    def __call__(self, flow, x, y):
        self.calls += 1
        logs = NLL()(flow, x, y)
        if self.calls == self.at:
            if self.how in ('gradient', 'overflow'): next(flow.parameters()).grad.fill_(math.nan if self.how == 'gradient' else 1e30)   # whose square is no float32
            else: logs['loss'] = logs['loss'] * float(self.how); next(flow.parameters()).grad.mul_(float(self.how))
        return logs


NUMBERS = 'no step is taken with it, on any process; training stops one step later at the latest; the error names the step and the samples: mend the data, or a lower rate'


@pytest.mark.fault('numbers', 'NaN or infinity in the loss or the gradient', NUMBERS)
@pytest.mark.parametrize('how', ['nan', 'inf', 'gradient'])
@pytest.mark.parametrize('every', [1, 10])
@pytest.mark.parametrize('clip', [1., None])
def test_a_bad_step_leaves_the_last_good_weights(how, every, clip):
    flow, good, poison = small(), small(), Poison(4, how)
    with pytest.raises(NonFiniteLoss, match='step 4') as e: list(fit(flow, stream(), poison, steps=10, every=every, clip=clip))
    assert poison.calls == (4 if every == 1 else 5)                       # found by the report, or one step later
    assert e.value.step == 4 and 'learning rate' in str(e.value)
    assert e.value.kept == (2 if every == 1 else 0)                       # the last report at which the loss was a number
    if e.value.kept: list(fit(good, stream(), steps=2, clip=clip, schedule=lambda s, steps, w: flowbook.train.cosine(s, 10, w)))
    assert all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(flow.parameters(), good.parameters()))


@pytest.mark.fault('numbers', 'NaN or infinity in the loss or the gradient', NUMBERS)
@pytest.mark.parametrize('how', ['nan', 'inf', 'gradient', 'overflow'])
def test_a_bad_step_changes_nothing_not_even_where_no_copy_is_kept(how):
    "Weights, and what AdamW remembers of them, are those of the step before: the optimiser itself leaves the step out. Its loop is that of many processes, in one."
    from flowbook.checkpoint import pack
    from flowbook.scale import Parallel, World
    found = []
    for steps, objective in ((10, Poison(4, how)), (3, NLL())):
        flow, parts = small(), []
        average = ema(flow, .5)
        loop = Parallel(World(), restore=lambda *p: parts.extend(p))
        try: list(fit(flow, stream(), objective, steps=steps, every=100, ema=average, schedule=lambda *a: 1., loop=loop))
        except NonFiniteLoss as e: assert e.step == 4 and e.kept is None and 'go on from the newest checkpoint' in str(e)
        found.append({k: v.clone() for k, v in pack(*parts).items() if not k.startswith('ema.')})
        assert all(v.isfinite().all() for v in pack(*parts).values())
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0]) and found[0]['opt.step.flow.blocks.0.proj_in.weight'] == 3


@pytest.mark.fault('data', 'a pixel of one sample is NaN or infinite', 'training stops with the weights of before, and the error names the sample: mend it, then go on')
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_the_error_names_the_samples_and_the_one_that_has_no_number(value, tried):
    seen = []
    def bad(b):
        seen.append(b.index.tolist())
        return b._replace(x=torch.where((b.index == 700)[:, None, None, None], value, b.x))
    with pytest.raises(NonFiniteLoss, match='Look at sample 700: NaN or inf is in what the flow was given') as e: list(fit(small(), batches(DIGITS, 32, transforms=[bad]), steps=50, every=100))
    here = seen[e.value.step - 1]
    assert e.value.samples == {0: here} and 700 in here and e.value.odd == [700] and len(seen) == e.value.step + 1
    assert f'samples {", ".join(map(str, here[:8]))} and 24 more of epoch 0' in str(e.value)
    tried(said=e.value)


def test_data_that_know_no_samples_give_places():
    x, y = DIGITS.batch(range(8))
    x[3, 0, 0, 0] = math.inf
    with pytest.raises(NonFiniteLoss, match='the data do not say which samples.*Look at sample at place 3') as e: list(fit(small(), [(x, y)], steps=1))
    assert e.value.samples == {0: []}


@pytest.mark.fault('numbers', 'one gradient is a million times too long, but a number', 'where clipping is on it makes that a step of ordinary length, and the log has its norm; the configurations of TARFlow and R-REPA have none: optim.clip=1, from the first step')
@pytest.mark.parametrize('factor', [1e6, 1e15])
def test_one_huge_gradient_neither_ends_nor_spoils_a_clipped_run(factor):
    def run(factor):
        calls, flow = [], small()
        def objective(*a):
            logs = NLL()(*a); calls.append(1)
            if len(calls) == 10:
                for p in flow.parameters():
                    if p.grad is not None: p.grad.mul_(factor)
            return logs
        logs = list(fit(flow, stream(), objective, steps=40, every=1, lr=3e-3))
        return logs[9]['grad_norm'], sum(l['loss'] for l in logs[-10:]) / 10
    (norm, loss), (plain, usual) = run(factor), run(1.)
    assert norm > 1e5 * plain and abs(loss - usual) < .05 * abs(usual)


@pytest.mark.parametrize('every', [1, 5, 50])
def test_after_a_divergence_the_weights_and_their_average_give_numbers(every):
    "Just before the bad step the weights are wild already: those are not the ones to keep."
    flow = small()
    avg, b = ema(flow, .5), next(stream())
    with pytest.raises(NonFiniteLoss) as e: list(fit(flow, stream(), steps=50, lr=1e30, schedule=lambda *a: 1., every=every, ema=avg))
    assert flow.log_prob(b.x, b.y).isfinite().all() and avg.module.log_prob(b.x, b.y).isfinite().all()
    assert e.value.kept < e.value.step


@pytest.mark.parametrize('kw,says', [(dict(clip=-1.), 'clip'), (dict(clip=0.), 'clip'), (dict(warmup=-3), 'warmup'), (dict(warmup=100), 'warmup'),
                                     (dict(ema=.99), 'ema'), (dict(lr=math.nan), 'lr'), (dict(every=0), 'every'), (dict(amp='fp8'), 'amp')])
def test_arguments_that_would_mistrain_are_refused(kw, says):
    with pytest.raises(ValueError, match=says): next(fit(small(), stream(), steps=5, **kw))


def test_moving_average():
    "The average follows its recursion, step by step."
    flow = small()
    avg, want = ema(flow, .9), None
    for log in fit(flow, stream(), steps=6, every=1, ema=avg):
        now = [p.detach().double().clone() for p in flow.parameters()]
        want = now if want is None else [.9 * w + .1 * n for w, n in zip(want, now)]
    assert all(torch.allclose(p.double(), w, atol=1e-6) for p, w in zip(avg.module.parameters(), want))


def test_an_objective_with_parameters_is_trained_too():
    class Scaled(torch.nn.Module):
        def __init__(self): super().__init__(); self.bias = torch.nn.Parameter(torch.ones(()))
        def __call__(self, flow, x, y):
            loss = -flow.log_prob(x, y).mean() / x[0].numel() + self.bias**2
            loss.backward()
            return {'loss': loss.detach(), 'bias': self.bias.detach()}
    obj = Scaled()
    logs = list(fit(small(), stream(), obj, steps=5, every=5))
    assert obj.bias < 1 and 'bias' in logs[-1]


def test_bf16_autocast_keeps_the_likelihood_in_float32():
    flow, b = small(), next(stream())
    with torch.autocast('cpu', torch.bfloat16):
        z, logdet = flow(b.x, b.y)
        assert z.dtype == logdet.dtype == flow.log_prob(b.x, b.y).dtype == torch.float32
    logs = list(fit(flow, stream(), steps=10, every=10, amp='bf16'))
    assert math.isfinite(logs[-1]['loss'])


@pytest.mark.slow
def test_compile_gives_the_same_training():
    a, b = small(), small()
    la, lb = (list(fit(f, stream(), steps=5, every=1, compile=c)) for f, c in ((a, False), (b, True)))
    assert all(math.isclose(x['loss'], y['loss'], rel_tol=1e-4, abs_tol=1e-4) for x, y in zip(la, lb))
    assert set(a.state_dict()) == set(b.state_dict())


def test_interrupted_by_hand():
    flow = small()
    for log in fit(flow, stream(), steps=1000, every=1):
        if log['step'] == 3: break
    assert all(p.isfinite().all() for p in flow.parameters())


# ---------------------------------------------------------------------------
# bf16 by measuring, activations recomputed
@pytest.mark.parametrize('faster', [True, False])
def test_amp_by_measuring(monkeypatch, faster):
    "The choice is made on the first batch, said in the logs, and the run is what it would have been with that choice."
    from flowbook import train
    from flowbook.tarflow import TarFlow
    seen = []
    monkeypatch.setattr(train, 'faster_in_bf16', lambda flow, x, y, objective, more: seen.append(len(x)) or faster)
    def run(amp):
        torch.manual_seed(0)
        flow = TarFlow(8, 1, 2, 16, 2, 1, 8, classes=10)
        return list(train.fit(flow, batches(load('digits'), 8, seed=0), steps=4, every=2, amp=amp))
    measured, plain = run('measure'), run('bf16' if faster else 'off')
    assert seen == [8] and [m['amp'] for m in measured] == ['bf16' if faster else 'off'] * 2 and 'amp' not in plain[0]
    assert [m['loss'] for m in measured] == [p['loss'] for p in plain]


def test_measuring_changes_nothing():
    from flowbook.tarflow import TarFlow
    from flowbook.train import faster_in_bf16
    flow, x, y = TarFlow(8, 1, 2, 16, 2, 1, 8, classes=10), torch.randn(4, 1, 8, 8), torch.zeros(4).long()
    for p in flow.parameters(): p.grad = torch.ones_like(p)
    weights, rng = [p.detach().clone() for p in flow.parameters()], torch.random.get_rng_state()
    assert faster_in_bf16(flow, x, y, gain=0.) and not faster_in_bf16(flow, x, y, gain=1e9)
    assert all(torch.equal(p, w) and torch.equal(p.grad, torch.ones_like(p)) for p, w in zip(flow.parameters(), weights))
    assert torch.equal(torch.random.get_rng_state(), rng)


@pytest.mark.parametrize('kind', ['tarflow', 'coupling', 'maf'])
def test_recomputed_activations_give_the_same_gradients(kind):
    from flowbook.flows import MAF, Chain, shake
    from flowbook.tarflow import TarFlow
    from flowbook.train import NLL
    torch.manual_seed(0)
    if kind == 'maf': flow, x = shake(Chain(MAF(6, 8, classes=3), MAF(6, 8, classes=3))).double(), torch.randn(4, 6).double()
    else: flow, x = shake(TarFlow(8, 1, 2, 16, 2, 2, 8, classes=3, kind={'tarflow': 'nvp'}.get(kind, kind))).double(), torch.randn(4, 1, 8, 8).double()
    grads, y = [], torch.tensor([0, 1, 2, -1])
    for checkpoint in (False, True):
        flow.zero_grad()
        loss = NLL(checkpoint)(flow, x, y)['loss']
        grads.append((loss, *(p.grad.clone() for p in flow.parameters() if p.grad is not None)))
    assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(*grads)) and len(grads[0]) == len(grads[1])
    with pytest.raises(ValueError, match='checkpoint'): NLL('yes')


def test_a_target_taken_after_the_noise_is_refused():
    from flowbook.repa import KeepClean, Lookup
    from flowbook.train import Dequantize
    data = load('digits')
    first = lambda *transforms: next(batches(data, 4, transforms=transforms))
    for noise in (GaussianNoise(.1), Dequantize(17)):
        assert (first(KeepClean(), noise).target <= 1).all()
        with pytest.raises(ValueError, match='transforms: KeepClean.*as its target after .* has added noise; put it before'):
            first(noise, DropLabels(.1), KeepClean())
    assert first(GaussianNoise(0.), KeepClean()).target is not None       # no noise, no harm
    assert first(GaussianNoise(.1), Lookup(torch.zeros(len(data), 4, 2))).target.shape == (4, 4, 2)    # features by sample see no noise
