"""llama.cpp's formats of weights: bytes of a block, quantizers, recipes over whole models. Nothing loads torch here."""
