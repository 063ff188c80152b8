"""SimFlow: the flow with adaLN-Zero by every solver, the joint model and who learns in it, identities of its loss, counts, folders, latent statistics, doors."""
import copy
import json
import math
import threading
import time

import pytest
import torch
from torch import nn

from flowbook.data import batches, load
from flowbook.flows import check_flow, normal_log_prob, shake
from flowbook.guidance import ClassGuidance, StarGuidance, TemperatureGuidance, guided_inverse, score_guidance
from flowbook.metrics import agreement, digit_classifier, reconstruction
from flowbook.repa import Detach, Forward, Projector, Reverse, ReverseSequential, alignment_gradient, flat, gradient_support
from flowbook.sampling import Decoder, invert, naive_inverse, residual, trajectory, walk, walk_graph
from flowbook.simflow import (AdaTarFlow, Additive, Adversarial, AlignedNLL, autocorrelation, between, DIGITS, DrawNoise, Entropy, flow_config, FlowNLL, freeze,
                             gaussian_entropy, high_frequency, Joint, latent_statistics, Learned, Linear, make_vae, Mean, paper_model, paper_terms, PatchCritic,
                             Perceptual, posterior_of, Reconstruction, SimFlow, SIZES, Slerp, spectral_entropy, spread_of, TokenNorm, total_variation, train_simflow,
                             training, TwoStages, Unperturbed, VAE, VARIANTS)
from flowbook.tarflow import KVCache, TarFlow
from flowbook.train import fit
from harm import PICKLE, RUBBISH, SETTINGS, UNFIT, pickles

f64 = torch.float64


def count(m): return sum(p.numel() for p in m.parameters())


# ---- the flow

ORDERS = {'alternate': {}, 'forward': dict(orders='forward'), 'reverse': dict(orders='reverse'),
          'own': dict(orders=[[3, 1, 4, 0, 7, 6, 5, 2], 'forward', 'reverse'])}
GUIDES = {'none': None, 'class': ClassGuidance(1.5, 'linear'), 'temperature': TemperatureGuidance(1., 2.), 'product': StarGuidance(1.), 'product, all blocks': StarGuidance(1., 'linear', True)}
Y = torch.tensor([0, 2, -1, 1])


def flow64(size=(2, 4), patch=1, blocks=3, layers=(1, 2, 1), scale=.1, **kw):
    flow = shake(AdaTarFlow(size, 2, patch, 16, blocks, layers, 8, **{'classes': 3, **kw}), scale).double()
    return flow, torch.randn(4, 2, *((size, size) if isinstance(size, int) else size), dtype=f64)


@pytest.mark.parametrize('orders', ORDERS)
def test_proof(orders):
    flow, x = flow64(**ORDERS[orders])
    assert check_flow(flow, x, Y)['causality'] == 0


@pytest.mark.parametrize('y', [None, torch.full((4,), -1), torch.tensor([[.2, .8, 0.], [1 / 3] * 3, [0., 0., 1.], [1., 0., 0.]], dtype=f64)], ids=['none', '-1', 'weights'])
def test_proof_with_labels_of_every_kind(y):
    flow, x = flow64(4, 2)
    check_flow(flow, x, y)
    check_flow(flow.blocks[1], flow.to_parts(x), y)                             # and one block alone, read backwards


def test_proof_without_classes():
    flow, x = flow64(classes=0)
    check_flow(flow, x)
    assert all(b.embed.weight.shape == (1, 16) for b in flow.blocks)            # the null class is there: layers want a vector
    with pytest.raises(ValueError, match='flow without classes'): flow.log_prob(x, Y)


def test_fresh_is_the_identity():
    flow, x = AdaTarFlow(4, 2, 1, 16, 3, (2, 2, 4), 8, classes=3), torch.randn(3, 2, 4, 4)
    z, logdet = flow(x, torch.tensor([0, 1, -1]))
    assert torch.equal(z, flow.to_parts(x)) and torch.equal(logdet, torch.zeros(3))
    h = torch.randn(2, 5, 16)
    assert torch.equal(flow.blocks[0].layers[0](h, torch.randn(2, 16)), h)      # gates of zero: a layer passes everything


def test_null_class_is_none_is_minus_one():
    flow, x = flow64()
    lp = lambda y: flow.log_prob(x, y)
    assert torch.allclose(lp(None), lp(torch.full((4,), -1)), atol=1e-12)
    one = lambda k: nn.functional.one_hot(torch.full((4,), k), 3).double()
    assert all(torch.allclose(lp(one(k)), lp(torch.full((4,), k)), atol=1e-12) for k in range(3))
    assert (lp(torch.full((4, 3), 1 / 3, dtype=f64)) - lp(None)).abs().max() > 1e-4 # not the mean of the classes: a class of its own
    mixed = lp(Y)
    assert torch.allclose(mixed[2], lp(None)[2], atol=1e-12) and torch.allclose(mixed[0], lp(torch.zeros(4, dtype=torch.long))[0], atol=1e-12)


def test_class_reaches_every_layer_and_the_head():
    flow, x = flow64()
    flow.log_prob(x, Y).sum().backward()
    for k, p in flow.named_parameters(): assert p.grad is not None and p.grad.abs().max() > 0, k
    assert not flow.blocks[0].adds_class and 'embed' in dict(flow.blocks[0].named_children())


@torch.no_grad()
def test_step_is_params():
    flow, x = flow64()
    block, x = flow.blocks[1], flow.to_parts(x)
    mu, alpha, feats = block.params(x, Y, tau=1.3, features=(1, 2))
    cache, out = KVCache(), []
    for i in range(8): out.append(torch.stack(block.step(x[:, i - 1], i, cache, Y, tau=1.3)))
    assert (torch.stack(out, 2) - torch.stack([mu, alpha])).abs().max() < 1e-12 and feats[2].shape == (4, 8, 16)


def test_alignment_takes_it():
    "R-REPA's strategies on layers of another kind: who learns, and n - 1 iterations are the sequential reverse."
    flow, x = flow64(blocks=3, layers=2)
    v, projector, ones = torch.randn(4, 8, 10, dtype=f64), Projector(16, 10, 24).double(), torch.ones(3, 3, dtype=torch.bool)
    for kind, want in ((Forward, ones.tril()), (Detach, ones.tril().triu()), (Reverse, ones.triu())): assert torch.equal(gradient_support(flow, kind, x, Y, v, projector) > 0, want)
    a, b = (flat(alignment_gradient(flow, s, x, Y, v, projector), flow) for s in (Reverse([(1, 1)], unroll=7), ReverseSequential([(1, 1)])))
    assert (a - b).norm() < 1e-9 * b.norm()


# ---- its inversion

@pytest.mark.parametrize('orders', ORDERS)
@pytest.mark.parametrize('guide', GUIDES)
def test_every_solver_equals_the_definition(orders, guide):
    (flow, _), g = flow64(**ORDERS[orders]), GUIDES[guide]
    z = flow.draw(4).double()
    right = naive_inverse(flow, z, Y, g)
    for solver in ('sequential', 'gauss-seidel', 'jacobi', 3, [1, 2, 8]):
        assert (invert(flow, z, Y, g, solver, tol=1e-13) - right).abs().max() < 1e-10, solver
    assert (invert(flow, z, Y, g, grad=True) - right).abs().max() < 1e-10 and (guided_inverse(flow, z, Y, g) - right).abs().max() < 1e-10
    if guide == 'none': assert (flow(right, Y)[0] - z).abs().max() < 1e-9


