"""Noise: the exact flow of noisy points, bits per dimension against exact probabilities, the condition of an inverse, and the checkpoints of the book."""
import json
import math

import pytest
import torch

from flowbook.data import InMemory, batches, load
from flowbook.flows import Chain, Flow, check_flow, weights_folder
from flowbook.noise import FLOWS, Dequantize, GaussianNoise, PointsFlow, bits_per_dim, condition, is_broken, train_flow
from flowbook.tarflow import TarFlow
from flowbook.train import mean_nll, to_bits


class Scale(Flow):
    "x ~ N(0, diag(s^2)): z = x / s."
    def __init__(self, s): super().__init__(); self.s = torch.nn.Parameter(s); self.z_shape = tuple(s.shape)
    def forward(self, x, y=None): return x / self.s, -self.s.log().sum().expand(len(x))
    def inverse(self, z, y=None): return z * self.s


@pytest.mark.parametrize('m,d,sigma', [(1, 1, 1.), (5, 1, .2), (30, 2, .4), (12, 5, .5), (40, 3, .15)])
def test_the_exact_flow_of_points(m, d, sigma):
    points = torch.randn(m, d, dtype=torch.float64)
    flow = PointsFlow(points, sigma)
    y = points[torch.randint(m, (6,))] + sigma * torch.randn(6, d, dtype=torch.float64)
    check_flow(flow, y)
    exact = (torch.distributions.Normal(points, sigma).log_prob(y[:, None]).sum(2)).logsumexp(1) - math.log(m)
    assert torch.allclose(flow.log_prob(y), exact, rtol=0, atol=1e-9)
    w = (-.5 * ((y[:, None] - points)**2).sum(2) / sigma**2).softmax(1)
    assert torch.allclose(flow.posterior_mean(y), w @ points)


def test_samples_of_the_exact_flow_are_data_plus_noise():
    points = torch.tensor([[-1., 0.], [1., 1.]], dtype=torch.float64)
    x = PointsFlow(points, .1).sample(4000, generator=torch.Generator().manual_seed(0))
    near = torch.cdist(x, points).argmin(1)
    assert abs(near.double().mean() - .5) < .03
    assert ((x - points[near]).std(0) - .1).abs().max() < .01


def test_bits_are_exact_for_a_known_probability():
    "A Gaussian over one pixel: the probability of a bin is known, many draws find it, one draw bounds it."
    levels, s = 4, .35
    flow = Scale(torch.tensor([[[s]]]).double())
    x = torch.tensor([-1., -1/3, 1/3, 1.]).view(4, 1, 1, 1).double()
    cdf = torch.distributions.Normal(0., s).cdf
    p = cdf(torch.linspace(-1, 1, 5)[1:]) - cdf(torch.linspace(-1, 1, 5)[:-1])
    exact = -p.log2().mean().item()
    one, many = bits_per_dim(flow, x.repeat(3000, 1, 1, 1), levels=levels), bits_per_dim(flow, x.repeat(10, 1, 1, 1), samples=3000, levels=levels)
    assert many == pytest.approx(exact, abs=.01) and one > exact + .01


def test_more_draws_are_tighter_and_a_dataset_brings_levels_and_labels():
    flow, data = TarFlow.from_pretrained('digits-0.05'), load('digits', 'test')
    bits = [bits_per_dim(flow, data, samples=k) for k in (1, 4, 16)]
    assert bits[0] > bits[1] > bits[2]
    x, y = data.batch(range(len(data)))
    assert bits_per_dim(flow, x, y, levels=17) == bits[0] and bits_per_dim(flow, x, y.flip(0), levels=17) != bits[0]
    assert bits[0] == pytest.approx(to_bits(mean_nll(flow, data, [Dequantize(17)]), 17), abs=.05)


@pytest.mark.parametrize('kw,says', [(dict(samples=0), '1 or more'), (dict(samples=1.5), '1 or more'), (dict(levels=None), 'levels: missing'), (dict(levels=16), 'between the 16 levels')])
def test_bits_refuse(kw, says):
    flow, x = TarFlow(8, 1, 2, 8, 1, 1, 8), load('digits').batch(range(4))[0]
    with pytest.raises(ValueError, match=says): bits_per_dim(flow, x, **{'levels': 17, **kw})
    with pytest.raises(ValueError, match='without noise'): bits_per_dim(flow, x + .01, levels=17)
    with pytest.raises(ValueError, match='or a dataset'): bits_per_dim(flow, x[0], levels=17)


