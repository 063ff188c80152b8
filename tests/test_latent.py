"""Latent flows: positions that turn, in both reading orders and by every solver; counts; two-step sampling; caches of latents; doors."""
import copy
import json
import time

import pytest
import torch

from flowbook.data import Flip, InMemory, batches
from flowbook.flows import check_flow, shake
from flowbook.guidance import ClassGuidance
from flowbook.latent import (CachedLatents, Encode, LatentFlow, LatentTarFlow, Pick, RopeLayer, SwiGLU, Vae, angles, cache_latents, load_vae,
                             places, swiglu_width, turn)
from flowbook.sampling import Decoder, StaticCache, invert, naive_inverse, residual, sample, trajectory, walk, walk_graph
from flowbook.tarflow import Mlp, TarFlow
from flowbook.train import GaussianNoise
from harm import PICKLE, RUBBISH, SETTINGS, UNFIT, pickles

f64 = torch.float64


def count(m): return sum(p.numel() for p in m.parameters())


def flow64(size=(3, 4), patch=1, blocks=3, layers=2, scale=.08, **kw):
    kw = {'classes': 3, **kw}
    flow = shake(LatentTarFlow(size, 2, patch, 16, blocks, layers, 8, **kw), scale).double()
    return flow, torch.randn(4, 2, *size, dtype=f64), torch.tensor([0, 2, -1, 1]) if kw['classes'] else None


def tiny_vae(seed=0, widths=(8, 8), scale=1.3, image=1, channels=2, shift=None):
    from diffusers import AutoencoderKL
    torch.manual_seed(seed)
    k = len(widths)
    return Vae(AutoencoderKL(image, image, ('DownEncoderBlock2D',) * k, ('UpDecoderBlock2D',) * k, widths, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
                             sample_size=8, scaling_factor=scale, shift_factor=shift, mid_block_add_attention=False), f'tiny-{seed}')


@pytest.fixture(scope='module')
def vae(): return tiny_vae()


def images(n=10, size=8, channels=1):
    g = torch.Generator().manual_seed(1)
    return InMemory(torch.randint(0, 256, (n, channels, size, size), generator=g).to(torch.uint8), torch.arange(n) % 3, ('a', 'b', 'c'), 256, 'noise')


# ---- RoPE

def test_turn_is_a_rotation():
    "Lengths are kept; angle zero is the identity; two turns add up."
    x, where = torch.randn(5, 12, 8, dtype=f64), places(3, 4)
    a = angles(where, 8, dtype=f64)
    assert a.shape == (12, 4) and torch.allclose(turn(x, a).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turn(x, 0 * a), x)
    assert torch.allclose(turn(turn(x, a), a), turn(x, 2 * a), atol=1e-12)
    matrix = lambda t: torch.tensor([[t.cos(), -t.sin()], [t.sin(), t.cos()]], dtype=f64)
    by_hand = torch.stack([matrix(a[7, i]) @ x[0, 7, [i, i + 4]] for i in range(4)])          # (4, 2)
    assert torch.allclose(turn(x, a)[0, 7], by_hand.T.flatten())


def test_relative():
    "q . k depends on the difference of places alone, in rows and in columns; and it does depend on it."
    q, k = torch.randn(2, 8, dtype=f64)
    dot = lambda p, r: turn(q[None], angles(torch.tensor([p]), 8, dtype=f64))[0] @ turn(k[None], angles(torch.tensor([r]), 8, dtype=f64))[0]
    for dr, dc in ((0, 0), (1, 0), (0, 3), (-2, 5)):
        values = torch.stack([dot((r + dr, c + dc), (r, c)) for r in (0, 4, 30) for c in (0, 7, 63)])
        assert (values - values[0]).abs().max() < 1e-12
    assert abs(dot((1, 0), (0, 0)) - dot((0, 1), (0, 0))) > 1e-3


