"""Vision encoders: shapes, frozen, timm's own numbers, doors and their messages."""
import json
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import flowbook.repa as E
from flowbook.tarflow import TarFlow
from flowbook.data import Batch, batches, load
from flowbook.flows import weights_folder
from flowbook.train import fit
from harm import PICKLE, RUBBISH, UNFIT, pickles

SHIPPED = weights_folder()


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A ViT of timm with random weights, and its file."
    from safetensors.torch import save_file
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', pretrained=False).eval()
    path = tmp_path_factory.mktemp('weights')/'tiny.safetensors'
    save_file(model.state_dict(), str(path))
    return model, path


def digits(n=8): return load('digits').batch(torch.arange(n))[0]


def shipped(grid, name='digits'): return E.encoder(name, grid)

# --- presets


def test_presets_are_names_of_timm():
    assert set(E.ENCODERS.values()) <= set(timm.list_models(pretrained=True))


@pytest.mark.parametrize('name, patch, size, width', [('dinov2-b', 14, 224, 768), ('dinov2-l', 14, 224, 1024), ('clip-b', 16, 256, 768), ('mae-b', 16, 256, 768)])
def test_presets_meet_256_tokens(name, patch, size, width):
    full, cfg = E.timm_name(name)
    with torch.device('meta'):
        bare = timm.create_model(full, pretrained=False, num_classes=0)
        assert E.patch_side(bare, name) == patch and 16 * patch == size
        model = timm.create_model(full, pretrained=False, num_classes=0, img_size=(size, size))
        out, = model.forward_intermediates(torch.zeros(1, 3, size, size), indices=1, norm=True, output_fmt='NLC', intermediates_only=True)
    assert tuple(out.shape) == (1, 256, width) and width == model.num_features

# --- a file


def test_file_gives_timms_own_numbers(tiny):
    model, path = tiny
    enc, x = E.encoder('vit_tiny_patch16_224', (14, 14), path), torch.rand(2, 3, 224, 224) * 2 - 1
    own = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(own[k]).view(3, 1, 1) for k in ('mean', 'std'))
    with torch.no_grad(): tokens = model.forward_features(((x + 1) / 2 - mean) / std)
    assert tokens.shape[1] == 197                           # a class token is dropped
    assert torch.allclose(enc(x), tokens[:, 1:], atol=1e-5) and enc.width == 192


@pytest.mark.parametrize('grid, c, h, w', [((8, 8), 3, 64, 64), ((4, 4), 1, 8, 8), ((2, 6), 3, 32, 96), ((1, 1), 3, 5, 7)])
def test_any_grid_and_grey(tiny, grid, c, h, w):
    enc, x = E.encoder('vit_tiny_patch16_224', grid, tiny[1]), torch.rand(2, c, h, w) * 2 - 1
    assert enc(x).shape == (2, grid[0] * grid[1], 192)
    assert enc.prepare(x).shape == (2, 3, 16 * grid[0], 16 * grid[1])
    if c == 1: assert torch.equal(enc(x), enc(x.expand(-1, 3, -1, -1)))


def test_tokens_lie_in_reading_order(tiny):
    enc = E.encoder('vit_tiny_patch16_224', (3, 5), tiny[1])
    x = torch.zeros(1, 3, 48, 80); x2 = x.clone(); x2[..., 16:32, 48:64] = 1       # row 1, column 3
    assert int((enc(x2) - enc(x)).norm(dim=-1).argmax()) == 1 * 5 + 3


def test_register_tokens_are_dropped():
    model = timm.create_model('vit_small_patch14_reg4_dinov2', pretrained=False, num_classes=0, img_size=(28, 42), depth=1)
    assert model.num_prefix_tokens == 5 and E.Encoder(model, (2, 3), 14, (.5,) * 3, (.5,) * 3)(torch.zeros(1, 3, 8, 8)).shape == (1, 6, 384)


def test_pth_and_broken_files(tiny, tmp_path):
    model, path = tiny
    torch.save(model.state_dict(), tmp_path/'tiny.pth')
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(E.encoder('vit_tiny_patch16_224', (2, 2), tmp_path/'tiny.pth')(x), E.encoder('vit_tiny_patch16_224', (2, 2), path)(x))
    (tmp_path/'broken.safetensors').write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match='broken.safetensors'): E.encoder('vit_tiny_patch16_224', (2, 2), tmp_path/'broken.safetensors')
    torch.save({'x': Path('a')}, tmp_path/'code.pth')                              # needs unpickling of a class
    with pytest.raises(ValueError, match='code.pth'): E.encoder('vit_tiny_patch16_224', (2, 2), tmp_path/'code.pth')
    with pytest.raises(ValueError, match='could not be loaded'): E.encoder('vit_small_patch16_224', (2, 2), path)


def test_a_file_that_lacks_tensors_is_refused(tiny, tmp_path):
    from safetensors.torch import save_file
    some = {k: v for k, v in tiny[0].state_dict().items() if 'blocks.3.' not in k}
    save_file(some, str(tmp_path/'some.safetensors'))
    with pytest.raises(ValueError, match='lacks.*blocks.3'): E.encoder('vit_tiny_patch16_224', (2, 2), tmp_path/'some.safetensors')


