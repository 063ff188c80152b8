"""Metrics against closed forms, against torch-fidelity, over processes, and with a whole Inception of random weights."""
import hashlib
import json
import math
import pickle
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch

from flowbook.data import load
from flowbook.faults import Bomb
from flowbook.metrics import (METRICS, Moments, collect, digits_extractor, evaluate, fid_at_infinity, fid_curve, fidelity_digits, fingerprint, frechet, inception_extractor,
                              inception_path, load_statistics, lpips, make_extractor, module_extractor, read_weights, reconstruction, save_statistics)
from flowbook.tarflow import TarFlow

torch_fidelity = pytest.importorskip('torch_fidelity')


def digits(split='test'):
    return (d := load('digits', split)).batch(range(len(d)))[0]


def moments(f):
    m = Moments(f.shape[1])
    m.add(f)
    return m


# --- the Fréchet distance

def test_a_set_with_itself():
    x = digits()
    for small in (x, x[:40]):                                    # 40 images: covariances of 64 features without full rank
        out = evaluate(small, small, ('fid', 'sfid'), 'digits')
        assert abs(out['fid']) <= 1e-3 and abs(out['sfid']) <= 1e-3


def test_a_shifted_and_scaled_gaussian_has_its_closed_form():
    f = torch.randn(500, 40, dtype=torch.float64) @ torch.randn(40, 40, dtype=torch.float64)
    shift = torch.randn(40, dtype=torch.float64)
    a, b = moments(f), moments(f * 1.5 + shift)                  # C2 = 1.5^2 C1: the root of C1 C2 is 1.5 C1
    exact = (a.mean - b.mean).square().sum() + .5**2 * a.cov.trace()
    assert abs(frechet(a.mean, a.cov, b.mean, b.cov) - exact) <= 1e-6 * (1 + exact)
    c = moments(f + shift)
    assert abs(frechet(a.mean, a.cov, c.mean, c.cov) - shift.square().sum()) <= 1e-6


@pytest.mark.parametrize('n', [400, 50])
def test_equal_to_torch_fidelity_on_the_same_features(n):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    f1, f2 = torch.randn(n, 64).double(), (torch.randn(n, 64) @ torch.randn(64, 64)).double() / 8
    theirs = fid_statistics_to_metric(fid_features_to_statistics(f1), fid_features_to_statistics(f2), False)['frechet_inception_distance']
    a, b = moments(f1), moments(f2)
    assert abs(frechet(a.mean, a.cov, b.mean, b.cov) - theirs) <= 1e-4


def test_it_is_symmetric_and_refuses_shapes():
    a, b = moments(torch.randn(30, 8)), moments(torch.randn(5, 8))
    assert math.isclose(frechet(a.mean, a.cov, b.mean, b.cov), frechet(b.mean, b.cov, a.mean, a.cov), abs_tol=1e-6)
    with pytest.raises(ValueError, match=r'mean2: shape \(4,\) came, must be a tensor \(8\)'): frechet(a.mean, a.cov, b.mean[:4], b.cov[:4, :4])


def test_moments_do_not_depend_on_the_parts():
    f = torch.randn(100, 5) * 3 + 1e4
    whole, parts = moments(f), Moments(5)
    for part in f.split([1, 0, 60, 39]): parts.add(part)
    assert torch.allclose(whole.cov, parts.cov, rtol=1e-10) and torch.allclose(parts.cov, torch.cov(f.double().T), rtol=1e-9) and parts.n == 100


# --- over processes

def _rank(rank, world, file, out):
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=world)
    x = digits() + .1
    mine = iter(x[rank::world].split(50))                        # a stream is each rank's own part, a dataset is dealt out
    got = evaluate(mine, load('digits'), METRICS, 'digits')
    got['sha256'] = collect(load('digits'), 'digits', batch_size=7).sha256
    first = evaluate(iter(x[rank::world].split(9)), load('digits'), 'fid', 'digits', n=101)['n']
    if rank == world - 1: torch.save({**got, 'first': first}, out)
    dist.destroy_process_group()