@pytest.mark.parametrize('shift', [(5, 0), (0, 9), (11, 3)])
@pytest.mark.parametrize('order', [None, 'reverse', 'random'])
def test_layer_sees_differences_only(shift, order):
    "A whole layer, with places moved as one: the same output, in every reading order."
    n = 12
    order = None if order is None else torch.arange(n).flip(0) if order == 'reverse' else torch.randperm(n)
    where = places(3, 4, order)
    layer, x = RopeLayer(16, 8, places=where).double(), torch.randn(2, n, 16, dtype=f64)
    moved = copy.deepcopy(layer); moved.attn.places = where + torch.tensor(shift)
    assert torch.allclose(layer(x), moved(x), atol=1e-12)
    moved.attn.places = where * 2
    assert (layer(x) - moved(x)).abs().max() > 1e-4


def test_places_follow_the_tokens():
    "Block 2 reads backwards: its layers hold the places of the tokens they read."
    flow = flow64((3, 4))[0]
    want = torch.tensor([(r, c) for r in range(3) for c in range(4)])
    for t, block in enumerate(flow.blocks):
        for layer in block.layers: assert torch.equal(layer.attn.places, want if t % 2 == 0 else want.flip(0))
    two = LatentTarFlow((4, 8), 2, 2, 16, 2, 1, 8)                                            # patch 2: places of patches
    assert torch.equal(two.blocks[0].layers[0].attn.places, torch.tensor([(r, c) for r in range(2) for c in range(4)]))
    perm = [3, 1, 0, 2]
    assert torch.equal(LatentTarFlow(2, 2, 1, 16, 1, 1, 8, orders=[perm]).blocks[0].layers[0].attn.places, places(2, 2)[perm])


def test_reversal():
    "Reading backwards is reading the turned image forwards: where is only a matter of differences."
    n = 12
    forward, back = RopeLayer(16, 8, places=places(3, 4)).double(), RopeLayer(16, 8, places=places(3, 4, list(range(n))[::-1])).double()
    back.load_state_dict(forward.state_dict())
    x = torch.randn(2, n, 16, dtype=f64)
    negative = copy.deepcopy(forward); negative.attn.places = -negative.attn.places            # the reversed grid is the grid's negative, moved by (2, 3)
    assert torch.allclose(back(x), negative(x), atol=1e-12)
    assert (back(x) - forward(x)).abs().max() > 1e-4                                           # left is not right


# ---- SwiGLU and counts

@pytest.mark.parametrize('dim', [48, 96, 768, 1024])
def test_swiglu(dim):
    hidden = swiglu_width(dim)
    assert hidden % 8 == 0 and 8 * dim / 3 <= hidden < 8 * dim / 3 + 8
    with torch.device('meta'): net, mlp = SwiGLU(dim), Mlp(dim)
    assert count(net) == 2 * dim + 2 * hidden * (dim + 1) + dim * (hidden + 1)
    assert abs(count(net) / count(mlp) - 1) < .01 + 8 / dim


def test_swiglu_formula():
    net, x = SwiGLU(16).double(), torch.randn(3, 16, dtype=f64)
    w, b, h = net.up.weight, net.up.bias, net.norm(x)
    gate, value = h @ w[:48].T + b[:48], h @ w[48:].T + b[48:]
    assert torch.allclose(net(x), (gate * gate.sigmoid() * value) @ net.down.weight.T + net.down.bias)


def test_paper_sizes():
    "Patch 2 has the tokens of 64x64 at patch 4; patch 1 four times as many; R-REPA §5: 8 blocks, 8 layers, width 1024."
    with torch.device('meta'):
        two, one = (LatentTarFlow(32, 4, p, 1024, 8, 8, classes=1000) for p in (2, 1))
        plain = TarFlow(32, 4, 2, 1024, 8, 8, classes=1000)
    assert two.z_shape == (256, 16) and one.z_shape == (1024, 4)
    assert abs(count(two) / count(plain) - 1) < .01


# ---- the flow

@pytest.mark.parametrize('kw', [{}, {'patch': 2, 'size': (4, 6)}, {'classes': 0}, {'kind': 'vp'}, {'kind': 'coupling'}, {'orders': [[5, 0, 3, 1, 4, 2, 11, 6, 10, 7, 9, 8], 'forward', 'reverse']}])
def test_check_flow(kw):
    flow, x, y = flow64(**kw)
    print(check_flow(flow, x, y))


