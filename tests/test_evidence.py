"""The runner and the rule: what is on disk after a fault, what is refused, and what the statistics promise."""
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from flowbook import evidence as ev
from flowbook.scripts import experiment

NAMES = list(ev.registry())
RESULTS = Path(__file__).parent.parent / 'nbs/results'


def evil(runs): return '{"experiment": "toy_of_a_test", "budget": "smoke", "configuration": {"width": 8, "deep": {"lr": 0.1}}, "runs": ' + runs + '}'


@pytest.fixture
def toy():
    "A registered experiment that counts its calls; its configuration and its behaviour can be changed."
    state = type('Toy', (), {'calls': [], 'value': lambda self, seed: {'v': seed + torch.rand(1).item()}})()

    @ev.experiment('toy_of_a_test', claims=('T0',), seeds={'smoke': 3, 'laptop': 3}, config={'smoke': {'width': 8, 'deep': {'lr': .1}}, 'laptop': {}},
                   verdict=lambda rs: {'T0': ev.lower([r['v'] for r in rs], [r['v'] + 1 for r in rs], ('v', 'v + 1'))})
    def toy_of_a_test(seed, budget):
        state.calls.append(seed)
        return state.value(seed)
    yield state
    ev.EXPERIMENTS.pop('toy_of_a_test')


def run(out, **kw): return ev.run('toy_of_a_test', out=out, **kw)


# the runner

def test_record(toy, tmp_path):
    record = run(tmp_path)
    assert set(record) == {'experiment', 'claims', 'title', 'budget', 'configuration', 'command', 'runs'}
    assert [r['seed'] for r in record['runs']] == [0, 1, 2]
    for r in record['runs']:
        assert set(r) == {'seed', 'seconds', 'cpu', 'device', 'threads', 'date', 'versions', 'result'}
        assert set(r['versions']) == {'python', 'torch', 'numpy', 'flowbook'}
    text = (tmp_path / 'toy_of_a_test.smoke.json').read_text()
    for secret in (os.uname().nodename, str(Path.home()), str(tmp_path), os.getcwd()): assert secret not in text
    assert json.loads(text) == record == ev.load_result('toy_of_a_test', 'smoke', tmp_path)
    assert ev.verdicts(record)['T0'].state == 'seen'


def test_resumes_after_an_interruption(toy, tmp_path):
    def value(self, seed=None):
        if seed == 2 and toy.calls.count(2) == 1: raise KeyboardInterrupt
        return {'v': torch.rand(1).item()}
    type(toy).value = value
    with pytest.raises(KeyboardInterrupt): run(tmp_path)
    assert len(ev.load_result('toy_of_a_test', 'smoke', tmp_path)['runs']) == 2
    record = run(tmp_path)
    assert toy.calls == [0, 1, 2, 2]
    assert [r['result'] for r in record['runs']] == [r['result'] for r in run(tmp_path / 'other')['runs']]   # the same as without the interruption
    assert run(tmp_path, seeds=[5])['command'].endswith('--seeds 0,1,2,5') and toy.calls[-1] == 5
    run(tmp_path, seeds=3); assert toy.calls[-1] == 5                                                        # nothing missing, nothing run


@pytest.mark.fault('processes', 'an experiment is killed in the middle of a seed', 'the finished seeds are on disk, whole; the same command goes on with the one that is missing')
def test_killed_in_the_middle_of_a_seed(tmp_path):
    script = textwrap.dedent('''
        import sys, time
        from flowbook import evidence as ev
        @ev.experiment('slow', seeds={'smoke': 3})
        def slow(seed, budget):
            if seed: time.sleep(60)
            return {'v': 1.}
        ev.run('slow', out=sys.argv[1])''')
    p = subprocess.Popen([sys.executable, '-c', script, str(tmp_path)])
    path, end = tmp_path / 'slow.smoke.json', time.time() + 60
    while not path.exists() and time.time() < end: time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    assert len(ev.read_result(path)['runs']) == 1 and list(tmp_path.iterdir()) == [path]


