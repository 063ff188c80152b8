"""Configurations: every row of the papers' tables, checked against what is built, what runs, and what is printed."""
import dataclasses
import json
import re
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowbook import configs as C
from flowbook.configs import CONFIGS, TWINS, count, find_config, flops, from_dict, hours, memory, model_of, override, parameters, to_dict, twin
from flowbook.repa import STRATEGIES, Alignment, Projector, encoder
from flowbook.simflow import SIZES, Adversarial, AlignedNLL, FlowNLL, Joint, PatchCritic, Reconstruction, freeze
from flowbook.train import NLL

ALL = [*CONFIGS, *(f'{d}-{n}' for d in TWINS for n in CONFIGS)]


def numbers(module): return sum(p.numel() for p in module.parameters())


def on_meta(c):
    with torch.device('meta'): return model_of(c)


# ---- what the papers print

def test_every_paper_has_its_rows():
    tables = {p: {r.table for c in CONFIGS.values() if c.paper == p for r in c.published} for p in ('TARFlow', 'R-REPA', 'SimFlow')}
    assert tables == {'TARFlow': {f'Table {k}' for k in (2, 3, 4, 5, 6)}, 'R-REPA': {f'Table {k}' for k in (1, 2, 3, 4, 7, 8, 9)},
                      'SimFlow': {*(f'Table {k}' for k in (1, 2, 3, 4, 5, 6, 10)), 'App. B'}}


def rows(paper, table): return {c.name for c in CONFIGS.values() if c.paper == paper and any(r.table == table for r in c.published)}


@pytest.mark.parametrize('paper, table, n', [('TARFlow', 'Table 3', 3), ('TARFlow', 'Table 4', 2), ('TARFlow', 'Table 5', 3), ('R-REPA', 'Table 1', 10), ('R-REPA', 'Table 7', 3),
                                             ('R-REPA', 'Table 8', 4), ('R-REPA', 'Table 9', 3), ('R-REPA', 'Table 4', 3), ('SimFlow', 'Table 3', 4), ('SimFlow', 'Table 4', 5),
                                             ('SimFlow', 'Table 5', 5), ('SimFlow', 'Table 6', 3), ('SimFlow', 'Table 10', 6), ('SimFlow', 'Table 1', 2), ('SimFlow', 'Table 2', 1)])
def test_tables_are_whole(paper, table, n):
    "As many configurations as the table has rows of the paper's own (a row that says 'collapse' has no figure; Table 1 of R-REPA prints one of its ten twice)."
    assert len(rows(paper, table)) == n


def test_the_five_tasks_of_tarflow():
    "Table 7: patch, width, blocks, layers, noise, batch, epochs, GPUs."
    row = lambda n: (lambda c: (c.flow.patch_size, c.flow.dim, c.flow.blocks, c.flow.layers, c.noise.kind, c.noise.sigma, c.optim.batch_size, c.optim.epochs, c.system.gpus, c.system.amp))(CONFIGS[n])
    assert row('tarflow-64-likelihood') == (2, 768, 8, 8, 'uniform', 0, 384, 60, 32, 'off')
    assert row('tarflow-64-likelihood-code') == (2, 768, 8, 8, 'uniform', 0, 256, 100, 16, 'off')                  # E4: the published command
    assert row('tarflow-64-free') == (2, 768, 8, 8, 'gaussian', .05, 256, 200, 8, 'bf16')
    assert row('tarflow-64') == (2, 1024, 8, 8, 'gaussian', .05, 768, 320, 32, 'bf16')
    assert row('tarflow-128') == (4, 1024, 8, 8, 'gaussian', .15, 768, 320, 32, 'bf16')
    assert row('tarflow-afhq-256') == (8, 768, 8, 8, 'gaussian', .07, 256, 4000, 8, 'bf16')


def test_hyperparameters_of_the_other_two():
    "R-REPA Table 6, SimFlow Table 9."
    for c in CONFIGS.values():
        o = c.optim
        if c.paper == 'R-REPA': assert (o.batch_size, o.lr, o.betas, o.weight_decay, o.ema, c.align is None or c.align.lam in (.1, .5)) == (256, 1e-4, (.9, .95), 1e-4, .9999, True)
        if c.paper == 'SimFlow': assert (o.batch_size, o.lr, o.betas, o.weight_decay, o.ema, o.clip, o.drop, o.warmup) == (256, 1e-4, (.9, .999), 0, .9999, 1, .1, 0)
        if c.paper == 'SimFlow' and c.align: assert (c.align.strategy, c.align.layer, c.align.lam, c.align.encoder) == ('forward', 1, 1., 'dinov2-b')
    two = CONFIGS['simflow-xxl-160'].optim
    assert (two.schedule, two.epochs, two.floor) == ('two-stages', 160, .01) and CONFIGS['simflow-xxl'].optim.schedule == 'constant'


