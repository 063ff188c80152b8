"""Properties that hold for any flow, shape, precision, scale and batch: hypothesis draws them, the same ones at every run."""
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings, strategies as st

from flowbook import checkpoint
from flowbook.classify import bayes, class_log_probs
from flowbook.data import Batch, Flip, InMemory, batches, from_levels, patchify, to_levels, unpatchify
from flowbook.denoise import denoise, score
from flowbook.evidence import STATES, Verdict, all_of, compare, detectable, power, rule, summary
from flowbook.flows import MADE, MAF, Autoregressive, Chain, Coupling, OnImages, RealNVP, jacobian, normal_log_prob, shake
from flowbook.guidance import ClassGuidance, Guidance, StarGuidance, TemperatureGuidance, constant, guided_inverse, guided_sample, linear, score_guidance
from flowbook.latent import LatentFlow, LatentTarFlow, Vae
from flowbook.loader import micro_batches
from flowbook.metrics import Moments, frechet
from flowbook.noise import PointsFlow, Shift, bits_per_dim
from flowbook.sampling import invert, sample
from flowbook.simflow import DIGITS, AdaTarFlow, Additive, Learned, Linear, Mean, SimFlow, Slerp, Unperturbed, posterior_of
from flowbook.tarflow import TarFlow
from flowbook.train import Dequantize, DropLabels, GaussianNoise, cosine, to_bits

f64, HALF = torch.float64, (torch.float16, torch.bfloat16)


def drawn(examples=15): # the same examples at every run and on every machine; a failure is told at once, and not made smaller first
    return settings(phases=[Phase.explicit, Phase.generate], derandomize=True, deadline=None, database=None, max_examples=examples, suppress_health_check=list(HealthCheck))


def numbers(*shape, seed=0, dtype=f64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)


# ---- what is drawn

seeds, scales = st.integers(0, 10**6), st.floats(-3, 3).map(lambda u: 10.**u)       # 1e-3 .. 1e3
VECTORS = ('coupling', 'RealNVP', 'MAF', 'autoregressive', 'chain', 'on images', 'points')
TOKENS = ('nvp', 'vp', 'coupling tokens', 'latent nvp', 'latent vp', 'latent coupling', 'adaLN')


def points(seed=0, m=4, d=2, sigma=.5): return PointsFlow(numbers(m, d, seed=seed), sigma)


@st.composite
def vector_flows(draw, kind): # -> flow, shape of one x
    d, k, hidden, blocks = draw(st.integers(1, 5)), draw(st.sampled_from([0, 0, 1, 3])), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    if kind == 'points': return points(draw(seeds), draw(st.integers(1, 5)), d, draw(st.floats(.2, 2.))), (d,)
    if kind == 'coupling': return Coupling(torch.tensor(draw(st.lists(st.booleans(), min_size=d, max_size=d))), hidden, draw(st.integers(1, 3)), k), (d,)
    if kind == 'RealNVP': return RealNVP(d + 1, hidden, 2, blocks, k), (d + 1,)
    if kind == 'MAF': return MAF(d, hidden, draw(st.integers(1, 3)), blocks, k), (d,)
    if kind == 'autoregressive':
        order = torch.tensor(draw(st.permutations(range(d))))
        return Autoregressive(MADE(order, hidden, 2, k), order, k), (d,)
    if kind == 'chain': return Chain(MAF(d + 1, hidden, 1, 1, k), RealNVP(d + 1, hidden, 2, 2, k)), (d + 1,)
    c, h, w = draw(st.sampled_from([(1, 1, 1), (1, 2, 3), (3, 1, 2), (2, 2, 1)]))
    return OnImages(MAF(c * h * w, hidden, 2, blocks, k), (c, h, w)), (c, h, w)


@st.composite
def token_flows(draw, kind, classes=None, most=24, least=1): # -> flow, shape of one x: odd patches, images that are not square, 1 to 4 channels, a network that is deep in one block
    p, c = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    coupling = kind.endswith(('coupling', 'coupling tokens'))
    while c * p * p * rows * columns > most: p, c, rows, columns = max(p - 1, 1), max(c - (p == 1), 1), rows - (p == 1 and c == 1 and rows > 1), columns - (p == 1 and c == 1 and rows == 1)
    if coupling and c * p * p < 2: c = 2
    if rows * columns < least: columns = least
    T, e = draw(st.integers(1, 3)), 4 if kind.startswith('latent') else draw(st.sampled_from([1, 2, 3, 8]))
    layers = draw(st.one_of(st.integers(1, 2), st.tuples(*[st.integers(1, 3)] * T)))
    orders = draw(st.sampled_from(['alternate', 'forward', 'reverse']))
    if not coupling and draw(st.booleans()): orders = [draw(st.permutations(range(rows * columns))) for _ in range(T)]
    k = draw(st.sampled_from([0, 1, 3])) if classes is None else classes
    make = {'latent': LatentTarFlow, 'adaLN': AdaTarFlow}.get(kind.split()[0], TarFlow)
    kw = {} if kind == 'adaLN' else {'kind': 'coupling' if coupling else kind.split()[-1]}
    shape = (c, p * rows, p * columns)
    flow = make(shape[1] if rows == columns and draw(st.booleans()) else shape[1:], c, p, e * draw(st.integers(1, 2)), T, layers, e, k, orders=orders, **kw)
    return flow, shape