def test_other_configuration_is_refused_by_its_key(toy, tmp_path):
    run(tmp_path)
    path = tmp_path / 'toy_of_a_test.smoke.json'
    before, config = path.read_bytes(), ev.EXPERIMENTS['toy_of_a_test'].config['smoke']
    for change, says in (({'width': 16}, 'configuration.width was 8 and is 16'), ({'deep': {'lr': .2}}, 'configuration.deep.lr was 0.1 and is 0.2'), ({'extra': 1}, 'configuration.extra is new')):
        kept = dict(config); config.update(change)
        with pytest.raises(ValueError, match=says.replace('.', r'\.')): run(tmp_path)
        config.clear(); config.update(kept)
    assert path.read_bytes() == before and toy.calls == [0, 1, 2]
    config['width'] = 16
    assert run(tmp_path, force=True, seeds=1)['configuration']['width'] == 16 and toy.calls == [0, 1, 2, 0]


@pytest.mark.fault('disk', 'the result file of an experiment is cut off, empty, or damaged', 'refused, the file is named and left as it is, with force too; look at it, then delete it to run anew')
@pytest.mark.parametrize('damage', [lambda t: t[:-30], lambda t: '', lambda t: '[]', lambda t: t.replace('"runs"', '"walks"'), lambda t: t.replace('"seed": 1', '"seed": "one"'), lambda t: '\x00' * 100])
def test_damaged_file_is_named_and_left_alone(toy, tmp_path, damage, tried):
    run(tmp_path)
    path = tmp_path / 'toy_of_a_test.smoke.json'
    path.write_text(bad := damage(path.read_text()))
    for call in (lambda: run(tmp_path), lambda: run(tmp_path, force=True), lambda: ev.load_result('toy_of_a_test', 'smoke', tmp_path)):
        with pytest.raises(ValueError, match='toy_of_a_test.smoke.json') as e: call()
    tried(times=3, said=e.value)
    assert path.read_text() == bad and toy.calls == [0, 1, 2]


@pytest.mark.fault('malice', 'a result file with a pickle, numbers that are none, other keys, no seeds, or brackets a million deep', 'refused, the file is named, nothing runs; the listing calls it damaged')
@pytest.mark.parametrize('text', [pickle.dumps({'runs': []}).decode('latin-1'), '[' * 10**6, '{"a":' * 10**5, evil('[]'), evil('[{"seed": 0, "result": {"v": NaN}}]'), evil('[{"seed": 0, "result": {"v": "1"}}]'), evil('[{"seed": 0, "result": {"v": null}}]'), evil('[{"seed": 0, "result": {}}, 3]'), evil('[{"seed": true, "result": {}}]')])
def test_a_result_file_of_others_is_held_to_what_we_write(toy, tmp_path, text, tried, capsys):
    path = tmp_path / 'toy_of_a_test.smoke.json'
    path.write_text(text, encoding='latin-1')
    for call in (lambda: run(tmp_path), lambda: run(tmp_path, force=True), lambda: ev.load_result('toy_of_a_test', 'smoke', tmp_path)):
        with pytest.raises(ValueError, match='toy_of_a_test.smoke.json') as e: call()
    tried(times=4, said=e.value)
    assert experiment.main(['--list', '--out', str(tmp_path)]) == 0 and 'smoke: the file is damaged' in capsys.readouterr().out
    assert toy.calls == [] and list(tmp_path.iterdir()) == [path]


@pytest.mark.fault('malice', 'the results of an experiment lack what its verdict reads', 'the verdict is refused by name, and the listing calls the file damaged; run the experiment anew')
def test_results_that_cannot_be_judged(toy, tmp_path, tried, capsys):
    run(tmp_path)
    path = tmp_path / 'toy_of_a_test.smoke.json'
    path.write_text(path.read_text().replace('"v"', '"w"'))
    with pytest.raises(ValueError, match='record: .*toy_of_a_test') as e: ev.verdicts(ev.load_result('toy_of_a_test', 'smoke', tmp_path))
    tried(times=3, said=e.value)
    assert experiment.main(['--list', '--out', str(tmp_path)]) == 0 and 'smoke: the file is damaged' in capsys.readouterr().out
    assert experiment.main(['toy_of_a_test', '--out', str(tmp_path)]) == 2 and 'do not hold what its verdict reads' in capsys.readouterr().err