def test_condition_of_a_linear_map_and_of_a_chain():
    s = torch.tensor([.1, 1., 5.]).double()
    largest, ratio = condition(Scale(s), torch.randn(4, 3).double())
    assert torch.allclose(largest, torch.tensor(5.).double().expand(4)) and torch.allclose(ratio, torch.tensor(50.).double().expand(4))
    assert torch.allclose(condition(Chain(Scale(s), Scale(1 / s)), torch.randn(2, 3).double())[1], torch.ones(2).double())


def test_broken_samples():
    x = torch.zeros(5, 1, 2, 2)
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[2, 0, 0, 0], x[3, 0, 0, 0] = math.nan, math.inf, 2.5, 1.9
    assert is_broken(x).tolist() == [True, True, True, False, False] and is_broken(x, sigma=.4).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize('make,says', [(lambda: PointsFlow(torch.zeros(3, 2), -1.), 'above 0'), (lambda: PointsFlow(torch.zeros(3), 1.), r'must be a tensor \(m, d\)'), (lambda: GaussianNoise(-.1), '0 or more'),
                                       (lambda: Dequantize(1), '2 or more'), (lambda: train_flow('digits-0.3'), 'must be one of')])
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_noise_transforms_compose_and_are_keyed():
    data = load('digits')
    both = [Dequantize(17), GaussianNoise(.05)]
    a, b = (next(batches(data, 50, seed=4, transforms=both)).x for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, next(batches(data, 50, seed=5, transforms=both)).x)


@pytest.mark.parametrize('name', FLOWS)
def test_the_checkpoints_of_the_book(name):
    "Small, described by their cards, and as good as their cards say."
    folder, c = weights_folder()/name, FLOWS[name]
    limit = 8e6 if c['data'] == 'mnist5k' else 2e6
    assert (folder/'model.safetensors').stat().st_size < limit
    card = json.loads((folder/'card.json').read_text())
    assert card['command'] == f'flowbook_remake {name} --seed 0' and card['sigma'] == c['sigma'] and card['steps'] == c['steps']
    flow, data = TarFlow.from_pretrained(name), load(c['data'], 'test', image_size=c['model']['image_size'])
    assert flow.classes == c['classes'] and {k: flow.config[k] for k in c['model']} == c['model']
    half = InMemory(data.images[:200], data.labels[:200], data.classes, data.levels)
    assert to_bits(mean_nll(flow, half, [GaussianNoise(c['sigma'])])) == pytest.approx(card['test_bits_per_dim'], abs=.06)
    x = flow.sample(torch.arange(10) if flow.classes else 10, generator=torch.Generator().manual_seed(0))
    assert not is_broken(x, c['sigma']).any()


@pytest.mark.parametrize('dtype,far', [(torch.float64, 20.), (torch.float32, 8.)])
def test_the_exact_flow_keeps_its_digits_in_the_tails(dtype, far):
    flow = PointsFlow(torch.zeros(1, 1, dtype=dtype), 1.)
    x = torch.tensor([[-far], [-5.], [5.], [far]], dtype=dtype)
    z, logdet = flow(x)
    assert torch.allclose(z, x, rtol=1e-4) and torch.allclose(flow.log_prob(x), torch.distributions.Normal(0., 1.).log_prob(x)[:, 0], rtol=1e-4)
    assert torch.allclose(flow.inverse(x), x, rtol=1e-4)


def test_condition_under_no_grad_and_of_a_flow_that_overflows():
    s = torch.tensor([.5, 2.]).double()
    with torch.inference_mode(): assert condition(Scale(s), torch.randn(2, 2).double())[1].tolist() == pytest.approx([4, 4])
    x = torch.tensor([[1., 1.], [math.nan, 1.]]).double()
    class Square(Scale):
        def forward(self, x, y=None): return x**2, x.new_zeros(len(x))
    assert condition(Square(s), x)[1].tolist() == [1., math.inf]
