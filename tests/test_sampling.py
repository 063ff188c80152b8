"""Every sampler against the naive one, and what a user may do to them: batch sizes, seeds, threads, hooks, broken samples."""
import json
import math
import threading
import warnings

import pytest
import torch
from torch import nn

from flowbook import sampling as S
from flowbook.data import unpatchify
from flowbook.flows import MAF
from flowbook.guidance import ClassGuidance, Guidance, StarGuidance, TemperatureGuidance
from flowbook.noise import is_broken
from flowbook.scripts import bench
from flowbook.tarflow import Layer, TarFlow

GUIDES = {'none': None, 'class': ClassGuidance(1.5), 'linear': ClassGuidance(2., 'linear'), 'temperature': TemperatureGuidance(1., 2.),
          'temperature, linear': TemperatureGuidance(1., .5, 'linear'), 'product': StarGuidance(1.), 'product, all blocks': StarGuidance(1., 'linear', True),
          'own schedule': ClassGuidance(1., lambda i, n: (i / n) ** 2)}
KINDS = {'nvp': {}, 'vp': dict(kind='vp'), 'coupling': dict(kind='coupling'), 'orders': dict(orders=[[3, 0, 2, 1, *range(4, 16)], 'forward', 'reverse']), 'one way': dict(orders='forward')}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shaken(*args, seed=0, scale=.1, **kw):
    torch.manual_seed(seed)
    flow = TarFlow(*(args or (8, 1, 2, 16, 3, (1, 2, 1), 8)), **{'classes': 5, **kw}).eval()
    with torch.no_grad():
        for p in flow.parameters(): p.add_(scale * torch.randn_like(p))
    return flow


