"""The log book of a run: one curve through resumes, speed and its peak, the inside of flows, samples and FID over processes."""
import json
import math
import subprocess
import sys
import time
import types

import pytest
import torch
from torch import nn

import flowbook.monitor as monitor
from flowbook.data import load
from flowbook.flows import MAF, OnImages, shake
from flowbook.latent import LatentFlow
from flowbook.metrics import evaluate
from flowbook.monitor import (PEAKS, Journal, Speed, at_rest, block_stats, drawn, duration, filled, flat, grid, groups, line, memory, norms, peak, plot_run,
                              quality, read_log, set_aside)
from flowbook.simflow import SimFlow
from flowbook.tarflow import TarFlow
from flowbook.train import fit


def new_flow(seed=0, **kw):
    torch.manual_seed(seed)
    return shake(TarFlow(**{**dict(image_size=8, channels=1, patch_size=4, dim=16, blocks=3, layers=1, head_dim=8, classes=10), **kw}), seed=seed)


def digits(n=40):
    return load('digits').batch(range(n))


# --- the journal

def write(folder, steps, start=0, **kw):
    with Journal(folder, start, console=None, tensorboard=False, **kw) as j:
        for s in steps:
            j.write({'step': s, 'loss': float(s)})


def test_a_line_a_report_with_its_time_at_once(tmp_path):
    j = Journal(tmp_path/'run', console=None, tensorboard=False)
    j.write({'step': 10, 'loss': torch.tensor(1.5), 'blocks': [{'block': 1, 'z_std': .5}], 'who': tmp_path})
    entry, = map(json.loads, (tmp_path/'run'/'log.jsonl').read_text().splitlines())      # it is not closed: what is written is there
    assert entry['loss'] == 1.5 and entry['blocks'] == [{'block': 1, 'z_std': .5}] and entry['who'] == str(tmp_path)
    assert abs(time.time() - __import__('datetime').datetime.fromisoformat(entry['time']).timestamp()) < 10
    j.close()
    j.close()
    j.write({'step': 20})                                                                  # closed: silence, not an error of a run that ends


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_what_is_no_number_is_null_and_comes_back_as_nan(tmp_path, value):
    with Journal(tmp_path, console=None) as j:
        j.write({'step': 1, 'loss': value})
    text = (tmp_path/'log.jsonl').read_text()
    assert json.loads(text, parse_constant=lambda c: pytest.fail(c))['loss'] is None
    assert math.isnan(read_log(tmp_path)[0]['loss'])


@pytest.mark.fault('disk', 'the last line of the log is torn', 'readers leave it out, a resume sets it aside; nothing to do')
def test_a_resume_leaves_one_curve_and_keeps_the_rest(tmp_path):
    write(tmp_path, range(10, 100, 10))
    with open(tmp_path/'log.jsonl', 'a') as f:
        f.write('{"step": 100, "lo')
    write(tmp_path, range(50, 80, 10), start=40)
    write(tmp_path, range(70, 90, 10), start=60)
    assert [r['step'] for r in read_log(tmp_path)] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert [(e['event'], e['step'], e['set_aside']) for e in read_log(tmp_path, events=True)] == [('resumed', 40, 6), ('resumed', 60, 1)]
    aside = (tmp_path/'log.aside.jsonl').read_text().splitlines()
    steps = [json.loads(row)['step'] for row in aside if row.startswith('{"time"') and 'loss' in row]
    assert steps == [50, 60, 70, 80, 90, 70] and '{"step": 100, "lo' in aside


def test_a_run_that_starts_anew_sets_everything_aside(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [10])
    assert [r['step'] for r in read_log(tmp_path)] == [10] and not read_log(tmp_path, events=True)


