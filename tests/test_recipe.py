"""Recipes: every configuration becomes objects that train; the path of the data, what is frozen, what is missing, what is saved."""
import json
import math
import threading

import pytest
import torch
from torch import nn

import flowbook.recipe as recipe
from flowbook.configs import CONFIGS, count, find_config, from_dict, override, to_dict, vae_config
from flowbook.data import Batch, Flip, batches, load, save_images
from flowbook.guidance import ClassGuidance, Guidance, StarGuidance, TemperatureGuidance
from flowbook.latent import CachedLatents, Encode, LatentFlow, LatentTarFlow, Pick, cache_latents, load_vae
from flowbook.recipe import (Apart, Cast, DigitDistance, Frozen, Paired, Prepare, Rate, adapt, await_shards, build, card_of, check_data, draw_samples,
                             fit_of, frozen_of, guidance_of, held_note, is_whole, open_data, reach_of, save_model, schedule_of, shortened, constant, strategy_of, train_config,
                             transforms_of)
from flowbook.repa import Alignment, Detach, Forward, KeepClean, Projector, Reverse, encoder
from flowbook.simflow import (Additive, Adversarial, AlignedNLL, DrawNoise, FlowNLL, Joint, Learned, Mean, PatchCritic, Perceptual, Reconstruction, SimFlow,
                              training, TwoStages)
from flowbook.tarflow import TarFlow
from flowbook.train import NLL, Dequantize, DropLabels, GaussianNoise, cosine, ema, fit

DIGITS = load('digits')
ALIGNED, REPA_E, FROZEN = 'digits-rrepa-256', 'digits-simflow-s-repa-e', 'digits-simflow-xxl-variant-frozen-encoder-noise'


def kind_of(c):
    "What makes a recipe another one, sizes and rates aside."
    return (c.flow.kind, c.flow.variant, c.noise.kind, c.align and c.align.strategy, c.joint and c.joint.variant, c.data.classes > 0, c.optim.schedule)


def twins():
    "All configurations; the first of each kind is for every day, the others are slow."
    seen, out = set(), []
    for name, c in CONFIGS.items():
        out.append(pytest.param(name, marks=pytest.mark.slow if kind_of(c) in seen else ()))
        seen.add(kind_of(c))
    return out


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "The digits, their cached latents, and both."
    torch.set_num_threads(1)
    vae = load_vae()
    cache = CachedLatents(cache_latents(vae, DIGITS, tmp_path_factory.mktemp('latents')/'train'), vae)
    return {'images': DIGITS, 'latents': cache, 'both': Paired(cache, DIGITS), 'vae': vae, 'folder': cache.folder.parent}


def of(c, data):
    if c.data.vae: return data['both' if c.align else 'latents']
    return load('digits', image_size=c.data.image_size)
def first(c, data, stage, n=16, seed=0): return next(batches(of(c, data), n, seed=seed, transforms=stage.transforms))
def losses(c, r, data, steps, amp='off', n=16):
    out = []
    for s in r.stages:
        if s.prepare: s.prepare(r.model)
        out.append([log['loss'] for log in fit(r.model, batches(of(c, data), n, transforms=s.transforms), s.objective, steps=steps, every=1, amp=amp, **{**s.fit, 'warmup': 0})])
    return out


@pytest.mark.parametrize('name', twins())
def test_every_twin_trains(name, data):
    c = shortened(find_config(f'digits-{name}'), 2)
    started = {k: v.clone() for k, v in build(c).model.state_dict().items()}
    logs = list(train_config(c, every=1, data=of(c, data)))
    stages = ['autoencoder', 'flow'] if c.joint and c.joint.before else ['joint' if c.joint else 'flow']
    assert [log['stage'] for log, _ in logs][-2:] == [stages[-1]] * 2 and {log['stage'] for log, _ in logs} == set(stages)
    assert all(math.isfinite(v) for log, _ in logs for v in log.values() if isinstance(v, float))
    log, model = logs[-1]
    assert type(model) is {'tarflow': TarFlow, 'latent': LatentTarFlow, 'simflow': SimFlow}[c.flow.kind] and not model.training
    assert any(not torch.equal(v, started[k]) for k, v in model.state_dict().items())
    assert ('align' in log) == (c.align is not None) and ('rec' in log) == (c.joint is not None)
    if c.joint:
        sharp = 'frozen vae' not in c.joint.variant                # a frozen decoder has no critic and no judge
        assert ('perceptual' in log) == ('tell' in log) == sharp and (not sharp or log['tell'] > 0)
    assert model.card['steps'] == 2 and model.card['config'] == to_dict(c)


# what the dozen lines would have been

def by_hand(model, goal, path, dataset, c, steps, **how):
    o = c.optim
    stream = batches(dataset, o.batch_size, seed=c.seed, transforms=path)
    return [log['loss'] for log in fit(model, stream, goal, steps=steps, every=1, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, warmup=c.warmup, clip=o.clip, amp=c.system.amp, **how)]


