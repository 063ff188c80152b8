"What the scripts share: where images come from, what is held out, progress, devices, and mistakes in the words of the command line."
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from flowbook.metrics import load_statistics
from flowbook.scripts import demo, evaluate, fid_stats, sample
from flowbook.tarflow import TarFlow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Two classes of twenty grey images of 8x8, in a folder `mine` of the working directory."
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    for kind in ('cats', 'dogs'):
        (tmp_path/'mine'/kind).mkdir(parents=True)
        for i in range(20): Image.fromarray((torch.rand(8, 8, 3, generator=g) * 255).byte().numpy()).save(tmp_path/'mine'/kind/f'{i}.png')
    return tmp_path/'mine'


@pytest.fixture
def flow(folder):
    "A fresh flow of 3x8x8 images that a configuration trained on `mine`, by its card."
    flow = TarFlow(8, 3, 4, 16, 2, 1, 8, classes=2)
    flow.save_pretrained('flow', card={'sigma': .1, 'config': {'data': {'name': 'folder', 'root': 'mine', 'held_out': .1}}})
    return flow


# ---------------------------------------------------------------- which images
@pytest.mark.fault('arguments', '`--root` without `--data`, in any script', 'the folder is read, never the digits in its place')
def test_root_alone_means_the_folder(folder, capsys):
    stats = load_statistics(fid_stats.main('--root mine --extractor digits --out a.safetensors'.split()))
    assert stats.n == 36 and 'mine' in stats.dataset and '36 of 40 images; 4 held out, there is no val folder' in capsys.readouterr().out
    assert load_statistics(fid_stats.main('--root mine --held-out 0 --extractor digits --out b.safetensors'.split())).n == 40
    report = demo.main('--root mine --image-size 8 --steps 2 --batch-size 4 --dim 16 --blocks 2 --layers 1 --device cpu --out out'.split())
    assert report['data'] == 'folder' and 'folder: 36 training and 4 test images' in (said := capsys.readouterr().out)
    assert '36 of 40 images; 4 held out, there is no val folder' in said


@pytest.mark.parametrize('main,line', [(fid_stats.main, '--out a.safetensors'), (evaluate.main, 'digits-0.1 --n 10'), (demo.main, '')])
@pytest.mark.parametrize('data', ['digits', 'mnist5k'])
@pytest.mark.fault('arguments', 'a folder is named beside a dataset that comes with the book', 'refused: nothing would be read from there; leave one of the two out')
def test_a_root_that_is_not_used_is_an_error(folder, main, line, data):
    with pytest.raises((ValueError, SystemExit), match=f'--root: mine came, but {data} comes with the book'): main([*line.split(), '--root', 'mine', '--data', data])
    with pytest.raises((ValueError, SystemExit), match='--held-out: 0.2 came, but it is about a folder'): main([*line.split(), '--held-out', '.2', '--data', data])
    with pytest.raises((ValueError, SystemExit), match='--root|--data folder needs'): main([*line.split(), '--data', 'folder'])


def test_evaluate_says_what_was_held_out_and_takes_the_share_from_the_card(flow, capsys):
    line = 'flow --n 20 --metrics fid --extractor digits --device cpu'.split()
    out = evaluate.main(line)
    said = capsys.readouterr()
    assert '36 of 40 images; 4 held out' in said.err and '36 of 40 images' in out['reference'] and '4 of 40 images, held out' in out['test']
    assert 'no published number compares with these, and it has seen nothing but digits' in said.out and out['bits_per_dim'] > 0
    out = evaluate.main([*line, '--held-out', '0'])
    assert out['n_reference'] == 40 and 'bits_per_dim' not in out and 'test' not in out
    flow.save_pretrained('flow', card={'sigma': .1, 'config': {'data': {'name': 'folder', 'root': 'mine', 'held_out': 0.}}})
    assert evaluate.main(line)['n_reference'] == 40
    assert json.loads(json.dumps(out)) == out


@pytest.mark.fault('data', 'the card of a model names a folder of images that is not here', 'the message names the folder; give --root')
def test_a_card_whose_images_are_elsewhere(flow, tmp_path, monkeypatch):
    (tmp_path/'elsewhere').mkdir(); monkeypatch.chdir(tmp_path/'elsewhere')
    with pytest.raises(ValueError, match='its card names images in mine, which is not here: give --root'): evaluate.main(['../flow', '--n', '4'])


