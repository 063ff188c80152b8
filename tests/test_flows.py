"""Every flow of the book goes through the one shared proof, in float64 and in float32."""
import itertools
import warnings

import pytest
import torch

from flowbook.faults import Bomb
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


def small(tmp_path):
    TarFlow(4, 1, 2, 16, 2, 1, 8).save_pretrained(tmp_path/'m', card={'sigma': .1})
    return tmp_path/'m'


def refused(folder, file): # -> what was said
    with pytest.raises(ValueError) as e: TarFlow.from_pretrained(folder)
    assert str(folder/file) in str(e.value) and len(str(e.value)) < 1000
    return str(e.value)


@pytest.mark.fault('malice', "a pickle in the place of a model's weights", 'refused by name, and never run: weights are safetensors, which hold numbers alone; take the model from its source again')
def test_a_pickle_is_never_opened(tmp_path, tried):
    "A pickle in the place of the weights is refused, and does not run."
    import pickle
    m, owned = small(tmp_path), tmp_path/'owned'
    for evil in (pickle.dumps(Bomb(owned)), pickle.dumps({'blocks.0.pos_embed': Bomb(owned)})):
        (m/'model.safetensors').write_bytes(evil)
        tried(times=3, said=refused(m, 'model.safetensors'))
    torch.save({'w': Bomb(owned)}, m/'model.safetensors')        # a zip of a pickle, as torch writes it
    refused(m, 'model.safetensors')
    (m/'model.safetensors').rename(m/'pytorch_model.bin')         # and it is not looked for under another name
    refused(m, 'model.safetensors')
    assert not owned.exists()


@pytest.mark.fault('malice', 'a published TARFlow checkpoint that is a pickle with a command in it', 'torch.load(weights_only=True), which the book asks for, refuses it; a path instead of tensors is refused by from_ml_tarflow')
def test_a_published_checkpoint_is_never_unpickled(tmp_path, tried):
    import pickle
    torch.save({'blocks.0.pos_embed': Bomb(tmp_path/'owned')}, tmp_path/'imagenet.pth')
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/'imagenet.pth', weights_only=True)
    for given in (tmp_path/'imagenet.pth', str(tmp_path/'imagenet.pth'), (tmp_path/'imagenet.pth').read_bytes(), Bomb(tmp_path/'owned')):
        with pytest.raises(ValueError, match='weights_only=True') as e: TarFlow.from_ml_tarflow(given)
    tried(times=5, said=e.value)
    assert not (tmp_path/'owned').exists()


