"""Search for rates and other parameters on the validation part alone.

| what                                            | file       |
|-------------------------------------------------|------------|
| the file of a search, and what may be searched  | spec.py    |
| trials, their runs and their scores             | trials.py  |
| what is looked at before anything runs          | checks.py  |
| what was drawn, and the draws of Optuna         | draws.py   |
| the draws of controller, random and evolution   | sampled.py |
| the files with what was found                   | found.py   |
| the command                                     | __main__.py |
"""