@st.composite
def any_flow(draw, kind, **kw):
    flow, shape = draw(vector_flows(kind) if kind in VECTORS else token_flows(kind, **kw))
    if kind != 'points': shake(flow, draw(st.floats(.02, .15)), draw(seeds))
    return flow.to(f64), shape


@st.composite
def labels(draw, k, b, dtype=f64): # every kind that a flow of k classes takes
    which = draw(st.sampled_from(['none', 'labels', 'weights'])) if k else 'none'
    if which == 'labels': return torch.tensor(draw(st.lists(st.integers(-1, k - 1), min_size=b, max_size=b)), dtype=draw(st.sampled_from([torch.int64, torch.int32])))
    if which == 'weights': return numbers(b, k, seed=draw(seeds)).softmax(1).to(dtype)


def part(y, i): return None if y is None else y[i]
def in_units(flow, scale): # a network that knows how large its data are: alpha grows with the tokens, and exp(1000) is no number
    for block in getattr(flow, 'blocks', ()): block.proj_in.weight.data /= max(1., scale)
    return flow
def largest(*tensors): return max([1., *(t.abs().max().item() for t in tensors if t.numel())])


def params(*names): return pytest.mark.parametrize('kind', names)


# ---- the flows: there and back, volumes, densities

@params(*VECTORS[:-1], 'points', *TOKENS)
@drawn(12)
@given(data=st.data())
def test_there_and_back_and_the_volume_between(kind, data):
    "Round trips from both sides, the sign and the size of the Jacobian, and the density with its constants."
    flow, shape = data.draw(any_flow(kind))
    b, scale = data.draw(st.integers(0, 3)), data.draw(scales) if kind != 'points' else data.draw(st.floats(.01, 2.))   # the tails of a mixture end where float64 does
    x, y = scale * numbers(b, *shape, seed=data.draw(seeds)), data.draw(labels(flow.classes, b))
    kept, flow = x.clone(), in_units(flow, scale)
    with torch.no_grad():
        z, logdet = flow(x, y)
        back, log_p = flow.inverse(z, y), flow.log_prob(x, y)
    assert z.shape == (b, *flow.z_shape) and logdet.shape == log_p.shape == (b,) and back.shape == x.shape and torch.equal(x, kept)
    assert {t.dtype for t in (z, logdet, back, log_p)} == {f64}
    assert torch.allclose(back, x, rtol=0, atol=1e-9 * largest(x, z))
    var = torch.as_tensor(flow.prior_var, dtype=f64).detach()
    base = torch.distributions.Normal(torch.zeros_like(z), var.sqrt().expand(z.shape)).log_prob(z).flatten(1).sum(1)
    assert torch.allclose(log_p, base + logdet, rtol=1e-12, atol=1e-9)
    if b:
        sign, size = torch.linalg.slogdet(jacobian(flow, x[:1], part(y, slice(0, 1))))
        turns = torch.linalg.det(flow.to_parts(torch.eye(x[0].numel(), dtype=f64).view(-1, *shape)).flatten(1))            # to cut images into patches is a permutation
        assert sign == turns and torch.allclose(size, logdet[:1], rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        w = (1. if kind == 'points' else min(scale, 10.)) * numbers(b, *flow.z_shape, seed=data.draw(seeds))
        x = flow.inverse(w, y)
        assert torch.allclose(flow(x, y)[0], w, rtol=0, atol=1e-8 * largest(x, w))


@params(*VECTORS[:-1], *TOKENS)
@drawn(8)
@given(data=st.data())
def test_a_sample_does_not_see_its_batch(kind, data):
    flow, shape = data.draw(any_flow(kind))
    b = data.draw(st.integers(1, 4))
    x, y = numbers(b, *shape, seed=data.draw(seeds)), data.draw(labels(flow.classes, b))
    with torch.no_grad():
        z, log_p = flow(x, y)[0], flow.log_prob(x, y)
        back = flow.inverse(z, y)
        for i in range(b):
            one = slice(i, i + 1)
            assert torch.allclose(flow(x[one], part(y, one))[0], z[one], rtol=0, atol=1e-11) and torch.allclose(flow.log_prob(x[one], part(y, one)), log_p[one], rtol=0, atol=1e-10)
            assert torch.allclose(flow.inverse(z[one], part(y, one)), back[one], rtol=0, atol=1e-11)


@params(*VECTORS[:-1], *TOKENS)
@drawn(6)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, f64, *HALF]))
def test_the_precision_that_comes_goes_out_and_sums_have_digits(kind, data, dtype):
    "z and x in the precision of the flow; log-densities, sums of many numbers, in float32 at least."
    flow, shape = data.draw(any_flow(kind))
    b = data.draw(st.integers(0, 3))
    y, x = data.draw(labels(flow.classes, b, dtype)), data.draw(st.floats(.1, 3.)) * numbers(b, *shape, seed=data.draw(seeds))
    with torch.no_grad():
        exact = flow.log_prob(x, y)
        flow.to(dtype)
        z, logdet = flow(x.to(dtype), y)
        back, log_p = flow.inverse(z, y), flow.log_prob(x.to(dtype), y)
    assert z.dtype == back.dtype == dtype and log_p.dtype == torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(back.double(), x, rtol=0, atol=300 * eps * largest(x, z.double()))
    assert torch.allclose(log_p.double(), exact, rtol=300 * eps, atol=300 * eps * x[0].numel() if b else 0)