def latents(flow, b, seed=1): return flow.draw(b, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('guide', GUIDES)
def test_every_sampler_equals_the_naive_one(kind, guide):
    flow, y, g = shaken(**KINDS[kind]).double(), torch.tensor([0, 3, -1, 4]), GUIDES[guide]
    z = latents(flow, 4).double()
    right = S.naive_inverse(flow, z, y, g)
    if kind != 'coupling': assert (S.textbook_inverse(flow, z, y, g) - right).abs().max() < 1e-10
    for solver in ('sequential', 'gauss-seidel', 'jacobi', 3, [1, 2, 16]):
        assert (S.invert(flow, z, y, g, solver, tol=1e-13) - right).abs().max() < 1e-10, solver
    assert (S.invert(flow, z, y, g, grad=True) - right).abs().max() < 1e-10


@pytest.mark.parametrize('y', [None, torch.tensor([-1, -1]), torch.tensor([[.2, .8, 0., 0., 0.], [.2] * 5])])
def test_labels_of_every_kind(y):
    flow = shaken().double()
    z = latents(flow, 2).double()
    for g in (None, TemperatureGuidance(1., 2.), *([ClassGuidance(1.)] if y is not None else [])):
        right = S.naive_inverse(flow, z, y, g)
        for solver in ('sequential', 'jacobi'): assert (S.invert(flow, z, y, g, solver, tol=1e-13) - right).abs().max() < 1e-10
    free = shaken(classes=0).double()
    for solver in ('sequential', 'jacobi', 'auto'):
        assert (S.invert(free, z, None, TemperatureGuidance(1., 2.), solver, tol=1e-13) - S.naive_inverse(free, z, None, TemperatureGuidance(1., 2.))).abs().max() < 1e-10


@pytest.mark.parametrize('size', [(2, 1, 2, 8, 2, 1, 8), (4, 1, 2, 8, 2, 1, 8), ((4, 8), 3, 4, 8, 1, 1, 4)])
def test_short_sequences(size):
    "One token, four, two: windows longer than the sequence, and nothing to do at all."
    flow = shaken(*size).double()
    z, y = latents(flow, 3).double(), torch.tensor([1, 2, 3])
    for g in (None, ClassGuidance(1.)):
        for solver in ('auto', 'sequential', 'gauss-seidel', 'jacobi', 100):
            assert (S.invert(flow, z, y, g, solver, tol=1e-13) - S.naive_inverse(flow, z, y, g)).abs().max() < 1e-10
    assert S.invert(flow, z[:0], y[:0]).shape == (0, *flow.image_shape)


@pytest.mark.parametrize('name', ['digits-0.05', 'digits-0.1', 'digits-0.4', 'digits-p1-0.1'])
@pytest.mark.parametrize('guide', ['none', 'class', 'linear', 'temperature', 'product'])
def test_trained_flows_in_float32(name, guide):
    flow, exact, y, g = TarFlow.from_pretrained(name), TarFlow.from_pretrained(name).double(), torch.arange(8) % 10, GUIDES[guide]
    z = latents(flow, 8)
    right = S.invert(exact, z.double(), y, g, 'sequential')
    for solver in ('sequential', 'gauss-seidel', 'jacobi', 'auto'): assert (S.invert(flow, z, y, g, solver, tol=1e-5) - right).abs().max() < 1e-4


@pytest.mark.parametrize('name,share', [('digits-p1-0.1', .4), ('mnist5k-p2', .15)])
def test_jacobi_needs_few_passes_on_trained_flows(name, share):
    flow = TarFlow.from_pretrained(next(p.name for p in S_folder().iterdir() if p.name.startswith(name)))
    exact, y = TarFlow.from_pretrained(next(p.name for p in S_folder().iterdir() if p.name.startswith(name))).double(), torch.arange(4)
    z, steps = latents(flow, 4), len(flow.blocks) * (flow.z_shape[0] - 1)
    stages = list(S.trajectory(flow, z, y, None, 'jacobi'))
    assert sum(s.passes for s in stages) <= share * steps
    right = S.invert(exact, z.double(), y, None, 'sequential')
    error = lambda x: (x - right).abs().flatten(1).amax(1)                     # (b,)
    found, own = error(unpatchify(stages[-1].tokens, flow.patch_size, flow.image_shape)), error(S.invert(flow, z, y, None, 'sequential'))
    assert found.median() < 1e-4 and found.max() < max(1e-4, 10 * own.max())   # float32 itself loses digits at 256 tokens
    assert error(S.invert(exact, z.double(), y, None, 'jacobi', tol=1e-6)).max() < 1e-4


def S_folder():
    from flowbook.flows import weights_folder
    return weights_folder()


def test_no_window_takes_more_passes_than_there_are_steps():
    flow = shaken(scale=.05).double()
    z, y = latents(flow, 4).double(), torch.tensor([0, 1, 2, 3])
    for window in (1, 2, 5, 15, 16, 99):
        for stage in S.trajectory(flow, z, y, ClassGuidance(1.), window, tol=0.):
            assert 1 <= stage.passes <= 15 and stage.passes <= stage.positions
        right = S.naive_inverse(flow, z, y, ClassGuidance(1.))
        assert (unpatchify(stage.tokens, 2, flow.image_shape) - right).abs().max() / right.abs().max() < 1e-10


def test_a_token_is_final_when_those_before_it_stand_still():
    "A network whose output at i is x at i - 1, so that one more token is right after each pass, and nothing else moves."
    class Chain:
        def window(self, x, start): return x, torch.zeros_like(x)
    z = torch.ones(6, 1, 1, dtype=torch.float64)
    seen = []
    x, passes, positions = S.slide(Chain(), z, 3, 1e-9, watch=lambda x, a: seen.append(a))
    assert torch.equal(x[:, 0, 0], torch.arange(1., 7.).double()) and seen == sorted(seen) and seen[-1] == 6 and passes == len(seen) <= 5


def test_one_broken_sample_does_not_stop_the_others_from_converging():
    flow = TarFlow.from_pretrained('digits-p1-0.1')
    z, y = latents(flow, 4), torch.arange(4)
    alone = S.invert(flow, z[1:], y[1:], None, 'jacobi')
    for bad in (math.nan, math.inf):
        z[0, 7] = bad
        for solver in ('jacobi', 'gauss-seidel', 'sequential'):
            x = S.invert(flow, z, y, None, solver)
            assert not x[0].isfinite().all() and (x[1:] - alone).abs().max() < 1e-4


def test_latents_are_not_written_to_and_results_are_ordinary_tensors():
    flow, y = shaken(), torch.tensor([1, 2])
    z = latents(flow, 2)
    before = z.clone()
    for solver in ('sequential', 'jacobi'):
        x = S.invert(flow, z, y, ClassGuidance(1.), solver)
        assert torch.equal(z, before) and not x.is_inference()
        (x.requires_grad_() * 2).sum().backward()
    for stage in S.trajectory(flow, z, y): assert not stage.tokens.is_inference() and stage.tokens.shape == z.shape
    assert flow.training is False and all(p.grad is None for p in flow.parameters())


def test_gradients_where_asked():
    flow, y = shaken().double(), torch.tensor([1, 2])
    a, b = (latents(flow, 2).double().requires_grad_() for _ in range(2))
    S.invert(flow, a, y, grad=True).square().sum().backward()
    flow.inverse(b, y).square().sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-12) and flow.blocks[0].proj_in.weight.grad is not None
    with pytest.raises(ValueError, match='grad=True'): S.invert(flow, a, y, grad=True, dtype=torch.bfloat16)


