"""`lmjax bench`: how fast this is, beside what else could be used and beside what the machine could do.

What lives here: one file a command, the harness that runs contenders by turns (`rounds` in the parent, `child` in
each contender), and what they measure on. What does not: other people's training loops, which stand in
`tests/benchmarks/peers/`, and anything that training itself needs. How to read the figures:
`docs/performance.md`.
"""