@pytest.mark.fault('disk', 'the process dies while lines of the log after the checkpoint are set aside', 'the log is as it was, and the next start sets them aside; nothing to do')
def test_a_crash_while_setting_aside_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path, [10, 20, 30])
    before = (tmp_path/'log.jsonl').read_bytes()
    def crash(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(monitor.os, 'replace', crash)
    with pytest.raises(KeyboardInterrupt):
        set_aside(tmp_path/'log.jsonl', 10)
    assert (tmp_path/'log.jsonl').read_bytes() == before
    monkeypatch.undo()
    assert set_aside(tmp_path/'log.jsonl', 10) == 2 and set_aside(tmp_path/'log.jsonl', 10) == 0
    assert [r['step'] for r in read_log(tmp_path)] == [10]


def test_a_log_that_ends_whole_is_not_touched(tmp_path):
    write(tmp_path, [10, 20])
    inode = (tmp_path/'log.jsonl').stat().st_ino
    write(tmp_path, [30], start=20)
    assert (tmp_path/'log.jsonl').stat().st_ino == inode and not (tmp_path/'log.aside.jsonl').exists()


def test_only_rank_0_writes(tmp_path):
    with Journal(tmp_path/'no', rank=3) as j:
        j.write({'step': 1, 'loss': 1.})
        j.note('saved', 1)
        j.image('samples', None, 1)
        assert list(j.record(iter([{'step': 2}]))) == [{'step': 2}]
    assert not (tmp_path/'no').exists()


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match='start: -1'):
        Journal(tmp_path, start=-1)
    with Journal(tmp_path, console=None) as j, pytest.raises(ValueError, match="report: .*number of a 'step'"):
        j.write({'loss': 1})
    with pytest.raises(ValueError, match='no log.jsonl'):
        read_log(tmp_path/'nowhere')


RUBBISH = {'binary': bytes(b for b in range(256) if b not in (10, 13)) * 40, 'nested': b'[' * 100_000, 'long': b'{"step": 20, "loss": "' + b'x' * 10**8 + b'"}', 'digits': b'{"step": ' + b'9' * 100_000 + b'}', 'half': b'{"step": 20, "lo',
           'list': b'[1, 2]', 'no step': b'{"loss": 1.0}', 'step of words': b'{"step": "20", "loss": 1.0}', 'no number': b'{"step": NaN, "loss": 1.0}', 'code': b"__import__('os').system('touch ran')", 'pickle': b"cos\nsystem\n(S'touch ran'\ntR.".replace(b'\n', b'\x0b')}


@pytest.mark.fault('malice', 'a line of log.jsonl is rubbish: bytes, 100 MB without an end, a number for a word, a pickle', 'readers leave it out and warn with the file and the line, a resume sets it aside; look at the disk')
@pytest.mark.parametrize('kind', RUBBISH)
def test_rubbish_in_a_log_is_left_out_and_set_aside(tmp_path, monkeypatch, kind, tried):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [10])
    with open(tmp_path/'log.jsonl', 'ab') as f:
        f.write(RUBBISH[kind] + b'\n')
    with open(tmp_path/'log.jsonl', 'a') as f:
        f.write('{"step": 30, "loss": 3.0}\n')
    began = time.process_time()
    with pytest.warns(UserWarning, match=r'log.jsonl: \d+ of \d+ lines are no reports and are left out, the first is line 2') as told:
        assert [r['step'] for r in read_log(tmp_path)] == [10, 30]
    assert time.process_time() - began < 2
    tried(said=told[0].message)
    write(tmp_path, [40], start=30)                                                          # the run goes on
    assert [r['step'] for r in read_log(tmp_path)] == [10, 30, 40] and len(RUBBISH[kind]) <= (tmp_path/'log.aside.jsonl').stat().st_size and not (tmp_path/'ran').exists()


@pytest.mark.fault('malice', 'values of the log are words, lists or booleans where a curve wants numbers', 'the picture of the run leaves them out; nothing to do')
def test_a_curve_has_numbers_only(tmp_path):
    (tmp_path/'log.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": "low"}\n{"step": 3, "loss": [1], "fid": true}\n{"step": 4, "loss": null}\n{"step": 5, "event": 7}\n')
    ax, = plot_run(tmp_path).axes
    assert ax.get_title() == 'loss' and ax.lines[0].get_xdata().tolist() == [1, 4]


def test_a_tensor_of_another_shape_is_not_stretched_into_a_model():
    flow = new_flow()
    name = 'blocks.0.proj_in.bias'
    before = flow.state_dict()[name].clone()
    with pytest.raises(ValueError, match=name):
        filled(flow, {name: torch.ones(1)})
    assert torch.equal(flow.state_dict()[name], before)