def sizes(c): return dict(image_size=c.flow.image_size, channels=c.flow.channels, patch_size=c.flow.patch_size, dim=c.flow.dim, blocks=c.flow.blocks, layers=c.flow.layers,
                          head_dim=c.flow.head_dim, classes=c.data.classes)


def hand_uniform(c, data, steps):
    torch.manual_seed(c.seed)
    return by_hand(TarFlow(**sizes(c)), NLL(), [Dequantize(17)], DIGITS, c, steps)


def hand_pixels(c, data, steps):
    look = encoder('digits', (4, 4))
    torch.manual_seed(c.seed)
    model = TarFlow(**sizes(c))
    goal = Alignment(model, Reverse([(t, c.align.layer) for t in c.align.blocks]), look, c.align.lam, c.align.hidden)
    return by_hand(model, goal, [Flip(.5), KeepClean(), GaussianNoise(c.noise.sigma), DropLabels(.1)], DIGITS, c, steps, schedule=lambda s, n, w: constant(s, n, w, c.optim.floor))


def hand_latents(c, data, steps):
    look = encoder('digits', (c.flow.image_size // c.flow.patch_size,) * 2)
    torch.manual_seed(c.seed)
    model = LatentTarFlow(**sizes(c))
    goal = Alignment(model, Reverse([(t, c.align.layer) for t in c.align.blocks]), look, c.align.lam, c.align.hidden)
    path = [Apart((2, 2, 4, 4, 4), (1, 8, 8)), Pick(.5), GaussianNoise(.2), DropLabels(.1)]
    return by_hand(model, goal, path, data['both'], c, steps, schedule=lambda s, n, w: constant(s, n, w, c.optim.floor))


def hand_simflow(c, data, steps):
    look, judge = encoder('digits', (4, 4)), DigitDistance()
    torch.manual_seed(c.seed)
    model = SimFlow(vae_config(c), sizes(c), Mean(Additive(.5)))
    nll = AlignedNLL(Forward([(3, 1)]), look, Projector(c.flow.dim, look.width, c.align.hidden), 1.)
    goal = Joint(Reconstruction(1), Perceptual(judge), nll, Adversarial(PatchCritic(1, *c.joint.critic), c.joint.start))
    return by_hand(model, goal, [Flip(.5), DrawNoise(model.N), DropLabels(.1)], DIGITS, c, steps, schedule=TwoStages(floor=c.optim.floor))


@pytest.mark.parametrize('name, hand', [('tarflow-64-likelihood', hand_uniform), ('rrepa-64', hand_pixels), ('rrepa-256', hand_latents), ('simflow-xxl-160-repa-e', hand_simflow)])
def test_equals_the_hand_built_to_the_last_bit(name, hand, data):
    c = shortened(find_config(f'digits-{name}'), 4)
    assert [log['loss'] for log, _ in train_config(c, every=1, data=of(c, data))] == hand(c, data, 4)


@pytest.mark.parametrize('variant', ['fixed', 'learned', 'linear', 'frozen vae, learned', 'frozen encoder, noise', 'vae, learned'])
def test_equals_chapter_13(variant):
    "Without what that chapter's trainer has not: mirror images, critic, distance."
    c = override(find_config('digits-simflow-s'), [f'joint.variant={variant}', 'joint.before=3', 'joint.perceptual=0', 'joint.adversarial=0', 'data.flip=false', 'optim.steps=4',
                                                   'optim.warmup=0', 'optim.schedule=cosine', 'optim.ema=0.9', 'system.amp=off'])
    theirs = dict(variant=variant, steps=4, before=3, lr=c.optim.lr, batch_size=c.optim.batch_size, average=.9, p=1, weight=1., drop=.1, vae=vae_config(c), flow=sizes(c))
    want = [(log['loss'], model.state_dict()) for log, model in training(theirs, DIGITS, every=1) if log['step'] == 4]
    got = [(log['loss'], model.state_dict()) for log, model in train_config(c, every=1, data=DIGITS) if log['step'] == 4]
    assert got[-1][0] == want[-1][0] and all(torch.equal(v, want[-1][1][k]) for k, v in got[-1][1].items())


# the data path

@pytest.mark.parametrize('name', [*CONFIGS])
def test_the_order_of_every_path(name):
    c, rank = CONFIGS[name], {Flip: 0, Apart: 0, KeepClean: 1, DrawNoise: 1, Pick: 2, GaussianNoise: 3, Dequantize: 3, DropLabels: 4}
    path = [type(t) for t in transforms_of(c, 8)]
    assert [rank[t] for t in path] == sorted(rank[t] for t in path) and len(set(path)) == len(path)
    assert (DropLabels in path) == (c.data.classes > 0) and (Pick in path) == (c.data.vae is not None)
    assert (Flip in path) == (c.data.flip and not c.data.vae) and (GaussianNoise in path) == (c.noise.kind == 'gaussian')
    assert any(t in path for t in (KeepClean, Apart)) == (c.align is not None and c.joint is None)
    test = [type(t) for t in transforms_of(c, 8, train=False)]
    assert DrawNoise not in map(type, transforms_of(c))
    assert not {Flip, Apart, KeepClean, DropLabels} & set(test) and {Pick, GaussianNoise, Dequantize, DrawNoise} & set(path) <= set(test)


def test_latents_and_target_are_of_one_image(data):
    c = find_config(ALIGNED)
    apart, *_ = transforms_of(c)
    b = next(batches(data['both'], 64, seed=3, transforms=[apart, Pick(.5, sample=False)]))
    own, mirrored = (data['vae'].encode(x, sample=False) for x in (b.target, b.target.flip(-1)))
    assert (own - b.x).abs().max() < 1e-5 and ((mirrored - b.x).abs().amax((1, 2, 3)) > .01).float().mean() > .9
    turned = (b.target != DIGITS.batch(b.index)[0]).flatten(1).any(1)
    assert 10 < turned.sum() < 54                                   # about half are mirror images
    assert torch.equal(b.target, Flip(.5)(Batch(DIGITS.batch(b.index)[0], b.y, b.index, b.epoch, b.seed)).x)


def test_the_cached_path_is_the_path_through_the_vae(data):
    c = find_config(ALIGNED)
    want = next(batches(DIGITS, 32, seed=1, transforms=[Flip(.5), KeepClean(), Encode(data['vae']), GaussianNoise(.2), DropLabels(.1)]))
    got = next(batches(data['both'], 32, seed=1, transforms=transforms_of(c)))
    assert torch.allclose(got.x, want.x, atol=1e-5) and torch.equal(got.target, want.target) and torch.equal(got.y, want.y)
    plain = next(batches(data['latents'], 32, seed=1, transforms=transforms_of(find_config('digits-rrepa-256-plain'))))
    assert torch.equal(plain.x, got.x) and plain.target is None


def test_rows_of_latents_and_images(data):
    row, label = data['both'][5]
    assert row.shape == (2 * 2 * 4 * 4 * 4 + 64,) and label == DIGITS[5][1] and 'their images (1, 8, 8)' in repr(data['both'])
    b = Apart((2, 2, 4, 4, 4), (1, 8, 8), 0.)(Batch(*data['both'].batch([]), torch.zeros(0, dtype=torch.long), 0, 0))
    assert b.x.shape == (0, 2, 2, 4, 4, 4) and b.target.shape == (0, 1, 8, 8)      # a rank's share may be empty
    with pytest.raises(ValueError, match=r'\(b, 192\).*Paired'): Apart((1, 2, 4, 4, 4), (1, 8, 8))(Batch(*data['both'].batch([0]), torch.tensor([0]), 0, 0))
    with pytest.raises(ValueError, match='number or labels differ'): Paired(data['latents'], load('digits', 'test'))
    other = load('digits'); other.labels = other.labels.roll(1)
    with pytest.raises(ValueError, match='number or labels differ'): Paired(data['latents'], other)


# opening data

def test_many_processes_write_one_cache(tmp_path, data):
    c, got = find_config(ALIGNED), {}
    def rank(k):
        try: got[k] = open_data(c, folder=tmp_path, part=(k, 3), vae=data['vae'], shard=200)
        except Exception as e: got[k] = e
    threads = [threading.Thread(target=rank, args=(k,)) for k in range(3)]
    for t in reversed(threads): t.start()                           # the first comes last: the others wait for its plan
    for t in threads: t.join(60)
    one = open_data(c, folder=tmp_path/'one', shard=200)
    assert [type(got.get(k)) for k in range(3)] == [Paired] * 3, got
    assert len(list((tmp_path/'train').glob('*.safetensors'))) == 8
    i = torch.arange(0, 1437, 7)
    assert all(torch.equal(a, b) for k in range(3) for a, b in zip(got[k].batch(i), one.batch(i)))
    assert type(open_data(c, 'test', tmp_path)) is CachedLatents and open_data(c, 'test', tmp_path).plan['flips'] == 1


def test_a_rank_that_never_writes_is_noticed(tmp_path, data):
    cache_latents(data['vae'], DIGITS, tmp_path, shard=1000, part=(0, 2))
    assert not is_whole(tmp_path) and not is_whole(tmp_path/'nothing')
    with pytest.raises(ValueError, match='holds 1 shards, and no more have come for 0.2 seconds.*one folder that all machines see'): await_shards(tmp_path, patience=.2, poll=.05)


def test_whole_latents_need_no_images(data, monkeypatch):
    monkeypatch.setattr(recipe, 'open_images', lambda *a: pytest.fail('images were opened'))
    assert len(open_data(find_config('digits-rrepa-256-plain'), folder=data['folder'])) == 1437


def test_where_data_are_to_come_from():
    with pytest.raises(ValueError, match="data.root: missing; 'imagenet' is read from a folder: data.root=FOLDER"): open_data(CONFIGS['tarflow-64'])
    with pytest.raises(ValueError, match='data.latents: missing.*data.latents=FOLDER'): open_data(find_config(ALIGNED))
    assert check_data(override(find_config('digits-tarflow-64'), ['data.samples=1440']), DIGITS) is DIGITS      # a few that could not be read stop nobody
    with pytest.raises(ValueError, match='data.root: /here came, but digits lies in the book itself; data.name=folder'): open_data(override(find_config('digits-tarflow-64'), ['data.root=/here']))
    with pytest.raises(ValueError, match='root: .* is not a folder'): open_data(override(CONFIGS['tarflow-64'], ['data.root=/nowhere/at/all']))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Somebody's own images: three classes, RGB."
    root = tmp_path_factory.mktemp('own')
    for k in (1, 3, 8):
        for i in (DIGITS.labels == k).nonzero()[:24, 0]: save_images(DIGITS.batch([int(i)])[0], root/f'class-{k}'/f'{int(i)}.png', zoom=2)
    return root


def mends(error):                                                   # what a message says to override
    return [w.rstrip(',;.') for w in str(error).replace(': ', ' ').split() if w.count('=') == 1 and w.split('=')[0].count('.') == 1]


@pytest.mark.parametrize('broken', [['data.classes=7'], ['data.levels=256'], ['data.channels=3', 'flow.channels=3'], ['data.image_size=16', 'flow.image_size=16'], ['data.samples=1500'],
                                    ['optim.batch_size=2000']])
@pytest.mark.parametrize('name', ['digits-tarflow-64-p4', 'digits-simflow-s'])
def test_each_error_about_data_names_what_mends_it(name, broken):
    assert check_data(find_config(name), DIGITS) is DIGITS
    if 'simflow' in name: broken = [w.replace('flow.image_size=16', 'flow.image_size=8') for w in broken if w != 'flow.channels=3']
    c = override(find_config(name), broken)
    with pytest.raises(ValueError) as e: check_data(c, DIGITS)
    assert {w.split('=')[0] for w in mends(e.value)} == {w.split('=')[0] for w in broken}
    assert check_data(override(c, mends(e.value)), DIGITS) is DIGITS


def test_errors_about_latents(data):
    c = find_config('digits-rrepa-256-plain')
    assert check_data(c, data['latents']) is data['latents']
    with pytest.raises(ValueError, match='holds images; .* takes latents: open it with open_data'): check_data(c, DIGITS)
    with pytest.raises(ValueError, match='holds latents; .* takes images'): check_data(find_config('digits-tarflow-64'), data['latents'])
    with pytest.raises(ValueError, match=r'latents \(4, 4, 4\); .* takes \(4, 14, 14\): .*another data.latents'): check_data(find_config('mnist5k-rrepa-256-plain'), data['latents'])
    with pytest.raises(ValueError, match='written with mirrored.*data.flip=true'): check_data(override(find_config(ALIGNED), ['data.flip=false']), data['both'])
    single = CachedLatents(cache_latents(data['vae'], DIGITS, data['folder']/'single', flip=False), data['vae'])
    with pytest.raises(ValueError, match='without mirrored.*data.flip=false') as e: check_data(c, single)
    assert check_data(override(c, mends(e.value)), single) is single and check_data(c, single, train=False) is single


def test_adapt_to_a_folder(folder):
    c = override(find_config('digits-tarflow-64-p4'), ['data.name=folder', f'data.root={folder}', 'optim.batch_size=16'])
    own = open_data(c)
    with pytest.raises(ValueError): check_data(c, own)
    fit_to = adapt(c, own)
    assert check_data(fit_to, own) is own and (fit_to.data.classes, fit_to.data.samples, fit_to.data.channels, fit_to.data.levels) == (3, len(own), 3, 256)
    assert fit_to.optim == c.optim and fit_to.sample == c.sample and from_dict(to_dict(fit_to)) == fit_to
    whole = override(c, ['data.held_out=0'])
    assert held_note(c) == own.note and 'held out, there is no val folder' in own.note and held_note(whole) == '' == held_note(find_config('digits-tarflow-64'))
    assert len(open_data(whole)) == adapt(whole, open_data(whole)).data.samples == int(own.note.split()[2].replace(',', ''))
    *_, (log, model) = train_config(shortened(fit_to, 2))
    assert model.classes == 3 and model.card['class_names'] == ['class-1', 'class-3', 'class-8'] and model.card['data'] == 'folder'
    bigger = adapt(override(c, ['data.image_size=16', 'flow.image_size=16']), open_data(override(c, ['data.image_size=16', 'flow.image_size=16'])))
    assert (bigger.data.image_size, bigger.flow.image_size) == (16, 16)


def test_adapt_renames_what_is_not_imagenet(folder):
    c = override(CONFIGS['rrepa-64'], [f'data.root={folder}'])
    own = adapt(c, open_data(c))
    assert (own.data.name, own.data.classes, own.data.image_size) == ('folder', 3, 64)
    simflow = adapt(override(CONFIGS['simflow-s'], [f'data.root={folder}']), open_data(override(CONFIGS['simflow-s'], [f'data.root={folder}'])))
    assert (simflow.flow.image_size, simflow.flow.channels, simflow.data.channels) == (16, 64, 3)


def test_adapt_to_one_class_and_to_latents(data):
    one = load('digits'); one.classes, one.labels = ('digit',), torch.zeros_like(one.labels)
    c = adapt(find_config('digits-tarflow-64-p4'), one)
    assert c.data.classes == 0 and c.sample.guidance == 'none' and type(guidance_of(c)) is Guidance and check_data(c, one) is one
    assert not any(isinstance(t, DropLabels) for t in transforms_of(c))
    for kind in ('latents', 'both'): assert check_data(k := adapt(find_config(ALIGNED), data[kind]), data[kind]) is data[kind] and k.flow == find_config(ALIGNED).flow
    odd = load('digits'); odd.shape = (1, 8, 6)
    for f in (adapt, check_data):
        with pytest.raises(ValueError, match='squares'): f(c, odd)
    rgb = load('digits'); rgb.shape = (3, 8, 8)
    with pytest.raises(ValueError, match=r'images \(3, 8, 8\).*data.channels=3$'): check_data(find_config(ALIGNED), Paired(data['latents'], rgb))


# what is frozen, what is missing

def test_all_that_is_missing_in_one_message_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(recipe, 'model_of', lambda c: pytest.fail('the model was built first'))
    with pytest.raises(ValueError) as e: build(override(CONFIGS['rrepa-256'], ['data.vae=sd-vae-ft-ema@no-folder', 'align.encoder=dinov2-b@no-file.safetensors']))
    vae, look = str(e.value).split('\n')
    assert vae.startswith('data.vae: ') and 'no-folder' in vae and 'data.vae=sd-vae-ft-ema@FOLDER' in vae
    assert look.startswith('align.encoder: ') and 'no-file.safetensors' in look and 'align.encoder=dinov2-b@FILE' in look
    import torchmetrics.image
    def none(*a, **kw): raise OSError('no network')
    monkeypatch.setattr(torchmetrics.image, 'LearnedPerceptualImagePatchSimilarity', none)
    with pytest.raises(ValueError, match='^joint.perceptual: .*vgg16 are not here.*joint.perceptual=0'): build(CONFIGS['simflow-s'])
    assert frozen_of(override(CONFIGS['simflow-s'], ['joint.perceptual=0'])) == Frozen()


def test_local_weights(tmp_path, data):
    data['vae'].save_pretrained(tmp_path/'vae')
    c = override(find_config(ALIGNED), [f'data.vae=digits-vae@{tmp_path}/vae', f'align.encoder=digits@{tmp_path}/vit'])
    with pytest.raises(ValueError, match='align.encoder: .*there is no file'): frozen_of(c)
    from flowbook.repa import DigitsViT
    DigitsViT.from_pretrained('digits-encoder').save_pretrained(tmp_path/'vit')
    found = frozen_of(c)
    assert found.vae.identity == data['vae'].identity and found.encoder.width == 64 and found.vae.name == 'digits-vae'   # no place on this machine
    with pytest.raises(ValueError, match='did you mean digits'): frozen_of(override(find_config(ALIGNED), ['align.encoder=digit']))


def test_distances_of_digits():
    look, (x, y) = DigitDistance(), DIGITS.batch(range(64))
    assert look(x, x).abs().max() < 1e-6 and (look(x, -x) > .1).all() and not any(p.requires_grad for p in look.parameters())
    shift = x.clone().requires_grad_()
    look(shift, x.roll(1, 0)).sum().backward()
    assert shift.grad.flatten(1).any(1).all()
    large = nn.functional.interpolate(x, (32, 32))
    assert torch.allclose(look(large, large.roll(1, 0)), look(x, x.roll(1, 0)), atol=1e-5)


def test_dry_builds(monkeypatch):
    for name in ('load_vae', 'encoder', 'digit_classifier', 'load'): monkeypatch.setattr(recipe, name, lambda *a, **kw: pytest.fail('something was loaded'))
    for name in ('tarflow-64-vp', 'rrepa-64-dinov2-l', 'rrepa-256', 'simflow-xxl-160-repa-e', 'simflow-xxl-variant-frozen-encoder-noise', ALIGNED, REPA_E): check_dry(find_config(name))


@pytest.mark.slow
@pytest.mark.parametrize('name', [*CONFIGS])
def test_every_dry_build(name): check_dry(CONFIGS[name])


def check_dry(c):
    r = build(c, dry=True)
    parts = [r.model, *(s.objective for s in r.stages if isinstance(s.objective, nn.Module)), *([r.vae] if r.vae else [])]
    assert all(t.is_meta for m in parts for t in (*m.parameters(), *m.buffers()))
    assert sum(p.numel() for p in r.model.parameters()) == count(c) and r.stages[-1].steps == c.steps
    assert [k.split(':')[0] for k in r.notes] == ['data.vae'] * bool(c.data.vae) + ['align.encoder'] * bool(c.align) + ['joint.perceptual'] * bool(c.joint and c.joint.perceptual)
    for s in r.stages:
        if s.prepare: s.prepare(r.model)


# stages

def parts_of(model): return {k for k in ('encoder', 'decoder', 'flow') if any(p.requires_grad for p in getattr(model, k).parameters())}


@pytest.mark.parametrize('variant, want', [('frozen vae, learned', ({'encoder', 'decoder'}, {'flow'})), ('frozen vae, fixed, norm', ({'encoder', 'decoder'}, {'flow'})),
                                           ('frozen encoder, noise', ({'encoder', 'decoder'}, {'decoder', 'flow'})), ('fixed', ({'encoder', 'decoder', 'flow'},)), ('vae, fixed', ({'encoder', 'decoder'},))])
def test_what_is_trained_and_what_moves(variant, want, data):
    c = override(find_config('digits-simflow-s'), [f'joint.variant={variant}', 'joint.before=2', 'optim.steps=2', 'joint.start=0', 'system.amp=off'])
    r = build(c)
    assert len(r.stages) == len(want)
    for s, trained in zip(r.stages, want):
        before = {k: v.clone() for k, v in r.model.state_dict().items()}
        s.prepare(r.model)
        assert parts_of(r.model) == trained and r.model.posterior.config == s.prepare.posterior.config
        assert first(c, data, s).target.shape == (16, r.model.posterior.draws(r.model.N))
        for _ in fit(r.model, batches(DIGITS, 16, transforms=s.transforms), s.objective, steps=2, amp='off', **s.fit): pass
        assert {k.split('.')[0] for k, v in r.model.state_dict().items() if not torch.equal(v, before[k])} == trained
    again = build(c)                                                # a run that resumes in its last stage prepares that one alone
    again.stages[-1].prepare(again.model)
    assert parts_of(again.model) == want[-1] and not any(p.grad is not None and not p.requires_grad for p in r.model.parameters())


def test_terms_of_frozen_stages():
    names = lambda s: [type(t).__name__ for _, t in s.objective.terms]
    one, two = build(find_config(FROZEN)).stages
    assert names(one) == ['Reconstruction', 'Perceptual', 'NormalNLL', 'Entropy', 'Adversarial'] and names(two) == ['Reconstruction', 'Perceptual', 'FlowNLL', 'Adversarial']
    assert one.objective.terms[-1][1] is two.objective.terms[-1][1]  # the critic goes on learning
    assert isinstance(one.prepare.posterior, Learned) and one.prepare.posterior.perturb is None and isinstance(two.prepare.posterior.perturb, Additive)
    still = build(find_config('digits-simflow-xxl-variant-frozen-vae-fixed')).stages
    assert names(still[0])[-1] == 'Adversarial' and names(still[1]) == ['Reconstruction', 'FlowNLL'] and not list(still[1].objective.parameters())


def test_the_posterior_has_the_sigma_of_the_configuration():
    for words, at in ((['joint.sigma=0.75'], lambda p: p.perturb), (['joint.sigma=0.75', 'joint.variant=noise'], lambda p: p.perturb)):
        s, = build(override(find_config('digits-simflow-s'), words)).stages
        assert at(s.prepare.posterior).sigma == .75
    assert build(find_config('digits-simflow-s')).stages[0].prepare.posterior.perturb.sigma == .5


def test_the_critic_counts_batches():
    start = lambda words: build(override(find_config('digits-simflow-s'), ['joint.start=10', *words])).stages[0].objective.terms[-1][1].start
    assert start([]) == 10 and start(['system.accumulate=4']) == 40
    logs = list(train_config(override(find_config('digits-simflow-s'), ['joint.start=3', 'optim.steps=5', 'system.accumulate=2']), every=1))
    assert [log['tell'] > 0 for log, _ in logs] == [False] * 3 + [True] * 2          # the reference takes a step's batch at once


def test_weights_of_terms():
    s, = build(override(find_config('digits-simflow-s-repa-e'), ['joint.perceptual=0.5', 'joint.adversarial=0.1', 'joint.p=2', 'align.lam=0.25'])).stages
    (w, rec), (v, _), (_, nll), (u, _) = s.objective.terms
    assert (w, rec.p, v, nll.lam, u) == (1., 2, .5, .25, .1) and isinstance(nll.strategy, Forward) and nll.strategy.pairs == ((3, 1),)


@pytest.mark.parametrize('strategy, kind', [('forward', Forward), ('detach', Detach), ('reverse', Reverse)])
def test_fsdp_runs_blocks_again(strategy, kind, data):
    c = override(find_config('digits-rrepa-64'), [f'align.strategy={strategy}', 'system.amp=off'])
    again = override(c, ['system.parallel=fsdp'])
    assert type(strategy_of(c)) is kind and strategy_of(c).pairs == tuple((t, c.align.layer) for t in c.align.blocks)
    assert [getattr(strategy_of(k), 'rerun', None) for k in (c, again)] == ([None] * 2 if strategy == 'forward' else [False, True])
    found = []
    for k in (c, again):
        r = build(k, dtype=torch.float64)
        found.append(losses(k, r, data, 3)[0])
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0][0] != found[0][-1]


# rates

def test_schedules():
    c = find_config('digits-tarflow-64')
    get = lambda words, steps=100: fit_of(k := shortened(override(c, words), steps), steps)
    cos = get(['optim.schedule=cosine', 'optim.floor=0.2', 'optim.warmup=0'])['schedule']
    assert all(cos(s, 100, w) == cosine(s, 100, w, .2) for s in range(100) for w in (0, 7)) and repr(cos) == 'cosine, floor 0.2'
    flat = get(['optim.schedule=constant', 'optim.floor=0.5'])['schedule']
    assert [flat(s, 100, 4) for s in (0, 2, 4, 50, 99)] == [.5, .75, 1., 1., 1.]
    two = get(['optim.schedule=two-stages', 'optim.floor=0.1'])['schedule']
    assert isinstance(two, TwoStages) and two(0, 101) == two(50, 101) == 1 and two(100, 101) == pytest.approx(.1) and isinstance(schedule_of(c), Rate)
    assert get(['optim.clip=none'])['clip'] is None and get(['optim.clip=0.5'])['clip'] == .5


def test_warm_up_is_shorter_than_any_stage():
    c = override(find_config(FROZEN), ['optim.warmup=5', 'joint.before=3'])
    assert all(0 <= s.fit['warmup'] < s.steps for s in build(c).stages) and build(c).stages[1].fit['warmup'] == c.warmup > 3
    assert build(shortened(c, 1)).stages[0].fit['warmup'] == 0


def test_shortened():
    c, k = CONFIGS['simflow-xxl-variant-frozen-encoder-noise'], shortened(CONFIGS['simflow-xxl-variant-frozen-encoder-noise'], 1000)
    assert k.steps == 1000 and k.joint.before == round(c.joint.before * 1000 / c.steps) and k.joint.start == c.joint.start * 1000 // c.steps
    assert k.optim.lr == c.optim.lr and k.data == c.data and shortened(CONFIGS['rrepa-64'], 1000).warmup == round(CONFIGS['rrepa-64'].warmup / 1000)
    for bad in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match='steps: .*1 or more'): shortened(c, bad)


