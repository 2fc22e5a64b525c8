"""`lmjax score` and `lmjax analyze`: what a model expects of a text, where it loops, how far it reads.

What lives here: the commands, what they print and the pages they write. What does not: the numbers (`lmjax.evals`).
"""
