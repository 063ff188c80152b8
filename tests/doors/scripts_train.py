DOORS = []
INNER = {
    'the command line: mistakes are tested in test_train_script.py (test_mistakes_end_with_a_sentence)': 'parser configured main cli check_room world_here',
    'the word for schedulers, of a run that `main` has begun; a folder in its place is tested in test_train_script.py': 'write_status status_of',
    'the sentence of a mistake, which another function made': 'first_to_say give_up',
}
