import functools

import torch

from doors import choice, door, flat, integers, labels, number, off, tensor, whole


def L():
    from flowbook import latent
    return latent


@functools.lru_cache
def vae(seed=0, channels=2):
    from diffusers import AutoencoderKL
    torch.manual_seed(seed)
    return L().Vae(AutoencoderKL(1, 1, ('DownEncoderBlock2D',) * 2, ('UpDecoderBlock2D',) * 2, (8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=8, mid_block_add_attention=False), f'tiny-{seed}')


def module():
    from diffusers import AutoencoderKL
    return AutoencoderKL(1, 1, norm_num_groups=4, block_out_channels=(4,), layers_per_block=1)


def scaled(v):
    model = module()
    model.register_to_config(scaling_factor=v)
    return model


@functools.lru_cache
def flow(channels=2):
    torch.manual_seed(0)
    made = L().LatentTarFlow(4, channels, 2, 16, 2, 1, 8, classes=3)
    made.card = {'sigma': .2, 'reach': 5.}
    return made


@functools.lru_cache
def model(): return L().LatentFlow(flow(), vae())


def data(size=8):
    from flowbook.data import InMemory
    g = torch.Generator().manual_seed(1)
    return InMemory(torch.randint(0, 256, (6, 1, size, size), generator=g).to(torch.uint8), torch.arange(6) % 3, ('a', 'b', 'c'), 256)


def cached(tmp): return L().CachedLatents(L().cache_latents(vae(), data(), tmp/'cached', flip=False, shard=4))


def saved(tmp):
    model().save_pretrained(tmp/'model')
    return tmp/'model'


def file(tmp):
    (tmp/'file').write_bytes(b'rubbish')
    return tmp/'file'


def named(d, *values): return d._replace(bad={**d.bad, 'name': list(values)})  # of an argument that `door` has, too


def gone(name): return lambda good: {k: v for k, v in good[name].items() if k != list(good[name])[-1]}


X, Z, Y = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2])
IMAGES = [*tensor(), X.to(torch.uint8), X[0], X.expand(-1, 2, -1, -1), X[..., :7], X[:, :, :7], X[None], X[..., :0]]
LATENTS = [*tensor(), Z.long(), Z[0], Z[:, :1], Z[None]]
NO_LABELS = [v for i, v in enumerate(labels(3, 3)) if i != 5]  # NaN weights: values, which chapter 01 looks at or not
NO_VAE = ['digits-vae', None, torch.nn.Linear(2, 2)]
TURNING = [None, '8', 6, 2, 0, -4, 8., True]
THETA = [*number(1, above=True), True]
DTYPES = ['float32', None, torch.int64]
PARTS = [3, None, (0,), (1, 1), (-1, 2), (0, 0), ('0', 1), (0, 1, 2)]
RECIPE = {**dict(model=dict(image_size=4, channels=2, patch_size=2, dim=16, blocks=2, layers=1, head_dim=8), classes=3, lr=1e-3, weight_decay=.1, batch_size=4, average=.9), 'sigma': .2, 'steps': 1}

