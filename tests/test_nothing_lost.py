"""Whole runs, as a trainer meets them: killed at any moment, on a disk that fills, with every file of the folder replaced by malice or rubbish, moved, renamed, called twice."""
import ctypes
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import flowbook.explore  # noqa: F401  imported before the first fork, like all that a command imports later
import flowbook.scale  # noqa: F401
from flowbook.checkpoint import STEP, Run, hashed, problems
from flowbook.faults import Bomb
from flowbook.scripts import evaluate, fid_stats, sample, train
from flowbook.scripts.sample import open_model

SCRIPTS = {'train': train, 'sample': sample, 'evaluate': evaluate, 'fid_stats': fid_stats}
TINY = 'flow.blocks=2 flow.layers=1 flow.dim=16 flow.head_dim=8 system.amp=off system.workers=0 optim.batch_size=8 optim.warmup=0 --device cpu --every 1 --save-every 2'.split()


# --- commands, as processes: forked, because importing PyTorch takes longer than all that they do here

def start(command, line, cwd, before=None, said='said.txt', **env):
    "A command line in a process (and a session) of its own; its pid."
    if pid := os.fork(): return pid
    status = 70
    try:
        os.setsid()
        out = os.open(Path(cwd)/said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1); os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))     # pytest's own catch what goes through them
        warnings.showwarning = lambda *a: print(warnings.formatwarning(*a[:4]), file=sys.stderr)          # and its warnings
        warnings.simplefilter('default')
        os.environ.update(env); os.chdir(cwd)
        sys.argv = [f'flowbook_{command}', *map(str, line)]
        if before: before()
        try: SCRIPTS[command].cli(); status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else int(bool(e.code))
            if isinstance(e.code, str): print(e.code, file=sys.stderr)
        except BaseException:
            import traceback
            traceback.print_exc(); status = 1
        for t in threading.enumerate():
            if t is not threading.current_thread() and not t.daemon: t.join()
    finally: os._exit(status)


def ended(pid, seconds=120):
    "Its exit status, -9 where it was killed; and nobody of its session is left."
    end = time.monotonic() + seconds
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end: os.kill(pid, 9); os.waitpid(pid, 0); raise AssertionError(f'a command took more than {seconds} seconds')
        time.sleep(.005)
    while left := session(pid):
        if time.monotonic() > end: [os.kill(p, 9) for p in left]; raise AssertionError(f'left behind: {left}')
        time.sleep(.02)
    return os.waitstatus_to_exitcode(found[1])


def session(pid): # -> the living processes of a session
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: state, _, _, sid = stat.read_text().rsplit(')', 1)[1].split()[:4]
        except OSError: continue
        if int(sid) == pid and state != 'Z': found.append(int(stat.parent.name))
    return found


def call(command, line, cwd, **kw): # -> (exit status, what it said)
    status = ended(start(command, line, cwd, **kw))
    return status, (Path(cwd)/'said.txt').read_text()


def fine(command, line, cwd, **kw):
    status, said = call(command, line, cwd, **kw)
    assert status == 0, said
    return said


def pixels(steps=6, out='run', *more): return ['--config', 'digits-rrepa-64-plain', *TINY, f'optim.steps={steps}', '--out', out, '--sample-every', 3, *more]
def latents(steps=6, out='latent', *more): return ['--config', 'digits-rrepa-256-plain', *TINY, f'optim.steps={steps}', '--out', out, *more]


# --- what a command leaves

def files(folder): return {str(p.relative_to(folder)) for p in Path(folder).rglob('*') if p.is_file()}


def weights(run):
    "All tensors of the newest checkpoint and of the model, by name."
    last = max(p for p in (Path(run)/'checkpoints').iterdir() if STEP.fullmatch(p.name))
    return {f'{p.parent.name}/{k}': v for p in [*sorted(last.glob('*.safetensors')), Path(run)/'model'/'model.safetensors'] for k, v in load_file(p).items()}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def curve(run): return [(e['step'], e['loss'], e['grad_norm']) for e in map(json.loads, (Path(run)/'log.jsonl').read_text().splitlines()) if 'loss' in e]


def same_run(run, want, pictures=True):
    "Bit for bit the run that nobody disturbed."
    assert equal(weights(run), weights(want)) and curve(run) == curve(want)
    open_model(run)
    if pictures: assert not lost_pictures(run, want) and not left_over(run, want)


def lost_pictures(run, want): return [p.name for p in (want/'samples').glob('*.png') if not (run/'samples'/p.name).exists() or (run/'samples'/p.name).read_bytes() != p.read_bytes()]
def left_over(run, want): return {f for f in files(run) - files(want) if 'set-aside' not in f and f not in ('log.aside.jsonl', 'status')}


# --- moments: the k-th file that is opened for writing, made, renamed or removed; or so much CPU time

EVENTS = 'open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir'