@pytest.mark.fault('arguments', 'a batch in another precision than the flow', 'it is refused, and nothing is rounded in silence; convert the batch or the flow')
@params(*VECTORS[:-1], *TOKENS)
@drawn(3)
@given(data=st.data(), own=st.sampled_from([torch.float32, f64]), other=st.sampled_from([torch.float32, f64, *HALF]))
def test_another_precision_is_refused(kind, data, own, other):
    flow, shape = data.draw(any_flow(kind))
    assume(own != other and (kind in VECTORS or flow.z_shape[0] > 1))        # a flow of one token asks its network nothing
    flow, x = flow.to(own), numbers(2, *shape, dtype=other)
    for call in (lambda: flow(x), lambda: flow.log_prob(x), lambda: flow.inverse(numbers(2, *flow.z_shape, dtype=other))):
        with pytest.raises((ValueError, RuntimeError), match='dtype|torch.float'): call()


@params(*TOKENS)
@drawn(8)
@given(data=st.data())
def test_labels_none_minus_one_and_weights_are_one_language(kind, data):
    flow, shape = data.draw(any_flow(kind, classes=data.draw(st.integers(1, 4))))
    b, k = data.draw(st.integers(0, 3)), flow.classes
    x, y = numbers(b, *shape, seed=data.draw(seeds)), torch.arange(b) % k
    with torch.no_grad():
        none, dropped, hard = flow.log_prob(x), flow.log_prob(x, torch.full((b,), -1)), flow.log_prob(x, y)
        assert torch.allclose(none, dropped, rtol=0, atol=1e-11)
        assert torch.allclose(hard, flow.log_prob(x, torch.eye(k, dtype=f64)[y]), rtol=0, atol=1e-11)
        if kind != 'adaLN': assert torch.allclose(none, flow.log_prob(x, torch.full((b, k), 1 / k, dtype=f64)), rtol=0, atol=1e-11)   # adaLN learns a vector for no label
        if b: assert torch.allclose(bayes(flow, x).sum(1), torch.ones(b, dtype=f64)) and torch.allclose(class_log_probs(flow, x)[range(b), y], hard, rtol=0, atol=1e-10)


@params('MAF', 'RealNVP', 'nvp', 'vp', 'latent nvp', 'adaLN', 'points')
@drawn(4)
@given(data=st.data())
def test_a_density_is_one_in_all(kind, data):
    "exp(log_prob) over the plane, or the line, by the midpoint rule."
    d, k, seed, scale = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([0, 2])), data.draw(seeds), data.draw(st.floats(.05, .2 if kind in VECTORS else .12))
    if kind in ('RealNVP',): d = 2
    flow = {'MAF': lambda: MAF(d, 8, 1, 2, k), 'RealNVP': lambda: RealNVP(2, 8, 1, 2, k), 'points': lambda: points(seed, 3, d)}.get(kind, lambda: {'latent nvp': LatentTarFlow, 'adaLN': AdaTarFlow}.get(kind, TarFlow)((1, d), 1, 1, 4, 2, 1, 4, k, **({'kind': 'vp'} if kind == 'vp' else {})))()
    flow = (flow if kind == 'points' else shake(flow, scale, seed)).double()
    far, n = 10., 200
    s = (torch.arange(n, dtype=f64) + .5) / n * 2 * far - far
    x = torch.cartesian_prod(*[s] * d).reshape(-1, d)
    y = torch.full((len(x),), data.draw(st.integers(-1, k - 1))) if flow.classes else None
    with torch.no_grad(): p = flow.log_prob(x if kind in ('MAF', 'RealNVP', 'points') else x.view(-1, 1, 1, d), y).exp()
    assert abs(p.sum().item() * (2 * far / n)**d - 1) < 2e-3


# ---- batches of nobody and of one, everywhere

SOLVERS = ('sequential', 'jacobi', 'gauss-seidel', 'auto', 3)


def guide(flow, draw):
    "A guidance that this flow can have, or none."
    w, schedule = draw(st.floats(0, 3)), draw(st.sampled_from(['constant', 'linear']))
    kinds = [None, Guidance(), TemperatureGuidance(w, draw(st.floats(.3, 3.)), schedule)]
    return draw(st.sampled_from(kinds + ([ClassGuidance(w, schedule), StarGuidance(w, schedule), StarGuidance(w, schedule, True)] if flow.classes else [])))


def labelled(guidance): return isinstance(guidance, ClassGuidance)


