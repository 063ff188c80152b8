"""Classification: the gradient against differences, the argmax against its derivation, Bayes against enumeration, every refusal."""
import math

import pytest
import torch

from flowbook.classify import (Reliability, all_layers, ascend, bayes, class_gradient, class_log_probs, classify, first_order, judge_classification, layer_features,
                               linear_probe, noisy, reliability, value_and_gradient)
from flowbook.data import InMemory, load
from flowbook.evidence import EXPERIMENTS
from flowbook.flows import MAF, Flow, OnImages, RealNVP, shake
from flowbook.tarflow import TarFlow


def tarflow(classes=3, layers=2, **kw): return shake(TarFlow(4, 1, 2, 16, 3, layers, 8, classes=classes, **kw)).eval()


def on_images(make, classes=3): return OnImages(shake(make(16, 16, blocks=2, classes=classes)), (1, 4, 4))


FLOWS = {'nvp': lambda k=3: tarflow(k), 'vp': lambda k=3: tarflow(k, kind='vp'), 'coupling': lambda k=3: tarflow(k, kind='coupling'),
         'deep-shallow': lambda k=3: tarflow(k, layers=(1, 1, 3)), 'MAF': lambda k=3: on_images(MAF, k), 'RealNVP': lambda k=3: on_images(RealNVP, k)}
every_flow = pytest.mark.parametrize('kind', FLOWS)


def samples(b=5, dtype=torch.float32): return torch.randn(b, 1, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


@every_flow
@pytest.mark.parametrize('start', ['zero', 'elsewhere'])
def test_the_gradient_is_that_of_finite_differences(kind, start):
    f, x = FLOWS[kind]().double(), samples(3, torch.float64)
    at = torch.zeros(3, 3, dtype=torch.float64) if start == 'zero' else torch.randn(3, 3, dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        log_p = lambda lam: f.log_prob(x, lam.softmax(1))
        want = torch.stack([(log_p(at + h * e) - log_p(at - h * e)) / (2 * h) for e in torch.eye(3, dtype=torch.float64)], 1)
    value, got = value_and_gradient(f, x, None if start == 'zero' else at)
    assert got.dtype == torch.float64 and got.abs().max() > 1e-3
    assert (got - want).abs().max() < 1e-7 and (value - log_p(at)).abs().max() < 1e-10
    assert got.sum(1).abs().max() < 1e-10                    # a softmax does not feel a constant


def per_class_slope(f, x):
    "v = E . dL/de, summed over every embedding of the flow, with a hook on their outputs."
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append((m, out))) for m in f.modules() if type(m).__name__ == 'ClassEmbedding']
    log_p = f.log_prob(x, torch.full((len(x), f.classes), 1 / f.classes, dtype=x.dtype))
    for h in hooks: h.remove()
    grads = torch.autograd.grad(log_p.sum(), [e for _, e in seen])
    return sum(g @ m.weight.T for (m, _), g in zip(seen, grads)).detach()


@every_flow
@pytest.mark.parametrize('k', [2, 3, 7])
def test_its_largest_entry_is_that_of_the_chain_rule(kind, k):
    f, x = FLOWS[kind](k).double(), samples(8, torch.float64)
    v, g = per_class_slope(f, x), class_gradient(f, x)
    assert (g - (v - v.mean(1, keepdim=True)) / k).abs().max() < 1e-10
    assert torch.equal(classify(f, x), v.argmax(1)) and torch.equal(first_order(f, x).argmax(1), v.argmax(1))


@pytest.mark.parametrize('kind', ['nvp', 'vp', 'coupling', 'MAF'])
def test_uniform_weights_are_the_unconditional_model(kind):
    f, x = FLOWS[kind]().double(), samples(4, torch.float64)
    assert (value_and_gradient(f, x)[0] - f.log_prob(x)).abs().max() < 1e-12