def at_event(root, do, k=None, name=()):
    "What is called in the process: do() when the k-th such thing happens below a folder, or the first with these in its path."
    count, root, names = [0], os.fspath(root), [name] if isinstance(name, str) else name
    def hook(event, args):
        if event not in EVENTS or count[0] < 0 or not isinstance(args[0], (str, bytes, os.PathLike)): return
        if event == 'open' and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)): return
        if not (path := os.path.abspath(os.fsdecode(args[0]))).startswith(root): return
        count[0] += all(n in path for n in names)
        if count[0] == (k or 1): count[0] = -10**9; do()
    return lambda: sys.addaudithook(hook)


def at_cpu(seconds): return lambda: signal.setitimer(signal.ITIMER_PROF, seconds)          # whose default action is the end, at once


def die(): os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope='module')
def want(tmp_path_factory):
    "The run that nobody disturbs, and how much CPU time it takes."
    folder, before = tmp_path_factory.mktemp('want'), resource.getrusage(resource.RUSAGE_CHILDREN)
    fine('train', pixels(12), folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return folder/'run', after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --- 1 killed

# --- 1 killed

KILLED = 'SIGKILL at a random moment of a whole run', 'call it again: it goes on to the same weights, curve and pictures'


@pytest.fixture(scope='module')
def killed(want, tmp_path_factory):
    "A run that was killed twenty times, in turns at a file and at a moment of computing; and the kills."
    folder, rng, kills = tmp_path_factory.mktemp('killed'), random.Random(0), 0
    run = folder/'run'
    while kills < 20:
        before = at_event(run, die, k=rng.randint(1, 25)) if kills % 2 else at_cpu(rng.uniform(.05, max(.1, want[1] / 4)))
        status, said = call('train', pixels(12), folder, before=before)
        assert status in (-signal.SIGKILL, -signal.SIGPROF, 0), said
        if (run/'model'/'README.md').exists(): open_model(run)                  # what was there can be used meanwhile
        if steps := Run(run, write=False).steps(): assert not problems(Run(run, write=False).path(steps[-1]))
        if status == 0: shutil.rmtree(run)                                      # it came through: once more
        else: kills += 1
    fine('train', pixels(12), folder)
    return run, kills


@pytest.mark.slow
@pytest.mark.fault('processes', *KILLED)
def test_a_run_that_was_killed_twenty_times_is_the_run(killed, want, tried):
    same_run(killed[0], want[0], pictures=False)
    tried(times=killed[1])


@pytest.mark.slow
def test_the_last_picture(want, tmp_path):
    "Killed after the last save, before the picture: nothing is left to train, but something to draw."
    status, said = call('train', pixels(12), tmp_path, before=at_event(tmp_path/'run', die, name='step-00000012.png'))
    assert status == -signal.SIGKILL, said
    fine('train', pixels(12), tmp_path)
    assert not lost_pictures(tmp_path/'run', want[0])


@pytest.mark.slow
def test_and_nothing_piles_up(killed, want): assert not left_over(killed[0], want[0])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['step-00000006.png', 'model.safetensors', 'card.json', 'log.jsonl', 'being-written-latest', 'being-written-step-00000004/manifest.json', 'being-removed', 'status'])
@pytest.mark.fault('processes', *KILLED)
def test_killed_at_this_file(want, tmp_path, name):
    "The moments that chance seldom finds: when a file has been opened, or is about to be renamed."
    more = ['system.workers=1'] if name == 'log.jsonl' or name.endswith('png') else []   # a process that reads dies with the one that trains: `ended` looks for it
    status, said = call('train', pixels(12, 'run', *more), tmp_path, before=at_event(tmp_path/'run', die, name=name))
    if status == 0: pytest.skip(f'a run no longer touches {name}')
    assert status == -signal.SIGKILL, said
    if (tmp_path/'run'/'model'/'README.md').exists(): open_model(tmp_path/'run')
    fine('train', pixels(12), tmp_path)
    same_run(tmp_path/'run', want[0], pictures=False)


@pytest.mark.slow
def test_killed_while_the_vae_is_written(tmp_path):
    "In the middle of its weights, at the second save: what the first one left can be used meanwhile."
    from diffusers import AutoencoderKL  # noqa: F401  before the fork: it takes long
    def half():
        import safetensors.torch
        real, calls = safetensors.torch.save_file, []
        def save_file(tensors, path, *a, **kw):
            real(tensors, path, *a, **kw); calls.append(path)
            if len(calls) == 2: os.truncate(path, os.path.getsize(path) // 2); die()
        safetensors.torch.save_file = save_file
    status, said = call('train', latents(6), tmp_path, before=half)
    assert status == -signal.SIGKILL, said
    open_model(tmp_path/'latent')


def port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def two(line, cwd, before=(None, None), patience=None):
    "Two processes, as torchrun starts them: when one dies, the other is ended (torchrun waits a little); their exit statuses."
    env = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port()))
    pids = [start('train', line, cwd, before[r], f'said-{r}.txt', RANK=str(r), LOCAL_RANK=str(r), **env) for r in (0, 1)]
    first, status = one_of(pids)
    other = next(p for p in pids if p != first)
    if status: time.sleep(patience or 0); os.kill(other, signal.SIGKILL)
    return {pids.index(first): status, pids.index(other): ended(other)}, ''.join((Path(cwd)/f'said-{r}.txt').read_text() for r in (0, 1))