@pytest.mark.parametrize('solver', ['sequential', 'jacobi', 'gauss-seidel', 2, 5, [1, 12, 3]])
@pytest.mark.parametrize('guided', [False, True])
def test_solvers(solver, guided):
    "Windows start anywhere: places must, too."
    flow, x, y = flow64()
    y, g = torch.tensor([0, 2, 1, 1]), ClassGuidance(.5) if guided else None
    with torch.no_grad(): z = flow(x, y)[0]
    want = naive_inverse(flow, z, y, g)
    assert (invert(flow, z, y, g, solver, tol=0.) - want).abs().max() < 1e-9
    if not guided: assert (want - x).abs().max() < 1e-9
    assert max(residual(flow, z, list(trajectory(flow, z, y, g, solver, tol=0.)), y, g)) < 1e-8


@pytest.mark.parametrize('kw', [{}, {'patch': 2, 'size': (4, 6)}, {'kind': 'vp'}])
def test_fast_layers(kw):
    "The fast version of the layer, the layer itself (a hook keeps it from being replaced), and the form that a GPU records: one result."
    flow, x, y = flow64(**kw)
    y, g, n = torch.tensor([0, 2, 1, 1]), ClassGuidance(.5), flow.z_shape[0]
    with torch.no_grad(): z = flow(x, y)[0]
    make = lambda: Decoder(flow.blocks[1], torch.empty(n, 4, z.shape[2], dtype=f64), y, g, 2, 3)
    assert make().fast
    tokens = flow.blocks[1].read(z).transpose(0, 1).contiguous()
    with torch.inference_mode():
        fast, graph = walk(make(), tokens), walk_graph(make(), tokens, record=False)
        hook = flow.blocks[1].layers[0].attn.qkv.register_forward_hook(lambda *_: None)
        assert not make().fast
        slow = walk(make(), tokens)
        hook.remove()
    assert (fast - slow).abs().max() < 1e-10 and (graph - slow).abs().max() < 1e-10


def test_auto_and_grad():
    flow, x, y = flow64()
    with torch.no_grad(): z = flow(x, y)[0]
    assert (invert(flow, z, y) - x).abs().max() < 1e-3                                         # within tol
    g = invert(flow, z.requires_grad_(), y, ClassGuidance(0.), grad=True)
    assert (g - x).abs().max() < 1e-9 and torch.autograd.grad(g.sum(), z)[0].isfinite().all()


def test_wrong_places_are_seen():
    "The test above can fail: a step that believes to be at position 0 gives another image."
    flow, x, y = flow64()
    with torch.no_grad(): z = flow(x, y)[0]
    good = invert(flow, z, y, solver='sequential')
    for block in flow.blocks:
        for layer in block.layers: layer.attn.places = layer.attn.places[:1].expand(12, 2)
    assert (invert(flow, z, y, solver='sequential') - good).abs().max() > 1e-4


@torch.no_grad()
def test_keys_are_turned_before_the_cache():
    layer, x = RopeLayer(16, 8, places=places(3, 4)).double(), torch.randn(1, 12, 16, dtype=f64)
    cache, seen = StaticCache(1, 2, 12, 8, x), []
    for i in range(12):
        def past(k, v, i=i): return cache.extend(k, v, i, 1)
        past.start = i
        seen.append(layer(x[:, i:i + 1], past=past))
    assert torch.allclose(torch.cat(seen, 1), layer(x), atol=1e-12)
    a = layer.attn
    k = a.qkv(a.norm(x)).unflatten(-1, (3, 2, 8))[:, :, 1].transpose(1, 2)
    assert torch.allclose(cache.k, turn(k, angles(places(3, 4), 8, dtype=f64)), atol=1e-12)


def test_bf16():
    "Angles stay float32 whatever the network is: far away places are still told apart."
    where = places(64, 64)
    a, x = angles(where[-2:], 8), torch.randn(1, 2, 8)
    low = turn(x.bfloat16(), a)
    assert low.dtype == torch.bfloat16 and (low.float() - turn(x, a)).abs().max() < .03
    flow = shake(LatentTarFlow((3, 4), 2, 1, 16, 2, 2, 8, classes=3), .08)
    half = copy.deepcopy(flow).bfloat16()
    assert half.blocks[0].layers[0].attn.places.dtype == torch.int64
    x, y = torch.randn(3, 2, 3, 4), torch.tensor([0, 1, 2])
    with torch.no_grad():
        z = flow(x, y)[0]
        assert (half(x.bfloat16(), y)[0].float() - z).abs().max() < .1
        with torch.autocast('cpu', torch.bfloat16): assert (flow(x, y)[0] - z).abs().max() < .1
    assert (invert(flow, z, y, solver='sequential', dtype=torch.bfloat16) - x).abs().max() < .2
    flow(x, y)[0].sum().backward()                                                             # after inference_mode, too
    assert all(p.grad is not None for p in flow.blocks[0].layers.parameters())