@params(*TOKENS)
@drawn(8)
@given(data=st.data())
def test_every_solver_is_the_inverse(kind, data):
    "Token by token, by windows of any size, and all at once: one answer, guided or not, for any number of samples."
    flow, _ = data.draw(any_flow(kind))
    b, guidance = data.draw(st.integers(0, 3)), guide(flow, data.draw)
    y = torch.arange(b) % flow.classes if labelled(guidance) else data.draw(labels(flow.classes, b))
    z = data.draw(st.floats(.01, 3.)) * numbers(b, *flow.z_shape, seed=data.draw(seeds))
    with torch.no_grad(): want = guided_inverse(flow, z, y, guidance)
    assert want.shape == (b, *flow.image_shape)
    for solver in (*SOLVERS[:3], data.draw(st.integers(1, 12)), [data.draw(st.integers(1, 9)) for _ in flow.blocks]):
        x = invert(flow, z, y, guidance, solver, 1e-12)
        assert x.dtype == f64 and torch.allclose(x, want, rtol=0, atol=1e-8 * largest(want)), solver


@pytest.mark.fault('arguments', 'an empty batch, or a batch of one', 'every flow, sampler, solver and guidance gives as many samples, densities and scores; nothing to do')
@params(*VECTORS[:-2], 'on images', 'points', *TOKENS)
@pytest.mark.parametrize('b', [0, 1])
@drawn(4)
@given(data=st.data())
def test_none_and_one(kind, b, data):
    "Forwards, backwards, densities, samples, scores, classes."
    flow, shape = data.draw(any_flow(kind, **({} if kind in VECTORS else {'most': 12})))
    k = flow.classes
    x, y = numbers(b, *shape), torch.zeros(b, dtype=torch.long) if k else None
    many = b if y is None else y
    assert flow.sample(many).shape == score(flow, x, y).shape == denoise(flow, x, .1, y, steps=2).shape == (b, *shape)
    assert normal_log_prob(flow(x, y)[0], flow.prior_var).shape == (b,)
    if k: assert score_guidance(flow, x, y, .2).shape == x.shape and bayes(flow, x).shape == (b, k)
    if kind in VECTORS[:-2]: return
    for solver in SOLVERS if kind in TOKENS else ('auto',):
        for guidance in (None, *([ClassGuidance(1.)] if k and kind in TOKENS else []), *([TemperatureGuidance(1., 2.)] if kind in TOKENS else [])):
            out = sample(flow, many, guidance, denoise=.1, solver=solver, on_broken='keep')
            assert out.shape == (b, *shape) and out.dtype == f64
    if kind in TOKENS: assert guided_sample(flow, many).shape == (b, *shape)