# ---------------------------------------------------------------------------
# what the fast step must not take on itself
def test_hooks_replaced_parts_and_other_layers_are_respected():
    y, calls = torch.tensor([1, 2]), []
    hooked = shaken().double()
    hooked.blocks[0].layers[0].attn.qkv.register_forward_hook(lambda m, a, out: calls.append(1) or out * 1.01)
    class Wide(Layer):
        def forward(self, x, c=None, **kw): return super().forward(x, c, **kw) + .1 * c[:, None]
    other = shaken().double()
    old = other.blocks[1].layers[0]
    other.blocks[1].layers[0] = Wide(16, 8).double()
    other.blocks[1].layers[0].load_state_dict(old.state_dict())
    class Scaled(nn.Linear):
        def forward(self, x): return 1.5 * super().forward(x)
    swapped = shaken().double()
    swapped.blocks[2].layers[0].mlp.up = Scaled(16, 64).double()
    for flow in (hooked, other, swapped):
        z = latents(flow, 2).double()
        for g in (None, ClassGuidance(1.), TemperatureGuidance(1., 2.)):
            right = S.naive_inverse(flow, z, y, g)
            for solver in ('sequential', 'jacobi', 5): assert (S.invert(flow, z, y, g, solver, tol=1e-13) - right).abs().max() < 1e-10
    assert calls


def test_a_rewritten_block_is_stepped_through_plainly():
    from flowbook.tarflow import TarBlock
    class Doubled(TarBlock):
        def split(self, out, like):
            mu, alpha = super().split(out, like)
            return 2 * mu, alpha
    flow = shaken().double()
    for block in flow.blocks: block.__class__ = Doubled
    z, y = latents(flow, 2).double(), torch.tensor([1, 2])
    for g in (None, ClassGuidance(1.)):
        for solver in ('sequential', 'jacobi', 'auto'): assert (S.invert(flow, z, y, g, solver) - S.naive_inverse(flow, z, y, g)).abs().max() < 1e-10


def test_one_model_serves_two_threads():
    flow, y = TarFlow.from_pretrained('digits-0.1'), torch.arange(4)
    draw = lambda seed, solver: S.sample(flow, y, ClassGuidance(1.), solver=solver, generator=torch.Generator().manual_seed(seed))
    alone, out = {s: draw(s, v) for s, v in enumerate(('sequential', 'jacobi'))}, {}
    def work(seed, solver):
        for _ in range(5): out[seed] = draw(seed, solver)
    threads = [threading.Thread(target=work, args=(s, v)) for s, v in enumerate(('sequential', 'jacobi'))]
    for t in threads: t.start()
    for t in threads: t.join()
    for s in alone: assert (out[s] - alone[s]).abs().max() < 1e-5


