"""SiT: the line to noise, its sampler's order and its guidance, a network at whose minimum theory stands, a joint model and who learns in it, folders, the experiment."""
import math

import pytest
import torch

from flowbook.data import batches, load
from flowbook.evidence import as_json, EXPERIMENTS, refuse_nan
from flowbook.flows import shake
from flowbook.sit import diffusion_joint, DIGITS_SIT, guided, judge_diffusion, line, ode, paper_diffusion, SimDiffusion, Sit, train_sit, Velocity, XL
from flowbook.simflow import Additive, DrawNoise, Entropy, freeze, Joint, Learned, Mean, Reconstruction, SimFlow, Unperturbed, VARIANTS
from flowbook.train import fit

f64 = torch.float64
VAE = dict(DIGITS_SIT['vae'], latent_channels=8, block_out_channels=(8, 8))
FLOW = dict(image_size=4, channels=8, patch_size=1, dim=16, layers=2, head_dim=8, classes=3)
Y = torch.tensor([0, 2, -1, 1])


def count(m): return sum(p.numel() for p in m.parameters())


def sit64(scale=.2, **kw): return shake(Sit(**{**FLOW, **kw}), scale).double().requires_grad_(False)


def model(posterior=None, norm=True, **kw):
    torch.manual_seed(0)
    return shake(SimDiffusion(VAE, {**FLOW, **kw}, posterior, norm), .03)


# ---- the line and its velocity

def test_line():
    x, e = torch.randn(2, 3, 4, 5, dtype=f64)
    for t, want in ((0., x), (1., e), (.25, .75 * x + .25 * e)):
        xt, v = line(x, e, torch.full((3,), t, dtype=f64))
        assert torch.allclose(xt, want) and torch.equal(v, e - x)
    t = torch.tensor([0., .5, 1.], dtype=f64)                                     # each sample at its own time
    assert torch.allclose(line(x, e, t)[0], torch.stack([x[0], (x[1] + e[1]) / 2, e[2]]))
    h = 1e-6
    assert torch.allclose((line(x, e, t + h)[0] - line(x, e, t)[0]) / h, e - x, atol=1e-8)   # the velocity is the derivative


def gaussian(x, t, m, s): return -m + (t - (1 - t) * s**2) / ((1 - t)**2 * s**2 + t**2) * (x - (1 - t) * m)


@pytest.mark.parametrize('heun, order', [(False, 1), (True, 2)])
def test_order_of_convergence(heun, order):
    z, m, s = torch.linspace(-3, 3, 41, dtype=f64), .7, .4
    def error(steps):
        *_, (t, x) = ode(lambda x, t: gaussian(x, t, m, s), z, steps, heun)
        assert t == 0.
        return (x - (m + s * z)).abs().max().item()
    rates = [math.log2(error(n) / error(2 * n)) for n in (40, 80, 160)]
    assert all(abs(r - order) < .12 for r in rates), rates


def test_the_way_is_visible_and_starts_at_the_noise():
    z = torch.randn(3, 2)
    way = list(ode(lambda x, t: -x, z, 4, False))
    assert [t for t, _ in way] == [1., .75, .5, .25, 0.] and way[0][1] is z
    assert torch.allclose(way[-1][1], z * 1.25**4)                               # backwards in time: x + (u - t)(-x)


@pytest.mark.parametrize('heun, calls', [(False, 5), (True, 10)])
def test_number_of_calls(heun, calls):
    seen = []
    for _ in ode(lambda x, t: seen.append(t) or x, torch.zeros(1, 1), 5, heun): pass
    assert len(seen) == calls and max(seen) == 1. and min(seen) == (0. if heun else pytest.approx(.2))


