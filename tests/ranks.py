"""Run a function in several processes that know one another (gloo), and collect what each returns."""
import faulthandler
import os
import socket
import traceback
from queue import Empty

import torch
import torch.multiprocessing as mp


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def child(rank, fn, n, port, queue, args):
    faulthandler.enable()                                     # a death in native code says where it was
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    torch.set_num_threads(1)
    try: queue.put((rank, fn(rank, n, *args), None))
    except BaseException: queue.put((rank, None, traceback.format_exc())); raise


def in_ranks(fn, n, *args):
    "[fn(rank, n, *args) for each rank], in processes of their own; what goes wrong in one is raised here. Tensors do not outlive their process: fn gives numbers or arrays."
    queue = mp.get_context('spawn').Queue()
    context = mp.spawn(child, (fn, n, free_port(), queue, args), n, join=False)
    out = {}
    while len(out) < n:
        try: rank, value, error = queue.get(timeout=1)
        except Empty:
            if all(not p.is_alive() for p in context.processes): break
            continue
        if error: [p.kill() for p in context.processes]; raise AssertionError(f'rank {rank} of {n}:\n{error}')
        out[rank] = value
    while not context.join(): pass
    assert len(out) == n, f'only ranks {sorted(out)} of {n} answered'
    return [out[k] for k in range(n)]
