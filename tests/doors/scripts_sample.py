import argparse
from functools import lru_cache
from types import SimpleNamespace

import torch

from doors import choice, door, flag, number, tensor, whole
from flowbook.scripts.sample import Opened, Way, add_way, open_model
from flowbook.tarflow import TarFlow


@lru_cache(None)
def opened():
    flow = TarFlow(4, 1, 2, 16, 2, 1, 8, classes=2).eval()
    flow.card = {'sigma': .1, 'class_names': ['cat', 'dog']}
    return Opened(flow)


def made(**fields): return Way(**{'guidance': 'class', **fields}).made()


def options():
    p = argparse.ArgumentParser()
    add_way(p.add_argument)
    return p.parse_args([])


def saved(tmp, **card):
    opened().model.save_pretrained(tmp/'model', card=card)
    return tmp/'model'


DOORS = [
    door('open_model', lambda tmp: dict(name=saved(tmp), device='cpu', vae=None))._replace(bad={'name': [None, 3, [], 'not there'], 'device': ['abacus', [], 2.5], 'vae': [3, [], 1.5]}),
    door('open_model')._replace(good=lambda tmp: dict(name=saved(tmp)), bad={'name': [lambda good: good['name'].parent.parent]}, says={'name': 'checkpoint'}),
    door('Way', of=lambda tmp: SimpleNamespace(Way=made), guidance=[*choice(), []], w=number(0), schedule=[*choice(), []], gamma=number(), denoise=flag()),
    door('Way', of=lambda tmp: SimpleNamespace(Way=lambda tau=2.: made(guidance='temperature', tau=tau)), tau=number(0, above=True)),
    door('Opened.draw', lambda tmp: dict(index=torch.arange(2), y=torch.tensor([0, 1]), way=Way(denoise=True), seed=0, solver='sequential', sigma=.1, dtype=None), of=lambda tmp: opened(), index=[*tensor(), torch.zeros(2), torch.zeros(2, 2).long()],
         y=[torch.tensor([0, 2]), torch.zeros(3, dtype=torch.long)], way=[None, 'class', {}], seed=whole(0), solver=['newton', None, 0, 1.5], sigma=number(0), dtype=['bfloat16', 3, torch.int64]),
    door('way_of', lambda tmp: dict(a=options(), card={}), card=[{'sample': 3}, {'sample': ['w']}]),
    door('way_of', lambda tmp: dict(a=options(), card={}), card=[{'sample': {'strength': 3}}, {'sample': {'guidance': 'class', 'w': 1., 'n': 3, 'more': 1}}])._replace(says={'card': 'sample'}),
    door('way_of', lambda tmp: dict(a=options(), card={}), card=[{'sample': {'gamma': 'x'}}, {'sample': {'gamma': 1e999}}])._replace(says={'card': 'gamma'}),
    door('known_noise', lambda tmp: dict(card={'sigma': .1}, given=None), card=[{'sigma': 'loud'}, {'sigma': -1.}, {'noise': []}, {'sigma': True}, {'noise': 1e999}])._replace(says={'card': 'card'}),
    door('known_noise', lambda tmp: dict(card={}, given='.1'), given=['loud', '-1', 'nan', [], True])._replace(says={'given': '--noise'}),
    door('pick_classes', lambda tmp: dict(text='cat,1', model=opened()), text=[3, [], 1.5]),
    door('pick_classes', lambda tmp: dict(text='cat,1', model=opened()), text=['bird', '2', '-2', '', '--1', '²', '9' * 5000])._replace(says={'text': '--classes'}),
]
INNER = {
    'kinds of what open_model gives; Opened.draw is the door of all of them': 'OpenedLatent OpenedJoint',
    'looks at files and cards: damaged ones are tested in test_sample.py': 'check_card',
    'of the command line, whose mistakes are tested in test_sample.py': 'add_way check_way parser main cli summary broken drawn_again typed_difference agreed',
    'files and names of samples: called with what the command line has checked': 'class_folder write_png write_tensors Place grid_columns shown_again',
    'record': 'Drawn',
}