def test_two_points_are_found_again():
    "Data at two points with noise: the closed velocity leads half of the samples to each, with the right spread."
    s, at = .1, torch.tensor([-1., 1.], dtype=f64)
    def velocity(x, t):
        var = (1 - t)**2 * s**2 + t**2
        share = torch.softmax(-(x[:, None] - (1 - t) * at)**2 / (2 * var), 1)
        return (share * gaussian(x[:, None], t, at, s)).sum(1)
    *_, (_, x) = ode(velocity, torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=f64), 200)
    assert abs((x > 0).double().mean() - .5) < .03
    for a in at: assert abs((x[x.sign() == a] - a).std() - s) < .01


@pytest.mark.parametrize('s', [.2, .5, 1.5])
def test_the_least_loss_of_a_gaussian(s):
    "pi/2 s, by Monte Carlo at the best velocity; any other is worse."
    g, n = torch.Generator().manual_seed(0), 400_000
    x, e, t = .3 + s * torch.randn(n, generator=g, dtype=f64), torch.randn(n, generator=g, dtype=f64), torch.rand(n, generator=g, dtype=f64)
    xt, v = line(x, e, t)
    best = (gaussian(xt, t, .3, s) - v).square().mean().item()
    assert abs(best - math.pi / 2 * s) < .01 * max(1, s)
    assert all((gaussian(xt, t, *other) - v).square().mean() > best + .001 for other in ((.4, s), (.3, 1.2 * s), (.3, .8 * s)))


def test_a_trained_network_finds_the_closed_velocity():
    "One latent number a place, data N(m, s^2): the minimiser of the loss is the closed form, and the sampler finds mean and spread."
    torch.manual_seed(0)
    m, s, sit = .5, .5, Sit(2, 1, 2, 32, 1, 32)
    opt = torch.optim.Adam(sit.parameters(), 5e-3)
    schedule, g = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 300), torch.Generator().manual_seed(0)
    for _ in range(300):
        x, e, t = m + s * torch.randn(256, 1, 2, 2, generator=g), torch.randn(256, 1, 2, 2, generator=g), torch.rand(256, generator=g)
        xt, v = line(x, e, t)
        opt.zero_grad(); (sit(xt, t) - v).square().mean().backward(); opt.step(); schedule.step()
    with torch.no_grad():
        for t in (.1, .5, .9):
            sd = math.sqrt((1 - t)**2 * s**2 + t**2)
            xt = (1 - t) * m + sd * torch.randn(2000, 1, 2, 2, generator=g)
            found, want = sit(xt, torch.full((2000,), t)), gaussian(xt, t, m, s)
            assert (found - want).square().mean() < .02 * (want + m).square().mean() + .01, t
        *_, (_, x) = ode(guided(sit), torch.randn(4000, 1, 2, 2, generator=g), 20)
    assert abs(x.mean() - m) < .05 and abs(x.std() - s) < .05


# ---- the network

def test_a_fresh_sit_says_nothing(): assert not Sit(**FLOW)(torch.randn(4, 8, 4, 4), torch.rand(4), Y).any()


def test_null_class_is_none_is_minus_one():
    sit, x, t = sit64(), torch.randn(4, 8, 4, 4, dtype=f64), torch.rand(4, dtype=f64)
    assert torch.equal(sit(x, t), sit(x, t, torch.full((4,), -1)))
    mixed = sit(x, t, Y)
    for k, y in enumerate(Y): assert torch.allclose(mixed[k:k + 1], sit(x[k:k + 1], t[k:k + 1], Y[k:k + 1]))
    assert torch.equal(sit(x, t, torch.full((4,), 2))[1], mixed[1]) and (sit(x, t, torch.full((4,), 2)) - sit(x, t))[0].abs().max() > 1e-3
    with pytest.raises(ValueError, match='labels'): sit64(classes=0)(x, t, Y)