# ---------------------------------------------------------------- what is said meanwhile
def test_progress_says_how_far_and_how_long(capsys, monkeypatch):
    p = fid_stats.Progress('samples', 100, every=0.)
    p(10); p(30); p(60)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith('samples: 10 of 100,') and second.startswith('samples: 40 of 100,') and 'a second, about' in second and second.endswith(' more')
    monkeypatch.setenv('RANK', '1'); p(1); fid_stats.Progress('samples', 100)(10)
    assert capsys.readouterr().err == ''
    assert [fid_stats.lasting(s) for s in (5., 600., 9e4)] == ['5 s', '10 minutes', '25.0 hours']


def test_the_gpu_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert fid_stats.best_device('auto') == 'cuda' and fid_stats.best_device('cpu') == 'cpu'
    for p, line in ((fid_stats.parser(), ['--out', 'x']), (evaluate.parser(), ['x']), (sample.parser(), ['x'])): assert p.parse_args(line).device == 'auto'


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize('module,line,says', [
    ('evaluate', 'pub', "flowbook_evaluate: checkpoint: there is no folder 'pub'"), ('sample', 'pub', "flowbook_sample: checkpoint: there is no folder 'pub'"),
    ('fid_stats', '--root nowhere --out x.safetensors', 'flowbook_fid_stats: --root: nowhere is not a folder'),
    ('fid_stats', '--data digts --out x.safetensors', 'flowbook_fid_stats: --data: '), ('evaluate', 'digits-0.1 --metrics fdi', 'flowbook_evaluate: --metrics: '),
    ('fid_stats', '--data digits --extractor inception --out x.safetensors', 'name the file by --weights or FLOWBOOK_INCEPTION')])
def test_messages_name_what_is_typed(folder, monkeypatch, module, line, says):
    monkeypatch.setenv('TORCH_HOME', str(folder)); monkeypatch.delenv('FLOWBOOK_INCEPTION', raising=False)
    monkeypatch.setattr(sys, 'argv', ['x', *line.split()])
    with pytest.raises(SystemExit) as e: getattr(sys.modules[f'flowbook.scripts.{module}'], 'cli')()
    assert says in str(e.value) and '\n' not in str(e.value)
    if 'inception' in line: assert '--extractor digits' in str(e.value) and 'curl -LO' in str(e.value)


def test_under_torchrun_rank_0_speaks_first(monkeypatch):
    waited = []
    monkeypatch.setattr(fid_stats.time, 'sleep', waited.append)
    def wrong(): raise ValueError('n: 0 came')
    for rank in '01':
        monkeypatch.setenv('RANK', rank)
        with pytest.raises(SystemExit, match='it: n: 0 came'): fid_stats.as_script(wrong, 'it')
    assert waited == [3]


@pytest.mark.parametrize('name', ['fid_stats', 'evaluate', 'sample', 'demo', 'bench', 'remake', 'experiment'])
def test_a_script_that_is_run_by_its_path_says_how_to_run_it(name):
    r = subprocess.run([sys.executable, sys.modules['flowbook.scripts.demo'].__file__.replace('demo.py', f'{name}.py'), '--help'], capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr == f'run it as a module: python -m flowbook.scripts.{name}\n'


# ---------------------------------------------------------------- broken samples
def test_broken_samples_are_drawn_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = sample.Opened.draw
    def draw(self, index, y, way, seed, solver, noise, dtype, attempt):     # the third sample breaks until its third attempt
        d = whole(self, index, y, way, seed, solver, noise, dtype, attempt)
        bad = (index == 2) & (attempt < 3)
        return d._replace(latents=d.latents.masked_fill(bad.view(-1, 1, 1, 1), torch.nan), images=d.images.masked_fill(bad.view(-1, 1, 1, 1), torch.nan))
    monkeypatch.setattr(sample.Opened, 'draw', draw)
    out = sample.main('digits-0.1 --n 4 --out kept --device cpu'.split())
    assert out['broken'] == 1 and '1 are broken' in (said := capsys.readouterr().out) and '--redraw draws such again' in said
    out = sample.main('digits-0.1 --n 4 --out again --redraw --device cpu'.split())
    assert out['broken'] == 0 and 'broken' not in capsys.readouterr().out
    one, two = ([(tmp_path/k/str(i)/f'{i:06}.png').read_bytes() for i in range(4)] for k in ('kept', 'again'))
    assert [a == b for a, b in zip(one, two)] == [True, True, False, True]
    monkeypatch.setattr(sample, 'ATTEMPTS', 2)
    assert sample.main('digits-0.1 --n 4 --redraw --device cpu'.split())['broken'] == 1
    with pytest.raises(ValueError, match='that were drawn with --redraw, and this call is without'): sample.main('digits-0.1 --n 4 --out again --device cpu'.split())
    with pytest.raises(ValueError, match='that were drawn without --denoise, and this call is with it'): sample.main('digits-0.1 --n 4 --out kept --denoise --device cpu'.split())