@pytest.mark.parametrize('size', SIZES)
def test_sizes_as_printed(size):
    "SimFlow Table 8, in the digits that it prints; with REPA-E the flow is the same."
    n = parameters(CONFIGS[f'simflow-{size.lower()}'])['flow']
    assert SIZES[size].printed == (f'{n / 1e6:.0f}M' if n < 1e9 else f'{n / 1e9:.1f}B')
    assert parameters(CONFIGS[f'simflow-{size.lower()}-repa-e'])['flow'] == n


def test_the_vae_as_printed_and_both_depths():
    p = parameters(CONFIGS['simflow-xxl'])
    assert round((p['encoder'] + p['decoder']) / 1e6) == 67                                            # App. B
    assert round(p['flow'] / 1e6, 1) == 1364.7 and round(parameters(CONFIGS['simflow-xxl-36'])['flow'] / 1e6, 1) == 1125.6   # E1


def test_what_is_not_printed_is_marked_and_explained():
    for c in CONFIGS.values():
        known = {*C.PARTS, *C.every_key(c)}
        assert set(c.unsaid) <= known and set(c.unsaid) <= set(C.UNSAID) and set(c.notes) <= set(C.CORRECTIONS) and len(set(c.unsaid)) == len(c.unsaid)
    assert {k for c in CONFIGS.values() for k in c.unsaid} == set(C.UNSAID) and {k for c in CONFIGS.values() for k in c.notes} == set(C.CORRECTIONS)
    assert set(C.CORRECTIONS) >= {f'E{k}' for k in range(1, 20)} - {'E3'}                                # E3 is about notation


# ---- counting

@pytest.mark.parametrize('prefix', ['', *(pytest.param(f'{d}-', marks=pytest.mark.slow) for d in TWINS)])
def test_every_configuration_builds_and_counts(prefix):
    "On the meta device: the formula gives what is built, part by part."
    for name in CONFIGS:
        c = find_config(prefix + name)
        model, p = on_meta(c), parameters(c)
        assert numbers(model) == count(c), name
        if not c.joint: continue
        assert {k: numbers(getattr(model, k)) for k in ('encoder', 'decoder', 'flow')} == {k: p[k] for k in ('encoder', 'decoder', 'flow')}, name
        with torch.device('meta'): assert numbers(PatchCritic(c.data.channels, *c.joint.critic)) == p['critic'], name


def test_the_projector():
    c = CONFIGS['rrepa-64']
    assert parameters(c)['projector'] == numbers(Projector(1024, 768, 1024))


@pytest.mark.parametrize('name', ['digits', 'dinov2-b', 'dinov2-l', 'clip-b', 'mae-b'])
def test_vision_encoders_against_timm(name):
    "Parameters and forward FLOPs for 256 patches (16 of the digits); the papers' on the meta device, without weights."
    if name == 'digits':
        seen, x, n = encoder('digits', (4, 4)), torch.randn(3, 1, 8, 8), 16
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode: seen(x)
        assert numbers(seen) == C.VITS[name].numbers(n) and mode.get_total_flops() == 3 * C.VITS[name].flops(n)
        return
    import timm
    full, patch = C.timm_name(name)[0], C.VITS[name].patch
    with torch.device('meta'):
        model, x = timm.create_model(full, num_classes=0, img_size=16 * patch).eval(), torch.empty(2, 3, 16 * patch, 16 * patch)
        with FlopCounterMode(display=False) as mode: model.forward_features(x)
    assert numbers(model) == C.VITS[name].numbers(256) and mode.get_total_flops() == 2 * C.VITS[name].flops(256)


@pytest.mark.parametrize('kind, side', [('f16', 256), ('sd-vae-ft-ema', 256), ('digits-vae', 8)])
def test_autoencoders_against_diffusers(kind, side):
    from diffusers import AutoencoderKL
    v = C.JOINT_VAES[kind] if kind in C.JOINT_VAES else C.FROZEN_VAES[kind]
    with torch.device('meta'):
        model = AutoencoderKL(**v)
        with FlopCounterMode(display=False) as down: z = model.encode(torch.empty(2, v['in_channels'], side, side)).latent_dist.mean
        with FlopCounterMode(display=False) as up: model.decode(z)
    layers = C.vae_layers(v, side, False)
    assert sum(l.numbers for part in layers for l in part) == numbers(model)
    assert [2 * sum(l.flops for l in part) for part in layers] == [down.get_total_flops(), up.get_total_flops()]


