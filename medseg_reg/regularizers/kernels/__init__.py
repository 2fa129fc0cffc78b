"""Fast forms of what the regularizers do to a map, each equal to a plain rule of a few lines.

Nearly everything is made of torch operators: no compiler, no further package. What they save is
passes over the map, and on CPU the pages of new memory that each large result touches. On a CUDA
GPU Heuristic Dropout has Triton kernels, which torch brings along there. The plain rules are in
tests/reference/kernels.py. Nothing here imports a regularizer.

| file | what it does |
|---|---|
| ``blocks.py`` | goes through a map on CPU a cache-full at a time |
| ``elements.py`` | drops single elements; four random numbers from each draw of the generator |
| ``histogram.py`` | counts the levels of each channel, with its variance, in one pass |
| ``masks.py`` | multiplies by a mask of channels and one of positions in a single pass |
| ``operators.py`` | custom operators: the Triton kernels where they can run, else the plain rules |
| ``peaks.py`` | where each channel, averaged over its neighbourhoods, is greatest |
| ``planes.py`` | filters chosen channels and leaves the others alone |
| ``points.py`` | random points on a map, more of them where it is strong |
| ``triton_kernels.py`` | Heuristic Dropout on a GPU: histogram, variance, planes |
"""
