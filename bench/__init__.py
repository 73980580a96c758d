"""The benchmark: meterd as a real daemon beside peers that do less, alternately, in one run.

The rule kept here: a figure counts only when the books are right afterwards. Each row ends by
holding what the daemon says every agreement owes against a sum made in another way.
"""