def test_lpips_against_torchvision():
    from torchvision.models import vgg16
    with torch.device('meta'):
        net = vgg16().features[:30]
        with FlopCounterMode(display=False) as mode: net(torch.empty(1, 3, 256, 256))
    convs, heads = C.lpips_layers(256)[:-5], C.lpips_layers(256)[-5:]
    assert sum(l.numbers for l in convs) == numbers(net) and sum(l.flops for l in convs) == mode.get_total_flops()
    assert [l.numbers for l in heads] == [64, 128, 256, 512, 512]


def objective_of(c, model):
    "Objectives as chapters 11 and 13 have them."
    a, grid = c.align, (c.flow.image_size // c.flow.patch_size,) * 2
    rerun = {'rerun': True} if a and a.strategy != 'forward' and c.system.parallel == 'fsdp' else {}
    if not c.joint: return Alignment(model, STRATEGIES[a.strategy](a.pairs, **rerun), encoder(a.encoder, grid), a.lam, a.hidden) if a else NLL(c.system.checkpoint)
    frozen = C.variant_of(c).frozen
    freeze(*[getattr(model, k) for k in frozen])
    nll = AlignedNLL(STRATEGIES[a.strategy](a.pairs), encoder(a.encoder, grid), Projector(c.flow.dim, C.vit_of(a.encoder).dim, a.hidden), a.lam) if a else FlowNLL()
    return Joint(nll, *() if 'decoder' in frozen else (Reconstruction(c.joint.p), Adversarial(PatchCritic(c.data.channels, *c.joint.critic))))


def batch_of(c):
    b, side = c.optim.batch_size, c.data.image_size
    image, labels = torch.randn(b, c.data.channels, side, side), torch.zeros(b).long()
    target = (image,) * bool(c.align and not c.joint)
    return (image, labels, *target) if c.flow.kind != 'latent' else (torch.randn(b, c.flow.channels, c.flow.image_size, c.flow.image_size), labels, *target)


def counted(c):
    model = model_of(c)
    objective, batch = objective_of(c, model), batch_of(c)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode: objective(model, *batch)
    return mode.get_total_flops()


@pytest.mark.parametrize('name', ['tarflow-64-likelihood', 'tarflow-64-vp', 'rrepa-256-p1', 'simflow-xxl'])
def test_flops_of_a_flow_at_full_size(name):
    "One sample on the meta device, forward and backward; the flow alone."
    c = dataclasses.replace(CONFIGS[name], align=None)
    with torch.device('meta'):
        flow = getattr(model := model_of(c), 'flow', model)
        with FlopCounterMode(display=False) as mode: flow.log_prob(torch.empty(1, *flow.image_shape, requires_grad=bool(c.joint))).sum().backward()
    assert mode.get_total_flops() == C.flow_flops(c, bool(c.joint))['flow']


def few(c, parallel='ddp'): return override(c, [f'system.parallel={parallel}', 'system.checkpoint=false', 'system.accumulate=1', 'optim.batch_size=3'])


@pytest.mark.parametrize('name', ['tarflow-64-p4', 'tarflow-64-free', 'tarflow-64-vp', 'tarflow-64-coupling', 'rrepa-64-forward-first-layer2', 'rrepa-64-detach-all-layer4', 'rrepa-64-detach-first-layer2',
                                  'rrepa-64', 'rrepa-64-reverse-all-layer2', 'rrepa-256', 'simflow-b', 'simflow-l-repa-e', 'simflow-xxl-repa-e-last', 'simflow-xxl-slerp', 'simflow-xxl-variant-noise',
                                  'simflow-xxl-variant-frozen-encoder-noise', 'simflow-xxl-variant-frozen-vae-learned'])
def test_flops_are_those_that_run(name):
    c = few(twin(CONFIGS[name]))
    assert counted(c) == sum(flops(c).values())


@pytest.mark.parametrize('name', ['rrepa-64', 'rrepa-64-detach-last-layer2', 'rrepa-64-reverse-all-layer2'])
def test_flops_of_the_rerun_under_fsdp(name):
    c = few(twin(CONFIGS[name]), 'fsdp')
    assert counted(c) == sum(flops(c).values()) > sum(flops(few(twin(CONFIGS[name]))).values())


@pytest.mark.slow
@pytest.mark.parametrize('data', TWINS)
def test_flops_of_every_twin(data):
    seen = set()
    for base in CONFIGS.values():
        for parallel in ('ddp', 'fsdp') if base.align and not base.joint else ('ddp',):
            c = few(twin(base, data), parallel)
            key = (c.flow, c.align, c.joint and c.joint.variant, parallel)
            if key in seen: continue
            seen.add(key)
            assert counted(c) == sum(flops(c).values()), (c.name, parallel)
    assert len(seen) > 40


def test_recomputing_costs_a_forward_pass():
    c = twin(CONFIGS['tarflow-64'])
    again = override(c, ['system.checkpoint=true'])
    assert flops(again)['recomputed'] == sum(C.block_cost(c.flow, t).forward for t in range(1, 5)) * c.optim.batch_size
    assert counted(few(c)) == sum(flops(few(c)).values())
    checked = dataclasses.replace(few(c), system=dataclasses.replace(few(c).system, checkpoint=True))
    assert counted(checked) == sum(flops(checked).values())


def test_parts_of_a_step_add_up_to_the_batch():
    c = CONFIGS['simflow-l']
    assert flops(override(c, ['optim.batch_size=512'])) == {k: 2 * v for k, v in flops(c).items()}
    assert 'critic' not in flops(c, critic=False) and 'flow' not in flops(c, before=True) and {'encoder', 'decoder', 'LPIPS', 'critic'} == set(flops(c, before=True))


# ---- memory and hours

def saved_bytes(run, module):
    own, seen = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}, {}
    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = run()
    return out is not None and sum(s.nbytes() for k, s in seen.items() if k not in own)


