"""Every flow of the book goes through the one shared proof, in float64 and in float32."""
import itertools

import pytest
import torch

from flowbook.flows import MAF, OnImages, RealNVP, check_flow, shake
from flowbook.tarflow import TarFlow

VECTORS = {'coupling': lambda k: RealNVP(6, blocks=3, classes=k), 'MAF': lambda k: MAF(6, blocks=3, classes=k), 'MAF, one number': lambda k: MAF(1, blocks=2, classes=k)}


@pytest.mark.parametrize('name', VECTORS)
@pytest.mark.parametrize('classes', [0, 4])
def test_vector_flows(name, classes):
    flow = shake(VECTORS[name](classes))
    x = torch.randn(5, *flow.z_shape)
    y = torch.tensor([0, 3, -1, 1, 2]) if classes else None
    check_flow(flow, x, y)
    flow.double()
    for labels in ([None, y, torch.rand(5, 4, dtype=torch.float64).softmax(1)] if classes else [None]): check_flow(flow, x.double(), labels)


@pytest.mark.parametrize('kind,T,K,orders', list(itertools.product(['nvp', 'vp', 'coupling'], [1, 2, 3], [1, 2], ['alternate', 'forward', 'reverse'])))
def test_tarflow(kind, T, K, orders):
    flow = shake(TarFlow(6, 2, 3, 16, T, K, 8, classes=3, kind=kind, orders=orders))
    x, y = torch.randn(4, 2, 6, 6), torch.tensor([0, 2, -1, 1])
    check_flow(flow, x, y)
    check_flow(flow.double(), x.double(), y)


@pytest.mark.parametrize('kind', ['nvp', 'vp', 'coupling'])
def test_sizes(kind):
    for args in (((4, 6), 3, 2, 8, 2, 1, 8), (4, 1, 4, 8, 2, 1, 4), (2, 5, 1, 8, 3, (1, 2, 1), 8)):
        flow = shake(TarFlow(*args, kind=kind, orders=['forward', 'reverse', 'reverse'][:args[4]])).double()
        c, h, w = flow.image_shape
        check_flow(flow, torch.randn(3, c, h, w, dtype=torch.float64))


def test_random_orders():
    g = torch.Generator().manual_seed(0)
    flow = shake(TarFlow(6, 1, 2, 16, 3, 1, 8, orders=[torch.randperm(9, generator=g).tolist() for _ in range(3)])).double()
    check_flow(flow, torch.randn(2, 1, 6, 6, dtype=torch.float64))


def test_images_wrapper():
    flow = shake(OnImages(MAF(12, hidden=16, blocks=2, classes=2), (3, 2, 2))).double()
    check_flow(flow, torch.randn(3, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, -1]))


def test_batches_of_zero_and_one():
    for flow in (MAF(4), RealNVP(4), TarFlow(4, 1, 2, 16, 2, 1, 8)):
        for b in (0, 1):
            x = torch.randn(b, *getattr(flow, 'image_shape', (4,)))
            z, logdet = flow(x)
            assert flow.inverse(z).shape == x.shape and logdet.shape == (b,) and flow.log_prob(x).shape == (b,)
            assert flow.sample(b).shape == x.shape


def test_labels_mean_what_they_say():
    "None, -1, and uniform class weights are the same model; a label is its one-hot row."
    flow = shake(TarFlow(4, 1, 2, 16, 2, 1, 8, classes=3)).double()
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    none = flow.log_prob(x)
    assert torch.equal(none, flow.log_prob(x, torch.full((5,), -1)))
    assert torch.allclose(none, flow.log_prob(x, torch.full((5, 3), 1 / 3, dtype=torch.float64)), atol=1e-12)
    y = torch.tensor([0, 1, 2, 1, 0])
    assert torch.allclose(flow.log_prob(x, y), flow.log_prob(x, torch.eye(3, dtype=torch.float64)[y]), atol=1e-12)
    assert not torch.allclose(none, flow.log_prob(x, y))