DOORS = [
    door('places', lambda tmp: dict(h=2, w=3, order=[5, 4, 3, 2, 1, 0]), h=[v for v in whole() if v is not None], w=whole(), order=['reverse', 3, [0, 1], [0] * 6, [0, 1, 2, 3, 4, 6], [None] * 6]),
    door('angles', lambda tmp: dict(where=torch.zeros(6, 2).long(), e=8, theta=100.), where=[*tensor(), torch.zeros(6), torch.zeros(6, 3)], e=TURNING, theta=THETA),
    door('turn', lambda tmp: dict(x=torch.zeros(2, 6, 8), angle=torch.zeros(6, 4)), x=[*tensor(), off("x", 1), off("x", 2), torch.zeros(8)], angle=[*tensor(), off('angle', 0), off('angle', 1), torch.zeros(1, 4), torch.zeros(4)]),
    door('RopeAttention', lambda tmp: dict(dim=16, head_dim=8, places=torch.zeros(6, 2).long(), theta=100.), dim=[*whole(), 12], head_dim=TURNING, places=['places', torch.zeros(6, 2), torch.zeros(6).long(), torch.zeros(6, 3).long()], theta=THETA),
    door('RopeLayer', lambda tmp: dict(dim=16, head_dim=8, places=torch.zeros(6, 2).long(), theta=100.), dim=[*whole(), 12], head_dim=TURNING, places=['places', torch.zeros(6, 2)], theta=THETA),
    door('swiglu_width', lambda tmp: dict(dim=8, expand=4, multiple=8), dim=whole(), expand=whole(), multiple=whole()),
    door('SwiGLU', lambda tmp: dict(dim=8, hidden=8), dim=whole(), hidden=[v for v in whole() if v is not None]),
    door('LatentTarFlow', lambda tmp: dict(image_size=4, channels=2, patch_size=2, dim=16, blocks=2, layers=1, head_dim=8, classes=3, theta=100.), head_dim=TURNING, theta=THETA, channels=whole(), patch_size=[0, 3], dim=[0, 12], blocks=[0], classes=[-1, '3']),
    door('LatentTarFlow.log_prob', lambda tmp: dict(x=Z, y=Y), of=lambda tmp: flow(), x=[Z.long(), Z[:, :1], Z[..., :3]], y=NO_LABELS),
    door('Vae', lambda tmp: dict(model=module(), memory='whole'), model=['vae', None, torch.nn.Linear(2, 2), lambda good: scaled(0.), lambda good: scaled(float('nan')), lambda good: scaled('a')], memory=choice()),
    door('Vae.moments', lambda tmp: dict(x=X), of=lambda tmp: vae(), x=IMAGES),
    door('Vae.encode', lambda tmp: dict(x=X, sample=True, generator=None), of=lambda tmp: vae(), x=IMAGES, generator=['g', 3]),
    door('Vae.decode', lambda tmp: dict(z=Z), of=lambda tmp: vae(), z=LATENTS),
    door('Vae.save_pretrained', lambda tmp: dict(folder=tmp/'vae', card={'data': 'noise'}), of=lambda tmp: vae(), folder=[3, None, '', __file__], card=['card', 3, {'a': torch.zeros(1)}]),
    door('posterior', lambda tmp: dict(moments=torch.ones(3, 2, 2, 4, 4), noise=Z), moments=[*tensor(), integers('moments'), flat('moments'), off('moments', 1)], noise=['noise', 3, Z[:1], Z[0], off('noise', 0)]),
    named(door('load_vae', lambda tmp: dict(name='digits-vae', device='cpu', memory='whole'), device=['nothing', None, 1.5], memory=choice()), 'no-such-vae', None, 3, 'owner/name', __file__, 'digits-0.1'),
    door('VaeLoss', lambda tmp: dict(beta=1e-3), beta=number(0)),
    door('train_digits_vae', lambda tmp: dict(seed=0, steps=1, widths=(8,), beta=1e-3), seed=whole(0), steps=whole(), widths=[8, None, (), 'ab', (7,), (0,), (8,) * 4], beta=number(0)),
    door('judged', lambda tmp: dict(vae=vae()), vae=NO_VAE),
    door('Encode', lambda tmp: dict(vae=vae()), vae=NO_VAE),
    door('Pick', lambda tmp: dict(p=.5), p=number(0, 1)),
    door('cache_latents', lambda tmp: dict(vae=vae(), data=data(), folder=tmp/'cached', shard=4, batch_size=3, dtype=torch.float32, part=(0, 1)), vae=NO_VAE, data=['digits', None, 3, X], folder=[3, None, '', __file__],
         shard=whole(), batch_size=whole(), dtype=DTYPES, part=PARTS),
    door('cache_latents', lambda tmp: dict(vae=vae(), data=data(), folder=tmp/'cached'), data=[lambda good: data(9)], says={'data': 'x'}),
    door('read_plan', lambda tmp: dict(folder=cached(tmp).folder), folder=[3, None, '', __file__, 'nowhere', '.']),
    door('CachedLatents', lambda tmp: dict(folder=cached(tmp).folder, vae=vae()), folder=[3, None, '', __file__, 'nowhere', '.'], vae=['digits-vae', 3, torch.nn.Linear(2, 2)]),
    door('CachedLatents.batch', lambda tmp: dict(index=[0, 5]), of=cached, index=[[6], [-1], [.5], torch.tensor([True])]),
    door('LatentFlow', lambda tmp: dict(flow=flow(), vae=vae()), flow=['digits', None, torch.nn.Linear(2, 2), lambda good: flow(3)], vae=NO_VAE),
    door('LatentFlow.encode', lambda tmp: dict(x=X), of=lambda tmp: model(), x=[*IMAGES, torch.zeros(1, 1, 16, 16)]),
    door('LatentFlow.decode', lambda tmp: dict(z=Z), of=lambda tmp: model(), z=LATENTS),
    door('LatentFlow.noisy', lambda tmp: dict(z=Z), of=lambda tmp: model(), z=[*LATENTS, Z[..., :3]]),
    door('LatentFlow.log_prob', lambda tmp: dict(x=X, y=Y), of=lambda tmp: model(), x=IMAGES, y=NO_LABELS),
    door('LatentFlow.sample', lambda tmp: dict(y_or_n=Y, solver='sequential'), of=lambda tmp: model(), y_or_n=[-1, 1.5, True, 'cat', None, Y + 1], says={'y_or_n': 'y'}),
    door('LatentFlow.save_pretrained', lambda tmp: dict(folder=tmp/'model', card={'sigma': .2}), of=lambda tmp: model(), folder=[3, None, '', __file__], card=['card', 3, []]),
    named(door('LatentFlow.from_pretrained', lambda tmp: dict(name=saved(tmp), device='cpu', vae=None), of=lambda tmp: L().LatentFlow, device=['nothing', None, 1.5]), 3, None, 'nowhere'),
    door('LatentFlow.from_pretrained', lambda tmp: dict(name=saved(tmp), vae=None), of=lambda tmp: L().LatentFlow, vae=['no-such-vae', 3, lambda good: vae(1)]),
    door('train_latent', lambda tmp: dict(c=RECIPE, data=cached(tmp), vae=vae(), seed=0), c=['recipe', None, {}, gone('c')], data=['digits', None, lambda good: data()], vae=[*NO_VAE, lambda good: vae(1)], seed=whole(0)),
]
INNER = {
    'checks and files, which the doors above call': 'check_turning check_vae write_plan check_vae_reachable',
    'steps of layers, transforms and samplers': 'turned FastRopeLayer drawn_keyed with_latent_card',
    'the training of a checkpoint of the book, too long for a table: name, seed and steps are checked first': 'train_latent_flow',
    'the experiment of the chapter, which chapter 03 runs by its name': 'judge_latent latent_two_step',
}