def one_of(pids, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for p in pids:
            pid, status = os.waitpid(p, os.WNOHANG)
            if pid: return pid, os.waitstatus_to_exitcode(status)
        time.sleep(.01)
    for p in pids: os.kill(p, 9); os.waitpid(p, 0)
    raise AssertionError(f'two processes took more than {seconds} seconds')


@pytest.fixture(scope='module')
def want_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    status, said = two(pixels(8), folder)
    assert set(status.values()) == {0}, said
    return folder/'run'


@pytest.mark.slow
@pytest.mark.fault('processes', 'SIGKILL of one of two processes at a random moment of a whole run', 'call it again: it goes on to the same weights and curve')
def test_one_of_two_processes_is_killed_again_and_again(want_two, tmp_path, tried):
    rng, kills = random.Random(1), 0
    for k in range(5):
        rank, hook = k % 2, at_event(tmp_path/'run', die, k=rng.randint(4, 20)) if k % 4 == 0 else at_cpu(rng.uniform(.05, .6))   # rank 1 opens no file
        status, said = two(pixels(8), tmp_path, (hook, None) if rank == 0 else (None, hook), patience=rng.uniform(0, .3))
        if set(status.values()) == {0}: shutil.rmtree(tmp_path/'run'); continue  # it came through
        assert status[rank] in (-signal.SIGKILL, -signal.SIGPROF), said
        kills += 1
    assert kills > 2
    status, said = two(pixels(8), tmp_path)
    assert set(status.values()) == {0}, said
    same_run(tmp_path/'run', want_two, pictures=False)
    tried(times=kills)


@pytest.mark.slow
@pytest.mark.fault('processes', 'SIGKILL of a worker under torchrun --max-restarts', 'torchrun starts all again, they go on to the same weights; nothing to do')
def test_a_worker_is_killed_under_the_real_torchrun(want_two, tmp_path):
    line = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '1', '-m', 'flowbook.scripts.train', *map(str, pixels(8))]
    p = subprocess.Popen(line, cwd=tmp_path, stdout=(out := open(tmp_path/'said.txt', 'w')), stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob('run/checkpoints/step-*')) and time.monotonic() < end: time.sleep(.01)
        worker = next(int(w) for w in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split())
        os.kill(worker, signal.SIGKILL)
        assert p.wait(180) == 0, (tmp_path/'said.txt').read_text()
    finally:
        for pid in session(p.pid): os.kill(pid, signal.SIGKILL)
        p.wait()
    same_run(tmp_path/'run', want_two, pictures=False)
    assert not session(p.pid)


@pytest.mark.slow
@pytest.mark.fault('processes', 'SIGKILL of flowbook_sample, flowbook_evaluate or flowbook_fid_stats', 'call it again: it goes on to the same files')
def test_the_other_commands_killed(want, tmp_path, tried):
    rng, kills = random.Random(2), 0
    for command, line, result in (('sample', [want[0], '--n', 12, '--out', 'drawn', '--tensors', 'images', '--batch-size', 3, '--device', 'cpu'], 'drawn'),
                                  ('evaluate', [want[0], '--n', 6, '--metrics', 'fid', '--extractor', 'digits', '--save', 'save.png'], 'save.png'),
                                  ('fid_stats', ['--images', 50, '--out', 's.safetensors'], 's.safetensors')):
        for at in ('whole', 'killed'): (tmp_path/command/at).mkdir(parents=True)
        whole, at = tmp_path/command/'whole', tmp_path/command/'killed'
        fine(command, line, whole)
        for k in range(8 if command == 'sample' else 2):
            status, said = call(command, line, at, before=at_event(at, die, k=rng.randint(2, 9)) if k % 2 == 0 else at_cpu(rng.uniform(.02, .2)))
            assert status in (0, -signal.SIGKILL, -signal.SIGPROF), said
            kills += status != 0
        if command == 'evaluate': (at/'save.png').unlink(missing_ok=True)
        fine(command, line, at)
        got, wanted = ({f: (d/f).read_bytes() for f in files(d) if f != 'said.txt' and not f.endswith('.tmp')} for d in (at, whole))
        assert got == wanted
    tried(times=kills)


# --- 2 a disk that fills, or will not be written to

@pytest.fixture
def disk(tmp_path):
    (path := tmp_path/'disk').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(path)], capture_output=True).returncode: pytest.skip('mounting a tmpfs is not permitted here')
    yield path
    subprocess.run(['umount', '-l', str(path)], check=True)


def fill(disk):
    with open(disk/'fill', 'wb', buffering=0) as f:
        try:
            while f.write(bytes(2**16)): pass
        except OSError: pass
        try:
            while f.write(b' '): pass
        except OSError: pass