class FakeWriter:
    made = []
    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.images, self.closed = folder, purge_step, [], [], False
        FakeWriter.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, image, step, dataformats):
        self.images.append((name, image.shape, step, dataformats))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_gets_numbers_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=FakeWriter))
    monkeypatch.setattr(FakeWriter, 'made', [])
    flow = new_flow()
    for start in (0, 40):
        with Journal(tmp_path, start, console=None) as j:
            j.write({'step': start + 5, 'loss': 1., 'nan': math.nan, 'text': 'x', 'blocks': [{'block': 1, 'z_std': .5}, {'block': 2, 'z_std': .6}], 'norms': {'encoder': {'grad': 2.}}})
            j.image('samples', grid(flow, tmp_path, start, 4), start)
    first, second = FakeWriter.made
    assert first.folder == str(tmp_path/'tensorboard') and (first.purge_step, second.purge_step) == (None, 41) and first.closed and second.closed
    assert {(n, v) for n, v, s in first.scalars if s == 5} == {('loss', 1.), ('blocks/1/block', 1), ('blocks/1/z_std', .5), ('blocks/2/block', 2), ('blocks/2/z_std', .6), ('norms/encoder/grad', 2.)}
    (name, shape, step, order), = first.images
    assert (name, step, order) == ('samples', 0, 'HWC') and len(shape) == 3 and shape[2] == 3


def test_without_tensorboard_it_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)                      # import fails
    write(tmp_path, [1])
    with Journal(tmp_path, console=None) as j:
        assert j.board is None


def test_flat_names():
    assert dict(flat({'a': 1, 'b': {'c': 2.}, 'd': [3, {'block': 7, 'e': 4}], 'f': True, 'g': None})) == {'a': 1, 'b/c': 2., 'd/1': 3, 'd/7/block': 7, 'd/7/e': 4}


def test_the_line_for_people(tmp_path):
    text = line({'step': 1200, 'loss': 2.34567, 'grad_norm': .512, 'lr': 1e-4, 'images_per_s': 1234.4, 'peak_share': .412, 'data_wait': .023, 'memory_gb': 12.34, 'left_s': 90000}, 50000)
    assert text == 'step  1,200 of 50,000  loss 2.3457  gradient 0.512  lr 0.0001  1,234 images/s  41% of peak  2% waiting  12.3 GB  1 d 01 h left'
    assert line({'step': 3, 'loss': None}) == 'step 3'
    assert [duration(s) for s in (5, 65, 3661, 90061)] == ['0 min 05 s', '1 min 05 s', '1 h 01 min', '1 d 01 h']
    said = []
    with Journal(tmp_path, console=said.append) as j:
        j.write({'step': 3, 'loss': 1.})
        j.write({'step': 3, 'blocks': []})
    assert said == ['step 3  loss 1.0000']


def test_it_reads_fit(tmp_path):
    x, y = digits()
    speed = Speed(40, flops=1e6, world=1)
    with Journal(tmp_path, console=None) as j:
        seen = list(j.record(fit(new_flow(), speed.watch([(x, y)] * 6), steps=6, every=2), speed))
    log = read_log(tmp_path)
    assert [r['step'] for r in log] == [r['step'] for r in seen] == [2, 4, 6]
    assert all(r['loss'] == s['loss'] and r['images_per_s'] > 0 and 0 <= r['data_wait'] <= 1 for r, s in zip(log, seen))


# --- speed

NAMES = {'NVIDIA A100-SXM4-80GB': (312e12, 156e12, 19.5e12), 'NVIDIA A100 80GB PCIe': (312e12, 156e12, 19.5e12), 'NVIDIA H100 80GB HBM3': (989e12, 495e12, 67e12),
         'NVIDIA H100 PCIe': (756.5e12, 378e12, 51e12), 'NVIDIA H100 NVL': (835.5e12, 417.5e12, 60e12), 'NVIDIA H200': (989e12, 495e12, 67e12),
         'NVIDIA B200': (2250e12, 1125e12, 75e12), 'NVIDIA GB200': (None,) * 3, 'NVIDIA L40S': (362e12, 183e12, 91.6e12), 'NVIDIA GeForce RTX 4090': (165e12, 82.6e12, 82.6e12), 'Tesla V100-SXM2-32GB': (None, None, 15.7e12),
         'NVIDIA GeForce RTX 4090 Laptop GPU': (None,) * 3, 'NVIDIA A100-SXM4-40GB MIG 1g.5gb': (None,) * 3, 'NVIDIA L40': (None,) * 3, 'NVIDIA H20': (None,) * 3,
         'NVIDIA A10G': (None,) * 3, 'AMD Instinct MI300X': (None,) * 3, 'cpu': (None,) * 3, 'mps': (None,) * 3}