def test_save_and_load(tmp_path):
    flow, x, y = flow64(theta=50.)
    flow.save_pretrained(tmp_path)
    again = LatentTarFlow.from_pretrained(tmp_path)
    assert again.config == flow.config and again.theta == 50.
    with torch.no_grad(): assert torch.equal(again(x, y)[0], flow(x, y)[0])
    with pytest.raises(ValueError, match='LatentTarFlow.from_pretrained'): TarFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize('kw,match', [({'head_dim': 6, 'dim': 12}, 'multiple of 4'), ({'theta': 1.}, 'theta: 1.0'), ({'patch_size': 3}, 'does not divide')])
def test_flow_doors(kw, match):
    with pytest.raises(ValueError, match=match): LatentTarFlow(**{'image_size': 4, 'channels': 2, 'patch_size': 1, 'dim': 16, 'blocks': 2, 'layers': 1, 'head_dim': 8, **kw})


# ---- the VAE

def test_vae(vae):
    x = images(6).batch(range(6))[0]
    m = vae.moments(x)
    dist = vae.model.encode(x).latent_dist
    assert m.shape == (6, 2, 2, 4, 4) and torch.allclose(m[:, 0], dist.mean * 1.3) and torch.allclose(m[:, 1], dist.std * 1.3)
    assert torch.equal(vae.encode(x, sample=False), m[:, 0])
    g = lambda: torch.Generator().manual_seed(3)
    assert torch.allclose(vae.encode(x, generator=g()), m[:, 0] + m[:, 1] * torch.randn(m[:, 0].shape, generator=g()))
    assert torch.allclose(vae.decode(m[:, 0]), vae.model.decode(dist.mean).sample, atol=1e-5)
    assert vae.decode(m[:0, 0]).shape == (0, 1, 8, 8)
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.train().model.training


def test_shift_factor():
    vae = tiny_vae(shift=.4)
    x = images(3).batch(range(3))[0]
    assert torch.allclose(vae.encode(x, sample=False), (vae.model.encode(x).latent_dist.mean - .4) * 1.3, atol=1e-6)
    assert torch.allclose(vae.decode(vae.encode(x, sample=False)), vae.model.decode(vae.model.encode(x).latent_dist.mean).sample, atol=1e-5)
    assert vae.identity != tiny_vae().identity                                                 # same weights, another scale of latents


def test_grey_for_an_rgb_vae():
    vae, x = tiny_vae(image=3), images(2).batch(range(2))[0]
    assert torch.equal(vae.encode(x, sample=False), vae.encode(x.expand(-1, 3, -1, -1), sample=False))


@pytest.mark.parametrize('memory', ['slices', 'tiles'])
def test_memory(vae, memory):
    "Slices change nothing; tiles nothing where the image is one tile, little at the seams elsewhere."
    other, z = Vae(copy.deepcopy(vae.model), 'tiny-0', memory), torch.randn(3, 2, 4, 4)
    assert torch.allclose(vae.decode(z), other.decode(z), atol=1e-5) and other.identity == vae.identity
    big = torch.randn(2, 2, 16, 16)
    assert other.decode(big).shape == vae.decode(big).shape == (2, 1, 32, 32)


def test_vae_folder(vae, tmp_path):
    vae.save_pretrained(tmp_path/'vae', {'data': 'noise'})
    again, z = load_vae(tmp_path/'vae'), torch.randn(2, 2, 4, 4)
    assert again.identity == vae.identity and again.card == {'data': 'noise'} and torch.equal(again.decode(z), vae.decode(z))
    assert not list((tmp_path/'vae').glob('*.bin'))