def test_one_gradient_is_bayes_where_log_p_is_linear_in_the_class_vector():
    class Linear(Flow):                                      # log p(x | e) = log N(x) + e . x: no density, but linear
        classes = 4
        def __init__(self): super().__init__(); self.weight = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        def forward(self, x, y=None):
            w = torch.nn.functional.one_hot(y, 4).to(x) if not y.is_floating_point() else y
            return x, ((w @ self.weight) * x).sum(1)
    f, x = Linear(), torch.randn(20, 6, dtype=torch.float64)
    assert (first_order(f, x) - bayes(f, x)).abs().max() < 1e-12 and torch.equal(classify(f, x), bayes(f, x).argmax(1))


@every_flow
def test_bayes_is_the_enumeration(kind):
    f, x = FLOWS[kind]().double(), samples(5, torch.float64)
    with torch.no_grad(): p = torch.stack([f.log_prob(x, torch.full((5,), k)).exp() for k in range(3)], 1)
    prior = torch.tensor([.2, .5, .3], dtype=torch.float64)
    assert (bayes(f, x) - p / p.sum(1, keepdim=True)).abs().max() < 1e-10
    assert (bayes(f, x, prior) - p * prior / (p * prior).sum(1, keepdim=True)).abs().max() < 1e-10
    assert (bayes(f, x, (7 * prior).tolist()) - bayes(f, x, prior)).abs().max() < 1e-12     # weights, whatever their sum
    assert (bayes(f, x).sum(1) - 1).abs().max() < 1e-12 and not bayes(f, x).requires_grad


def test_log_probs_of_large_images_do_not_overflow():
    f = tarflow(kind='vp')                                   # nothing is scaled: it stays finite so far out
    x = 100 * samples(3)                                     # log p of about -1e5 nats
    p = bayes(f, x)
    assert class_log_probs(f, x).min() < -1e4 and p.isfinite().all() and (p.sum(1) - 1).abs().max() < 1e-5


@every_flow
@pytest.mark.parametrize('call', [classify, lambda *a, **k: classify(*a, steps=4, lr=.3, patience=1, **k), bayes, first_order, class_log_probs])
def test_the_batch_size_does_not_matter(kind, call):
    f, x = FLOWS[kind]().double(), samples(7, torch.float64)
    assert torch.allclose(call(f, x, batch_size=2), call(f, x), rtol=0, atol=1e-10)
    assert torch.allclose(call(f, x[3:4]), call(f, x)[3:4], rtol=0, atol=1e-10)


@every_flow
@pytest.mark.parametrize('outside', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_it_leaves_no_trace_and_works_in_every_context(kind, outside):
    f, x = FLOWS[kind](), samples(4)
    f.train()
    some = next(f.parameters()); some.requires_grad_(False)
    before = [(p.requires_grad, p.clone()) for p in f.parameters()]
    want = classify(f, x), bayes(f, x)
    with outside():
        inside = samples(4)                                  # under inference_mode an inference tensor
        got = classify(f, inside, batch_size=3), bayes(f, inside)
        grad = class_gradient(f, inside)
        several = classify(f, inside, steps=3, lr=.1, patience=1)
    assert torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1], rtol=0, atol=1e-6)
    assert got[0].dtype == torch.int64 and several.shape == (4,) and not grad.requires_grad
    assert f.training and all(p.grad is None for p in f.parameters()) and x.grad is None
    assert all(p.requires_grad == r and torch.equal(p, v) for p, (r, v) in zip(f.parameters(), before))


def test_an_empty_batch_is_an_empty_answer():
    f = tarflow()
    assert classify(f, samples(0)).shape == (0,) and bayes(f, samples(0)).shape == (0, 3)


def test_steps_climb_and_the_first_is_algorithm_1():
    f, x = tarflow().double(), samples(6, torch.float64)
    stages = list(ascend(f, x, steps=30, lr=.02))
    log_p = torch.stack([s.log_p for s in stages])           # (30, b)
    assert (log_p.diff(dim=0) > -1e-9).all() and (log_p[-1] > log_p[0]).all()
    assert torch.equal(stages[0].logits.argmax(1), classify(f, x)) and [s.step for s in stages] == list(range(1, 31))
    assert (stages[0].logits - .02 * class_gradient(f, x)).abs().max() < 1e-12
    assert torch.equal(classify(f, x, steps=30, lr=.02), stages[-1].logits.argmax(1))
    assert torch.equal(classify(f, x, lr=.001), classify(f, x, lr=100.))                    # one step: any lr