def refused(call, path, tried):
    with pytest.raises(ValueError) as e: call()
    assert path.name in str(e.value), f'{path.name} is not named in: {e.value}'
    tried(said=e.value)


@pytest.mark.fault(*PICKLE)
@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.bin', '.pt', '.npz', ''])
def test_a_pickle_is_refused(suffix, tmp_path, tried):
    path = tmp_path/f'weights{suffix}'
    for content in pickles(tmp_path/'boom'):
        path.write_bytes(content)
        refused(lambda: E.encoder('vit_tiny_patch16_224', (2, 2), path), path, tried)
        assert not (tmp_path/'boom').exists()
    tried(times=3)


@pytest.mark.fault(*RUBBISH)
@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.npz'])
def test_rubbish_is_refused(suffix, tmp_path, tried):
    path = tmp_path/f'weights{suffix}'
    bad = [b'', b'rubbish', b'\0' * 1000, b'\xff' * 16]
    for content in bad:
        path.write_bytes(content)
        refused(lambda: E.encoder('vit_tiny_patch16_224', (2, 2), path), path, tried)
    tried(times=len(bad))


@pytest.mark.fault(*UNFIT)
def test_weights_of_another_shape_are_refused(tiny, tmp_path, tried):
    from safetensors.torch import save_file
    path = tmp_path/'other.safetensors'
    save_file({**tiny[0].state_dict(), 'blocks.0.mlp.fc1.weight': torch.zeros(3, 3)}, str(path))
    refused(lambda: E.encoder('vit_tiny_patch16_224', (2, 2), path), path, tried)


@pytest.fixture
def folder(tmp_path):
    E.DigitsViT(8, 1, 2).save_pretrained(tmp_path/'encoder')
    return tmp_path/'encoder'


@pytest.mark.fault(*PICKLE)
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_pickle_in_a_folder_is_refused(name, folder, tmp_path, tried):
    E.encoder('digits', (4, 4), folder)
    for content in pickles(tmp_path/'boom'):
        (folder/name).write_bytes(content)
        refused(lambda: E.encoder('digits', (4, 4), folder), folder/name, tried)
        assert not (tmp_path/'boom').exists()
    tried(times=3)


@pytest.mark.fault(*RUBBISH)
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_rubbish_in_a_folder_is_refused(name, folder, tried):
    whole = (folder/name).read_bytes()
    bad = [b'', b'\0' * 100, whole[:len(whole) // 2], b'\xff' * 16]
    for content in bad:
        (folder/name).write_bytes(content)
        refused(lambda: E.encoder('digits', (4, 4), folder), folder/name, tried)
    tried(times=len(bad))


@pytest.mark.parametrize('more', [{'dim': 0}, {'dim': '8'}, {'heads': 3}, {'layers': None}, {'patch': 3}, {'what': 1}], ids=str)
def test_a_config_that_is_none_is_refused(more, folder):
    path = folder/'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    with pytest.raises(ValueError, match=next(iter(more))): E.encoder('digits', (4, 4), folder)

# --- frozen


def test_frozen_whatever_happens_around_it():
    enc = shipped((4, 4)); whole = nn.Sequential(enc, nn.Linear(enc.width, 3)).train()
    assert not any(m.training for m in enc.modules()) and not any(p.requires_grad for p in enc.parameters())
    x = digits().requires_grad_()
    before = [p.clone() for p in enc.parameters()]
    out = whole(x); out.sum().backward()
    assert x.grad is None and all(p.grad is None for p in enc.parameters()) and whole[1].weight.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(before, enc.parameters()))
    assert torch.equal(enc(x), enc(x)) and enc(x).dtype == torch.float32 and enc(x.double()).dtype == torch.float32

# --- doors


@pytest.mark.parametrize('name', ['resnet18', 'convnext_tiny', 'swin_tiny_patch4_window7_224', 'mixer_b16_224'])
def test_no_patch_tokens(name, tiny):
    with pytest.raises(ValueError, match=f'{name}.*no patch tokens.*Vision Transformer'): E.encoder(name, (4, 4), tiny[1])


def test_doors(tmp_path, tiny):
    with pytest.raises(ValueError, match='dinov2-b'): E.encoder('dino2-b', (4, 4))
    with pytest.raises(ValueError, match='name: .*5'): E.encoder(5, (4, 4))
    with pytest.raises(ValueError, match='lvd142m'): E.encoder('vit_base_patch14_dinov2.lvd', (4, 4))
    with pytest.raises(ValueError, match='no file.*gone'): E.encoder('dinov2-b', (4, 4), tmp_path/'gone.safetensors')
    for bad in (4, (4,), (4, 0), (4., 4), (True, 4), 'ab'):
        with pytest.raises(ValueError, match='grid'): E.encoder('digits', bad)
    enc = shipped((4, 4))
    assert E.encoder('digits', TarFlow((4, 8), 1, 2, 16, 2, 1, 8)).grid == (2, 4), 'a flow says its own grid'
    for bad in (torch.zeros(1, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), [1]):
        with pytest.raises(ValueError, match='x: '): enc(bad)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty cache, and a hub of which a test says what it is."
    from huggingface_hub import constants
    def be(endpoint='http://nowhere.invalid', offline=False):
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
        monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
        return tmp_path
    return be


def check_sentence(why):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=f'dinov2-b.*{why}.*weights=FILE'): E.encoder('dinov2-b', (16, 16))
    assert time.perf_counter() - began < 6