FULL = 'the disk fills while a run trains', 'one save that fails is noted in the log and passed over; if the next one fails, too, or it is the last, the run stops with a sentence, all older checkpoints whole; make room and call it again'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['log.jsonl', 'part-', 'manifest.json', 'being-written-latest', 'model.safetensors', 'card.json', '.png', 'status'])
@pytest.mark.fault('disk', *FULL)
def test_a_disk_that_fills_when_this_file_is_written(want, disk, tmp_path, name, tried):
    run = disk/'run'
    status, said = call('train', pixels(12, run), tmp_path, before=at_event(run, lambda: fill(disk), name=name))
    last = said.strip().splitlines()[-1]
    assert status == 1 and last.startswith('flowbook_train: ') and 'No space left' in last, said
    at = Run(run, write=False)
    for step in at.steps(): assert not problems(at.path(step))
    if (run/'model'/'README.md').exists(): open_model(run)
    status, said = call('train', pixels(12, run), tmp_path)                      # still full
    assert status == 1 and 'No space left' in said.strip().splitlines()[-1] and 'Traceback' not in said, said
    (disk/'fill').unlink()
    fine('train', pixels(12, run), tmp_path)
    same_run(run, want[0], pictures=False)
    if name == 'part-': tried(said=last)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['log.jsonl', 'model.safetensors', '.png', 'status'])
def test_what_is_said_then(want, disk, tmp_path, name):
    _, said = call('train', pixels(12, disk/'run'), tmp_path, before=at_event(disk/'run', lambda: fill(disk), name=name))
    assert 'free some space' in said.strip().splitlines()[-1] and name in said, said
    assert not [f for f in files(disk) if f.endswith('.tmp')]


@pytest.mark.slow
@pytest.mark.fault('disk', 'a filesystem is mounted read-only', 'training says so and stops, the model can be sampled and judged; have it mounted for writing, or take another folder')
def test_a_read_only_disk(want, disk, tmp_path, tried):
    shutil.copytree(want[0], disk/'run')
    subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
    for out in ('run', 'new'):
        status, said = call('train', pixels(14, disk/out), tmp_path)
        assert status == 1 and 'ead-only' in said.strip().splitlines()[-1] and 'Traceback' not in said, said
    tried(said=said.strip().splitlines()[-1])
    fine('sample', [disk/'run', '--n', 2, '--out', 'drawn', '--device', 'cpu'], tmp_path)
    fine('evaluate', [disk/'run', '--n', 4, '--metrics', 'fid', '--extractor', 'digits'], tmp_path)
    for command, line in (('sample', [disk/'run', '--n', 2, '--out', disk/'d', '--device', 'cpu']), ('fid_stats', ['--images', 20, '--out', disk/'s.safetensors'])):
        status, said = call(command, line, tmp_path)
        assert status == 1 and 'Traceback' not in said and str(disk) in said, said


@pytest.mark.slow
@pytest.mark.fault('disk', 'a filesystem turns read-only while a run trains', 'it stops and says so, all older checkpoints whole; mend the disk and call it again')
def test_a_disk_that_turns_read_only(want, tmp_path, tried):
    "The kernel does so after a fault of a disk. Here every new file is refused from a moment on, because a disk with open files is not remounted."
    def refuse():
        def hook(event, args):
            if event in EVENTS and isinstance(args[0], (str, os.PathLike)) and os.path.abspath(args[0]).startswith(str(tmp_path/'run')) and (event != 'open' or args[2] & (os.O_WRONLY | os.O_RDWR)):
                raise OSError(30, 'Read-only file system', os.fspath(args[0]))
        sys.addaudithook(hook)
    for name in ('step-00000004/part-', ('model', 'config.json'), 'step-00000006.png'):
        status, said = call('train', pixels(12), tmp_path, before=at_event(tmp_path/'run', refuse, name=name))
        last = said.strip().splitlines()[-1]
        assert status == 1 and 'Read-only' in last and last.startswith('flowbook_train: '), said
        tried(times=3, said=last if 'part' in str(name) else None)
    fine('train', pixels(12), tmp_path)
    same_run(tmp_path/'run', want[0], pictures=False)


@pytest.mark.slow
@pytest.mark.parametrize('full, room', [('step-00000003.png', 'being-written-step-00000004'), ('being-written-step-00000004/part-', 'being-written-step-00000006')])
@pytest.mark.fault('disk', 'the disk is full for a while, with room again before the next save', 'the save that fails is noted in the log and passed over, the run goes on; a crash before the next save would cost one interval more')
def test_a_disk_that_is_full_for_a_while(want, disk, tmp_path, full, room):
    "A picture, a line of the log and one save fail; when the next save comes, there is room again."
    def both():
        at_event(disk/'run', lambda: fill(disk), name=full)()
        at_event(disk/'run', lambda: (disk/'fill').unlink(missing_ok=True), name=room)()
    said = fine('train', pixels(12, disk/'run'), tmp_path, before=both)
    assert 'No space left' in said
    assert equal(weights(disk/'run'), weights(want[0])) and curve(disk/'run') == curve(want[0])


