"""Floor 2: who holds what and how it moves. Knows nothing of losses or configuration files.

In the order of a step; a file's first lines say more.

mesh           dp x cp processes, and how those of a cp group reach each other (links)
batch, shard   what a process has read, and what it holds once ranks have traded slices:
               balance deals sequences to dp groups, whole says which of a cp group's are not cut,
               layout who holds which positions of those that are
visibility     what queries see of other ranks' rows, found from the ends of spans
embedding/     ids to the processes that hold their rows in the tables, rows back
attention      over a cp group, by one of exchange/
dense          DDP

Rows move in three ways. By `trade`, a collective: ids and rows of tables, heads. By `transport`,
messages of two ranks beside attention, over copy engines or send and receive: `exchange.ring_pass`
turns them in a circle, `swaps` sends each rank's to every other at once. By `relayout`, which
is `swaps` of just the rows that change owner: what a halo does, and models that change layouts.
"""