@pytest.mark.parametrize('y', [None, torch.full((4,), -1), torch.tensor([[.2, .8, 0.], [1 / 3] * 3, [0., 0., 1.], [1., 0., 0.]], dtype=f64)], ids=['none', '-1', 'weights'])
def test_solvers_take_labels_of_every_kind(y):
    flow, _ = flow64()
    z, free = flow.draw(4).double(), flow64(classes=0)[0]
    for g in (None, TemperatureGuidance(1., 2.), *([StarGuidance(1.)] if y is not None else [])):
        right = naive_inverse(flow, z, y, g)
        for solver in ('sequential', 'jacobi', 3): assert (invert(flow, z, y, g, solver, tol=1e-13) - right).abs().max() < 1e-10
    for solver in ('sequential', 'jacobi', 'auto'): assert (invert(free, z, None, None, solver, tol=1e-13) - free.inverse(z)).abs().max() < 1e-10


@torch.no_grad()
def test_the_fast_layer_is_used_and_is_the_layer():
    "Fast, by the layer itself (a hook keeps it from being replaced), and as a GPU would record it: one result; modulations are computed once."
    flow, x = flow64()
    z, g, n = flow(x, Y)[0], StarGuidance(.5, everywhere=True), 8
    make = lambda: Decoder(flow.blocks[1], torch.empty(n, 4, z.shape[2], dtype=f64), Y, g, 2, 3)
    assert make().fast
    tokens = flow.blocks[1].read(z).transpose(0, 1).contiguous()
    fast, graph = walk(make(), tokens), walk_graph(make(), tokens, record=False)
    hook = flow.blocks[1].layers[0].attn.qkv.register_forward_hook(lambda *_: None)
    assert not make().fast
    slow = walk(make(), tokens)
    hook.remove()
    assert (fast - slow).abs().max() < 1e-10 and (graph - slow).abs().max() < 1e-10
    assert max(residual(flow, z, list(trajectory(flow, z, Y, g, 'sequential', tol=0.)), Y, g)) < 1e-8


@torch.no_grad()
@pytest.mark.parametrize('size,patch,layers', [(2, 2, 1), (2, 1, 1), ((4, 6), 2, (2, 1, 1)), ((1, 3), 1, 1)])
def test_short_sequences(size, patch, layers):
    flow, x = flow64(size, patch, layers=layers)
    z = flow(x, Y)[0]
    for g in (None, StarGuidance(1., everywhere=True)):
        for solver in ('auto', 'sequential', 'jacobi', 100): assert (invert(flow, z, Y, g, solver, tol=1e-13) - naive_inverse(flow, z, Y, g)).abs().max() < 1e-10
    assert invert(flow, z[:0], Y[:0]).shape == (0, *flow.image_shape) and invert(flow, z[:1], Y[:1]).shape == (1, *flow.image_shape)


def test_inversion_under_threads():
    flow, x = flow64()
    z, got = flow.draw(4).double(), {}
    right = {k: invert(flow, z, torch.full((4,), k), solver='sequential') for k in range(3)}
    def work(k): got[k] = invert(flow, z, torch.full((4,), k), solver='sequential')
    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(torch.equal(got[k], right[k]) for k in range(3))


def test_bf16():
    flow = shake(AdaTarFlow((2, 4), 2, 1, 16, 2, 2, 8, classes=3), .08)
    half, x = copy.deepcopy(flow).bfloat16(), torch.randn(4, 2, 2, 4)
    with torch.no_grad():
        z = flow(x, Y)[0]
        assert (half(x.bfloat16(), Y)[0].float() - z).abs().max() < .15
        with torch.autocast('cpu', torch.bfloat16): assert (flow(x, Y)[0] - z).abs().max() < .15
    assert (invert(flow, z, Y, solver='sequential', dtype=torch.bfloat16) - x).abs().max() < .3
    assert invert(half, z.bfloat16(), Y).isfinite().all()


def test_flow_folder(tmp_path):
    flow, x = flow64(**ORDERS['own'])
    flow.save_pretrained(tmp_path)
    again = AdaTarFlow.from_pretrained(tmp_path)
    assert again.config == flow.config and torch.equal(again(x, Y)[0], flow(x, Y)[0])
    with pytest.raises(ValueError, match='AdaTarFlow.from_pretrained'): TarFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize('kw,says', [(dict(kind='vp'), 'kind'), (dict(kind='coupling'), 'kind'), (dict(dim=20), 'multiple of head_dim'), (dict(layers=(1, 0)), 'layers'),
                                     (dict(patch_size=3), 'does not divide'), (dict(classes=-1), 'classes'), (dict(orders='sideways'), 'orders')])
def test_flow_doors(kw, says):
    with pytest.raises(ValueError, match=says): AdaTarFlow(**{'image_size': 4, 'channels': 2, 'patch_size': 1, 'dim': 16, 'blocks': 2, 'layers': 1, 'head_dim': 8, **kw})


def test_label_doors():
    flow, x = flow64()
    for bad, says in ((torch.tensor([0, 1, 2, 3]), r'0\.\.2'), (torch.tensor([0, -2, 1, 1]), r'0\.\.2'), (torch.zeros(4, 2), 'class weights'), (torch.zeros(3, dtype=torch.long), 'for 4 samples'),
                      (torch.zeros(4), 'integer labels'), ([0, 1, 2, 0], 'list came')):
        with pytest.raises(ValueError, match=says): flow.log_prob(x, bad)
    with pytest.raises(ValueError, match='takes images'): flow(x[:, :1])


# ---- the joint model

def vae_config(d=4, widths=(8, 8), c=1, **kw):
    k = len(widths)
    return dict(in_channels=c, out_channels=c, latent_channels=d, block_out_channels=widths, layers_per_block=1, down_block_types=('DownEncoderBlock2D',) * k,
                up_block_types=('UpDecoderBlock2D',) * k, mid_block_add_attention=False, norm_num_groups=4) | kw


def flow_args(d=4, side=4, classes=3, **kw): return dict(image_size=side, channels=d, patch_size=1, dim=16, blocks=2, layers=(1, 2), head_dim=8, classes=classes) | kw


def tiny(posterior=None, norm=True, d=4, classes=3, scale=.05, **kw):
    torch.manual_seed(0)
    return shake(SimFlow(vae_config(d, **kw), flow_args(d, classes=classes), posterior, norm), scale)


POSTERIORS = {'fixed': Mean(), 'none': Mean(Unperturbed()), 'linear': Mean(Linear(.1)), 'slerp': Mean(Slerp()), 'learned': Learned(), 'noise': Learned(Additive(.3), start=-1.), 'learned, linear': Learned(Linear())}
IMAGE, Y6 = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.tensor([0, 1, 2, -1, 1, 0])
E = lambda m, seed=2: torch.randn(6, m.posterior.draws(m.N), generator=torch.Generator().manual_seed(seed))
PARTS = ('encoder', 'decoder', 'flow')