def test_sampling_is_repeatable_and_independent_of_its_batch():
    flow = shake(TarFlow(4, 1, 2, 16, 2, 1, 8, classes=3)).double()
    y = torch.tensor([0, 1, 2, 1])
    draw = lambda: flow.sample(y, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw(), draw())
    z = flow.draw(4, torch.Generator().manual_seed(5))
    alone = torch.cat([flow.inverse(z[i:i + 1], y[i:i + 1]) for i in range(4)])
    assert (alone - draw()).abs().max() < 1e-12


def test_a_wrong_flow_is_caught():
    class Forgot(TarFlow):
        def forward(self, x, y=None):
            z, logdet = super().forward(x, y)
            return z, logdet / 2
    class Sloppy(TarFlow):
        def inverse(self, z, y=None): return super().inverse(z, y) * (1 + 1e-9)
    class InPlace(TarFlow):
        def inverse(self, z, y=None):
            x = super().inverse(z, y)
            z.zero_()
            return x
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for kind, what in ((Forgot, 'logdet error'), (Sloppy, 'round trip error'), (InPlace, 'wrote into its input')):
        with pytest.raises(AssertionError, match=what): check_flow(shake(kind(4, 1, 2, 16, 2, 1, 8)).double(), x)


def test_save_and_load(tmp_path):
    for kind in ('nvp', 'vp', 'coupling'):
        orders = ['reverse', 'forward' if kind == 'coupling' else torch.tensor([0, 2, 4, 1, 3, 5])]
        flow = shake(TarFlow((4, 6), 3, 2, 16, 2, (1, 2), 8, classes=3, kind=kind, orders=orders))
        flow.save_pretrained(tmp_path/kind, card={'seed': 7})
        again = TarFlow.from_pretrained(tmp_path/kind)
        x, y = torch.randn(2, 3, 4, 6), torch.tensor([0, -1])
        assert torch.equal(flow.log_prob(x, y), again.log_prob(x, y)) and again.card == {'seed': 7} and again.config == flow.config
        assert not list((tmp_path/kind).glob('*.tmp'))
    assert 'seed' in (tmp_path/'vp'/'README.md').read_text()


def test_loading_names_what_is_wrong(tmp_path):
    TarFlow(4, 1, 2, 16, 2, 1, 8).save_pretrained(tmp_path/'ok')
    with pytest.raises(ValueError, match='there is no folder'): TarFlow.from_pretrained(tmp_path/'nothing')
    with pytest.raises(ValueError, match='digits-classifier'): TarFlow.from_pretrained('nothing')
    with pytest.raises(ValueError, match='holds a DigitClassifier, not a TarFlow'): TarFlow.from_pretrained('digits-classifier')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='no config.json'): TarFlow.from_pretrained(tmp_path/'empty')
    weights = (tmp_path/'ok'/'model.safetensors').read_bytes()
    (tmp_path/'ok'/'model.safetensors').write_bytes(weights[:len(weights) // 2])
    with pytest.raises(ValueError, match='cut off'): TarFlow.from_pretrained(tmp_path/'ok')
    (tmp_path/'ok'/'config.json').write_text('{"image_size": 4')
    with pytest.raises(ValueError, match='not JSON'): TarFlow.from_pretrained(tmp_path/'ok')


def test_a_pickle_is_never_opened(tmp_path):
    "A pickle in the place of the weights is refused, and does not run."
    import os, pickle
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'owned'),))
    TarFlow(4, 1, 2, 16, 2, 1, 8).save_pretrained(tmp_path/'m')
    (tmp_path/'m'/'model.safetensors').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match='cannot be read'): TarFlow.from_pretrained(tmp_path/'m')
    (tmp_path/'m'/'model.safetensors').rename(tmp_path/'m'/'pytorch_model.bin')
    with pytest.raises(ValueError, match='cannot be read'): TarFlow.from_pretrained(tmp_path/'m')
    assert not (tmp_path/'owned').exists()


FLOWS = {'coupling': lambda: RealNVP(4, 8, classes=3), 'MAF': lambda: MAF(4, 8, classes=3), 'TARFlow': lambda: TarFlow(4, 1, 2, 16, 2, 1, 8, classes=3),
         'TARFlow, coupling': lambda: TarFlow(4, 1, 2, 16, 2, 1, 8, classes=3, kind='coupling')}