@pytest.mark.parametrize('world', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_over_processes(world, tmp_path):
    one = evaluate(digits() + .1, load('digits'), METRICS, 'digits')
    torch.multiprocessing.start_processes(_rank, (world, tmp_path/'init', tmp_path/'out.pt'), nprocs=world, start_method='spawn')
    many = torch.load(tmp_path/'out.pt')
    assert many['n'] == one['n'] == 360 and many['first'] == 101
    assert many['sha256'] == collect(digits('train'), 'digits').sha256
    for k in ('fid', 'sfid', 'is', 'kid', 'precision', 'recall', 'clipped'): assert abs(many[k] - one[k]) <= 1e-6 * max(1, abs(one[k])), k


def _starved(rank, file, out):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    try: collect(digits()[:9 * rank], 'digits')
    except ValueError as e: (out/f'{rank}').write_text(str(e))
    dist.destroy_process_group()


def test_a_rank_without_images_ends_all_with_a_sentence(tmp_path):
    torch.multiprocessing.start_processes(_starved, (tmp_path/'init', tmp_path), nprocs=2, start_method='spawn')
    assert all('1 of 2 ranks got none' in (tmp_path/str(r)).read_text() for r in (0, 1))


# --- torch-fidelity

def test_all_metrics_are_those_of_torch_fidelity():
    class Levels(torch.utils.data.Dataset):
        def __init__(self, x): self.x = ((x + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
        def __len__(self): return len(self.x)
        def __getitem__(self, i): return self.x[i]
    x, real = (digits() + .2 * torch.randn(360, 1, 8, 8)).clamp(-1, 1), digits('train')
    for _ in range(2): name = fidelity_digits()                  # a second registration does not raise
    theirs = torch_fidelity.calculate_metrics(input1=Levels(x), input2=Levels(real), feature_extractor=name, fid=True, isc=True, kid=True, prc=True, kid_subset_size=360,
                                              cuda=False, verbose=False, save_cpu_ram=True)
    ours = evaluate(x, real, METRICS, 'digits')
    for t, o in {'frechet_inception_distance': 'fid', 'inception_score_mean': 'is', 'kernel_inception_distance_mean': 'kid', 'precision': 'precision', 'recall': 'recall'}.items():
        assert abs(theirs[t] - ours[o]) <= 1e-4 * max(1, abs(theirs[t])), o


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    real = digits('train')
    few = real[:1] + .01 * torch.randn(200, 1, 8, 8)             # one picture by heart: precise, and nothing else is reached
    out = evaluate(few, real, ('precision', 'recall'), 'digits')
    assert out['precision'] > .9 and out['recall'] < .05
    swapped = evaluate(real, few, ('precision', 'recall'), 'digits')
    assert swapped['precision'] == out['recall'] and swapped['recall'] == out['precision']


# --- sources, statistics

def test_every_kind_of_source_gives_the_same(tmp_path):
    from PIL import Image
    x, want = digits()[:60], None
    for i, image in enumerate(x): Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()).save(tmp_path/f'{i:02}.png')
    class Plain:
        def __len__(self): return 60
        def __getitem__(self, i): return x[i], 0
    for source in (x, iter(x.split(7)), ((b, None) for b in x.split(11)), [x[:30], x[30:]], Plain(), tmp_path, str(tmp_path)):
        out = evaluate(source, load('digits'), METRICS, 'digits', batch_size=13)
        out = {k: round(v, 8) for k, v in out.items()}
        want = want or out
        assert out == pytest.approx(want, rel=1e-5, abs=1e-5), source
    data = load('digits', 'test')
    assert evaluate(data, data, 'fid', 'digits')['n'] == 360


def test_a_folder_without_images_or_of_two_sizes(tmp_path):
    from PIL import Image
    with pytest.raises(ValueError, match='no images'): evaluate(tmp_path, digits(), 'fid', 'digits')
    Image.new('L', (8, 8)).save(tmp_path/'a.png'); Image.new('L', (9, 8)).save(tmp_path/'b.png')
    with pytest.raises(ValueError, match='differ'): evaluate(tmp_path, digits(), 'fid', 'digits')


def test_statistics_are_kept_and_mismatches_refused(tmp_path):
    stats = collect(load('digits'), 'digits')
    path = save_statistics(stats, tmp_path/'new'/'s.safetensors', features=True)
    back, x = load_statistics(path), digits()
    assert back.n == 1437 and back.sha256 == stats.sha256 and 'digits, train' in back.dataset
    a, b = evaluate(x, path, ('fid', 'sfid', 'kid', 'precision', 'recall'), 'digits'), evaluate(x, load('digits'), ('fid', 'sfid', 'kid', 'precision', 'recall'), 'digits')
    assert a == pytest.approx(b, abs=1e-6)
    other = module_extractor(torch.nn.Flatten(), 'pixels')
    with pytest.raises(ValueError, match='extractor: the reference was seen by'): evaluate(x, back, 'fid', other)
    big = digits_extractor()
    resized = type(big)(big.net, big.name, channels=1, size=8, note='another way to resize')
    with pytest.raises(ValueError, match='preprocessing: .*another way'): evaluate(x, back, 'fid', resized)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match='holds no statistics'): load_statistics(path)
    with pytest.raises(ValueError, match='is not there'): load_statistics(tmp_path/'nothing.safetensors')


def test_other_images_are_never_answered_by_older_ones():
    "The same shapes, the same names, other pixels: nothing is found by name."
    a, b = collect(digits(), 'digits'), collect(-digits(), 'digits')
    assert a.dataset == b.dataset and a.sha256 != b.sha256 and evaluate(a, b, 'fid', 'digits')['fid'] > 10


def test_any_module_and_its_weights_are_named():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 9))
    before = module_extractor(net).name
    a = collect(digits(), net)
    with torch.no_grad(): net[1].bias.add_(1)
    assert module_extractor(net).name != before and fingerprint(net) in module_extractor(net).name
    with pytest.raises(ValueError, match='extractor'): evaluate(digits(), a, 'fid', net)
    with pytest.raises(ValueError, match="'sfid' needs spatial"): evaluate(digits(), digits(), 'sfid', net)
    with pytest.raises(ValueError, match="'is' needs class logits"): evaluate(digits(), digits(), 'is', net)