@pytest.mark.fault('malice', 'the name of an experiment leads out of the folder of results', 'refused: a name is letters, digits and _')
@pytest.mark.parametrize('name', ['../secret', '/etc/passwd', 'a/b', '..', 'a\0b', ''])
def test_no_name_leads_out_of_the_folder(tmp_path, name, tried):
    (tmp_path / 'secret.smoke.json').write_text('{}'); (tmp_path / 'out').mkdir()
    for call in (lambda: ev.load_result(name, 'smoke', tmp_path / 'out'), lambda: ev.run(name, out=tmp_path / 'out'), lambda: ev.result_path(name, 'smoke', tmp_path / 'out')):
        with pytest.raises(ValueError, match='name: ') as e: call()
    tried(times=3, said=e.value)


@pytest.mark.parametrize('value,place', [({'loss': float('nan')}, 'seed 0.loss is nan'), ({'a': {'b': [1., float('inf')]}}, r'a\.b\[1\] is inf'), ({'t': torch.ones(2)}, 'Tensor'), ({3: 1.}, 'not text'), ({'s': 'x'}, 'plain numbers'), ([1.], 'returned list'), (None, 'returned NoneType')])
def test_results_are_finite_numbers(toy, tmp_path, value, place):
    type(toy).value = lambda self, seed: value
    with pytest.raises(ValueError, match=place): run(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault('disk', 'the disk is full while a result is written', 'the old file stays, whole, and nothing half-written beside it; free space, then run the same command')
def test_a_failed_write_leaves_the_old_file(toy, tmp_path, monkeypatch):
    run(tmp_path, seeds=1)
    path = tmp_path / 'toy_of_a_test.smoke.json'
    before = path.read_bytes()
    def full(*a): raise OSError('no space left on device')
    monkeypatch.setattr(ev.os, 'fsync', full)
    with pytest.raises(OSError): run(tmp_path, seeds=2)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_seed_decides_and_the_caller_keeps_its_random_state(toy, tmp_path):
    torch.manual_seed(7); want = torch.rand(3)
    torch.manual_seed(7); a = run(tmp_path / 'a')
    assert torch.equal(torch.rand(3), want)
    torch.manual_seed(8); b = run(tmp_path / 'b')
    assert [r['result'] for r in a['runs']] == [r['result'] for r in b['runs']]
    assert len({r['result']['v'] - r['seed'] for r in a['runs']}) == 3


@pytest.mark.parametrize('kw,says', [(dict(budget='gpu'), 'it has smoke, laptop'), (dict(budget='tiny'), 'no budget'), (dict(seeds=0), '1 or more'), (dict(seeds=[1, 1]), 'different'), (dict(seeds=[-1]), 'from 0 on'), (dict(seeds=[]), '1 or more')])
def test_bad_requests(toy, tmp_path, kw, says):
    with pytest.raises(ValueError, match=says): run(tmp_path, **kw)
    assert not toy.calls


def test_bad_registrations():
    ok = lambda seed, budget: {}
    for args, says in (((dict(name='a/b'),), 'letters'), ((dict(name='x', claims='T1'),), 'tuple'), ((dict(name='x', seeds={'laptop': 3}),), 'smoke'), ((dict(name='x', seeds={'smoke': 1, 'huge': 3}),), 'huge'),
                       ((dict(name='x', seeds={'smoke': 1}, config={'smoke': {}, 'laptop': {}}),), 'config'), ((dict(name=NAMES[0]),), 'taken')):
        with pytest.raises(ValueError, match=says): ev.experiment(**args[0])(ok)
    assert list(ev.EXPERIMENTS) == NAMES
    with pytest.raises(ValueError, match='bits_per_dim'): ev.find('bits_per_dims')


def test_a_chapter_that_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(ev, 'CHAPTERS', ('evidence', 'no_such_chapter'))
    with pytest.raises(ImportError, match='no_such_chapter'): ev.registry()


# the statistics

@pytest.mark.parametrize('n', [3, 4, 5, 8, 10])
def test_rule_against_nothing_and_against_something(n):
    rng = np.random.default_rng(n)
    null = rng.standard_normal((100_000, n))
    false = (ev.rule(null) != 0).mean()
    assert false < .05 + 4 * (.05 * .95 / 1e5)**.5
    if n <= 5: assert false > .047                            # up to five seeds the vote adds nothing to the interval
    effect = ev.detectable(2., n)
    brute = (ev.rule(-2 * rng.standard_normal((40_000, n)) - effect) == -1).mean()
    assert abs(brute - .8) < .01 and abs(ev.power(effect, 2., n) - .8) < .01
    for p in (.5, .95): assert abs((ev.rule(rng.standard_normal((40_000, n)) + ev.detectable(1., n, p)) == 1).mean() - p) < .012


def test_detectable_is_exact_where_there_is_a_formula():
    for n in (3, 4):
        assert abs(1 - stats.nct.cdf(stats.t.ppf(.975, n - 1), n - 1, n**.5 * ev.detectable(1, n)) - .8) < .004
    assert ev.detectable(1, 3) > 3 > 2 * ev.detectable(1, 8)  # three seeds need several standard deviations
    sizes = [ev.detectable(1, n) for n in range(3, 15)]
    assert ev.detectable(1, 5) == ev.detectable(1, 5) and min(sizes[0], sizes[1]) > max(sizes[4:])


def test_compare_is_the_paired_interval():
    rng = np.random.default_rng(0)
    for n in (3, 5, 9):
        a = rng.normal(2, 1, n); b = a + rng.normal(.3, .1, n)
        c, want = ev.compare(a, b), stats.ttest_rel(a, b)
        np.testing.assert_allclose([c.diff, c.low, c.high], [(a - b).mean(), *want.confidence_interval(.95)], rtol=1e-10)
        assert c.verdict == ('a<b' if ev.rule(a - b) < 0 else 'not seen') and ev.compare(b, a).diff == pytest.approx(-c.diff)
    assert ev.compare([1, 1], [2, 2]).verdict == 'not seen' and ev.compare([0, 0, 0], [1, 1, 1]).verdict == 'a<b' and ev.compare([1, 1, 1], [1, 1, 1]).verdict == 'not seen'
    d = np.array([1., 1.01, .99, 1., -.001, -.002, 1, 1, 1, 1])       # eight of ten are enough, seven are not
    assert ev.rule(d) == 1 and ev.rule(np.append(d[:-1], -.001)) == 0
    for bad in (([1], [1, 2]), ([], []), ([1, float('nan'), 2], [1, 2, 3])):
        with pytest.raises(ValueError): ev.compare(*bad)


def test_verdicts_are_sentences_with_their_numbers():
    assert ev.identity(1e-9, 1e-8, 'x').state == 'exact' and ev.identity(1e-7, 1e-8, 'x').state == 'failed' and ev.identity(float('nan'), 1e-8, 'x').state == 'failed'
    v = ev.lower([1., 1.3, .8], [1.1, 1.2, .9], ('A', 'B'), 'bits/dim', 500)
    assert v.state == 'not seen' and '3 seeds of 500 steps' in v.reason and 'bits/dim is seen in 80%' in v.reason
    assert {ev.lower([1], [2], 'ab').state, *(s for s in ('exact', 'failed', 'seen', 'reversed', 'not seen'))} == set(ev.STATES)


@pytest.mark.skipif(not RESULTS.is_dir(), reason='the results lie in the checkout')
def test_every_verdict_of_the_book_prints_as_a_table(capsys):
    "No line wider than a page; every comparison and identity of a reason is a row; marks are those of the states; nothing is lost."
    for name, e in ev.registry().items():
        if not ev.result_path(name, 'laptop', RESULTS).exists(): continue
        judged = ev.verdicts(ev.load_result(name, 'laptop', RESULTS))
        ev.show_verdicts(judged)
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 110
        for claim, v in judged.items():
            rows = [ev.as_row(s) for s in ev.sentences(v.reason.replace('; not judged: ', '; '))]
            assert len([r for r in rows if r]) == len(re.findall(r'largest error|: difference |: a factor of ', re.sub(r'spread of the logarithm \S+: a factor of', '', v.reason)))
            main = [r[''] for s in ev.sentences(v.reason.partition('; not judged: ')[0]) if (r := ev.as_row(s))]
            if v.state in ('exact', 'seen'): assert set(main) <= {'✓'}, claim
            if v.state == 'reversed': assert '✗' in main, claim
            for number in re.findall(r'(?<!factor of )(?:difference|interval|error|factor of) (-?[\d.e+-]+)', v.reason): assert number.rstrip('.') in out, (claim, number)
    v = ev.all_of(ev.lower([1, 2, 3], [2, 2, 2], ('A', 'B'), 'dB', 500), ev.lower([1, 1.1, 1.2], [2, 2.1, 2.3], ('what: A', 'B')))
    assert str(v) == ev.as_table(v) and '80% at: the difference that 3 seeds of 500 steps' in str(v).replace('\n  ', ' ') and v.reason in repr(v)
    with pytest.raises(ValueError, match='there is x'): ev.show_verdicts({'x': v}, 'y')


def test_plot_seeds():
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ev.plot_seeds(ax, {'a': [1, 2, 3], 'b': [2, 3, 4]}, 'y')
    assert [t.get_text() for t in ax.get_xticklabels()] == ['a', 'b']
    ev.plot_seeds(ax, {'a': [1], 'b': [2, 3]}, paired=False)
    with pytest.raises(ValueError, match='equally many'): ev.plot_seeds(ax, {'a': [1], 'b': [2, 3]})
    plt.close(fig)


# the command and the committed results

def command(*args, **kw): return subprocess.run([sys.executable, '-m', 'flowbook.scripts.experiment', *map(str, args)], capture_output=True, text=True, timeout=300, **kw)


AGAIN = 'alignment_mnist', # the functions of another experiment at other settings: in CI alone


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in AGAIN else n for n in NAMES])
def test_smoke_run_of_every_experiment(name, tmp_path, capsys):
    assert experiment.main([name, '--out', str(tmp_path)]) == 0
    record, out = ev.load_result(name, 'smoke', tmp_path), capsys.readouterr().out
    assert record['command'].startswith(f'flowbook_experiment {name} --budget smoke')
    for claim, v in ev.verdicts(record).items(): assert claim in record['claims'] and v.state in ev.STATES and claim in out
    assert sum(r['seconds'] for r in record['runs']) < 60