@pytest.mark.parametrize('name', NAMES)
def test_peaks_by_name(name):
    assert tuple(peak(name, p) for p in ('bf16', 'tf32', 'fp32')) == NAMES[name]


def test_peaks_are_plausible(monkeypatch):
    for p in PEAKS.values():                                                                 # tensor cores: bf16 is twice tf32
        if 'bf16' in p:
            assert 1.9 < p['bf16'] / p['tf32'] < 2.1 and p['fp32'] <= 1.01 * p['tf32']
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d: 'NVIDIA H200')
    assert peak('cuda:3') == peak(torch.device('cuda')) == 989e12
    with pytest.raises(ValueError, match="precision: 'fp8'"):
        peak('cpu', 'fp8')


class Clock:
    "time.perf_counter that moves when it is told to."
    def __init__(self):
        self.now = 100.

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    c = Clock()
    monkeypatch.setattr(monitor.time, 'perf_counter', c.perf_counter)
    return c


def test_speed_by_a_clock_that_we_hold(clock, monkeypatch):
    monkeypatch.setattr(monitor, 'peak', lambda *_: 1e12)
    def data():
        clock.now += 50.                                                                     # workers start: no part of a step
        yield 0
        while True:
            clock.now += .25
            yield 0
    speed = Speed(32, flops=8e11, world=4, start=100, steps=110)
    it = speed.watch(data())
    for k in range(4):
        next(it)
        clock.now += .75
    got = speed.read(104)                                                                    # 4 steps: 3 waits of .25, 4 x .75 of work
    assert got['images_per_s'] == pytest.approx(4 * 32 / 3.75) and got['step_s'] == pytest.approx(3.75 / 4) and got['data_wait'] == pytest.approx(.75 / 3.75)
    assert got['flops_per_s'] == pytest.approx(4 * 8e11 / 3.75 / 4) and got['peak_share'] == pytest.approx(got['flops_per_s'] / 1e12) and got['left_s'] == pytest.approx(6 * 3.75 / 4)
    with speed.paused():
        clock.now += 500.
        with speed.paused():
            clock.now += 7.
    next(it)
    clock.now += .75
    assert speed.read(105)['step_s'] == pytest.approx(1.)
    assert speed.read(105) == {}


def test_micro_batches_are_no_steps(clock):
    speed = Speed(64, world=1)
    it = speed.watch(iter(range(100)))
    for k in range(8):
        next(it)
        clock.now += .5
    assert speed.read(2)['images_per_s'] == pytest.approx(2 * 64 / 4.)


def test_what_the_reader_does_is_no_training(clock):
    def logs():
        for step in (1, 2, 3):
            clock.now += 1.
            yield {'step': step}
    speed, took = Speed(10, world=1), []
    for r in Journal('nowhere', rank=1).record(logs(), speed):
        took.append(r['step_s'])
        clock.now += 77.
    assert took == pytest.approx([1., 1., 1.])


def test_without_a_peak_there_is_no_share():
    speed = Speed(1, flops=1., device='cpu')
    time.sleep(.01)
    assert 'peak_share' not in speed.read(1) and 'left_s' not in speed.read(2)


def test_memory_is_what_the_process_holds():
    before = memory()
    x = torch.ones(30_000_000)
    assert .1 < memory() - before < .2 and x.sum() == 30_000_000                            # 0.12 GB
    assert .05 < before < 64


def test_watch_ends_with_its_data():
    assert list(Speed(1).watch([1, 2, 3])) == [1, 2, 3]


# --- inside the flow

def by_hand(flow, x, y):
    z, out = flow.to_parts(x), []
    for part in flow.parts():
        mu, alpha, _ = part.params(part.read(z), y)
        z, ld = part(z, y)
        out.append((z, alpha, ld))
    return out


