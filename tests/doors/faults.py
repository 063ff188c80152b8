import json

from doors import door, number, whole

ROW = {'part': 'disk', 'fault': 'f', 'outcome': 'o', 'said': '', 'tests': {'t': {'tries': 1, 'passed': 1, 'failed': 0, 'skipped': 0}}}


def config(name='digits-tarflow-64'):
    from flowbook.configs import find_config
    return find_config(name)


def table(tmp):
    (tmp/'t.json').write_text(json.dumps({'faults': [ROW]})); (tmp/'odd.json').write_text(json.dumps({'faults': [{**ROW, 'part': 'odd'}]})); (tmp/'bad.json').write_bytes(b'\x80\x04.')
    return str(tmp/'t.json')


FILES = ['none.json', 'bad.json', 'odd.json', '.']
DOORS = [
    door('between', lambda tmp: dict(gpus=8, gpu_days=100.), gpus=whole(), gpu_days=number(0, above=True)),
    door('lost', lambda tmp: dict(every=1., cost=.1, between=10., restart=.1), every=number(0, above=True), cost=number(0), between=number(0, above=True), restart=number(0)),
    door('best_every', lambda tmp: dict(cost=.1, between=10.), cost=number(0, above=True), between=number(0, above=True)),
    door('simulate', lambda tmp: dict(work=5., every=1., cost=.1, between=10., restart=.1, seed=0), work=number(0, above=True), every=number(0, above=True), cost=number(0), between=number(0, above=True), restart=number(0), seed=whole(0)),
    door('rhythm', lambda tmp: dict(c=config(), gpu='A100', world=2, save_every=10, disk=1e9, waits=.1, restart=.1, gpu_days=100.),
         gpu=['TPU', 3, None], world=[0, 1.5, 'two', True], save_every=whole(), disk=number(0, above=True), waits=number(0, 1, above=True), restart=number(0), gpu_days=number(0, above=True)),
    door('flip', lambda tmp: ((tmp/'f').write_bytes(b'12345'), dict(path=str(tmp/'f'), at=.5))[1], at=number(0, 1, below=True)),
    door('read_faults', lambda tmp: dict(path=table(tmp)), path=FILES),
    door('fault_table', lambda tmp: dict(path=table(tmp)), path=FILES),
    door('stale', lambda tmp: dict(path=table(tmp), fresh=table(tmp)), path=FILES, fresh=FILES, says={'fresh': 'path'}),
]
INNER = {'minutes of processes: tests/test_faults.py': 'drill main', 'parts of a drill': 'Launched Bomb disturb compare', 'records': 'Rhythm Tried'}
