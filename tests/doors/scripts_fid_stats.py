from doors import Door, door

DOORS = [
    door('join_ranks', lambda tmp: dict(device='cpu'), device=['abacus', None, 3.5, 'cpu cpu']),
    Door('can_write', lambda tmp: dict(path=str(tmp/'a.json'), name='path'), dict(path=[3, None, '', 'a\0b', '.', __file__ + '/a.json']), None, {}),
]
INNER = {'the command line, whose mistakes are tried in test_metrics, and its parts, which get what argparse made': 'parser main best_device add_source pick_source open_source pick_extractor Progress lasting counted_by typed as_script cli'}
