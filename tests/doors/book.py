import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from doors import door
from flowbook import book

ROOT = Path(__file__).parents[2]
NO_PATH = [None, 3, [], '']                                   # of what should be a path


def notebook(path, *cells):
    nb = new_notebook(cells=[new_markdown_cell('# A')] + [new_code_cell(c) for c in cells])
    nbformat.write(nb, path)
    return str(path)


def one(tmp): return notebook(tmp/'a.ipynb')


def checkout(tmp):
    (tmp/'nbs').mkdir()
    shutil.copy(ROOT/'settings.ini', tmp)
    notebook(tmp/'nbs'/'index.ipynb')
    return tmp


def spoilt(good): # the same with another file there
    (Path(good['path']).parent/'b.ipynb').write_bytes(bytes(range(256)))
    return str(Path(good['path']).parent/'b.ipynb')


def asked(root): # all checks of a good checkout take a minute, so that only the first is asked of it
    return book.check(root) if root != ROOT else book.settings(root)


def exercise(tmp): return book.Exercise(Path(one(tmp)), 'ex-a', {}, ['there is no check cell'])


DOORS = [
    door('book_root', lambda tmp: dict(path=checkout(tmp)), path=[*NO_PATH, '/']),
    door('settings', lambda tmp: dict(root=checkout(tmp)), root=[*NO_PATH, 'not there']),
    door('notebooks', lambda tmp: dict(root=checkout(tmp)), root=[*NO_PATH, 'not there']),
    door('read_notebook', lambda tmp: dict(path=one(tmp)), path=[*NO_PATH, 'not there', '.', spoilt]),
    door('run_notebook', lambda tmp: dict(path=one(tmp)), path=[*NO_PATH, 'not there', spoilt], timeout=[0, -1, 'long', None, True, float('nan')]),
    door('run', lambda tmp: dict(paths=[]), paths=[None, 'a.ipynb', 3, [3], [None], ['']]),
    door('run', lambda tmp: dict(paths=[]), paths=[['not there']])._replace(says={'paths': 'path'}),
    door('processed', lambda tmp: dict(path=one(tmp)), path=[*NO_PATH, 'not there', spoilt]),
    door('make_page', lambda tmp: dict(path=one(tmp)), path=[*NO_PATH, 'not there', spoilt]),
    door('readme', lambda tmp: dict(root=checkout(tmp)), root=[*NO_PATH, 'not there']),
    door('readme_problems', lambda tmp: dict(root=checkout(tmp)), root=[*NO_PATH, 'not there']),
    door('pages', lambda tmp: dict(root=checkout(tmp), out=tmp/'site'), root=[*NO_PATH, 'not there'], out=[*NO_PATH, lambda good: good['root'], lambda good: good['root']/'settings.ini']),
    door('clean_copy', lambda tmp: dict(path=one(tmp)), path=[*NO_PATH, 'not there', spoilt]),
    door('handout', lambda tmp: dict(root=checkout(tmp), out=tmp/'class'), root=[*NO_PATH, 'not there'], out=[*NO_PATH, lambda good: good['root'], lambda good: good['root']/'settings.ini'], paths=[3, [3], [None]]),
    door('quarto_config', lambda tmp: dict(root=checkout(tmp)), root=[*NO_PATH, 'not there']),
    door('dress', lambda tmp: dict(root=checkout(tmp)), root=[*NO_PATH, 'not there']),
    door('check_site', lambda tmp: dict(out=tmp), out=NO_PATH),
    door('exercises', lambda tmp: dict(path=one(tmp)), path=[*NO_PATH, 'not there', spoilt]),
    door('check_exercise', lambda tmp: dict(ex=exercise(tmp)), ex=[None, 'ex-a', 3, {}]),
    door('report_exercises', lambda tmp: dict(paths=[one(tmp)]), paths=[None, 'a.ipynb', 3, [3], [None]]),
    door('check', lambda tmp: dict(root=ROOT), of=lambda tmp: SimpleNamespace(check=asked), root=[*NO_PATH, 'not there']),
]
INNER = {
    'checks of `check`, which has looked at the checkout': 'bare_references undressed invalid_notebooks unclean_notebooks stale_modules undefined_names outputs stored_errors without_figure malformed_exercises tracked_files machine_paths copied',
    'pieces of what a page, a figure or an exercise is made of': 'fold_answers doors with_doors nbdev fold tidy is_off keep_directives for_reader figure_title is_local move_links stylesheet copy_mathjax name_figures page_link PageReader cell_problems attempt',
    'checks themselves': 'as_path check_paths',
    'the command line: what `check`, `run` and `pages` refuse, as a sentence and status 2; tested in test_book.py': 'run_command readme_command pages_command dress_command handout_command main',
    'records': 'Page Exercise Report',
}