def tiny_vae():
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return Vae(AutoencoderKL(1, 1, ('DownEncoderBlock2D',) * 2, ('UpDecoderBlock2D',) * 2, (8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=4, sample_size=8,
                             scaling_factor=1.3, mid_block_add_attention=False), 'tiny')


@drawn(6)
@given(b=st.integers(0, 3), k=st.sampled_from([0, 3]), seed=seeds, solver=st.sampled_from(SOLVERS))
def test_a_flow_over_the_latents_of_a_vae(b, k, seed, solver):
    vae = tiny_vae()
    flow = shake(LatentTarFlow(4, 2, 2, 8, 2, 1, 4, k), .1, seed)
    flow.card = {'sigma': .2}
    model, x, y = LatentFlow(flow, vae), numbers(b, 1, 8, 8, seed=seed, dtype=torch.float32).clamp(-1, 1), torch.arange(b) % k if k else None
    assert model.encode(x).shape == (b, 2, 4, 4) and model.decode(model.encode(x, sample=False)).shape == x.shape and model.log_prob(x, y).shape == (b,)
    assert model.sample(b if y is None else y, solver=solver, on_broken='keep').shape == x.shape
    with torch.no_grad():                                     # the flow itself over them: there and back
        z = model.noisy(model.encode(x, sample=False))
        assert torch.allclose(flow.inverse(flow(z, y)[0], y), z, rtol=0, atol=1e-4)


@drawn(8)
@given(b=st.integers(0, 3), k=st.sampled_from([0, 3]), seed=seeds, solver=st.sampled_from(SOLVERS), gamma=st.sampled_from([0., .25]),
       posterior=st.sampled_from([Mean(Additive(.5)), Mean(Unperturbed()), Mean(Linear(.3)), Mean(Slerp()), Learned(), Learned(Additive(.2))]))
def test_an_encoder_a_decoder_and_a_flow(b, k, seed, solver, gamma, posterior):
    model = shake(SimFlow({**DIGITS['vae'], 'latent_channels': 2, 'block_out_channels': (4, 4), 'norm_num_groups': 2}, dict(image_size=4, channels=2, patch_size=1, dim=8, blocks=2, layers=(1, 2), head_dim=4, classes=k), posterior), .05, seed).eval()
    x, y = numbers(b, *model.image_shape, seed=seed, dtype=torch.float32), torch.arange(b) % k if k else None
    with torch.no_grad():
        latent = model.latent(x)
        assert latent.mu.shape == latent.x.shape == (b, *model.flow.image_shape) and latent.entropy.shape == (b,) and latent.sigma.shape == ()
        assert model.decode(latent.x).shape == x.shape and model.flow.log_prob(latent.x, y).shape == (b,)
        e = numbers(b, model.posterior.draws(model.N), seed=seed, dtype=torch.float32)
        assert torch.equal(model.latent(x, e).x, model.latent(x, e).x) and repr(posterior_of(posterior.config)) == repr(posterior)
    if not k: gamma = 0.
    out = model.sample(b if y is None else y, StarGuidance(1.) if k else None, gamma, torch.Generator().manual_seed(seed), solver)
    assert out.shape == x.shape and out.dtype == x.dtype and model.sample(b if y is None else y, decode=False).shape == latent.x.shape


# ---- guidance

@params('nvp', 'vp', 'coupling tokens', 'latent nvp', 'adaLN')
@drawn(6)
@given(data=st.data())
def test_no_weight_is_no_guidance_to_the_last_bit(kind, data):
    flow, _ = data.draw(any_flow(kind, classes=3))
    b, solver = data.draw(st.integers(0, 3)), data.draw(st.sampled_from(['sequential', 'jacobi', 3]))
    y, z = torch.arange(b) % 3, numbers(b, *flow.z_shape, seed=data.draw(seeds))
    want = invert(flow, z, y, None, solver)
    for none in (Guidance(), ClassGuidance(0.), ClassGuidance(0, 'linear'), StarGuidance(0.), StarGuidance(0., everywhere=True), TemperatureGuidance(0., 2.), TemperatureGuidance(3., 1.)):
        assert torch.equal(invert(flow, z, y, none, solver), want), none
    with torch.no_grad(): assert torch.equal(guided_inverse(flow, z, y, ClassGuidance(0.)), flow.inverse(z, y))
    x = numbers(b, *flow.image_shape)
    assert torch.equal(score_guidance(flow, x, y, 0.), x)


@drawn(60)
@given(w=st.floats(0, 20), schedule=st.sampled_from(['constant', 'linear']), n=st.integers(1, 300), data=st.data())
def test_rules_of_guidance(w, schedule, n, data):
    i, b = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, 3))
    cond, uncond = [(3 * numbers(b, 4, seed=data.draw(seeds)), numbers(b, 4, seed=data.draw(seeds))) for _ in range(2)]
    share = w * {'constant': constant, 'linear': linear}[schedule](i, n)
    assert 0 <= share <= w and (i < n - 1 or n == 1 or share == w)
    for kind in (ClassGuidance, StarGuidance, lambda w, s: TemperatureGuidance(w, 2., s)):
        rule_, equal = kind(w, schedule), kind(w, schedule)(cond, cond, 1, i, n)
        for a, c in zip(equal, cond): assert torch.allclose(a, c, rtol=1e-12, atol=1e-12)            # two that agree are left as they are
        for a, c in zip(kind(0., schedule)(cond, uncond, 1, i, n), cond): assert torch.allclose(a, c, rtol=0, atol=1e-15)
        if not isinstance(rule_, StarGuidance):
            for a, c, u in zip(rule_(cond, uncond, 1, i, n), cond, uncond): assert torch.allclose(a, c + share * (c - u))
        else:                                                                                      # a product of Gaussians is never wider than the conditional one
            mu, alpha = rule_(cond, uncond, 1, i, n)
            assert mu.isfinite().all() and bool((alpha <= cond[1] + 1e-12).all())


# ---- images, levels, patches, noise

@drawn(60)
@given(levels=st.integers(2, 256), shape=st.lists(st.integers(0, 5), min_size=0, max_size=4), seed=seeds)
@example(levels=2, shape=[], seed=0)
@example(levels=256, shape=[256], seed=0)
def test_levels_come_back(levels, shape, seed):
    v = torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    x = from_levels(v, levels)
    assert x.dtype == torch.float32 and x.shape == v.shape and torch.equal(to_levels(x, levels), v) and bool((x.abs() <= 1).all())
    assert torch.equal(to_levels(x.double() + (torch.rand(shape, dtype=f64) - .5) * 1.9 / (levels - 1), levels), v)            # rounded to the nearest
    every = from_levels(torch.arange(levels), levels)
    assert every[0] == -1 and every[-1] == 1 and bool((every.diff() > 0).all())


@drawn(40)
@given(b=st.integers(0, 3), c=st.integers(1, 4), p=st.integers(1, 5), rows=st.integers(1, 4), columns=st.integers(1, 4), dtype=st.sampled_from([torch.float32, f64, *HALF, torch.uint8, torch.int64]))
def test_patches_are_a_permutation(b, c, p, rows, columns, dtype):
    x = torch.arange(b * c * p * p * rows * columns).view(b, c, p * rows, p * columns).to(dtype)
    tokens = patchify(x, p)
    assert tokens.shape == (b, rows * columns, c * p * p) and tokens.dtype == dtype and torch.equal(unpatchify(tokens, p, x.shape[1:]), x)
    assert torch.equal(tokens.flatten().double().sort()[0], x.flatten().double().sort()[0])
    if b: assert torch.equal(tokens[0, 0].view(c, p, p), x[0, :, :p, :p]) and torch.equal(tokens[0, -1].view(c, p, p), x[0, :, -p:, -p:])