def test_patience_stops_samples_one_by_one():
    f, x = tarflow().double(), samples(12, torch.float64)
    full, never = list(ascend(f, x, 8, .3)), list(ascend(f, x, 8, .3, patience=99))
    assert torch.equal(full[-1].logits, never[-1].logits)    # never triggered: as without
    early = list(ascend(f, x, 8, .3, patience=2))
    assert len(early[-1].live) < 12 and len(early) >= 3
    classes = torch.stack([s.logits.argmax(1) for s in full])           # (8, b)
    for i in range(12):                                      # a sample follows the full path until its class stood still twice
        same, stop = 0, 8
        for s in range(1, 8):
            same = same + 1 if classes[s, i] == classes[s - 1, i] else 0
            if same >= 2: stop = s + 1; break
        assert (early[-1].logits[i] - full[stop - 1].logits[i]).abs().max() < 1e-12
    assert len(list(ascend(f, x[:1], 50, 1e-6, patience=1))) == 2       # everybody stopped: no step more


def test_a_stage_is_not_changed_by_the_next_step():
    stages = ascend(tarflow(), samples(), 3, .1)
    first = next(stages); kept = first.logits.clone(), first.log_p.clone()
    list(stages)
    assert torch.equal(first.logits, kept[0]) and torch.equal(first.log_p, kept[1])


def test_bf16_and_float64_flows_classify():
    assert classify(tarflow().bfloat16(), samples().bfloat16()).shape == (5,)
    assert bayes(tarflow().double(), samples().double()).dtype == torch.float64


def test_the_shipped_checkpoint_reads_digits():
    f, (x, y) = TarFlow.from_pretrained('digits-0.1'), noisy(load('digits', 'test'), .1)
    x, y = x[:200], y[:200]
    one, exact = (classify(f, x) == y).float().mean(), (bayes(f, x).argmax(1) == y).float().mean()
    assert one > .8 and exact > .95


def test_reliability_by_hand():
    p = torch.tensor([[.95, .05], [.93, .07], [.4, .6], [.35, .65]])
    r = reliability(p, torch.tensor([0, 1, 1, 1]), bins=10)
    assert isinstance(r, Reliability) and torch.allclose(r.confidence, torch.tensor([.625, .94]).double()) and r.accuracy.tolist() == [1., .5]
    assert r.share.tolist() == [.5, .5] and abs(r.error - .5 * (.375 + .44)) < 1e-6
    assert reliability(torch.eye(3), torch.arange(3)).error == 0           # a confidence of 1 is in the last bin


def test_reliability_of_a_calibrated_posterior_is_small():
    p = torch.rand(20_000, 5).softmax(1)
    y = torch.multinomial(p, 1)[:, 0]
    assert reliability(p, y).error < .02 < reliability((3 * p.log()).softmax(1), y).error