# --- what is refused, and counted

def test_values_and_broken_samples():
    x = digits(); x[:90] *= 3; x[0, 0, 0, 0] = float('nan'); x[7, 0, 0, 0] = float('inf')
    with pytest.raises(ValueError, match="on_broken='drop'"): evaluate(x, digits(), 'fid', 'digits')
    out = evaluate(x, digits(), 'fid', 'digits', on_broken='drop')
    share = (x[x.isfinite().flatten(1).all(1)].abs() > 1 + 1e-6).float().mean().item()
    assert out['broken'] == 2 and out['n'] == 358 and out['clipped'] == pytest.approx(share)
    with pytest.raises(ValueError, match='359 images were asked for.*gave 358.*2 broken'): evaluate(x, digits(), 'fid', 'digits', n=359, on_broken='drop')
    assert evaluate(x, digits(), 'fid', 'digits', n=99, batch_size=40, on_broken='drop')['n'] == 99
    with pytest.raises(ValueError, match="on_broken: 'ignore' came, must be one of 'refuse', 'drop'"): evaluate(x, digits(), 'fid', 'digits', on_broken='ignore')


@pytest.mark.parametrize('source,says', [
    ('no_such_folder', 'no folder'), (3.5, 'float came'), (torch.zeros(4, 8, 8), r'samples: shape \(4, 8, 8\) came, must be a tensor \(b, c, h, w\) of floats'), (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), 'from_levels'),
    (torch.zeros(1, 1, 8, 8), '2 or more'), (torch.zeros(5, 4, 8, 8), '1 or 3 channels'), ([], '2 or more')])
def test_bad_sources(source, says):
    with pytest.raises(ValueError, match=says): evaluate(source, digits(), 'fid', 'digits')


@pytest.mark.parametrize('kw,says', [(dict(metrics='fdi'), "must be one of 'fid'"), (dict(extractor='clip'), "must be 'inception', 'digits'"), (dict(n=1), '2 images or more'),
                                     (dict(metrics='precision', k=0), '1 or more'), (dict(metrics='precision', k=400), 'neighbours')])
