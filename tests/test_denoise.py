"""Tweedie against closed forms, and a score that leaves no trace."""
import math

import pytest
import torch

from flowbook.denoise import denoise, log_prob_and_score, score
from flowbook.flows import MAF, OnImages, RealNVP, shake
from flowbook.noise import PointsFlow
from flowbook.tarflow import TarFlow


@pytest.mark.parametrize('d,sigma', [(1, .3), (2, .15), (2, 1.), (4, .5)])
def test_tweedie_is_exact_on_a_mixture(d, sigma):
    points = torch.randn(25, d, dtype=torch.float64)
    flow = PointsFlow(points, sigma)
    y = points[torch.randint(25, (50,))] + sigma * torch.randn(50, d, dtype=torch.float64)
    assert (denoise(flow, y, sigma) - flow.posterior_mean(y)).abs().max() <= 1e-8
    twice = flow.posterior_mean(flow.posterior_mean(y))
    assert (denoise(flow, y, sigma, steps=2) - twice).abs().max() <= 1e-8


def flows():
    yield 'nvp', shake(TarFlow(4, 1, 2, 16, 3, 2, 8, classes=3)).double(), torch.tensor([0, 1, 2, -1, 1])
    yield 'vp', shake(TarFlow(4, 1, 2, 16, 2, 1, 8, classes=3, kind='vp')).double(), torch.rand(5, 3).double()
    yield 'coupling', shake(TarFlow(4, 1, 2, 16, 2, 1, 8, kind='coupling')).double(), None
    yield 'maf', OnImages(shake(MAF(16, 16, blocks=2)), (1, 4, 4)).double(), None
    yield 'realnvp', OnImages(shake(RealNVP(16, 16, blocks=2)), (1, 4, 4)).double(), None


@pytest.mark.parametrize('name,flow,y', list(flows()), ids=lambda v: v if isinstance(v, str) else '')
def test_the_score_is_the_gradient_of_each_samples_log_density(name, flow, y):
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    log_p, s = log_prob_and_score(flow, x, y)
    assert torch.allclose(log_p, flow.log_prob(x, y))
    h, v = 1e-6, torch.randn_like(x)
    slope = (flow.log_prob(x + h * v, y) - flow.log_prob(x - h * v, y)) / (2 * h)
    assert torch.allclose((s * v).flatten(1).sum(1), slope, rtol=1e-5, atol=1e-6)
    assert torch.allclose(score(flow, x, y, checkpoint=True), s, rtol=1e-12, atol=1e-12)
    one = score(flow, x[:1], None if y is None else y[:1])
    assert torch.allclose(one, s[:1], rtol=1e-10)                # a sample's score does not depend on its batch


def test_it_leaves_no_trace_and_works_inside_a_sampler():
    flow = shake(TarFlow(4, 1, 2, 16, 2, 1, 8, classes=3))
    x, y = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    want = denoise(flow, x, .2, y)
    kept, flags = x.clone(), [p.requires_grad for p in flow.parameters()]
    with torch.inference_mode():
        xi, yi = x * 1, y * 1                                    # tensors of inference_mode themselves
        assert torch.equal(denoise(flow, xi, .2, yi), want)
        assert torch.equal(denoise(flow, xi, .2, yi, checkpoint=True), want)
    with torch.no_grad(): assert torch.equal(denoise(flow, x, .2, y), want)
    assert torch.equal(x, kept) and not want.requires_grad
    assert all(p.grad is None for p in flow.parameters()) and flags == [p.requires_grad for p in flow.parameters()]
    flow.log_prob(x, y).sum().backward()                         # and training goes on
    assert all(p.grad is not None for p in flow.parameters())


def test_checkpointing_holds_less():
    flow, x = shake(TarFlow(8, 1, 2, 32, 4, 2, 16)), torch.randn(8, 1, 8, 8)
    def held(**kw):
        sizes = {}
        def pack(t): sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
        from flowbook.denoise import frozen_log_prob
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): frozen_log_prob(flow, x.clone().requires_grad_(), None, **kw)
        return sum(sizes.values())
    assert held(checkpoint=True) < .3 * held(checkpoint=False)