@pytest.mark.parametrize('kind', ['nvp', 'vp', 'coupling'])
def test_block_stats_are_what_the_blocks_do(kind):
    flow, (x, y) = new_flow(kind=kind).double(), digits()
    with torch.no_grad():
        wanted = by_hand(flow, x.double(), y)
        before = flow(x.double(), y)
    stats = block_stats(flow, x.double(), y)
    assert [s['block'] for s in stats] == [1, 2, 3]
    sizes = [abs(ld.mean().item() / 64) for *_, ld in wanted]
    for s, (z, alpha, ld), size in zip(stats, wanted, sizes):
        close = lambda key, v: abs(s[key] - float(v)) < 1e-9
        assert close('z_mean', z.mean()) and close('z_std', z.std(correction=0)) and close('alpha_mean', alpha.mean()) and close('alpha_std', alpha.std(correction=0))
        assert close('logdet', ld.mean() / 64) and close('logdet_share', size / (sum(sizes) or 1.))
    with torch.no_grad():
        after = flow(x.double(), y)
    assert torch.equal(before[0], after[0]) and not any(b._forward_hooks or 'split' in vars(b) for b in flow.blocks)      # no traces


def test_block_stats_of_other_flows_and_of_a_joint_model():
    x, y = digits()
    for t, s in enumerate(block_stats(OnImages(shake(MAF(64, hidden=16, blocks=2)), (1, 8, 8)), x), 1):
        assert s['block'] == t and s['alpha_mean'] == -s['logdet'] != 0 and 'alpha_std' not in s
    model = SimFlow.from_pretrained('digits-simflow')
    state = torch.get_rng_state()
    stats = block_stats(model, x, y)
    assert torch.equal(torch.get_rng_state(), state) and len(stats) == len(model.flow.blocks)
    assert .8 < stats[-1]['z_std'] < 1.2 and block_stats(model, x, y) == stats


@pytest.mark.slow
def test_block_stats_of_a_compiled_flow():
    flow, (x, y) = new_flow(), digits()
    want = block_stats(flow, x, y)
    flow.compile(backend='eager')
    flow(x, y)
    assert block_stats(flow, x, y) == want


def test_a_failing_flow_is_left_as_it_was():
    flow = new_flow()
    with pytest.raises(ValueError):
        block_stats(flow, digits()[0], torch.full((40,), 99))
    assert not any(b._forward_hooks or 'split' in vars(b) for b in flow.blocks)


def test_norms_by_group():
    flow, (x, y) = new_flow(kind='vp'), digits()
    assert list(norms(flow)) == ['block 1', 'block 2', 'block 3', 'log_prior_var']           # what is in no block has its own name
    assert all(v['grad'] == 0. for v in norms(flow).values())
    (-flow.log_prob(x, y).mean()).backward()
    got, projector = norms(flow, head := nn.Sequential(nn.Linear(3, 4))), head[0]
    assert list(got) == ['block 1', 'block 2', 'block 3', 'log_prior_var', '0']
    for name, module in (('block 2', flow.blocks[1]), ('0', projector)):
        ps = list(module.parameters())
        assert got[name]['weight'] == pytest.approx(math.sqrt(sum(p.square().sum().item() for p in ps)), rel=1e-6)
        assert got[name]['grad'] == pytest.approx(math.sqrt(sum(p.grad.square().sum().item() for p in ps if p.grad is not None)), rel=1e-5)


def test_a_joint_model_has_encoder_decoder_and_blocks():
    model = SimFlow.from_pretrained('digits-simflow')
    found = groups(model)
    assert list(found) == [f'block {t}' for t in range(1, len(model.flow.blocks) + 1)] + ['encoder', 'decoder']
    assert sum(p.numel() for ps in found.values() for p in ps) == sum(p.numel() for p in model.parameters())


# --- samples

def test_sample_i_is_the_same_however_it_is_drawn():
    flow = new_flow()
    whole = torch.cat(list(drawn(flow, 23, 7, batch_size=23)))
    assert whole.shape == (23, 1, 8, 8)
    for world in (2, 3):
        for r in range(world):
            part = torch.cat(list(drawn(flow, 23, 7, batch_size=5, part=(r, world))))
            torch.testing.assert_close(part, whole[r::world], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.cat(list(drawn(flow, 23, 8))), whole)


def test_labels_are_spread():
    flow = new_flow()
    seen = []
    def spy(f, z, y, *args, **kw):
        seen.append(y)
        return f.inverse(z, y)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(monitor, 'invert', spy)
        list(drawn(flow, 5)), list(drawn(flow, 25))
    assert seen[0].tolist() == [0, 2, 4, 6, 8] and seen[1].tolist() == [i % 10 for i in range(25)]


