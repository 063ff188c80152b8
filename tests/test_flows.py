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
        flow = shake(TarFlow((4, 6), 3, 2, 16, 2, (1, 2), 8, classes=3, kind=kind, orders=['reverse', [0, 2, 4, 1, 3, 5]]))
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
