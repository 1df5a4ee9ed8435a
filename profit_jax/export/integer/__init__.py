"""Integer files: every convolution, sum and product computes on int8, at the price of a difference
that the export measures.
"""