def test_time_place_and_token_matter():
    sit, x, t = sit64(), torch.randn(2, 8, 4, 4, dtype=f64), torch.tensor([.3, .7], dtype=f64)
    v = sit(x, t)
    assert (sit(x, t.flip(0)) - v).abs().max() > 1e-3                            # the time
    assert (sit(x.flip(2), t).flip(2) - v).abs().max() > 1e-3                    # where a token lies
    other = x.clone(); other[:, :, 3, 3] += 1
    assert ((sit(other, t) - v).abs().amax((0, 1)) > 1e-6).all()                 # every token sees every other: not causal


@pytest.mark.parametrize('patch', [1, 2, 4])
def test_patches(patch):
    sit, x = sit64(patch_size=patch), torch.randn(3, 8, 4, 4, dtype=f64)
    assert sit(x, torch.rand(3, dtype=f64)).shape == x.shape and sit.pos_embed.shape == ((4 // patch)**2, 16)


def test_675_million():
    with torch.device('meta'): assert round(count(Sit(32, 4, 2, classes=1000, **XL)) / 1e6) == 675


@pytest.mark.parametrize('d', [32, 64])
def test_paper_model(d):
    with torch.device('meta'): m = paper_diffusion(d)
    assert m.image_shape == (3, 256, 256) and m.flow.image_shape == (d, 16, 16) and len(m.flow.layers) == 28 and round(count(m.flow) / 1e6) in (675, 676)


def test_sit_folder(tmp_path):
    sit, x, t = sit64(), torch.randn(4, 8, 4, 4, dtype=f64), torch.rand(4, dtype=f64)
    sit.save_pretrained(tmp_path)
    assert torch.allclose(Sit.from_pretrained(tmp_path)(x, t, Y), sit(x, t, Y), rtol=0, atol=1e-12)


# ---- guidance

@pytest.mark.parametrize('w', [0., .5, 2., -1.])
def test_guidance(w):
    sit, x, t = sit64(), torch.randn(4, 8, 4, 4, dtype=f64), torch.full((4,), .4, dtype=f64)
    want = (1 + w) * sit(x, t, Y) - w * sit(x, t)
    assert torch.allclose(guided(sit, w)(x, .4, Y), want)
    if not w: assert torch.equal(guided(sit)(x, .4, Y), sit(x, t, Y))            # bit for bit, without a second pass
    else:
        with pytest.raises(ValueError, match='needs labels'): guided(sit, w)(x, .4)


# ---- the joint model

POSTERIORS = {'fixed': Mean(Additive(.5)), 'learned': Learned(), 'none': Mean(Unperturbed())}


@pytest.mark.parametrize('kind', POSTERIORS)
def test_latent_is_that_of_simflow_and_the_rest_is_for_the_line(kind):
    m, g = model(POSTERIORS[kind]), torch.Generator().manual_seed(0)
    image, e = torch.randn(500, 1, 8, 8, generator=g), torch.randn(500, m.draws, generator=g)
    k, found = m.posterior.draws(128), m.latent(image, e)
    assert m.draws == k + 129
    plain = SimFlow.latent(m, image, e[:, :k])
    assert all(torch.equal(a, b) for a, b in zip(plain, found))
    assert torch.equal(found.e.flatten(1), e[:, k:-1]) and found.e.shape == found.x.shape
    assert 0 <= found.t.min() and found.t.max() <= 1 and (found.t.sort().values - torch.linspace(0, 1, 500)).abs().max() < .08   # uniform (Kolmogorov, 0.003)
    assert m.latent(image).t.shape == (500,)                                     # or drawn there


def as_diffusers(sit): # patch size 1
    "diffusers' network of the same kind, with the weights of ours."
    from diffusers import DiTTransformer2DModel
    c = sit.config
    m = DiTTransformer2DModel(c['dim'] // c['head_dim'], c['head_dim'], c['channels'], num_layers=c['layers'], norm_num_groups=1, sample_size=c['image_size'], patch_size=1,
                              activation_fn='gelu', num_embeds_ada_norm=c['classes']).to(sit.pos_embed).eval().requires_grad_(False)
    m.pos_embed.pos_embed, m.norm_out.eps = sit.pos_embed[None], sit.norm.eps
    pairs = [(m.pos_embed.proj, sit.proj_in), (m.proj_out_1, sit.modulation.linear), (m.proj_out_2, sit.proj_out)]
    for a, b in zip(m.transformer_blocks, sit.layers):
        emb, (q, k, v) = a.norm1.emb, (a.attn1.to_q, a.attn1.to_k, a.attn1.to_v)
        a.norm1.norm.eps, emb.time_proj.downscale_freq_shift = b.norm.eps, 0
        pairs += [(emb.timestep_embedder.linear_1, sit.time.mlp[0]), (emb.timestep_embedder.linear_2, sit.time.mlp[2]), (emb.class_embedder.embedding_table, sit.embed),
                  (a.norm1.linear, b.modulation.linear), (a.attn1.to_out[0], b.attn.proj), (a.ff.net[0].proj, b.mlp.up), (a.ff.net[2], b.mlp.down)]
        for part, w, bias in zip((q, k, v), b.attn.qkv.weight.chunk(3), b.attn.qkv.bias.chunk(3)): part.weight.data, part.bias.data = w, bias
    for theirs, ours in pairs:
        for name, value in ours.named_parameters(): getattr(theirs, name).data = value.view_as(getattr(theirs, name))
    return m


def test_network_against_diffusers():
    sit = sit64(channels=3, dim=32, layers=3, classes=5)
    x, t, y = torch.randn(4, 3, 4, 4, dtype=f64), torch.rand(4, dtype=f64), torch.tensor([0, -1, 4, 2])
    theirs = as_diffusers(sit)(x, 1000 * t, torch.where(y < 0, 5, y)).sample         # its null class is the last row, too
    assert sit(x, t, y).std() > .1 and (sit(x, t, y) - theirs).abs().max() < 1e-4    # it takes its sines in float32, of angles up to 1000


def test_velocity_term_by_hand():
    m, image = model().double(), torch.randn(3, 1, 8, 8, dtype=f64)
    m.unit.fill_(2.)
    e, y = torch.randn(3, m.draws, dtype=f64), torch.tensor([0, -1, 2])
    logs = Joint(Reconstruction(), (3., Velocity()))(m, image, y, e)
    found = m.latent(image, e)
    x, t = found.x / 2, found.t.view(3, 1, 1, 1)
    velocity = (m.flow((1 - t) * x + t * found.e, found.t, y) - (found.e - x)).square().mean()
    rec = (m.decode(found.x) - image).square().mean()
    assert torch.allclose(logs['velocity'], velocity) and torch.allclose(logs['loss'], rec + 3 * velocity)


def test_one_backward_pass_reaches_encoder_decoder_and_sit():
    m, image = model(), torch.randn(4, 1, 8, 8)
    Joint(Reconstruction(1), Velocity())(m, image, torch.tensor([0, 1, 2, -1]))
    silent = [k for k, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent, silent                                                    # there is no idle flow left in it, either


def test_gradient_is_that_of_finite_differences():
    m, image, y = model().double(), torch.randn(4, 1, 8, 8, dtype=f64), torch.tensor([0, 1, 2, -1])
    e, term = torch.randn(4, m.draws, dtype=f64), Joint(Velocity())
    term(m, image, y, e)
    for p in (m.encoder[0].conv_in.weight, m.flow.proj_in.weight, m.flow.time.mlp[0].bias):
        d = torch.randn(p.shape, dtype=f64, generator=torch.Generator().manual_seed(1))
        want, loss = (p.grad * d).sum().item(), []
        for h in (1e-5, -1e-5):
            with torch.no_grad(): p.add_(h * d)
            loss.append(Joint(Velocity())(m, image, y, e)['loss'].item())
            with torch.no_grad(): p.sub_(h * d)
            m.zero_grad()
        assert abs((loss[0] - loss[1]) / 2e-5 - want) < 1e-5 * max(1, abs(want))
        term(m, image, y, e)


def test_without_classes():
    m = model(classes=0)
    Joint(Reconstruction(), Velocity())(m, torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]))
    assert m.sample(2, steps=1).shape == (2, 1, 8, 8)


TINY = dict(DIGITS_SIT, vae=VAE, flow={**FLOW, 'classes': 10}, steps=2, before=3, batch_size=8)


@pytest.mark.parametrize('variant', ['fixed', 'learned, no entropy', 'none', 'frozen vae, learned', 'frozen vae, fixed, norm', 'frozen encoder, noise', 'slerp'])
def test_variants_train(variant):
    (first, before), *_, (last, after) = [(logs, {k: v.clone() for k, v in m.state_dict().items()}) for logs, m in train_sit({**TINY, 'variant': variant, 'average': 0.}, every=1)]
    v, moved = VARIANTS[variant], {k.split('.')[0] for k in after if not torch.equal(before[k], after[k])}
    assert first == {'step': 0} and last['step'] == 2 and 'velocity' in last and 'nll' not in last and ('minus entropy' in last) == bool(v.entropy)
    assert moved == {'encoder', 'decoder', 'flow'} - set(v.frozen)
    assert (before['unit'] == 1) == (not v.frozen) and after['unit'] == before['unit']


def test_unit():
    m, data = model(Learned(), norm=False), load('digits')
    image, _ = data.batch(range(400))
    m.measure_unit(image)
    assert abs((m.latent(image).x / m.unit).std() - 1) < .02 and m.unit != 1


def test_training_is_reproducible_and_the_loss_falls():
    run = lambda: [(logs.get('velocity'), logs.get('rec')) for logs, _ in train_sit({**TINY, 'steps': 40, 'batch_size': 16}, every=20)]
    one = run()
    assert one == run() and one[-1][0] < one[1][0] and one[-1][1] < one[1][1]


def test_noise_and_time_are_keyed_by_sample():
    m, data = model(), load('digits')
    def drawn(size):
        stream, seen = batches(data, size, seed=3, epochs=1, transforms=[DrawNoise(m.draws)]), {}
        for b in stream:
            found = m.latent(b.x, b.target)
            seen |= {i: (e, t) for i, e, t in zip(b.index.tolist(), found.e, found.t)}
            if len(seen) > 63: return seen
    a, b = drawn(16), drawn(64)
    both = a.keys() & b.keys()
    assert len(both) > 60 and all(torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1] for i in both)


