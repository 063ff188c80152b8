"""The loader: each sample once an epoch at any world size, exact resume with any number of workers, broken files, workers that die."""
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from flowbook.data import Flip, Folder, InMemory, batches, find_images, keyed, load
from flowbook.latent import CachedLatents, Pick, cache_latents
from flowbook.loader import BadSample, TooManyBadSamples, WorkerDied, joined, loader, micro_batches, name_of, read
from flowbook.train import DropLabels, GaussianNoise

NOISE = Flip(), GaussianNoise(.1), DropLabels(.2)
linux = pytest.mark.skipif(sys.platform != 'linux', reason='signals and /proc of Linux')


def small(n=37):
    g = torch.Generator().manual_seed(0)
    return InMemory(torch.randint(256, (n, 1, 8, 8), generator=g).to(torch.uint8), torch.arange(n) % 5, 'abcde', name='small')


def take(data, count, batch_size=6, seed=3, transforms=NOISE, **kw):
    feed = loader(data, batch_size, seed, transforms, **kw)
    try:
        return list(itertools.islice(feed, count))
    finally:
        feed.close()


def same(a, b):
    return len(a) == len(b) and all(torch.equal(u, v) for p, q in zip(a, b) for u, v in zip(p[:3], q[:3])) and [p[3:5] for p in a] == [q[3:5] for q in b]


# --- the plan

