"""The paper's experiments: parameters, runner, load generator, statistics, figures, and the attack suite.

What belongs here measures the product from outside: it deploys, sends requests, reads what receivers saw and writes
`results/`. Nothing in `kalium` imports it. `fabfile.py` holds the tasks and calls one class or function of this package each.
"""