# precision and seeds

@pytest.mark.parametrize('name', ['digits-tarflow-64-likelihood', 'digits-rrepa-64', ALIGNED, REPA_E, FROZEN])
def test_float64(name, data):
    c = shortened(find_config(name), 3)
    wide, narrow = build(c, dtype=torch.float64), build(c)
    learned = lambda r: [p for m in (r.model, *(s.objective for s in r.stages if isinstance(s.objective, nn.Module))) for p in m.parameters() if p.requires_grad]
    assert {p.dtype for p in learned(wide)} == {torch.float64} and all(isinstance(s.transforms[-1], Cast) for s in wide.stages)
    b = first(c, data, wide.stages[0])
    assert b.x.dtype == torch.float64 and (b.target is None or b.target.dtype == torch.float64) and b.y.dtype == torch.int64
    for a, b in zip(losses(c, wide, data, 3), losses(c, narrow, data, 3)): assert a == pytest.approx(b, rel=1e-4)
    assert {p.grad.dtype for p in wide.model.parameters() if p.grad is not None} == {torch.float64}


@pytest.mark.parametrize('name', ['digits-tarflow-64', 'digits-tarflow-64-vp', 'digits-tarflow-64-coupling', 'digits-rrepa-64', 'digits-rrepa-64-detach-last-layer2', 'digits-rrepa-64-forward-all-layer2',
                                  ALIGNED, 'digits-simflow-s', REPA_E, 'digits-simflow-xxl-none', 'digits-simflow-xxl-slerp', FROZEN])