def plan(n, B, steps, world=1, accumulate=1, start=0, seed=0):
    "Rows (step, epoch, index) in the order of the line, put together from what the ranks read."
    out = []
    for s in range(start, start + steps):
        rows = []
        for r in range(world):
            micros = list(itertools.islice(micro_batches(n, B, seed, s, (r, world), accumulate), accumulate))
            assert all(sum(len(i) for _, i in m) == B // (world * accumulate) for m in micros)
            rows.append([(s, e, i) for m in micros for e, index in m for i in index])
        out += [x for column in zip(*rows) for x in column]
    return out


@pytest.mark.parametrize('world', [1, 2, 3, 4])
@pytest.mark.parametrize('n', [37, 50, 12, 7])
def test_over_the_ranks_each_epoch_is_a_permutation(n, world):
    B, epochs = 12, 4
    seen = plan(n, B, -(-epochs * n // B), world)
    for epoch in range(epochs):
        assert sorted(i for _, e, i in seen if e == epoch) == list(range(n))
    orders = [[i for _, e, i in seen if e == epoch] for epoch in range(epochs)]
    assert len({tuple(o) for o in orders}) == epochs


@pytest.mark.parametrize('world, accumulate', [(1, 2), (2, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_the_global_batch_does_not_depend_on_how_it_is_dealt_out(world, accumulate):
    whole = plan(37, 12, 9)
    dealt = plan(37, 12, 9, world, accumulate)
    assert dealt == whole


def test_a_rank_reads_what_batches_would_give_it():
    data = small()
    for part in ((0, 1), (0, 2), (1, 2), (2, 3)):
        ours = take(data, 6, part=part)
        theirs = list(batches(data, 6, 3, NOISE, epochs=1, part=part))           # 37 = 6 * 6 + 1
        assert same(ours, theirs)


def test_starting_later_is_skipping_and_costs_nothing():
    ours = list(itertools.islice(micro_batches(1000, 24, 5, 0, (1, 2), 3), 600))
    assert list(itertools.islice(micro_batches(1000, 24, 5, 123, (1, 2), 3), 231)) == ours[369:]
    began = time.perf_counter()
    next(micro_batches(1000, 24, start=10**9))
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize('kw, words', [
    (dict(batch_size=0), 'batch_size: 0'), (dict(batch_size=True), 'batch_size'), (dict(seed=-1), 'seed: -1'), (dict(start=1.5), 'start: 1.5'),
    (dict(part=(2, 2)), r'part: \(2, 2\)'), (dict(part=(-1, 2)), 'part'), (dict(part=(0, 5)), 'multiple of 5'), (dict(accumulate=0), 'accumulate: 0'),
    (dict(part=(0, 2), accumulate=4), 'multiple of 8'), (dict(workers=-1), 'workers: -1'), (dict(prefetch=0), 'prefetch: 0'), (dict(tolerance=2), 'tolerance: 2'),
    (dict(floor=-1), 'floor: -1'), (dict(method='forkserver'), "method: 'forkserver'"), (dict(transforms=[3]), 'transforms: 3')])
def test_arguments_are_refused_at_the_door(kw, words):
    with pytest.raises(ValueError, match=words):
        loader(small(), **{'batch_size': 12, **kw})


@pytest.mark.fault('data', 'the dataset is empty', 'refused at once')
def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match='data: is empty'):
        loader(Subset(small(), []), 2)


# --- what comes out

@pytest.mark.parametrize('workers', [1, 2])
def test_any_number_of_workers_gives_the_same(workers):
    data, how = small(), dict(part=(1, 2), accumulate=3)
    assert same(take(data, 60, 12, **how), take(data, 60, 12, workers=workers, **how))


@pytest.mark.slow
def test_spawned_workers_give_the_same():
    assert same(take(small(), 30), take(small(), 30, workers=2, method='spawn'))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_resume_at_every_step_gives_what_would_have_come(workers):
    data, how = small(), dict(batch_size=12, part=(1, 2), accumulate=2)
    whole = take(data, 24, **how)
    for done in range(0, 12, 1 if workers == 0 else 3):                            # borders of epochs at 3.08, 6.17, 9.25 steps
        assert same(take(data, 24 - 2 * done, start=done, workers=workers, **how), whole[2 * done:])


def test_a_batch_of_two_epochs_has_the_randomness_of_both():
    data, six = small(), take(small(), 7)[6]                                       # places 36 .. 41: one of epoch 0, five of epoch 1
    for e, rows in ((0, slice(0, 1)), (1, slice(1, 6))):
        alone = list(batches(data, 1, 3, NOISE, epochs=2))[37 * e:37 * (e + 1)]
        here = {int(b.index): b for b in alone}
        for x, y, i in zip(six.x[rows], six.y[rows], six.index[rows].tolist()):
            assert torch.equal(x, here[i].x[0]) and y == here[i].y[0]
    assert six.epoch == 0 and six.seed == 3


def test_joining_keeps_targets():
    b = next(batches(small(), 4))
    both = joined([b._replace(target=b.x[:, :, 0]), b._replace(target=b.x[:, :, 1])])
    assert both.target.shape == (8, 1, 8) and both.x.shape == (8, 1, 8, 8) and both.index.tolist() == 2 * b.index.tolist()
    assert joined([b, b]).target is None


def test_a_batch_larger_than_the_dataset_spans_several_epochs():
    got = take(small(7), 4, 20)
    index = torch.cat([b.index for b in got])
    for e in range(11):
        assert sorted(index[7 * e:7 * (e + 1)].tolist()) == list(range(7))


class Plain(Dataset):
    "A dataset of anyone: a length and an index."
    def __init__(self, n=20):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((1, 4, 4), i / self.n), i % 3


class TinyVae(torch.nn.Module):
    "What `cache_latents` asks of a VAE, without one."
    identity, name = 'tiny', 'tiny'
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def latent_shape(self, shape):
        return 1, shape[1] // 2, shape[2] // 2

    def moments(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 2)
        return torch.stack([mean, mean.abs() + .1], 1)


def some_latents(folder):
    digits = load('digits')
    few = InMemory(digits.images[:30], digits.labels[:30], digits.classes, 17, 'few')
    return CachedLatents(cache_latents(TinyVae(), few, folder, shard=8))


def test_datasets_of_all_kinds(tmp_path):
    digits, latents = load('digits'), some_latents(tmp_path)
    for data, transforms in ((digits, NOISE), (Plain(), NOISE), (Subset(digits, range(100, 130)), NOISE), (latents, [Pick(.5), GaussianNoise(.2)])):
        ours = take(data, 12, 8, transforms=transforms, workers=2)
        assert same(ours[:2], list(itertools.islice(batches(data, 8, 3, transforms), 2)))
        assert len(ours) == 12


def test_the_global_random_numbers_stay_as_they_are():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(small(), 5, workers=2)
    assert torch.equal(torch.get_rng_state(), before)


# --- broken files

@pytest.fixture
def folder(tmp_path):
    g = torch.Generator().manual_seed(0)
    for i in range(40):
        path = tmp_path/'train'/'ab'[i % 2]/f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (9, 9, 3), generator=g).to(torch.uint8).numpy()).save(path)
    for c in 'ab':
        (tmp_path/'test'/c).mkdir(parents=True)
        (tmp_path/'test'/c/'0.png').write_bytes((tmp_path/'train'/'a'/'00.png').read_bytes())
    return Folder(*find_images(tmp_path), 8, 'files')


def spoil(data, i, how):
    path = data.paths[i]
    if how == 'vanished':
        path.unlink()
    elif how == 'truncated':
        path.write_bytes(path.read_bytes()[:120])
    elif how == 'no image':
        path.write_text('<html>404</html>')
    else:
        path.write_bytes(b'')


@pytest.mark.fault('data', 'an image file vanishes, is cut off, is empty or no image, in the middle of a run', 'another sample takes its place, the same one after a resume; the log names the file; mend it when there is time')
@pytest.mark.parametrize('how', ['vanished', 'truncated', 'no image', 'empty'])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_file_is_replaced_named_and_logged_once_an_epoch(folder, how, workers, caplog):
    spoil(folder, 13, how)
    feed = loader(folder, 8, 0, NOISE, workers=workers)
    with caplog.at_level(logging.WARNING, 'flowbook.loader'):
        got = list(itertools.islice(feed, 10))                                      # two epochs of 40
    feed.close()
    assert [(e.epoch, e.index, e.name) for e in feed.errors] == [(0, 13, str(folder.paths[13])), (1, 13, str(folder.paths[13]))]
    assert feed.bad == 2 and feed.seen == 80
    text = [r.getMessage() for r in caplog.records]
    assert len(text) == 2 and all(str(folder.paths[13]) in t and 'sample 13' in t for t in text)
    for e in (0, 1):
        index = torch.cat([b.index for b in got[5 * e:5 * e + 5]])
        twice = [i for i in range(40) if (index == i).sum() == 2]
        assert 13 not in index and len(twice) == 1 and len(index) == 40
        assert twice[0] == int(keyed(0, e, 13, 'substitute').integers(40))          # the first draw could be read
    assert all(torch.equal(b.y[b.y >= 0], folder.labels[b.index][b.y >= 0]) for b in got)   # the label is the substitute's


@pytest.mark.fault('data', 'an image file vanishes, is cut off, is empty or no image, in the middle of a run', 'another sample takes its place, the same one after a resume; the log names the file; mend it when there is time')
def test_a_resume_takes_the_same_substitutes(folder):
    for i, how in ((3, 'vanished'), (21, 'truncated'), (22, 'no image')):
        spoil(folder, i, how)
    whole = take(folder, 15, 8)
    for done, workers in ((0, 1), (2, 2), (7, 0), (11, 2)):
        assert same(take(folder, 15 - done, 8, start=done, workers=workers), whole[done:])


@pytest.mark.fault('data', 'the file that takes the place of a bad one is bad, too', 'the next one is taken, and both are counted once; nothing to do')
def test_a_bad_substitute_is_passed_over_and_counted_once(folder, caplog):
    first = int(keyed(0, 0, 13, 'substitute').integers(40))
    spoil(folder, 13, 'vanished')
    spoil(folder, first, 'no image')
    feed = loader(folder, 8, workers=2)
    got = list(itertools.islice(feed, 5))
    feed.close()
    assert sorted(e.index for e in feed.errors) == sorted([13, first]) and len(caplog.records) == 2
    assert not {13, first} & set(torch.cat([b.index for b in got]).tolist())


@pytest.mark.fault('data', 'more files are bad than a run should bear', 'the run stops with the first of their names: look at the disk, or allow more')
@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_bad_files_stop_the_run(folder, workers, tried):
    for i in range(20):
        spoil(folder, i, 'vanished')
    feed = loader(folder, 8, workers=workers, floor=5)
    with pytest.raises(TooManyBadSamples, match=r'of \d+ samples could not be read, 5 are allowed') as e:
        for _ in range(5):
            next(feed)
    tried(said=e.value)
    assert len(e.value.errors) == e.value.bad > 5 and str(folder.paths[e.value.errors[0].index]) in str(e.value)
    with pytest.raises(StopIteration):
        next(feed)


@pytest.mark.fault('data', 'more files are bad than a run should bear', 'the run stops with the first of their names: look at the disk, or allow more')
def test_the_share_counts_when_the_floor_is_passed(folder):
    for i in range(4):
        spoil(folder, i, 'vanished')
    for tolerance, stops in ((.1, False), (.09, True)):                             # a tenth of the files is bad
        feed = loader(folder, 40, tolerance=tolerance, floor=0)
        if stops:
            with pytest.raises(TooManyBadSamples, match='4 of 40 .* 3.6 are allowed'):
                next(feed)
        else:
            assert len(next(feed).x) == 40


@pytest.mark.fault('disk', 'the disk with the images is gone', 'the run stops at the first batch that cannot be read, with the reason; go on when it is back')
def test_a_disk_that_is_gone_stops_the_run_at_once(folder, tried):
    for p in folder.paths:
        p.unlink()
    feed = loader(folder, 8, workers=2, floor=10**6, tolerance=1.)
    began = time.perf_counter()
    with pytest.raises(TooManyBadSamples, match='FileNotFoundError') as e:
        next(feed)
    tried(said=e.value)
    assert time.perf_counter() - began < 30


def test_too_many_bad_samples_survives_the_way_to_another_process():
    e = TooManyBadSamples(7, 100, 5, [BadSample(0, 3, 'a.png', 'OSError: gone')])
    f = pickle.loads(pickle.dumps(e))
    assert str(f) == str(e) and f.errors == e.errors and (f.bad, f.seen) == (7, 100)


def test_names(folder):
    assert name_of(folder, 3) == str(folder.paths[3]) and name_of(Subset(folder, [5, 6]), 1) == str(folder.paths[6])
    assert name_of(small(), 4) == 'sample 4 of small' and name_of(Plain(), 4) == 'sample 4 of Plain'


def test_a_latent_shard_is_named(tmp_path):
    assert '00002.safetensors' in name_of(some_latents(tmp_path), 17)


@pytest.mark.fault('disk', 'a read fails once and then works', 'the samples are read one by one, and none is lost or counted; nothing to do')
def test_a_hiccup_is_no_bad_sample_and_a_fault_of_the_whole_stands():
    class Hiccup(InMemory):
        times = 1
        def batch(self, index):
            if len(index) > 1 and self.times:
                self.times -= 1
                raise OSError('once')
            return super().batch(index)
    d = small()
    data, bad = Hiccup(d.images, d.labels, d.classes), []
    assert torch.equal(read(data, 0, [3, 4], 0, bad)[0], d.batch([3, 4])[0]) and not bad
    data.times = 99
    with pytest.raises(OSError, match='once'):
        read(data, 0, [3, 4], 0, bad)


@pytest.mark.fault('data', 'images of different shapes come in one batch', 'refused, with the shapes: give one size')
def test_images_of_different_shapes_are_a_fault_of_the_dataset():
    class Odd(Plain):
        def __getitem__(self, i):
            return torch.zeros(1, 4, 4 + i % 2), 0
    with pytest.raises(ValueError, match='different shapes'):
        take(Odd(), 1, 8)


# --- workers

class Accident:
    def __init__(self, what, epoch=0):
        self.what, self.epoch = what, epoch

    def __call__(self, batch):
        if 11 not in batch.index or batch.epoch != self.epoch:
            return batch
        if self.what == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == 'leave':
            os._exit(3)
        if self.what == 'hang':
            time.sleep(1000)
        if self.what == 'local':
            class Local(Exception):
                pass
            raise Local('cannot be pickled')
        raise self.what


class Two(Exception):
    def __init__(self, a, b):
        super().__init__(f'{a} and {b}')


@pytest.mark.fault('processes', 'a transform or a dataset raises in a worker process', 'the same exception in the trainer, with the place in the worker: mend it')
@pytest.mark.parametrize('error', [KeyError('a key'), ValueError('a value: 3 came'), FileNotFoundError(2, 'gone', 'x.png')])
def test_an_exception_of_a_worker_is_itself(error):
    with pytest.raises(type(error)) as e:
        take(small(), 20, transforms=[Accident(error)], workers=2)
    assert e.value.args == error.args and 'Accident' not in str(e.value) and '__call__' in str(e.value.__cause__)


@pytest.mark.fault('processes', 'a transform or a dataset raises in a worker process', 'the same exception in the trainer, with the place in the worker: mend it')
@pytest.mark.parametrize('workers', [0, 1])
def test_a_transform_that_raises_stop_iteration_is_not_the_end_of_the_data(workers):
    with pytest.raises(RuntimeError, match='raised StopIteration'):
        take(small(), 20, transforms=[Accident(StopIteration('early'))], workers=workers)


@pytest.mark.fault('processes', 'a transform or a dataset raises in a worker process', 'the same exception in the trainer, with the place in the worker: mend it')
def test_an_exception_that_cannot_travel_keeps_its_message():
    for what, words in ((Two(1, 2), 'Two: 1 and 2'), ('local', 'Local: cannot be pickled')):
        with pytest.raises(RuntimeError, match=words):
            take(small(), 20, transforms=[Accident(what)], workers=1)


def workers_of(feed):
    return [w.pid for w in feed._it._workers]


def gone(pids, seconds=5.):
    end = time.monotonic() + seconds
    def alive(p):
        try:
            return open(f'/proc/{p}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
        except OSError:
            return False
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(.05)
    return not any(map(alive, pids))


@pytest.mark.fault('processes', 'a process that reads data is killed, or leaves', 'the trainer stops with the sample it was at and the likely reason (mostly memory): fewer workers; go on')
@linux
@pytest.mark.parametrize('what, words', [('kill', 'was killed by SIGKILL at sample'), ('leave', 'ended with status 3 at sample')])
def test_a_worker_that_dies_ends_the_run(what, words, tried):
    feed = loader(small(), 6, transforms=[Accident(what)], workers=2)
    pids, began = workers_of(feed), time.perf_counter()
    with pytest.raises(WorkerDied, match=words) as e:
        for _ in range(20):
            next(feed)
    tried(said=e.value)
    assert time.perf_counter() - began < 40 and gone(pids)
    with pytest.raises(StopIteration):
        next(feed)


@linux
def test_closing_leaves_no_process_and_may_be_repeated():
    feed = loader(small(), 6, workers=2)
    next(feed)
    pids = workers_of(feed)
    feed.close()
    feed.close()
    assert len(pids) == 2 and gone(pids)
    feed = loader(small(), 6, workers=1)
    pids = workers_of(feed)
    del feed
    assert gone(pids)


@pytest.mark.fault('processes', 'a scheduler signals the whole job, the data workers with it', 'the workers leave signals to the trainer; no batch is lost; nothing to do')
@linux
def test_signals_to_the_whole_job_do_not_reach_the_workers():
    feed = loader(small(), 6, workers=2, transforms=NOISE)
    next(feed)
    for p in workers_of(feed):
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(p, s)
    time.sleep(.1)
    rest = [next(feed) for _ in range(20)]
    feed.close()
    assert same(rest, take(small(), 21, seed=0)[1:])


@pytest.mark.fault('processes', 'a data worker hangs when the run ends', 'it is ended after five seconds; nothing is left behind')
@linux
@pytest.mark.slow
def test_a_worker_that_hangs_is_ended():
    feed = loader(small(), 6, transforms=[Accident('hang')], workers=2)
    pids, began = workers_of(feed), time.perf_counter()
    time.sleep(.5)
    feed.close()
    assert time.perf_counter() - began < 40 and gone(pids)


@pytest.mark.fault('processes', 'the trainer is killed, its data workers not', 'they die with it; nothing is left behind')
@linux
@pytest.mark.slow
@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_workers_die_with_a_trainer_that_is_killed(tmp_path, method):
    script = tmp_path/'train.py'
    script.write_text(textwrap.dedent(f'''
        import time
        from flowbook.data import load
        from flowbook.loader import loader
        if __name__ == '__main__':
            feed = loader(load('digits'), 8, workers=2, method={method!r})
            next(feed)
            print(*[w.pid for w in feed._it._workers], flush=True)
            time.sleep(100)'''))
    p = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    pids = [int(v) for v in p.stdout.readline().split()]
    assert len(pids) == 2 and not gone(pids, .2)
    p.kill()
    p.wait()
    assert gone(pids, 2.)


@pytest.mark.fault('time', 'hundreds of batches come from workers', 'open files and shared memory stay as many as they were')
@linux
def test_open_files_and_shared_memory_do_not_grow():
    files = lambda: len(os.listdir('/proc/self/fd'))
    shared = lambda: sum('/dev/shm' in line or 'torch_' in line for line in open('/proc/self/maps'))
    feed = loader(small(), 6, workers=2, transforms=NOISE)
    kept = [next(feed) for _ in range(20)]
    before = files(), shared()
    kept += [next(feed) for _ in range(300)]
    after = files(), shared()
    feed.close()
    assert len(kept) == 320 and after[0] <= before[0] + 4 and after[1] <= before[1] + 4
    assert not any(b.x.is_shared() for b in kept)


def test_a_pinned_batch_stays_a_batch(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda t, *_: t + 0)
    b = next(batches(small(), 4))
    batch, bad, failure = pin_memory((b, [BadSample(0, 1, 'x', 'y')], None))
    assert type(batch) is type(b) and torch.equal(batch.x, b.x) and batch.target is None and bad == [BadSample(0, 1, 'x', 'y')] and failure is None