@pytest.mark.parametrize('name', ['tarflow-64-p4', 'tarflow-64', 'rrepa-256-p1', 'simflow-b', 'simflow-l'])
def test_what_a_flow_keeps(name):
    "Bytes that autograd saves in float32, within seven per cent."
    c = override(twin(CONFIGS[name], 'mnist5k'), ['system.amp=off'])
    flow = getattr(model := model_of(c), 'flow', model)
    x = torch.randn(3, *flow.image_shape, requires_grad=True)
    got = saved_bytes(lambda: flow.log_prob(x, torch.zeros(3).long()), flow) / 3
    assert abs(C.flow_bytes(c) / got - 1) < .07


def test_what_an_autoencoder_and_a_critic_keep():
    c = override(twin(CONFIGS['simflow-l'], 'mnist5k'), ['system.amp=off'])
    model = model_of(c)
    image, z = torch.randn(3, 1, 28, 28, requires_grad=True), torch.randn(3, *model.flow.image_shape, requires_grad=True)
    enc, dec = C.vae_layers(C.vae_config(c), 28, True)
    critic = PatchCritic(1, *c.joint.critic)
    for module, x, want in ((model.encoder, image, C.conv_bytes(enc, 4)), (model.decoder, z, C.conv_bytes(dec, 4)), (critic, image, C.critic_bytes(C.critic_layers(*c.joint.critic, 1, 28), 4))):
        assert abs(want / (saved_bytes(lambda: module(x), module) / 3) - 1) < .07


def test_memory_by_kind():
    c = CONFIGS['simflow-xxl']
    ddp = override(c, ['system.parallel=ddp'])
    one, many = memory(ddp, 8), memory(ddp, 64)
    trained = sum(v for k, v in parameters(c).items() if not k.endswith('frozen'))
    assert one['weights'] == one['gradients'] == 4 * trained and one['Adam'] == 8 * trained and one['average'] == 4 * count(c)
    assert {k for k in one if one[k] != many[k]} == {'flow activations', 'VAE activations', 'judges of images'} and one['flow activations'] == 8 * many['flow activations']
    cut = memory(c, 64)
    assert cut['weights'] == round(4 * trained / 64) and cut['gathered'] > 0 and cut['flow activations'] == many['flow activations']
    assert memory(override(c, ['system.checkpoint=true']), 64)['flow activations'] < .25 * cut['flow activations']
    assert memory(override(c, ['system.accumulate=4']), 64)['flow activations'] * 4 == cut['flow activations']
    assert memory(override(CONFIGS['tarflow-64'], ['system.amp=off']))['flow activations'] > 1.5 * memory(CONFIGS['tarflow-64'])['flow activations']


def test_simflow_at_512_fills_eight_cards():
    fits = lambda *how: sum(memory(override(CONFIGS['simflow-512'], how), 8).values()) < C.FULL * 80 * 2**30
    assert not fits('system.checkpoint=false') and not fits('system.checkpoint=true') and fits('system.accumulate=4')


def test_every_configuration_fits_the_cards_it_names():
    for c in CONFIGS.values(): assert sum(memory(c).values()) < C.FULL * 80 * 2**30, c.name


def test_speeds_of_r_repa():
    "Table 5, eight GPUs: 27 to 29% of an A100's peak in bf16."
    for how, speed in (('forward', 2.11), ('detach', 1.93), ('reverse', 1.87)):
        c = C.changed(CONFIGS['rrepa-64-reverse-last-layer2'], {'align.strategy': how})
        assert .265 < sum(flops(c).values()) * speed / 8 / C.GPUS['A100'].peak('bf16') < .295