@st.composite
def some_batch(draw):
    b, levels = draw(st.integers(0, 5)), draw(st.integers(2, 256))
    index = torch.tensor(draw(st.lists(st.integers(0, 10**6), min_size=b, max_size=b, unique=True)), dtype=torch.long)
    v = torch.randint(levels, (b, draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))), generator=torch.Generator().manual_seed(draw(seeds)))
    return Batch(from_levels(v, levels), torch.arange(b) % 3, index, draw(st.integers(0, 9)), draw(st.integers(0, 99))), levels, v


@drawn(40)
@given(case=some_batch())
def test_dequantized_values_stay_in_their_bins(case):
    batch, levels, v = case
    x = Dequantize(levels)(batch).x
    t = (x.double() + 1) / 2 * levels                        # v + u
    assert x.dtype == torch.float32 and x.shape == v.shape and bool((x.abs() <= 1).all()) and bool(((t >= v - 1e-4) & (t <= v + 1 + 1e-4)).all())


@pytest.mark.parametrize('transform', [Flip(.5), GaussianNoise(.3), GaussianNoise(0.), Dequantize(17), DropLabels(.5), DropLabels(1.), Shift(1), Shift(0)], ids=repr)
@drawn(15)
@given(case=some_batch(), data=st.data())
def test_randomness_belongs_to_the_sample(transform, case, data):
    "A sample is changed in the same way alone, in another order, and in another batch; a batch of none stays one."
    batch = case[0]
    out, order = transform(batch), torch.tensor(data.draw(st.permutations(range(len(batch.x)))), dtype=torch.long)[:data.draw(st.integers(0, 5))]
    assert out.x.shape == batch.x.shape and out.x.dtype == batch.x.dtype and out.y.dtype == torch.int64 and torch.equal(out.index, batch.index)
    some = transform(Batch(batch.x[order], batch.y[order], batch.index[order], batch.epoch, batch.seed))
    assert torch.equal(some.x, out.x[order]) and torch.equal(some.y, out.y[order])


@drawn(25)
@given(levels=st.integers(2, 256), n=st.integers(1, 4), seed=seeds, nats=st.floats(-5, 5))
def test_bits(levels, n, seed, nats):
    assert math.isclose(to_bits(nats, levels), to_bits(nats) + math.log2(levels / 2), abs_tol=1e-9)
    assert math.isclose(to_bits(math.log(2.), levels), math.log2(levels), abs_tol=1e-9)               # a density of 1/2 on [-1, 1]: all levels alike
    flow, v = MAF(1, 4, 1, 1), torch.randint(levels, (n, 1, 1, 1), generator=torch.Generator().manual_seed(seed))
    flow = OnImages(flow, (1, 1, 1))                         # fresh: N(0, 1), whose mass in a bin is known
    edge = lambda t: torch.special.ndtr(t.double() / levels * 2 - 1)
    exact = -(edge(v + 1) - edge(v)).log2().mean().item()
    found = bits_per_dim(flow, from_levels(v, levels), levels=levels, samples=200, seed=seed % 1000)
    assert exact - 1e-3 < found + .05 and abs(found - exact) < .05


@drawn(40)
@given(steps=st.integers(1, 400), data=st.data())
def test_the_schedule_stays_in_its_range(steps, data):
    warmup, floor = data.draw(st.integers(0, max(0, steps - 1))), data.draw(st.floats(0, 1))
    all_ = [cosine(k, steps, warmup, floor) for k in range(steps)]
    assert all(floor - 1e-12 <= v <= 1 + 1e-12 for v in all_) and all(a <= b + 1e-12 for a, b in zip(all_[:warmup], all_[1:warmup + 1])) and all(a >= b - 1e-12 for a, b in zip(all_[warmup:], all_[warmup + 1:]))


# ---- the order of the data

