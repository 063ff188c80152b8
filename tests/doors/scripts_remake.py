DOORS = []
INNER = {
    'the command line: mistakes are tested in test_remake.py (test_mistakes_end_with_a_sentence)': 'main cli',
    'of a model that was just trained, and of its card': 'know_passes brief',
}