def test_bf16_has_float32_weights_and_nearly_the_same_losses(name, data):
    c = override(find_config(name), ['system.parallel=fsdp'])
    got, want = (losses(c, r := build(shortened(c, 3)), data, 3, amp) for amp in ('bf16', 'off'))
    for a, b in zip(got, want): assert a == pytest.approx(b, rel=.05, abs=.05) and a != b
    r = build(shortened(c, 1)); losses(c, r, data, 1, 'bf16')
    learned = [p for m in (r.model, r.stages[-1].objective) if isinstance(m, nn.Module) for p in m.parameters() if p.requires_grad]
    assert {t.dtype for p in learned for t in (p, p.grad) if t is not None} == {torch.float32}


@pytest.mark.parametrize('name', ['digits-tarflow-64', ALIGNED, 'digits-simflow-s', 'digits-simflow-xxl-no-norm'])
def test_under_bf16_the_likelihood_is_float32(name, data):
    c = find_config(name)
    r = build(c)
    flow = getattr(r.model, 'flow', r.model)
    seen, real = [], flow.forward
    def watched(x, y=None):
        z, logdet = real(x, y)
        seen.append({x.dtype, z.dtype, logdet.dtype})
        return z, logdet
    flow.forward = watched
    b = first(c, data, r.stages[0])
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        x = r.model.latent(b.x, b.target).x if c.joint else b.x
        flow.log_prob(x, b.y)
    assert seen == [{torch.float32}]