def test_joint_and_latent_models_decode():
    for model, how in ((SimFlow.from_pretrained('digits-simflow'), dict(gamma=.1)), (LatentFlow.from_pretrained('digits-latent-0.2'), dict(sigma=.2))):
        x = torch.cat(list(drawn(model, 6, **how)))
        assert x.shape == (6, 1, 8, 8) and x.isfinite().all()
        assert not torch.equal(x, torch.cat(list(drawn(model, 6))))


def test_drawing_leaves_modes_and_random_numbers(tmp_path):
    flow = new_flow().train()
    flow.blocks[1].eval()
    state = torch.get_rng_state()
    grid(flow, tmp_path, 3, 4)
    assert torch.equal(torch.get_rng_state(), state) and flow.training and not flow.blocks[1].training and flow.blocks[0].training
    with pytest.raises(KeyError), at_rest(flow):
        assert not flow.training
        raise KeyError
    assert flow.training


def test_a_grid_is_a_file(tmp_path):
    from PIL import Image
    flow = new_flow()
    path = grid(flow, tmp_path, 1200, 6, nrow=3)
    assert path == tmp_path/'samples'/'step-00001200.png'
    first = path.read_bytes()
    with Image.open(path) as im:
        assert im.size[0] > im.size[1]
    with torch.no_grad():
        flow.blocks[0].proj_out.bias.add_(1e-3)
    assert grid(flow, tmp_path, 1200, 6, nrow=3) == path and path.read_bytes() != first


def test_quality_is_evaluate_of_what_was_drawn():
    flow, test = new_flow(), load('digits', 'test')
    got = quality(flow, test, 60, ('fid', 'is'), 'digits')
    want = evaluate(torch.cat(list(drawn(flow, 60))), test, ('fid', 'is'), 'digits', on_broken='drop')
    assert got == pytest.approx(want)


def test_bad_counts_are_refused(tmp_path):
    flow = new_flow()
    for f, words in ((lambda: quality(flow, None, 1), 'n: 1 came'), (lambda: drawn(flow, 0), 'n: 0'), (lambda: drawn(flow, 5, batch_size=0), 'batch_size: 0'), (lambda: grid(flow, tmp_path, 1, 0), 'n: 0')):
        with pytest.raises(ValueError, match=words):
            f()


def test_filled_refuses_strangers():
    with pytest.raises(ValueError, match="'nobody' is no tensor of TarFlow"):
        filled(new_flow(), {'nobody': torch.zeros(1)})


# --- the picture

def test_plot_run(tmp_path):
    with Journal(tmp_path, console=None) as j:
        for s in range(10, 60, 10):
            j.write({'step': s, 'loss': 1 / s, 'grad_norm': s, 'images_per_s': 3.})
        j.write({'step': 50, 'fid': 7.})
    with Journal(tmp_path, start=30, console=None) as j:
        j.write({'step': 40, 'loss': math.nan, 'grad_norm': 1.})
    fig = plot_run(tmp_path)
    assert [ax.get_title() for ax in fig.axes] == ['loss', 'gradient', 'speed'] and all(ax.get_xlabel() and ax.get_ylabel() for ax in fig.axes)   # the FID was measured after step 30: aside
    loss = fig.axes[0].lines[0].get_xydata()
    assert loss[:, 0].tolist() == [10, 20, 30, 40] and math.isnan(loss[3, 1])
    assert all(ax.lines[-1].get_xdata()[0] == 30 for ax in fig.axes)                         # the resume
    (tmp_path/'log.jsonl').write_text('')
    with pytest.raises(ValueError, match='no report'):
        plot_run(tmp_path)


# --- over processes

