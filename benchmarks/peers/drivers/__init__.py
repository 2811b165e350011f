"""One program per engine, run by the Python that has it; only the one of `amoe` imports `amoe`."""
