import torch

from doors import choice, door, flag, labels, number, whole
from doors.flows import GENERATORS
from doors.guidance import FLOWS, GUIDANCES, Y
from doors.tarflow import flow, tokens
from flowbook.flows import MAF
from flowbook.guidance import ClassGuidance
from flowbook.sampling import trajectory

SOLVERS = ['newton', None, 0, -1, 1.5, True, [1], [1, 0], [1, 'one'], {}]
DTYPES = ['bf16', 16, torch.int32, float]
ASKED = [*whole(0), torch.full((2,), 3), torch.zeros(2), torch.zeros(2, 4), torch.full((2, 3), torch.nan), 'cat', [9], [[0, 0], [1]], {'cat': 1}]


def carded(**card): # a flow whose card came with a file
    from flowbook.tarflow import TarFlow
    f = TarFlow(4, 1, 2, 8, 1, 1, 4)
    f.card = card
    return lambda good: f


def inverted(): return dict(flow=flow('nvp', 3), z=torch.zeros(2, 4, 4), y=Y, guidance=ClassGuidance(1.), solver='jacobi')
def sampled(): return dict(flow=flow('nvp', 3), y_or_n=Y, solver='sequential')


SAMPLE = dict(y_or_n=ASKED, guidance=GUIDANCES, denoise=[True, 'yes', -1., float('nan'), float('inf'), [.1]], solver=SOLVERS, tol=number(0), generator=GENERATORS, batch_size=[v for v in whole(1) if v is not None],
              on_broken=choice(), dtype=DTYPES, progress=flag())
INVERT = dict(flow=FLOWS, z=[*tokens('z'), torch.zeros(2, 4, 4).half()], y=labels(3, 2), guidance=GUIDANCES, solver=SOLVERS, tol=number(0), dtype=DTYPES)
DOORS = [
    door('sample', lambda tmp: sampled(), flow=FLOWS[:3], **SAMPLE),
    door('samples', lambda tmp: sampled(), flow=FLOWS[:3], **SAMPLE),
    door('sample', lambda tmp: dict(flow=flow(), y_or_n=2, solver='sequential'), y_or_n=[Y], guidance=[ClassGuidance(1.)]),
    door('sample', lambda tmp: dict(flow=MAF(2, 4, blocks=1), y_or_n=2), guidance=[ClassGuidance(1.)], dtype=[torch.bfloat16]),
    door('sample', lambda tmp: dict(flow=flow(), y_or_n=2, solver='sequential'), says={'flow': 'card'}, flow=[carded(sigma='much'), carded(sigma=-1.), carded(reach='far'), carded(reach=float('nan'))]),
    door('sample', lambda tmp: dict(flow=flow(), y_or_n=2, solver='sequential'), says={'denoise': 'card'}, denoise=[True]),
    door('invert', lambda tmp: inverted(), grad=flag(), **INVERT),
    door('invert', lambda tmp: {**inverted(), 'grad': True}, dtype=[torch.bfloat16], flow=FLOWS, z=tokens('z'), y=labels(3, 2), guidance=GUIDANCES),
    door('trajectory', lambda tmp: inverted(), **INVERT),
    door('residual', lambda tmp: (lambda i: dict(flow=i['flow'], z=i['z'], stages=list(trajectory(**i)), y=Y, guidance=i['guidance']))(inverted()), flow=FLOWS, z=tokens('z'), stages=[None, 3, [1], 'all'], y=labels(3, 2), guidance=GUIDANCES),
    *(door(name, lambda tmp: dict(flow=flow('nvp', 3), b=2), flow=FLOWS, y=[v for v in labels(3, 2) if not isinstance(v, torch.Tensor) or len(v) == 2], guidance=GUIDANCES, tol=number(0), b=whole(1), seed=whole(0)) for name in ('calibrate', 'count_passes')),
    *(door(name, lambda tmp: {k: v for k, v in inverted().items() if k != 'solver'}, flow=FLOWS, z=tokens('z'), y=labels(3, 2), guidance=GUIDANCES) for name in ('naive_inverse', 'textbook_inverse')),
]
INNER = {'what sample and invert are made of, after their checks': 'Decoder StepDecoder walk walk_graph step_at slide tame of_the_living ours invert_block windows_of latents labels_of noise_of on_card broken_ones redrawn',
         'how a layer and a head step, chosen by Decoder': 'StaticCache RowLayer FastLayer layer_at AnyLayer weights_of anatomy has_fast plain_head',
         "parts of solver='auto'": 'kept_passes pass_seconds pick_windows predicted timed', 'the textbook\'s step, called by textbook_inverse': 'GrowingCache textbook_step',
         'a record': 'Stage', 'the slow definition of a loss, run beside the quick one by the benchmark': 'plain_nll'}