# --- 3 malice, nothing, rubbish and single bits in place of every file that a command reads

class Opened:
    "Which files below a folder are opened, whoever opens them (safetensors maps its files past Python): inotify."
    def __init__(self, root):
        self.c, self.root = ctypes.CDLL(None), Path(root)
        self.fd = self.c.inotify_init1(os.O_NONBLOCK)
        if self.fd < 0: pytest.skip('no inotify here')
        self.at = {self.c.inotify_add_watch(self.fd, os.fsencode(d), 0x20): d for d in [self.root, *(p for p in self.root.rglob('*') if p.is_dir())]}

    def read(self):
        found = set()
        while True:
            try: buffer = os.read(self.fd, 2**20)
            except BlockingIOError: break
            k = 0
            while k < len(buffer):
                watch, mask, _, n = struct.unpack_from('iIII', buffer, k)
                name, k = buffer[k + 16:k + 16 + n].rstrip(b'\0'), k + 16 + n
                if watch in self.at and name and not mask & 0x40000000: found.add(str((self.at[watch]/os.fsdecode(name)).relative_to(self.root)))
        os.close(self.fd)
        return found


class Panel:
    "What chapter 17 does with a checkpoint."
    @staticmethod
    def cli():
        from flowbook.explore import Explorer, Setting
        from flowbook.tarflow import TarFlow
        try: print(Explorer(TarFlow.from_pretrained(sys.argv[1]), n=2).picture(Setting('model', label=1)).right.double().sum().item())
        except ValueError as e: sys.exit(f'panel: {e}')


SCRIPTS['panel'] = Panel
LOOK = '--metrics fid --extractor digits --reference stats.safetensors'.split()
OWN = '--root photos data.image_size=8 flow.image_size=8'.split()
COMMANDS = {'train': ('train', pixels(5, 'run', *OWN, '--fid-every', 5, '--fid-samples', 8, *LOOK[2:])), 'train a latent flow': ('train', latents(5)),
            'sample': ('sample', 'run --n 4 --out new --device cpu'.split()), 'go on with samples': ('sample', 'run --n 6 --out drawn --tensors images --grid grid.png --device cpu'.split()),
            'sample a latent flow': ('sample', 'latent --n 4 --out new --device cpu'.split()), 'evaluate': ('evaluate', ['run', '--n', 8, *LOOK, '--root', 'photos', '--json']),
            'statistics': ('fid_stats', '--data folder --root photos --image-size 8 --extractor digits --out other.safetensors'.split()), 'panel': ('panel', ['run/model'])}
WHOLE = [c for c in COMMANDS if c in ('train', 'train a latent flow')]


def found(name, folder, said):
    "What a command gives, to be compared."
    command, line = COMMANDS[name]
    if command == 'train':
        run = folder/('latent' if 'latent' in name else 'run')
        return {**{k: v.numpy().tobytes() for k, v in weights(run).items()}, 'curve': str([c for c in curve(run) if c[0] > 4])}
    if command == 'sample': return {str(p.relative_to(folder)): p.read_bytes() for d in ('new', 'drawn') for p in (folder/d).rglob('*') if p.is_file()} | ({'grid': (folder/'grid.png').read_bytes()} if '--grid' in line else {})
    if command == 'evaluate': return {k: v for k, v in json.loads(said[said.index('{'):said.rindex('}') + 1]).items() if k != 'seconds'}
    return {'said': said} if command == 'panel' else {'statistics': (folder/'other.safetensors').read_bytes()}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder with images, two finished runs, statistics and samples; what each command opens in it, and what it gives."
    import diffusers.models  # noqa: F401  as above: before the fork
    from diffusers import AutoencoderKL  # noqa: F401
    base, rng = tmp_path_factory.mktemp('finished'), np.random.default_rng(0)
    for name in 'ab':
        (base/'photos'/name).mkdir(parents=True)
        for i in range(6): Image.fromarray(rng.integers(0, 255, (9, 10), dtype='uint8')).save(base/'photos'/name/f'{i}.png')
    fine('fid_stats', [a if a != 'other.safetensors' else 'stats.safetensors' for a in COMMANDS['statistics'][1]], base)
    fine('train', pixels(4, 'run', *OWN), base)
    fine('train', latents(4), base)
    fine('sample', 'run --n 4 --out drawn --tensors images --device cpu'.split(), base)
    (base/'said.txt').unlink()
    opens, gives = {}, {}
    for name, (command, line) in COMMANDS.items():
        work = again(base, tmp_path_factory.mktemp('work'))
        seen = Opened(work)
        said = fine(command, line, work)
        opens[name], gives[name] = seen.read() & files(base), found(name, work, said)
    return base, opens, gives


def again(base, work):
    shutil.rmtree(work)
    return Path(shutil.copytree(base, work))