@pytest.mark.parametrize('kind', POSTERIORS)
@pytest.mark.parametrize('norm', [True, False])
def test_one_backward_pass_reaches_encoder_decoder_and_flow(kind, norm, monkeypatch):
    "SimFlow Eq. 4: no stop-gradient anywhere; the noise of the posterior is the only thing that learns nothing."
    m, calls, real = tiny(POSTERIORS[kind], norm), [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, 'backward', lambda self, *a, **k: (calls.append(1), real(self, *a, **k))[1])
    logs = Joint(Reconstruction(), FlowNLL(), *([Entropy()] if 'learned' in kind else []))(m, IMAGE, Y6, E(m))
    assert calls == [1] and all(v.isfinite() for k, v in logs.items())
    for part in PARTS:
        for k, p in getattr(m, part).named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), f'{part}.{k}'
        assert sum(p.grad.abs().sum() for p in getattr(m, part).parameters()) > 0, part


def test_the_flow_alone_moves_the_encoder_and_reconstruction_alone_no_flow():
    m = tiny()
    Joint(FlowNLL())(m, IMAGE, Y6, E(m))
    assert all(p.grad.abs().max() > 0 for p in m.encoder.parameters() if p.ndim > 1) and all(p.grad is None for p in m.decoder.parameters())
    m = tiny()
    Joint(Reconstruction())(m, IMAGE, Y6, E(m))
    assert all(p.grad.abs().max() > 0 for n in ('encoder', 'decoder') for p in getattr(m, n).parameters() if p.ndim > 1) and all(p.grad is None for p in m.flow.parameters())