def test_vae_doors(vae, tmp_path):
    for x, match in ((torch.zeros(1, 1, 9, 8), 'factor 2 of tiny-0 does not divide'), (torch.zeros(1, 2, 8, 8), r'takes floating point images \(b, 1, H, W\)'), (torch.zeros(1, 8, 8), 'images')):
        with pytest.raises(ValueError, match=match): vae.encode(x)
    with pytest.raises(ValueError, match=r'latents \(b, 2, h, w\)'): vae.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="memory: 'little'"): Vae(vae.model, memory='little')
    with pytest.raises(ValueError, match='AutoencoderKL'): Vae(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match='there is no folder'): load_vae('no-such-vae')
    (tmp_path/'config.json').write_text('{}')
    with pytest.raises(ValueError, match='gave no AutoencoderKL'): load_vae(tmp_path)


def test_offline(monkeypatch, tmp_path):
    "Without a network: a sentence, in seconds."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path)); monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    began = time.time()
    with pytest.raises(ValueError, match='could not be had from 127.0.0.1:9'): load_vae('sd-vae-ft-ema')
    assert time.time() - began < 10
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(ValueError, match='HF_HUB_OFFLINE is set'): load_vae('sd-vae-ft-ema')


# ---- cached latents

@pytest.mark.parametrize('flip', [True, False])
def test_cache_equals_live(vae, tmp_path, flip):
    "The loader on cached latents gives, number by number, what flip, encode and noise give on images."
    data = images(10)
    cached = CachedLatents(cache_latents(vae, data, tmp_path, flip=flip, shard=4, batch_size=3), vae)
    assert len(cached) == 10 and cached.shape == (2, 4, 4) and cached.classes == ('a', 'b', 'c') and len(list(tmp_path.glob('*.safetensors'))) == 3
    live = batches(data, 5, seed=7, transforms=[Flip(.5 * flip), Encode(vae), GaussianNoise(.2)], epochs=3)
    kept = batches(cached, 5, seed=7, transforms=[Pick(.5 * flip), GaussianNoise(.2)], epochs=3)
    pairs = list(zip(live, kept, strict=True))
    assert len(pairs) == 6
    for a, b in pairs: assert torch.equal(a.index, b.index) and torch.equal(a.y, b.y) and torch.allclose(a.x, b.x, atol=1e-5)
    means = next(batches(cached, 10, shuffle=False, transforms=[Pick(0., sample=False)])).x
    assert torch.allclose(means, vae.encode(data.batch(range(10))[0], sample=False), atol=1e-5)
    assert torch.allclose(next(batches(data, 10, shuffle=False, transforms=[Encode(vae, False)])).x, means, atol=1e-5)


def test_mirrored_latent_is_no_latent_of_the_mirror_image(vae):
    x = images(4).batch(range(4))[0]
    assert (vae.encode(x.flip(-1), sample=False) - vae.encode(x, sample=False).flip(-1)).abs().max() > 1e-2


def test_cache_resumes_and_parts(vae, tmp_path):
    data = images(10)
    cache_latents(vae, data, tmp_path, shard=4, part=(1, 2))
    with pytest.raises(ValueError, match='2 of 3 shards are missing'): CachedLatents(tmp_path)
    stamp = (tmp_path/'00001.safetensors').stat().st_mtime_ns
    cache_latents(vae, data, tmp_path, shard=4)
    assert (tmp_path/'00001.safetensors').stat().st_mtime_ns == stamp and len(CachedLatents(tmp_path)) == 10
    assert not list(tmp_path.glob('*.tmp'))


def test_half(vae, tmp_path):
    data = images(6)
    a, b = (CachedLatents(cache_latents(vae, data, tmp_path/str(d), dtype=d)).batch([1, 4])[0] for d in (torch.float32, torch.float16))
    assert b.dtype == torch.float32 and (a - b).abs().max() < 5e-3