def test_the_step_that_a_gpu_records_is_the_same_step():
    flow = TarFlow.from_pretrained('digits-p1-0.1')
    z = latents(flow, 3).transpose(0, 1).contiguous()
    with torch.inference_mode():
        for t in (1, 2):
            for g in (Guidance(), *list(GUIDES.values())[1:]):
                make = lambda: S.Decoder(flow.blocks[t - 1], z, torch.arange(3), g, t, 4)
                assert (S.walk(make(), z) - S.walk_graph(make(), z, record=False)).abs().max() < 1e-4


def test_another_precision_keeps_the_tokens():
    flow, y = TarFlow.from_pretrained('digits-0.1'), torch.arange(4)
    z = latents(flow, 4)
    for solver in ('sequential', 'jacobi', 'auto'):
        x = S.invert(flow, z, y, ClassGuidance(1.), solver, 1e-2, torch.bfloat16)
        assert x.dtype == torch.float32 and 0 < (x - S.invert(flow, z, y, ClassGuidance(1.))).abs().max() < .3


def test_another_precision_leaves_a_hooked_layer_as_it_is():
    flow, y = TarFlow.from_pretrained('digits-0.1'), torch.arange(4)
    z, plain = latents(flow, 4), S.invert(flow, latents(flow, 4), y, solver='sequential', dtype=torch.bfloat16)
    seen = []
    flow.blocks[0].layers[0].mlp.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    x = S.invert(flow, z, y, solver='sequential', dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in flow.parameters()} == {torch.float32} and (x - plain).abs().max() < .1


# ---------------------------------------------------------------------------
# auto
def test_passes_are_kept_with_the_model(tmp_path, monkeypatch):
    flow = shaken(scale=.05)
    table = S.calibrate(flow, guidance=ClassGuidance(1.))
    assert len(table) == 3 and table[0]['1'] == [15, 15] and set(table[0]) == {'1', '4', '16'}
    S.calibrate(flow)
    assert set(flow.card['passes']) == {'plain', 'guided'} and TarFlow.card == {}
    flow.save_pretrained(tmp_path/'flow')
    again = TarFlow.from_pretrained(tmp_path/'flow')
    assert again.card['passes']['guided'] == table
    monkeypatch.setattr(S, 'count_passes', lambda *a, **k: pytest.fail('counted again'))
    assert (S.sample(again, 3, generator=torch.Generator().manual_seed(0)) - S.sample(flow, 3, solver='sequential', generator=torch.Generator().manual_seed(0))).abs().max() < 1e-4


def test_sampling_does_not_write_into_the_card(monkeypatch):
    flow, counts, real = shaken(), [], S.count_passes
    flow.card = {'sigma': .1}
    monkeypatch.setattr(S, 'count_passes', lambda *a, **k: counts.append(1) or real(*a, **k))
    for b in (2, 3): S.sample(flow, b, generator=torch.Generator().manual_seed(0))
    assert flow.card == {'sigma': .1} and counts == [1]                  # counted once, and remembered beside the flow


@pytest.mark.parametrize('quick', [1, 4, 16])
def test_auto_takes_the_quickest_and_measures_once(monkeypatch, quick):
    flow, seen = shaken(), []
    S.calibrate(flow)
    real = S.invert_block
    def watched(*args): seen.append(args[6]); return real(*args)
    monkeypatch.setattr(S, 'invert_block', watched)
    monkeypatch.setattr(S, 'predicted', lambda table, costs: {1: 1., 4: 1.1, 16: 1.2})
    def fake(run, like, repeats=3):
        before = len(seen)
        out = run()
        return (1. if len(seen) > before and seen[-1] == quick else 2.), out
    monkeypatch.setattr(S, 'timed', fake)
    assert S.windows_of(flow, 'auto', 2, None, Guidance(), 1e-5) == [quick] * 3
    count = len(seen)
    assert S.windows_of(flow, 'auto', 2, None, Guidance(), 1e-5) == [quick] * 3 and len(seen) == count
    S.windows_of(flow, 'auto', 3, None, Guidance(), 1e-5)
    assert len(seen) > count


def test_predicted_seconds_are_passes_times_price():
    out = S.predicted({'1': [15, 15], '4': [10, 40], '16': [3, 36]}, {1: 1., 4: 2., 15: 13.})
    assert out == pytest.approx({1: 15., 4: 20., 16: 3 * 10.})


