import functools
from types import SimpleNamespace

import torch

from doors import door, flag, labels, number, tensor, whole


def S():
    from flowbook import simflow
    return simflow


VAE = dict(in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(8, 8), layers_per_block=1, down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
           mid_block_add_attention=False, norm_num_groups=8)
FLOW = dict(image_size=4, channels=8, patch_size=1, dim=16, blocks=2, layers=(1, 2), head_dim=8, classes=3)


@functools.lru_cache
def model():
    torch.manual_seed(0)
    return S().SimFlow(VAE, FLOW).eval()


def data():
    from flowbook.data import InMemory
    g = torch.Generator().manual_seed(1)
    return InMemory(torch.randint(0, 256, (6, 1, 8, 8), generator=g).to(torch.uint8), torch.arange(6) % 3, ('a', 'b', 'c'), 256)


def config(): return {**S().DIGITS, 'vae': VAE, 'flow': FLOW, 'steps': 1, 'batch_size': 4}


def on_meta(tmp):
    @functools.wraps(S().paper_model)
    def paper_model(*args, **kw):
        with torch.device('meta'): return S().paper_model(*args, **kw)
    return SimpleNamespace(paper_model=paper_model)


def saved(tmp):
    model().save_pretrained(tmp/'model')
    return tmp/'model'


def projector():
    from flowbook.repa import Projector
    return Projector(16, 8, 8)


def forward():
    from flowbook.repa import Forward
    return Forward([(1, 1)])


def term(s): return s.xhat.mean()


def named(d, *values): return d._replace(bad={**d.bad, 'name': list(values)})  # of an argument that `door` has, too


def gone(name, key=None): return lambda good: {k: v for k, v in good[name].items() if k != (key or list(good[name])[-1])}


def but(name, **more): return lambda good: {**good[name], **more}


IMAGE, X, Y = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 8, 4, 4), torch.tensor([0, 1, 2])
IMAGES = [*tensor(), IMAGE.to(torch.uint8), IMAGE[0], IMAGE.expand(-1, 2, -1, -1), IMAGE[..., :7], torch.zeros(1, 1, 16, 16), IMAGE[None]]
LATENTS = [*tensor(), X.long(), X[0], X[:, :7], X[None]]
NO_LABELS = [v for i, v in enumerate(labels(3, 3)) if i != 5]          # NaN weights: values, which chapter 01 looks at or not
NO_MODEL = ['digits-simflow', None, torch.nn.Linear(2, 2)]
NO_PERTURB = ['slerp', .5, lambda good: S().Mean(), lambda good: S().Additive, 0]
STATISTICS = [*tensor(), X.long(), X[0], X[:0], X[..., :1, :1], X / 0]
NO_POSTERIOR = ['fixed', .5, lambda good: S().Mean, lambda good: S().Additive(), {'kind': 'Mode'}, {}, {'kind': 'Mean', 'perturb': {'kind': 'Additive', 'width': 1}}, {'kind': []}]
NO_CONFIG = ['digits', None, {}, gone('config', 'vae'), but('config', variant='nothing'), but('config', variant=None), but('config', steps=0), but('config', average=1.)]