@pytest.mark.parametrize('args,says', [((-.1,), '0 or more'), ((math.nan,), '0 or more'), (('big',), '0 or more'), ((.1, torch.tensor([0, 1, 3])), '3 classes'), ((.1, torch.tensor([0])), '3 samples'),
                                       ((.1, None, -1), 'steps'), ((.1, [0, 1, 2]), 'list')])
def test_bad_input(args, says):
    flow = TarFlow(4, 1, 2, 8, 1, 1, 8, classes=3)
    with pytest.raises(ValueError, match=says): denoise(flow, torch.randn(3, 1, 4, 4), *args)
    with pytest.raises(ValueError, match='floating'): denoise(flow, torch.zeros(3, 1, 4, 4, dtype=torch.long), .1)
    for checkpoint in (False, True):
        with pytest.raises(ValueError, match='takes images'): denoise(flow, torch.zeros(3, 1, 5, 5), .1, checkpoint=checkpoint)


def test_threads_leave_the_parameters_of_a_model_alone():
    "`functional_call` swaps parameters for the length of a call: without a lock, threads restored each other's, and a model could no longer be trained."
    import threading
    flow = shake(TarFlow(4, 1, 2, 16, 2, 1, 8, classes=3), .1, 0)
    before, x, want, got = list(flow.parameters()), torch.randn(2, 1, 4, 4), {}, {}
    for k in range(3): want[k] = score(flow, x + k, torch.tensor([k, -1]))
    def many(k):
        for _ in range(40): got[k] = score(flow, x + k, torch.tensor([k, -1]))
    threads = [threading.Thread(target=many, args=(k,)) for k in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(a is b and b.requires_grad for a, b in zip(before, flow.parameters())) and all(torch.equal(want[k], got[k]) for k in range(3))


def test_the_best_sigma_lies_between_the_points_of_a_grid():
    from flowbook.denoise import best_sigma
    sigmas = [.02, .05, .1, .2, .3, .5]
    for true in (.06, .1, .17, .28):                              # a parabola is found exactly, on a grid that is not even
        got = best_sigma(sigmas, [math.exp(3 + .4 * math.log(s / true)**2) for s in sigmas])
        assert got == pytest.approx(true, rel=1e-6)
    assert best_sigma(sigmas, [1, 2, 3, 4, 5, 6]) == .02 and best_sigma(sigmas, [6, 5, 4, 3, 2, 1]) == .5 and best_sigma([.2], [7.]) == .2


def sweep(seed, raw=.09, denoised=.13, gain=.7): # FIDs whose lowest points are known
    grid, wobble = ('0.02', '0.05', '0.1', '0.2', '0.3', '0.5'), 1 + .02 * (seed % 3)
    fid = lambda k, best: 30 * math.exp(.4 * math.log(float(k) / (best * wobble))**2)
    rows = {k: {'fid_raw': fid(k, raw), 'fid_denoised': gain * fid(k, denoised), 'condition': 10. + seed, 'broken': 30 * (k == '0.02')} for k in grid}
    return {'noise': {'uniform': {**rows['0.1'], 'condition': 70. + seed}, **rows}, 'rank_correlation': .9}


def test_verdicts_on_the_noise_sweep_come_out_each_way():
    from flowbook.denoise import judge_noise_sweep
    state = lambda **kw: {c: v.state for c, v in judge_noise_sweep([sweep(s, **kw) for s in range(6)]).items()}
    assert state() == {'T7': 'seen', 'T8': 'seen', 'T13': 'seen'}
    assert state(denoised=.07)['T7'] == state(gain=30.)['T7'] == 'reversed'          # less noise is best; denoising harms
    wavers = [sweep(s, denoised=.09 + .05 * (-1)**s) for s in range(6)]
    assert judge_noise_sweep(wavers)['T7'].state == 'not seen'
