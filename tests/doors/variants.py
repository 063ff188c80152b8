from doors import door, number, whole

NUMBERS = [[], ['one'], None, [float('nan')], [1., 2.], [1., 2., 0.], [1., 2., -3.]]

DOORS = [
    door('smaller', lambda tmp: dict(a=[1., 2., 3.], b=[2., 3., 4.], names=('a', 'b')), a=NUMBERS, b=NUMBERS, names=[None, ('a',), 3, ('a', 'b', 'c')]),
    door('wide', lambda tmp: dict(d=16))._replace(bad=dict(d=whole(), c=['digits', None, {}, {'vae': {}}])),
    door('channel_bits', lambda tmp: dict(sigma=.5, power=1.), sigma=number(0, above=True), power=number(0)),
    door('beta_at', lambda tmp: dict(d=16, weight=1., pixels=64, n=16), d=whole(), weight=number(0, above=True), pixels=whole(), n=whole()),
]
INNER = {"experiments of the book, without arguments of a reader's own: seed and budget are checked by evidence": 'simflow_variants simflow_weight simflow_sigma simflow_width simflow_position',
         'their parts, whose configurations are those of `training`': 'measured_with measured swept at_sigma aligned_term',
         'verdicts on their results': 'judge_variants judge_sigma judge_width judge_position', 'pieces of these verdicts': 'column fid_smaller moderate'}
