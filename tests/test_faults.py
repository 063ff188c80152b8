"""Chapter 15's arithmetic of failures, its drill, and its table, which all marked tests make."""
import json
import math
from pathlib import Path

import conftest
import pytest

from flowbook.faults import best_every, between, drill, fault_table, lost, read_faults, rhythm, simulate, stale

TABLE = Path(__file__).parent.parent/'nbs'/'results'/'faults.json'


@pytest.mark.parametrize('every', [.01, 1., 30.])
@pytest.mark.parametrize('cost', [1e-6, .01, 2.])
def test_the_best_interval_is_where_least_is_lost(every, cost):
    m = 40 * every
    best = best_every(cost, m)
    assert 0 < best < m and all(lost(best, cost, m, .3) <= lost(best * f, cost, m, .3) for f in (.2, .8, .99, 1.01, 1.2, 5))


def test_limits():
    assert lost(1., 0., 1e12) < 1e-9 and lost(1., 1., 1e12) == pytest.approx(.5)          # no failures: the saves alone
    assert lost(1e6, 1., 1.) == 1.                                                        # it never gets there
    assert between(2) == between(1) / 2
    assert simulate(10., 1., 0., 1e9, 0.)[-1].tolist() == [10., 10.]


def test_a_table_is_read_shown_and_compared(tmp_path):
    row = lambda fault, part='disk', failed=0, outcome='a | b': {'part': part, 'fault': fault, 'outcome': outcome, 'said': '', 'tests': {'t': {'tries': 1200, 'passed': 1, 'failed': failed, 'skipped': 0}}}
    def write(name, *rows): (tmp_path/name).write_text(json.dumps({'faults': rows})); return tmp_path/name
    a = write('a', row('full'), row('gone'))
    assert '| full | 1,200 | a \\| b |' in fault_table(a) and '### Disks and files' in fault_table(a)
    assert stale(a, a) == []
    said = ' '.join(stale(a, write('b', row('full', failed=1, outcome='c'), row('new'))))
    assert all(w in said for w in ('new: not in', 'gone: no test tries it', "full: the outcome is now 'c'", 'full: 1 failed'))
    with pytest.raises(ValueError, match='path.*rows of nonsense'): read_faults(write('c', row('x', 'nonsense')))
    with pytest.raises(ValueError, match='path.*no table of faults'): read_faults(tmp_path/'none')


def test_every_marked_fault_has_its_row_in_the_book():
    "Of the tests that were collected with this one; `.ci/run` compares all of them, after they have run."
    rows = {r['fault']: r for r in read_faults(TABLE)}
    for (part, fault, outcome), found in conftest.MARKED.items():
        assert fault in rows and (rows[fault]['part'], rows[fault]['outcome']) == (part, outcome), f'{fault!r} of {found[0]} is not so in {TABLE.name}: FLOWBOOK_FAULTS=nbs/results/faults.json pytest -m ""'
    assert not any(r['failed'] for r in rows.values()) and all(r['passed'] for r in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.fault('processes', 'a run that is started twice, killed, stopped, has a bit flipped and a file replaced, one after the other', 'it goes on each time; its model is the undisturbed one to the last bit, its log one curve')
def test_the_drill(tmp_path, processes):
    lines = []
    assert all(t.fine for t in drill(tmp_path, steps=60, processes=processes, device='cpu', say=lines.append)), '\n'.join(lines)
    with pytest.raises(ValueError, match='folder.*earlier drill'): drill(tmp_path)