def test_cache_doors(vae, tmp_path):
    data, other = images(6), tiny_vae(1)
    folder = cache_latents(vae, data, tmp_path/'a', flip=False, shard=4)
    with pytest.raises(ValueError, match='are of the VAE tiny-0 .* tiny-1 .* is another'): CachedLatents(folder, other)
    with pytest.raises(ValueError, match='holds latents with vae'): cache_latents(other, data, folder, flip=False, shard=4)
    with pytest.raises(ValueError, match='holds latents with flips 1, not 2'): cache_latents(vae, data, folder, shard=4)
    with pytest.raises(ValueError, match='holds no latents'): CachedLatents(tmp_path)
    cached = CachedLatents(folder, vae)
    with pytest.raises(ValueError, match='written without mirrored'): next(batches(cached, 2, transforms=[Pick(.5)]))
    with pytest.raises(ValueError, match='images go through `Encode`'): next(batches(data, 2, transforms=[Pick(0.)]))
    with pytest.raises(ValueError, match='factor 2 of tiny-0 does not divide the|does not divide them'): cache_latents(vae, images(2, 9), tmp_path/'b')
    with pytest.raises(ValueError, match='shard: 0'): cache_latents(vae, data, tmp_path/'c', shard=0)
    path = folder/'00000.safetensors'
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match='00000.safetensors cannot be read'): CachedLatents(folder)


# ---- files that are damaged, or made to harm

def refused(load, path, tried=None, match=None):
    with pytest.raises(ValueError, match=match) as e: load()
    assert str(path) in str(e.value) or path.name in str(e.value), f'{path.name} is not named in: {e.value}'
    assert len(str(e.value)) < 1500
    if tried: tried(said=e.value)


def folders(vae, tmp_path):
    "name of a file -> (where it lies, what reads it)"
    latents, model = cache_latents(vae, images(6), tmp_path/'latents', flip=False, shard=4), latent_flow(vae)
    vae.save_pretrained(tmp_path/'vae', {'data': 'noise'}); model.save_pretrained(tmp_path/'model')
    cached, alone, both = lambda: CachedLatents(latents, vae), lambda: load_vae(tmp_path/'vae'), lambda: LatentFlow.from_pretrained(tmp_path/'model')
    return {'plan': (latents/'plan.json', cached), 'shard': (latents/'00001.safetensors', cached),
            'config of a VAE': (tmp_path/'vae'/'config.json', alone), 'weights of a VAE': (tmp_path/'vae'/'diffusion_pytorch_model.safetensors', alone), 'card of a VAE': (tmp_path/'vae'/'card.json', alone),
            'config': (tmp_path/'model'/'config.json', both), 'weights': (tmp_path/'model'/'model.safetensors', both),
            'inner config': (tmp_path/'model'/'vae'/'config.json', both), 'inner weights': (tmp_path/'model'/'vae'/'diffusion_pytorch_model.safetensors', both)}


FILES = ['plan', 'shard', 'config of a VAE', 'weights of a VAE', 'card of a VAE', 'config', 'weights', 'inner config', 'inner weights']


def names_folder(path): return path.parent if path.name in ('config.json', 'diffusion_pytorch_model.safetensors') and path.parent.name == 'vae' else path   # diffusers reads a folder


@pytest.mark.fault(*PICKLE)
@pytest.mark.parametrize('name', FILES)
def test_a_pickle_is_refused(vae, tmp_path, name, tried):
    path, load = folders(vae, tmp_path)[name]
    load()
    for content in pickles(tmp_path/'boom'):
        path.write_bytes(content)
        refused(load, names_folder(path), tried)
        assert not (tmp_path/'boom').exists()
    tried(times=3)


@pytest.mark.fault(*PICKLE)
def test_a_pickle_beside_is_not_looked_at(vae, tmp_path):
    path, load = folders(vae, tmp_path)['weights of a VAE']
    path.unlink()
    (path.parent/'diffusion_pytorch_model.bin').write_bytes(pickles(tmp_path/'boom')[0])
    refused(load, path.parent)
    assert not (tmp_path/'boom').exists()