def test_seeds(data):
    c, rng = find_config(REPA_E), torch.get_rng_state()
    a, b, other = build(c), build(c), build(override(c, ['seed=1']))
    assert torch.equal(torch.get_rng_state(), rng)
    same = lambda p, q: all(torch.equal(v, q.state_dict()[k]) for k, v in p.state_dict().items())
    assert same(a.model, b.model) and same(a.stages[0].objective, b.stages[0].objective) and not same(a.model, other.model)
    run = lambda **kw: [log['loss'] for log, _ in train_config(c, every=1, steps=2, data=DIGITS, **kw)]
    assert run() == run() == run(seed=0) and run(seed=1) != run()


def test_the_reference_trainer(data):
    c = shortened(override(find_config('digits-rrepa-64'), ['optim.ema=0.5']), 3)
    logs = [(log, {k: v.clone() for k, v in model.state_dict().items()}, model.training) for log, model in train_config(c, every=2)]
    r = build(c); s, = r.stages
    mean = ema(r.model, .5)
    want = list(fit(r.model, batches(DIGITS, c.optim.batch_size, transforms=s.transforms), s.objective, steps=3, every=2, ema=mean, amp='bf16', **s.fit))
    assert [log['step'] for log, *_ in logs] == [2, 3] and [log['loss'] for log, *_ in logs] == [log['loss'] for log in want] and not any(t for *_, t in logs)
    assert all(torch.equal(v, mean.module.state_dict()[k]) for k, v in logs[-1][1].items())
    with pytest.raises(ValueError, match='data.classes=10'): train_config(override(c, ['data.classes=7']), data=DIGITS)   # at once, not at the first step
    with pytest.raises(ValueError, match='1 or more'): train_config(c, steps=0)