def flipped(content, k, bit=0): return content[:k] + bytes([content[k] ^ 1 << bit]) + content[k + 1:]


def judged(name, file, finished, work, content, mark):
    "Run a command with another content in one of its files; what is wrong with that, '' for nothing."
    base, _, gives = finished
    again(base, work)
    (work/file).write_bytes(content)
    status, said = call(*COMMANDS[name], work)
    if mark.exists(): mark.rmdir(); return 'it was run'
    if 'Traceback' in said: return f'a traceback: {said.strip().splitlines()[-1]}'
    if status: return '' if status == 1 and (file in said or Path(file).name in said) else f'status {status}, and the file is not named: {said.strip()[-300:]}'
    if (now := found(name, work, said)) != gives[name]: return f'silently something else: {[k for k in {*now, *gives[name]} if now.get(k) != gives[name].get(k)][:3]}'
    return '' if '/checkpoints/step-' not in file or Path(file).name in said else 'taken for another one without a word'


def some(names):
    "All files; of a class of images the first and the last."
    names = sorted(names)
    return [f for f in names if not f.startswith('photos') or f in (names[0], [g for g in names if g.startswith('photos')][0], [g for g in names if g.startswith('photos')][-1])]


MALICE = 'a malicious pickle, nothing or rubbish in place of any file that a command reads', 'never run; the file is named, or an older checkpoint taken; restore the file, or delete it and call again'


@pytest.mark.slow
@pytest.mark.parametrize('name', COMMANDS)
@pytest.mark.fault('malice', *MALICE)
def test_every_file_that_a_command_opens(finished, tmp_path, name, tried):
    base, opens, _ = finished
    (work := tmp_path/'work').mkdir()
    wrong, times, mark = {}, 0, tmp_path/'it-ran'
    for file in some(opens[name]):
        size = (base/file).stat().st_size
        for what, content in (('pickle', pickle.dumps(Bomb(mark))), ('nothing', b''), ('rubbish', random.Random(0).randbytes(max(size, 9)))):
            if file.startswith('photos') and what == 'rubbish' or not size and what == 'nothing': continue
            times += 1
            if why := judged(name, file, finished, work, content, mark): wrong[f'{what} in {file}'] = why
    assert times > 3 and not wrong, json.dumps(wrong, indent=1)
    tried(times=times)


@pytest.mark.slow
@pytest.mark.fault('malice', *MALICE)
def test_what_nobody_opens_is_opened_by_nobody(finished, tmp_path, tried):
    "All other files of the tree at once."
    base, opens, gives = finished
    others = sorted(files(base) - set().union(*opens.values()))
    for name, (command, line) in COMMANDS.items():
        work = Path(shutil.copytree(base, tmp_path/name.replace(' ', '-')))
        for file in others:
            if name in WHOLE and '/checkpoints/' in file: continue               # older ones: the next step removes them
            (work/file).write_bytes(pickle.dumps(Bomb(tmp_path/'it-ran')))
        said = fine(command, line, work)
        kept = {k: v for k, v in found(name, work, said).items() if k not in others}
        assert kept == {k: v for k, v in gives[name].items() if k not in others} and not (tmp_path/'it-ran').exists(), name
    assert others
    tried(times=len(others))


BITS = 'one bit of a small file flips', 'refused, and the file is named; or an older checkpoint is taken; restore the file'


@pytest.mark.slow
@pytest.mark.parametrize('name', WHOLE)
@pytest.mark.fault('disk', *BITS)
def test_one_bit_of_a_checkpoint(finished, tmp_path, name, tried):
    base, opens, _ = finished
    (work := tmp_path/'work').mkdir()
    wrong, times, rng = {}, 0, random.Random(0)
    for file in (f for f in opens[name] if '/checkpoints/' in f):
        content = (base/file).read_bytes()
        times += 1
        if why := judged(name, file, finished, work, flipped(content, rng.randrange(len(content)), rng.randrange(8)), tmp_path/'it-ran'):
            if not (file.endswith('latest') and 'without a word' in why): wrong[file] = why
    assert not wrong, json.dumps(wrong, indent=1)
    tried(times=times)


def worst(content, key):
    "The content with another number under this key of JSON, or as the first one of this tensor; by one bit."
    if content[:1] == b'{':
        k = content.index(f'"{key}": '.encode()) + len(key) + 4
        while content[k + 1:k + 2].isdigit() or content[k + 1:k + 2] == b'.': k += 1
        return flipped(content, k)
    head = int.from_bytes(content[:8], 'little')
    return flipped(content, 8 + head + json.loads(content[8:8 + head])[key]['data_offsets'][1] - 1, 5)   # of the last item's exponent