# ---------------------------------------------------------------------------
# sample
@pytest.mark.parametrize('name', ['digits-0.1', 'digits-p1-0.1'])
def test_batch_size_and_solver_do_not_change_samples(name):
    flow, y = TarFlow.from_pretrained(name), torch.arange(10)
    draw = lambda **kw: S.sample(flow, y, ClassGuidance(1.), denoise=True, generator=torch.Generator().manual_seed(3), **kw)
    first = draw(solver='sequential')
    for kw in (dict(batch_size=1), dict(batch_size=3), dict(batch_size=10, solver='jacobi'), dict(batch_size=7, solver='gauss-seidel'), dict(batch_size=4, solver=5)):
        assert (draw(**kw) - first).abs().max() < 1e-4
    assert torch.equal(draw(solver='sequential'), first)
    assert (S.sample(flow, y, generator=torch.Generator().manual_seed(3)) - flow.sample(y, torch.Generator().manual_seed(3))).abs().max() < 1e-4


def test_odd_latents_do_not_depend_on_the_batch_size():
    "Three numbers a sample: torch.randn of many at once would give others than of each alone."
    flow = MAF(3, 8).eval()
    draw = lambda size: S.sample(flow, 20, generator=torch.Generator().manual_seed(0), batch_size=size)
    assert torch.allclose(draw(20), draw(1), atol=1e-6) and torch.allclose(draw(20), draw(7), atol=1e-6) and draw(20).shape == (20, 3)
    with pytest.raises(ValueError, match='no blocks'): S.sample(flow, 2, ClassGuidance(1.))


