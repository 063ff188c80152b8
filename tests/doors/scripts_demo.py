from doors import door, whole

DOORS = [
    door('pick_device')._replace(good=lambda tmp: dict(name='cpu'), bad={'name': ['abacus', None, 3.5, []]}, says={'name': '--device'}),
    door('pick_patch', lambda tmp: dict(size=8), size=whole()),
    door('fresh_folder', lambda tmp: dict(out=str(tmp/'out')), out=[None, 3, '', []], says={'out': '--out'}),
]
INNER = {
    'the command line, whose mistakes are tested in test_demo.py (test_mistakes_end_with_a_sentence), and its steps, which come after them': 'parser arguments check_typed main cli run watched keep affordable_steps judge_samples draw_loss ways joint_model run_simflow keep_simflow',
    'called by `experiment` of chapter 03, which looks at seeds and budgets': 'judge_demo demo_experiment',
}