def test_the_published_likelihood_command_does_not_fit_its_fortnight():
    need = lambda name: (lambda c: C.whole_flops(c) / c.system.gpus / (14 * 86400))(CONFIGS[name])
    assert round(need('tarflow-64-likelihood-code') / 1e12, 1) == 22.5 > C.GPUS['A100'].fp32 and need('tarflow-64-likelihood') < 7e12


def test_hours():
    c = CONFIGS['rrepa-64']
    h = hours(c, 'A100', 8, .5)
    assert h.gpu == pytest.approx(sum(flops(c).values()) * 1e6 / (312e12 * .5) / 3600) and h.days == pytest.approx(h.gpu / 8 / 24)
    assert hours(c, 'H100', 8).gpu < hours(c, 'A100', 8).gpu and hours(c, 'A100', 16).gpu == hours(c, 'A100', 8).gpu
    frozen, joint = CONFIGS['simflow-xxl-variant-frozen-vae-fixed'], CONFIGS['simflow-xxl']
    assert C.whole_flops(frozen) > frozen.steps * sum(flops(frozen).values()) and C.whole_flops(joint) < joint.steps * sum(flops(joint).values())   # a first stage; a critic that sets in late
    assert C.whole_flops(joint) == joint.steps * sum(flops(joint).values()) - 50_000 * flops(joint)['critic']
    for wrong, says in ((dict(gpu='A10'), "did you mean 'A100'"), (dict(world=0), 'world'), (dict(share=0), 'share'), (dict(share=1.2), 'share')):
        with pytest.raises(ValueError, match=says): hours(c, **wrong)


# ---- values

def test_json_both_ways():
    for name in ALL:
        c = find_config(name)
        assert from_dict(json.loads(json.dumps(to_dict(c)))) == c
    c = override(CONFIGS['simflow-xxl'], ['optim.lr=2e-4'])
    assert from_dict(to_dict(c)) == c and from_dict(to_dict(c)).changed == ('optim.lr=2e-4',)


@pytest.mark.fault('configuration', 'a stored configuration is damaged: a key is missing, unknown or of the wrong kind', 'the key is named, and the nearest one where it is unknown; mend the file or take the configuration by its name')
@pytest.mark.parametrize('damage, says', [(lambda d: d.pop('seed'), 'config: seed is missing'), (lambda d: d['optim'].pop('lr'), 'optim: lr is missing'), (lambda d: d.update(algn=None), 'unknown key algn; did you mean align'),
                                          (lambda d: d['flow'].update(dims=3), 'unknown key dims; did you mean dim'), (lambda d: d['optim'].update(lr='1e-4'), 'optim.lr'), (lambda d: d.update(data=3), 'data: int'),
                                          (lambda d: d.pop('flow'), 'flow'), (lambda d: d.pop('published'), 'published is missing'), (lambda d: d.pop('changed'), 'changed is missing'), (lambda d: d.update(seed=-1), 'seed'), (lambda d: d['published'][0].pop('value'), 'published: value is missing'),
                                          (lambda d: d.update(published=None), 'published: NoneType'), (lambda d: d.update(unsaid='optim.lr'), 'unsaid'), (lambda d: d.update(unsaid=['optim.lt']), 'unsaid'), (lambda d: d.update(notes=['E99']), 'notes'),
                                          (lambda d: d['flow'].update(blocks=10**12), 'flow.blocks: 1e+12 came; at most 1,000'), (lambda d: d['flow'].update(layers=10**12), 'flow.layers'), (lambda d: d['optim'].update(lr=10**400), 'optim.lr'), (lambda d: d.update(seed=2**64), 'seed'),
                                          (lambda d: d['align'].update(blocks=[True, 8]), 'align.blocks'), (lambda d: d['system'].update(workers=10**9), 'system.workers'), (lambda d: d['data'].update(samples=10**300), 'data.samples')])
def test_a_damaged_dictionary(damage, says, tried):
    d = to_dict(CONFIGS['rrepa-64'])
    damage(d)
    start = time.process_time()
    with pytest.raises(ValueError, match=re.escape(says)) as e: from_dict(d)
    assert time.process_time() - start < 1
    tried(said=str(e.value))


def test_frozen():
    c = CONFIGS['tarflow-64']
    with pytest.raises(dataclasses.FrozenInstanceError): c.optim.lr = 1.
    assert hash(c) == hash(from_dict(to_dict(c)))