def test_numbers_labels_weights_and_nothing():
    flow = shaken(scale=.03)
    assert S.sample(flow, 0).shape == (0, 1, 8, 8)
    assert S.sample(flow, [1, 2, 3]).shape == (3, 1, 8, 8) and S.sample(flow, torch.full((2, 5), .2)).shape == (2, 1, 8, 8)
    assert torch.allclose(S.sample(flow, torch.full((2, 5), .2), generator=torch.Generator().manual_seed(0)),
                          S.sample(flow, 2, generator=torch.Generator().manual_seed(0)), atol=1e-5)      # uniform weights are the unconditional model
    assert [len(x) for x in S.samples(flow, 7, batch_size=3)] == [3, 3, 1]
    before = torch.random.get_rng_state()
    S.sample(flow, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_broken_samples_are_counted_kept_or_drawn_again():
    flow = TarFlow.from_pretrained('digits-0.1')
    with torch.no_grad(): flow.blocks[0].proj_out.weight.mul_(3.)
    y = torch.arange(30) % 10
    draw = lambda **kw: S.sample(flow, y, solver='sequential', generator=torch.Generator().manual_seed(0), **kw)
    with pytest.warns(UserWarning, match=r'of 30 samples are broken'): kept = draw()
    bad = is_broken(kept, flow.card['sigma'])
    assert 0 < bad.sum() < 30
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(draw(on_broken='keep'), kept)
        a, b = (draw(on_broken='redraw', batch_size=k) for k in (30, 7))
    assert not is_broken(a, flow.card['sigma']).any() and torch.equal(a[~bad], kept[~bad]) and (a - b).abs().max() < 1e-2
    with torch.no_grad(): flow.blocks[0].proj_out.bias.fill_(math.nan)
    with pytest.warns(UserWarning, match='30 of 30 samples are broken.*ten more draws'): draw(on_broken='redraw')


def test_progress_and_laziness(capsys):
    flow = shaken()
    stream = S.samples(flow, 10**12, batch_size=2, progress=True)                       # never all at once
    next(stream), next(stream)
    stream.close()
    assert 'samples' in capsys.readouterr().out


@pytest.mark.parametrize('bad,words', [
    (dict(y_or_n=-1), 'y_or_n'), (dict(y_or_n=True), 'y_or_n'), (dict(y_or_n=None), 'y_or_n'), (dict(y_or_n=2.), 'y_or_n'), (dict(y_or_n=[9]), '5 classes'),
    (dict(solver='newton'), "'jacobi'"), (dict(solver=0), 'solver'), (dict(solver=[1, 2]), '3 of them'), (dict(solver=True), 'solver'), (dict(tol=-1.), 'tol'), (dict(tol=math.nan), 'tol'),
    (dict(batch_size=0), 'batch_size'), (dict(batch_size=2.), 'batch_size'), (dict(on_broken='ignore'), "'redraw'"), (dict(denoise=True), 'card'), (dict(denoise=-1.), 'denoise'),
    (dict(denoise='0.1'), 'denoise'), (dict(guidance=1.), 'ClassGuidance'), (dict(guidance=ClassGuidance(1.)), 'needs labels'), (dict(dtype='bf16'), 'dtype'), (dict(dtype=torch.int32), 'dtype')])
def test_mistakes_are_named_at_once(bad, words):
    with pytest.raises(ValueError, match=words): S.samples(shaken(), **{'y_or_n': 2, **bad})


def test_latents_that_do_not_fit():
    flow = shaken()
    for z, words in ((torch.zeros(2, 3, 4), r'\(b, 16, 4\)'), (torch.zeros(2, 16, 4, dtype=torch.float64), 'float64'), ([1], 'list')):
        with pytest.raises(ValueError, match=words): S.invert(flow, z)
    with pytest.raises(ValueError, match='for 2 samples'): S.invert(flow, torch.zeros(2, 16, 4), torch.tensor([1]))
    with pytest.raises(ValueError, match='flow: Chain came, must be a BlockFlow'): S.trajectory(MAF(3, 8), torch.zeros(2, 3))


# ---------------------------------------------------------------------------
# memory and the benchmark
def test_memory_does_not_grow_with_the_number_of_samples():
    flow = TarFlow.from_pretrained('digits-p1-0.1')
    def drain(n):
        for x in S.samples(flow, n, solver='sequential', batch_size=8): del x
    few, many = (bench.peak_memory(lambda n=n: drain(n), 'cpu') for n in (16, 80))
    assert many < 1.1 * few


def test_guided_memory_against_the_textbook():
    flow, y, g = TarFlow.from_pretrained('digits-p1-0.1'), torch.arange(16) % 10, ClassGuidance(1.)
    z = latents(flow, 16)
    ours, textbook = (bench.peak_memory(run, 'cpu') for run in (lambda: S.invert(flow, z, y, g, 'sequential'), lambda: S.textbook_inverse(flow, z, y, g)))
    assert ours <= 1.3 * textbook


def test_bench_writes_ratios(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'TRAINING', ('8,1,2,32,2,1',))
    file = tmp_path/'out'/'bench.json'
    bench.main(['--models', 'digits-0.1', '--batch', '1', '--rounds', '2', '--naive', '--train', '4', '--json', str(file)])
    out = json.loads(file.read_text())
    assert {'device', 'versions', 'command', 'date', 'results'} <= set(out) and len(out['results']) == 3
    r = out['results'][1]
    assert r['guided'] and r['steps'] == 120 and r['samplers']['sequential']['passes'] == 120 and r['samplers']['textbook']['speed']['median'] == 1
    for s in bench.SOLVERS: assert r['samplers'][s]['error'] < 1e-4 and r['samplers'][s]['speed']['low'] <= r['samplers'][s]['speed']['median'] <= r['samplers'][s]['speed']['high']
    assert 'matrix rate' in capsys.readouterr().out
    for bad, words in ((['--batch', 'x'], '--batch'), (['--fresh', '8,1'], 'six numbers'), (['--models', 'nothing'], 'nothing'), (['--threads', '0'], '--threads')):
        with pytest.raises(ValueError, match=words): bench.main(bad)


def test_bench_tries_what_a_gpu_would_run():
    out = bench.main(['--fresh', '8,1,2,32,2,1', '--batch', '2', '--rounds', '1', '--dtype', 'bf16', '--tol', '1e-2'])
    assert all(math.isfinite(s['ms']) for r in out['results'] for s in r['samplers'].values())
