"""Chapter 13, what matters in SimFlow: what is measured, who is compared with whom, and that every verdict can come out both ways."""
import math

import pytest
import torch

from flowbook.data import load
from flowbook.evidence import EXPERIMENTS, as_json, find, load_result, refuse_nan, run, verdicts
from flowbook.simflow import DIGITS, MNIST, FlowNLL, judge_of, training
from flowbook.variants import (POSITIONS, ROWS, TINY, aligned_term, at_sigma, beta_at, channel_bits, fid_smaller, judge_position, judge_sigma, judge_variants, judge_width,
                               measured, moderate, smaller, swept, wide)

NAMES = 'simflow_variants', 'simflow_weight', 'simflow_sigma', 'simflow_width', 'simflow_position'
SMALL_VAE = {**DIGITS['vae'], 'latent_channels': 16, 'block_out_channels': (8, 8)}
SMALL = {**TINY, 'vae': SMALL_VAE, 'flow': {**TINY['flow'], 'dim': 16, 'head_dim': 8}, 'batch_size': 8}


# ---- every budget runs

@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_smoke(name, tmp_path):
    record, e = run(name, 'smoke', out=tmp_path), EXPERIMENTS[name]
    found = verdicts(record)
    assert set(found) == set(e.claims) and all(v.state == 'not judged' for v in found.values())       # one seed says nothing
    assert run(name, 'smoke', out=tmp_path / 'again')['runs'][0]['result'] == record['runs'][0]['result']


