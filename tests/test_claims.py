"""The ledger: every claim has a state, made from files alone; what must hold holds; the README says what the ledger says."""
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flowbook import claims as C
from flowbook import evidence as ev
from flowbook.configs import CONFIGS, CORRECTIONS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT/'nbs/results'
ROWS = C.ledger(RESULTS)
NAMES = sorted({r.decides.experiment for r in ROWS.values() if r.decides.seeds})


@pytest.fixture
def copied(tmp_path):
    for f in RESULTS.glob('*.*.json'):
        if f.name.split('.')[1] in ev.BUDGETS: shutil.copy(f, tmp_path)
    return tmp_path


def test_53_claims_each_with_a_state():
    assert len(C.CLAIMS) == 53 and {k[0] for k in C.CLAIMS} == set(C.PAPERS) and all(r.state in (*ev.STATES, *C.MORE) for r in ROWS.values())
    assert [sum(k[0] == p for k in C.CLAIMS) for p in C.PAPERS] == [19, 16, 18]


def test_what_must_hold_holds():
    assert C.not_positive(ROWS) == [] and len(C.POSITIVE) == 21


def test_no_result_is_stale(): assert [k for k, r in ROWS.items() for x in (r.decides, *r.beside) if x.state == 'stale'] == []


def test_what_is_not_seen_says_what_could_have_been_seen(): assert C.without_power(ROWS) == []


def test_nearly_all_claims_have_a_result():
    assert sum(bool(r.decides.seeds) for r in ROWS.values()) >= 45
    assert {k for k, r in ROWS.items() if r.state == 'preset'} == set(C.FULL_SCALE)


def test_every_experiment_speaks_of_claims_that_exist():
    assert {c for e in ev.registry().values() for c in e.claims} <= {*C.CLAIMS, 'the main job'}


def test_directions_have_three_seeds_and_identities_their_tolerance():
    for k, r in ROWS.items():
        if r.state in ('seen', 'reversed', 'not seen'): assert len(r.decides.seeds) >= 3, k
        if r.state == 'exact': assert 'tolerance' in r.decides.reason, k


@pytest.mark.parametrize('name', NAMES)
def test_a_changed_result_changes_the_table(name, copied):
    "Two seeds show no direction, whatever they say; a torn file is named; without one the claim is not run."
    file, mine = copied/f'{name}.laptop.json', [k for k, r in ROWS.items() if r.decides.experiment == name]
    record = json.loads(file.read_text())
    now = lambda: {k: C.row(C.CLAIMS[k], copied) for k in mine}
    assert now() == {k: ROWS[k] for k in mine}
    record['runs'] = record['runs'][:2]
    ev.write_atomic(file, record)
    assert {k: r.state for k, r in now().items()} == {k: 'exact' if ROWS[k].state == 'exact' else 'not judged' for k in mine}
    record['configuration']['a key of another time'] = 1
    ev.write_atomic(file, record)
    assert all(r.state == 'stale' and 'a key of another time' in r.decides.reason and '--force' in r.decides.command for r in now().values())
    file.write_text(file.read_text()[:-100])
    assert all(r.state == 'stale' and 'not a whole JSON file' in r.decides.reason and str(copied) not in r.decides.reason for r in now().values())
    file.unlink()
    assert all(r.state == 'not run' and f'flowbook_experiment {name}' in r.decides.command for r in now().values())


def test_the_number_in_the_table_is_the_number_in_the_file(copied):
    file = copied/'bits_per_dim.laptop.json'
    record = json.loads(file.read_text())
    for r in record['runs']: r['result']['tarflow']['bits'] -= 1
    ev.write_atomic(file, record)
    old, new = (float(re.search(r'tarflow ([\d.]+)', d.reason)[1]) for d in (ROWS['T5'].decides, C.row(C.CLAIMS['T5'], copied).decides))
    assert abs(old - 1 - new) < 2e-3
    assert f'tarflow {new:.4g}' in C.as_html(C.ledger(copied), 'T')


def test_the_papers_figures_come_from_the_configurations():
    for c in C.CLAIMS.values():
        assert '{' not in C.figures(c) and all(p in CONFIGS for p in c.presets), c.id
    with pytest.raises(ValueError, match='no configuration'): C.figures(C.Claim('X', '', '', '{no-such: FID}'))
    with pytest.raises(ValueError, match='0 published'): C.figures(C.Claim('X', '', '', '{tarflow-64: IS}'))


