"""Guidance: w = 0 is no guidance bit for bit, formulas against densities, and one value for all samplers."""
import math

import pytest
import torch

from flowbook.denoise import denoise
from flowbook.flows import shake
from flowbook.guidance import ClassGuidance, Guidance, StarGuidance, TemperatureGuidance, guided_inverse, guided_sample, inverse_blocks, linear, score_guidance
from flowbook.tarflow import TarFlow


def flow(kind='nvp', classes=3, **kw): return shake(TarFlow(4, 1, 2, 16, 3, 2, 8, classes=classes, kind=kind, **kw)).eval()


Y = torch.tensor([0, 1, 2, 1])


def seeded(): return torch.Generator().manual_seed(5)


@pytest.mark.parametrize('kind', ['nvp', 'vp', 'coupling'])
@pytest.mark.parametrize('none', [None, Guidance(), ClassGuidance(0.), ClassGuidance(0., 'linear'), TemperatureGuidance(0., 2.), TemperatureGuidance(3., 1.), StarGuidance(0.), StarGuidance(0., everywhere=True)], ids=repr)
def test_without_weight_it_is_the_unguided_sample_bit_for_bit(kind, none):
    f = flow(kind)
    assert torch.equal(guided_sample(f, Y, none, seeded()), f.sample(Y, generator=seeded()))


@pytest.mark.parametrize('kind', ['nvp', 'vp', 'coupling'])
@pytest.mark.parametrize('guide', [ClassGuidance(1.), ClassGuidance(1., 'linear'), TemperatureGuidance(1., 2.), StarGuidance(1.), StarGuidance(1., everywhere=True)], ids=repr)
def test_guided_samples_differ_and_are_finite(kind, guide):
    f = flow(kind)
    x = guided_sample(f, Y, guide, seeded())
    assert x.isfinite().all() and x.shape == (4, 1, 4, 4) and not torch.equal(x, f.sample(Y, generator=seeded()))


def naive(f, z, y, join):
    "Every token from whole forward passes of both predictions: no cache, no guidance object."
    for t in range(len(f.blocks), 0, -1):
        b = f.blocks[t - 1]
        z = b.read(z)
        x = torch.zeros_like(z)
        for i in range(z.shape[1]):
            cond, uncond = b.params(x, y)[:2], b.params(x, None)[:2]
            mu, alpha = join(*(p[:, i] for p in cond), *(p[:, i] for p in uncond), t, i)
            x = x.clone(); x[:, i] = z[:, i] * alpha.exp() + mu
        z = b.unread(x)
    return z


@pytest.mark.parametrize('schedule', ['constant', 'linear'])
def test_the_linear_rule_is_that_of_the_paper(schedule):
    f, w = flow().double(), 1.7
    z = torch.randn(4, 4, 4, dtype=torch.float64)
    share = (lambda i: i / 3) if schedule == 'linear' else (lambda i: 1.)
    want = naive(f, z, Y, lambda mc, ac, mu, au, t, i: ((1 + w * share(i)) * mc - w * share(i) * mu, (1 + w * share(i)) * ac - w * share(i) * au))
    *_, (t, got) = inverse_blocks(f, z, Y, ClassGuidance(w, schedule))
    assert t == 1 and (got - want).abs().max() < 1e-12


def test_the_product_of_gaussians_in_the_deep_block_alone():
    f, w = flow().double(), 1.7
    z = torch.randn(4, 4, 4, dtype=torch.float64)
    def join(mc, ac, mu, au, t, i):
        if t < 3: return mc, ac
        precision_c, precision_u = (-2 * ac).exp(), torch.minimum((-2 * au).exp(), (-2 * ac).exp())
        p = (1 + w) * precision_c - w * precision_u
        return ((1 + w) * precision_c * mc - w * precision_u * mu) / p, -.5 * p.log()
    *_, (_, got) = inverse_blocks(f, z, Y, StarGuidance(w))
    assert (got - naive(f, z, Y, join)).abs().max() < 1e-12


def test_the_product_is_the_quotient_of_densities_and_the_clip_keeps_it_positive():
    t = lambda v: torch.tensor(v, dtype=torch.float64)
    x = torch.linspace(-15, 15, 300_001, dtype=torch.float64)
    for mc, sc, mu, su, w in ((.3, .5, -.4, .9, 2.), (0., 1., 1., 1., 5.), (1., .2, 1., 3., .5)):
        log_q = -(1 + w) * ((x - mc) / sc)**2 / 2 + w * ((x - mu) / su)**2 / 2
        q = (log_q - log_q.max()).exp(); q = q / q.sum()
        m, a = StarGuidance(w)((t(mc), t(sc).log()), (t(mu), t(su).log()), 1, 0, 1)
        mean = (q * x).sum()
        assert m == pytest.approx(mean.item(), abs=1e-8) and a.exp() == pytest.approx((q * (x - mean)**2).sum().sqrt().item(), abs=1e-8)
    m, a = StarGuidance(3.)((t(1.), t(2.).log()), (t(0.), t(1.).log()), 1, 0, 1)              # sigma_c > sigma_u: clipped
    linear_m, _ = ClassGuidance(3.)((t(1.), t(2.).log()), (t(0.), t(1.).log()), 1, 0, 1)
    assert a.exp() == pytest.approx(2.) and m == pytest.approx(linear_m.item())