@pytest.mark.parametrize('texts, field, value', [(['optim.lr=1e-3'], 'optim.lr', 1e-3), (['optim.batch_size=1_024'], 'optim.batch_size', 1024), (['system.compile=True'], 'system.compile', True),
                                                 (['flow.layers=7'], 'flow.layers', 7), (['flow.layers=2,2,2,2,2,2,7,9'], 'flow.layers', (2,) * 6 + (7, 9)), (['flow.layers=[1,1,1,1,1,1,6,6]'], 'flow.layers', (1,) * 6 + (6, 6)),
                                                 (['align.blocks=8', 'align.layer=2'], 'align.blocks', (8,)), (['align.blocks=(6, 7)'], 'align.blocks', (6, 7)), (['optim.betas=.9,.99'], 'optim.betas', (.9, .99)), (['optim.betas=0,.99'], 'optim.betas', (0, .99)), (['optim.clip=none'], 'optim.clip', None),
                                                 (['optim.clip=2'], 'optim.clip', 2.), (['data.root=/a/b=c'], 'data.root', '/a/b=c'), (['seed=7'], 'seed', 7), (['align.encoder=dinov2-b@/w.safetensors'], 'align.encoder', 'dinov2-b@/w.safetensors')])
def test_override(texts, field, value):
    c = override(CONFIGS['rrepa-64'], texts)
    part, _, name = field.rpartition('.')
    got = getattr(getattr(c, part) if part else c, name)
    assert got == value and type(got) is type(value) and c.changed == tuple(texts) and CONFIGS['rrepa-64'].changed == ()


NO = pytest.mark.fault('configuration', 'a setting on the command line is misspelt, of the wrong kind, or does not fit the others', 'refused by its name before anything starts, with the nearest key; type it again')


@NO
@pytest.mark.parametrize('text, says', [('optim.lrr=1', 'did you mean optim.lr'), ('lr=1', 'did you mean optim.lr'), ('optimm.lr=1', 'did you mean optim.lr'), ('batchsize=4', 'did you mean optim.batch_size'), ('joint.p=1', 'rrepa-64 has no joint'),
                                        ('optim.lr=fast', 'optim.lr'), ('optim.lr=nan', 'optim.lr'), ('optim.lr=-1', '0 or more'), ('optim.steps=10.5', 'optim.steps'), ('optim.batch_size=0', '1 or more'), ('system.compile=1', 'true or false'),
                                        ('flow.layers=2,2', '8 blocks'), ('align.blocks=9', '1 to 8'), ('align.blocks=a,b', 'align.blocks'), ('align.layer=9', 'layers 1 to 8'), ('flow.kind=diffusion', 'choose of'), ('flow.dim=1000', 'head_dim'),
                                        ('flow.patch_size=5', 'does not divide'), ('data.image_size=33', 'flow.patch_size'), ('optim.lr', 'key=value'), ('data.vae=sd-vae-ft-ema', "belongs to flow.kind 'latent'"), ('system.accumulate=3', 'does not divide'),
                                        ('optim.ema=1', 'optim.ema'), ('optim.betas=.9', 'optim.betas'), ('name=x', 'no such key'), ('seed=x', 'seed'), ('seed=-1', '0 or more'), ('align.strategy=sequential', 'choose of'), ('align.blocks=8,8', 'each once'),
                                        ('optim.lr=0', 'above 0'), ('sample.tau=0', 'above 0'), ('data.classes=0', 'sample.guidance'), ('optim.clip=0', 'optim.clip'), ('noise.kind=uniform', 'noise.sigma'), ('optim.batch_size=' + '9' * 30, 'at most')])
def test_override_says_no(text, says, tried):
    with pytest.raises(ValueError, match=re.escape(says)) as e: override(CONFIGS['rrepa-64'], [text])
    tried(said=str(e.value))


@NO
@pytest.mark.parametrize('texts, says', [(['joint.sigma=0'], 'above 0'), (['joint.variant=frozen vae, fixed'], 'joint.before'), (['joint.critic=64'], 'width and levels'), (['joint.critic=64,8'], '8 levels'), (['joint.critic=64,999999'], '999999 levels'), (['flow.channels=0'], 'flow.channels'),
                                         (['joint.variant=fixd'], 'choose of'), (['joint.vae=digits'], 'flow.image_size'), (['flow.variant=vp'], "'nvp'"), (['joint.p=3'], 'choose of 1, 2')])
def test_override_of_joint_training_says_no(texts, says):
    with pytest.raises(ValueError, match=says): override(CONFIGS['simflow-s'], texts)


def test_steps_and_epochs_replace_each_other():
    c = CONFIGS['tarflow-64']
    assert c.steps == round(320 * 1_281_167 / 768) and c.warmup == round(1_281_167 / 768)
    assert override(c, ['optim.steps=100']).steps == 100 and override(c, ['optim.steps=100']).optim.epochs is None
    assert override(c, ['optim.steps=100']).warmup == 99                                                 # shorter than the run
    e = override(CONFIGS['rrepa-64'], ['optim.epochs=2'])
    assert e.optim.steps is None and e.steps == round(2 * 1_281_167 / 256) and e.epochs == pytest.approx(2, abs=1e-3)
    with pytest.raises(ValueError, match='one of the two'): override(c, ['optim.steps=3', 'optim.epochs=4'])
    with pytest.raises(ValueError, match='one of the two'): override(c, ['optim.epochs=none'])
    with pytest.raises(ValueError, match='optim.epochs: 0'): override(c, ['optim.epochs=0'])