def test_two_experiments_need_a_word_on_which_decides():
    several = [c for c in C.CLAIMS.values() if c.decides]
    assert several
    with pytest.raises(ValueError, match='must name'): C.row(several[0]._replace(decides=''))
    with pytest.raises(ValueError, match='must name'): C.row(several[0]._replace(decides='no such'))


def test_where_means_point():
    "Along the claim is lower, as everywhere; two that are not seen may point to both sides; what is not judged does not count."
    a, b = ([1., 2., 3.], [1.1, 2., 3.]), ([5., 1., 3.], [1., 2., 3.])
    along, against = (ev.lower(*v, ('a', 'b')) for v in (a, b))
    assert {v.state for v in (along, against)} == {'not seen'}
    arrow = lambda *v: C.leaning(C.Reading('x', *ev.all_of(*v)))
    assert [arrow(along), arrow(against), arrow(along, against)] == ['↑', '↓', '↕']
    assert C.leaning(C.Reading('x', 'not seen', f'{along.reason}; not judged: {against.reason}')) == '↑' and C.leaning(ROWS['T1'].decides) == ''
    assert {C.leaning(r.decides) for r in ROWS.values() if r.state != 'not seen'} == {''}


def test_squares_lead_to_rows():
    page = C.squares(ROWS)
    assert all(f'href="#{k}"' in page and f'>{k}<br>{C.MARKS[r.state]}{C.leaning(r.decides)}<' in page for k, r in ROWS.items())


def test_the_part_that_decides_comes_first():
    "An identity is no reason for 'seen'; T9 has one, and a direction."
    assert 'tolerance' not in C.telling(ROWS['T9'].decides)[0] and any('tolerance' in s for s in C.telling(ROWS['T9'].decides)[1])


def test_counts_add_up():
    table = C.counts(ROWS)
    assert sum(n for t in table.values() for n in t.values()) == 53
    assert C.counts_table(ROWS).count('\n') == 5 and '**53**' in C.counts_table(ROWS)


def test_the_readme_says_what_the_ledger_says():
    assert C.counts_table(ROWS) in (ROOT/'README.md').read_text()


def test_text_and_pages():
    text = C.as_text(ROWS)
    assert all(re.search(rf'^{k} +{r.state}', text, re.M) for k, r in ROWS.items()) and text.splitlines()[-1].startswith('53 claims: ')
    for p in C.PAPERS:
        page = C.as_html(ROWS, p)
        assert all((f'id="{k}"' in page) == (k[0] == p) for k in C.CLAIMS) and page.count('<details>') == page.count('</details>')
    evil = {'T1': C.Row(C.CLAIMS['T1'], C.Reading('x', 'exact', '<script>alert(1)</script>; b', command='<b>'))}
    assert '<script>' not in C.as_html(evil, 'T') and '<b>' not in C.as_html(evil, 'T')


def test_every_correction_has_its_computation():
    found = C.corrections(ROWS, RESULTS)
    assert list(found) == [f'E{k}' for k in range(1, 21)] and set(CORRECTIONS) <= set(found)
    assert all(re.search(r'\d', s) for k, s in found.items() if k != 'E19') and ROWS['S15'].state in found['E19']


def test_a_correction_follows_the_published_figures(monkeypatch):
    old = C.corrections(ROWS, RESULTS)
    for name in ('simflow-xxl-sigma-0.75', 'rrepa-256-plain'):
        c = CONFIGS[name]
        monkeypatch.setitem(CONFIGS, name, replace(c, published=tuple(replace(r, value=r.value + 1) for r in c.published)))
    new = C.corrections(ROWS, RESULTS)
    assert {k for k in old if old[k] != new[k]} == {'E5', 'E6', 'E11'}


def test_without_results_a_correction_says_less(tmp_path):
    assert 'differ by' in C.corrections(ROWS, RESULTS)['E2'] and 'differ by' not in C.corrections(ROWS, tmp_path)['E2']


CHEAP = [n for n in NAMES if max(r['seconds'] for r in ev.load_result(n, 'laptop', RESULTS)['runs']) < 30]


@pytest.mark.slow
@pytest.mark.parametrize('name', CHEAP)
def test_a_result_can_be_made_again(name):
    "Those that take seconds; `flowbook_experiment --again 3` draws from all."
    seed = ev.load_result(name, 'laptop', RESULTS)['runs'][-1]['seed']
    found = ev.again(name, 'laptop', seed, RESULTS)
    assert found.agrees, found


def test_some_results_are_cheap(): assert len(CHEAP) >= 5