@drawn(40)
@given(n=st.integers(1, 40), world=st.integers(1, 4), accumulate=st.integers(1, 3), each=st.integers(1, 4), seed=st.integers(0, 99), start=st.integers(0, 5))
def test_each_epoch_is_a_permutation_however_it_is_dealt_out(n, world, accumulate, each, seed, start):
    B = each * world * accumulate
    steps = start + -(-3 * n // B)
    def line(world, accumulate, first): # (epoch, index) in the order of the line
        rows = []
        for r in range(world):
            micro = itertools.islice(micro_batches(n, B, seed, first, (r, world), accumulate), (steps - first) * accumulate)
            rows.append([(e, i) for pieces in micro for e, index in pieces for i in index])
        assert {len(r) for r in rows} == {(steps - first) * B // world}
        return [x for column in zip(*rows) for x in column]
    whole = line(world, accumulate, 0)
    assert whole == line(1, 1, 0) and line(world, accumulate, start) == whole[start * B:]
    assert [e for e, _ in whole] == [k // n for k in range(len(whole))]
    for e in range(3): assert sorted(i for f, i in whole if f == e) == list(range(n))


@drawn(25)
@given(n=st.integers(1, 30), size=st.integers(1, 8), world=st.integers(1, 3), epochs=st.integers(0, 3), shuffle=st.booleans(), seed=st.integers(0, 99), data=st.data())
def test_batches_are_epochs_and_parts_make_the_whole(n, size, world, epochs, shuffle, seed, data):
    size *= world
    drop = data.draw(st.booleans()) and size <= n
    images = InMemory((torch.arange(n) % 256).to(torch.uint8).view(n, 1, 1, 1), torch.arange(n) % 3, 'abc')
    take = lambda part, start=0: list(batches(images, size, seed, epochs=epochs, shuffle=shuffle, drop_last=drop, part=part, start=start))
    whole, parts = take((0, 1)), [take((r, world)) for r in range(world)]
    per = n // size if drop else -(-n // size)
    assert len(whole) == per * epochs and all(len(p) == len(whole) for p in parts)
    for k, b in enumerate(whole):
        assert b.epoch == k // per and torch.equal(b.x, images.batch(b.index)[0])
        for r in range(world): assert torch.equal(parts[r][k].index, b.index[r::world]) and torch.equal(parts[r][k].x, b.x[r::world])
    for e in range(epochs):
        seen = [i for b in whole[e * per:(e + 1) * per] for i in b.index.tolist()]
        assert len(set(seen)) == len(seen) == (per * size if drop else n)
    start = data.draw(st.integers(0, len(whole)))
    assert [b.index.tolist() for b in take((0, 1), start)] == [b.index.tolist() for b in whole[start:]]


# ---- statistics

reals = st.floats(-1e3, 1e3, allow_nan=False)


def paired(least=1): return st.integers(least, 12).flatmap(lambda n: st.tuples(*[st.lists(reals, min_size=n, max_size=n)] * 2))


@drawn(60)
@given(ab=paired(), shift=st.integers(-100, 100), scale=st.sampled_from([.25, 2., 8.]), data=st.data())
def test_statistics_do_not_depend_on_order_unit_or_origin(ab, shift, scale, data):
    a, b = ([float(round(x * 64)) / 64 for x in v] for v in ab)                            # so that shifts and scales are exact
    order = data.draw(st.permutations(range(len(a))))
    s, moved, mixed = summary(a), summary([scale * x + shift for x in a]), summary([a[i] for i in order])
    assert s.low <= s.mean + 1e-9 and s.mean <= s.high + 1e-9 and s.sd >= 0 and mixed == s
    assert math.isclose(moved.mean, scale * s.mean + shift, abs_tol=1e-6) and math.isclose(moved.sd, scale * s.sd, rel_tol=1e-9, abs_tol=1e-6)
    c, back, same = compare(a, b), compare(b, a), compare([x + shift for x in a], [x + shift for x in b])
    mirror = {'a<b': 'a>b', 'a>b': 'a<b', 'not seen': 'not seen'}
    assert back.diff == -c.diff and back.sd == c.sd and back.agree == c.agree and back.verdict == mirror[c.verdict] and (back.low, back.high) == (-c.high, -c.low)
    assert same == c and compare([a[i] for i in order], [b[i] for i in order]).verdict == c.verdict
    assert compare([scale * x for x in a], [scale * x for x in b]).verdict == c.verdict
    assert c.low <= c.diff <= c.high and (c.n >= 3 or c.verdict == 'not seen') and (c.verdict == 'not seen' or not c.low <= 0 <= c.high)
    assert compare(a, a).verdict == 'not seen' and int(rule([x - y for x, y in zip(a, b)])) == {'not seen': 0, 'a<b': -1, 'a>b': 1}[c.verdict]


@drawn(25)
@given(states=st.lists(st.sampled_from(sorted(STATES)), min_size=1, max_size=5), data=st.data())
def test_several_claims_are_as_good_as_the_weakest(states, data):
    vs = [Verdict(s, s) for s in states]
    assert all_of(*vs).state == all_of(*data.draw(st.permutations(vs))).state == all_of(all_of(*vs[:1]), *vs[1:]).state == all_of(*vs, *vs).state and all_of(*vs).state in states


@drawn(10)
@given(n=st.integers(3, 6), sd=st.floats(.01, 100), share=st.floats(.1, .9))
def test_power_and_what_it_can_detect_are_inverse(n, sd, share):
    effect = detectable(sd, n, share)
    assert abs(power(effect, sd, n) - share) < .01 and power(effect, sd, n) == power(-effect, sd, n) <= power(2 * effect, sd, n) and power(0., sd, n) < .06


@drawn(25)
@given(n=st.integers(2, 30), d=st.integers(1, 4), scale=scales, shift=st.floats(-100, 100), seed=seeds, data=st.data())
def test_moments_do_not_depend_on_batches_and_distances_not_on_axes(n, d, scale, shift, seed, data):
    f = scale * numbers(n, d, seed=seed) + shift
    cuts, m = sorted(data.draw(st.lists(st.integers(0, n), max_size=4))), Moments(d)
    for piece in torch.tensor_split(f, cuts): m.add(piece)
    assert m.n == n and torch.allclose(m.mean, f.mean(0), rtol=1e-10, atol=1e-10) and torch.allclose(m.cov, torch.cov(f.T).view(d, d), rtol=1e-7, atol=1e-8 * scale**2)
    g, (q, _) = numbers(n, d, seed=seed + 1), torch.linalg.qr(numbers(d, d, seed=seed + 2))
    f = numbers(n, d, seed=seed) * data.draw(st.floats(.1, 3.))
    stats = lambda t: (t.mean(0), torch.cov(t.T).view(d, d))
    there, back, turned, zero = frechet(*stats(f), *stats(g)), frechet(*stats(g), *stats(f)), frechet(*stats(f @ q + 1), *stats(g @ q + 1)), frechet(*stats(f), *stats(f))
    assert there > -1e-6 and abs(there - back) < 1e-5 and abs(there - turned) < 1e-5 and abs(zero) < 1e-5


@drawn(15)
@given(m=st.integers(1, 5), d=st.integers(1, 3), sigma=st.floats(.2, 2.), seed=seeds, b=st.integers(0, 3))
def test_one_step_along_the_score_is_the_mean_of_what_was_clean(m, d, sigma, seed, b):
    "Tweedie's formula, exact for data points with noise."
    flow = points(seed, m, d, sigma)
    x = numbers(b, d, seed=seed + 1)
    assert torch.allclose(denoise(flow, x, sigma), flow.posterior_mean(x), rtol=0, atol=1e-7)


# ---- what is written comes back

@params(*TOKENS)
@drawn(4)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, f64, *HALF]))
def test_a_flow_that_is_saved_is_the_flow_that_is_loaded(kind, data, dtype, tmp_path_factory):
    flow, _ = data.draw(any_flow(kind))
    flow, folder = flow.to(dtype), tmp_path_factory.mktemp('flow')
    flow.save_pretrained(folder, {'sigma': .1})
    back = type(flow).from_pretrained(folder)
    assert back.config == flow.config and back.card == {'sigma': .1}
    for (name, p), (other, q) in zip(flow.state_dict().items(), back.state_dict().items()): assert name == other and p.dtype == q.dtype and torch.equal(p, q)