def test_bad_arguments(kw, says):
    with pytest.raises(ValueError, match=says): evaluate(digits(), digits(), **{'metrics': 'fid', 'extractor': 'digits', **kw})


def test_bias_and_extrapolation():
    real = digits('train')
    stats = collect(real, 'digits')
    ns = [200, 400, 800]
    curve = torch.tensor([fid_curve(stats, stats, ns, seed) for seed in range(4)]).mean(0).tolist()
    assert curve[0] > curve[1] > curve[2] > 0
    limit, slope = fid_at_infinity(ns, curve)
    assert slope > 0 and limit < curve[2]
    assert fid_at_infinity([1, 2], [5., 3.5]) == (pytest.approx(2.), pytest.approx(3.))
    with pytest.raises(ValueError, match='2 to 1437'): fid_curve(stats, stats, [2000])
    with pytest.raises(ValueError, match='two different'): fid_at_infinity([5, 5], [1., 1.])


# --- Inception, with random weights

@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    from torch_fidelity import feature_extractor_inceptionv3 as module
    cls = module.FeatureExtractorInceptionV3
    with patch.object(module, 'load_state_dict_from_url', lambda *a, **k: {}), patch.object(cls, 'load_state_dict', lambda *a, **k: None):
        torch.manual_seed(0)
        net = cls('random', ['2048', 'logits_unbiased'])
    path = tmp_path_factory.mktemp('weights')/'inception.pth'
    torch.save(net.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), net


