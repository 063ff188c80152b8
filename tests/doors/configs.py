import math
from dataclasses import fields

import flowbook.configs as C
from doors import choice, door, flag, number, whole
from flowbook.configs import CONFIGS

KINDS = [None, 'rrepa-64', 3, {}]                            # of what should be a configuration


def config(): return CONFIGS['rrepa-64']


def parts(c, **more): return {f.name: getattr(c, f.name) for f in fields(c)} | more


def wrong(f):
    "What a field of a part must not be, by its annotation and its ends."
    none, (least, most) = 'None' in str(f.type), (f.metadata.get(k) for k in ('least', 'most'))
    text = str(f.type)
    if f.metadata.get('choices'): return [v for v in choice() if v not in f.metadata['choices']]
    if f.type is bool: return flag()
    if 'str' in text: return [3, [], 2.5, *[None] * (not none)]
    if 'tuple' in text: return ['7,8', {}, 2.5, *[None] * (not none)]
    if 'float' in text: return [math.nan, math.inf, 'one', True, 10**400, *[None] * (not none), *[least - .5] * (least is not None)]
    return [v for v in whole(least, most or 2**53) if v is not None or not none]


def door_(name, good, name_, **bad): # of what has an argument `name` itself
    return door(name, good, **bad)._replace(bad={'name': name_, **bad})


DOORS = [door(k.__name__, lambda tmp: {})._replace(bad={f.name: wrong(f) for f in fields(k)}) for k in C.PARTS.values()] + [
    door('Result', lambda tmp: dict(metric='FID', value=2.66, table='Table 3'), metric=[None, 3], value=number(), table=[None, 3], note=[None, 3]),
    door_('Config', lambda tmp: parts(config()), [None, 3], paper=[None, 3], title=[None, 3], data=[None, 3, {}], flow=[None, 3, {}], noise=[None, {}], align=[3, {}, 'reverse'], joint=[3, C.JointVae()],
         optim=[None, 3, {}], system=[None, {}], sample=[None, {}], published=[None, 'FID', [], ('FID',)], unsaid=[None, 'optim.lr', []], notes=[None, 'E1', (3,)], seed=[v for v in whole(0, 2**63 - 1)], changed=[None, 'seed=1', []]),
    door('model_of', lambda tmp: dict(c=C.twin(config())), c=KINDS),
    door('changed', lambda tmp: dict(c=config(), values={'optim.lr': 1e-3}), c=KINDS, values=[None, [], 'optim.lr=1', {'optim.lt': 1}, {'optm.lr': 1}, {'joint.p': 1}, {3: 4}]),
    door('changed', lambda tmp: dict(c=config(), values={}), values=[{'optim.lr': -1.}, {'optim.lr': 'fast'}], says={'values': 'optim.lr'}),
    door('every_key', lambda tmp: dict(c=config()), c=KINDS),
    door('override', lambda tmp: dict(c=config(), assignments=['optim.lr=1e-3']), c=KINDS, assignments=[None, 'optim.lr=1', 3, [3], ['optim.lr'], {'optim.lr': 1}]),
    door('to_dict', lambda tmp: dict(c=config()), c=KINDS),
    door('from_dict', lambda tmp: dict(d=C.to_dict(config())), d=[None, [], 3, 'x']),
    door('twin', lambda tmp: dict(c=config()), c=KINDS + [lambda good: C.twin(config())], data=choice()),
    door('listing', lambda tmp: dict(configs=[config()]), configs=[3, 'all', ['rrepa-64'], [None], config()]),
    door_('find_config', lambda tmp: dict(name='rrepa-64'), ['rrepa-46', '', None, 3, [], {}, 'digits-']),
    door_('vit_of', lambda tmp: dict(name='dinov2-b'), [None, 3, []]),
    door('parameters', lambda tmp: dict(c=config()), c=KINDS),
    door('count', lambda tmp: dict(c=config()), c=KINDS),
    door('flops', lambda tmp: dict(c=config()), c=KINDS, critic=flag(), before=flag()),
    door_('gpu_of', lambda tmp: dict(name='H100'), [*choice(), []])._replace(says={'name': 'gpu'}),
    door('memory', lambda tmp: dict(c=config(), world=8), c=KINDS, world=[v for v in whole(1, 2**13) if v is not None]),
    door('hours', lambda tmp: dict(c=config(), gpu='A100', world=8, share=.4), c=KINDS, gpu=[*choice(), []], world=[v for v in whole(1, 2**13) if v is not None], share=[v for v in number(0, 1, above=True) if v is not None]),
    door('whole_flops', lambda tmp: dict(c=config()), c=KINDS),
    door('describe', lambda tmp: dict(c=config(), gpu='A100', world=8), c=KINDS, gpu=[*choice(), []], world=[v for v in whole(1, 2**13) if v is not None]),
]
INNER = {
    'the checks themselves, and what reads a field: called by the doors above': 'checked said of Section wholes check_kind check_parts check_kinds check_optim check_flow check_align check_joint check_sizes world_of nearest number',
    "rows of the papers' tables, run once when the module is imported": 'R add tarflow rrepa detach_all simflow table_1',
    'parts of a configuration that is checked already: they see it only through the doors above': 'vae_config with_sigma variant_of twin_sides small size_of data_of main_result columns mean_only costs_of said_of says told_of short',
    'formulas over the sizes of a configuration, behind parameters, flops and memory': 'norm_numbers layer_numbers token_widths flow_numbers resnet vae_layers critic_layers lpips_layers projector_numbers block_cost flow_flops projector_flops aligned_flops vae_flops '
                                                                                      'layer_bytes flow_bytes conv_bytes critic_bytes joint_bytes f_layers',
    'records': 'Conv Spot Vit Cost Gpu Hours',
}
