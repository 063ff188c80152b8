import torch

from doors import door, flag, number, whole
from doors.flows import FOLDERS
from flowbook import evidence as ev

NUMBERS = [None, 3., 'many', [], [1., float('inf'), 2.], [1., 'two', 3.], ['1', '2', '3'], [[1.], [2.], [3.]], {'a': 1.}]
NAMED = ['no_such', '../secret', '', None, 3, 'a/b']
BUDGET = ['tiny', None, 3, ['smoke']]
RECORD = dict(experiment='maf_limit', budget='smoke', configuration={}, runs=[dict(seed=0, result=dict(log_prob=0., inverse=0., conditionals=0., first=0.))])


def written(tmp, text): (tmp/'maf_limit.smoke.json').write_text(text); return tmp/'maf_limit.smoke.json'
def stored(tmp, **more): ev.write_atomic(written(tmp, ''), RECORD); return dict(name='maf_limit', budget='smoke', out=tmp, **more)
def axes():
    import matplotlib.pyplot as plt
    return plt.figure().add_subplot()


compared = ev.compare([1., 2., 3.], [2., 3., 5.])
DOORS = [
    door('numbers', lambda tmp: dict(values=[1., 2.]), values=NUMBERS),
    door('summary', lambda tmp: dict(values=[1., 2.]), values=NUMBERS),
    door('plot_seeds', lambda tmp: dict(ax=axes(), groups={'a': [1., 2.]}), ax=[None, 'axes'], groups=[None, {}, [1., 2.], {'a': [1., 2.], 'b': [1.]}, {'a': None}, {'a': ['one']}]),
    door('rule', lambda tmp: dict(d=[1., 2., 3.]), d=[None, 3., 'many', [[1.], [1., 2.]], [1., float('inf'), 2.], ['one', 'two', 'three']]),
    door('compare', lambda tmp: dict(a=[1., 2., 3.], b=[2., 3., 4.]), a=[*NUMBERS, [1.]], b=[*NUMBERS, [1.]]),
    door('power', lambda tmp: dict(effect=1., sd=1., n=3), effect=number(), sd=number(0, above=True), n=whole(3, 200)),
    door('detectable', lambda tmp: dict(sd=1., n=3), sd=number(0), n=whole(3, 200), power=number(0, 1, True, True)),
    door('power_statement', lambda tmp: dict(c=compared), c=[None, 3, (1., 2.)], steps=[v for v in whole(0) if v is not None], power=number(0, 1, True, True)),
    door('identity', lambda tmp: dict(error=0., tolerance=1., what='x'), error=['small', None, True, [0.]], tolerance=number(0)),
    door('lower', lambda tmp: dict(a=[1., 2., 3.], b=[2., 3., 4.], names=('a', 'b')), a=NUMBERS, b=NUMBERS, names=[None, ('a',), 3, ('a', 'b', 'c')]),
    door('all_of', lambda tmp: dict(verdicts=(ev.Verdict('exact', ''),)), verdicts=[(), ('exact',), (ev.Verdict('sure', ''),)]),
    door('experiment', lambda tmp: dict(name='x'))._replace(bad=dict(name=[*NAMED[1:], 'a b'], claims=['T1', None, (1,)], seeds=[3, {}, {'laptop': 1}, {'smoke': 0}, {'smoke': 'one'}, {'smoke': 1, 'huge': 2}],
                                                                     config=[3, {}, {'smoke': {'x': torch.zeros(1)}}, {'smoke': {'x': float('inf')}}, {'laptop': {}}], verdict=['yes', 3], clock=['seconds', 3, (1,)])),
    door('find', lambda tmp: dict(name='maf_limit'))._replace(bad=dict(name=NAMED)),
    door('result_path', lambda tmp: dict(name='maf_limit', budget='smoke', out=tmp))._replace(bad=dict(name=NAMED[1:], budget=BUDGET, out=[v for v in FOLDERS if v is not None])),
    door('write_atomic', lambda tmp: dict(path=tmp/'a.json', record={'a': 1}), path=[None, 3, lambda good: good['path'].parent], record=[{'a': torch.zeros(1)}, {'a': float('inf')}, {(1, 2): 3}]),
    door('read_result', lambda tmp: (stored(tmp), dict(path=tmp/'maf_limit.smoke.json'))[1], path=[None, 3, lambda good: good['path'].parent]),
    door('seed_list', lambda tmp: dict(e=ev.find('maf_limit'), budget='smoke', seeds=2), e=[None, 'maf_limit'], budget=BUDGET, seeds=[0, -1, 1.5, 'two', True, [], [1, 1], [-1], ['one'], [1.5], [True]]),
    door('run_each', lambda tmp: dict(name='maf_limit', out=tmp))._replace(bad=dict(name=NAMED, budget=BUDGET, seeds=[0, -1, 1.5, 'two', True, [], [1, 1], [-1], ['one']], out=[v for v in FOLDERS if v is not None], force=flag())),
    door('run', lambda tmp: dict(name='maf_limit', out=tmp))._replace(bad=dict(name=NAMED, budget=BUDGET, seeds=[0, -1, 1.5, 'two', True, [], [1, 1], [-1], ['one']], out=[v for v in FOLDERS if v is not None], force=flag())),
    door('load_result', stored)._replace(bad=dict(name=NAMED[1:], budget=BUDGET, out=[v for v in FOLDERS if v is not None])),
    door('per_seed', lambda tmp: dict(record=RECORD, key='log_prob'), record=[None, [], 'record', {}], key=[None, 3, 'bits', 'log_prob.x', '']),
    door('verdicts', lambda tmp: dict(record=RECORD), record=[None, [], {}, {**RECORD, 'runs': [dict(seed=0, result={})]}, {**RECORD, 'runs': []}]),
    door('show_verdicts', lambda tmp: dict(judged={'T1': ev.Verdict('exact', 'x: largest error 0.0e+00, tolerance 1e-08')}), judged=[None, [], 'T1']),
    door('compare_again', lambda tmp: dict(record=RECORD, seed=0, result=RECORD['runs'][0]['result']), record=[None, [], {}, 'record'], seed=[1, None, 'one'], result=[None, [], {}, {'bits': 1.}]),
    door('again', lambda tmp: (ev.run('maf_limit', out=tmp), dict(name='maf_limit', budget='smoke', out=tmp))[1])._replace(bad=dict(name=NAMED, budget=BUDGET, out=[v for v in FOLDERS if v is not None], seed=[1, -1, 1.5, 'one', True])),
]
INNER = {'records': 'Summary Comparison Verdict Experiment Again', 
         'how a verdict is printed, from the sentences of the judges': 'sentences as_row aligned power_in_words as_table', 'without arguments': 'registry results_dir known_flows',
         'the checks themselves, and what they are made of': 'check_seeds check_name check_same difference refuse_nan as_json as_file',
         'pieces of run_each': 'provenance command one_seed', 'a reader of what was checked when it was read': 'flat', 'verdicts on results': 'judge_t1',
         "experiments of the book: seed and budget are checked by run_each": 'change_of_variables'}
