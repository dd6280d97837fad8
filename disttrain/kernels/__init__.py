"""Native kernels: C++ that computes what an op's definition says, faster, where there is a compiler and it applies.

A kernel takes the arrays and attributes of its op, and memory for the result where a plan has some. It returns a
`Launch`, which computes when it is run, or None where it does not apply: another dtype, arrays that are not NumPy's or
not contiguous, shapes that are the definition's to refuse, no kernels here. The definition then computes; it stays what
is right, and the oracle of the tests.
"""
