from doors import door
from doors.flows import FOLDERS
from flowbook.claims import CLAIMS, Claim

DOORS = [
    door('figures', lambda tmp: dict(c=CLAIMS['T6']), c=[None, 'T6']),
    door('figures', lambda tmp: dict(c=CLAIMS['T6']), says={'c': 'X'}, c=[Claim('X', '', '', '{no-such: FID}'), Claim('X', '', '', '{tarflow-64: IS}')]),
    door('printed', lambda tmp: dict(name='tarflow-64', metric='FID'), name=['tarflow-65', '', None], metric=['IS', None]),
    door('row', lambda tmp: dict(c=CLAIMS['T1'], out=tmp))._replace(bad=dict(c=[None, 'T1'], out=[v for v in FOLDERS if v is not None])),
    door('ledger', lambda tmp: dict(out=tmp))._replace(bad=dict(out=[v for v in FOLDERS if v is not None])),
    door('as_html', lambda tmp: dict(rows={}, paper='T'), paper=['X', None, 3, 'TARFlow']),
]
INNER = {'records': 'Claim Reading Row', 'made from what `ledger` returned': 'counts counts_table as_text squares in_html not_positive without_power of_reading unseen leaning telling', 'sentences from figures, rows and results': 'corrections tarflow_corrections rrepa_corrections simflow_corrections notation_error', 'a step of `row`': 'reading', 'the check itself': 'check_claim'}