@pytest.mark.fault(*RUBBISH)
@pytest.mark.parametrize('name', FILES)
def test_rubbish_is_refused(vae, tmp_path, name, tried):
    path, load = folders(vae, tmp_path)[name]
    whole = path.read_bytes()
    bad = [b'', b'\0' * 100, b'rubbish', b'\xff' * 16, whole[:len(whole) // 2]] + ([b'[]', b'3', b'null', b'[' * 100_000] if path.suffix == '.json' else [whole[:-1], b'\xff' * 7 + b'\x7f' + whole[8:]])
    for content in bad:
        path.write_bytes(content)
        refused(load, names_folder(path), tried)
    path.unlink()
    if name == 'card of a VAE': load()                                                         # what it says is for people
    else: refused(load, names_folder(path) if name != 'plan' and name != 'shard' else path.parent)
    tried(times=len(bad) + 1)


@pytest.mark.fault(*UNFIT)
@pytest.mark.parametrize('name', ['weights of a VAE', 'inner weights'])
def test_weights_that_do_not_fit_a_vae_are_refused(vae, tmp_path, name, tried):
    "diffusers leaves a tensor that is not there at random, and only logs it."
    from safetensors.torch import load_file, save_file
    path, load = folders(vae, tmp_path)[name]
    whole = load_file(path)
    key = 'decoder.conv_in.weight'
    for state in ({k: v for k, v in whole.items() if k != key}, {**whole, key: torch.zeros(1)}, {}):
        save_file(state, path)
        refused(load, path.parent, tried)
    tried(times=3)


def moments(n=2, *shape): return torch.ones(n, 1, 2, *(shape or (2, 4, 4)))


BAD_SHARDS = {'no labels': {'moments': moments()}, 'no moments': {'labels': torch.zeros(2).long()}, 'one sample less': {'moments': moments(1), 'labels': torch.zeros(1).long()},
              'labels of more': {'moments': moments(), 'labels': torch.zeros(3).long()}, 'labels out of range': {'moments': moments(), 'labels': torch.full((2,), 3)}, 'negative labels': {'moments': moments(), 'labels': torch.full((2,), -1)},
              'floating point labels': {'moments': moments(), 'labels': torch.zeros(2)}, 'whole numbers for moments': {'moments': moments().long(), 'labels': torch.zeros(2).long()},
              'another size': {'moments': moments(2, 2, 3, 4), 'labels': torch.zeros(2).long()}, 'one number a sample': {'moments': torch.ones(2), 'labels': torch.zeros(2).long()}}


@pytest.mark.fault(*UNFIT)
@pytest.mark.parametrize('what', BAD_SHARDS)
def test_a_shard_that_does_not_fit_is_refused(vae, tmp_path, what, tried):
    from safetensors.torch import save_file
    path, load = folders(vae, tmp_path)['shard']
    save_file(BAD_SHARDS[what], path, {'vae': vae.identity})
    refused(load, path, tried)


@pytest.mark.fault('disk', 'a shard of another VAE lies among cached latents', 'refused, both VAEs are named; delete the shard and call `cache_latents` again')
def test_a_shard_of_another_vae_is_refused(vae, tmp_path, tried):
    path, load = folders(vae, tmp_path)['shard']
    path.write_bytes((cache_latents(tiny_vae(1), images(6), tmp_path/'other', flip=False, shard=4)/path.name).read_bytes())
    refused(load, path, tried, match='its latents are of the VAE')


@pytest.mark.fault(*SETTINGS)
@pytest.mark.parametrize('key,value', [('samples', 10**15), ('samples', 0), ('samples', '6'), ('samples', True), ('shard', 0), ('shard', -4), ('shard', None), ('flips', 3), ('shape', [2, 4]), ('shape', [2, 4, -4]), ('shape', 'abc'),
                                       ('shape', [2, 4, 10**9]), ('classes', 'abc'), ('classes', None), ('vae', 3), ('vae_name', None), ('data', []), ('samples', None), ('dtype', 3)])
def test_a_plan_that_is_none_is_refused(vae, tmp_path, key, value, tried):
    "In no time: a plan of 10^15 samples is not counted through."
    path, load = folders(vae, tmp_path)['plan']
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, key: value}))
    began = time.process_time()
    refused(load, path.parent, tried)
    path.write_text(json.dumps({k: v for k, v in plan.items() if k != key}))
    refused(load, path)
    assert time.process_time() - began < 2
    tried(times=2)


@pytest.mark.fault(*SETTINGS)
@pytest.mark.parametrize('key,value', [('scaling_factor', 0), ('scaling_factor', 'a'), ('scaling_factor', None), ('latent_channels', 'a'), ('latent_channels', -1), ('latent_channels', 10**12), ('block_out_channels', []), ('block_out_channels', 3), ('down_block_types', ['Nothing']),
                                       ('act_fn', 'nothing'), ('norm_num_groups', 0), ('shift_factor', 'a')])