def test_sample():
    m = model().eval()
    m.unit.fill_(1.7)
    with torch.no_grad():
        z = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(5))
        *_, (_, x) = ode(lambda x, t: guided(m.flow, 1.)(x, t, Y), z, 3)
        got = lambda **kw: m.sample(Y, 1., 3, generator=torch.Generator().manual_seed(5), **kw)
        assert torch.allclose(got(decode=False), 1.7 * x, atol=1e-6) and torch.allclose(got(), m.decode(1.7 * x), atol=1e-5)
        assert torch.allclose(got(batch_size=2), got(), atol=1e-5) and not got().requires_grad
    assert m.sample(0).shape == (0, 1, 8, 8) and m.sample(0, decode=False).shape == (0, 8, 4, 4)
    with pytest.raises(ValueError, match='needs labels'): m.sample(2, 1.)


@pytest.mark.parametrize('kind', POSTERIORS)
def test_folder(kind, tmp_path):
    m, image = model(POSTERIORS[kind], norm=kind != 'learned').eval(), torch.randn(3, 1, 8, 8)
    m.unit.fill_(.3)
    m.save_pretrained(tmp_path)
    again, e = SimDiffusion.from_pretrained(tmp_path), torch.randn(3, m.draws)
    assert as_json(again.config) == as_json(m.config) and torch.equal(again.latent(image, e).x, m.latent(image, e).x) and again.unit == m.unit
    draw = lambda m: m.sample(Y, steps=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(again), draw(m))
    with pytest.raises(ValueError, match='holds a SimDiffusion'): SimFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize('s', [.5, 1.])