def test_the_whole_inception_path(inception, monkeypatch, tmp_path):
    path, sha, net = inception
    look = inception_extractor(path, sha)
    x = digits()[:6]
    out = look(x)
    assert {k: tuple(v.shape) for k, v in out.items()} == {'pooled': (6, 2048), 'spatial': (6, 2023), 'logits': (6, 1008)}
    rgb = ((x + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    assert torch.allclose(out['pooled'], net(rgb)[0]) and torch.allclose(out['logits'], net(rgb)[1])
    short = [m for m in METRICS if m != 'sfid']                                               # FID and sFID are one function of 2,000 numbers each
    got = evaluate(x, torch.rand(8, 3, 20, 20) * 2 - 1, short, look)
    assert all(math.isfinite(got[k]) for k in short) and got['n'] == 6 and 'inception' in look.name and sha[:16] in look.name
    monkeypatch.setenv('FLOWBOOK_INCEPTION', str(path))
    assert inception_path() == path
    with pytest.raises(ValueError, match='was not read'): make_extractor('inception')         # not the published file
    r = subprocess.run([sys.executable, '-m', 'flowbook.scripts.fid_stats', '--data', 'digits', '--extractor', 'inception', '--sha256', sha, '--n', '5', '--out', 's.safetensors'],
                       capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert load_statistics(tmp_path/'s.safetensors').moments['spatial'].mean.shape == (2023,)


@pytest.mark.fault('malice', 'a pickle that runs code, in place of the weights of Inception', 'it is not read: its hash is another; and with that hash it is refused; fetch the file again')
def test_a_wrong_hash_is_refused_before_it_is_read(tmp_path, tried):
    path = tmp_path/'bomb.pth'
    torch.save({'w': Bomb(tmp_path/'exploded')}, path)
    for open_it in (read_weights, inception_extractor, lambda path, sha: make_extractor('inception', path, sha)):
        with pytest.raises(ValueError, match='bomb.pth has the sha256 .*was not read') as e: open_it(path, '0' * 64)
    from flowbook.scripts import fid_stats
    with pytest.raises(ValueError, match='bomb.pth has the sha256 .*was not read'): fid_stats.main(['--extractor', 'inception', '--weights', str(path), '--out', str(tmp_path/'s.safetensors')])
    tried(times=5, said=e.value)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match='bomb.pth holds more than tensors'): read_weights(path, sha)         # even with the right hash nothing runs
    assert not (tmp_path/'exploded').exists()
    torch.save({'w': torch.ones(2)}, path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_weights(path, sha)['w'].tolist() == [1, 1]
    with pytest.raises(ValueError, match='does not fit'): inception_extractor(path, sha)


def test_without_weights_a_sentence_says_where_to_get_them(monkeypatch, tmp_path):
    monkeypatch.delenv('FLOWBOOK_INCEPTION', raising=False)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(ValueError, match='96 MB.*github.com/toshas'): evaluate(digits(), digits())


@pytest.mark.parametrize('name', ['s.safetensors', 's.npz', 's.png', 'cached.pt'])
@pytest.mark.fault('malice', 'a pickle that runs code, in place of FID statistics or of a folder of images', 'it is not opened as a pickle, the file is named; make the statistics again with flowbook_fid_stats')
def test_a_pickle_in_place_of_statistics(tmp_path, name, tried):
    path = tmp_path/'seen'/name; path.parent.mkdir()
    for write in (lambda: torch.save(Bomb(tmp_path/'exploded'), path), lambda: path.write_bytes(pickle.dumps(Bomb(tmp_path/'exploded'))), lambda: np.save(path.open('wb'), np.array([Bomb(tmp_path/'exploded')], object), allow_pickle=True)):
        write()
        for source in [path] + [path.parent] * (path.suffix == '.png'):
            with pytest.raises(ValueError, match=f'reference: .*{name}|{name}: cannot be read') as e: evaluate(digits(), source, 'fid', 'digits')
        with pytest.raises(ValueError, match=f'{name}: holds no statistics'): load_statistics(path)
    assert not (tmp_path/'exploded').exists()
    tried(times=3, said=e.value)


@pytest.mark.fault('malice', 'FID statistics whose header or numbers were changed', 'they are refused, the file is named; make them again with flowbook_fid_stats')
def test_statistics_that_are_none(tmp_path, tried):
    from safetensors.torch import save_file
    good = {'extractor': 'e', 'preprocessing': 'p', 'dataset': 'd', 'sha256': '0', 'n': 5}
    numbers = {'pooled.mean': torch.zeros(3, dtype=torch.float64), 'pooled.cov': torch.eye(3, dtype=torch.float64)}
    def write(facts=good, tensors=numbers, key='flowbook_statistics'): save_file(tensors, tmp_path/'s.safetensors', {key: json.dumps(facts)})
    write(); assert load_statistics(tmp_path/'s.safetensors').n == 5
    bad = [dict(facts={**good, 'n': v}) for v in (1, -5, 2.5, '5', None)] + [dict(facts={**good, 'more': 1}), dict(facts={**good, 'extractor': ['e']}), dict(facts=[good]), dict(facts=3), dict(key='other'), dict(facts={k: v for k, v in good.items() if k != 'n'})]
    bad += [dict(tensors={**numbers, **t}) for t in ({'pooled.cov': torch.eye(2)}, {'pooled.mean': torch.full((3,), math.nan)}, {'pooled.mean': torch.zeros(3, 1)}, {'pooled.cov': torch.zeros(3, 3).long()}, {'features': torch.zeros(4, 3)},
                                                     {'spatial.mean': torch.zeros(2)})] + [dict(tensors={'pooled.mean': torch.zeros(3)}), dict(tensors={'x': torch.zeros(1)})]
    for kw in bad:
        write(**kw)
        with pytest.raises(ValueError, match='s.safetensors: holds no statistics') as e: load_statistics(tmp_path/'s.safetensors')
    tried(times=len(bad), said=e.value)


# --- reconstructions

def test_psnr_ssim_rfid():
    x = digits() * .5
    noisy = x + .1 * torch.randn_like(x)
    out = reconstruction(x, noisy, extractor='digits')
    per_image = 10 * np.log10(4 / (noisy - x).square().flatten(1).mean(1).numpy())
    assert out['psnr'] == pytest.approx(per_image.mean(), abs=1e-3) and 0 < out['ssim'] < 1 and out['rfid'] > 0
    same = reconstruction(x, x, ('ssim', 'rfid'), 'digits')
    assert same['ssim'] == pytest.approx(1) and abs(same['rfid']) < 1e-3
    with pytest.raises(ValueError, match='NaN'): reconstruction(x, x * float('nan'), 'psnr')


def test_lpips_without_its_weights_fails_with_a_sentence_and_works_with_them(monkeypatch, tmp_path):
    import torchvision
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    x = torch.rand(2, 1, 40, 40) * 2 - 1
    with pytest.raises(ValueError, match="torchvision's alexnet"): reconstruction(x, x, 'lpips', net='alex')
    random = torchvision.models.alexnet()
    monkeypatch.setattr(torchvision.models, 'alexnet', lambda *a, **k: random)
    assert reconstruction(x, x, 'lpips', net='alex')['lpips'] == pytest.approx(0, abs=1e-6)
    assert reconstruction(x, -x, 'lpips', net='alex')['lpips'] > 0
    with pytest.raises(ValueError, match='32x32'): reconstruction(digits()[:2], digits()[:2], 'lpips', net='alex')


@pytest.mark.filterwarnings('ignore')                         # torch warns of a pickle of another protocol
@pytest.mark.fault('malice', 'a pickle that runs code, in place of the weights of LPIPS', 'it is refused, the file is named; delete it, and it is fetched again')
def test_a_pickle_in_place_of_the_weights_of_lpips(monkeypatch, tmp_path, tried):
    "torchvision's own loader would run it: it unpickles whatever lies in torch.hub's folder."
    from torchvision.models import AlexNet_Weights
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    path = tmp_path/'checkpoints'/AlexNet_Weights.DEFAULT.url.rsplit('/', 1)[1]; path.parent.mkdir()
    for write in (lambda: torch.save(Bomb(tmp_path/'exploded'), path), lambda: path.write_bytes(pickle.dumps(Bomb(tmp_path/'exploded'))), lambda: path.write_bytes(b'')):
        write()
        with pytest.raises(ValueError, match=f'net: .*{path.name} holds more than tensors') as e: lpips('alex')
    tried(times=3, said=e.value)
    torch.save({'w': torch.ones(1)}, path)
    with pytest.raises(ValueError, match='net: .*does not fit'): lpips('alex')
    assert not (tmp_path/'exploded').exists()


# --- the command

def test_flowbook_evaluate(tmp_path, monkeypatch, capsys):
    from flowbook.scripts import evaluate as script
    TarFlow(8, 1, 2, 16, 2, 1, 8, classes=10).save_pretrained(tmp_path/'flow', card={'sigma': .2})
    monkeypatch.chdir(tmp_path)
    def command(*argv, ok=True):                                 # in this process; the first one below has its own
        monkeypatch.setattr(sys, 'argv', ['flowbook_evaluate', *argv])
        if ok: script.cli(); return capsys.readouterr().out
        with pytest.raises(SystemExit) as e: script.cli()
        return str(e.value)
    r = subprocess.run([sys.executable, '-m', 'flowbook.scripts.evaluate', 'flow', '--data', 'digits', '--n', '50'], capture_output=True, text=True)
    assert r.returncode == 0 and 'Traceback' not in r.stderr, r.stderr
    text = r.stdout
    for word in ('FID', 'sFID', 'Inception Score', 'KID', 'precision', 'recall', 'bits/dim', 'noise 0.2'): assert word in text
    out = json.loads(command('flow', '--data', 'digits', '--n', '50', '--json'))
    assert {*METRICS, 'bits_per_dim', 'noise', 'agreement', 'n', 'broken', 'clipped'} <= out.keys() and out['n'] == 50
    fresh = .5 * (load('digits', 'test').batch(range(360))[0].square().mean() + .2**2 + math.log(2 * math.pi)) / math.log(2)   # the identity: N(0, 1)
    assert out['bits_per_dim'] == pytest.approx(float(fresh), abs=.01)
    guided = json.loads(command('flow', '--n', '20', '--json', '--denoise', '--guidance', 'class', '--w', '0.5'))
    assert guided['denoised'] and guided['guidance'] == 'ClassGuidance(0.5, constant)'
    assert 'there is no folder' in command('nothing', ok=False)
    assert '96 MB' in command('flow', '--extractor', 'inception', ok=False)


@pytest.mark.slow
def test_two_processes_draw_and_judge_the_samples_of_one(tmp_path):
    "The command as the chapter has it, under torchrun: one table, the numbers of one process, the first samples in order."
    def run(launcher, name):
        r = subprocess.run([*launcher, '-m', 'flowbook.scripts.evaluate', 'digits-0.1', '--data', 'digits', '--samples', '150', '--denoise', '--json', '--save', f'{name}.png'],
                           capture_output=True, text=True, cwd=tmp_path)
        assert r.returncode == 0 and r.stdout.count('"fid"') == 1, r.stdout + r.stderr
        return json.loads(r.stdout[r.stdout.index('{'):])
    one, two = run([sys.executable], 'one'), run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2'], 'two')
    for k in (*METRICS, 'agreement', 'bits_per_dim', 'n'): assert two[k] == pytest.approx(one[k], rel=1e-5, abs=1e-5), k
    assert (tmp_path/'one.png').read_bytes() == (tmp_path/'two.png').read_bytes()


@pytest.mark.parametrize('command,says', [
    (['evaluate', 'digits-0.1', '--save', 'nowhere.xyz/'], '--save'), (['evaluate', 'digits-0.1', '--device', 'abacus'], 'cpu, cuda or mps'), (['evaluate', 'digits-0.1', '--n', '1'], '2 images or more'),
    (['evaluate', 'digits-classifier'], 'DigitClassifier'), (['evaluate', 'mnist5k-0.2'], '--data: missing'), (['fid_stats', '--out', 'stats.npz'], '.safetensors'), (['fid_stats', '--batch-size', '0', '--out', 's.safetensors'], '1 or more'),
    (['fid_stats', '--device', 'abacus', '--out', 's.safetensors'], '--device')])
def test_mistakes_on_the_command_line_end_with_a_sentence_before_the_work(command, says, tmp_path, monkeypatch):
    import importlib
    module = importlib.import_module(f'flowbook.scripts.{command[0]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['command', *command[1:]])
    (tmp_path/'nowhere.xyz').mkdir()
    monkeypatch.setattr(module, 'collect' if command[0] == 'fid_stats' else 'draw', lambda *a, **k: pytest.fail('the work began'))
    with pytest.raises(SystemExit) as e: module.cli()
    assert says in str(e.value) and '\n' not in str(e.value)


def test_what_is_known_before_sampling_is_said_before_it(tmp_path):
    def never():
        pytest.fail('sampling began')
        yield
    plain = collect(digits(), 'digits', keep=False)
    with pytest.raises(ValueError, match="'kid' needs the features"): evaluate(never(), plain, 'kid', 'digits')
    with pytest.raises(ValueError, match='the reference was seen by'): evaluate(never(), plain, 'fid', torch.nn.Flatten())
    with pytest.raises(ValueError, match='kept none'): save_statistics(plain, tmp_path/'s.safetensors', features=True)
    with pytest.raises(ValueError, match='360 images'): evaluate(plain, plain, 'fid', n=100)
    assert abs(evaluate(plain, plain, 'fid')['fid']) < 1e-3                      # two statistics need no extractor


def test_a_module_in_train_mode_is_left_as_it_is():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(.5), torch.nn.Flatten()).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert abs(evaluate(digits(), digits(), 'fid', net)['fid']) < 1e-2
    assert all(m.training for m in net.modules()) and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize('out,says', [(lambda x: x.sum((1, 2, 3)), 'give'), (lambda x: {'logits': x.flatten(1)}, "with 'pooled'"), (lambda x: {'pooled': x}, 'give'), (lambda x: x.flatten(1) * math.nan, 'NaN')])
def test_what_an_extractor_returns_is_looked_at(out, says):
    class Net(torch.nn.Module):
        def forward(self, x): return out(x)
    net = Net()
    if says == 'give' and not isinstance(out(digits()[:2]), dict): net.forward = lambda x: {'pooled': out(x)}
    with pytest.raises(ValueError, match=says): evaluate(digits(), digits(), 'fid', net)
