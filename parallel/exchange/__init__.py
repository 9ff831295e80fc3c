"""How keys and values reach the ranks whose queries need them: one file a strategy.

Each file holds one function with the signature of `ring_attention`: same inputs, same outputs.
"""
