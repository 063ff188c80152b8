"""Every public name of the library says in one line what it is; no two modules export one name for two things that a user meets."""
import ast
from pathlib import Path

import pytest

LIB = Path(__file__).parents[1]/'flowbook'
MODULES = sorted(f for f in LIB.rglob('*.py') if f.name not in ('__init__.py', '_modidx.py'))


def undocumented(file):
    "Public functions, classes, and public methods that are not one expression, without a docstring."
    tree = ast.parse(file.read_text(encoding='utf-8'))
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        if not ast.get_docstring(node): yield node.name
        elif len(ast.get_docstring(node).splitlines()[0]) < 5: yield node.name + ': too short'


@pytest.mark.parametrize('file', MODULES, ids=lambda f: f.relative_to(LIB).with_suffix('').as_posix())
def test_says_what_it_is(file): assert list(undocumented(file)) == []


def test_a_missing_one_is_found(tmp_path):
    (tmp_path/'m.py').write_text('def told():\n    "Says it."\ndef silent(): pass\ndef _own(): pass\nclass C: pass\n')
    assert list(undocumented(tmp_path/'m.py')) == ['silent', 'C']