def test_a_fixed_variance_has_a_floor(s):
    "All means in one place: the velocity's loss cannot fall below pi/2 sigma; with spread means the best is higher."
    g, n = torch.Generator().manual_seed(0), 400_000
    e, noise, t = torch.randn(n, generator=g, dtype=f64), torch.randn(n, generator=g, dtype=f64), torch.rand(n, generator=g, dtype=f64)
    loss = lambda x, s: (gaussian(line(x, e, t)[0], t, 0., s) - (e - x)).square().mean().item()
    floor = loss(s * noise, s)
    assert abs(floor - math.pi / 2 * s) < .01
    mu = torch.randn(n, generator=g, dtype=f64)
    assert loss(mu + s * noise, math.sqrt(1 + s**2)) > floor + .1


def test_it_collapses_without_noise_and_not_with_it():
    "Eighty steps from the same start: the learned variance shrinks everything, the fixed one keeps its noise, and its loss the floor."
    c = {**TINY, 'flow': {**TINY['flow'], 'dim': 32}, 'steps': 80, 'batch_size': 32, 'average': 0.}
    end = {name: list(train_sit({**c, 'variant': name}, every=20))[-1][0] for name in ('learned, no entropy', 'fixed')}
    assert end['learned, no entropy']['velocity'] < .6 and end['learned, no entropy']['sigma'] < .3
    assert end['fixed']['velocity'] > .97 * math.pi / 4 and abs(end['fixed']['sigma'] - .5) < .01