@pytest.mark.slow
@pytest.mark.parametrize('name, file, key', [('sample', 'run/model/config.json', 'head_dim'),
                                             ('sample', 'run/model/model.safetensors', 'blocks.1.proj_out.bias'),
                                             ('evaluate', 'stats.safetensors', 'pooled.mean'),
                                             ('sample a latent flow', 'latent/model/vae/config.json', 'scaling_factor'), ('sample a latent flow', 'latent/model/vae/diffusion_pytorch_model.safetensors', 'decoder.conv_out.bias')])
@pytest.mark.fault('disk', 'one bit of a number flips in weights, their configuration or statistics', 'refused, and the file or its folder is named; take a copy, or let the run write it again')
def test_one_bit_of_a_number(finished, tmp_path, name, file, key):
    "The worst bit: another number, in a file that is still well made."
    (work := tmp_path/'work').mkdir()
    why = judged(name, file, finished, work, worst((finished[0]/file).read_bytes(), key), tmp_path/'it-ran')
    assert not why or 'vae' in file and 'latent/model/vae is' in why, why        # the VAE as a whole has an identity, which the flow knows


@pytest.mark.slow
@pytest.mark.fault('malice', 'a malicious pickle in place of the weights of Inception, of a VAE or of a vision encoder', 'never run; the file is named; fetch it again')
@pytest.mark.parametrize('kind', ['inception', 'inception, its own hash', 'vae', 'vae, as .bin', 'encoder'])
def test_weights_of_others(finished, tmp_path, kind):
    from hashlib import sha256
    evil, mark = pickle.dumps(Bomb(tmp_path/'it-ran')), tmp_path/'it-ran'
    (file := tmp_path/'weights.pth').write_bytes(evil)
    if kind.startswith('inception'):
        more = ['--sha256', sha256(evil).hexdigest()] if 'own' in kind else []
        status, said = call('fid_stats', ['--data', 'digits', '--images', 10, '--extractor', 'inception', '--weights', file, *more, '--out', 's.safetensors'], tmp_path)
    elif kind.startswith('vae'):
        vae = Path(shutil.copytree(finished[0]/'latent'/'model'/'vae', tmp_path/'vae'))
        (vae/'diffusion_pytorch_model.safetensors').unlink()
        (vae/f'diffusion_pytorch_model.{"bin" if "bin" in kind else "safetensors"}').write_bytes(evil)
        status, said = call('train', latents(2, 'new', f'data.vae=digits-vae@{vae}'), tmp_path)
        file = vae
    else: status, said = call('train', pixels(2, 'new', f'align.encoder=vit_tiny_patch16_224@{file}'), tmp_path)
    assert status == 1 and not mark.exists() and 'Traceback' not in said, said
    if kind != 'encoder': assert str(file) in said, said


# --- 4 two at once, dead locks, clocks, names, later versions

@pytest.mark.slow
@pytest.mark.fault('processes', 'two commands train in one folder at once', 'the second is refused and told who is at work; wait, or give another folder')
def test_two_commands_on_one_folder(want, tmp_path, tried):
    def pause():
        (tmp_path/'waiting').touch()
        while not (tmp_path/'go').exists(): time.sleep(.01)
    first = start('train', pixels(12), tmp_path, at_event(tmp_path/'run', pause, name='step-00000006.png'), 'first.txt')
    try:
        while not (tmp_path/'waiting').exists(): time.sleep(.01); assert not os.waitpid(first, os.WNOHANG)[0]
        (tmp_path/'other').symlink_to('run')
        for out in ('run', 'other', tmp_path/'run'):
            status, said = call('train', pixels(12, out), tmp_path)
            assert status == 1 and f'is in use by process {first}' in said and 'Traceback' not in said, said
        tried(times=3, said=said)
        fine('sample', 'run --n 2 --out drawn --device cpu'.split(), tmp_path)   # to look is allowed
    finally: (tmp_path/'go').touch()
    assert ended(first) == 0
    assert (tmp_path/'run'/'status').read_text() == 'done\n'
    same_run(tmp_path/'run', want[0], pictures=False)


@pytest.mark.slow
def test_a_refused_command_leaves_the_status(want, tmp_path):
    shutil.copytree(want[0], tmp_path/'run')
    status, said = call('train', pixels(12, 'run', 'noise.sigma=0.7'), tmp_path)
    assert status == 1 and 'noise.sigma' in said and (tmp_path/'run'/'status').read_text() == 'done\n'


@pytest.mark.slow
@pytest.mark.fault('time', 'a clock that goes backwards, and files from the past and the future', 'the run goes on to the same weights and curve; nothing to do')
@pytest.mark.parametrize('when', [0, 4e9])
def test_clocks(want, tmp_path, when):
    status, said = call('train', pixels(12), tmp_path, before=at_event(tmp_path/'run', die, name='step-00000006.png'))
    assert status == -signal.SIGKILL, said
    (tmp_path/'run'/'lock').write_text(json.dumps({'pid': 1, 'host': 'a machine that died', 'since': '2099-01-01 00:00:00 +0000'}))
    for p in [*(tmp_path/'run').rglob('*'), tmp_path/'run']: os.utime(p, (when, when))
    def backwards():
        real, began = time.time, time.time()
        time.time = lambda: began - (real() - began)
    fine('train', pixels(12), tmp_path, before=backwards)
    same_run(tmp_path/'run', want[0], pictures=False)