@pytest.mark.parametrize('guide', [ClassGuidance(1.3, 'linear'), TemperatureGuidance(.7, 2., 'linear'), StarGuidance(2., 'linear'), Guidance()], ids=repr)
def test_all_positions_at_once_or_one_by_one(guide):
    "What a parallel sampler needs: i may be a tensor of positions."
    cond, uncond = ((torch.randn(2, 6, 3), torch.randn(2, 6, 3)) for _ in range(2))
    whole = guide(cond, uncond, 3, torch.arange(6)[:, None], 6)
    for i in range(6):
        one = guide(tuple(p[:, i] for p in cond), tuple(p[:, i] for p in uncond), 3, i, 6)
        for a, b in zip(whole, one): assert torch.allclose(a[:, i], b, atol=1e-6)


def test_the_trajectory_ends_at_the_inverse_and_inverts_block_by_block():
    f = flow().double()
    z = torch.randn(3, 4, 4, dtype=torch.float64)
    steps = list(inverse_blocks(f, z, Y[:3]))
    assert [t for t, _ in steps] == [3, 2, 1]
    before = z
    for t, x in steps:
        assert torch.allclose(f.blocks[t - 1](x, Y[:3])[0], before, atol=1e-12)
        before = x
    assert torch.equal(guided_inverse(f, z, Y[:3]), f.inverse(z, Y[:3]))


def test_dropped_labels_are_unguided_within_a_batch():
    f = flow().double()
    z, y = torch.randn(3, 4, 4, dtype=torch.float64), torch.tensor([1, -1, 2])
    got, plain = guided_inverse(f, z, y, ClassGuidance(2.)), f.inverse(z, y)
    assert torch.allclose(got[1], plain[1], atol=1e-10) and not torch.allclose(got[0], plain[0])


def test_score_guidance_is_a_difference_of_two_tweedie_steps():
    f = flow().double()
    x, sigma = torch.randn(4, 1, 4, 4, dtype=torch.float64), .3
    want = x + denoise(f, x, sigma, Y) - denoise(f, x, sigma)
    assert torch.allclose(score_guidance(f, x, Y, sigma**2), want, atol=1e-12)
    assert torch.equal(score_guidance(f, x, Y, 0.), x)


def test_extremes_give_samples_or_numbers_that_can_be_counted():
    f = flow()
    for guide in (ClassGuidance(10.), TemperatureGuidance(10., .1), TemperatureGuidance(10., 50.), StarGuidance(10., everywhere=True), ClassGuidance(1e6)):
        assert guided_sample(f, Y, guide, seeded()).shape == (4, 1, 4, 4)


@pytest.mark.parametrize('make,says', [
    (lambda: ClassGuidance(-1.), '0 or more'), (lambda: ClassGuidance(math.nan), '0 or more'), (lambda: ClassGuidance('2'), '0 or more'), (lambda: StarGuidance(math.inf), '0 or more'),
    (lambda: ClassGuidance(1., 'linaer'), "'constant' or 'linear'"), (lambda: TemperatureGuidance(1., 0.), 'above 0'), (lambda: TemperatureGuidance(1., -2.), 'above 0'), (lambda: TemperatureGuidance(1., None), 'above 0'),
    (lambda: guided_sample(flow(classes=0), 2, ClassGuidance(1.)), 'this flow has none'), (lambda: guided_sample(flow(classes=0), 2, StarGuidance(1.)), 'this flow has none'),
    (lambda: guided_sample(flow(), 2, ClassGuidance(1.)), 'needs labels'), (lambda: guided_sample(flow(), torch.tensor([3]), ClassGuidance(1.)), '3 classes'), (lambda: guided_sample(flow(), -2), '0 or more'),
    (lambda: guided_inverse(flow(), torch.randn(2, 5, 4)), 'z: shape .*must be a tensor .b, 4, 4.'), (lambda: score_guidance(flow(classes=0), torch.randn(2, 1, 4, 4), None, .1), 'has none'),
    (lambda: score_guidance(flow(), torch.randn(2, 1, 4, 4), None, .1), 'labels'), (lambda: score_guidance(flow(), torch.randn(4, 1, 4, 4), Y, math.nan), 'finite')])
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_linear_schedule_counts_tokens():
    assert [linear(i, 5) for i in range(5)] == [0, .25, .5, .75, 1] and linear(0, 1) == 0


@pytest.mark.parametrize('guide,share', [(ClassGuidance(1.7), lambda i: 1.), (ClassGuidance(1.7, 'linear'), lambda i: i / 3)], ids=['constant', 'linear'])
def test_a_coupling_is_guided_by_the_half_that_passes(guide, share):
    "Both predictions come from the half that passes; joined, they invert the other half. TARFlow Table 5."
    f = flow('coupling').double()
    z = got = torch.randn(4, 4, 4, dtype=torch.float64)
    for b in reversed(f.blocks):
        (mc, ac), (mu, au) = b.params(z, Y)[:2], b.params(z, None)[:2]
        x, keep = z.clone(), b.keep()
        for i in range(4):                                       # token by token, number by number that is steered
            w = 1.7 * share(i)
            alpha, shift = (1 + w) * ac[:, i] - w * au[:, i], (1 + w) * mc[:, i] - w * mu[:, i]
            x[:, i, ~keep] = (z[:, i] * alpha.exp() + shift)[:, ~keep]
        z = x
    *_, (t, got) = inverse_blocks(f, got, Y, guide)
    assert t == 1 and (got - z).abs().max() < 1e-12
