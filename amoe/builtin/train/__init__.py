"""How the built-in model was made: corpus, tokenizer, training loop, export and evaluation.

`python -m amoe.builtin.train` trains it, `python -m amoe.builtin.train.evaluate` measures it. Nothing else in `amoe`
imports this package, which alone needs the optional extra "train".
"""