def planted(n=120, levels=256):
    "Images whose label is in one pixel, the others noise."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    images = torch.randint(0, levels, (n, 1, 4, 4), generator=g, dtype=torch.uint8)
    images[:, 0, 1, 1] = (y * 100 + 20).to(torch.uint8)
    return InMemory(images[:n // 2], y[:n // 2], ('a', 'b', 'c'), levels), InMemory(images[n // 2:], y[n // 2:], ('a', 'b', 'c'), levels)


@pytest.mark.parametrize('kind', ['nvp', 'vp', 'coupling', 'deep-shallow'])
def test_a_probe_finds_a_planted_feature(kind):
    f, (train, test) = FLOWS[kind](), planted()
    with torch.no_grad():                                    # block 1, layer 1 shows that pixel in one of its channels
        f.blocks[0].proj_in.weight[0] = 0; f.blocks[0].proj_in.weight[0, -2 if kind == 'coupling' else -1] = 8.
    score = linear_probe(f, train, test, sigma=0.)
    assert list(score) == all_layers(f) and all(type(v) is float for v in score.values())
    if kind != 'coupling': assert score[1, 1] > .9
    wrong = InMemory(train.images, train.labels[torch.randperm(60)], train.classes)
    assert linear_probe(f, wrong, test, [(1, 1)], sigma=0.)[1, 1] < .7
    assert linear_probe(f, train, test, [(2, 1)], sigma=0., batch_size=7) == {(2, 1): score[2, 1]}
    assert all(p.grad is None for p in f.parameters())


@pytest.mark.parametrize('kind', ['nvp', 'vp', 'coupling', 'deep-shallow'])
def test_features_are_those_of_the_flows_own_walk(kind):
    f, x, seen = FLOWS[kind]().double(), samples(dtype=torch.float64), []
    hooks = [l.register_forward_hook(lambda m, a, out: seen.append(out)) for b in f.blocks for l in b.layers]
    with torch.no_grad(): f(x)
    walk, seen[:] = list(seen), []
    got = layer_features(f, x, all_layers(f))
    for h in hooks: h.remove()
    for key, own, mine in zip(all_layers(f), walk, seen, strict=True):         # the flow itself leaves the last position out
        assert mine.shape == (5, 4, 16) and (mine[:, :own.shape[1]] - own).abs().max() < 1e-12
        assert (got[key] - mine.mean(1)).abs().max() < 1e-12
    assert (layer_features(f, x, [(2, 1)])[2, 1] - got[2, 1]).abs().max() < 1e-12


def test_noise_is_keyed():
    data = load('digits', 'test')
    a, b, c = noisy(data, .1, 1)[0], noisy(data, .1, 1)[0], noisy(data, .1, 2)[0]
    clean = data.batch(range(len(data)))[0]
    assert torch.equal(a, b) and not torch.equal(a, c) and abs((a - clean).std().item() - .1) < .005


def test_the_verdict_has_both_halves():
    r = lambda one, many: {'one': one, 'steps': {'1': [one, many]}}
    assert judge_classification([r(.9, .9 + .001 * s) for s in range(5)])['R1'].state == 'seen'
    assert judge_classification([r(.9, .95 + .001 * s) for s in range(5)])['R1'].state == 'reversed'
    assert judge_classification([r(.3, .3 + .001 * s) for s in range(5)])['R1'].state == 'reversed'
    assert judge_classification([r(.9, .9)])['R1'].state == 'not judged'


F, X = tarflow(), samples()
P = torch.full((2, 2), .5)
REFUSED = {
    'no classes': (lambda: classify(tarflow(0), X), 'flow: it has no classes'),
    'no classes, bayes': (lambda: bayes(tarflow(0), X), 'flow: it has no classes'),
    'no classes, gradient': (lambda: class_gradient(tarflow(0), X), 'flow: it has no classes'),
    'no classes, first order': (lambda: first_order(tarflow(0), X), 'flow: it has no classes'),
    'integers': (lambda: classify(F, X.long()), 'x: torch.int64'),
    'a list': (lambda: bayes(F, [1.]), 'x: list'),
    'one number': (lambda: classify(F, torch.tensor(1.)), r'x: torch.float32 of shape \(\)'),
    'shape': (lambda: classify(F, X[..., :3]), r'x: shape \(5, 1, 4, 3\)'),
    'shape, bayes': (lambda: bayes(F, X[:, 0]), r'x: shape'),
    'NaN': (lambda: classify(F, X / 0 * 0), 'x: 80 of 80 numbers are NaN'),
    'infinite log p': (lambda: bayes(F, X * 1e30), 'x: log p is not finite for 15 of 15'),
    'infinite log p, gradient': (lambda: classify(F, X * 1e30), 'x: log p is not finite for 5 of 5'),
    'logits, shape': (lambda: class_gradient(F, X, torch.zeros(5, 4)), r'logits: .*\(5, 4\) came; give finite floating point numbers \(5, 3\)'),
    'logits, integers': (lambda: class_gradient(F, X, torch.zeros(5, 3, dtype=torch.long)), 'logits: torch.int64'),
    'logits, infinite': (lambda: class_gradient(F, X, torch.full((5, 3), math.inf)), 'logits: .*finite'),
    'logits, a list': (lambda: class_gradient(F, X, [0.]), 'logits: list'),
    'steps': (lambda: classify(F, X, steps=0), 'steps: 0 came, must be a whole number, 1 or more'),
    'steps, half': (lambda: classify(F, X, steps=1.5), 'steps: 1.5'),
    'steps, bool': (lambda: ascend(F, X, steps=True), 'steps: True'),
    'lr': (lambda: classify(F, X, steps=2, lr=0.), 'lr: 0.0 came, must be a finite number, above 0'),
    'lr, NaN': (lambda: ascend(F, X, 2, math.nan), 'lr: nan'),
    'lr, text': (lambda: ascend(F, X, 2, 'fast'), "lr: 'fast'"),
    'patience': (lambda: classify(F, X, 2, patience=-1), 'patience: -1 came, must be a whole number, 0 or more'),
    'batch_size': (lambda: classify(F, X, batch_size=0), 'batch_size: 0'),
    'batch_size, bayes': (lambda: bayes(F, X, batch_size=0), 'batch_size: 0'),
    'batch_size, first order': (lambda: first_order(F, X, batch_size=-1), 'batch_size: -1'),
    'prior, length': (lambda: bayes(F, X, [.5, .5]), r'prior: shape \(2,\) came; this flow has 3 classes'),
    'prior, zero': (lambda: bayes(F, X, [.5, .5, 0.]), 'prior: .*above 0'),
    'prior, NaN': (lambda: bayes(F, X, [.5, math.nan, .5]), 'prior: .*finite'),
    'prior, infinite': (lambda: first_order(F, X, [.5, math.inf, .5]), 'prior: .*finite'),
    'prior, text': (lambda: bayes(F, X, 'uniform'), "prior: 'uniform' came; give 3 positive numbers"),
    'layers, none': (lambda: linear_probe(F, *planted(), [], 0.), 'layers: none came'),
    'layers, block': (lambda: linear_probe(F, *planted(), [(4, 1)], 0.), r'layers: \(4, 1\) came; .*up to \(3, 2\)'),
    'layers, from 0': (lambda: linear_probe(F, *planted(), [(0, 1)], 0.), r'layers: \(0, 1\)'),
    'layers, layer': (lambda: linear_probe(F, *planted(), [(1, 3)], 0.), r'layers: \(1, 3\)'),
    'layers, a number': (lambda: linear_probe(F, *planted(), [2], 0.), 'layers: 2 came; give pairs'),
    'probe, vectors': (lambda: linear_probe(on_images(MAF), *planted()), 'flow: OnImages came'),
    'probe, sigma unknown': (lambda: linear_probe(F, *planted()), 'sigma: None .*card does not know'),
    'probe, sigma': (lambda: linear_probe(F, *planted(), sigma=-1.), 'sigma: -1.0 came, must be the standard deviation'),
    'probe, one class': (lambda: linear_probe(F, InMemory(planted()[0].images, torch.zeros(60, dtype=torch.long), ('a', 'b', 'c')), planted()[1], [(1, 1)], 0.), 'train: all its labels'),
    'reliability, sum': (lambda: reliability(2 * P, torch.zeros(2).long()), 'p: .*sum 1'),
    'reliability, labels': (lambda: reliability(P, torch.zeros(3).long()), 'y: 3 labels came for 2 samples'),
    'reliability, bins': (lambda: reliability(P, torch.zeros(2).long(), 0), 'bins: 0'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_refused_by_name(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.slow
def test_the_gpu_budget_runs_when_shrunk():
    "What one GPU is to run, with fewer steps, digits and a narrower flow, on the CPU."
    e = EXPERIMENTS['classification']
    kept, e.config['gpu'] = e.config['gpu'], {**e.config['gpu'], 'device': 'cpu', 'steps': 2, 'every': 1, 'look_at': [1, 2], 'report': [1, 2], 'digits': 20, 'batch_size': 4,
                                              'model': {**e.config['gpu']['model'], 'dim': 16, 'head_dim': 8}}
    try: result = e.function(0, 'gpu')
    finally: e.config['gpu'] = kept
    assert kept['device'] == 'cuda' and kept['look_at'][-1] == kept['steps'] and all(s % kept['every'] == 0 for s in kept['look_at'])
    assert list(result['looks']) == ['1', '2'] and min(result['steps'], key=float) == '0.0013' == f"{1 / 28**2:.4f}"
    assert judge_classification([result])['R1'].state == 'not judged'