def test_gradient_is_that_of_finite_differences():
    "One direction through encoder, decoder and flow at once, in float64."
    m = tiny(Learned(Additive(.3))).double()
    args = (m, IMAGE.double(), Y6, E(m).double())
    loss = lambda: Joint(Reconstruction(), FlowNLL(), Entropy())(*args)['loss'].item()
    loss()
    params = [p for p in m.parameters() if p.grad is not None]
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=f64) for i, p in enumerate(params)]
    slope, found = sum((p.grad * v).sum() for p, v in zip(params, direction)).item(), []
    for h in (1e-5, -2e-5):
        with torch.no_grad():
            for p, v in zip(params, direction): p += h * v
        found.append(loss())
    assert (found[0] - found[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize('frozen', [('encoder',), ('encoder', 'decoder'), ('flow',)])
def test_what_is_frozen_stays(frozen):
    m = tiny()
    freeze(*[getattr(m, k) for k in frozen])
    before, buffers = copy.deepcopy(m.state_dict()), {k: v.clone() for k, v in m.named_buffers()}
    for _ in fit(m, [(IMAGE, Y6, E(m))] * 3, Joint(), steps=3): pass
    moved = {k.split('.')[0] for k, v in m.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == set(PARTS) - set(frozen) and all(p.grad is None for k in frozen for p in getattr(m, k).parameters())
    assert all(torch.equal(v, buffers[k]) for k, v in m.named_buffers())


@pytest.mark.parametrize('name', [k for k, v in VARIANTS.items() if v.frozen])
def test_frozen_variants(name):
    "First the autoencoder alone, then the rest beside what is kept."
    v, kept = VARIANTS[name], None
    config = DIGITS | dict(variant=name, steps=2, before=2, batch_size=8, vae=vae_config(4), flow=flow_args(4, classes=10))
    for logs, m in training(config, load('digits'), every=1):
        if kept is None: kept = {k: copy.deepcopy(getattr(m, k).state_dict()) for k in PARTS}
    assert logs['step'] == 2 and m.posterior is v.posterior
    for k in PARTS: assert all(torch.equal(a, kept[k][n]) for n, a in getattr(m, k).state_dict().items()) == (k in v.frozen), k
    assert all(p.grad is None and not p.requires_grad for k in v.frozen for p in getattr(m, k).parameters())


@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_trains_a_step(name):
    config = DIGITS | dict(variant=name, steps=1, before=1, batch_size=4, vae=vae_config(4), flow=flow_args(4, classes=10))
    v, (logs, m) = VARIANTS[name], list(training(config, load('digits')))[-1]
    assert math.isfinite(logs['loss']) and logs['spread'] > 0 and m.config['posterior'] == v.posterior.config and m.config['norm'] == v.norm
    assert ('nll' in logs) == v.flow and ('minus entropy' in logs) == (bool(v.entropy) if v.flow else isinstance(v.posterior, Learned))
    assert posterior_of(json.loads(json.dumps(v.posterior.config))).config == v.posterior.config


def test_noise_of_the_posterior_is_keyed_by_sample():
    "The same numbers for a sample whatever the batch size and the order; other ones in another epoch, or for another seed."
    data = load('digits')
    def drawn(size, shuffle=True, seed=3, epochs=1): return {(b.epoch, int(i)): t for b in batches(data, size, seed=seed, shuffle=shuffle, epochs=epochs, transforms=[DrawNoise(5)]) for i, t in zip(b.index, b.target)}
    a, b, c = drawn(64, epochs=2), drawn(100, shuffle=False), drawn(64, seed=4)
    both = a.keys() & b.keys()
    assert len(both) > 1300 and all(torch.equal(a[k], b[k]) for k in both) and not any(torch.equal(a[k], c[k]) for k in a.keys() & c.keys())
    later = [k for k in a if k[0] == 1]
    assert later and not any(torch.equal(a[k], a[0, k[1]]) for k in later if (0, k[1]) in a)
    every = torch.stack(list(a.values()))
    assert abs(every.mean()) < .05 and abs(every.std() - 1) < .05


def test_training_is_reproducible_and_the_loss_falls():
    config = DIGITS | dict(steps=60, batch_size=32, vae=vae_config(16, (8, 16)), flow=flow_args(16, classes=10))
    rows = []
    for logs, m in training(config, load('digits'), seed=1, every=20): rows.append(logs)
    assert [r['step'] for r in rows] == [0, 20, 40, 60] and rows[3]['loss'] < rows[2]['loss'] < rows[1]['loss'] and rows[3]['rec'] < .8 * rows[1]['rec']
    assert all(math.isfinite(r[k]) and r[k] > 0 for r in rows[1:] for k in ('spread', 'sigma')) and abs(rows[3]['sigma'] - .5) < .01
    s = m.sample(torch.arange(4), StarGuidance(1.), gamma=.25, generator=torch.Generator().manual_seed(0))
    assert s.shape == (4, 1, 8, 8) and s.isfinite().all() and not m.training
    small = DIGITS | dict(steps=2, batch_size=8, vae=vae_config(4), flow=flow_args(4, classes=10), average=.9)
    a, b = (train_simflow(small, seed=5) for _ in range(2))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_sigma_of_the_logs_is_that_of_the_posterior():
    for kind, want in (('fixed', .5), ('none', 0.), ('learned', 1.)):
        m = tiny(POSTERIORS[kind], scale=.01)
        assert m.latent(IMAGE, E(m)).sigma.item() == pytest.approx(want, abs=.1)
    m = tiny()
    s = spread_of(m, IMAGE)
    assert s['spread'] == pytest.approx(m.latent(IMAGE).mu.flatten(1).std(0).square().mean().sqrt().item(), rel=1e-5) and s['rms'] == pytest.approx(1, rel=1e-3)


# ---- folders

@pytest.mark.parametrize('kind', POSTERIORS)
@pytest.mark.parametrize('norm', [True, False])
def test_folder(kind, norm, tmp_path):
    m = tiny(POSTERIORS[kind], norm).eval()
    m.save_pretrained(tmp_path/'a', {'data': 'noise'})
    again = SimFlow.from_pretrained(tmp_path/'a')
    again.save_pretrained(tmp_path/'b')
    for name in ('model.safetensors', 'config.json', 'card.json', 'README.md'): assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes(), name
    assert again.card == {'data': 'noise'} and repr(again.posterior) == repr(m.posterior) and isinstance(again.norm, TokenNorm) == norm
    e, g = E(m), lambda: torch.Generator().manual_seed(0)
    for a, b in zip(m.latent(IMAGE, e), again.latent(IMAGE, e)): assert torch.equal(a, b)
    assert torch.equal(m.reconstruct(IMAGE), again.reconstruct(IMAGE)) and torch.equal(m.sample(Y6, generator=g()), again.sample(Y6, generator=g()))
    for cls in (AdaTarFlow, TarFlow):
        with pytest.raises(ValueError, match='SimFlow.from_pretrained'): cls.from_pretrained(tmp_path/'a')


def test_folder_of_another_kind(tmp_path):
    flow64()[0].save_pretrained(tmp_path/'flow')
    with pytest.raises(ValueError, match='AdaTarFlow.from_pretrained'): SimFlow.from_pretrained(tmp_path/'flow')
    m = tiny()
    m.save_pretrained(tmp_path/'m'); m.save_pretrained(tmp_path/'m')            # where something is, it is replaced
    config = json.loads((tmp_path/'m'/'config.json').read_text())
    (tmp_path/'m'/'config.json').write_text(json.dumps(config | {'posterior': {'kind': 'Mode'}}))
    with pytest.raises(ValueError, match="'Mode' of the config; choose of"): SimFlow.from_pretrained(tmp_path/'m')
    (tmp_path/'m'/'config.json').write_text(json.dumps(config | {'posterior': Learned().config}))
    with pytest.raises(ValueError, match='wrong shape'): SimFlow.from_pretrained(tmp_path/'m')


@pytest.fixture
def saved(tmp_path):
    tiny().save_pretrained(tmp_path/'m')
    SimFlow.from_pretrained(tmp_path/'m')
    return tmp_path/'m'


def refused(folder, named, tried):
    with pytest.raises(ValueError) as e: SimFlow.from_pretrained(folder)
    assert named in str(e.value), f'{named} is not named in: {e.value}'
    assert len(str(e.value)) < 1000
    tried(said=e.value)


@pytest.mark.fault(*PICKLE)
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_pickle_is_refused(name, saved, tmp_path, tried):
    for content in pickles(tmp_path/'boom'):
        (saved/name).write_bytes(content)
        refused(saved, name, tried)
        assert not (tmp_path/'boom').exists()
    tried(times=3)


@pytest.mark.fault(*RUBBISH)
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_rubbish_is_refused(name, saved, tried):
    whole = (saved/name).read_bytes()
    bad = [b'', b'\0' * 100, b'rubbish', b'\xff' * 16, whole[:len(whole) // 2], whole[:-2]]
    for content in bad:
        (saved/name).write_bytes(content)
        refused(saved, name, tried)
    (saved/name).unlink()
    refused(saved, name, tried)
    tried(times=len(bad) + 1)


@pytest.mark.fault(*UNFIT)
def test_weights_that_do_not_fit_are_refused(saved, tried):
    from safetensors.torch import load_file, save_file
    path = saved/'model.safetensors'
    state = load_file(path)
    key = next(iter(state))
    for bad in ({k: v for k, v in state.items() if k != key}, {**state, key: torch.zeros(1)}, {**state, 'more': torch.zeros(1)}, {}):
        save_file(bad, path)
        refused(saved, path.name, tried)
    tried(times=4)


DEEP = {'kind': 'Additive'}
for _ in range(200): DEEP = {'kind': 'Mean', 'perturb': DEEP}


@pytest.mark.fault(*SETTINGS)
@pytest.mark.parametrize('key,value', [('vae', None), ('vae', 3), ('vae', 'a'), ('vae', {}), ('vae', {'latent_channels': 'a'}), ('vae', vae_config() | {'block_out_channels': 3}), ('vae', vae_config() | {'down_block_types': ['Nothing'] * 2}),
                                       ('vae', vae_config() | {'what': 1}), ('vae', vae_config() | {'norm_num_groups': 0}), ('vae', vae_config() | {'act_fn': 'nothing'}), ('flow', None), ('flow', []), ('flow', {}), ('flow', flow_args() | {'what': 1}),
                                       ('flow', flow_args() | {'dim': -16}), ('flow', flow_args() | {'dim': 2**40}), ('flow', flow_args() | {'classes': 10**15}), ('vae', vae_config() | {'block_out_channels': (8, 8 * 10**12)}), ('flow', flow_args() | {'kind': 'vp'}), ('posterior', 3), ('posterior', {'kind': 'os.system'}), ('posterior', {'kind': ['Mean']}), ('posterior', {}),
                                       ('posterior', {'kind': 'Mean', 'perturb': {'kind': 'Additive', 'sigma': -1}}), ('posterior', {'kind': 'Mean', 'what': 1}), ('posterior', DEEP), ('norm', 'yes'), ('norm', None), ('what', 1)])
def test_a_config_that_is_none_is_refused(key, value, saved, tried):
    path = saved/'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    inner = {'flow': ['dim', 'kind', 'flow'], 'posterior': ['posterior', 'sigma']}.get(key, [key])
    with pytest.raises(ValueError) as e: SimFlow.from_pretrained(saved)
    assert any(k in str(e.value) for k in [*inner, 'model.safetensors']) and len(str(e.value)) < 1000
    tried(said=e.value)


def test_the_shipped_checkpoint():
    m, image = SimFlow.from_pretrained('digits-simflow'), load('digits', 'test').batch(range(100))[0]
    s = m.sample(torch.arange(100) % 10, StarGuidance(1.), gamma=.25, generator=torch.Generator().manual_seed(0))
    assert reconstruction(image, m.reconstruct(image), 'psnr')['psnr'] > 20 and agreement(digit_classifier(), s, torch.arange(100) % 10) > .8 and not m.training


# ---- S1, S2, S3 and the scale

@pytest.mark.parametrize('seed', range(3))
def test_elbo_of_a_linear_gaussian_model(seed):
    "x = m + L z, image = W x + noise, q(x|image) Gaussian: log p(image) = ELBO + KL(q, posterior), term by term by quadrature. SimFlow Eq. 7-19."
    import numpy as np
    g = torch.Generator().manual_seed(seed)
    r, d, D, s = lambda *shape: torch.randn(*shape, generator=g, dtype=f64), 3, 5, .7
    m, L, W, image, mu, sigma = r(d), torch.eye(d, dtype=f64) + .3 * r(d, d).tril(), r(D, d), r(D), r(d), .3 + r(d).abs()
    t, w = np.polynomial.hermite_e.hermegauss(4)                                # exact for polynomials of degree 7
    grid, weight = torch.cartesian_prod(*[torch.tensor(t)] * d), torch.cartesian_prod(*[torch.tensor(w / w.sum())] * d).prod(1)
    x, normal = mu + sigma * grid, torch.distributions.MultivariateNormal
    prior = normal(m, L @ L.T)
    rec, nll, entropy = weight @ normal_log_prob(image - x @ W.T, s**2), weight @ prior.log_prob(x), -(weight @ normal_log_prob(x - mu, sigma**2))
    P = torch.linalg.inv(L @ L.T) + W.T @ W / s**2                              # precision of the exact posterior
    exact = normal(torch.linalg.solve(P, torch.linalg.inv(L @ L.T) @ m + W.T @ image / s**2), precision_matrix=P)
    kl = torch.distributions.kl_divergence(normal(mu, torch.diag(sigma**2)), exact)
    evidence = normal(W @ m, W @ L @ L.T @ W.T + s**2 * torch.eye(D, dtype=f64)).log_prob(image)
    assert abs(evidence - (rec + nll + entropy) - kl) < 1e-6 and kl > 0
    assert abs(entropy - d * gaussian_entropy(sigma.log()[None])[0]) < 1e-10    # the module's own


@torch.no_grad()
def test_elbo_with_the_flow_as_prior():
    "Eq. 7 again with an AdaTarFlow over two numbers, and a decoder that is not linear: sums over a grid."
    flow, g = shake(AdaTarFlow((1, 2), 1, 1, 8, 2, 1, 8, classes=2), .3).double(), torch.Generator().manual_seed(0)
    W, image, s, mu, sigma = torch.randn(3, 2, generator=g).double(), torch.randn(3, generator=g).double(), .8, torch.tensor([.3, -.4]).double(), torch.tensor([.5, .7]).double()
    t = torch.linspace(-9, 9, 160, dtype=f64)
    x, cell = torch.cartesian_prod(t, t), (t[1] - t[0])**2
    prior = flow.log_prob(x.view(-1, 1, 1, 2), torch.ones(len(x), dtype=torch.long))
    rec, log_q = normal_log_prob(image - torch.tanh(x) @ W.T, s**2), normal_log_prob(x - mu, sigma**2)
    evidence = torch.logsumexp(rec + prior, 0) + cell.log()
    elbo, kl = (cell * (log_q.exp() * v).sum() for v in (rec + prior - log_q, log_q - (rec + prior - evidence)))
    assert abs(prior.exp().sum() * cell - 1) < 1e-3 and abs(evidence - elbo - kl) < 1e-6 and kl > 0
    assert abs(-cell * (log_q.exp() * log_q).sum() - 2 * gaussian_entropy(sigma.log()[None])[0]) < 1e-6


@pytest.mark.parametrize('sigma', [.1, .5, 1.])
def test_entropy_is_a_constant(sigma):
    "N/2 log(2 pi e sigma^2), whatever the means, against 6.4 million draws; SimFlow Eq. 26-34."
    g, N = torch.Generator().manual_seed(0), 64
    mu = torch.randn(100_000, N, generator=g)
    x, entropy = Additive(sigma)(mu, torch.randn(100_000, N, generator=g))
    want = .5 * N * math.log(2 * math.pi * math.e * sigma**2)
    assert abs(-normal_log_prob((x - mu).double(), sigma**2).mean().item() - want) / N < 1e-3
    assert entropy.shape == (100_000,) and entropy.min() == entropy.max() and N * entropy[0].item() == pytest.approx(want, rel=1e-5)
    assert not tiny().latent(IMAGE).entropy.requires_grad and tiny(Learned()).latent(IMAGE).entropy.requires_grad


def test_learned_entropy_is_that_of_its_density():
    m = tiny(Learned(start=-1.))
    latent, out = m.latent(IMAGE, E(m)), m.encoder(IMAGE)
    q = torch.distributions.Normal(m.norm(out[:, :4]), (.5 * (out[:, 4:] - 1)).exp())
    assert torch.allclose(latent.entropy, q.entropy().flatten(1).mean(1), atol=1e-5)
    assert torch.allclose(latent.x, q.mean + q.stddev * E(m).view(6, 4, 4, 4), atol=1e-5) and torch.allclose(latent.sigma, q.stddev.mean(), atol=1e-5)


@pytest.mark.parametrize('p', [1, 2])
def test_averages(p):
    "A.4: reconstruction over pixels, flow over latent dimensions; so the gradient is that of sums with beta = pixels / latent dimensions."
    m, e = tiny(d=8).double(), torch.randn(6, 128, dtype=f64)
    logs = Joint(Reconstruction(p), FlowNLL(), Entropy())(m, IMAGE.double(), Y6, e)
    grads = [None if q.grad is None else q.grad.clone() for q in m.parameters()]
    m.zero_grad(set_to_none=True)
    x = m.latent(IMAGE.double(), e).x
    error, log_p = (m.decode(x) - IMAGE).abs().pow(p).sum(), m.flow.log_prob(x, Y6).sum()
    assert logs['rec'].item() == pytest.approx(error.item() / 384, rel=1e-12) and logs['nll'].item() == pytest.approx(-log_p.item() / (6 * 128), rel=1e-12)
    assert logs['minus entropy'].item() == pytest.approx(-.5 * math.log(2 * math.pi * math.e * .25), rel=1e-12)
    (error - 64 / 128 * log_p).backward()
    for a, q in zip(grads, m.parameters(), strict=True): assert torch.allclose(a * 384, q.grad, rtol=1e-9, atol=1e-9)


def test_weights_are_weights():
    def run(*terms): m = tiny(Learned()).double(); return Joint(*terms)(m, IMAGE.double(), Y6, E(m).double()), next(m.encoder.parameters()).grad
    (both, g), (rec, g1), (nll, g2), (ent, _) = run((2., Reconstruction()), (.5, FlowNLL()), (0., Entropy())), run(Reconstruction()), run(FlowNLL()), run(Entropy())
    assert both['loss'].item() == pytest.approx(2 * rec['rec'].item() + .5 * nll['nll'].item(), rel=1e-12) and both['minus entropy'] == ent['minus entropy'] # logged as it is
    assert torch.allclose(g, 2 * g1 + .5 * g2, atol=1e-12) and torch.equal(run()[1], run(Reconstruction(), FlowNLL())[1])


@torch.no_grad()
def test_learned_variance_slides_along_the_scale():
    "Latents in other units: loss(a) - loss(1) = (1 - weight of the entropy) log a, whatever the networks. Weight < 1: no minimum."
    m = tiny(Learned(), norm=False).double()
    latent = m.latent(IMAGE.double(), E(m).double())
    def loss(a, weight):                                                        # encoder, decoder and flow say the same in other units
        nll = -(m.flow.log_prob(a * latent.x / a, Y6) - m.N * math.log(a)) / m.N
        return ((m.decode(a * latent.x / a) - IMAGE).square().mean() + nll.mean() - weight * (latent.entropy + math.log(a)).mean()).item()
    for a in (1e-3, .1, 2., 10.):
        for w in (0., .5, 1., 1.5): assert abs(loss(a, w) - loss(1., w) - (1 - w) * math.log(a)) < 1e-10


def test_perturbations():
    x, e = torch.randn(4000, 2, 4, 4, dtype=f64), torch.randn(4000, 33, dtype=f64)
    for kind, noise, low in ((Linear(), lambda t: 1 - t, 0.), (Slerp(), lambda t: (1 - t**2).sqrt(), 0.), (Slerp(.5), lambda t: (1 - t**2).sqrt(), .5)):
        t = low + (1 - low) * torch.distributions.Normal(0, 1).cdf(e[:, -1]).view(-1, 1, 1, 1)
        assert torch.allclose(kind(x, e)[0], t * x + noise(t) * e[:, :-1].reshape(x.shape), atol=1e-6) and kind.draws(32) == 33
    assert abs(Slerp()(x, e)[0].var() - 1) < .03 and Linear()(x, e)[0].var() < .75 # slerp keeps the variance, linear does not
    same, entropy = Unperturbed()(x, e[:, :0])
    assert torch.equal(same, x) and entropy.eq(-math.inf).all() and Unperturbed().draws(32) == 0
    assert abs((Additive(.25)(x, e[:, :32])[0] - x).std() - .25) < .01


def test_token_norm():
    x = torch.randn(3, 8, 4, 5) * 5 + 2
    mu = TokenNorm()(x)
    assert mu.shape == x.shape and mu.mean(1).abs().max() < 1e-5 and (mu.square().mean(1) - 1).abs().max() < 1e-3 and not list(TokenNorm().parameters())
    assert torch.allclose(mu[1, :, 2, 3], nn.functional.layer_norm(x[1, :, 2, 3], (8,)), atol=1e-6)


# ---- sampling

@pytest.mark.parametrize('classes', [3, 0])
def test_sample_is_invert_step_decode(classes):
    m = tiny(classes=classes).double().eval()
    y, g = (Y6 if classes else 6), lambda: torch.Generator().manual_seed(4)
    labels = Y6 if classes else None
    for guide, gamma in ((None, 0.), *([(StarGuidance(1.), 0.), (StarGuidance(1.), .25), (None, .25)] if classes else [(TemperatureGuidance(1., 2.), 0.)])):
        z = torch.cat([torch.randn(1, *m.flow.z_shape, generator=g_) for g_ in [g()] for _ in range(6)]).double()
        x = naive_inverse(m.flow, z, labels, guide)
        if gamma: x = score_guidance(m.flow, x, labels, gamma)
        with torch.no_grad(): want = m.decode(x)
        assert (m.sample(y, guide, gamma, generator=g()) - want).abs().max() < 1e-8
        assert (m.sample(y, guide, gamma, generator=g(), batch_size=4) - want).abs().max() < 1e-8 and (m.sample(y, guide, gamma, generator=g(), decode=False) - x).abs().max() < 1e-8
    assert m.sample(0).shape == (0, 1, 8, 8) and m.sample(0, decode=False).shape == (0, 4, 4, 4) and m.sample(1).shape == (1, 1, 8, 8)
    assert all(p.grad is None for p in m.parameters())


def test_samples_of_wide_latents_are_not_called_broken():
    import warnings
    m = tiny(scale=.3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert m.sample(8).shape == (8, 1, 8, 8)


@torch.no_grad()
def test_reconstruct_and_between():
    m, g = tiny().eval(), lambda: torch.Generator().manual_seed(0)
    mu = m.latent(IMAGE).mu
    assert torch.equal(m.reconstruct(IMAGE), m.decode(mu)) and torch.allclose(m.reconstruct(IMAGE, .3, g()), m.decode(mu + .3 * torch.randn(mu.shape, generator=g())), atol=1e-6)
    path = between(m, IMAGE[0], IMAGE[1], 5)
    assert path.shape == (5, 1, 8, 8) and torch.allclose(path[[0, 4]], m.decode(mu[:2]), atol=1e-5) and torch.allclose(path[2], m.decode(mu[:2].mean(0, keepdim=True))[0], atol=1e-5)
    assert len({tuple(m(IMAGE).flatten().tolist()) for _ in range(3)}) == 3     # forward draws


# ---- the other terms

@pytest.mark.parametrize('kind,arrives', [(Forward, True), (Detach, False), (Reverse, False)])
def test_alignment_reaches_the_encoder(kind, arrives):
    "REPA-E (SimFlow §4.2): only forward alignment has a graph that leads into the encoder; and no other strategy disturbs its gradient."
    def grads(lam):
        m = tiny().double()
        torch.manual_seed(1)
        head, v = Projector(16, 12, 24).double(), torch.randn(6, 16, 12, dtype=f64)
        logs = Joint(Reconstruction(), AlignedNLL(kind([(2, 1)]), lambda image: v, head, lam))(m, IMAGE.double(), Y6, E(m).double())
        assert {'rec', 'nll', 'align'} <= set(logs)
        return {k: p.grad for k, p in m.named_parameters()}, head.net[0].weight.grad.norm()
    (a, h), (b, _) = grads(1.), grads(0.)
    moved = lambda part: max((a[k] - b[k]).abs().max().item() for k in a if k.startswith(part) and a[k] is not None)
    assert h > 0 and moved('flow') > 1e-7 and moved('decoder') < 1e-14 and (moved('encoder') > 1e-7 if arrives else moved('encoder') < 1e-14)


def test_aligned_nll_is_the_nll():
    m = tiny()
    other = Joint(AlignedNLL(Forward([(2, 1)]), lambda image: torch.randn(6, 16, 12), Projector(16, 12, 24)))(m, IMAGE, Y6, E(m))
    assert torch.allclose(Joint(FlowNLL())(m, IMAGE, Y6, E(m))['nll'], other['nll'], atol=1e-5)


def test_adversarial_sides_do_not_mix():
    def D(): torch.manual_seed(3); return PatchCritic(1, 4, 1)
    def run(*terms): m = tiny(); Joint(*terms)(m, IMAGE, Y6, E(m)); return m
    d, m, relu = D(), tiny(), nn.functional.relu
    both, xhat = run(Adversarial(d)), m.decode(m.latent(IMAGE, E(m)).x)
    own = D(); (.5 * (relu(1 - own(IMAGE)).mean() + relu(1 + own(xhat.detach())).mean())).backward()
    for a, b in zip(d.parameters(), own.parameters()): assert torch.allclose(a.grad, b.grad, atol=1e-6)         # the critic learns to tell, and only that
    (-D()(xhat).mean()).backward()
    for a, b in zip(both.decoder.parameters(), m.decoder.parameters()): assert torch.allclose(a.grad, b.grad, atol=1e-6) # the decoder learns to fool
    late, joint = Adversarial(D(), start=2), []
    m = tiny()
    for _ in fit(m, [(IMAGE, Y6, E(m))] * 3, Joint(Reconstruction(), late), steps=3, every=1): joint.append(_['tell'])
    assert joint[:2] == [0, 0] and joint[2] > 0 and {id(p) for p in late.critic.parameters()} <= {id(p) for p in Joint(late).parameters()}


def test_perceptual_takes_any_distance():
    m = tiny()
    logs = Joint(Reconstruction(), Perceptual(lambda a, b: (a - b).abs().flatten(1).mean(1)), FlowNLL())(m, IMAGE, Y6, E(m))
    assert logs['perceptual'] > 0 and logs['loss'].item() == pytest.approx(sum(logs[k].item() for k in ('rec', 'perceptual', 'nll')), rel=1e-5)


def test_without_the_weights_of_lpips(monkeypatch, capsys):
    from urllib.error import URLError
    import torchmetrics.image
    def none(*a, **k): raise URLError('no network')
    monkeypatch.setattr(torchmetrics.image, 'LearnedPerceptualImagePatchSimilarity', none)
    with pytest.raises(ValueError, match="vgg16 are not here"): Perceptual()
    terms = paper_terms()
    out = capsys.readouterr().out
    assert [type(t) for t in terms] == [Reconstruction, FlowNLL, Adversarial] and out.count('\n') == 1 and 'perceptual' in out and 'vgg16' in out
    assert len(paper_terms(PatchCritic(1, 4), start=9)) == 3


def test_without_diffusers(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    with pytest.raises(ImportError, match='diffusers'): tiny()
    assert AdaTarFlow(4, 2, 1, 16, 2, 1, 8).sample(1).isfinite().all()          # the flow alone needs none


# ---- counts and tables

PRINTED = {'S': '37.0', 'B': '141.3', 'L': '474.9', 'XL': '695.3', 'XXL': '1364.7', 'XXL, 36 layers': '1125.6'}


def by_hand(dim, layers, blocks=6, d=64, n=256, k=1001):
    "Attention, MLP, adaLN-Zero a layer; projections, positions, classes and a last modulation a block; biases included."
    layer = 4 * dim**2 + 4 * dim + 8 * dim**2 + 5 * dim + 6 * dim**2 + 6 * dim
    return layers * layer + blocks * ((d * dim + dim) + n * dim + k * dim + (2 * dim**2 + 2 * dim) + (2 * d * dim + 2 * d))


@pytest.mark.parametrize('name', PRINTED)
def test_table_8(name):
    "The printed digits from the configuration, on the meta device; E1: 46 layers give the printed 1.4B, the printed 36 do not."
    size = SIZES[name.split(',')[0]]._replace(**({'deep': 36} if '36' in name else {}))
    with torch.device('meta'): AdaTarFlow(**flow_config(SIZES['S']))            # torch loads what this device needs, once
    began = time.perf_counter()
    with torch.device('meta'): flow = AdaTarFlow(**flow_config(size))
    took, params = time.perf_counter() - began, count(flow)
    print(f'{name}: {params:,} parameters, printed {size.printed}; {took:.2f} s')
    assert f'{params / 1e6:.1f}' == PRINTED[name] and params == by_hand(size.dim, 10 + size.deep) and took < 5 # about 0.2 s on an idle core
    assert flow.z_shape == (256, 64) and all(p.device.type == 'meta' for p in flow.parameters())
    short = f'{params / 1e9:.1f}B' if params > 1e9 else f'{params / 1e6:.0f}M'
    assert (short == size.printed) == ('36' not in name)


@pytest.mark.parametrize('mean_only,params', [(False, 67_139_011), (True, 66_831_683)])
def test_count_of_the_vae(mean_only, params):
    with torch.device('meta'):
        vae, image = make_vae(mean_only, **VAE), torch.empty(1, 3, 256, 256)
        assert count(vae) == params and f'{params / 1e6:.1f}' == ('66.8' if mean_only else '67.1')
        assert vae.quant_conv(vae.encoder(image)).shape == (1, 64 if mean_only else 128, 16, 16)


@pytest.mark.parametrize('posterior,image_size,d', [(None, 256, 64), (Learned(), 256, 64), (None, 512, 64), (None, 256, 16)])
def test_paper_model(posterior, image_size, d):
    with torch.device('meta'):
        m = paper_model('S', image_size, d, posterior=posterior)
        s = m.latent(torch.empty(1, 3, image_size, image_size))
        assert s.mu.shape == (1, d, image_size // 16, image_size // 16) and m.decode(s.x).shape == (1, 3, image_size, image_size) and m.factor == 16
        assert m.flow.log_prob(s.x, torch.zeros(1, dtype=torch.long)).shape == (1,)
    if d == 64: assert count(m) - count(m.flow) == (67_139_011 if posterior else 66_831_683)


def test_two_stages():
    "Table 9: constant, then half a cosine to a hundredth; in steps, whatever their number."
    s = TwoStages()
    assert s(0, 1000) == s(499, 1000) == 1 and s(999, 1000) == pytest.approx(.01) and s(750, 1001) == pytest.approx(.505, abs=2e-3)
    curve = [s(i, 100) for i in range(100)]
    assert all(b <= a for a, b in zip(curve, curve[1:])) and min(curve) == pytest.approx(.01)
    assert [TwoStages((160, 0))(i, 10) for i in (0, 9)] == [1, 1] and s(0, 100, 10) == pytest.approx(.01) and s(10, 100, 10) == 1
    m, seen = tiny(), []
    for logs in fit(m, [(IMAGE, Y6, E(m))] * 4, Joint(), steps=4, schedule=s, every=1, lr=1e-4): seen.append(logs['lr'])
    assert seen[:2] == pytest.approx([1e-4] * 2) and seen[-1] == pytest.approx(1e-6)
    for bad in ((1,), (0, 0), (-1, 2), ('a', 1)):
        with pytest.raises(ValueError, match='epochs'): TwoStages(bad)


# ---- latent statistics

def test_statistics_of_white_noise():
    x = torch.randn(400, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    f = torch.fft.fftfreq(16, dtype=f64)
    share = ((f[:, None]**2 + f**2).sqrt() > .25).double().mean().item()        # a flat spectrum: the share of the frequencies
    assert spectral_entropy(x) == pytest.approx(1, abs=1e-3) and high_frequency(x) == pytest.approx(share, abs=3e-3)
    assert total_variation(x) == pytest.approx(2 / math.pi**.5, abs=3e-3) and abs(autocorrelation(x)) < 5e-3 and abs(autocorrelation(x, 3)) < 5e-3


def test_statistics_of_a_constant():
    s = latent_statistics(torch.full((3, 2, 4, 8), 1.7))
    assert all(abs(v) < 1e-12 for v in s.values()) and all(math.isfinite(v) for v in latent_statistics(torch.zeros(2, 2, 4, 4)).values())


@pytest.mark.parametrize('k', [1, 2, 3, 5, 7])
def test_statistics_of_a_wave(k):
    "k periods along a row of 16: two frequencies of equal power, a correlation of cos(2 pi k / 16)."
    t = torch.arange(16, dtype=f64)
    x = torch.cos(2 * math.pi * k * t / 16 + .3).expand(2, 3, 4, 16)
    assert spectral_entropy(x) == pytest.approx(math.log(2) / math.log(64), rel=1e-9) and high_frequency(x) == pytest.approx(float(k / 16 > .25), abs=1e-12)
    assert autocorrelation(x) == pytest.approx(math.cos(2 * math.pi * k / 16), abs=.02)
    assert spectral_entropy(5 * x) == pytest.approx(spectral_entropy(x)) and total_variation(5 * x) == pytest.approx(total_variation(x)) and autocorrelation(5 * x) == pytest.approx(autocorrelation(x))


def test_statistics_of_a_checkerboard():
    i = torch.arange(8)
    x = (1. - 2 * ((i[:, None] + i) % 2)).expand(3, 2, 8, 8)
    assert abs(spectral_entropy(x)) < 1e-9 and high_frequency(x) == pytest.approx(1) and total_variation(x) == pytest.approx(2 / x.double().std().item())
    assert autocorrelation(x) == pytest.approx(-49 / 63)                        # 56 neighbours in rows differ, 7 at the ends of rows agree
    assert latent_statistics(x) == {'spectral entropy': spectral_entropy(x), 'high-frequency ratio': high_frequency(x), 'total variation': total_variation(x), 'autocorrelation': autocorrelation(x)}


# ---- doors

def test_model_doors():
    with pytest.raises(ValueError, match='flow: it has 6 channels; the latents of this VAE have 4'): SimFlow(vae_config(4), flow_args(6))
    m = tiny()
    for size in (9, (8, 7)):
        h, w = size if isinstance(size, tuple) else (size, size)
        with pytest.raises(ValueError, match='the factor 2 of this VAE does not divide'): m.latent(torch.zeros(1, 1, h, w))
    with pytest.raises(ValueError, match=r'takes \(b, 1, 8, 8\)'): m.latent(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r'takes \(b, 1, 8, 8\)'): m.latent(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r'draws \(6, 64\) numbers'): m.latent(IMAGE, torch.randn(6, 3))
    with pytest.raises(ValueError, match=r'draws \(6, 65\) numbers'): tiny(Mean(Slerp())).latent(IMAGE, torch.randn(6, 64))
    with pytest.raises(ValueError, match='needs labels'): m.sample(3, gamma=.25)
    with pytest.raises(ValueError, match='needs labels'): m.sample(3, StarGuidance(1.))
    with pytest.raises(ValueError, match='gamma'): m.sample(Y6, gamma=math.nan)
    with pytest.raises(ValueError, match='without classes'): tiny(classes=0).sample(Y6)
    for bad in (0, -1, math.nan, math.inf, True, '.5'):
        with pytest.raises(ValueError, match='sigma'): Additive(bad)
    for bad in (1, -.1, math.nan, True):
        with pytest.raises(ValueError, match='low'): Linear(bad)
    for bad in (0, 3, 1.5):
        with pytest.raises(ValueError, match='p:'): Reconstruction(bad)
    with pytest.raises(ValueError, match="size: 'M' came, must be one of 'S', 'B', 'L', 'XL', 'XXL'"): paper_model('M')
    with pytest.raises(ValueError, match='choose of'): posterior_of({'kind': 'Mode'})
    for bad in ('fixed', .5, Additive(.5), Additive(.5).config):
        with pytest.raises(ValueError, match='posterior: .*give Mean'): SimFlow(vae_config(), flow_args(), bad)
    for bad in (.5, Mean(), 'slerp'):
        with pytest.raises(ValueError, match='perturb: .*Additive'): Mean(bad)
    for bad in (dict(low=3., high=-3.), dict(start=math.nan)):
        with pytest.raises(ValueError, match='start: nan|low: 3.0'): Learned(**bad)
    with pytest.raises(ValueError, match='one a level to each'): SimFlow(vae_config() | {'block_out_channels': (8, 8, 8)}, flow_args())
    with pytest.raises(ValueError, match='torch.uint8 came'): m.latent(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match='leave the term out'): Joint(Reconstruction(), Entropy())(tiny(Mean(Unperturbed())), IMAGE, Y6)
    with pytest.raises(ValueError, match='compile'): list(fit(m, [(IMAGE, Y6)], Joint(), steps=1, compile=True))
    with pytest.raises(ValueError, match="variant: 'nothing'"): list(training(DIGITS | {'variant': 'nothing'}, load('digits')))
    with pytest.raises(ValueError, match='image_size: 100; the factor 16'): paper_model('S', 100)
    for bad in (torch.zeros(2, 3, 1, 1), torch.zeros(2, 4, 4), torch.zeros(0, 3, 4, 4)):
        with pytest.raises(ValueError, match='give latents'): latent_statistics(bad)


def test_small_batches_and_other_tokens():
    m = tiny()
    for part in (m.latent(IMAGE[:0]).x, m.sample(torch.zeros(0, dtype=torch.long))): assert len(part) == 0
    assert Joint()(m, IMAGE[:1], Y6[:1])['spread'] == 0
    for flow, image in ((dict(patch_size=2), IMAGE), (dict(side=(2, 4)), torch.zeros(6, 1, 4, 8))):
        other = shake(SimFlow(vae_config(), flow_args(**flow)), .05)
        assert Joint()(other, image, Y6)['loss'].isfinite() and other.sample(Y6, StarGuidance(1.), .25).shape == image.shape
    half = tiny().bfloat16().eval()
    assert half.sample(Y6, StarGuidance(1.), .25).isfinite().all() and half.latent(IMAGE.bfloat16()).x.dtype == torch.bfloat16
    logs = list(fit(tiny(), [(IMAGE, Y6, E(m))] * 2, Joint(Reconstruction(), FlowNLL(), Adversarial(PatchCritic(1, 4, 1))), steps=2, amp='bf16'))
    assert math.isfinite(logs[-1]['loss'])


def test_one_model_serves_two_threads():
    m, got = tiny().eval(), {}
    draw = lambda k: m.sample(torch.full((3,), k), StarGuidance(1.), .25, torch.Generator().manual_seed(k))
    alone = {k: draw(k) for k in range(2)}
    threads = [threading.Thread(target=lambda k=k: got.update({k: draw(k)})) for k in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(torch.allclose(got[k], alone[k], atol=1e-5) for k in range(2)) and all(p.requires_grad and p.grad is None for p in m.parameters())


def test_the_experiments_have_their_layout():
    from flowbook.evidence import EXPERIMENTS, load_result, verdicts
    names = [n for n in EXPERIMENTS if n.startswith('simflow')]
    if not names: pytest.skip('no experiment of chapter 13 here')
    for n in names:
        try: record = load_result(n)
        except ValueError: continue
        found = verdicts(record)
        assert set(found) == set(EXPERIMENTS[n].claims) and all(v.state and v.reason for v in found.values())
