"""References: what each algorithm is, in NumPy and float64, with its claims stated as data.

A module per algorithm, under the stem that the kernel, the operator and the test share.  Nothing here is fast and
nothing here imports the rest of kvbench: the reference is what everything else is compared with.
"""