def test_a_config_of_a_vae_that_is_none_is_refused(vae, tmp_path, key, value, tried):
    path, load = folders(vae, tmp_path)['config of a VAE']
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    refused(load, path.parent, tried)


# ---- two steps

def latent_flow(vae, **kw):
    flow = shake(LatentTarFlow(4, 2, 1, 16, 2, 1, 8, classes=3), .05)
    flow.card = {'sigma': .2, 'reach': 5., **kw}
    return LatentFlow(flow, vae)


def test_two_steps(vae):
    "sample = decode(denoise(invert(z))); raw = decode(invert(z))."
    model, y = latent_flow(vae), torch.tensor([0, 1, 2, 0])
    g = lambda: torch.Generator().manual_seed(5)
    x = model.sample(y, generator=g(), solver='sequential')
    assert x.shape == (4, 1, 8, 8) and x.isfinite().all()
    z = sample(model.flow, y, solver='sequential', generator=g())
    from flowbook.denoise import denoise
    assert torch.allclose(model.sample(y, denoise=False, generator=g(), solver='sequential'), vae.decode(z), atol=1e-5)
    assert torch.allclose(x, vae.decode(denoise(model.flow, z, .2, y)), atol=1e-4)
    assert torch.allclose(torch.cat(list(model.samples(y, generator=g(), solver='sequential', batch_size=3))), x, atol=1e-4)
    assert model.sample(0).shape == (0, 1, 8, 8)


def test_log_prob(vae):
    model, (x, y) = latent_flow(vae), images(4).batch(range(4))
    g = lambda: torch.Generator().manual_seed(5)
    with torch.no_grad():
        assert torch.allclose(model.log_prob(x, y, sample=False, generator=g()), model.flow.log_prob(vae.encode(x, False) + .2 * torch.randn(4, 2, 4, 4, generator=g()), y))


def test_wide_latents_are_not_broken(vae):
    "Latents leave [-1, 1]: the card's reach says how far they go, and what is broken beyond."
    import warnings
    model = latent_flow(vae)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model.sample(32, generator=torch.Generator().manual_seed(0), solver='sequential', denoise=False)
    model.flow.card['reach'] = .1
    with pytest.warns(UserWarning, match='broken'): model.sample(32, generator=torch.Generator().manual_seed(0), solver='sequential', denoise=False)


def test_model_folder(vae, tmp_path):
    model = latent_flow(vae)
    model.save_pretrained(tmp_path)
    again = LatentFlow.from_pretrained(tmp_path)
    g = lambda: torch.Generator().manual_seed(5)
    assert torch.equal(again.sample(3, generator=g(), solver='sequential'), model.sample(3, generator=g(), solver='sequential'))
    with pytest.raises(ValueError, match='was trained on latents of tiny-0'): LatentFlow.from_pretrained(tmp_path, tiny_vae(1))


def test_latent_doors(vae):
    with pytest.raises(ValueError, match='takes 3 channels, the latents of tiny-0 have 2'): LatentFlow(LatentTarFlow(4, 3, 1, 16, 2, 1, 8), vae)
    model = latent_flow(vae)
    with pytest.raises(ValueError, match='images of 16x16 came; this flow and VAE are for 8x8'): model.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match='factor 2 of tiny-0 does not divide'): model.encode(torch.zeros(1, 1, 9, 9))
    del model.flow.card['sigma']
    with pytest.raises(ValueError, match='does not say the noise'): model.noisy(torch.zeros(1, 2, 4, 4))
    model.flow.card['sigma'] = 'a'
    with pytest.raises(ValueError, match='the sigma of its card'): model.noisy(torch.zeros(1, 2, 4, 4))
    del model.flow.card['sigma']
    with pytest.raises(ValueError, match='does not say its noise'): model.sample(1)


def test_smoke():
    from flowbook.evidence import EXPERIMENTS
    import flowbook.flows
    if not (flowbook.flows.weights_folder()/'digits-vae').is_dir(): pytest.skip('no digits-vae shipped yet')
    r = EXPERIMENTS['latent_two_step'].function(0, 'smoke')
    json.dumps(r)
    assert set(r['sigma']) == {'0.2'} and r['sigma']['0.2']['fid_raw'] > 0
