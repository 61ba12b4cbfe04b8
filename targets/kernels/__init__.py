"""One kernel template a file: what it computes (TE) and how it is scheduled (TensorIR).

Shape suffixes used here: N batch, C channel blocks, L lanes (channels in a block), H rows, W columns; I and O are input
and output sides, so an activation is x_NCHWL and packed weights are w_OIHWLL.
"""