# ---- the experiment
@pytest.mark.slow
def test_the_gpu_budget_runs_in_small(monkeypatch):
    "MNIST at 28x28 through the same function: every shape, and the way back to 8x8."
    e = EXPERIMENTS['diffusion_joint']
    c = {**e.config['gpu'], 'device': 'cpu', 'steps': 2, 'before': 2, 'every': 1, 'batch_size': 4, 'samples': 12, 'digits': 6, 'ode': 1, 'variants': ['fixed, no norm', 'frozen vae, learned', 'none']}
    c['flow'] = {**c['flow'], 'dim': 16, 'layers': 1, 'head_dim': 8}
    monkeypatch.setitem(e.config, 'gpu', c)
    out = diffusion_joint(0, 'gpu')
    refuse_nan(out, 'out')
    assert set(out) == set(c['variants']) and all(len(v['step']) == 3 and len(v['pictures']) == 10 and len(v['pictures'][0]) == 64 for v in out.values())


def fake(fid, frozen, share, control):
    row = lambda fid, share: {'fid': fid, 'spread': [2., 2 * share], 'reconstruction': 20.}
    return {'fixed, no norm': row(fid, share), 'frozen vae, learned': row(frozen, 1.), 'frozen vae, fixed, norm': row(fid + 1, 1.), 'learned, no entropy': row(300., control)}


@pytest.mark.parametrize('change, state', [({}, 'seen'), ({'fid': 30.}, 'reversed'), ({'share': .05, 'control': .001}, 'reversed'), ({'control': .5}, 'reversed')], ids=['as claimed', 'frozen is better', 'it collapses', 'the control does not'])
def test_the_verdict_looks_at_all_three(change, state):
    results = [fake(**{**dict(fid=10., frozen=20., share=.5, control=.01), **change}) for _ in range(3)]
    for i, r in enumerate(results):
        for v in r.values(): v['fid'] += .1 * i; v['spread'][1] *= 1 + .01 * i
    results[1]['fixed, no norm']['fid'] += .05
    verdict = judge_diffusion(results)['S14']
    assert verdict.state == state, verdict
    assert 'frozen vae, fixed, norm' in verdict.reason and 'PSNR' in verdict.reason
