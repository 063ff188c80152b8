import torch

from doors import door, flag, number, whole
from doors.guidance import FLOWS, GUIDANCES
from doors.sampling import DTYPES
from doors.tarflow import flow
from flowbook.guidance import ClassGuidance

FLOWS = [*FLOWS, torch.nn.Linear(2, 2)]
DOORS = [
    door('bench_sampling', lambda tmp: dict(flow=flow(), b=1, rounds=1, naive=False), flow=FLOWS, b=whole(1), guidance=[*GUIDANCES, ClassGuidance(1.)], rounds=whole(1), dtype=DTYPES, tol=number(0), naive=flag(), seed=whole(0)),
    door('bench_training', lambda tmp: dict(flow=flow('nvp', 3), b=1, rounds=1), flow=FLOWS, b=whole(1), rounds=whole(1)),
    door('bench_alignment', lambda tmp: dict(flow=flow('nvp', 3), b=1, rounds=1, layer=1, sequential=False), flow=FLOWS, b=whole(1), rounds=whole(1), layer=whole(1, 1), sequential=flag()),
    door('bench_denoising', lambda tmp: dict(flow=flow('nvp', 3), b=1, rounds=1), flow=FLOWS, b=whole(1), rounds=whole(1), sigma=number(0, above=True)),
    door('fresh', lambda tmp: dict(text='2,1,1,4,1,1', device='cpu'), says={'text': '--fresh'}, text=['8,1', 'six', '8,1,2,32,0,1', '8;1;2;4;1;1']),
    door('whole', lambda tmp: dict(text='1,2'))._replace(bad=dict(text=['0', 'one', '', '1.5']), good=lambda tmp: dict(text='1,2', name='--batch'), says={'text': '--batch'}),
]
INNER = {'clocks and counters, called with what the three measurements have made': 'once race ratio peak_memory matmul_rate operations operations_of', 'the check itself': 'check_bench', 'an experiment of the book: seed and budget are checked by evidence': 'costs', 'the verdict on its results': 'judge_costs',
         'the command line; its mistakes are tried in test_sampling.py': 'parser pick_models main cli', 'print what was measured': 'line aligned_line report'}