names = st.text(min_size=1, max_size=8).filter(lambda s: s != '__metadata__' and s.isprintable())


@st.composite
def any_tensor(draw): # of any type and shape, and any bits
    dtype, shape = draw(st.sampled_from(list(checkpoint.DTYPES))), draw(st.lists(st.integers(0, 4), max_size=4))
    g = torch.Generator().manual_seed(draw(seeds))
    t = torch.randint(2, shape, generator=g).bool() if dtype == torch.bool else torch.randint(256, (*shape, dtype.itemsize), generator=g).to(torch.uint8).contiguous().view(dtype).reshape(shape)
    if draw(st.booleans()) and t.dim() > 1: t = t.transpose(0, -1)
    return t[::2] if draw(st.booleans()) and t.dim() else t


@drawn(20)
@example(tensors={'every other of two': torch.arange(2.)[::2], 'no row': torch.zeros(2, 3).T[:0]}, asynchronous=False, meta={})
@given(tensors=st.dictionaries(names, any_tensor(), max_size=6), asynchronous=st.booleans(), meta=st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.booleans(), st.integers(-2**60, 2**60), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)), max_size=4))
def test_any_tensor_of_any_shape_comes_back_bit_for_bit(tensors, asynchronous, meta, tmp_path_factory):
    "All bit patterns, also those of NaNs; names of any letters; meta as it was."
    assume(all(s == s.encode('utf-8', 'replace').decode() for s in (*tensors, *meta)))
    bits = lambda t: t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    with checkpoint.Run(tmp_path_factory.mktemp('run')) as run:
        checkpoint.save(run, 3, tensors, meta, asynchronous=asynchronous)
        into = {k: torch.zeros_like(v) for k, v in tensors.items()}
        assert checkpoint.load(run, into) == (3, meta)
    for k, v in tensors.items(): assert into[k].shape == v.shape and torch.equal(bits(into[k]), bits(v)), k


@drawn(40)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), data=st.data())
def test_boxes_cover_a_tensor_once(shape, data):
    "A tensor cut along any axes is whole; without a box, or with one twice, it is not."
    edges = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    boxes = [(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in itertools.product(*[list(zip(e, e[1:])) for e in edges])]
    boxes = data.draw(st.permutations(boxes))
    assert checkpoint.is_grid(tuple(shape), boxes) and not checkpoint.is_grid(tuple(shape), boxes[1:]) and not checkpoint.is_grid(tuple(shape), [*boxes, boxes[0]])
    row = lambda b: checkpoint.Row('t', 'float32', tuple(shape), *b)
    held = [[row(b) for b in boxes if data.draw(st.booleans()) or k == 0] for k in range(data.draw(st.integers(1, 3)))]
    todo = checkpoint.share_out(held)
    assert sorted(held[r][k] for r, places in enumerate(todo) for k in places) == sorted(map(row, boxes))      # each box is written once, by one that holds it