# samples, cards, saving

def test_guidance():
    of = lambda *words: guidance_of(override(find_config('digits-tarflow-64'), [f'sample.{w}' for w in words]))
    assert type(of('guidance=none')) is Guidance and repr(of('guidance=class', 'w=3', 'schedule=linear')) == repr(ClassGuidance(3., 'linear'))
    assert repr(of('guidance=temperature', 'w=0.5', 'tau=1.5')) == repr(TemperatureGuidance(.5, 1.5)) and type(of('guidance=star', 'w=1')) is StarGuidance


@pytest.mark.parametrize('name', ['digits-tarflow-64-p4', 'digits-tarflow-64-free', 'digits-tarflow-64-likelihood', ALIGNED, REPA_E, 'digits-simflow-xxl-variant-noise'])
def test_samples_do_not_depend_on_batches_and_survive_saving(name, data, tmp_path):
    c = shortened(find_config(name), 2)
    *_, (_, model) = train_config(c, data=of(c, data))
    r, y = build(c), torch.arange(5) if c.data.classes else 5
    draw = lambda model, size: torch.cat(list(draw_samples(r, model, y, torch.Generator().manual_seed(0), size)))
    x = draw(model, 5)
    assert x.shape == (5, 1, 8, 8) and x.isfinite().all() and torch.allclose(draw(model, 2), x, atol=1e-4)
    card = card_of(c, of(c, data), 2)
    assert card == json.loads(json.dumps(card)) and from_dict(card['config']) == c and card['steps'] == 2
    save_model(r, model, tmp_path/'m', card)
    again = (SimFlow if c.joint else LatentFlow if c.data.vae else TarFlow).from_pretrained(tmp_path/'m')
    own = again.flow if c.data.vae else again
    assert {k: own.card[k] for k in card} == card and torch.allclose(draw(own, 5), x, atol=1e-6)
    if c.joint: assert again.posterior.config == model.posterior.config
    if c.data.vae: assert again.vae.identity == data['vae'].identity and again.sigma == c.noise.sigma


