"""The wheel and the source archive install and import outside of the checkout, with the weights and the commands."""
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp('dist')
    r = subprocess.run([sys.executable, '-m', 'build', '--outdir', str(out), str(ROOT)], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    return next(out.glob('*.whl')), next(out.glob('*.tar.gz'))


def test_the_wheel_holds_what_it_should(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert 'flowbook/tarflow.py' in names and 'flowbook/scripts/demo.py' in names
    assert 'flowbook/weights/digits-classifier/model.safetensors' in names
    assert not [n for n in names if n.startswith(('tests/', 'nbs/'))]
    meta = zipfile.ZipFile(built[0]).read(next(n for n in names if n.endswith('METADATA'))).decode()
    for line in ('License-Expression: Apache-2.0', 'Requires-Python: >=3.10', 'Provides-Extra: dev', 'Requires-Dist: torch>=2.8'):
        assert line in meta or line.replace('License-Expression', 'License') in meta, line
    assert 'Classifier: Intended Audience :: Science/Research' in meta
    entry = zipfile.ZipFile(built[0]).read(next(n for n in names if n.endswith('entry_points.txt'))).decode()
    assert 'flowbook_demo' in entry and 'flowbook_experiment' in entry


def test_the_archive_holds_what_setup_needs(built):
    names = {n.split('/', 1)[1] for n in tarfile.open(built[1]).getnames() if '/' in n}
    assert {'settings.ini', 'README.md', 'setup.py', 'LICENSE', 'flowbook/tarflow.py'} <= names


@pytest.mark.parametrize('which', [0, 1], ids=['wheel', 'sdist'])
def test_it_installs_and_runs_elsewhere(built, which, tmp_path):
    r = subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(tmp_path/'site'), str(built[which])], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    r = subprocess.run([sys.executable, '-c', '''
import sys; sys.path.insert(0, "site")
import flowbook, torch
from flowbook.metrics import digit_classifier
from flowbook.tarflow import TarFlow
print(flowbook.__file__); digit_classifier()(torch.zeros(1, 1, 8, 8)); TarFlow(8, 1, 2, 16, 1, 1, 8).sample(1)'''], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert Path(r.stdout.strip()).resolve().is_relative_to((tmp_path/'site').resolve())
