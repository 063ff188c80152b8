import functools
from types import SimpleNamespace

import torch

from doors import door, flag, labels, number, tensor, whole
from doors.simflow import IMAGES, LATENTS, NO_LABELS, NO_POSTERIOR, VAE, X, Y, but, data, gone, named

FLOW = dict(image_size=4, channels=8, patch_size=1, dim=16, layers=1, head_dim=8, classes=3)
IMAGE = torch.rand(3, 1, 8, 8) * 2 - 1


def S():
    from flowbook import sit
    return sit


@functools.lru_cache
def model():
    torch.manual_seed(0)
    return S().SimDiffusion(VAE, FLOW).eval()


def saved(tmp, what):
    what.save_pretrained(tmp/'model')
    return tmp/'model'


def config(): return {**S().DIGITS_SIT, 'vae': VAE, 'flow': FLOW, 'steps': 1, 'before': 1, 'batch_size': 4}


def on_meta(tmp):
    @functools.wraps(S().paper_diffusion)
    def paper_diffusion(*args, **kw):
        with torch.device('meta'): return S().paper_diffusion(*args, **kw)
    return SimpleNamespace(paper_diffusion=paper_diffusion)


NO_CONFIG = ['digits', None, {}, gone('config', 'vae'), but('config', variant='nothing'), but('config', variant=None), but('config', steps=0), but('config', before=0), but('config', average=1.)]
TIMES = [*tensor(), torch.zeros(2), torch.zeros(3).long(), torch.zeros(3, 1)]

DOORS = [
    door('line', lambda tmp: dict(x=X, e=X + 1, t=torch.zeros(3)), x=LATENTS[:-2], e=[*tensor(), X[:2], X[..., :3]], t=TIMES),
    door('ode', lambda tmp: dict(velocity=lambda x, t: -x, z=X, steps=2, heun=True), velocity=['v', None, 3], z=[*tensor(), X.long()], steps=whole(), heun=flag()),
    door('Sit', lambda tmp: FLOW, image_size=[*whole(), (4, 4)], channels=whole(), patch_size=[*whole(), 3], dim=[*whole(), 20], layers=whole(), head_dim=[*whole(), 3], classes=whole(0)),
    door('Sit.forward', lambda tmp: dict(x=X, t=torch.zeros(3), y=Y), of=lambda tmp: model().flow, x=LATENTS, t=TIMES, y=NO_LABELS),
    named(door('Sit.from_pretrained', lambda tmp: dict(name=saved(tmp, model().flow)), of=lambda tmp: S().Sit), 'nowhere', 'digits-vae', 'digits-0.1', 'digits-simflow'),
    door('guided', lambda tmp: dict(sit=model().flow, w=1.), sit=['sit', None, torch.nn.Linear(2, 2)], w=number()),
    door('SimDiffusion', lambda tmp: dict(vae=VAE, flow=FLOW, posterior=None, norm=True), vae=['vae', None, [], but('vae', block_out_channels=(8,)), but('vae', latent_channels='a')],
         flow=['flow', None, [], {}, but('flow', channels=4), but('flow', what=3)], posterior=NO_POSTERIOR, norm=flag()),
    door('SimDiffusion.latent', lambda tmp: dict(image=IMAGE, e=torch.zeros(3, 257)), of=lambda tmp: model(), image=IMAGES, e=['e', 3, torch.zeros(3, 128), torch.zeros(2, 257), torch.zeros(3, 257).long()]),
    door('SimDiffusion.measure_unit', lambda tmp: dict(image=IMAGE), of=lambda tmp: S().SimDiffusion(VAE, FLOW), image=[*IMAGES, IMAGE[:0]]),
    door('SimDiffusion.sample', lambda tmp: dict(y_or_n=Y, w=1., steps=2, heun=True, batch_size=2, decode=True), of=lambda tmp: model(), y_or_n=[-1, 2, 1.5, True, 'cat', None, Y + 1, Y.float()], w=number(), steps=whole(), heun=flag(),
         batch_size=[v for v in whole() if v is not None], decode=flag(), says={}),
    named(door('SimDiffusion.from_pretrained', lambda tmp: dict(name=saved(tmp, model())), of=lambda tmp: S().SimDiffusion), 'nowhere', 'digits-vae', 'digits-0.1', 'digits-simflow'),
    door('paper_diffusion', lambda tmp: dict(d=64, image_size=256, classes=10), of=on_meta, d=whole(), image_size=[*whole(), 100], classes=whole(0)),
    door('train_sit', lambda tmp: dict(config=config(), data=data(), seed=0, every=1), config=NO_CONFIG, data=['digits', 3, IMAGE], seed=whole(0), every=whole()),
]
INNER = {
    'part of Sit': 'TimeEmbedding', 'a record': 'Drawn', 'without arguments': 'Velocity',
    'the experiment, which chapter 03 runs by its name, and its verdict': 'diffusion_joint judge_diffusion',
}