FEW = dict(rows=['fixed', 'frozen encoder, noise'], sigmas=['0.1', '0.5'], weights=[2.], widths=[8, 16], variants=['vae, fixed', 'fixed'], heavy=[], every=1, ws=[1.], noises=['0', '1'], batches=[1], long_batches=[], rounds=1,
           steps=1, samples=20, digits=20, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize('name', [*NAMES, 'simflow_collapse', 'simflow_guidance', 'simflow_robust', 'latent_two_step'])
def test_the_gpu_budget_runs_small_on_a_cpu(name, monkeypatch):
    e = find(name)
    c, latent = e.config['gpu'], name.startswith('latent')
    assert c['device'] == 'cuda' and c['steps'] > e.config['laptop']['steps'] and e.seeds['gpu'] >= 3 and (latent or c['data'] == 'mnist5k')
    small = {**c, 'device': 'cpu', **{k: v for k, v in FEW.items() if k in c}}
    if latent: small['model'] = {**c['model'], 'dim': 16, 'head_dim': 8}
    else: small |= {'vae': {**c['vae'], 'block_out_channels': [8, 8, 8]}, 'flow': {**c['flow'], 'dim': 16, 'head_dim': 8, 'layers': [1] * c['flow']['blocks']}}
    monkeypatch.setitem(e.config, 'gpu', as_json(small))
    refuse_nan(e.function(0, 'gpu'), name)


def test_pairs_of_the_gpu_budget_are_of_two_classes():
    c, test = find('simflow_robust').config['gpu'], load('mnist5k', 'test')
    y = test.batch([k * c['stride'] % len(test) for k in range(c['digits'])])[1]
    assert len(test) == c['digits'] == len(set(k * c['stride'] % len(test) for k in range(c['digits']))) and (y != y.roll(1)).float().mean() > .9


@pytest.mark.parametrize('name', NAMES)
def test_committed_results_are_of_these_configurations(name):
    record, e = load_result(name), EXPERIMENTS[name]
    assert record['configuration'] == e.config['laptop'] and len(record['runs']) >= 3
    assert set(verdicts(record)) == set(e.claims) and all(v.state != 'not judged' for v in verdicts(record).values())


# ---- what is measured

def test_measured():
    "Unguided figures do not depend on the grid of w; where 0 is best, the guided figures are the unguided ones; an exact decoder has no error."
    data, image = load('digits'), load('digits', 'test').batch(range(20))[0]
    for _, model in training(SMALL, data, 0, 2): pass
    reference = judge_of(data)
    one, two = (measured(model, image, reference, {**SMALL, 'ws': ws}, 0) for ws in ([1.], [.5, 3.]))
    assert {k: one[k] for k in ('fid', 'agreement', 'psnr', 'rfid')} == {k: two[k] for k in ('fid', 'agreement', 'psnr', 'rfid')}
    assert set(one['curve']) == {'0.0', '1.0'} and one['w'] == float(min(one['curve'], key=one['curve'].get)) and one['curve']['0.0'] != one['fid']
    alone = measured(model, image, reference, {**SMALL, 'ws': []}, 0)
    assert alone['w'] == 0 and alone['fid_guided'] == alone['fid'] and alone['agreement_guided'] == alone['agreement']
    assert measured(model, image, reference, SMALL, 1)['fid'] != one['fid']                # another seed, other samples
    model.decode = lambda x: image[:len(x)] if len(x) == len(image) else image[torch.arange(len(x)) % len(image)]
    exact = measured(model, image, reference, SMALL, 0)
    assert exact['rfid'] == pytest.approx(0, abs=1e-3) and exact['psnr'] == exact['psnr_mean'] > 60


def test_rows_share_their_batches_and_their_start():
    "The same row twice, and among others, is the same number."
    once = swept(SMALL, 3, {'a': at_sigma('0.5'), 'b': at_sigma('1'), 'c': {}})
    assert once['a'] == once['c'] != once['b']                                               # 0.5 is the default, 1 is not
    assert swept(SMALL, 3, {'b': at_sigma('1')})['b'] == once['b'] and once['b']['sigma'] == pytest.approx(1, rel=.1)


def test_width_and_beta():
    assert beta_at(64, pixels=3 * 256 * 256, n=256) == 12 and [beta_at(d, pixels=3 * 256**2, n=256) for d in (16, 32, 64, 128)] == [48, 24, 12, 6]       # E15
    assert beta_at(4, 4.) == beta_at(16) == beta_at(64, .25)
    c = wide(24)
    assert c['vae']['latent_channels'] == c['flow']['channels'] == 24 and DIGITS['flow']['channels'] == 64 and wide(8, MNIST)['flow']['image_size'] == 7
    record = EXPERIMENTS['simflow_width'].function(0, 'smoke')
    assert record['weight 1']['16'] == record['one beta']['16'] and record['weight 1']['8'] != record['one beta']['8'] and list(record['weight 1']) == ['8', '16', '24']


def test_channel_bits():
    assert channel_bits(1.) == .5 and channel_bits(.5) == pytest.approx(math.log2(5) / 2) and channel_bits(.5, 0.) == 0
    assert all(channel_bits(a) > channel_bits(b) for a, b in zip((.1, .25, .5), (.25, .5, 1.)))


# ---- the aligned term

def weights_after(c, term, seed=0):
    for _, model in training(c, load('digits'), seed, c['steps'], term): pass
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_alignment_stands_in_the_place_of_the_flows_term():
    "With weight 0 it is the plain training; with weight 1 encoder and projector learn from it, too."
    c = {**SMALL, 'flow': {**SMALL['flow'], 'blocks': 2, 'layers': (1, 1)}, 'how': {'layer': 1, 'lam': 0., 'hidden': 8, 'encoder': 'digits'}}
    plain = weights_after(c, None)
    assert torch.equal(plain, weights_after(c, FlowNLL())) and torch.allclose(plain, weights_after(c, aligned_term(c, 0, 2)), atol=1e-6)
    c = {**c, 'how': {**c['how'], 'lam': 1.}}
    term = aligned_term(c, 0, 2)
    before = term.projector.net[0].weight.clone()
    assert not torch.allclose(plain, weights_after(c, term), atol=1e-4) and not torch.equal(before, term.projector.net[0].weight)
    assert aligned_term(c, 0, None) is None
    a, b = aligned_term(c, 1, 1), aligned_term(c, 1, 2)
    assert torch.equal(a.projector.net[0].weight, b.projector.net[0].weight) and a.strategy.pairs != b.strategy.pairs


def test_a_vae_alone_keeps_its_prior():
    "The term replaces that of the flow; where there is none, nothing is replaced."
    c = {**SMALL, 'variant': 'vae, fixed'}
    assert torch.equal(weights_after(c, None), weights_after(c, FlowNLL()))


# ---- verdicts

def row(fid=50., psnr=20., spread=(.97, 1., 1.04), guided=None, best=None): # -> one row at each seed
    guided = fid / 2 if guided is None else guided
    return [{'fid': fid * s, 'fid_guided': guided * s, 'psnr': psnr * s**.1, 'curve': {'0.0': fid * s, '1.0': (guided if best is None else best) * s}} for s in spread]


def seeds(**rows): return [dict(zip(rows, r)) for r in zip(*rows.values())] # name -> row  ->  one dictionary a seed


def test_smaller():
    a, b = [10., 11., 9.], [20., 40., 30.]
    assert smaller(a, b, ('a', 'b')).state == 'seen' and smaller(b, a, ('b', 'a')).state == 'reversed' and smaller(a, [11., 10., 9.5], ('a', 'b')).state == 'not seen'
    assert smaller(a[:2], b[:2], ('a', 'b')).state == 'not judged'
    scaled = smaller([1e3 * v for v in a], [1e3 * v for v in b], ('a', 'b'))
    assert scaled.reason.split(':')[1] == smaller(a, b, ('a', 'b')).reason.split(':')[1] and '3 of 3 seeds agree' in scaled.reason      # a ratio has no unit
    assert 'a factor of 0.5' in smaller([5.] * 3, [10., 10., 10.], ('a', 'b')).reason
    assert '% of repetitions' in smaller(a, [11., 10., 9.5], ('a', 'b')).reason


def variants(**changed):
    fids = {'fixed': 20., 'fixed, no norm': 30., 'noise': 25., 'learned': 20., 'frozen encoder, noise': 80., 'frozen vae, fixed, norm': 60., 'frozen vae, fixed': 70., 'frozen vae, learned': 90.}
    return seeds(**{k: row(v) for k, v in {**fids, **changed}.items()})


@pytest.mark.parametrize('changed,s13,s16', [({}, 'seen', 'seen'), ({'noise': 19.5}, 'seen', 'seen'), ({'noise': 15.}, 'reversed', 'seen'), ({'frozen vae, learned': 10.}, 'reversed', 'seen'),
                                             ({'frozen vae, fixed, norm': 20.}, 'not seen', 'seen'), ({'frozen encoder, noise': 20.}, 'reversed', 'seen'),
                                             ({'fixed, no norm': 20.}, 'seen', 'not seen'), ({'fixed, no norm': 10.}, 'seen', 'reversed')])
def test_judge_variants(changed, s13, s16):
    results = variants(**changed)
    if 'not seen' in (s13, s16):                                                             # equal at the mean, and not seed by seed
        for k in changed: results = [{**r, k: {**r[k], 'fid': r[k]['fid'] * s}} for r, s in zip(results, (1.1, .9, 1.02))]
    v = judge_variants(results)
    assert (v['S13'].state, v['S16'].state) == (s13, s16) and 'not judged' in v['S16'].reason
    assert set(ROWS) == set(results[0])


def sigmas(**changed):
    guided = {'0.1': 30., '0.25': 22., '0.5': 20., '0.75': 19., '1': 25.}
    return seeds(**{k: row(2 * v, guided=v, psnr=22 - float(k)) for k, v in {**guided, **changed}.items()})


def test_judge_sigma():
    assert judge_sigma(sigmas())['S11'].state == 'seen'
    assert judge_sigma(sigmas(**{'1': 10.}))['S11'].state == 'reversed' and judge_sigma(sigmas(**{'0.1': 5.}))['S11'].state == 'reversed'
    wide_ = [{**r, '1': {**r['1'], 'fid_guided': r['0.75']['fid_guided'] * s}} for r, s in zip(sigmas(), (1.2, .9, 1.))]
    v = judge_sigma(wide_)['S11']
    assert v.state == 'not seen' and 'of repetitions' in v.reason and 'lowest at sigma 0.75, 0.75, 0.75' in v.reason


def test_moderate_looks_at_the_choice_alone():
    "What is chosen is chosen by the samples for choosing, never by those it is judged on."
    results = seeds(**{'0.5': row(40., guided=10., best=20.), '0.75': row(40., guided=30., best=15.)})
    assert moderate(results, ('0.5', '0.75')) == [r['0.75']['fid_guided'] for r in results] and moderate(results, ('0.5',)) == [r['0.5']['fid_guided'] for r in results]


def widths(guided, psnrs):
    half = seeds(**{k: row(2 * v, guided=v, psnr=p) for (k, v), p in zip(guided.items(), psnrs)})
    return [{'weight 1': r, 'one beta': r} for r in half]


def test_judge_width():
    good = {'8': 60., '16': 30., '32': 28., '64': 45.}
    assert judge_width(widths(good, (14, 17, 19, 21)))['S10'].state == 'seen'
    assert judge_width(widths({**good, '64': 10.}, (14, 17, 19, 21)))['S10'].state == 'reversed'
    assert judge_width(widths(good, (14, 17, 19, 15)))['S10'].state == 'reversed'                # PSNR falls at the end
    assert 'lowest at width 32, 32, 32' in judge_width(widths(good, (14, 17, 19, 21)))['S10'].reason


def positions(**changed):
    rows = {'none': (30., 20.), 'first': (35., 19.), 'middle': (20., 20.5), 'last': (33., 20.)} | changed
    return seeds(**{k: row(2 * v, guided=v, psnr=p) for k, (v, p) in rows.items()})


def test_judge_position():
    assert judge_position(positions())['S15'].state == 'seen' and set(positions()[0]) == set(POSITIONS)
    for k in ('none', 'first', 'last'): assert judge_position(positions(**{k: (10., 20.)}))['S15'].state == 'reversed'
    noisy = [{**r, 'none': {**r['none'], 'fid_guided': r['middle']['fid_guided'] * s}} for r, s in zip(positions(), (1.2, .9, 1.))]
    assert judge_position(noisy)['S15'].state == 'not seen'


def test_fid_smaller():
    results = seeds(a=row(20., guided=40.), b=row(30., guided=20.))
    assert fid_smaller(results, 'a', 'b').state == 'seen' and fid_smaller(results, 'a', 'b', 'fid_guided').state == 'reversed'
    assert fid_smaller(results, 'b', 'a', share=2.).state == 'seen' and fid_smaller(results, 'b', 'a').state == 'reversed'