def test_cards(data):
    c = find_config(ALIGNED)
    card = card_of(c, data['both'])
    means = data['latents'].batch(range(1437))[0][:, :, 0]
    assert card['reach'] == round(means.abs().max().item(), 2) and card['vae'] == data['vae'].identity and card['vae_name'] == 'digits-vae'
    assert card['sigma'] == .2 and card['aligned']['strategy'] == 'reverse' and card['steps'] == c.steps and card['class_names'] == [str(k) for k in range(10)]
    assert reach_of(data['latents'], most=100) <= card['reach']
    assert card_of(find_config('digits-tarflow-64-likelihood'), DIGITS)['noise'] == 'uniform' and 'sigma' not in card_of(find_config('digits-tarflow-64-likelihood'))
    assert card_of(find_config('digits-tarflow-64-free'), DIGITS)['class_names'] == [] and card_of(find_config(REPA_E))['variant'] == 'fixed'


def test_denoised_only_where_the_configuration_says_so(monkeypatch):
    seen = []
    monkeypatch.setattr(recipe, 'samples', lambda model, y, guidance, denoise, **kw: seen.append(denoise) or iter(()))
    for words in ([], ['sample.denoise=false'], ['noise.kind=uniform', 'noise.sigma=0']): list(draw_samples(recipe.Recipe(override(find_config('digits-tarflow-64'), words), None, ()), None, 3))
    assert seen == [find_config('digits-tarflow-64').noise.sigma, False, False]
