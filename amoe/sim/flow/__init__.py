"""The simulator for large deployments: counts of tokens instead of tokens.

Where a whole wave moves together (lockstep, two-batch overlap, staggered strict waves) nothing depends on which token
is where, only on how many of (home, wave) go to which expert. So a step is one event, a dispatch one vector operation
over all owners, and a thousand devices take minutes. What it says about waves is held against `amoe.sim.simulator`,
which drives the engine's own `WorkerCore` token by token, in the tests.
"""