def one_rank(rank, world, meet, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=world)
    try:
        flow, test = new_flow(), load('digits', 'test')
        x, y = digits()
        out = {'stats': block_stats(flow, x[rank::world], y[rank::world]), 'quality': quality(flow, test, 60, ('fid', 'precision', 'recall'), 'digits', batch_size=7), 'path': str(grid(flow, folder, 5, 9))}
        with Journal(folder, console=None) as j:
            j.write({'step': 1, 'loss': float(rank)})
        (-flow.log_prob(x, y).mean()).backward()
        out['norms'] = norms(flow)
        torch.save(out, folder/f'{rank}.pt')
        torch.distributed.barrier()                                                          # who leaves early can take the other down
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    (tmp_path/'two').mkdir()
    torch.multiprocessing.spawn(one_rank, (2, tmp_path/'meet', tmp_path/'two'), nprocs=2)
    a, b = (torch.load(tmp_path/'two'/f'{r}.pt') for r in (0, 1))
    flow, (x, y) = new_flow(), digits()
    (-flow.log_prob(x, y).mean()).backward()
    for got in (a, b):
        for s, t in zip(got['stats'], block_stats(flow, x, y)):
            assert s == pytest.approx(t, abs=1e-6)
        assert got['quality'] == pytest.approx(quality(flow, load('digits', 'test'), 60, ('fid', 'precision', 'recall'), 'digits'), rel=1e-3)
        for k, v in norms(flow).items():
            assert got['norms'][k] == pytest.approx(v, rel=1e-5)
    assert a['path'].endswith('step-00000005.png') and b['path'] == 'None'
    from PIL import Image, ImageChops
    with Image.open(a['path']) as two, Image.open(grid(flow, tmp_path/'one', 5, 9)) as one:
        assert two.size == one.size and ImageChops.difference(two, one).getextrema()[1] <= 1
    assert [r['loss'] for r in read_log(tmp_path/'two')] == [0.]


def one_shard(rank, world, meet, folder):
    from flowbook.scale import leave
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=world)
    try: measured_in_shards(rank, world, folder)
    finally: leave()                                          # once the sharded model is gone: a process that ends while it holds its group can abort


def measured_in_shards(rank, world, folder):
    from torch.distributed.fsdp import fully_shard
    mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (world,))
    flow, (x, y) = new_flow(kind='vp'), digits()
    for b in flow.blocks:
        fully_shard(b, mesh=mesh)
    fully_shard(flow, mesh=mesh)
    z, logdet = flow(x[rank::world], y[rank::world])
    loss = (z**2).sum((1, 2)).mean() - logdet.mean()
    loss.backward()
    out = {'norms': norms(flow), 'stats': block_stats(flow, x[rank::world], y[rank::world])}
    whole = filled(new_flow(1, kind='vp'), dict(flow.named_parameters()))
    out['whole'] = whole.state_dict()
    with pytest.raises(ValueError) as e: drawn(flow, 4)
    out['refused'] = str(e.value)
    torch.save(out, folder/f'{rank}.pt')


@pytest.mark.slow
def test_sharded_parameters_have_the_norms_of_whole_ones(tmp_path):
    torch.multiprocessing.spawn(one_shard, (2, tmp_path/'meet', tmp_path), nprocs=2)
    flow, (x, y) = new_flow(kind='vp'), digits()
    z, logdet = flow(x, y)
    ((z**2).sum((1, 2)).mean() - logdet.mean()).backward()
    for r in (0, 1):
        got = torch.load(tmp_path/f'{r}.pt')
        for k, v in norms(flow).items():
            assert got['norms'][k] == pytest.approx(v, rel=1e-5), k
        for s, t in zip(got['stats'], block_stats(flow, x, y)):
            assert s == pytest.approx(t, abs=1e-6)
        assert all(torch.equal(v, got['whole'][k]) for k, v in flow.state_dict().items())
        assert 'sharded' in got['refused'] and 'filled' in got['refused']


def test_the_picture_of_a_run_from_a_shell(tmp_path, capsys):
    with Journal(tmp_path, steps=4, console=None, tensorboard=False) as journal:
        for k in (1, 2): journal.write({'step': k, 'loss': 2. - k / 4, 'grad_norm': 1., 'images_per_s': 100.})
        journal.note('saved', 2)
    found = subprocess.run([sys.executable, '-m', 'flowbook.monitor', str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0 and (tmp_path/'run.png').stat().st_size > 5000 and 'step 2' in found.stdout and 'saved at step 2' in found.stdout, found
    missing = subprocess.run([sys.executable, '-m', 'flowbook.monitor', str(tmp_path/'none')], capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr.startswith('monitor: folder: ') and 'Traceback' not in missing.stderr
    assert monitor.main([str(tmp_path), '--out', str(tmp_path/'other.png')]) == tmp_path/'other.png' and (tmp_path/'other.png').exists()
