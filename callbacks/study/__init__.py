"""Studies: a grid of tasks, algorithms and seeds, run by one command and compared by another.

python -m callbacks.study run emax/study_laptop --out runs/laptop --workers 2
python -m callbacks.study report runs/laptop --markdown
"""