def test_what_the_flow_sees_follows_the_images():
    assert override(CONFIGS['rrepa-64'], ['data.image_size=32']).flow.image_size == 32
    assert override(CONFIGS['rrepa-256'], ['data.image_size=512']).flow.image_size == 64                          # latents of an f8 VAE
    assert override(CONFIGS['rrepa-64'], ['data.image_size=32', 'flow.image_size=32']).flow.image_size == 32
    with pytest.raises(ValueError, match='flow.image_size: 16 came'): override(CONFIGS['rrepa-64'], ['data.image_size=32', 'flow.image_size=16'])


def test_the_share_that_is_held_out():
    assert CONFIGS['tarflow-64'].data.held_out == .1 and override(CONFIGS['tarflow-64'], ['data.held_out=0']).data.held_out == 0
    for bad in ('1', '-0.1', 'some'):
        with pytest.raises(ValueError, match='data.held_out'): override(CONFIGS['tarflow-64'], [f'data.held_out={bad}'])


def test_the_share_of_the_peak_is_said_in_one_place():
    c = CONFIGS['tarflow-64']
    assert hours(c).share == C.SHARE['bf16'] == .27 and hours(c, share=C.LOW).days > hours(c).days
    page = C.describe(c, 'H100', 8)
    assert f'{hours(c, "H100", 8).days:.3g} days on 8, if 27% of the bf16 peak are reached; {hours(c, "H100", 8, C.LOW).days:.3g} days at 20% (an estimate, of no GPU of ours)' in page


def test_several_fields_need_to_fit_at_the_end_only():
    c = override(CONFIGS['tarflow-64'], ['data.image_size=32', 'flow.image_size=32', 'data.classes=5'])
    assert c.flow.tokens == 256 and numbers(on_meta(c)) == count(c)


def test_find_config():
    assert find_config('digits-rrepa-64') == twin(CONFIGS['rrepa-64'], 'digits') and find_config('mnist5k-simflow-512').data.name == 'mnist5k'
    for wrong, says in (('simflow-xxxl', 'simflow-xxl'), ('digits-tarflow-46', 'digits-tarflow-64'), ('zzz', 'listing'), (None, 'None')):
        with pytest.raises(ValueError, match=says): find_config(wrong)
    with pytest.raises(ValueError, match="'digits', 'mnist5k'"): twin(CONFIGS['rrepa-64'], 'cifar10')
    with pytest.raises(ValueError, match='was changed'): twin(override(CONFIGS['rrepa-64'], ['seed=1']))
    with pytest.raises(ValueError, match='what `to_dict` gives'): from_dict([])


# ---- twins

SIZES_OF = {'data': {'name', 'image_size', 'channels', 'classes', 'samples', 'levels', 'vae'}, 'flow': {'image_size', 'channels', 'patch_size', 'dim', 'blocks', 'layers', 'head_dim'}, 'noise': set(),
            'align': {'blocks', 'layer', 'encoder', 'hidden'}, 'joint': {'vae', 'distance', 'start', 'critic', 'before'}, 'optim': {'batch_size', 'steps', 'epochs', 'lr', 'warmup', 'ema'},
            'system': {'gpus', 'workers'}, 'sample': {'n'}}


def test_twins_differ_in_sizes_only():
    assert set(SIZES_OF) == set(C.PARTS)
    for c in CONFIGS.values():
        for data in TWINS:
            t = twin(c, data)
            for part, may in SIZES_OF.items():
                a, b = getattr(c, part), getattr(t, part)
                assert (a is None) == (b is None)
                differ = set() if a is None else {f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)}
                assert differ <= may, (t.name, part, differ - may)
            assert (t.name, t.paper, t.seed, bool(t.data.vae), bool(t.data.classes)) == (f'{data}-{c.name}', c.paper, c.seed, bool(c.data.vae), bool(c.data.classes))


