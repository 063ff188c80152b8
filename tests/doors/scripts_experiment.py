from doors import door
from doors.flows import FOLDERS

DOORS = [door('listing', lambda tmp: dict(out=tmp), out=[v for v in FOLDERS if v is not None and not callable(v)] + [__file__])]
INNER = {'the command line; its mistakes are tried in test_evidence.py': 'parser main seeds_arg run_again', 'lines of the listing and of the report, made from records that were checked when they were read': 'state report recorded'}
