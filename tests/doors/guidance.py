import torch
from torch import nn

from doors import door, flag, integers, labels, number, off, tensor, whole
from doors.flows import GENERATORS
from doors.tarflow import flow, tokens
from flowbook.flows import MAF
from flowbook.guidance import ClassGuidance, StarGuidance

SCHEDULES = ['linaer', None, 3, 'constant ', len, 'linear'.upper]  # functions of other arguments, or of another value
GUIDANCES = ['strong', 1., ClassGuidance, nn.Linear(1, 1)]
FLOWS = [None, 'a flow', nn.Linear(2, 2), MAF(2, 4, blocks=1)]
Y = torch.tensor([0, -1])


def guided(): return dict(flow=flow('nvp', 3), z=torch.zeros(2, 4, 4), y=Y, guidance=ClassGuidance(1.))


DOORS = [
    door('ClassGuidance', lambda tmp: dict(w=1.), w=number(0), schedule=SCHEDULES),
    door('StarGuidance', lambda tmp: dict(w=1.), w=number(0), schedule=SCHEDULES, everywhere=flag()),
    door('TemperatureGuidance', lambda tmp: dict(w=1., tau=2.), w=number(0), tau=number(0, above=True), schedule=SCHEDULES),
    door('LinearGuidance', lambda tmp: dict(w=1.), w=number(0), schedule=SCHEDULES),
    door('ClassGuidance.check', lambda tmp: dict(flow=flow('nvp', 3), y=Y), lambda tmp: ClassGuidance(1.), says={'flow': 'guidance', 'y': 'guidance'}, flow=[lambda good: flow()], y=[None]),
    door('inverse_blocks', lambda tmp: guided(), flow=FLOWS, z=tokens('z'), y=labels(3, 2), guidance=GUIDANCES),
    door('guided_inverse', lambda tmp: guided(), flow=FLOWS, z=tokens('z'), y=labels(3, 2), guidance=GUIDANCES),
    door('guided_inverse', lambda tmp: {**guided(), 'flow': flow(), 'y': None, 'guidance': None}, y=[Y], guidance=[ClassGuidance(1.), StarGuidance(1.)]),
    door('guided_sample', lambda tmp: dict(flow=flow('nvp', 3), n_or_y=Y), flow=FLOWS, n_or_y=[*whole(0), torch.full((2,), 3), torch.zeros(2), torch.zeros(2, 4), torch.full((2, 3), torch.nan), 'cat', [[0, 0], [1]]], guidance=GUIDANCES, generator=GENERATORS),
    door('score_guidance', lambda tmp: dict(flow=flow('nvp', 3), x=torch.zeros(2, 1, 4, 4), y=Y, gamma=.1), flow=[*FLOWS[:3], lambda good: flow()], x=[*tensor(), integers('x'), off('x', 1), off('x', 2)], y=[None, *labels(3, 2)], gamma=number()),
]
INNER = {'no guidance, and the base of all': 'Guidance', 'schedules, called by a guidance': 'constant linear', 'the checks themselves': 'check_weight check_guided', 'a look-up in results': 'value_at',
         'a step of inverse_blocks': 'inverse_block', "experiments of the book, without arguments of a reader's own: seed and budget are checked by evidence": 'trajectory_states guidance_sweep guided_quality', 'verdicts on their results': 'judge_trajectory judge_guidance_sweep'}
