"""`lmjax chaos`: faults injected for real into small runs on this machine, and whether each run came through.

`lab` starts, watches and compares runs; `child` is a run with one thing broken inside it; the files named after what
they break hold the faults; `commands` goes through them and prints the table. docs/reliability.md has the promises.
"""