def test_the_command_in_a_process_of_its_own(tmp_path):
    p = command('maf_limit', '--out', tmp_path)
    assert p.returncode == 0 and 'T4' in p.stdout, p.stderr
    assert ev.load_result('maf_limit', 'smoke', tmp_path)['command'].startswith('flowbook_experiment maf_limit --budget smoke')


def test_command_lists_and_refuses(tmp_path, capsys):
    def main(*args):
        try: code = experiment.main(list(map(str, args)))
        except SystemExit as e: code = e.code
        return code, *(' '.join(t.split()) for t in capsys.readouterr())
    code, out, _ = main('--list', '--out', tmp_path)
    assert code == 0 and all(n in out for n in NAMES) and 'none yet' in out
    code, _, err = main('bits_per_dims', '--out', tmp_path)
    assert code == 2 and 'bits_per_dim' in err
    assert main('maf_limit', '--seeds', 'many')[0] == main()[0] == main('maf_limit', '--threads', '0')[0] == main('maf_limit', '--budget', 'gpu', '--out', tmp_path)[0] == 2
    (tmp_path / 'maf_limit.smoke.json').write_text('{"exp')
    code, _, err = main('maf_limit', '--out', tmp_path)
    assert code == 2 and 'maf_limit.smoke.json' in err and 'damaged' in main('--list', '--out', tmp_path)[1]
    code, out, _ = main('--help')
    assert code == 0 and all(word in out for word in ('--budget', '--seeds', '--force', 'two cores'))
    p = command('maf_limits', '--out', tmp_path)               # the same through a process: no traceback
    assert p.returncode == 2 and 'maf_limit' in p.stderr and 'Traceback' not in p.stderr


