"""How keys and values reach the ranks whose queries need them: one file a strategy.

Each holds one function with the signature of `ring_attention`: same inputs, same outputs.

ring        rows travel in a circle, hidden behind attention on the block in hand: keys and values,
            backward queries and gradients too; ring_pass.py has its messages
all_gather  collectives bring everything, a few heads at a time; simplest, most memory
halo        only the rows that a rank's queries see are sent, and queries that see much go to the
            keys instead; for windowed masks
ulysses     whole sequences of a part of the heads; at most as many ranks as heads
"""