def test_offline_is_said(hub): hub(offline=True); check_sentence('HF_HUB_OFFLINE')


def test_no_such_server(hub): hub(); check_sentence('nowhere.invalid')


def test_a_server_that_says_nothing(hub):
    import socket
    with socket.create_server(('127.0.0.1', 0)) as s:      # takes the call, never answers
        hub(f'http://127.0.0.1:{s.getsockname()[1]}'); check_sentence('127.0.0.1')


def test_a_server_that_lacks_it(hub):
    import http.server, threading
    with http.server.HTTPServer(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        hub(f'http://127.0.0.1:{s.server_port}'); check_sentence('HTTP 501')
        s.shutdown()


def test_a_cached_file_needs_no_network(hub, tiny):
    repo = hub()/'models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k'
    (repo/'snapshots'/'abc').mkdir(parents=True); (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text('abc'); (repo/'snapshots'/'abc'/'model.safetensors').write_bytes(tiny[1].read_bytes())
    assert E.encoder('vit_tiny_patch16_224', (2, 3))(torch.zeros(1, 3, 8, 8)).shape == (1, 6, 192)

# --- the digits' own


@pytest.mark.parametrize('name', ['digits', 'digits-labels'])
def test_digits_encoders(name, tmp_path):
    for grid in ((4, 4), (8, 8), (2, 4)): assert shipped(grid, name)(digits()).shape == (8, grid[0] * grid[1], 64)
    net = E.DigitsViT.from_pretrained(SHIPPED/E.DIGITS_ENCODERS[name])
    assert net.card['labels'] is (name == 'digits-labels') and net.card['probe_accuracy'] > .95
    with torch.no_grad(): assert torch.allclose(net(digits()), shipped((4, 4), name)(digits()), atol=1e-5)
    net.save_pretrained(tmp_path); again = E.DigitsViT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


def test_few_labels_show_what_it_learned():
    raw = E.probe_digits(lambda x: x.flatten(1)[:, None])
    own = E.probe_digits(shipped((4, 4)))
    assert own['ten_label_accuracy'] > raw['ten_label_accuracy'] + .05
    assert own['one_label_accuracy'] > raw['one_label_accuracy'] + .2
    assert own['token_accuracy'] > .9


def train_few(labels=lambda y: y, seed=0):
    torch.manual_seed(seed)
    net, data = E.DigitsViT(16, 1, 2), load('digits')
    data.labels = labels(data.labels)
    loop = fit(net, batches(data, 32, seed=seed, transforms=[E.Views(data)]), E.VICReg(16, 32), steps=4)
    return [log['loss'] for log in loop], net.state_dict()


def test_labels_change_nothing_and_the_seed_decides():
    (a, wa), (b, wb), (c, wc) = train_few(), train_few(torch.zeros_like), train_few(seed=1)
    assert a == b and all(torch.equal(wa[k], wb[k]) for k in wa)
    assert a != c


def test_pairs_are_keyed_by_sample():
    data = load('digits'); pairs = E.Views(data)
    def batch(i): i = torch.tensor(i); return Batch(*data.batch(i), i, 3, 7)
    both, one = pairs(batch([4, 9])), pairs(batch([9]))
    assert torch.allclose(both.x[1], one.x[0], atol=1e-6) and both.x.shape == (2, 2, 1, 8, 8) and (both.y == -1).all()


def test_warp():
    x = digits(); still = torch.full((8, 6), .5)
    assert torch.allclose(E.warp(x, still), x, atol=1e-5)
    assert torch.allclose(E.warp(x, torch.rand(8, 6), 0.), x, atol=1e-5)
    right = still.clone(); right[:, 4] = .5 - .125 / .4                            # the grid moves left by a quarter of a half: one pixel
    one = E.warp(x, right, 2.)                                                      # strength 2: twice .2 * -.625 = -.25 of [-1, 1]: a pixel
    assert torch.allclose(one[..., 1:], x[..., :-1], atol=1e-4) and torch.allclose(one[..., 0], torch.full((8, 1, 8), -1.), atol=1e-4)
    assert E.warp(x, torch.rand(8, 6)).min() >= -1.0001


def test_vicreg_terms():
    loss = E.VICReg(4, 3); a = torch.randn(1000, 3)
    assert loss.terms(a, a)[0] == 0 and loss.terms(2 * a, 2 * a)[1] == 0
    assert abs(loss.terms(torch.zeros(9, 3), torch.zeros(9, 3))[1].item() - 2 * (1 - .01)) < 1e-6       # collapse costs most
    same = a[:, :1].expand(-1, 3)
    assert loss.terms(same, same)[2] > 3 > .1 > loss.terms(a, a)[2]