def test_command_says_when_a_result_is_stale_or_an_identity_fails(tmp_path, capsys, monkeypatch):
    assert experiment.main(['maf_limit', '--out', str(tmp_path)]) == 0
    monkeypatch.setitem(ev.EXPERIMENTS['maf_limit'].config['smoke'], 'blocks', 3)
    assert experiment.main(['--list', '--out', str(tmp_path)]) == 0 and 'stale, configuration.blocks was 2 and is 3' in capsys.readouterr().out
    assert experiment.main(['maf_limit', '--out', str(tmp_path)]) == 2 and '--force' in capsys.readouterr().err
    assert experiment.main(['maf_limit', '--out', str(tmp_path), '--force', '--seeds', '2']) == 0 and 'seed 1:' in capsys.readouterr().out
    path = tmp_path / 'maf_limit.smoke.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'runs': [r | {'result': r['result'] | {'log_prob': 1.}} for r in json.loads(path.read_text())['runs']]}))
    assert experiment.main(['maf_limit', '--out', str(tmp_path), '--seeds', '2']) == 1 and 'T4 failed' in capsys.readouterr().out


@pytest.mark.skipif(not RESULTS.is_dir(), reason='the results lie in the checkout')
def test_committed_results_are_current_and_positive():
    states = {}
    for name, e in ev.registry().items():
        if 'laptop' not in e.seeds: continue
        record = ev.load_result(name, 'laptop', RESULTS)
        assert ev.difference(record['configuration'], e.config['laptop']) is None
        assert len(record['runs']) >= e.seeds['laptop']
        assert sum(r.get('cpu', 0) for r in record['runs']) < 2 * 20 * 60, name       # twenty minutes of two cores
        states |= {c: v.state for c, v in ev.verdicts(record).items()}
    assert {c: states[c] for c in ('T1', 'T2', 'T3', 'T4', 'T5')} == {'T1': 'exact', 'T2': 'exact', 'T3': 'exact', 'T4': 'exact', 'T5': 'seen'}
    assert {c: states[c] for c in ('T8', 'T9', 'T10', 'T13', 'T17')} == {'T8': 'seen', 'T9': 'seen', 'T10': 'seen', 'T13': 'seen', 'T17': 'exact'}
    assert {c: states[c] for c in ('R1', 'R3', 'R4')} == {'R1': 'seen', 'R3': 'exact', 'R4': 'exact'}


def test_models_of_t5_are_equally_large():
    from flowbook.tarflow import families, free_count, param_count
    c = ev.find('bits_per_dim').config['laptop']
    flows = {k: make() for k, make in families(c).items()}
    target = param_count(flows['tarflow'])
    for k in ('maf', 'coupling', 'coupling_deep'): assert abs(param_count(flows[k]) / target - 1) < .05
    assert abs(free_count(flows['maf_free']) / target - 1) < .05
    assert len(flows['tarflow'].parts()) == len(flows['maf'].parts()) == len(flows['coupling'].parts()) == len(flows['coupling_deep'].parts()) // 2
    # what a mask switches off never gets a gradient; what free_count counts does
    maf, x = flows['maf'], torch.rand(256, 1, 8, 8)
    from flowbook.flows import shake
    (-shake(maf, .3).log_prob(x).mean()).backward()
    moved = sum(int((p.grad != 0).sum()) for p in maf.parameters())
    assert .9 * free_count(maf) < moved <= free_count(maf)
