import torch
from torch import nn

from doors import door, flag, number, whole
from doors.recipe import configs, few, named, rgb, tiny
from flowbook.scale import World

quick = lambda tmp: dict(c=tiny(), out=tmp/'run', device='cpu', every=1, save_every=1, keep=2, forever=0, start=None, sample_every=0, fid_every=0, fid_n=None, resume=True, data=few(), console=None, tensorboard=False)
devices = ['tpu of mine', None, 3.5, [0]]

DOORS = [
    door('pick', lambda tmp: dict(device='cpu'), device=devices),
    door('join', lambda tmp: dict(device='cpu', sharded=False, minutes=1.), device=devices, sharded=flag(), minutes=number(0, above=True)),
    door('Parallel', lambda tmp: dict(world=World(), accumulate=1, done=0, seed=0), world=['world', None, (0, 1)], accumulate=whole(), done=whole(0), seed=whole(0)),
    door('start_of', lambda tmp: ((tmp/'config.json').write_text('{}'), dict(text=str(tmp)))[1], text=[None, 3, '', 'nowhere', 'nowhere@3'], says={'text': 'start'}),
    door('recomputing', lambda tmp: dict(layer=nn.Linear(2, 2)), layer=['a layer', None, torch.ones(2)]),
    door('train', quick, c=configs, out=[None, 3, ''], device=devices, every=whole(), save_every=whole(), keep=whole(2), forever=whole(0), start=[3, '', 'nowhere', 'nowhere@3', []], sample_every=whole(0), fid_every=whole(0), fid_n=[v for v in whole(2) if v is not None],
         resume=flag(), data=['digits', 3, torch.zeros(2, 1, 8, 8), rgb(), named(), few(7)], console=['yes', 3], tensorboard=flag()),
]
INNER = {'a record': 'World Outcome Start',
         'between processes, called by `train` with what it made; tests/test_scale.py runs them in several': 'leave is_sharded local buckets in_buckets same_start average_gradients Stop flow_of units shard layers_of RunStart RunModel RunOutput Training judge_of bandwidth small_training',
         'as `recomputing`, with the same check; what it imports takes seconds': 'compiling',
         'opens with `join(device)`, whose door is above': 'smoke',
         'what a checkpoint keeps, compared when a run goes on; tests/test_scale.py has every key': 'leaves check_same told_of other_looks',
         'parts of `train`, which has asked `start_of`; test_scale.py has what does not fit': 'config_at by_class fill',
         'checks themselves': 'check_layer'}
