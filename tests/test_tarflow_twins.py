"""The ablations of TARFlow (T14, T15, T16): experiments run, and their verdicts can come out each way."""
import pytest

from flowbook.data import DATASETS, InMemory, load
from flowbook.evidence import EXPERIMENTS, refuse_nan, registry, run, verdicts
from flowbook.tarflow import by_shape, judge_shapes, judge_variants

registry()
SHAPES = '1x9', '3x3', '9x1', '3x1', '6x1', '3x2'


@pytest.mark.parametrize('name', ['tarflow_variants', 'shape_sweep'])
def test_the_smoke_budget_runs_and_one_seed_judges_nothing(name, tmp_path):
    record = run(name, 'smoke', out=tmp_path)
    assert set(verdicts(record)) == set(EXPERIMENTS[name].claims) and all(v.state == 'not judged' for v in verdicts(record).values())


TINY = {'device': 'cpu', 'steps': 2, 'samples': 20, 'batch_size': 8}


@pytest.mark.parametrize('name,less', [
    ('tarflow_variants', {'ws': [.5]}), ('shape_sweep', {'shapes': [[1, 2], [2, 1]]}), ('guidance_sweep', {'ws': [.5], 'taus': [2.]}),
    ('noise_sweep', {'noises': ['uniform', '0.1'], 'points': 1, 'looks': 2})])
@pytest.mark.slow
def test_the_gpu_budget_runs_when_it_is_made_small(name, less, monkeypatch):
    "The larger configuration through the same function, on the CPU: other images, other sizes."
    e = EXPERIMENTS[name]
    c = e.config['gpu']
    assert c['device'] == 'cuda' and c['data'] == 'mnist5k' and e.seeds['gpu'] >= 3
    whole = {split: load('mnist5k', split) for split in ('train', 'test')}
    few = {k: InMemory(d.images[:100], d.labels[:100], d.classes, d.levels) for k, d in whole.items()}
    monkeypatch.setitem(DATASETS, 'mnist5k', lambda split, *more: few[split])
    monkeypatch.setitem(e.config, 'gpu', {**c, **TINY, **less, 'model': {**c['model'], 'patch_size': 14, 'dim': 8, 'head_dim': 4, 'blocks': 2, 'layers': 1}})
    result = e.function(0, 'gpu')
    refuse_nan(result, name)
    if name == 'shape_sweep': assert result == e.function(0, 'gpu')                        # the seed is all there is to chance


def shapes(seed, fid=(), bits=()): # good for both claims, but for what is said
    fids = {'1x9': 200, '3x3': 20, '9x1': 30, '3x1': 90, '6x1': 60, '3x2': 50, **dict(fid)}
    loss = {'1x9': .2, '3x3': -.4, '9x1': -.3, '3x1': .1, '6x1': -.1, '3x2': -.2, **dict(bits)}
    return {k: {'fid_denoised': fids[k] + .1 * seed + .01 * (seed * i % 3), 'bits': loss[k] + .01 * seed + .001 * (seed * i % 3)} for i, k in enumerate(SHAPES)}


def judged(judge, make): return {c: v.state for c, v in judge([make(s) for s in range(5)]).items()}


def test_the_shapes_of_a_sweep_are_sorted_into_its_questions():
    assert by_shape([shapes(0)]) == ([(1, 9), (3, 3), (9, 1)], [(3, 1), (6, 1), (9, 1)], [(3, 1), (3, 2), (3, 3)])
    for b in ('smoke', 'laptop', 'gpu'):                       # every budget can answer both
        same, blocks, layers = by_shape([{f'{t}x{k}': 0 for t, k in EXPERIMENTS['shape_sweep'].config[b]['shapes']}])
        assert any(t == k for t, k in same) and same[0][0] == 1 and len(blocks) >= 3 and len(layers) >= 3
        assert {t * k for t, k in same} == {blocks[-1][0] * blocks[-1][1]} == {layers[-1][0] * layers[-1][1]}


def test_verdicts_on_shapes_come_out_each_way():
    assert judged(judge_shapes, shapes) == {'T14': 'seen', 'T15': 'seen'}
    for worse in ({'3x3': 300}, {'9x1': 10}, {'9x1': 250}):    # the square is not best; a chain of blocks is; one block is not the worst
        assert judged(judge_shapes, lambda s: shapes(s, fid=worse))['T14'] == 'reversed'
    assert judged(judge_shapes, lambda s: shapes(s, fid={'9x1': 20 + 30 * (-1)**s}))['T14'] == 'not seen'
    for kw in (dict(fid={'6x1': 95}), dict(fid={'3x2': 10}), dict(bits={'6x1': -.5}), dict(bits={'3x3': 0.}), dict(fid={'9x1': 70})):
        assert judged(judge_shapes, lambda s: shapes(s, **kw))['T15'] == 'reversed'      # one step up that does not help is enough
    assert 'FID at 3x3 2' in judge_shapes([shapes(s) for s in range(5)])['T14'].reason


def kinds(seed, **fid): return {k: {'unguided': fid.get(k, (30,))[0] + seed, 'guided': fid.get(k, (0, 9))[1] + seed % 2} for k in ('nvp', 'vp', 'coupling')}


def test_verdicts_on_variants_come_out_each_way():
    far = dict(nvp=(30, 9), vp=(90, 60), coupling=(60, 20))
    assert judged(judge_variants, lambda s: kinds(s, **far)) == {'T16': 'seen'}
    for k, other in (('vp', (20, 60)), ('vp', (90, 5)), ('coupling', (20, 20)), ('coupling', (60, 5))):    # every half counts
        assert judged(judge_variants, lambda s: kinds(s, **{**far, k: other})) == {'T16': 'reversed'}
    assert judged(judge_variants, lambda s: kinds(s, **{**far, 'vp': (30 + 20 * (-1)**s, 60)})) == {'T16': 'not seen'}
