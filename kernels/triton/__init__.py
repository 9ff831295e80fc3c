"""The fast twins of floor 1, in Triton. Nothing outside `kernels` imports from here, but to
compile ahead.

plan.py       which blocks of keys and queries meet, once per batch: by tiles.py, query_tiles.py and
              key_tiles.py, and halves.py for hopper/; runs.py and masked.py read that in a kernel,
              and know of tiles that were left
forward.py    attention forward, one program per query tile and head
backward.py   attention backward: dk and dv per key tile, dq per query tile; no atomic sums
slopes.py     what one kernel of the backward keeps in memory for the others, where that is faster
hopper/       both again, of one source, by programs that stay, and the backward in one pass where
              sums may come in any order: in Gluon, for Hopper, where configs.py says so
silu.py       SiLU and its slope through tanh, for both; through.py: gradients taken back through it
configs.py    block shapes per GPU generation and head dim
launch.py     what attention.py calls: a launch or several, of kernels that configs.py chose
resident.py   those of hopper/; walk.py: the sources of a launch; target.py: tensors as kernels read
              and write them
launcher.py   compiled kernels, found again by what their arguments are
ahead.py      kernels compiled side by side, before they are launched
operator.py   all of it as one operator that autograd and torch.compile know
projected.py  attention whose backward goes on through a projection's SiLU

layer_norm.py, gated_norm.py, pointwise.py   what lies between a layer's matrix products
sampled_softmax.py                           and between those of a loss
row_sums.py                                  rows of tables added up, and their gradients
rows.py                                      what those share
"""
