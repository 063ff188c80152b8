"""What all tests share: one thread (the models are tiny), no model hub, float32 by default; and the table of faults that they make."""
import json
import os
import signal
import socket
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest
import torch

for name, usual in (('SIGHUP', signal.SIG_DFL), ('SIGINT', signal.default_int_handler)):   # a shell's `nohup` and `&` ignore them, and a run respects that
    if getattr(signal, name, None) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN: signal.signal(getattr(signal, name), usual)

FAULTS, MARKED = {}, {}                                      # what marked tests found in this session; and what all marked tests are called


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield


class Tried:
    "What a test of a fault tells the table: how often it tried, and what it was told."
    def __init__(self): self.times, self.words = 1, ''
    def __call__(self, times=None, said=None):
        if times is not None: self.times = times
        if said is not None: self.words = str(said)


@pytest.fixture
def tried(request):
    request.node.tried = found = Tried()
    return found


def fault_of(item):
    mark = item.get_closest_marker('fault')
    if mark is None: return None
    part, fault, outcome = mark.args
    return part, fault, outcome


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):                    # before the slow ones are taken out
    for item in items:
        if found := fault_of(item): MARKED.setdefault(found, []).append(f'{item.path.name}::{item.originalname}')


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if not (found := fault_of(item)) or not (report.when == 'call' or report.when == 'setup' and report.outcome != 'passed'): return
    part, fault, outcome = found
    row = FAULTS.setdefault(fault, {'part': part, 'fault': fault, 'outcome': outcome, 'said': '', 'tests': {}})
    name = f'{item.path.name}::{item.originalname}' + (' (slow)' if item.get_closest_marker('slow') else '')
    test, tried = row['tests'].setdefault(name, {'tries': 0, 'passed': 0, 'failed': 0, 'skipped': 0}), getattr(item, 'tried', Tried())
    test[report.outcome] += 1
    test['tries'] += tried.times if report.passed else 0
    for place in (item.funcargs.get('tmp_path'), Path(__file__).parent.parent): tried.words = tried.words.replace(str(place), '...') if place else tried.words
    row['said'] = row['said'] or ' '.join(tried.words.replace(socket.gethostname(), 'this-host').split())


def pytest_sessionfinish():
    "FLOWBOOK_FAULTS=FILE: the rows of this session go into FILE, beside those of other sessions."
    if not (path := os.environ.get('FLOWBOOK_FAULTS')) or not FAULTS: return
    path = Path(path)
    rows = {r['fault']: r for r in json.loads(path.read_text())['faults']} if path.exists() and path.stat().st_size else {}
    for fault, new in FAULTS.items():
        old = rows.get(fault, {'tests': {}, 'said': ''})
        rows[fault] = {**new, 'said': new['said'] or old['said'], 'tests': dict(sorted({**old['tests'], **new['tests']}.items()))}
    path.write_text(json.dumps({'command': 'FLOWBOOK_FAULTS=nbs/results/faults.json pytest -m ""', 'faults': sorted(rows.values(), key=lambda r: (r['part'], r['fault']))}, indent=1) + '\n')