DOORS = [
    door('gaussian_entropy', lambda tmp: dict(log_sigma=torch.zeros(3, 4)), log_sigma=[*tensor(), torch.zeros(3), torch.zeros(3, 4).long()]),
    door('Additive', lambda tmp: dict(sigma=.5), sigma=[*number(0, above=True), True]),
    *(door(kind, lambda tmp: dict(low=.1), low=[*number(0, 1, below=True), True]) for kind in ('Mixed', 'Linear', 'Slerp')),
    door('Mean', lambda tmp: dict(perturb=None), perturb=NO_PERTURB),
    door('Learned', lambda tmp: dict(perturb=None, start=0., low=-30., high=20.), perturb=NO_PERTURB, start=number(), low=[*number(), 20., 30.], high=[*number(), -40.]),
    door('posterior_of', lambda tmp: dict(config={'kind': 'Mean', 'perturb': {'kind': 'Additive', 'sigma': .5}}), config=['Mean', None, {}, {'kind': 'Mode'}, {'kind': ['Mean']}, {'kind': 'Mean', 'width': 3},
         {'kind': 'Mean', 'perturb': {'kind': 'Mean', 'perturb': {'kind': 'Mean'}}}]),
    door('as_posterior', lambda tmp: dict(p=None), p=['fixed', .5, lambda good: S().Mean, lambda good: S().Additive(), {'kind': 'Mode'}], says={'p': 'posterior'}),
    door('AdaTarFlow', lambda tmp: FLOW, dim=[0, 20], head_dim=[0, 3], channels=[0, 1.5], classes=[-1, '3']),
    door('AdaTarFlow', lambda tmp: {**FLOW, 'kind': 'nvp'}, kind=['vp', 'coupling', 'nvq', None]),
    door('AdaTarFlow.log_prob', lambda tmp: dict(x=X, y=Y), of=lambda tmp: model().flow, x=[X.long(), X[:, :7], X[..., :3]], y=NO_LABELS),
    door('flow_config', lambda tmp: dict(size=S().SIZES['S'], channels=64, side=16, classes=1000), size=['S', None, (1, 2, 3, '4')], channels=whole(), side=whole(), classes=whole(0)),
    door('make_vae', lambda tmp: {**VAE, 'mean_only': True}, block_out_channels=[8, None, (8,), (8, 8, 8), ('a', 'b')], latent_channels=['4', -1, 1.5], says={'block_out_channels': 'vae', 'latent_channels': 'vae'}),
    door('SimFlow', lambda tmp: dict(vae=VAE, flow=FLOW, posterior=None, norm=True), vae=['vae', None, [], but('vae', block_out_channels=(8,)), but('vae', what=3), but('vae', latent_channels='a'), but('vae', latent_channels=0)],
         flow=['flow', None, [], {}, but('flow', channels=4), but('flow', what=3)], posterior=NO_POSTERIOR, norm=flag()),
    door('SimFlow.latent', lambda tmp: dict(image=IMAGE, e=torch.zeros(3, 128)), of=lambda tmp: model(), image=IMAGES, e=['e', 3, torch.zeros(3, 127), torch.zeros(2, 128), torch.zeros(3, 128).long()]),
    door('SimFlow.forward', lambda tmp: dict(image=IMAGE), of=lambda tmp: model(), image=IMAGES),
    door('SimFlow.decode', lambda tmp: dict(x=X), of=lambda tmp: model(), x=LATENTS),
    door('SimFlow.reconstruct', lambda tmp: dict(image=IMAGE, noise=.1), of=lambda tmp: model(), image=IMAGES, noise=number(0)),
    door('SimFlow.sample', lambda tmp: dict(y_or_n=Y, gamma=.1, batch_size=2), of=lambda tmp: model(), gamma=number(), y_or_n=[-1, 2, 1.5, True, 'cat', None], batch_size=[v for v in whole() if v is not None]),
    door('SimFlow.sample', lambda tmp: dict(y_or_n=Y), of=lambda tmp: model(), y_or_n=[Y + 1, Y.float()], says={'y_or_n': 'y'}),
    named(door('SimFlow.from_pretrained', lambda tmp: dict(name=saved(tmp)), of=lambda tmp: S().SimFlow), 'nowhere', 'digits-vae', 'digits-0.1'),
    door('paper_model', lambda tmp: dict(size='S', image_size=256, d=64, classes=10, posterior=None, norm=True), of=on_meta, size=['M', None, 3, ['S']], image_size=[*whole(), 100], d=whole(), classes=[-1, '3', 1.5], posterior=NO_POSTERIOR, norm=flag()),
    door('Reconstruction', lambda tmp: dict(p=1), p=[*whole(1, 2), 1.]),
    door('Joint', lambda tmp: dict(terms=[term, (1., term)]), terms=[['rec'], [None], [3], [(1., 'rec')], [('1', term)], [(float('inf'), term)], [(1., term, 2)], lambda good: [S().FlowNLL], [(True, term)]]),
    door('Joint.forward', lambda tmp: dict(model=model(), image=IMAGE, y=Y, target=torch.zeros(3, 128)), of=lambda tmp: S().Joint(), model=NO_MODEL, image=IMAGES, y=NO_LABELS, target=['e', torch.zeros(3, 127)], says={'target': 'e'}),
    door('terms_of', lambda tmp: dict(v=S().Variant(), p=1, weight=1.), v=['fixed', None, 3], p=[0, 3, 'a']),
    door('freeze', lambda tmp: dict(modules=[torch.nn.Linear(2, 2)]), modules=[['encoder'], [None], [torch.zeros(2)]]),
    door('DrawNoise', lambda tmp: dict(m=3), m=whole(0)),
    door('training', lambda tmp: dict(config=config(), data=data(), seed=0, every=1, term=S().FlowNLL(), kind=S().SimFlow), config=[*NO_CONFIG, lambda good: good['config'] | {'device': 'nothing'}], data=['digits', None, 3, IMAGE], seed=whole(0), every=whole(), term=['nll', 3, lambda good: S().FlowNLL], kind=['SimFlow', None, 3, torch.nn.Linear]),
    door('train_simflow', lambda tmp: dict(config=config(), data=data(), seed=0), config=[*NO_CONFIG, gone('config', 'data')], data=['digits', 3, IMAGE], seed=whole(0)),
    door('spread_of', lambda tmp: dict(model=model(), image=IMAGE), model=NO_MODEL, image=[*IMAGES, IMAGE[:1]]),
    door('psnr', lambda tmp: dict(image=IMAGE, xhat=IMAGE * .5), image=[*tensor(), IMAGE.to(torch.uint8), IMAGE[0], IMAGE[:2]], xhat=[*tensor(), IMAGE.to(torch.uint8), IMAGE[0], IMAGE[:2]]),
    door('TwoStages', lambda tmp: dict(epochs=(80, 80), floor=.01), epochs=[80, None, (80,), (0, 0), (-1, 1), ('80', 80), (float('inf'), 1), (80, 80, 80), (True, 1)], floor=number(0, 1)),
    door('Perceptual', lambda tmp: dict(distance=lambda a, b: (a - b).flatten(1).mean(1)), distance=['lpips', 3]),
    door('PatchCritic', lambda tmp: dict(channels=1, width=4, levels=1), channels=whole(), width=whole(), levels=whole()),
    door('Adversarial', lambda tmp: dict(critic=torch.nn.Flatten(), start=0), critic=['critic', None, 3], start=whole(0)),
    door('paper_terms', lambda tmp: dict(critic=torch.nn.Flatten(), start=0, p=1, distance=lambda a, b: (a - b).flatten(1).mean(1), device='cpu'), device=['nothing', None, 1.5], critic=['critic', 3], start=whole(0), p=whole(1, 2), distance=['lpips', 3]),
    door('AlignedNLL', lambda tmp: dict(strategy=forward(), encoder=torch.nn.Flatten(), projector=projector(), lam=1.), strategy=['forward', None, lambda good: type(good['strategy'])], encoder=['digits', None, 3], projector=['p', None, 3], lam=number(0)),
    door('turns', lambda tmp: dict(kinds={'a': lambda: None}, rounds=1, device='cpu'), kinds=['a', None, [], {'a': 3}], rounds=whole(), device=['nothing', None, 1.5]),
    door('between', lambda tmp: dict(model=model(), a=IMAGE[0], b=IMAGE[1], steps=3), model=NO_MODEL, a=[*tensor(), IMAGE, IMAGE[0, :, :7], IMAGE[0].long()], b=[*tensor(), IMAGE, IMAGE[0, :, :7]], steps=whole()),
    *(door(kind, lambda tmp: dict(x=X), x=STATISTICS) for kind in ('spectrum', 'spectral_entropy', 'total_variation', 'latent_statistics')),
    door('high_frequency', lambda tmp: dict(x=X, above=.25), x=STATISTICS, above=number(0)),
    door('autocorrelation', lambda tmp: dict(x=X, lag=1), x=STATISTICS, lag=whole(1, 15)),
]
INNER = {
    'checks, which the doors above call': 'check_perturb check_model check_image check_latents check_training',
    'records': 'Latent Size Pass Variant',
    'without arguments': 'Unperturbed TokenNorm FlowNLL Entropy NormalNLL',
    'layers that AdaTarFlow builds, and their forms for the samplers': 'NullEmbedding modulate Modulation AdaLayer AdaBlock class_vectors FastAdaLayer ada_head chained',
    'what SimFlow.sample runs': 'latent_samples',
    'the training of a checkpoint of the book, too long for a table: seed and steps are checked first': 'train_digits_simflow',
    'experiments, which chapter 03 runs by their names, and their parts': 'look judge_of judged_samples share_of judge_collapse simflow_collapse judge_simflow_guidance simflow_guidance against_noise halfway judge_robust simflow_robust elbo_errors entropy_error averaging_error judge_exact simflow_exact',
}