@pytest.mark.parametrize('name', FLOWS)
@pytest.mark.parametrize('y', [torch.tensor([1]), torch.tensor([0, 1, 2]), torch.full((1, 3), 1 / 3), torch.rand(6, 2), torch.tensor([0, 1, 2, 3, 0, 0]),
                               torch.tensor([0, 1, 2, -2, 0, 0]), torch.ones(6), torch.ones(6, dtype=torch.bool), torch.tensor(1), [0] * 6, 'seven', 1],
                         ids=lambda y: str(tuple(y.shape)) if isinstance(y, torch.Tensor) else repr(y))
def test_labels_that_do_not_fit_are_refused_and_never_broadcast(name, y):
    flow = shake(FLOWS[name]())
    x = torch.randn(6, *getattr(flow, 'image_shape', (4,)))
    for call in (lambda: flow(x, y), lambda: flow.inverse(torch.randn(6, *flow.z_shape), y)):
        with pytest.raises(ValueError, match='^y: '): call()


@pytest.mark.parametrize('name', FLOWS)
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type(name, dtype):
    flow = shake(FLOWS[name]())
    x, y = torch.randn(3, *getattr(flow, 'image_shape', (4,))), torch.tensor([0, 1, 2])
    assert torch.equal(flow.log_prob(x, y.to(dtype)), flow.log_prob(x, y))


@pytest.mark.parametrize('tau', [0, -1., float('nan'), float('inf')])
def test_a_temperature_is_above_zero(tau):
    block = TarFlow(4, 1, 2, 16, 1, 1, 8).blocks[0]
    from flowbook.tarflow import KVCache
    with pytest.raises(ValueError, match='tau'): block.params(torch.zeros(1, 4, 4), tau=tau)
    with pytest.raises(ValueError, match='tau'): block.step(torch.zeros(1, 4), 1, KVCache(), tau=tau)
    with pytest.raises(ValueError, match='positions 0..3'): block.step(torch.zeros(1, 4), 4, KVCache())


def test_a_chain_keeps_its_prior_and_its_classes():
    from flowbook.flows import Chain
    flow = TarFlow(2, 1, 1, 8, 1, 1, 8, kind='vp')
    with torch.no_grad(): flow.log_prior_var.fill_(2.)
    x = torch.zeros(1, 1, 2, 2)
    assert torch.equal(Chain(flow).log_prob(x), flow.log_prob(x))
    with pytest.raises(ValueError, match='classes'): Chain(MAF(2, 8), MAF(2, 8, classes=3))


def test_masks_and_orders_that_cannot_be_inverted_are_refused():
    from flowbook.flows import MADE, Autoregressive, Coupling
    with pytest.raises(ValueError, match='keep'): Coupling(torch.tensor([1, 0]), 8)
    with pytest.raises(ValueError, match='order'): Autoregressive(MADE(torch.arange(2), 8), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match='orders'): TarFlow(4, 1, 2, 16, 2, 1, 8, kind='coupling', orders=[[0, 1, 2, 3], 'reverse'])


@pytest.mark.parametrize('hidden', [3, 8, 40])
def test_a_narrow_made_still_reads_all_coordinates_before(hidden):
    from flowbook.flows import MADE, jacobian, Autoregressive
    d, order = 9, torch.arange(9)
    net = shake(MADE(order, hidden, layers=1), .5).double()
    x = torch.randn(4, d, dtype=torch.float64) * 3
    used = jacobian(Autoregressive(net, order), x).abs().amax(0) > 0
    assert used[-1, 0] and used[-1, d - 2] and used[1, 0] and not used.triu(1).any()


def test_precision_survives_saving(tmp_path):
    flow = shake(TarFlow(4, 1, 2, 16, 1, 1, 8)).double()
    flow.save_pretrained(tmp_path)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(TarFlow.from_pretrained(tmp_path).log_prob(x), flow.log_prob(x))


def test_a_half_precision_model_still_adds_up_in_float32():
    x = torch.rand(1, 3, 160, 160)
    flow = TarFlow(160, 3, 16, 32, 1, 1, 32)
    assert abs(flow.half().log_prob(x.half()).item() - flow.float().log_prob(x).item()) < 5