def test_what_follows_the_sizes():
    for name in ('tarflow-64', 'rrepa-256', 'simflow-xxl-160'):
        c, t = CONFIGS[name], twin(CONFIGS[name])
        assert t.optim.lr * t.flow.dim == pytest.approx(c.optim.lr * c.flow.dim)
        if c.optim.ema: assert t.optim.ema**t.steps == pytest.approx(c.optim.ema**c.steps, rel=.05)
        assert t.warmup == pytest.approx(t.steps * c.warmup / c.steps, abs=1) and t.steps == c.steps // 2000
    joint = twin(CONFIGS['simflow-xxl-variant-frozen-encoder-noise'])
    assert joint.joint.before == 125 and joint.joint.start == 50_000 * joint.steps // CONFIGS['simflow-xxl'].steps
    assert [twin(CONFIGS[f'rrepa-64-{k}']).align.blocks for k in ('reverse-all-layer2', 'detach-first-layer2', 'reverse-last-layer2')] == [(1, 2, 3, 4), (1, 2), (3, 4)]
    assert [twin(CONFIGS[f'rrepa-64-{k}']).align.layer for k in ('reverse-last-layer2', 'reverse-last-layer4', '400k')] == [1, 2, 3]
    assert [twin(CONFIGS[f'simflow-{k}']).flow.depths[-1] for k in ('s', 'l', 'xl', 'xxl-36', 'xxl')] == [1, 2, 3, 5, 6]


SAME_TWINS = {('tarflow-64', 'tarflow-128-sigma-0.05'), ('rrepa-64-400k', 'rrepa-64-dinov2-l'), ('rrepa-64-clip-b', 'rrepa-64-mae-b'), ('simflow-xxl', 'simflow-xxl-variant-fixed')}


@pytest.mark.parametrize('data', TWINS)
def test_twins_of_different_configurations_differ(data):
    "Except where they differ in what every twin replaces (image size, encoder), and the row that a paper has twice."
    groups = {}
    for c in CONFIGS.values(): groups.setdefault(dataclasses.replace(twin(c, data), name='', title='', notes=()), []).append(c.name)
    assert {tuple(names) for names in groups.values() if len(names) > 1} == SAME_TWINS


def test_two_processes_can_share_a_twins_batch():
    for name in ALL[len(CONFIGS):]:
        c = find_config(name)
        assert c.optim.batch_size % (2 * c.system.accumulate) == 0 and c.optim.batch_size <= c.data.samples


@pytest.mark.slow
@pytest.mark.parametrize('data', TWINS)
def test_a_step_of_every_twin_is_quick(data):
    "Its own objective, in its own precision, finite, under a second of one core."
    seen = set()
    for base in CONFIGS.values():
        c = twin(base, data)
        key = (c.flow, c.align, c.joint, c.optim.batch_size, c.system.checkpoint)
        if key in seen: continue
        seen.add(key)
        model = model_of(c)
        objective, batch = objective_of(c, model), batch_of(c)
        for _ in range(2):
            start = time.process_time()
            with torch.autocast('cpu', torch.bfloat16, enabled=c.system.amp == 'bf16'): logs = objective(model, *batch)
        assert time.process_time() - start < 1 and bool(logs['loss'].isfinite()), c.name


# ---- printing

def test_the_listing_has_every_configuration_on_a_line():
    lines = C.listing().split('\n')
    assert [l.split()[0] for l in lines[1:1 + len(CONFIGS)]] == list(CONFIGS) and lines[1 + len(CONFIGS)] == ''
    assert 'H100 hours' in lines[0] and C.listing().endswith(C.LEGEND) and all(word in C.LEGEND for word in ('size ', 'H100 hours ', 'gFID', 'FID-4096'))
    line = next(l for l in lines if l.startswith('simflow-xxl-160-repa-e '))
    assert '1-1152-6-2..46' in line and '1.36B' in line and 'gFID guided 1.91 (Table 1)' in line
    assert C.listing([CONFIGS['rrepa-64']]).split('\n')[2:] == ['', *C.LEGEND.strip().split('\n')]


def test_a_page_says_what_is_not_printed_and_what_was_changed():
    page = C.describe(CONFIGS['simflow-xxl-repa-e'])
    assert 'hidden 2,048*' in page and 'align.hidden: three layers are said' in page and 'E1: Table 8 prints 36' in page and 'layers 2,2,2,2,2,46,' in page
    page = C.describe(override(CONFIGS['rrepa-64'], ['optim.lr=2e-4']), 'H100', 64)
    assert 'changed: optim.lr=2e-4' in page and 'warmup 1* epochs' in page and 'clip none* (largest gradient norm)' in page and 'drop 0.1* of the labels' in page and 'held_out 0.1' in page and 'on each of 64 GPUs' in page and 'GPU-hours on H100' in page
    assert 'too much for A100-40' in C.describe(CONFIGS['tarflow-64'], 'A100-40')
    for name in ALL: C.describe(find_config(name))


@pytest.mark.parametrize('n, text', [(999, '999'), (1000, '1k'), (999_999, '1M'), (4.4297e15, '4.43e15'), (5.66e14, '5.66e14'), (817_636_096, '818M'), (1_364_650_752, '1.36B'), (.5, '0.5'), (0, '0')])
def test_short(n, text): assert C.short(n) == text