@pytest.mark.slow
@pytest.mark.fault('processes', 'a run is moved, renamed, linked to and called from other folders between its parts', 'it goes on to the same weights and curve; nothing to do')
def test_a_folder_that_moves(want, tmp_path, tried):
    "Spaces, letters of other alphabets, 200 characters."
    (tmp_path/'elsewhere').mkdir()
    names = ['run', 'a run of mine; $HOME "2"', 'пробег 模型 ünï', 'x' * 200]
    at = tmp_path/names[0]
    for k, name in enumerate(names[1:]):
        status, said = call('train', pixels(12, at), tmp_path, before=at_event(at, die, name=f'checkpoints/being-written-step-{2 * k + 4:08}/manifest'))
        assert status == -signal.SIGKILL, said
        at = at.rename(tmp_path/name)
    status, said = call('train', pixels(12, f'../{at.name}'), tmp_path/'elsewhere', before=at_event(at, die, name='being-written-step-00000010/manifest'))
    assert status == -signal.SIGKILL, said
    (tmp_path/'elsewhere'/'link').symlink_to(at)
    fine('train', pixels(12, 'link'), tmp_path/'elsewhere')
    same_run(at, want[0], pictures=False)
    fine('sample', ['elsewhere/link', '--n', 2, '--out', 'a b/模型/' + 'y' * 200, '--device', 'cpu'], tmp_path)
    fine('evaluate', ['elsewhere/link', '--n', 4, '--metrics', 'fid', '--extractor', 'digits'], tmp_path)
    status, said = call('train', pixels(12, 'z' * 300), tmp_path)
    assert status == 1 and 'zzz' in said and 'Traceback' not in said, said
    tried(times=len(names) + 2)


def resigned(path, **change):
    "A checkpoint whose meta.json or manifest.json says something else, with the right hashes: as another version would write it."
    from hashlib import sha256
    manifest = json.loads((path/'manifest.json').read_bytes())
    if 'config' in change:
        meta = json.loads((path/'meta.json').read_bytes())
        change.pop('config')(meta['config'])
        (path/'meta.json').write_bytes(content := json.dumps(meta).encode())
        manifest['files']['meta.json'] = {'bytes': len(content), 'sha256': sha256(content).hexdigest()}
    manifest |= change
    manifest['sha256'] = hashed({k: v for k, v in manifest.items() if k != 'sha256'})
    (path/'manifest.json').write_text(json.dumps(manifest))


LATER = 'a folder that a later version of the library wrote', 'what is not understood is named, and nothing is changed; take that version, or another folder'


@pytest.mark.slow
@pytest.mark.fault('configuration', *LATER)
def test_a_later_version(want, tmp_path, tried):
    def copy(name): return Path(shutil.copytree(want[0], tmp_path/name))
    step = 'checkpoints/step-00000012'
    resigned(copy('key')/step, compression='none')                               # a key more, and all else as it is known
    fine('train', pixels(12, 'key'), tmp_path)
    same_run(tmp_path/'key', want[0])
    resigned(copy('config')/step, config=lambda c: c['optim'].update(momentum=.5))
    status, said = call('train', pixels(12, 'config'), tmp_path)
    assert status == 1 and 'optim.momentum' in said and 'Traceback' not in said, said
    tried(times=5, said=said)
    for p in (copy('format')/'checkpoints').glob('step-*'): resigned(p, format='flowbook checkpoint 2')
    before = files(tmp_path/'format') - {'status'}
    status, said = call('train', pixels(12, 'format'), tmp_path)
    assert status == 1 and "format 'flowbook checkpoint 2'" in said and files(tmp_path/'format') - {'status'} == before, said
    for file, change in (('config.json', {'window': 7}), ('config.json', {'_class_name': 'BetterFlow'}), ('card.json', {'sample': {'churn': 1}})):
        path = copy(f'model-{"-".join(change)}')/'model'/file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        for command, line in (('sample', [path.parent, '--n', 2, '--out', 'none', '--device', 'cpu']), ('evaluate', [path.parent, '--n', 4, '--extractor', 'digits'])):
            status, said = call(command, line, tmp_path)
            assert status == 1 and 'Traceback' not in said and any(w in said for w in ('window', 'BetterFlow', 'churn')), said


@pytest.mark.slow
@pytest.mark.fault('configuration', *LATER)
def test_a_newest_checkpoint_of_a_later_version_is_not_pushed_aside(want, tmp_path):
    resigned(Path(shutil.copytree(want[0], tmp_path/'run'))/'checkpoints'/'step-00000012', format='flowbook checkpoint 2')
    status, said = call('train', pixels(12), tmp_path)
    assert status == 1 and 'flowbook checkpoint 2' in said and (tmp_path/'run'/'checkpoints'/'step-00000012').exists(), said
