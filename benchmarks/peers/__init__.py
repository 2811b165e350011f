"""amoe beside its peers on one CPU: the same model, prompts and threads, in interleaved rounds."""
