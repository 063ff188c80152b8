import math

import torch
from torch import nn

from doors import choice, door, flag, number, whole
from flowbook.checkpoint import Run, save
from flowbook.train import ema

some = lambda: {'a': torch.arange(4.), 'b': torch.ones(2, 3)}
paths = [None, 3, '', ['a']]
modules = ['a flow', None, 3, torch.ones(2)]


def saved(tmp):
    with Run(tmp/'run') as run: save(run, 1, some(), {'lr': 1e-3})
    return Run(tmp/'run', write=False)


def begun(tmp):
    run = Run(tmp/'new')
    run.close = run.lock.release
    return run


def net():
    m = nn.Linear(2, 2)
    return m, torch.optim.AdamW(m.parameters()), ema(m, .9)


def packed(tmp):
    m, opt, mean = net()
    return dict(flow=m, objective=None, opt=opt, ema=mean)


DOORS = [
    door('Run', lambda tmp: dict(folder=tmp/'run', write=True, timeout=60.), folder=paths, write=flag(), timeout=number(0, above=True)),
    door('save', lambda tmp: dict(run=begun(tmp), step=1, tensors=some(), meta={'lr': 1e-3}, keep=2, forever=0, asynchronous=False), run=['RUN', None, 3], step=whole(0), tensors=['tensors', None, [torch.ones(2)], {'a': 3}, {3: torch.ones(2)}, {'': torch.ones(2)}, {'a': torch.ones(2, dtype=torch.complex64)}],
         meta=['meta', 3, {'a': math.inf}, {'a': (1, 2)}, {1: 2}, {'a': torch.ones(2)}], keep=whole(2), forever=whole(0), asynchronous=flag()),
    door('load', lambda tmp: dict(run=saved(tmp), into=some(), step=1, verify='full', strict=True), run=['RUN', None, 3], into=['tensors', None, [torch.ones(2)], {'a': torch.zeros(4)}, {**some(), 'c': torch.zeros(1)}, {'a': torch.zeros(5), 'b': torch.ones(2, 3)}, {'a': torch.zeros(4).long(), 'b': torch.ones(2, 3)}],
         step=[v for v in whole(0) if v is not None], verify=choice(), strict=flag()),
    door('problems', lambda tmp: dict(folder=saved(tmp).path(1), verify='sizes'), folder=paths, verify=choice()),
    door('pack', packed, flow=modules, opt=['adamw', 3, lambda good: torch.optim.AdamW(nn.Linear(3, 3).parameters())], ema=[.9, 'mean']),
    door('weights', lambda tmp: dict(module=net()[0]), module=modules),
]
INNER = {'checks themselves': 'check_run check_save check_tensors check_json cannot_keep',
         'a record': 'Row Piece',
         'called by `Run`, `save` and `load`, which have checked; tests/test_checkpoint.py has damaged files and folders for each': 'flush_folder write_flushed sha256_of few box stage share_out parts_of in_blocks write_part is_grid canonical hashed layout TheseFiles Reader read_rows read_manifest tensor_files file_problem headers_problem leave_locks now Lock raise_as Writing open_folder point advice write_checkpoint write_pieces not_written publish prune told attempt fitting read_into set_aside make_state'}