@pytest.mark.fault('disk', "a model's weights are cut off, empty, rubbish, or a folder", 'refused, the file is named; save or download it again')
@pytest.mark.parametrize('damage', [lambda b: b[:len(b) // 2], lambda b: b[:7], lambda b: b'', lambda b: b'\xff' * 100, lambda b: (2**63).to_bytes(8, 'little') + b[8:], lambda b: b[:8] + b'[' * (len(b) - 8), None],
                         ids=['half', 'seven bytes', 'empty', 'rubbish', 'a header of 2^63 bytes', 'brackets', 'a folder'])
def test_damaged_weights_are_named(tmp_path, damage, tried):
    m = small(tmp_path)
    path, b = m/'model.safetensors', (m/'model.safetensors').read_bytes()
    path.unlink()
    path.write_bytes(damage(b)) if damage else path.mkdir()
    tried(said=refused(m, 'model.safetensors'))


@pytest.mark.fault('disk', "single bits flip in a model's config.json, card.json, or the header of its weights", 'it is refused and the file is named, or what was read is still a whole model; a number of the card may be wrong, unnoticed: take it from its source again')
@pytest.mark.parametrize('file', ['config.json', 'card.json', 'model.safetensors'])
def test_flipped_bits_are_named_or_harmless(tmp_path, file, tried):
    import random
    m, rng, whole = small(tmp_path), random.Random(0), 0
    b = (m/file).read_bytes()
    for _ in range(40):
        i = rng.randrange(min(len(b), 2000))
        (m/file).write_bytes(b[:i] + bytes([b[i] ^ 1 << rng.randrange(8)]) + b[i + 1:])
        try: assert TarFlow.from_pretrained(m).sample(1).shape == (1, 1, 4, 4); whole += 1
        except ValueError as e: assert str(m) in str(e); said = e
    tried(times=40, said=said)
    assert whole < 40


def evil_config(**more):
    import json
    return json.dumps({'_class_name': 'TarFlow', 'image_size': 4, 'channels': 1, 'patch_size': 2, 'dim': 16, 'blocks': 2, 'layers': 1, 'head_dim': 8, **more})


@pytest.mark.fault('malice', 'a config.json of other kinds: no object, other keys, texts for numbers, brackets a million deep, 65 MB of blanks', 'refused, the file is named, and nothing is built')
@pytest.mark.parametrize('text', ['', '[]', '3', 'null', '\x00' * 100, '{"image_size": 4}', evil_config(colour='red'), evil_config(dim='16'), evil_config(layers=['one', 1]), evil_config(orders=[[0, 0, 0, 0], 'reverse']), evil_config(orders={'a': 1}), evil_config(image_size=None),
                                  evil_config(patch_size=0), evil_config(dim=-16), evil_config(dim=1e300), evil_config(dim=float('nan')), evil_config(self=1), evil_config(kind='__import__'), evil_config(blocks=True), '[' * 10**6, '{"a":' * 10**5, ' ' * 65 * 2**20])
def test_a_config_of_another_kind_is_refused(tmp_path, text, tried):
    m = small(tmp_path)
    (m/'config.json').write_text(text)
    tried(said=refused(m, 'config.json'))


@pytest.mark.fault('malice', 'a config.json that asks for a model of a billion numbers, beside weights of a few thousand', 'refused before any memory is taken: a model may have no more numbers than its weights')
@pytest.mark.parametrize('huge', [dict(dim=8 * 10**8), dict(dim=80_000), dict(blocks=10**9), dict(layers=10**9), dict(layers=[1, 10**9]), dict(image_size=2 * 10**6), dict(image_size=[2, 10**12]), dict(channels=10**10), dict(classes=10**9), dict(head_dim=10**12, dim=10**12),
                                  dict(image_size=2 * 10**5, patch_size=10**5), dict(blocks=10**18), dict(image_size=10**30)], ids=str)
def test_a_config_may_not_ask_for_more_than_its_weights(tmp_path, huge, tried):
    import resource, time
    m = small(tmp_path)
    (m/'config.json').write_text(evil_config(**huge))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    tried(said=refused(m, 'config.json'))
    assert time.process_time() - began < 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10     # kilobytes


@pytest.mark.fault('malice', "weights whose tensors have other names, other shapes, or are no floats", 'refused, the file and the first of these tensors are named')
@pytest.mark.parametrize('change,says', [(lambda s: s.pop('blocks.0.pos_embed'), 'missing: blocks.0.pos_embed'), (lambda s: s.update(more=torch.ones(1)), 'unknown: more'), (lambda s: s.update({'blocks.1.proj_in.bias': torch.ones(17)}), r'wrong shape: blocks.1.proj_in.bias \(17,\) instead of \(16,\)'),
                                         (lambda s: s.update({'blocks.1.proj_in.bias': torch.ones(16, dtype=torch.int64)}), 'no floats: blocks.1.proj_in.bias'), (lambda s: s.update({'x' * 5000: torch.ones(1)}), 'unknown: x{80}$'), (lambda s: s.clear(), 'config.json')])
def test_tensors_that_do_not_fit_are_named(tmp_path, change, says, tried):
    from safetensors.torch import load_file, save_file
    m = small(tmp_path)
    state = load_file(m/'model.safetensors')
    change(state)
    save_file(state, m/'model.safetensors')
    with pytest.raises(ValueError, match=says) as e: TarFlow.from_pretrained(m)
    assert str(m) in str(e.value)
    tried(said=e.value)


@pytest.mark.fault('disk', "a model's card.json is damaged", 'refused, the file is named; without the file the model loads, but says nothing of its noise')
@pytest.mark.parametrize('text', ['', '{"sigma": .', '[1]', '"sigma"', '\x80'])
def test_a_damaged_card_is_named(tmp_path, text, tried):
    m = small(tmp_path)
    (m/'card.json').write_text(text, encoding='latin-1')
    tried(said=refused(m, 'card.json'))
    (m/'card.json').unlink()
    assert TarFlow.from_pretrained(m).card == {}


@pytest.mark.fault('malice', 'a card.json with texts, negative numbers or huge tables where the samplers look for numbers', 'numbers are refused by name when they are needed; a table of passes that is none is measured anew')
def test_a_card_of_another_kind_breaks_no_sampler(tmp_path, tried):
    import json
    from flowbook import sampling as S
    m, wanted = small(tmp_path), None
    for passes in (3, {'plain': 3}, {'plain': [{}, {}]}, {'plain': [{'1': [0, 0]}] * 2}, {'plain': [{'many': [1, 1]}] * 2}, {'plain': [{str(10**12): [1, 1]}] * 2}, {'plain': [{'9' * 5000: [1, 1]}] * 2}, {'plain': [[1, 2]] * 2}):
        (m/'card.json').write_text(json.dumps({'passes': passes}))
        flow = TarFlow.from_pretrained(m)
        assert S.kept_passes(flow, 'plain') is None
        x = S.sample(flow, 2, generator=torch.Generator().manual_seed(0))
        assert wanted is None or torch.allclose(x, wanted, atol=1e-5)
        wanted = x
    for key, v in (('sigma', 'much'), ('sigma', -1.), ('reach', [1]), ('reach', float('nan'))):
        (m/'card.json').write_text(json.dumps({key: v}))
        with pytest.raises(ValueError, match=f'card: {key}') as e: S.sample(TarFlow.from_pretrained(m), 2, denoise=True if key == 'sigma' else None, solver='sequential')
    tried(times=12, said=e.value)


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


def test_images_far_outside_are_told_of():
    flow, x = TarFlow(4, 1, 2, 8, 1, 1, 8), torch.rand(2, 1, 4, 4) * 2 - 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for good in (x, x + 2 * torch.randn(2, 1, 4, 4).clamp(-3, 3), x[:0]): flow.log_prob(good)
        MAF(3).log_prob(torch.full((2, 3), 40.))             # a vector may be of any size
    with pytest.warns(UserWarning, match='beyond 10 came'): got = flow.log_prob((x + 1) * 127.5 + 20)
    assert got.isfinite().all()
