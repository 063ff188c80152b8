from functools import lru_cache
from types import SimpleNamespace

import torch

from doors import choice, door, flag, integers, number, off, tensor, whole
from flowbook.explore import Contest, Explorer, Flows, Setting, contest
from flowbook.tarflow import TarFlow

NO_FLOWS = [None, 'a flow', 3, [], {}, {'a': 'a flow'}]


@lru_cache(None)
def flow():
    f = TarFlow(4, 1, 2, 16, 2, 1, 8, classes=3).eval()
    f.card = {'sigma': .1}
    return f


@lru_cache(None)
def explorer(): return Explorer(flow(), n=2)


def checked(**fields): return explorer().check(Setting(**{'model': 'model', **fields}))


def compared(**fields): return contest(Flows(flow()), Contest(**{'model': 'model', 'n': 1, **fields}))


def pair(tmp): return SimpleNamespace(Setting=checked, Contest=compared)


DOORS = [
    door('Flows', lambda tmp: dict(flows=flow(), n=2, sigma=.1), flows=NO_FLOWS, n=whole(1, 1024), sigma=[v for v in number(0, above=True) if v is not None]),
    door('Paths', lambda tmp: dict(flows=flow(), n=2, sigma=.1, keep=2), flows=NO_FLOWS, n=whole(1, 1024), sigma=[-1., 'one'], keep=whole()),
    door('Explorer', lambda tmp: dict(flows=flow(), n=2), flows=NO_FLOWS, n=whole(1, 1024)),
    door('Setting', of=pair, model=[*choice(), []], label=[3, -2, 1.5, '1', None, True], kind=[*choice(), []], w=number(0), tau=number(0, above=True), schedule=[*choice(), []], denoise=flag(), gamma=number(0), seed=whole(0),
         block=[3, -1, 1.5, 'all', True]),
    door('Contest', of=pair, model=[*choice(), []], n=whole(1, 1024), kind=[*choice(), 'star'], w=number(0), tol=number(0), seed=whole(0))._replace(good=lambda tmp: {'kind': 'class'}),
    door('Flows.flow', lambda tmp: dict(name='model'), of=lambda tmp: explorer())._replace(bad={'name': [*choice(), []]}, says={'name': 'model'}),
    door('Explorer.picture', lambda tmp: dict(s=Setting('model')), of=lambda tmp: explorer(), s=[None, 'model', 3, {}]),
    door('Paths.samples', lambda tmp: dict(s=Setting('model')), of=lambda tmp: explorer(), s=[None, 'model', 3, {}]),
    door('guidance_of', lambda tmp: dict(s=Setting('model')), s=[None, 'model', 3, {}]),
    door('contest', lambda tmp: dict(flows=Flows(flow()), s=Contest('model', n=1)), flows=[None, flow(), 3], s=[None, 'model', Setting('model')]),
    door('compare_solvers', lambda tmp: dict(flow=flow(), n=1, guidance=None, tol=1e-3, seed=0, solvers=('sequential',)), flow=[None, 'a flow', 3, torch.nn.Linear(1, 1)], n=whole(1, 1024), guidance=['class', 1., {}],
         tol=number(0), seed=whole(0), solvers=[None, 3, 'sequential', [], {}]),
    door('compare_solvers', lambda tmp: dict(flow=flow(), n=1, solvers=('sequential',)), solvers=[('newton',), (0,), (None,), ([1, 1, 1],)])._replace(says={'solvers': 'solver'}),
    door('solving', lambda tmp: dict(flow=flow(), n=1, guidance=None, tol=1e-3, seed=0, solvers=('sequential',)), flow=[None, 'a flow', 3, torch.nn.Linear(1, 1)], n=whole(1, 1024), guidance=['class', 1., {}], tol=number(0),
         seed=whole(0), solvers=[None, 3, 'sequential', [], {}]),
    door('as_code', lambda tmp: dict(s=Setting('model')), s=[None, 'model', 3, {}, Contest('model')]),
    door('titles_of', lambda tmp: dict(s=Setting('model'), T=3), s=[None, 'model', 3, {}], T=whole()),
    door('crossed', lambda tmp: dict(x=torch.zeros(2, 1, 4, 4)), x=[*tensor(), torch.zeros(4, 4)]),
    door('nothing', lambda tmp: dict(side=40), side=whole(1, 10_000)),
    door('density_text', lambda tmp: dict(sigma=.3), sigma=number(0, above=True)),
    door('path_log_prob', lambda tmp: dict(flow=flow(), x=torch.zeros(2, 1, 4, 4), t=1, y=torch.zeros(2, dtype=torch.long)), flow=[None, 'a flow', 3, torch.nn.Linear(1, 1)], x=[*tensor(), integers('x'), off('x', 1), off('x', 2), off('x', 3)],
         t=whole(0, 2), y=[torch.full((2,), 3), torch.zeros(3, dtype=torch.long)]),
    door('to_png', lambda tmp: dict(x=torch.zeros(2, 1, 4, 4), side=40), x=[*tensor(), integers('x'), torch.zeros(2, 2, 4, 4), torch.zeros(0, 1, 4, 4), torch.zeros(4, 4)], side=whole(1, 10_000)),
    door('panel', lambda tmp: dict(flows=flow(), start=None, n=1), flows=[3, [], {}, {'a': 'a flow'}], start=['model', 3, Contest('model')], n=whole(1, 1024), sigma=[-1., 'one']),
    door('solver_panel', lambda tmp: dict(flows=flow(), start=Contest('model', n=1)), flows=['a flow', 3, {}], start=['model', 3, Setting('model')]),
    door('density_png', lambda tmp: dict(sigma=.3), sigma=number(0, above=True)),
    door('density_panel', lambda tmp: dict(sigma=.2), sigma=[*number(0, above=True), .21, []]),
]
INNER = {
    'never raise: they turn any mistake into a sentence for the reader, which test_explore.py shows for each of them': 'redraw density_redraw solver_redraw solver_frames',
    'parts of a panel: called with what the panel has checked': 'render plain sentence classes_of make_controls adapt setting_of age framed side_by_side drawer label_density once quickest solver_table solver_controls',
    'takes no arguments': 'book_flows latest',
    'records': 'Picture Solved',
}
