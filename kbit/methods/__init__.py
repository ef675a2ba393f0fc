"""Methods: a file per method, behind one protocol (``protocol.Method``); ``kbit.spec.METHODS`` maps names to specs.

``kbit.models.quantize.quantize_model`` keeps the loop, the way back, the counting of bits and the hash of codebooks. It
does not change when a method comes: to add one, write its spec, enter it in METHODS, and write the function that
``Spec.runs`` names.
"""
